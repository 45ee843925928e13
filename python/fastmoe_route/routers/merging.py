"""Routers that merge parameters: every sequence runs one expert, a weighted sum of all."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route._arguments import check_dtype
from fastmoe_route._segments import segment_mean
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.routings import assemble, every_expert
from fastmoe_route.routers.scores import Linear, sigmoid, wide, without_autocast
from fastmoe_route.softmax import softmax


class Merging(Router):
    """Base of routers that give every sequence one expert, merged from all.

    The routing takes every expert with its coefficient; `mix` merges the parameters first and runs
    one expert per sequence. For linear experts the two are the same. Nothing is ever dropped.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: `E`; every expert takes part.
        common: see `Common`.
    """

    unused: ClassVar[tuple[str, ...]] = ("z_coef",)

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """The coefficient of every expert for each sequence, `[S, E]`."""
        raise NotImplementedError

    def route(self, x: Tensor, context: Context) -> Routed:
        ids, num = context.sequences(x)
        share = self.coefficients(wide(x), ids, num, context)
        slots = every_expert(x.shape[0], self.num_experts, x.device)
        weights, experts = share[ids].sort(dim=1, descending=True, stable=True)
        routing = assemble(slots.gather(1, experts), weights, self.num_experts)
        if self.stats:
            routing = routing._replace(score_sum=share[ids].sum(0))
        extra = {"share": share, "sequence": ids}
        return self.routed(routing, context, plan=None, extra=extra)

    def merged(self, experts: Any, extra: dict[str, Tensor]) -> Any:
        """The experts of all sequences, from the `extra` of a result."""
        return experts.merged(extra["share"])

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        """The merged expert of each token's sequence."""
        assert routed.extra is not None
        ids = routed.extra["sequence"].to(torch.int32)[:, None]
        ones = torch.ones_like(ids, dtype=wide(x).dtype)
        y: Tensor = self.merged(experts, routed.extra)(x, (ids, ones))
        return y


@register(
    "smear", row="R23", source="arXiv:2306.03745", verified="code", invariance="S", decode="leak"
)
class Smear(Merging):
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
        self.score = Linear(hidden_size, num_experts)
        self.norm = nn.LayerNorm(hidden_size)

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """The softmax, in training without the experts that are left out."""
        with without_autocast(x.device):
            normed = self.norm(x.to(self.norm.weight.dtype))
        p = softmax(self.score(segment_mean(normed, ids, num)))
        if self.training and self.dropout > 0:
            draw = torch.rand_like(p)
            p = p * ((draw >= self.dropout) | (draw == draw.amax(1, keepdim=True)))
            p = p / p.sum(1, keepdim=True).clamp(min=1e-20)
        return p


@register(
    "cond_conv", row="L6", source="arXiv:2406.00210", verified="mem", invariance="S", decode="leak"
)
class CondConv(Merging):
    """A-SDM's conditional weights: per sequence `W = sum over e of sigmoid(f(mean of x))_e W_e`.

    The coefficients do not sum to 1.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: `E`.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int | None = None, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.score = Linear(hidden_size, num_experts, bias=True)

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """The sigmoids."""
        return sigmoid(self.score(segment_mean(x, ids, num)))


@register("supernet_mixture", row="L8", source="arXiv:2306.04845", verified="mem", invariance="S")
class SupernetMixture(Merging):
    """Mixture-of-Supernets: an architecture's encoding decides how supernet weights are merged.

    `W = sum over e of softmax(f(encoding))_e W_e`; `state` `[num_sequences, encoding_size]` holds
    the encodings, zeros without it. One expert is the plain supernet.

    Args:
        hidden_size: `H`.
        num_experts: `E` supernets.
        top_k: `E`.
        encoding_size: length of an encoding.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        encoding_size: int = 16,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.encoding_size = self.check_int("encoding_size", encoding_size, 1)
        self.score = Linear(self.encoding_size, num_experts, bias=True)

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """The softmax of the encodings' logits."""
        encoding = context.state
        if encoding is None:
            encoding = x.new_zeros(num, self.encoding_size)
        self.check_state(encoding, num, self.encoding_size)
        share: Tensor = self.score(encoding.to(x.dtype)).softmax(1)
        return share


@register("mhr", row="R64", source="arXiv:2211.03831", verified="code", invariance="S")
class Mhr(Merging):
    """MHR and Poly: a table says how a task mixes the skills, for every head of the features.

    `alpha_{e,h} = sigmoid(Z[task, h, e]) / sum over e of the same`. With `LoraExperts`, `A` and `B`
    are cut into `num_heads` blocks of features and every block is mixed by its own coefficients
    (`num_heads = 1` is Poly, arXiv:2202.13914); with other experts, by their mean over heads.
    `state`, int64 `[num_sequences]`, is the task of each sequence, 0 without it. MHR-z trains `Z`
    alone, whose learning rate is ten times the others'.

    Args:
        hidden_size: `H`.
        num_experts: `E` skills.
        top_k: `E`.
        num_tasks: rows of the table.
        num_heads: a divisor of `H`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        num_tasks: int = 1,
        num_heads: int = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        num_tasks = self.check_int("num_tasks", num_tasks, 1)
        num_heads = self.check_int("num_heads", num_heads, 1)
        self.table = nn.Parameter(torch.empty(num_tasks, num_heads, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a new table."""
        nn.init.uniform_(self.table, -1e-3, 1e-3)

    def heads(self, num: int, context: Context) -> Tensor:
        """The coefficients `[S, heads, E]`, rows that sum to 1."""
        tasks = context.state
        if tasks is None:
            tasks = torch.zeros(num, dtype=torch.int64, device=self.table.device)
        self.check_state(tasks, num)
        check_dtype(self.name, "state", tasks, (torch.int64, torch.int32))
        self.check_ids("state", tasks, self.table.shape[0])
        skills = sigmoid(self.table[tasks])
        return skills / skills.sum(2, keepdim=True)

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """Their mean over heads."""
        return self.heads(num, context).mean(1).to(x.dtype)

    def route(self, x: Tensor, context: Context) -> Routed:
        routed = super().route(x, context)
        assert routed.extra is not None
        heads = self.heads(context.sequences(x)[1], context)
        return routed._replace(extra={**routed.extra, "heads": heads})

    def merged(self, experts: Any, extra: dict[str, Tensor]) -> Any:
        """LoRA experts are merged block by block."""
        if hasattr(experts, "merged_blockwise"):
            return experts.merged_blockwise(extra["heads"])
        return super().merged(experts, extra)
