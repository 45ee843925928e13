"""What is taken over the tokens of each segment: of a sequence, of a scope, of an expert."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(x: Tensor, ids: Tensor, num_segments: int) -> Tensor:
    """The rows of each segment added up, the same bits on every run: `[T, ...]` to `[S, ...]`.

    On a GPU `index_add` adds up by atomics, in any order, and `index_put` after a stable sort; on
    the CPU it is `index_add` that keeps the order.

    Args:
        x: `[T, ...]`.
        ids: int64 `[T]` in `[0, num_segments)`.
        num_segments: `S`.

    Returns:
        `[S, ...]` in the dtype of `x`, 0 for an empty segment. Differentiable.
    """
    total = x.new_zeros(num_segments, *x.shape[1:])
    if x.device.type == "cpu":
        return total.index_add(0, ids, x)
    return total.index_put((ids,), x, accumulate=True)


def segment_sizes(ids: Tensor, num_segments: int) -> Tensor:
    """int64 `[S]`, the tokens of every segment."""
    ids = ids.long()
    return ids.new_zeros(num_segments).index_add(0, ids, torch.ones_like(ids))


def segment_mean(x: Tensor, ids: Tensor, num_segments: int) -> Tensor:
    """The mean of the rows of each segment, 0 for an empty one: `[T, ...]` to `[S, ...]`."""
    total, count = segment_sum(x, ids, num_segments), segment_sizes(ids, num_segments).to(x.dtype)
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
    lengths = segment_sizes(ids, num_segments)
    order = values.argsort(dim=0, stable=True)
    order = order.gather(0, ids[order].argsort(dim=0, stable=True))
    starts = lengths.cumsum(0) - lengths
    rows = torch.arange(ids.shape[0], device=ids.device).view(-1, *[1] * (values.dim() - 1))
    places = rows - starts[ids[order]]
    return torch.empty_like(places).scatter(0, order, places), lengths[ids]


def segment_softmax(logits: Tensor, ids: Tensor, num_segments: int) -> Tensor:
    """Softmax of every column over the rows of each segment, `[T, E]`.

    Args:
        logits: `[T, E]`.
        ids: int64 `[T]` in `[0, num_segments)`.
        num_segments: `S`.

    Returns:
        `[T, E]`; the rows of a segment sum to 1 in every column. Differentiable.
    """
    detached = logits.detach()
    top = detached.new_full((num_segments, logits.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, ids[:, None].expand_as(detached), detached, "amax")
    powers = (logits - top[ids]).exp()
    return powers / segment_sum(powers, ids, num_segments)[ids]
