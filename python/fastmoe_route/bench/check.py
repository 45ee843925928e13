"""Is the answer right? Asked of every row before its time is taken.

Four questions, all written so that NaN answers no:

- *exact*: same dtype, shape and values (ids, plans, moved rows);
- *bound*: every element within `tolerance * (|expected| + rms of its row)` of a float64 result;
- *rms bound*: the same of a tensor as a whole, for the gradients of routing weights;
- *no worse*: against float64, the rms error at most `2 x` that of plain PyTorch in the same dtype,
  plus one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Products of up to a few thousand terms, twice in a row: float32 sums stay below 1e-5 of the row's
# rms; with bfloat16 (float16) every intermediate is rounded by up to 2^-8 (2^-11) of it, and a
# deviation of five standard deviations occurs among millions of elements.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3, torch.float64: 1e-10}
NO_WORSE = 2.0


@dataclass(frozen=True)
class Finding:
    """One comparison: what was compared, how far off it was, how far it may be."""

    what: str
    passed: bool
    error: float
    allowed: float

    def __str__(self) -> str:
        """For the report."""
        verdict = "ok" if self.passed else "WRONG"
        return f"{verdict}: {self.what}: error {self.error:.3g}, allowed {self.allowed:.3g}"


def exact(what: str, got: Tensor, expected: Tensor) -> Finding:
    """Equal in dtype, shape and every value."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return Finding(f"{what} (dtype or shape)", False, float("inf"), 0.0)
    wrong = int((got != expected).sum())
    return Finding(what, wrong == 0, float(wrong), 0.0)


def _unroll(tensor: Tensor) -> Tensor:
    return tensor.detach().double().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def bound(what: str, got: Tensor, expected: Tensor, tolerance: float) -> Finding:
    """Every element within `tolerance` of the size of its row; the error is in those units."""
    if got.shape != expected.shape:
        return Finding(f"{what} (shape)", False, float("inf"), tolerance)
    if got.numel() == 0:
        return Finding(what, True, 0.0, tolerance)
    wide, wanted = _unroll(got), _unroll(expected)
    size = wanted.abs() + wanted.square().mean(1, keepdim=True).sqrt()
    difference = (wide - wanted).abs()
    # A row that is exactly zero has to be exactly zero.
    error = torch.where(size > 0, difference / size, torch.where(difference > 0, torch.inf, 0.0))
    is_bad = ~(difference <= tolerance * size)
    worst = float(error.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
    return Finding(what, not bool(is_bad.any()), worst, tolerance)


def rms_bound(what: str, got: Tensor, expected: Tensor, tolerance: float) -> Finding:
    """RMS of the difference within `tolerance` of the rms of what is expected.

    For gradients that are differences of large sums, whose small elements say nothing.
    """
    if got.shape != expected.shape:
        return Finding(f"{what} (shape)", False, float("inf"), tolerance)
    wanted = _unroll(expected)
    size, difference = float(wanted.square().mean()), float((_unroll(got) - wanted).square().mean())
    error = (difference / size) ** 0.5 if size > 0 else float(difference > 0)
    return Finding(what, error <= tolerance, error, tolerance)


def no_worse(what: str, got: Tensor, plain: Tensor, expected: Tensor) -> Finding:
    """RMS error against float64, beside that of plain PyTorch."""
    wanted = _unroll(expected)

    def rms(tensor: Tensor) -> float:
        return float(tensor.square().mean().sqrt())

    size = rms(wanted) or 1.0
    error = rms(_unroll(got) - wanted) / size
    allowed = NO_WORSE * rms(_unroll(plain) - wanted) / size + torch.finfo(got.dtype).eps / 2
    return Finding(what, error <= allowed, error, allowed)
