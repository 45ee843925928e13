"""Routers that choose nothing: every expert that has something to say takes part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._initial import draw_normal
from fastmoe_route._segments import segment_softmax, segment_sum
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.routings import assemble, every_expert
from fastmoe_route.routers.scores import linear, sigmoid, wide
from fastmoe_route.softmax import softmax


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
        self.chunk = self.check_int("chunk", chunk, 1)
        self.eps = self.check_number("eps", eps, above=0)
        self.gain = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the gain to 1."""
        nn.init.ones_(self.gain)

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
        self.sublayers = self.check_divisor("sublayers", sublayers)
        self.readers = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.gains = nn.Parameter(torch.empty(self.sublayers - 1, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new readers, and sets the gains of norms to 1."""
        draw_normal(self.readers, self.hidden_size**-0.5)
        nn.init.ones_(self.gains)

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
        self.slots = self.check_int("slots", slots, 1)
        self.prototypes = nn.Parameter(torch.empty(num_experts * self.slots, hidden_size))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new prototypes, and sets the scale to 1."""
        draw_normal(self.prototypes)
        nn.init.ones_(self.scale)

    def route(self, x: Tensor, context: Context) -> Routed:
        unit = F.normalize(wide(x), dim=1)
        prototypes = F.normalize(self.prototypes.to(unit.dtype), dim=1)
        logits = linear(unit, prototypes * self.scale.to(unit.dtype))
        ids, number = context.sequences(x)
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
            segment_sum(column[:, None] * wide(x), ids, number)
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
