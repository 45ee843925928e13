"""Weights on huge pages: the same tensors in the same place, read faster."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastmoe_route._arguments import describe, fail

_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25


def use_huge_pages(*weights: Tensor | nn.Module) -> int:
    """Moves CPU weights onto huge pages of 2 MB, where Linux offers them.

    A processor that streams weights through pages of 4 KB stops at each of them to find the next.
    With few tokens per expert the expert layer is faster without these stops (docs/experts.md,
    *Pages*). Values, addresses, strides and gradients stay as they are, so this may be called
    at any time, best once after the weights are loaded; it copies them once and takes seconds for
    gigabytes. Memory mapped from a file and other devices are left alone.

    Args:
        weights: tensors, or modules whose parameters are meant.

    Returns:
        The number of bytes that now lie on huge pages; 0 where the system has none (not Linux, a
        kernel before 6.1, or huge pages switched off).

    Raises:
        TypeError: for anything but tensors and modules.

    Example:
        >>> import torch, fastmoe_route as fr
        >>> fr.use_huge_pages(torch.ones(8))  # too small for a huge page
        0
    """
    tensors: list[Tensor] = []
    for value in weights:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, nn.Module):
            tensors.extend(value.parameters())
        else:
            fail(TypeError, "use_huge_pages", "weights", "be tensors or modules", describe(value))
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(
        end - begin
        for begin, end in _ranges(tensors)
        if madvise(begin, end - begin, _MADV_COLLAPSE) == 0
    )


def _ranges(tensors: Iterable[Tensor]) -> set[tuple[int, int]]:
    """Whole huge pages inside the storages of the CPU tensors, each storage once."""
    found = set()
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        first, last = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        begin, end = -(-first // _HUGE_PAGE) * _HUGE_PAGE, last // _HUGE_PAGE * _HUGE_PAGE
        if begin < end:
            found.add((begin, end))
    return found
