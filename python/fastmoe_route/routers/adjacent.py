"""Neighbouring ideas: routers of samples, centres and trees."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router
from fastmoe_route.routers.estimators import straight_through
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.scores import Linear, gelu, wide


@register("magnet", row="L1", source="arXiv:2602.20723", verified="mem")
class Magnet(LinearRouter):
    """MAGNET: first every expert is used, then tokens specialise.

    Softmax top-k, renormalised. The loss `entropy` is `-coef * H` (coverage) until the entropy of
    the mean distribution reaches `switch * log E`, and `+coef * H(p)` (specialisation) from then
    on: the sign flips once, and the buffer `specialises` remembers it.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        switch: share of the largest entropy at which coverage counts as reached.
        entropy_coef: coefficient.
        common: see `Common`.
    """

    specialises: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        switch: float = 0.9,
        entropy_coef: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.threshold = self.check_number("switch", switch, 0) * math.log(num_experts)
        self.entropy_coef = self.check_number("entropy_coef", entropy_coef)
        self.register_buffer("specialises", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to coverage."""
        self.specialises.zero_()

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(
            self.score(x),
            self.top_k,
            normalize=True,
            stats=self.training,
            keep_scores=self.training,
        )
        if not self.training:
            return self.routed(routing, context)
        usage = losses.usage_entropy(routing)
        if x.shape[0] > 0:
            self.specialises |= usage.detach() >= self.threshold
        loss = torch.where(self.specialises, losses.entropy(routing), -usage)
        return self.routed(routing, context, losses={"entropy": self.entropy_coef * loss})


@register("drmc", row="L2", source="arXiv:2307.04249", verified="code")
class Drmc(Router):
    """DRMC: non-negative weights for all experts, from the input and what earlier layers saw.

    `h = gelu(W_1 [x, h'])`, `a = relu(W_2 h)`, `y = x + sum over e of a_e E_e(x)`, with `h'` the
    `state` of the layer before (zeros at the first) and `h` this layer's. All `a = 0` leaves the
    input. The paper convolves images; these are linear maps of tokens.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: the most experts of a token; None for all.
        identity: the output holds the input; False beside a residual connection.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        identity: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.identity = self.check_flag("identity", identity)
        self.inner = Linear(2 * hidden_size, hidden_size, bias=True)
        self.score = Linear(hidden_size, num_experts, bias=True)

    def route(self, x: Tensor, context: Context) -> Routed:
        x = wide(x)
        before = torch.zeros_like(x) if context.state is None else context.state
        h = gelu(self.inner(torch.cat([x, self.check_state(before, *x.shape)], 1)))
        routing = gate(
            self.score(h), self.top_k, score="relu", threshold=0.0, min_k=0, stats=self.stats
        )
        residual = x.new_ones(x.shape[0]) if self.identity else None
        return self.routed(routing, context, residual=residual, state=h)


@register("cigt", row="L4", source="arXiv:2402.08345", verified="mem")
class Cigt(LinearRouter):
    """CIGT: routes chosen for what they tell, at a temperature that falls.

    The `top_k` largest of `softmax(z / temperature)`, each with weight 1 and, in training, the
    gradient of its probability (straight-through). Loss `-gain_coef * (H(mean p) - mean H(p))`, the
    information gain. Lower `temperature` as training goes on (`softmax_variants.
    temperature_schedule`).

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: routes per token.
        temperature: above 0; an attribute to anneal.
        gain_coef: coefficient of the loss `gain`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        temperature: float = 1.0,
        gain_coef: float = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.temperature = self.check_number("temperature", temperature, above=0)
        self.gain_coef = self.check_number("gain_coef", gain_coef)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x) / self.temperature
        routing = gate(z, self.top_k, stats=self.training, keep_scores=self.training)
        hard = (routing.experts >= 0).to(routing.weights.dtype)
        found = {}
        if self.training:
            found["gain"] = -self.gain_coef * losses.information_gain(routing)
            hard = straight_through(hard, routing.weights)
        return self.routed(routing._replace(weights=hard), context, losses=found)
