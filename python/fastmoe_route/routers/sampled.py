"""Routers that draw their experts in training, and learn from the draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, with_defaults
from fastmoe_route.routers.estimators import ordered_log_prob, sparsemixer, straight_through
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.random import gumbel, uniform
from fastmoe_route.routers.routings import every_expert


@register("grin", row="R50", source="arXiv:2409.12136", verified="code")
class Grin(LinearRouter):
    """GRIN: `top_k` picks of SparseMixer-v2, each among what the earlier ones left.

    A pick masks experts far below the largest logit, draws by Gumbel noise (evaluation: takes the
    largest) and weighs by the softmax of what is left; `estimators.sparsemixer` has the formula and
    the backward. A picked expert is barred from the later picks, whose softmax is over the rest:
    the weights do not sum to 1 and are not renormalised (the released code allows two picks only).

    Defaults: two picks, `epsilon` 0.01, input jitter 0.01 in training.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: picks.
        epsilon: width of the band around the largest logit; inf masks nothing.
        jitter: half the width of the multiplicative noise on the input, in training.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        epsilon: float = 0.01,
        jitter: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.epsilon = epsilon if epsilon == math.inf else self.check_number("epsilon", epsilon, 0)
        self.jitter = self.check_number("jitter", jitter, 0)

    def route(self, x: Tensor, context: Context) -> Routed:
        if self.training and self.jitter > 0:
            x = x * (1 + self.jitter * (2 * uniform(context, x, x.shape[1]) - 1)).to(x.dtype)
        z = left = self.score(x)
        picks = []
        for j in range(self.top_k):
            draw = {}
            if self.training:
                draw["gumbel"] = gumbel(context, z, self.num_experts, 2 * j + 1)
                draw["uniform"] = uniform(context, z, 1, 2 * j + 2)[:, 0]
            picks.append(sparsemixer(left, self.epsilon, **draw))
            left = left.scatter(1, picks[-1][0][:, None], -torch.inf)
        experts, weights = (torch.stack(parts, 1) for parts in zip(*picks, strict=True))
        return self.routed(self.built(experts, weights, z), context)


@register("binary_gate", row="R57", source="arXiv:1308.3432", verified="mem")
class BinaryGate(LinearRouter):
    """Bengio's binary gates: every expert has a gate that is open or shut.

    `h_e = 1[z_e > 0]`, or in training with `stochastic` a draw of `Bernoulli(sigmoid(z_e))`; the
    output is the sum of the open experts. Training runs all experts, shut ones with weight 0, and
    the weights carry the gradient of `sigmoid(z)` (straight-through). With `stochastic`,
    `extra["log_prob"]` `[T]` serves the unbiased `estimators.score_function`.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: the most experts of a token in evaluation; None for all.
        stochastic: draw the gates in training.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        stochastic: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.stochastic = self.check_flag("stochastic", stochastic)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        if not self.training:
            routing = gate(z, self.top_k, score="identity", threshold=0.0, min_k=0)
            ones = (routing.experts >= 0).to(routing.weights.dtype)
            return self.routed(routing._replace(weights=ones), context)
        soft = z.sigmoid()
        barrier = uniform(context, z, self.num_experts) if self.stochastic else 0.5
        is_open = soft.detach() > barrier
        weights = straight_through(is_open.to(soft.dtype), soft)
        log_prob = torch.where(is_open, soft, 1 - soft).log().sum(1)
        slots = every_expert(x.shape[0], self.num_experts, x.device)
        return self.routed(self.built(slots, weights, z), context, extra={"log_prob": log_prob})


@register("remix", row="R59", source="arXiv:2603.10160", verified="paper")
class ReMix(LinearRouter):
    """ReMix: LoRA experts drawn without replacement, all with the same weight.

    In training an ordered draw of `top_k` experts from `softmax(z)` (the largest of `z + gumbel`),
    in evaluation the `top_k` largest. The weights are a constant, so the effective number of
    experts is exactly `top_k`, and the router learns from `extra["log_prob"]` `[T]`:
    `estimators.rloo` on the losses of `M` passes and the sums of their log-probabilities over
    tokens and layers.

    Defaults: weight `2 / (K rank)`, or `2 / sqrt(K rank)` with `rs` (rsLoRA).

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        rank: of the LoRA experts.
        rs: scale by the root of the active rank, as rank-stabilised LoRA does.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        rank: int = 8,
        rs: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        rank = self.check_int("rank", rank, 1)
        self.weight = 2.0 / (top_k * rank) ** (0.5 if self.check_flag("rs", rs) else 1.0)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        noise = gumbel(context, z, self.num_experts) if self.training else None
        routing = gate(z, self.top_k, noise=noise, stats=self.stats)
        constant = torch.full_like(routing.weights, self.weight)
        routing = routing._replace(weights=constant.masked_fill(routing.experts < 0, 0.0))
        extra = {"log_prob": ordered_log_prob(z, routing.experts)}
        return self.routed(routing, context, extra=extra)


@register("sira", row="R67", source="arXiv:2311.09179", verified="mem", invariance="C")
class SiRA(LinearRouter):
    """SiRA: sparse LoRA experts with a capacity, and experts that are dropped out in training.

    Softmax top-k, renormalised, capacity `capacity_factor`; in training every expert is barred with
    probability `expert_dropout` for the whole batch, but never all of them. Load balancing as in
    Switch. Without dropout and capacity this is `topk_softmax`.

    Defaults: 4 experts per token, capacity factor 1.2, dropout 0.1.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        expert_dropout: probability of barring an expert, in [0, 1).
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 4,
        *,
        expert_dropout: float = 0.1,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, capacity_factor=1.2, aux_coef=0.01)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.expert_dropout = self.check_number("expert_dropout", expert_dropout, 0, below=1)

    def route(self, x: Tensor, context: Context) -> Routed:
        mask = None
        if self.training and self.expert_dropout > 0:
            draw = torch.rand(self.num_experts, device=x.device)
            mask = (draw >= self.expert_dropout) | (draw == draw.max())
        routing = gate(self.score(x), self.top_k, mask=mask, normalize=True, stats=self.stats)
        return self.routed(routing, context)
