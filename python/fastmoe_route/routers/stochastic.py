"""Fixed and random choice: hash layers, uniform draws, draws from the router's own distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router
from fastmoe_route.routers.estimators import ordered_log_prob
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.random import gumbel
from fastmoe_route.routers.routings import assemble
from fastmoe_route.routers.scores import wide


@register("hash", row="R5", source="arXiv:2202.01169", verified="mem", needs=("token_ids",))
class Hash(Router):
    """Hash layer: the expert is a fixed function of the vocabulary id, `id mod E`, weight 1.

    With `top_k > 1` the experts that follow, each with weight `1 / K`. The form of the scaling
    laws paper is from memory; hash layers are arXiv:2106.04426.

    Args:
        hidden_size: `H`; not looked at.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    unused = ("aux_coef", "z_coef")

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 1, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)

    def route(self, x: Tensor, context: Context) -> Routed:
        assert context.token_ids is not None
        steps = torch.arange(self.top_k, device=x.device)
        experts = (context.token_ids.long()[:, None] + steps) % self.num_experts
        weights = wide(x).new_full(experts.shape, 1 / self.top_k)
        return self.routed(assemble(experts, weights, self.num_experts), context)


@register("rl_r", row="R5", source="arXiv:2202.01169", verified="mem")
class RlR(LinearRouter):
    """RL-R: experts are sampled in training and learned by REINFORCE.

    In training experts are an ordered draw from `softmax(z)` without replacement, in evaluation the
    best ones; `w` is the raw probability, a constant. `extra["log_prob"]` `[T]` is the log
    probability of the draw: add `fastmoe_route.routers.estimators.score_function` of it and the
    reward (the token's log likelihood), whose gradient is zero where reward equals baseline.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 1, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        noise = gumbel(context, logits, self.num_experts) if self.training else None
        routing = gate(logits, self.top_k, noise=noise, stats=self.stats)
        routing = routing._replace(weights=routing.weights.detach())
        log_prob = ordered_log_prob(logits, routing.experts)
        return self.routed(routing, context, extra={"log_prob": log_prob})


@register("thor", row="R17", source="arXiv:2110.04260", verified="code")
class Thor(Router):
    """THOR: no gate; uniformly random experts, per token or per sequence, weight `1 / K`.

    Training runs a batch twice with different draws and adds
    `fastmoe_route.losses.consistency(p_1, p_2)` (coefficient 5 in the paper, from memory) to the
    two task losses. Draws follow `seed` and `positions`, or `seed` and the sequence's number.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token, different ones; the paper has 1.
        level: `token`, or `sequence`: the same experts for a whole sequence, keyed by its number.
        common: see `Common`.
    """

    unused = ("aux_coef", "z_coef")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        level: str = "token",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.level = self.check_choice("level", level, ("token", "sequence"))

    def route(self, x: Tensor, context: Context) -> Routed:
        if self.level == "sequence":
            if context.sequence_ids is None:
                self.fail("sequence_ids", "be given with level 'sequence'", None)
            numbers = torch.arange(context.num_sequences, device=x.device)
            draws = gumbel(context._replace(positions=numbers), numbers.to(x), self.num_experts)
            draws = draws[context.sequence_ids.long()]
        else:
            draws = gumbel(context, x, self.num_experts)
        experts = gate(draws, self.top_k).experts
        weights = torch.full_like(experts, 1, dtype=draws.dtype) / self.top_k
        return self.routed(assemble(experts, weights, self.num_experts), context)
