"""Products as the kernels' device rounds them: tensor cores' tf32, one running sum an element."""

from __future__ import annotations

from typing import Any

import torch
import vm_backend


def tf32(x: torch.Tensor) -> torch.Tensor:
    """`x` with 10 bits of mantissa, as tensor cores are given it.

    Halves go away from zero here and on sm_80, to even on sm_90.
    """
    bits = x.view(torch.int32) + (1 << 12)
    return (bits >> 13 << 13).view(torch.float32)


def off_halves(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last bit set, so that `tf32` of it is the same on every architecture."""
    return (x.view(torch.int32) | 1).view(torch.float32)


class _RunningProduct(torch.autograd.Function):
    """Products of matrices, every element one running sum in float32; so are the gradients."""

    @staticmethod
    def forward(context: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(a, b)
        return running_product(a, b)

    @staticmethod
    def backward(context: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = context.saved_tensors
        return running_product(grads[0], b.t()), running_product(a.t(), grads[0])


def running_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, adding up the products of every element one after the other, each rounded once."""
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        total = torch.addcmul(total, a[:, k, None], b[None, k])
    return total


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What a product of plain torch on the device of the kernels adds up like.

    The vm has the processor's torch beside it, whose float32 products add up in blocks and so err
    less than the one running sum of a GPU's, torch's own included.
    """
    if vm_backend.runs_cuda() and a.dtype == torch.float32:
        return _RunningProduct.apply(a, b)  # type: ignore[no-any-return, no-untyped-call]
    return a @ b
