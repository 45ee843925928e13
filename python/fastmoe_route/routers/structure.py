"""Structure: routers whose scores, experts or mixtures have a form of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._arguments import check_choice, check_int, check_shape, check_tensor, fail
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router, with_defaults
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.parts import (
    LinearRouter,
    assemble,
    every_expert,
    segment_mean,
    sequences,
)
from fastmoe_route.routers.random import gumbel, uniform
from fastmoe_route.routers.scores import (
    Linear,
    Recurrent,
    linear,
    segment_softmax,
    sigmoid,
    wide,
    without_autocast,
)
from fastmoe_route.softmax import softmax


@register("x_moe", row="R7", source="arXiv:2204.09179", verified="code", invariance="C")
class XMoE(Router):
    """X-MoE: cosine scores in a low dimension, so that representations do not collapse.

    `h = x W_p` in 16 dimensions, `z_e = cos(h, e_e) / tau` with a learned `tau`; softmax, the best
    one or two, weights as they are. So `|z| <= 1 / tau`, and scaling `x` or `e_e` changes nothing.
    One expert has the weight `p`; of several, each has `p` over the sum of those that kept a slot.
    The released code does not normalise the token side, though the paper says cosine:
    `normalize_tokens=False` is that. In training `second` may thin out or draw the second expert.

    Defaults: one expert, norm of expert embeddings 1.5, `tau` 0.07 at the start (from memory),
    capacity `floor(1.25 * ceil(T / E))` for one expert, `K * ceil(T / E)` for several, and none in
    evaluation (the authors have `T / 4` there), `aux_coef` 0.01.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        score_size: dimension of the comparison.
        temperature: `tau` at the start; positive.
        normalize_tokens: the paper's cosine.
        second: what becomes of experts after the first in training: `best` keeps them, `random`
            keeps each with probability `2 p`, `gumbel` draws them by Gumbel noise on the logits.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        score_size: int = 16,
        temperature: float = 0.07,
        normalize_tokens: bool = True,
        second: str = "best",
        **common: Unpack[Common],
    ) -> None:
        factor = 1.25 if top_k == 1 else 1.0
        common = with_defaults(common, capacity_factor=factor, aux_coef=0.01, rounding="per_choice")
        super().__init__(hidden_size, num_experts, top_k, **common)
        score_size = check_int(self.name, "score_size", score_size, 1)
        temperature = self.check_number("temperature", temperature, above=0)
        check_choice(self.name, "second", second, ("best", "random", "gumbel"))
        self.normalize_tokens = self.check_flag("normalize_tokens", normalize_tokens)
        self.second = second
        self.project = Linear(hidden_size, score_size)
        directions = F.normalize(torch.randn(num_experts, score_size), dim=1) * 1.5
        self.embeddings = nn.Parameter(directions)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def logits(self, x: Tensor) -> Tensor:
        """The logits `[T, E]`."""
        h = self.project(x)
        if self.normalize_tokens:
            h = F.normalize(h, dim=1)
        directions = F.normalize(self.embeddings.to(h.dtype), dim=1)
        return linear(h, directions) / self.log_temperature.to(h.dtype).exp()

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.logits(x)
        if self.top_k == 1:
            return self.routed(gate(z, 1, stats=self.stats), context)
        noise = None
        if self.training and self.second == "gumbel":
            first = z.detach().argmax(1, keepdim=True)
            noise = gumbel(context, z, self.num_experts).float().scatter(1, first, 1e30)
        routing = gate(z, self.top_k, noise=noise, stats=self.stats)
        if self.training and self.second == "random":
            is_kept = 2 * routing.weights > uniform(context, routing.weights, self.top_k)
            is_kept[:, 0] = True
            experts = torch.where(is_kept, routing.experts, -1)
            routing = assemble(experts, routing.weights, self.num_experts)._replace(
                score_sum=routing.score_sum, logsumexp=routing.logsumexp
            )
        plan = self.plan(routing, context)
        kept = routing.weights if plan is None else routing.weights * (plan.slot_to_row >= 0)
        weights = kept / kept.sum(1, keepdim=True).clamp(min=1e-20)
        return self.routed(routing._replace(weights=weights), context, plan=plan)


@register("hyper_router", row="R18", source="arXiv:2312.07035", verified="code")
class HyperRouter(Router):
    """HyperRouter: the router's weights come from a frozen random network and a learned input.

    `(W, b) = A2 relu(A1 u)` with frozen `A1`, `A2` and a trained embedding `u`; softmax over the
    chosen of `z = x W + b`.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        hyper_size: dimension of `u` and of the hidden layer.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        hyper_size: int = 256,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        hyper_size = check_int(self.name, "hyper_size", hyper_size, 1)
        self.embedding = nn.Parameter(torch.randn(hyper_size))
        size = num_experts * (hidden_size + 1)
        self.hyper = nn.Sequential(
            nn.Linear(hyper_size, hyper_size), nn.ReLU(), nn.Linear(hyper_size, size)
        ).requires_grad_(False)

    def weights(self) -> tuple[Tensor, Tensor]:
        """`W` `[E, H]` and `b` `[E]`."""
        with without_autocast(self.embedding.device):
            made = self.hyper(self.embedding)
        split = self.num_experts * self.hidden_size
        return made[:split].view(self.num_experts, self.hidden_size), made[split:]

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(linear(x, *self.weights()), self.top_k, normalize=True, stats=self.stats)
        return self.routed(routing, context)


@register("rmoe", row="R19", source="arXiv:2408.06793", verified="code")
class RMoE(Router):
    """RMoE: a recurrent router; a token's routing state travels from layer to layer.

    `u = x W_1`, `r = GRU(u, r of the layer before)`, `z = r W_2`; softmax over the chosen. The
    state is per token, across layers, so nothing of other tokens enters. Pass the result's
    `state` as `state` of the next layer; the first layer starts from zeros.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        state_size: dimension of the state.
        cell: the recurrent cell, shared by all layers (`router.cell` of the first); None for a new.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        state_size: int = 256,
        cell: Recurrent | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **with_defaults(common, aux_coef=0.01))
        state_size = check_int(self.name, "state_size", state_size, 1)
        self.state_size = state_size
        self.enter = Linear(hidden_size, state_size)
        if cell is not None and not isinstance(cell, nn.Module):
            fail(TypeError, self.name, "cell", "be the cell of another layer or None", repr(cell))
        self.cell = Recurrent(state_size) if cell is None else cell
        self.leave = Linear(state_size, num_experts)

    def route(self, x: Tensor, context: Context) -> Routed:
        u = self.enter(x)
        state = context.state
        if state is None:
            state = torch.zeros_like(u)
        else:
            check_tensor(self.name, "state", state, 2)
            check_shape(self.name, "state", state, u.shape)
            self.check_finite("state", state)
        state = self.cell(u, state.to(u.dtype))
        routing = gate(self.leave(state), self.top_k, normalize=True, stats=self.stats)
        return self.routed(routing, context, state=state)


@register("yuan_attention", row="R20", source="arXiv:2405.17976", verified="code")
class YuanAttention(Router):
    """Attention router of Yuan 2.0-M32: experts attend to each other, inside one token.

    `q, k, v = x W` of size `E` each; `z_i = sum_j softmax_j(q_i k_j) v_j`; softmax, the two best.
    No other token enters. With `q = 0` every `z_i` is the mean of `v`.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        normalize: divide the weights by their sum; without, they are the probabilities.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        normalize: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **with_defaults(common, aux_coef=0.01))
        self.normalize = self.check_flag("normalize", normalize)
        self.project = Linear(hidden_size, 3 * num_experts)

    def logits(self, x: Tensor) -> Tensor:
        """The logits `[T, E]`."""
        q, k, v = self.project(x).chunk(3, dim=1)
        attention = softmax(q[:, :, None] * k[:, None, :])
        z: Tensor = (attention * v[:, None, :]).sum(2)
        return z

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(self.logits(x), self.top_k, normalize=self.normalize, stats=self.stats)
        return self.routed(routing, context)


@register("block_ffn", row="R35", source="arXiv:2507.08771", verified="code")
class BlockFFN(LinearRouter):
    """BlockFFN: every expert with a positive activation takes part, weighed by its normalised one.

    `a = relu(x W)`, `g = RMSNorm over experts (a)` with a learned gain, `y = sum_e g_e E_e(x)` over
    the experts with `a_e > 0`; no top-k. Experts are small and not gated (`activation="silu"`), so
    a factor on the hidden activation is one on the output. Losses, in training:
    `locality_coef * activation_locality(a)` and `chunk_coef * chunk_sparsity(a)`, over the batch as
    one sequence. The authors adapt `chunk_coef` while training. `extra["activation"]` is `a`.

    Args:
        hidden_size: `H`.
        num_experts: `E`; the paper has 40 or 48.
        top_k: not looked at.
        locality_coef: coefficient of `locality`.
        chunk_coef: coefficient of `chunk`.
        chunk: tokens per chunk.
        eps: keeps the norm finite where nothing is active.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        locality_coef: float = 2e-3,
        chunk_coef: float = 5e-2,
        chunk: int = 64,
        eps: float = 1e-6,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.locality_coef = self.check_number("locality_coef", locality_coef)
        self.chunk_coef = self.check_number("chunk_coef", chunk_coef)
        self.chunk = check_int(self.name, "chunk", chunk, 1)
        self.eps = self.check_number("eps", eps, above=0)
        self.gain = nn.Parameter(torch.ones(num_experts))

    def route(self, x: Tensor, context: Context) -> Routed:
        a = self.score(x).relu()
        g = a * (a.square().mean(1, keepdim=True) + self.eps).rsqrt() * self.gain.to(a.dtype)
        routing = gate(g, self.num_experts, score="identity", mask=a > 0, stats=self.stats)
        found = {}
        if self.training:
            found["locality"] = self.locality_coef * losses.activation_locality(a)
            found["chunk"] = self.chunk_coef * losses.chunk_sparsity(a, self.chunk)
        return self.routed(routing, context, losses=found, extra={"activation": a})


@register("finedeep", row="R25", source="arXiv:2502.12928", verified="mem", needs=("experts",))
class Finedeep(Router):
    """Finedeep: sub-layers of small experts, all executed, weighed by what they answer.

    With `M = sublayers` and `N = E / M`: sub-layer `m` runs its `N` experts on its input,
    `w_i = sigmoid(r_i . E_i(input))`, `y_m = sum_i w_i E_i(input)`; the input of the first is `x`,
    of the next `RMSNorm(x + y_1 + ...)`; the result is the sum of all `y_m`. With one sub-layer and
    weights 1 the slices of a dense network add up to it. Weights do not sum to 1. The order of
    norm and residual is from memory. `extra["output"]` is the result, which `mix` returns.

    Args:
        hidden_size: `H`.
        num_experts: `E`, over all sub-layers.
        top_k: not looked at: all experts run.
        sublayers: `M`, divides `E`.
        common: see `Common`; capacity does not apply.
    """

    unused = ("aux_coef", "z_coef")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        sublayers: int = 2,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        sublayers = check_int(self.name, "sublayers", sublayers, 1)
        if num_experts % sublayers != 0:
            rule = f"divide the number of experts {num_experts}"
            fail(ValueError, self.name, "sublayers", rule, sublayers)
        self.sublayers = sublayers
        self.readers = nn.Parameter(torch.randn(num_experts, hidden_size) * hidden_size**-0.5)
        self.gains = nn.Parameter(torch.ones(sublayers - 1, hidden_size))

    def route(self, x: Tensor, context: Context) -> Routed:
        assert context.experts is not None
        y, step, found = torch.zeros_like(x), x, []
        size = self.num_experts // self.sublayers
        for m in range(self.sublayers):
            if m > 0:
                step = F.rms_norm(x + y, (self.hidden_size,), self.gains[m - 1].to(x.dtype), 1e-6)
            part = slice(m * size, (m + 1) * size)
            outputs = wide(context.experts.part(part).each(step))
            found.append(sigmoid((outputs * self.readers[part].to(outputs.dtype)).sum(2)))
            y = y + (found[-1][:, :, None] * outputs).sum(1).to(y.dtype)
        experts = every_expert(x.shape[0], self.num_experts, x.device)
        routing = assemble(experts, torch.cat(found, 1), self.num_experts)
        return self.routed(routing, context, plan=None, extra={"output": y})

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        assert routed.extra is not None
        return routed.extra["output"]


@register(
    "smear", row="R23", source="arXiv:2306.03745", verified="code", invariance="S", decode="leak"
)
class Smear(LinearRouter):
    """SMEAR: one expert per sequence, its parameters the weighted mean of all.

    `p = softmax(W mean over the sequence of LayerNorm(x))`; the sequence runs through the expert
    with parameters `sum_e p_e W_e`. For linear experts that is the weighted sum of outputs, for
    others not. Training drops experts with probability `dropout`, never all of a sequence, and
    renormalises. The mean looks at the whole sequence, so decoding cannot reproduce it.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: not looked at: all experts are merged.
        dropout: probability that an expert is left out of a sequence.
        common: see `Common`; capacity does not apply.
    """

    unused = ("aux_coef", "z_coef")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        dropout: float = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.dropout = self.check_number("dropout", dropout, 0, below=1)
        self.norm = nn.LayerNorm(hidden_size)

    def route(self, x: Tensor, context: Context) -> Routed:
        ids, number = sequences(context, x)
        with without_autocast(x.device):
            normed = self.norm(wide(x).to(self.norm.weight.dtype))
        p = softmax(self.score(segment_mean(normed, ids, number)))
        if self.training and self.dropout > 0:
            draw = torch.rand_like(p)
            p = p * ((draw >= self.dropout) | (draw == draw.amax(1, keepdim=True)))
            p = p / p.sum(1, keepdim=True).clamp(min=1e-20)
        experts = every_expert(x.shape[0], self.num_experts, x.device)
        routing = assemble(experts, p[ids], self.num_experts)
        return self.routed(routing, context, plan=None, extra={"merge": p, "sequence": ids})

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        assert routed.extra is not None
        ids = routed.extra["sequence"].int()[:, None]
        merged = experts.merged(routed.extra["merge"])
        return merged(x, (ids, torch.ones_like(ids, dtype=torch.float32)))


@register(
    "soft_moe", row="R9", source="arXiv:2308.00951", verified="code", invariance="S", decode="leak"
)
class SoftMoE(Router):
    """Soft MoE: experts see mixtures of the tokens of a sequence, tokens get mixtures of answers.

    With `p` slots per expert, `L = unit(x) (scale * unit(mu))` `[T, E p]`; `D = softmax of L` over
    the tokens of a sequence, `C = softmax of L` over slots; `y = C E(D' x)`. Nothing is chosen, all
    is differentiable. `extra["dispatch"]` and `extra["combine"]` are `D` and `C`; the routing names
    every expert with its share of `C`.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: not looked at: every token meets every expert.
        slots: `p`, slots per expert and sequence.
        common: see `Common`; capacity does not apply.
    """

    unused = ("aux_coef", "z_coef")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        slots: int = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.slots = slots = check_int(self.name, "slots", slots, 1)
        self.prototypes = nn.Parameter(torch.randn(num_experts * slots, hidden_size))
        self.scale = nn.Parameter(torch.ones(()))

    def route(self, x: Tensor, context: Context) -> Routed:
        unit = F.normalize(wide(x), dim=1)
        prototypes = F.normalize(self.prototypes.to(unit.dtype), dim=1)
        logits = linear(unit, prototypes * self.scale.to(unit.dtype))
        ids, number = sequences(context, x)
        combine = softmax(logits)
        share = combine.view(x.shape[0], self.num_experts, self.slots).sum(2)
        experts = every_expert(x.shape[0], self.num_experts, x.device)
        extra = {
            "dispatch": segment_softmax(logits, ids, number),
            "combine": combine,
            "sequence": ids,
            "sequences": x.new_empty(number, 0),
        }
        routing = assemble(experts, share, self.num_experts)
        return self.routed(routing, context, plan=None, extra=extra)

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        extra = routed.extra
        assert extra is not None
        ids, number = extra["sequence"], extra["sequences"].shape[0]
        num_slots = self.num_experts * self.slots
        inputs = [
            wide(x).new_zeros(number, self.hidden_size).index_add(0, ids, column[:, None] * wide(x))
            for column in extra["dispatch"].unbind(1)
        ]
        mixed = torch.stack(inputs, 1).view(number * num_slots, self.hidden_size)
        owner = torch.arange(num_slots, dtype=torch.int32, device=x.device) // self.slots
        owner = owner.repeat(number)[:, None]
        answers = experts(mixed.to(x.dtype), (owner, torch.ones_like(owner, dtype=mixed.dtype)))
        answers = answers.view(number, num_slots, self.hidden_size)
        y = torch.zeros_like(wide(x))
        for slot, column in enumerate(extra["combine"].unbind(1)):
            y = y + column[:, None] * answers[ids, slot]
        return y.to(x.dtype)
