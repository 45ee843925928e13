"""The distribution function of a Beta, which torch lacks, with its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ITERATIONS = 80  # of the continued fraction; float64 precision for parameters up to about 300


def beta_cdf(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The distribution function of Beta(a, b) at `x`: the regularised incomplete beta function.

    Its continued fraction (DLMF 8.17.22) is evaluated by Lentz's method with a fixed number of
    steps, on the side of the mean where it converges fast. The derivative in `x` is the density.

    Args:
        x: any shape, clamped to [0, 1].
        a: positive, broadcasts to `x`.
        b: positive, likewise.

    Returns:
        The shape of `x`. Differentiable in `x` (with 0 at and beyond the ends); not in `a`, `b`.

    >>> beta_cdf(torch.tensor(0.25), torch.tensor(1.0), torch.tensor(2.0))
    tensor(0.4375)
    """
    value: Tensor = _BetaCdf.apply(x, a, b)
    return value


class _BetaCdf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        wide, a, b = x.double().clamp(0, 1), a.detach().double(), b.detach().double()
        flip = wide > (a + 1) / (a + b + 2)
        u, p, q = (torch.where(flip, *pair) for pair in ((1 - wide, wide), (b, a), (a, b)))
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        log_front = torch.xlogy(p, u) + torch.xlogy(q, 1 - u) - log_beta
        part = log_front.exp() / (p * _fraction(u, p, q))
        ctx.save_for_backward(x, a, b, log_beta)
        return torch.where(flip, 1 - part, part).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, a, b, log_beta = ctx.saved_tensors
        inside = (x > 0) & (x < 1)
        wide = torch.where(inside, x, 0.5).double()
        log_density = (a - 1) * wide.log() + (b - 1) * (1 - wide).log() - log_beta
        return grad * torch.where(inside, log_density.exp(), 0.0).to(x.dtype), None, None


def _fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`1 + d1 / (1 + d2 / (1 + ...))` of the incomplete beta function."""
    tiny = 1e-300
    c = torch.ones_like(x)
    value = d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    for m in range(1, _ITERATIONS + 1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / _away_from_zero(1 + step * d, tiny)
            c = _away_from_zero(1 + step / c, tiny)
            value = value * d * c
    return 1 / value


def _away_from_zero(x: Tensor, tiny: float) -> Tensor:
    return torch.where(x.abs() < tiny, torch.full_like(x, tiny), x)
