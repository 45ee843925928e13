"""The matrix micro-kernels, through `grouped_mm` and `grouped_mm_wgrad`.

Tolerance classes: bound (products), exact (independence of batch, position and threads).
The kernels copy operands to tiles of 16 rows and 32 elements (AMX), vectors of 16 and panels of 48
to 512; the sizes stand around these.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from cases import normal
from fastmoe_route import grouped_mm  # noqa: F401  loads the operators
from tolerance import assert_bound, assert_exact, assert_has_power, rounding, unit_roundoff
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EDGES = (1, 2, 3, 5, 6, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97)
LONG = (255, 256, 257, 511, 513, 1030, 2047, 2049, 4097)  # around the blocks of the reduction


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def weights_of(k: int, n: int, outer: bool, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """[1, k, n] with the outputs (outer) or the reduction (dot) contiguous."""
    if outer:
        return normal(1, k, n, dtype=dtype, seed=seed)
    return normal(1, n, k, dtype=dtype, seed=seed).transpose(1, 2)


def multiply(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.fastmoe_route.grouped_mm_forward(x, w, offsets_of([x.shape[0]]), None)


def wgrad(x: Tensor, y: Tensor, counts: Sequence[int], transposed: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.fastmoe_route.grouped_mm_wgrad(
        x, y, offsets_of(counts), transposed, True, True
    )


def sum_limit(left: Tensor, right: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Limit of left @ right, summed in any order in float (double) and rounded once."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    magnitude = left.double().abs() @ right.double().abs()
    return (left.shape[-1] + 2) * unit_roundoff(arithmetic) * magnitude + rounding(expected, dtype)


def assert_product(x: Tensor, w: Tensor) -> Tensor:
    expected = x.double() @ w[0].double()
    actual = multiply(x, w)
    assert_bound(actual, expected, sum_limit(x, w[0], expected, x.dtype))
    return actual


def assert_wgrad(x: Tensor, y: Tensor, counts: Sequence[int], transposed: bool) -> None:
    grad_w, grad_bias = wgrad(x, y, counts, transposed)
    begin = 0
    for e, count in enumerate(counts):
        rows = slice(begin, begin + count)
        begin += count
        left, right = (y, x) if transposed else (x, y)
        left, right = left[rows].T, right[rows]
        expected = left.double() @ right.double()
        assert_bound(grad_w[e], expected, sum_limit(left, right, expected, x.dtype))
        ones = torch.ones(1, count, dtype=x.dtype)
        expected = (ones.double() @ y[rows].double())[0]
        limit = sum_limit(ones, y[rows], expected[None], x.dtype)[0]
        assert_bound(grad_bias[e], expected, limit)


# ---- literals


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_counting_matrices(dtype: torch.dtype, outer: bool) -> None:
    x = torch.tensor([[1, 2, 3], [0, -1, 4]], dtype=dtype)
    w = torch.tensor([[1, 0], [2, 1], [-1, 3]], dtype=dtype)
    w = w[None] if outer else w.T.contiguous().T[None]
    assert_exact(multiply(x, w), torch.tensor([[2, 11], [-6, 11]], dtype=dtype))
    grad_w, grad_bias = wgrad(x, x[:, :2].contiguous(), [2], False)
    assert_exact(grad_w[0], torch.tensor([[1, 2], [2, 5], [3, 2]], dtype=dtype))
    assert_exact(grad_bias[0], torch.tensor([1, 1], dtype=dtype))


# ---- reference


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_sizes(dtype: torch.dtype, outer: bool) -> None:
    rng = random.Random(0)
    sizes = [(rng.choice(EDGES), rng.choice(EDGES), rng.choice(EDGES)) for _ in range(60)]
    sizes += [(rng.choice(EDGES), rng.choice(EDGES), k) for k in LONG]
    sizes += [(rng.choice(EDGES), n, rng.choice(EDGES)) for n in LONG[:6]]
    sizes += [(m, rng.choice(EDGES), rng.choice(EDGES)) for m in LONG[:6]]
    for i, (m, n, k) in enumerate(sizes):
        assert_product(normal(m, k, dtype=dtype, seed=i), weights_of(k, n, outer, dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgrad_sizes(dtype: torch.dtype, transposed: bool) -> None:
    rng = random.Random(1)
    sizes = [(rng.choice(EDGES), rng.choice(EDGES), rng.choice(EDGES)) for _ in range(40)]
    sizes += [(r, rng.choice(EDGES), rng.choice(EDGES)) for r in (127, 129, 255, 257, 600)]
    # More outputs than share sums, by rows whose inputs are kept for all outputs, and by more.
    sizes += [(300, 270, 530), (700, 150, 1030)]
    sizes += [(rng.choice(EDGES), 257, 65), (33, 65, 1025)]
    for i, (rows, a, b) in enumerate(sizes):
        x, y = normal(rows, a, dtype=dtype, seed=i), normal(rows, b, dtype=dtype, seed=-i - 1)
        assert_wgrad(x, y, [rows], transposed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checks_have_power(dtype: torch.dtype) -> None:
    x, w = normal(40, 100, dtype=dtype), weights_of(100, 50, False, dtype)
    expected = x.double() @ w[0].double()
    limit = sum_limit(x, w[0], expected, dtype)
    assert_has_power(lambda actual: assert_bound(actual, expected, limit), multiply(x, w))


# ---- edges


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype, outer: bool) -> None:
    for k, n in ((70, 100), (1030, 33), (4097, 20)):
        x, w = normal(75, k, dtype=dtype), weights_of(k, n, outer, dtype)
        whole = multiply(x, w)
        for begin, end in ((0, 1), (3, 4), (3, 5), (10, 14), (20, 27), (16, 33), (74, 75)):
            assert_exact(multiply(x[begin:end].contiguous(), w), whole[begin:end])
        part = w[:, :, 5:18]
        assert_exact(multiply(x, part), whole[:, 5:18], stride=False)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_stay_in_their_row_and_column(dtype: torch.dtype, outer: bool) -> None:
    for m, n, k in ((5, 7, 9), (18, 35, 33), (40, 70, 513)):
        x, w = normal(m, k, dtype=dtype), weights_of(k, n, outer, dtype)
        clean = multiply(x, w)
        x[2, k // 2], x[3, 0] = torch.nan, torch.inf
        w[0, k - 1, 4] = -torch.inf
        got = multiply(x, w)
        rows = torch.ones(m, dtype=torch.bool)
        columns = torch.ones(n, dtype=torch.bool)
        rows[[2, 3]], columns[4] = False, False
        assert_exact(got[rows][:, columns], clean[rows][:, columns])
        assert got[2].isnan().all()
        assert not got[:, 4].isfinite().any()
        assert not got[3].isfinite().any()
        y = normal(m, n, dtype=dtype, seed=3)
        grad = wgrad(x, y, [m], False)[0][0]
        spoiled = torch.zeros(k, dtype=torch.bool)
        spoiled[[k // 2, 0]] = True
        assert grad[~spoiled].isfinite().all()
        assert not grad[spoiled].isfinite().any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgrad_of_many_experts(
    dtype: torch.dtype, transposed: bool, threads: Callable[[int], None]
) -> None:
    counts = [0, 3, 70, 0, 300, 1, 0]
    rows = sum(counts) + 5  # the last five belong to nobody
    x, y = normal(rows, 33, dtype=dtype), normal(rows, 300, dtype=dtype, seed=1)
    x[-5:], y[-5:] = torch.nan, torch.nan
    assert_wgrad(x, y, counts, transposed)
    grad_w, grad_bias = wgrad(x, y, counts, transposed)
    for e in (0, 3, 6):
        assert not grad_w[e].any()
        assert not grad_bias[e].any()
    for count in (1, 2, 4):
        threads(count)
        again = wgrad(x, y, counts, transposed)
        assert_exact(again[0], grad_w)
        assert_exact(again[1], grad_bias)


# ---- layouts


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_past_the_operands(
    dtype: torch.dtype, outer: bool, hole_after: Callable[[Tensor], Tensor]
) -> None:
    rng = random.Random(2)
    for i in range(12):
        m, n, k = (rng.choice(EDGES) for _ in range(3))
        x = hole_after(normal(m, k, dtype=dtype, seed=i))
        w = weights_of(k, n, outer, dtype)
        dense = w if outer else w.transpose(1, 2)
        placed = hole_after(dense)
        assert_exact(
            multiply(x, placed if outer else placed.transpose(1, 2)), multiply(x.clone(), w)
        )
        y = hole_after(normal(m, n, dtype=dtype, seed=-i))
        assert_exact(wgrad(x, y, [m], outer)[0], wgrad(x.clone(), y.clone(), [m], outer)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_operands(dtype: torch.dtype) -> None:
    x, y = normal(37, 70, dtype=dtype)[:, 3:50], normal(37, 90, dtype=dtype, seed=1)[:, 1:80]
    w = normal(1, 60, 90, dtype=dtype, seed=2)
    assert_exact(multiply(x, w[:, 5:52, 7:81]), multiply(x.clone(), w[:, 5:52, 7:81].clone()))
    wide = normal(1, 90, 60, dtype=dtype, seed=2).transpose(1, 2)
    part = wide[:, 5:52, 7:81]
    dense = part.transpose(1, 2).contiguous().transpose(1, 2)
    assert_exact(multiply(x, part), multiply(x.clone(), dense))
    for transposed in (False, True):
        grad_w = wgrad(x, y, [30], transposed)[0]
        assert_exact(grad_w, wgrad(x.clone(), y.clone(), [30], transposed)[0])
