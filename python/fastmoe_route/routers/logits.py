"""Routers whose logits are no linear map: cosines, a hypernetwork, recurrence, attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route._arguments import fail
from fastmoe_route._initial import draw_normal
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router, with_defaults
from fastmoe_route.routers.random import gumbel, uniform
from fastmoe_route.routers.routings import assemble
from fastmoe_route.routers.scores import Linear, Recurrent, linear, without_autocast
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
        score_size = self.check_int("score_size", score_size, 1)
        self.temperature = self.check_number("temperature", temperature, above=0)
        self.normalize_tokens = self.check_flag("normalize_tokens", normalize_tokens)
        self.second = self.check_choice("second", second, ("best", "random", "gumbel"))
        self.project = Linear(hidden_size, score_size)
        self.embeddings = nn.Parameter(torch.empty(num_experts, score_size))
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new directions for experts, of length 1.5, and sets `tau` to `temperature`."""
        if self.embeddings.is_meta:
            return
        draw_normal(self.embeddings)
        self.embeddings.copy_(F.normalize(self.embeddings, dim=1) * 1.5)
        self.log_temperature.fill_(math.log(self.temperature))

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
        hyper_size = self.check_int("hyper_size", hyper_size, 1)
        self.embedding = nn.Parameter(torch.empty(hyper_size))
        self.reset_parameters()  # before the network: a seed gives what this order draws
        size = num_experts * (hidden_size + 1)
        self.hyper = nn.Sequential(
            nn.Linear(hyper_size, hyper_size), nn.ReLU(), nn.Linear(hyper_size, size)
        ).requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draws a new embedding; the frozen network draws its own weights."""
        draw_normal(self.embedding)

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
        self.state_size = state_size = self.check_int("state_size", state_size, 1)
        self.enter = Linear(hidden_size, state_size)
        if cell is not None and not isinstance(cell, nn.Module):
            fail(TypeError, self.name, "cell", "be the cell of another layer or None", repr(cell))
        self.cell = Recurrent(state_size) if cell is None else cell
        self.leave = Linear(state_size, num_experts)

    def route(self, x: Tensor, context: Context) -> Routed:
        u = self.enter(x)
        before = torch.zeros_like(u) if context.state is None else context.state
        state = self.cell(u, self.check_state(before, *u.shape).to(u.dtype))
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
