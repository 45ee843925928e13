"""Tokens to the ranks of their experts and back: the part that any sharded layer shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoe_route._arguments import FLOAT_DTYPES, autocast_dtype, fail, needs_grad
from fastmoe_route._environment import logger
from fastmoe_route.dispatch import expert_capacity, permute, plan_dispatch, unpermute
from fastmoe_route.distributed.exchange import Exchange, exchange_counts

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]

_DTYPES = (*FLOAT_DTYPES, None, "unknown")
_TRAITS = {
    "dtype": _DTYPES,
    "dtype of weights": _DTYPES,
    "dtype of autocast": _DTYPES,
    "width": None,
    "number of slots": None,
}


class Volume(NamedTuple):
    """What one forward call moved between ranks. Rows that stay on their rank are not counted.

    Attributes:
        rows_sent: token rows that left for other ranks; as many came back as results.
        rows_received: token rows that came from other ranks.
        bytes_sent: everything sent to other ranks, both ways: rows, ids, weights, results.
        bytes_received: everything received from other ranks.
        rows_dropped: rows not sent for want of capacity.
        slots: used slots, what would have been sent and come back one by one.
    """

    rows_sent: int
    rows_received: int
    bytes_sent: int
    bytes_received: int
    rows_dropped: int
    slots: int


class Shards(NamedTuple):
    """Which rank holds which expert.

    Attributes:
        rank_of_expert: int32 `[E]`.
        local_id: int32 `[E]`, the expert's place on its rank.
    """

    rank_of_expert: Tensor
    local_id: Tensor


class Sharded(NamedTuple):
    """The result of `run_sharded`: the output, what ran meanwhile, and the volume."""

    y: Tensor
    meanwhile: Tensor | None
    volume: Volume


def run_sharded(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    shards: Shards,
    group: Any,
    compute: Compute,
    *,
    meanwhile: Callable[[], Tensor] | None = None,
    capacity_factor: float | None = None,
) -> Sharded:
    """Runs experts that live on many ranks on this rank's tokens; every rank calls it at once.

    A token goes once to each rank that holds any of its experts, with its local expert ids and
    weights; that rank sums them up, and one row comes back. The sums of the ranks are added in
    rank order, in float32, so results and gradients have the same bits on every run.

    Args:
        x: `[T, H]`; `T` may differ between ranks and be 0.
        experts: int `[T, K]`, global ids, -1 for none.
        weights: float `[T, K]`.
        shards: where the experts are.
        group: the process group.
        compute: `(rows [N, H], ids int32 [N, K], weights [N, K]) -> [N, H]`, this rank's experts on
            what it received; ids are local, -1 where a slot's expert is on another rank.
        meanwhile: is called while tokens are on their way.
        capacity_factor: a rank sends at most its even share of rows times this to each rank, lower
            tokens first; None drops nothing.

    Returns:
        `Sharded`; `y` `[T, H]`, differentiable in `x`, `weights` and what `compute` uses. Backward
        is collective too: every rank has to run it, a rank without tokens as well.

    Raises:
        ExchangeError: a rank died or did not arrive within the timeout of the group.
        ValueError: dtypes or widths that differ between ranks; on each of them.
    """
    num_ranks = dist.get_world_size(group)
    ranks = torch.arange(num_ranks, dtype=torch.int32, device=x.device)
    is_real = experts >= 0
    ids = experts.clamp(min=0)
    owner = torch.where(is_real, shards.rank_of_expert[ids], -1)
    is_on = owner[:, None, :] == ranks[:, None]  # [T, W, K]
    targets = torch.where(is_on.any(2), ranks, -1)
    capacity = None
    if capacity_factor is not None:
        num_targets = min(num_ranks, experts.shape[1])
        capacity = expert_capacity(x.shape[0], num_ranks, num_targets, capacity_factor)
    plan = plan_dispatch(targets, num_ranks, capacity=capacity)
    totals = (plan.dropped.sum(), is_real.sum())
    notes = [*_traits(x, weights), needs_grad(x), needs_grad(weights)]
    send, receive, notes_by_rank, (num_dropped, num_slots) = exchange_counts(
        "row counts", group, plan.kept, notes, *totals
    )
    _check_traits(notes_by_rank)
    x, weights = _joined(x, any(notes_by_rank[-2])), _joined(weights, any(notes_by_rank[-1]))
    num_rows = sum(send)
    plan = plan._replace(row_to_slot=plan.row_to_slot[:num_rows])
    slots = plan.row_to_slot.long()
    tokens = slots // num_ranks
    local = torch.where(is_on.flatten(0, 1)[slots], shards.local_id[ids][tokens], -1)

    to_experts = Exchange("tokens to experts", group, send, receive)
    sent = (permute(x, plan), permute(weights, plan), local.to(torch.int32))
    pending = to_experts.start(*sent)
    aside = None if meanwhile is None else meanwhile()
    rows, row_weights, row_ids = to_experts.wait(*pending)
    y = _connected(compute(rows, row_ids, row_weights), rows, row_weights)
    to_tokens = Exchange("results to tokens", group, receive, send)
    (results,) = to_tokens.wait(*to_tokens.start(y))
    volume = _volume(sent, y, send, receive, dist.get_rank(group))
    volume = volume._replace(rows_dropped=num_dropped, slots=num_slots)
    logger.debug("rank %d: %s", dist.get_rank(group), volume)
    return Sharded(unpermute(results, plan), aside, volume)


def _traits(x: Tensor, weights: Tensor) -> list[int]:
    """What has to be the same on every rank, or rows arrive as other numbers: see `_TRAITS`."""
    dtypes = (x.dtype, weights.dtype, autocast_dtype(x))
    codes = [_DTYPES.index(dtype) if dtype in _DTYPES else -1 for dtype in dtypes]
    return [*codes, x.shape[1], weights.shape[1]]


def _check_traits(notes_by_rank: list[list[int]]) -> None:
    for (trait, names), values in zip(_TRAITS.items(), notes_by_rank, strict=False):
        for rank, value in enumerate(values):
            if value != values[0]:
                first, got = (v if names is None else names[v] for v in (values[0], value))
                rule = f"be alike on every rank; the {trait} is {first} on rank 0"
                fail(ValueError, "ExpertParallel", "tokens", rule, f"{got} on rank {rank}")


def _joined(t: Tensor, is_needed: bool) -> Tensor:
    """`t` with a gradient where any rank needs one: all of them take part in its exchange."""
    if not is_needed or t.requires_grad or not torch.is_grad_enabled():
        return t
    return t.detach().requires_grad_()


def _connected(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """`y`, in the graph of the rows also where there were none, or backward would hang."""
    if y.requires_grad or not torch.is_grad_enabled() or not rows.requires_grad:
        return y
    return y + rows[:0].sum() + weights[:0].sum()


def _volume(
    sent: tuple[Tensor, ...], y: Tensor, send: list[int], receive: list[int], rank: int
) -> Volume:
    outward = sum(send) - send[rank]
    inward = sum(receive) - receive[rank]
    there = sum(t.shape[1] * t.element_size() for t in sent)
    back = y.shape[1] * y.element_size()
    return Volume(
        rows_sent=outward,
        rows_received=inward,
        bytes_sent=outward * there + inward * back,
        bytes_received=inward * there + outward * back,
        rows_dropped=0,
        slots=0,
    )
