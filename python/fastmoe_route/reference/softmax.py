"""Softmax, softmax with top-k, and the one order in which anything is ever ranked."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype an op computes in: `dtype` if given, else float64 for float64 and float32."""
    if dtype is not None:
        return dtype
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.no_grad()
def falling_order(keys: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Positions along the last dimension from best to worst.

    Larger keys first, equal keys (-0.0 equals 0.0) by lower position, NaN keys after every number,
    positions that are not `allowed` after everything.

    Args:
        keys: `[..., C]`, any float dtype.
        allowed: bool `[..., C]`, or None for all.

    Returns:
        int64 `[..., C]`, a permutation of `0 .. C - 1` per row.
    """
    is_nan = keys.isnan()
    by_key = keys.masked_fill(is_nan, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    last = is_nan.long() if allowed is None else is_nan.long().masked_fill(~allowed, 2)
    return by_key.gather(-1, last.gather(-1, by_key).argsort(dim=-1, stable=True))


def softmax(
    x: Tensor, dim: int = -1, *, method: str = "auto", dtype: torch.dtype | None = None
) -> Tensor:
    """`exp(x - m) / sum(exp(x - m))` along `dim`, with `m` the largest `x`.

    A slice with a NaN or a +inf, and one that is all -inf, gives NaN throughout, as in torch.
    """
    wide = x.to(arithmetic_dtype(x, dtype))
    if x.numel():
        exps = (wide - wide.detach().amax(dim, keepdim=True)).exp()
        wide = exps / exps.sum(dim, keepdim=True)
    return wide.to(dtype or x.dtype)


def softmax_topk(x: Tensor, k: int, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The `k` largest softmax probabilities of each row and their columns, best first.

    Ranked by `x` itself: ties go to the lower column, NaN ranks below every number (-inf included).
    """
    columns = falling_order(x)[..., :k]
    wide = softmax(x, dtype=arithmetic_dtype(x, dtype))
    return wide.gather(-1, columns).to(dtype or x.dtype), columns
