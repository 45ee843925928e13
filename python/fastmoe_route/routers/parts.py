"""What routers share beside scores: a linear base class, sequences, ranks, hand-made routings."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route.gate import gate
from fastmoe_route.results import Routing
from fastmoe_route.routers.base import Common, Context, Router
from fastmoe_route.routers.scores import Linear


class LinearRouter(Router):
    """A router whose logits are a linear map of the hidden states.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        num_columns: columns of the logits; None for `E`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        num_columns: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.score = Linear(hidden_size, num_experts if num_columns is None else num_columns)

    def built(self, experts: Tensor, weights: Tensor, logits: Tensor) -> Routing:
        """A routing of these slots `[T, K]`, with what the common losses need of the logits."""
        return self.measured(assemble(experts, weights, self.num_experts), logits)

    def measured(self, routing: Routing, logits: Tensor) -> Routing:
        """The routing, with what the common losses need of the logits."""
        if not self.stats:
            return routing
        score_sum = logits.softmax(1).sum(0)[: self.num_experts]
        return routing._replace(score_sum=score_sum, logsumexp=logits.logsumexp(1))


def sequences(context: Context, x: Tensor) -> tuple[Tensor, int]:
    """The sequence of each token, int64 `[T]`, and how many there are; one if none are told."""
    if context.sequence_ids is None:
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), 1
    return context.sequence_ids.long(), context.num_sequences


def scopes(context: Context, x: Tensor) -> tuple[Tensor, int]:
    """The scope of each token, int64 `[T]`, and how many there are; one if none are told."""
    if context.scope_ids is None:
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), 1
    return context.scope_ids.long(), context.num_scopes


def segment_mean(x: Tensor, ids: Tensor, num_segments: int) -> Tensor:
    """The mean of the rows of each segment, 0 for an empty one: `[T, ...]` to `[S, ...]`."""
    total = x.new_zeros(num_segments, *x.shape[1:]).index_add(0, ids, x)
    count = x.new_zeros(num_segments).index_add(0, ids, x.new_ones(ids.shape[0]))
    return total / count.clamp(min=1).view(-1, *[1] * (x.dim() - 1))


def segment_rank(values: Tensor, ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """The place of each token among its segment by rising value, ties to the lower token.

    Args:
        values: `[T]`, or `[T, E]` whose columns are ranked one by one.
        ids: int64 `[T]` in `[0, num_segments)`.
        num_segments: `S`.

    Returns:
        int64 places from 0, of the shape of `values`, and int64 `[T]` the length of the token's
        segment.
    """
    lengths = ids.new_zeros(num_segments).index_add(0, ids, torch.ones_like(ids))
    order = values.argsort(dim=0, stable=True)
    order = order.gather(0, ids[order].argsort(dim=0, stable=True))
    starts = lengths.cumsum(0) - lengths
    rows = torch.arange(ids.shape[0], device=ids.device).view(-1, *[1] * (values.dim() - 1))
    places = rows - starts[ids[order]]
    return torch.empty_like(places).scatter(0, order, places), lengths[ids]


def assemble(experts: Tensor, weights: Tensor, num_experts: int) -> Routing:
    """A `Routing` of ids `[T, K]` (-1 for none) and weights; those of unused slots become 0."""
    experts = experts.to(torch.int32)
    used = experts >= 0
    weights = weights.masked_fill(~used, 0.0)
    bins = torch.where(used, experts, num_experts).flatten().long()
    demand = torch.zeros(num_experts + 1, dtype=torch.int32, device=experts.device)
    demand = demand.index_add(0, bins, torch.ones_like(bins, dtype=torch.int32))
    return Routing(experts, weights, demand[:num_experts])


def per_token(routing: Routing, ids: Tensor) -> Routing:
    """A routing of sequences `[S, K]` handed to their tokens `[T, K]`."""
    num_experts = routing.demand.shape[0]
    return assemble(routing.experts[ids], routing.weights[ids], num_experts)


def only_where(logits: Tensor, top_k: int, is_open: Tensor, *, stats: bool = False) -> Routing:
    """Softmax top-k, renormalised, for tokens with `is_open` `[T]`; no expert for the others."""
    return gate(
        logits,
        top_k,
        k_per_token=is_open.to(torch.int32) * top_k,
        normalize=True,
        stats=stats,
    )


def every_expert(num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """int32 `[T, E]`: every token takes every expert, in order."""
    row = torch.arange(num_experts, dtype=torch.int32, device=device)
    return row.expand(num_tokens, num_experts)
