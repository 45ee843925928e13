"""Routings made by hand: from ids and weights, for sequences, for open tokens, of all experts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe_route.gate import gate
from fastmoe_route.results import Routing


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
        logits, top_k, k_per_token=is_open.to(torch.int32) * top_k, normalize=True, stats=stats
    )


def every_expert(num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """int32 `[T, E]`: every token takes every expert, in order."""
    row = torch.arange(num_experts, dtype=torch.int32, device=device)
    return row.expand(num_tokens, num_experts)
