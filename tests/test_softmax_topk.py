"""softmax_topk: the best columns of wide rows, exactly ranked, with their probabilities."""

from __future__ import annotations

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import reference
from levels import LEVELS, run_python
from tolerance import (
    assert_bound,
    assert_exact,
    assert_has_power,
    assert_literal,
    softmax_limit,
    unit_roundoff,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF, NAN = torch.inf, torch.nan


def logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 4).to(dtype)


def check_values(values: Tensor, x: Tensor, indices: Tensor) -> None:
    p = reference.softmax(x, dtype=torch.float64)
    assert values.dtype == x.dtype
    assert_bound(values, p.gather(-1, indices), softmax_limit(x, p).gather(-1, indices))


def check(x: Tensor, k: int, backend: str) -> None:
    values, indices = fr.softmax_topk(x.to(backend), k)
    _, wanted = reference.softmax_topk(x, k)
    assert_exact(indices.cpu(), wanted, stride=False)
    check_values(values.cpu(), x, wanted)


# ---- literals ----------------------------------------------------------------------------------


def test_literals(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0, 5.0, 2.0]], device=backend).log()
    values, indices = fr.softmax_topk(x, 3)
    assert_literal(values, [[0.5, 0.2, 0.2]])
    assert_exact(indices, torch.tensor([[2, 1, 3]]))


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(backend: str, dtype: torch.dtype) -> None:
    for size in (1, 2, 7, 8, 16, 17, 64, 65, 1000, 1023, 1025, 4097, 16384, 16385, 50000):
        x = logits(3, size, dtype=dtype, seed=size)
        for k in {1, min(size, 5), min(size, 64)}:
            check(x, k, backend)


def test_the_check_has_power(backend: str) -> None:
    x = logits(4, 33)
    values, indices = fr.softmax_topk(x.to(backend), 5)
    assert_has_power(lambda v: check_values(v, x, indices.cpu()), values.cpu())


@pytest.mark.parametrize("k", [1, 5, 33, 64])
def test_orders_and_ties(backend: str, k: int) -> None:
    size = 20000
    rising = torch.arange(size) * 1e-3
    few = torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(0)).float()
    zeros = torch.zeros(size)
    zeros[::2] = -0.0
    check(torch.stack([rising, rising.flip(0), few, zeros, torch.ones(size)]), k, backend)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7])
def test_gradcheck(backend: str, k: int) -> None:
    x = logits(2, 3, 7, dtype=torch.float64).to(backend).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fr.softmax_topk(x, k)[0], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 300, 40000])
def test_gradient_against_float64(backend: str, size: int, dtype: torch.dtype) -> None:
    x = logits(3, size, dtype=dtype).to(backend)
    x[0, 1] = -INF
    x.requires_grad_()
    values, indices = fr.softmax_topk(x, 4)
    g = logits(3, 4, dtype=dtype, seed=1).to(backend)
    (got,) = torch.autograd.grad(values, x, g)
    p = reference.softmax(x.detach(), dtype=torch.float64)
    chosen, wide_g = p.gather(-1, indices), g.double()
    dot = (chosen * wide_g).sum(-1, keepdim=True)
    wanted = (-p * dot).scatter_add(-1, indices, chosen * wide_g)
    info = torch.finfo(dtype)
    scale = p * (chosen * wide_g).abs().sum(-1, keepdim=True)
    scale = scale.scatter_add(-1, indices, (chosen * wide_g).abs())
    relative = softmax_limit(x, p) / p.clamp(min=info.tiny) + info.eps
    assert_bound(got, wanted, 2 * relative * scale + info.smallest_normal)
    assert got[0, 1] == 0.0


def test_indices_carry_no_gradient(backend: str) -> None:
    x = logits(2, 9).to(backend).requires_grad_()
    values, indices = fr.softmax_topk(x, 2)
    assert values.requires_grad
    assert not indices.requires_grad


# ---- registration ------------------------------------------------------------------------------


def test_opcheck(backend: str) -> None:
    ops = torch.ops.fastmoe_route
    x = logits(4, 9).to(backend)
    torch.library.opcheck(ops.softmax_topk, (x.clone().requires_grad_(), 3))
    torch.library.opcheck(ops.softmax_topk_forward, (x, 3))
    values, statistics, indices = ops.softmax_topk(x, 3)
    torch.library.opcheck(ops.softmax_topk_backward, (values, x, statistics, indices))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(
        lambda x: fr.softmax_topk(x * 2, 3), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    x = logits(3, 6, 50).to(backend).requires_grad_()
    values, indices = compiled(x)
    wanted, columns = fr.softmax_topk(x * 2, 3)
    assert_exact(values, wanted)
    assert_exact(indices, columns)
    values.square().sum().backward()
    assert x.grad is not None


def test_export(backend: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return fr.softmax_topk(x, 2)

    x = logits(3, 6).to(backend)
    for got, wanted in zip(
        torch.export.export(Module(), (x,)).module()(x), fr.softmax_topk(x, 2), strict=True
    ):
        assert_exact(got, wanted)


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_special_values(backend: str, dtype: torch.dtype) -> None:
    rows = (
        [0.0, NAN, 1.0, -INF],
        [0.0, INF, 1.0, INF],
        [-INF, -INF, -INF, -INF],
        [NAN, NAN, NAN, NAN],
        [NAN, -INF, NAN, -INF],
        [INF, NAN, -INF, 2.0],
        [-INF, 3.0, -INF, 3.0],
        [1e30, -1e30, 1e30, 0.0],
    )
    for row in rows:
        for repeats in (1, 40, 10000):
            x = torch.tensor(row).to(dtype).repeat(repeats)[None]
            for k in (1, 3, min(64, x.shape[1])):
                values, indices = fr.softmax_topk(x.to(backend), k)
                wanted, columns = reference.softmax_topk(x, k)
                assert_exact(indices.cpu(), columns, stride=False)
                assert indices[0].unique().numel() == k
                assert_bound(values, wanted, 4 * unit_roundoff(dtype) * wanted)


def test_no_rows(backend: str) -> None:
    values, indices = fr.softmax_topk(torch.empty(0, 5, device=backend), 2)
    assert values.shape == indices.shape == (0, 2)
    x = torch.empty(0, 5, device=backend, requires_grad=True)
    fr.softmax_topk(x, 2)[0].sum().backward()
    assert x.grad.shape == (0, 5)


def test_threads_and_batch_do_not_show(backend: str, threads) -> None:
    for shape in ((300, 200), (3, 40000), (1, 200001)):
        x = logits(*shape).round(decimals=1).to(backend)
        results = []
        for count in (1, 2, 4):
            threads(count)
            saved = torch.ops.fastmoe_route.softmax_topk(x, 7)
            grad = torch.ops.fastmoe_route.softmax_topk_backward(saved[0], x, saved[1], saved[2])
            results.append((*saved, grad))
        alone = [fr.softmax_topk(row[None], 7) for row in x[:20]]
        for result in results[1:]:
            for got, wanted in zip(result, results[0], strict=True):
                assert_exact(got, wanted)
        assert_exact(torch.cat([values for values, _ in alone]), results[0][0][:20])


@pytest.mark.parametrize("level", LEVELS[:3])
def test_every_instruction_set(level: str) -> None:
    """A short subset."""
    chosen = "test_equals_reference or test_orders or test_special or test_gradient_against"
    run_python(level, "-m", "pytest", "-q", "-x", __file__, "-k", chosen)


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend: str, guarded, dtype: torch.dtype) -> None:
    for size in (5, 61, 3000):
        x = logits(6, size, dtype=dtype).to(backend)
        wanted, columns = fr.softmax_topk(x, 4)
        wide = torch.full((6, size + 3), INF, dtype=dtype, device=backend)
        wide[:, 1 : size + 1] = x
        for view in (guarded(x), wide[:, 1 : size + 1], x.T.contiguous().T):
            values, indices = fr.softmax_topk(view, 4)
            assert_exact(values, wanted)
            assert_exact(indices, columns)
    values, indices = fr.softmax_topk(x.view(2, 3, size), 4)
    assert_exact(values.view(6, 4), wanted)
    assert_exact(fr.softmax_topk(x[0], 4)[1], columns[0])


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "k", "kind", "message"),
    [
        ([1.0], 1, TypeError, "softmax_topk: x must be a torch.Tensor"),
        (torch.ones(3).int(), 1, TypeError, "softmax_topk: x must be float32"),
        (torch.tensor(1.0), 1, ValueError, "softmax_topk: x must have at least 1 dimension"),
        (torch.ones(2, 3), 4, ValueError, r"softmax_topk: k must be in \[1, 3\], got 4"),
        (torch.ones(2, 99), 65, ValueError, r"softmax_topk: k must be in \[1, 64\], got 65"),
        (torch.ones(2, 3), 0, ValueError, r"softmax_topk: k must be in \[1, 3\], got 0"),
        (torch.ones(2, 3), 1.0, TypeError, "softmax_topk: k must be an int"),
    ],
)
def test_arguments(x: object, k: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        fr.softmax_topk(x, k)


def test_raw_op_checks_its_own_arguments(backend: str) -> None:
    ops = torch.ops.fastmoe_route
    x = torch.ones(3, 3, device=backend)
    with pytest.raises(RuntimeError, match=r"softmax_topk: k must be in \[1, 3\], got 4"):
        ops.softmax_topk_forward(x, 4)


@pytest.mark.cpu_only
def test_raw_gradient_checks_the_columns(backend: str) -> None:
    ops = torch.ops.fastmoe_route
    x = torch.ones(3, 3, device=backend)
    values, statistics, indices = ops.softmax_topk(x, 2)
    with pytest.raises(RuntimeError, match="indices must be in"):
        ops.softmax_topk_backward(values, x, statistics, indices + 2)
