"""The normaliser of a softmax as a value, which parts of a row can be merged by."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe_route._arguments import check_rows, describe, fail
from fastmoe_route.methods import register


@register("online_normalizer", row="X2", source="arXiv:1805.02867", verified="code")
def normalizer(x: Tensor) -> tuple[Tensor, Tensor]:
    """The pair `(m, d)`, `m = max(x)` and `d = sum of exp(x - m)`, of each row (arXiv:1805.02867).

    `softmax(x) = exp(x - m) / d`. A row that is empty or all -inf gives `(-inf, 0)`, the neutral
    element of `merge_normalizers`.

    Args:
        x: `[..., N]`, floating point.

    Returns:
        `m` and `d`, both `[...]` in the dtype of `x`; differentiable.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("normalizer", "x", x)
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -torch.inf), x.new_zeros(x.shape[:-1])
    m = x.amax(-1)
    return m, (x - _finite(m)[..., None]).exp().sum(-1)


def merge_normalizers(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The normaliser of two parts of a row, from those of the parts (arXiv:1805.02867).

    `m = max(m1, m2)`, `d = d1 exp(m1 - m) + d2 exp(m2 - m)`: associative and commutative. Two
    neutral elements merge to the neutral element, where the bare formula gives NaN.

    Args:
        one: `(m, d)` of one part, any shape.
        other: `(m, d)` of the other.

    Returns:
        `(m, d)` of both, differentiable in all four.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    for argument, value in (("one", one), ("other", other)):
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            fail(TypeError, "merge_normalizers", argument, "be a pair (m, d)", describe(value))
    (m1, d1), (m2, d2) = one, other
    m = torch.maximum(m1, m2)
    at = _finite(m)
    return m, d1 * (m1 - at).exp() + d2 * (m2 - at).exp()


def _finite(m: Tensor) -> Tensor:
    """A maximum of -inf replaced by 0, so that it can be subtracted."""
    return m.masked_fill(m == -torch.inf, 0.0)
