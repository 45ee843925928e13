"""Routers that compare tokens with learned vectors for experts: codes, prototypes, gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._initial import draw_normal
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router
from fastmoe_route.routers.estimators import straight_through
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.routings import assemble
from fastmoe_route.routers.scores import Linear, linear, wide


@register("vqmoe", row="R55", source="arXiv:2411.19402", verified="mem")
class VQMoE(LinearRouter):
    """VQMoE: a token's nearest code names an expert, beside an ordinary router.

    `c = argmin_j |x - v_j|`, one code per expert; `y = g_1 E_c(x) + g_2 * sum of topk_softmax` with
    `g = softmax(W x)` learned. `discrete=True` is the fine-tuning form: the code's expert alone,
    weight 1. Loss `commit_coef * commitment(x, v_c)`; `extra["quantized"]` is the code with the
    gradient of `x` (straight-through). How the paper mixes the two is not known here; the released
    code gives the code's expert a normalised input with a tenth of the code in it (`contrib_rate`)
    and normalises its output, which are layers of the model here.

    Args:
        hidden_size: `H`.
        num_experts: `E`, one code each.
        top_k: experts of the ordinary router.
        discrete: use the code alone.
        commit_coef: coefficient of the loss `commitment`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        discrete: bool = False,
        commit_coef: float = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.discrete = self.check_flag("discrete", discrete)
        self.commit_coef = self.check_number("commit_coef", commit_coef)
        self.codes = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()  # before `share`: a seed gives what this order draws
        self.share = Linear(hidden_size, 2)

    def reset_parameters(self) -> None:
        """Draws new codes."""
        draw_normal(self.codes)

    def route(self, x: Tensor, context: Context) -> Routed:
        x = wide(x)
        codes = self.codes.to(x.dtype)
        nearness = linear(x.detach(), codes.detach()) - codes.detach().square().sum(1) / 2
        code = gate(nearness, 1, score="identity").experts
        own = codes[code[:, 0].long()]
        extra = {"code": code[:, 0], "quantized": straight_through(own.detach(), x)}
        train = self.training and self.commit_coef != 0
        found = {"commitment": self.commit_coef * losses.commitment(x, own)} if train else {}
        z = self.score(x)
        if self.discrete:
            routing = self.built(code, torch.ones_like(code, dtype=x.dtype), z)
            return self.routed(routing, context, losses=found, extra=extra)
        share = self.share(x).softmax(1)
        soft = gate(z, self.top_k, normalize=True)
        experts = torch.cat([code, soft.experts], 1)
        weights = torch.cat([share[:, :1], share[:, 1:] * soft.weights], 1)
        return self.routed(self.built(experts, weights, z), context, losses=found, extra=extra)


@register(
    "promoe",
    row="R56",
    source="arXiv:2510.24711",
    verified="code",
    decode="n/a",
    needs=("token_ids",),
)
class ProMoE(Router):
    """ProMoE: tokens without a condition have an expert of their own, the others a prototype.

    Tokens whose `token_ids` (the class label in a diffusion transformer) are `unconditional` go to
    the last expert with weight 1; all others choose among the first `E - 1` by
    `score(cos(x, prototype_e))`, weights as they are. Loss `contrast_coef * contrastive`, no load
    balancing; a shared expert is the layer's.

    Defaults: one expert, `unconditional` 1000, softmax, temperature of the loss 0.1.

    Args:
        hidden_size: `H`.
        num_experts: `E`, at least 2.
        top_k: experts of a conditional token, at most `E - 1`.
        score: `softmax`, `sigmoid` or `identity`.
        unconditional: the label.
        contrast_coef: coefficient of the loss `contrast`.
        temperature: of the loss.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        score: str = "softmax",
        unconditional: int = 1000,
        contrast_coef: float = 1.0,
        temperature: float = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        num_experts = self.check_int("num_experts", num_experts, 2)
        self.check_int("top_k", top_k, 1, num_experts - 1)
        self.score_name = self.check_choice("score", score, ("softmax", "sigmoid", "identity"))
        self.unconditional = self.check_int("unconditional", unconditional, 0)
        self.contrast_coef = self.check_number("contrast_coef", contrast_coef)
        self.temperature = self.check_number("temperature", temperature, above=0)
        self.prototypes = nn.Parameter(torch.empty(num_experts - 1, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new prototypes."""
        draw_normal(self.prototypes, self.hidden_size**-0.5)

    def route(self, x: Tensor, context: Context) -> Routed:
        assert context.token_ids is not None
        free = (context.token_ids == self.unconditional)[:, None]
        z = linear(F.normalize(wide(x), dim=1), F.normalize(self.prototypes, dim=1))
        chosen = gate(z, self.top_k, score=self.score_name)
        slot = torch.arange(self.top_k, device=x.device)
        own = torch.where(slot == 0, self.num_experts - 1, -1).to(torch.int32)
        experts = torch.where(free, own, chosen.experts)
        weights = torch.where(free, 1.0, chosen.weights)
        routing = assemble(experts, weights, self.num_experts)
        found = {}
        if self.training and self.contrast_coef != 0:
            experts = chosen.experts.masked_fill(free, -1)
            routed = assemble(experts, chosen.weights, self.num_experts - 1)
            found["contrast"] = self.contrast_coef * losses.contrastive(
                wide(x), routed, self.prototypes, temperature=self.temperature
            )
        if self.stats:
            sums = F.pad(z.softmax(1).sum(0), (0, 1))
            routing = routing._replace(score_sum=sums, logsumexp=z.logsumexp(1))
        return self.routed(routing, context, losses=found)


@register("phatgoose", row="R62", source="arXiv:2402.05859", verified="code")
class Phatgoose(Router):
    """PHATGOOSE: gates trained one expert at a time, compared with a token by a normalised product.

    `z_e = <LN(x), LN(v_e)> / sqrt(H)` with the layer norm without parameters, so neither scale nor
    shift of a gate matters; softmax over the `top_k` largest. The gate `v_e` of expert `e` was
    trained alone, in `y = W0 x + sigmoid(v . x) B A x`, from 0, for about 100 steps.

    Defaults: two experts.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.gates = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new gates."""
        draw_normal(self.gates, self.hidden_size**-0.5)

    def local(self, x: Tensor) -> Tensor:
        """The logits `[T, E]`."""
        size = (self.hidden_size,)
        gates = F.layer_norm(self.gates, size)
        z: Tensor = linear(F.layer_norm(wide(x), size), gates) * self.hidden_size**-0.5
        return z

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(self.local(x), self.top_k, normalize=True, stats=self.stats)
        return self.routed(routing, context)


@register(
    "glider", row="R61", source="arXiv:2410.07172", verified="mem", invariance="S", decode="pre"
)
class Glider(Phatgoose):
    """Glider: PHATGOOSE, with a say for the task as a whole.

    `z = local + alpha * global`, softmax over the `top_k` largest. `state` `[num_sequences, E]` is
    the global part: the cosine between the embedding of the task's instruction, written by a
    language model from the prompt, and those of the experts' instructions. Without it this is
    `phatgoose`.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        alpha: weight of the global part; a large one sends every token to the same experts.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        alpha: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.alpha = self.check_number("alpha", alpha)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.local(x)
        if context.state is not None:
            self.check_state(context.state, context.num_sequences, z.shape[1])
            ids = context.sequence_ids
            if ids is None and context.num_sequences != 1:
                rule = "be given with more than one sequence"
                self.fail("sequence_ids", rule, None)
            rows = context.state if ids is None else context.state[ids.long()]
            z = z + self.alpha * rows.to(z.dtype)
        routing = gate(z, self.top_k, normalize=True, stats=self.stats)
        return self.routed(routing, context)
