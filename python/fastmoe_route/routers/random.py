"""Random numbers of routers: a function of `(seed, position, column)`, not of the batch.

A token that keeps its seed and its place in its own request draws the same numbers whatever other
requests share the batch, so sampling methods keep invariance class I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe_route._arguments import arithmetic_dtype
from fastmoe_route.routers.base import Context

# The increment and the finaliser of splitmix64 (doi:10.1145/2714064.2660195), as signed integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers in which every input bit moves half of the output bits."""
    x = (x ^ _shift(x, 30)) * _FACTORS[0]
    x = (x ^ _shift(x, 27)) * _FACTORS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """The unsigned right shift of signed integers."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def uniform(context: Context, like: Tensor, num_columns: int, stream: int = 0) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one row per token.

    Args:
        context: with a `seed`, the numbers are a function of it, of `positions` (the row number
            where there are none), of `stream` and of the column; without, they come from torch's
            generator.
        like: a tensor `[T, ...]` that gives the number of tokens, the device and, where it is
            float64, the dtype; float32 otherwise.
        num_columns: `C`.
        stream: draws for different purposes take different streams.

    Returns:
        `[T, C]`.
    """
    num_tokens = like.shape[0]
    dtype = arithmetic_dtype(like)
    if context.seed is None:
        bits = torch.randint(2**23, (num_tokens, num_columns), device=like.device)
    else:
        rows = context.positions
        if rows is None:
            rows = torch.arange(num_tokens, device=like.device)
        columns = torch.arange(1, num_columns + 1, device=like.device)
        start = (stream * _STEP + 2**63) % 2**64 - 2**63
        keys = _scramble(torch.full_like(rows, context.seed, dtype=torch.int64) + start)
        keys = _scramble(keys + (rows.long() + 1) * _STEP)
        bits = _shift(_scramble(keys[:, None] + columns * _STEP), 41)
    return (bits.to(dtype) + 0.5) * 2.0**-23


def gumbel(context: Context, like: Tensor, num_columns: int, stream: int = 0) -> Tensor:
    """Standard Gumbel numbers `-log(-log(u))`, by the rules of `uniform`.

    The largest of `z + gumbel` is a draw from `softmax(z)`, the order of the k largest an ordered
    draw without replacement (arXiv:1903.06059).
    """
    return -(-uniform(context, like, num_columns, stream).log()).log()


def normal(context: Context, like: Tensor, num_columns: int, stream: int = 0) -> Tensor:
    """Standard normal numbers, by the rules of `uniform`."""
    quantile: Tensor = torch.special.ndtri(uniform(context, like, num_columns, stream))
    return quantile
