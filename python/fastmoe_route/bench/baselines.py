"""What people write today: each op as a plain PyTorch composition, all of them differentiable.

The expert layer comes in the two forms of transformers: the loop over experts (`eager`) and the
grouped matrix product. The loop unbinds the weights once, which spares it a full-size zero gradient
per expert in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_grouped: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)


def has_grouped_mm() -> bool:
    """Whether this torch has a grouped matrix product."""
    return _grouped is not None


def gate_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax, top-k, renormalise. Returns `(weights, experts)`."""
    scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, experts = scores.topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


def gate_with_statistics(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gate_softmax` without renormalising, plus the sum of the scores and the logsumexp."""
    scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, experts = scores.topk(top_k, dim=-1)
    return weights, experts, scores.sum(0), logits.float().logsumexp(-1)


def gate_dsv3(logits: Tensor, top_k: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router: sigmoid, bias, the 4 best of 8 groups by their two best, scale 2.5."""
    num_tokens, num_experts = logits.shape
    scores = logits.float().sigmoid()
    keys = scores + bias
    grouped = keys.view(num_tokens, 8, num_experts // 8)
    groups = grouped.topk(2, dim=-1).values.sum(-1).topk(4, dim=-1).indices
    allowed = torch.zeros(num_tokens, 8, dtype=torch.bool).scatter_(1, groups, True)
    keys = grouped.masked_fill(~allowed[:, :, None], -torch.inf).view(num_tokens, num_experts)
    experts = keys.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, experts


class SortedSlots(NamedTuple):
    """The plan of the plain compositions: slots in expert order."""

    order: Tensor  # int64 [R], slot of each row
    tokens: Tensor  # int64 [R], token of each row
    offsets: Tensor  # int32 [E + 1]
    row_of_slot: Tensor  # int64 [R]


def sort_slots(experts: Tensor, num_experts: int) -> SortedSlots:
    """Stable argsort, bincount, cumulative sum, inverse permutation."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(flat, minlength=num_experts).cumsum(0)
    row_of_slot = torch.empty_like(order)
    row_of_slot[order] = torch.arange(order.numel())
    return SortedSlots(order, order // experts.shape[1], offsets, row_of_slot)


def gather_rows(x: Tensor, slots: SortedSlots) -> Tensor:
    """`index_select`."""
    return x.index_select(0, slots.tokens)


def combine_rows(rows: Tensor, weights: Tensor, slots: SortedSlots, num_tokens: int) -> Tensor:
    """Weighted `index_add_` into the tokens."""
    scaled = rows * weights.flatten().index_select(0, slots.order).to(rows.dtype)[:, None]
    return rows.new_zeros(num_tokens, rows.shape[1]).index_add_(0, slots.tokens, scaled)


def grouped_mm_loop(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """One `F.linear` per expert that has rows. `w` is `[E, out, in]`."""
    ends = offsets.tolist()
    parts = [
        F.linear(rows[begin:end], weight)
        for begin, end, weight in zip(ends, ends[1:], w.unbind(0), strict=False)
        if end > begin
    ]
    return torch.cat(parts)


def grouped_mm_torch(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """PyTorch's own grouped product."""
    assert _grouped is not None
    return _grouped(rows, w.transpose(1, 2), offs=offsets[1:])


def _swiglu(up: Tensor) -> Tensor:
    gate_half, up_half = up.chunk(2, dim=-1)
    return F.silu(gate_half) * up_half


def experts_loop(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The loop over experts. `up` is `[E, 2I, H]`, `down` `[E, H, I]`."""
    out = torch.zeros_like(x)
    ups, downs = up.unbind(0), down.unbind(0)
    for expert in experts.unique().tolist():
        tokens, choice = torch.where(experts == expert)
        hidden = _swiglu(F.linear(x[tokens], ups[expert]))
        result = F.linear(hidden, downs[expert]) * weights[tokens, choice, None]
        out.index_add_(0, tokens, result.to(x.dtype))
    return out


def experts_grouped(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Sort, gather, two grouped products, combine."""
    slots = sort_slots(experts, up.shape[0])
    hidden = _swiglu(grouped_mm_torch(gather_rows(x, slots), up, slots.offsets))
    result = grouped_mm_torch(hidden, down, slots.offsets)
    return combine_rows(result, weights, slots, x.shape[0])
