"""What a case is, and what all cases share.

Declared bytes are those that have to move when nothing is kept: every input read once, every output
written once, weights of experts that got tokens only. Declared operations are the multiply-adds of
the products, times three for training, and about 20 per exponential.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmoe_route.bench.check import Finding, bound, no_worse
from fastmoe_route.bench.shapes import Row
from fastmoe_route.bench.timing import Call

EXP_FLOPS = 20
READ = "read of weights"
MULTIPLY = "multiply-adds"  # on registers
_RMS_ELEMENTS = 16  # of fewer, such as the one weight of a token with one slot, an rms is chance
Function = Callable[..., Tensor]


@dataclass
class Case:
    """A row made ready to run. The first contender is ours."""

    row: Row
    contenders: dict[str, Call]
    num_bytes: int
    flops: float
    copies: int
    cached: bool
    check: Callable[[], list[Finding]]
    written: int = 0  # of num_bytes, those of outputs that later calls write again
    yardsticks: dict[str, Call] = field(default_factory=dict)  # timed beside; no way to do the work
    read_bytes: int = 0  # of the yardstick READ, whose rate then is this row's limit by memory
    multiply_flops: float = 0.0  # of the yardstick MULTIPLY, the limit by arithmetic likewise
    notes: list[str] = field(default_factory=list)  # contenders that were left out, and why


def backward(outputs: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `inputs`, fresh tensors in every call."""
    return torch.autograd.grad(outputs, inputs, grad)


def compare(
    what: str, got: Tensor, plain: Tensor, expected: Tensor | None, tolerance: float
) -> list[Finding]:
    """Against float64 where there is such a result, otherwise against plain PyTorch."""
    if expected is None:
        return [bound(f"{what} beside plain PyTorch", got, plain, 2 * tolerance)]
    findings = [bound(f"{what} beside float64", got, expected, tolerance)]
    if expected.numel() >= _RMS_ELEMENTS:
        findings.append(no_worse(f"{what}, rms error beside plain PyTorch's", got, plain, expected))
    return findings
