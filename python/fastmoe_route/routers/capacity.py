"""Plans with a capacity, counted per request where there are scopes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmoe_route._arguments import fail
from fastmoe_route._segments import segment_sizes
from fastmoe_route.dispatch import MAX_EXPERTS, expert_capacity, plan_dispatch
from fastmoe_route.results import DispatchPlan, Routing

ROUNDINGS = ("ceil", "four", "per_choice")


class Capacity(NamedTuple):
    """How many slots an expert keeps, and which.

    Attributes:
        factor: capacity over an even share.
        min_capacity: the least capacity.
        drop_policy: `position` or `score`, see `plan_dispatch`.
        rounding: `ceil`, that of `expert_capacity`; `four`, that rounded up to a multiple of 4
            (V-MoE); `per_choice`, `K * floor(factor * ceil(T / E))` (Tutel).
    """

    factor: float
    min_capacity: int = 1
    drop_policy: str = "position"
    rounding: str = "ceil"

    def of(self, num_tokens: int, num_experts: int, top_k: int) -> int:
        """The capacity of one scope."""
        if self.rounding == "per_choice":
            slots = top_k * int(self.factor * ((num_tokens + num_experts - 1) // num_experts))
            return max(slots, self.min_capacity)
        return expert_capacity(
            num_tokens,
            num_experts,
            top_k,
            self.factor,
            min_capacity=self.min_capacity,
            multiple_of=4 if self.rounding == "four" else 1,
        )

    def of_scopes(self, sizes: Tensor, num_experts: int, top_k: int) -> Tensor:
        """The capacities, float64 `[S]`, of scopes with `sizes` tokens each, by the same rule."""
        if self.rounding == "per_choice":
            even = (sizes.double() / num_experts).ceil()
            return (top_k * (self.factor * even).floor()).clamp(min=self.min_capacity)
        share = (self.factor * sizes.double() * top_k / num_experts).ceil()
        share = share.clamp(min=self.min_capacity)
        return (share / 4).ceil() * 4 if self.rounding == "four" else share


def capacity_plan(
    name: str, routing: Routing, limit: Capacity, scopes: tuple[Tensor, int] | None, top_k: int
) -> DispatchPlan:
    """The plan of a routing whose experts keep only so many slots.

    Args:
        name: the method, for errors.
        routing: experts and weights `[T, K]`.
        limit: the capacity.
        scopes: int32 `[T]` scope ids and their number. Every scope has the capacity that its own
            number of tokens gives, so what one request keeps never depends on another.
        top_k: slots per token in an even share.

    Returns:
        `DispatchPlan`.
    """
    num_tokens = routing.experts.shape[0]
    num_experts = routing.demand.shape[0]
    if scopes is None:
        capacity = limit.of(num_tokens, num_experts, top_k)
        weights = routing.weights if limit.drop_policy == "score" else None
        return plan_dispatch(
            routing.experts,
            num_experts,
            capacity=capacity,
            drop_policy=limit.drop_policy,
            weights=weights,
        )
    scope_ids, num_scopes = scopes
    if num_scopes * num_experts > MAX_EXPERTS:
        fail(ValueError, name, "num_scopes", f"be at most {MAX_EXPERTS // num_experts}", num_scopes)
    sizes = segment_sizes(scope_ids, num_scopes)
    room = limit.of_scopes(sizes, num_experts, top_k)[scope_ids.long(), None]
    kept = _rank(routing, limit.drop_policy, scope_ids, num_scopes) < room
    plan = plan_dispatch(torch.where(kept, routing.experts, -1), num_experts)
    return plan._replace(dropped=routing.demand - plan.kept)


def _rank(routing: Routing, drop_policy: str, scope_ids: Tensor, num_scopes: int) -> Tensor:
    """int64 `[T, K]`, the place of every slot among those of its scope and expert.

    The places come from a plan whose groups are the pairs (scope, expert) and whose slots stand in
    the order of the drop policy.
    """
    num_experts = routing.demand.shape[0]
    groups = routing.experts + scope_ids[:, None] * num_experts
    groups = torch.where(routing.experts < 0, -1, groups)
    if drop_policy == "position":
        slots = torch.arange(groups.numel(), device=groups.device)
        order = slots.view(groups.shape).t().flatten()
    else:
        keys = routing.weights.detach().flatten().nan_to_num(-torch.inf)
        order = keys.argsort(descending=True, stable=True)
    ordered = groups.flatten()[order]
    places = plan_dispatch(ordered[:, None], num_scopes * num_experts)
    starts = places.offsets.long()[ordered.long().clamp(min=0)]
    rank = torch.empty_like(order)
    rank[order] = places.slot_to_row[:, 0].long() - starts
    return rank.view(groups.shape)
