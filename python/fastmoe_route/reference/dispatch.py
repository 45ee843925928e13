"""The dispatch plan, and the two row movements it drives."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from fastmoe_route.reference.softmax import arithmetic_dtype
from fastmoe_route.results import DispatchPlan


def expert_capacity(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    factor: float,
    *,
    min_capacity: int = 1,
    multiple_of: int = 1,
) -> int:
    """`max(ceil(factor * T * K / E), min_capacity)`, rounded up to a multiple of `multiple_of`."""
    capacity = max(math.ceil(factor * num_tokens * top_k / num_experts), min_capacity)
    return _round_up(capacity, multiple_of)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _wanted_experts(
    experts: Tensor, num_experts: int, allow_unrouted: bool, rules: str
) -> list[int]:
    """The expert of each slot, -1 for none; ids out of range raise (`cpu`) or are none (`cuda`)."""
    wanted = experts.flatten().tolist()
    if allow_unrouted:
        wanted = [-1 if e == num_experts else e for e in wanted]
    stray = next((e for e in wanted if not -1 <= e < num_experts), None)
    if stray is not None and rules == "cpu":
        raise ValueError(f"plan_dispatch: experts must be in [-1, {num_experts}), got {stray}")
    return [e if 0 <= e < num_experts else -1 for e in wanted]


def plan_dispatch(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
    weights: Tensor | None = None,
    scope_ids: Tensor | None = None,
    num_scopes: int = 1,
    align: int = 1,
    max_rows: int | None = None,
    allow_unrouted: bool = False,
    rules: str = "cpu",
) -> DispatchPlan:
    """Groups slots by expert, and inside an expert by slot number: a stable counting sort."""
    num_tokens, top_k = experts.shape
    wanted = _wanted_experts(experts, num_experts, allow_unrouted, rules)
    scopes = [0] * num_tokens if scope_ids is None else scope_ids.tolist()
    values = [] if weights is None else weights.flatten().tolist()

    def preference(slot: int) -> tuple[float, ...]:
        if drop_policy == "position":
            return slot % top_k, slot // top_k
        value = values[slot]
        return (1, 0.0, slot) if math.isnan(value) else (0, -value, slot)

    queues: dict[tuple[int, int], list[int]] = {}
    for slot, expert in enumerate(wanted):
        if expert >= 0:
            queues.setdefault((scopes[slot // top_k], expert), []).append(slot)
    kept_slots = sorted(
        slot for queue in queues.values() for slot in sorted(queue, key=preference)[:capacity]
    )
    num_rows = num_tokens * top_k
    if capacity is not None:
        num_rows = min(num_rows, num_experts * capacity * num_scopes)
    if max_rows is not None:
        num_rows = min(num_rows, max_rows)
        if len(kept_slots) > max_rows and rules == "cpu":
            raise ValueError(
                f"plan_dispatch: max_rows must be at least {len(kept_slots)}, got {max_rows}"
            )
        kept_slots = kept_slots[:max_rows]

    offsets, kept, dropped = [0], [], []
    row_to_slot = [-1] * (num_rows + num_experts * (align - 1))
    slot_to_row = [-1] * (num_tokens * top_k)
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot in kept_slots:
        slots_of[wanted[slot]].append(slot)
    demand = Counter(wanted)
    for expert, slots in enumerate(slots_of):
        for row, slot in enumerate(slots, start=offsets[-1]):
            row_to_slot[row], slot_to_row[slot] = slot, row
        offsets.append(offsets[-1] + _round_up(len(slots), align))
        kept.append(len(slots))
        dropped.append(demand[expert] - len(slots))

    def to_tensor(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=experts.device)

    return DispatchPlan(
        to_tensor(offsets),
        to_tensor(row_to_slot),
        to_tensor(slot_to_row).reshape(num_tokens, top_k),
        to_tensor(kept),
        to_tensor(dropped),
    )


def rows_or_zero(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` along dimension 0, and zeros where `index` is -1."""
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return padded[torch.where(index < 0, x.shape[0], index.long())]


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """`rows[r] = x[row_to_slot[r] // K]`, zero for padding. `[T, H] -> [R, H]`, exact."""
    top_k = max(plan.slot_to_row.shape[1], 1)
    token = torch.where(plan.row_to_slot < 0, -1, plan.row_to_slot // top_k)
    return rows_or_zero(x, token)


def unpermute(
    rows: Tensor,
    plan: DispatchPlan,
    weights: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`out[t] = sum over j ascending of weights[t, j] * rows[slot_to_row[t, j]]`, in float32.

    Weights of slots without a row are ignored, whatever they are; a token with no row gives 0.
    """
    wide = rows.to(arithmetic_dtype(rows, dtype))
    num_tokens, top_k = plan.slot_to_row.shape
    total = wide.new_zeros(num_tokens, rows.shape[1])
    for j in range(top_k):
        row = plan.slot_to_row[:, j]
        term = rows_or_zero(wide, row)
        if weights is not None:
            weight = torch.where(row < 0, 0.0, weights[:, j].to(wide.dtype))
            term = term * weight[:, None]
        total = total + term
    return total.to(dtype or rows.dtype)
