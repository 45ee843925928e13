"""What the calls of mutant_cases.py share: inputs, the comparison, small launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from engine_fixture import engine

Case = Callable[[], None]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 2%: enough to tell a mutant from the kernel, whatever the dtype rounds."""
    a, e = actual.detach().double(), expected.detach().double()
    is_same = (a == e) | (a.isnan() & e.isnan())
    assert bool((is_same | ((a - e).abs() <= 2e-2 * (1 + e.abs()))).all())


@contextmanager
def few_blocks(count: int, kernels: str = "") -> Iterator[None]:
    """At most so many blocks for kernels whose names hold the text, which walk on by the grid."""
    engine().set_options(most_blocks=count, few=kernels)
    try:
        yield
    finally:
        engine().set_options(most_blocks=2**32 - 1)
