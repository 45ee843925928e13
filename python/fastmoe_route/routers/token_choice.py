"""Token choice: every token takes its best experts."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router, with_defaults
from fastmoe_route.routers.scores import Linear


@register("switch", row="R1", source="arXiv:2101.03961", verified="code", invariance="C")
class Switch(Router):
    """Switch Transformer: softmax over all experts, the best one, its weight not renormalised.

    `z = (x * xi) W` with `xi ~ U(1 - jitter, 1 + jitter)` in training, `w = softmax(z)[e*]`.
    Loss `aux_coef * E * sum_e f_e P_e`. A token over capacity gets nothing, so that only the
    residual connection around the layer carries it.

    Defaults: one expert, capacity factor 1.25 in training and none in evaluation (the paper has 1
    to 2), `aux_coef` 0.01.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        jitter: half the width of the multiplicative noise on the input, in training.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        jitter: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, capacity_factor=1.25, aux_coef=0.01)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.jitter = jitter
        self.score = Linear(hidden_size, num_experts)

    def route(self, x: Tensor, context: Context) -> Routed:
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.routed(gate(self.score(x), self.top_k, stats=self.stats), context)


@register("topk_softmax", row="R21", source="arXiv:1701.06538", verified="mem")
class TopkSoftmax(Router):
    """Softmax over the largest logits: the plain modern router, as in Mixtral and Qwen.

    `w_i = exp(z_i) / sum_{j in TopK} exp(z_j)`: masking the others before the softmax,
    renormalising after it, and softmax over the chosen are the same. Ties go to the lower expert.
    The survey's row is unverified against its paper; the identity is algebra.

    Defaults: two experts, `aux_coef` 0.01.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **with_defaults(common, aux_coef=0.01))
        self.score = Linear(hidden_size, num_experts)

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(self.score(x), self.top_k, normalize=True, stats=self.stats)
        return self.routed(routing, context)


@register("deepseek_v3", row="R22", source="arXiv:2412.19437", verified="mem")
class DeepSeekV3(Router):
    """DeepSeek-V3: sigmoid scores, a bias that only chooses, limited groups, weights normalised.

    `s = sigmoid(z)`; experts by `s + bias` inside the `topk_groups` best groups, a group scored by
    the sum of its two best; `w = scale * s_i / sum_{chosen} s_j`. Shared experts are the layer's
    and have weight 1. The row is after the public modelling code, from memory: unverified.

    Unlike softmax, adding a constant to all logits changes the weights.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        num_groups: equal groups of neighbouring experts; V3 has 8 groups of 32.
        topk_groups: groups a token may use; V3 has 4.
        scale: factor on the weights; V3 has 2.5.
        common: see `Common`.

    The buffer `bias` `[E]` starts at 0; `LossFree` says how to move it.
    """

    bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 8,
        *,
        num_groups: int = 1,
        topk_groups: int | None = None,
        scale: float = 2.5,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.scale = scale
        self.score = Linear(hidden_size, num_experts)
        self.register_buffer("bias", torch.zeros(num_experts))

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(
            self.score(x),
            self.top_k,
            score="sigmoid",
            bias=self.bias,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            group_score="top2_sum",
            normalize=True,
            scale=self.scale,
            stats=self.stats,
        )
        return self.routed(routing, context)
