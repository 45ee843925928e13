"""softmax: three methods, one result, the bits of a row its own."""

from __future__ import annotations

from collections.abc import Callable

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import reference
from levels import LEVELS, run_python
from tolerance import assert_bound, assert_exact, assert_has_power, assert_literal, softmax_limit
from torch import Tensor

METHODS = ("auto", "three_pass", "online", "two_pass")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One to a few vectors, the register path's end, blocks of 4096, tiles of 16384, the kept row's end.
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 64, 65, 128, 129, 255, 256, 257, 4095, 4097, 16385, 40000)
INF, NAN = torch.inf, torch.nan


def logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 4).to(dtype)


def expected(x: Tensor) -> Tensor:
    return reference.softmax(x, dtype=torch.float64)


def check(y: Tensor, x: Tensor) -> None:
    assert y.dtype == x.dtype
    assert_bound(y, expected(x), softmax_limit(x, expected(x)))


# ---- literals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_literals(backend: str, method: str) -> None:
    x = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, -INF]], device=backend).log()
    x[1] = torch.tensor([3.0, 3.0, -INF])
    assert_literal(fr.softmax(x, method=method), [[0.125, 0.25, 0.625], [0.5, 0.5, 0.0]])


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_within_the_bound(backend: str, method: str, dtype: torch.dtype) -> None:
    for size in (*SIZES, 131073, 131080):
        x = logits(3, size, dtype=dtype, seed=size)
        x[1, size // 2] = -INF if size > 1 else 0.0
        y = fr.softmax(x.to(backend), method=method)
        check(y, x)
        if size > 1:
            assert y[1, size // 2] == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_the_check_has_power(backend: str, method: str) -> None:
    x = logits(4, 33)
    assert_has_power(lambda y: check(y, x), fr.softmax(x.to(backend), method=method))


@pytest.mark.parametrize("method", METHODS)
def test_exp_over_its_range(backend: str, method: str) -> None:
    """Beside a 0 the result is e^x times one number, down to the subnormals and to exact zeros."""
    x = torch.cat([torch.zeros(1), torch.linspace(-110.0, -70.0, 20001)])[None]
    check(fr.softmax(x.to(backend), method=method), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_every_range(backend: str, method: str, dtype: torch.dtype) -> None:
    """Rows whose exponentials may be subnormal are computed apart; -inf is far from all numbers."""
    for size in (5, 16, 37, 256, 300, 4099):
        spread = torch.tensor([1.0, 60.0, 63.9, 64.1, 80.0, 88.0, 100.0, 120.0, 400.0, 3000.0])
        generator = torch.Generator().manual_seed(size)
        x = torch.rand(10, size, generator=generator) * spread[:, None] - 7.0
        x[:, -1], x[:, -2] = -7.0, spread - 7.0
        for rows in (x, x.masked_fill(torch.rand(10, size, generator=generator) < 0.3, -INF)):
            rows = rows.to(dtype)
            y = fr.softmax(rows.to(backend), method=method).cpu()
            check(y, rows)
            assert (y[rows == -INF] == 0).all()
            alone = [fr.softmax(row[None].to(backend), method=method).cpu() for row in rows]
            assert_exact(torch.cat(alone), y)


@pytest.mark.parametrize("method", METHODS)
def test_a_long_row_of_equal_values_loses_nothing(backend: str, method: str) -> None:
    size = 3_000_001
    y = fr.softmax(torch.full((1, size), 0.3, device=backend), method=method)
    assert_bound(y, torch.full((1, size), 1.0 / size, dtype=torch.float64), 1e-6 / size)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradcheck(backend: str, dim: int) -> None:
    x = logits(3, 5, 4, dtype=torch.float64).to(backend).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fr.softmax(x, dim), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 17, 257, 5000, 5001, 40000])
def test_gradient_against_float64(backend: str, size: int, dtype: torch.dtype) -> None:
    x = logits(3, size, dtype=dtype).to(backend)
    x[0, 0] = -INF if size > 1 else 0.0
    x.requires_grad_()
    g = logits(3, size, dtype=dtype, seed=1).to(backend)
    y = fr.softmax(x)
    (got,) = torch.autograd.grad(y, x, g)
    wide_y, wide_g = y.detach().double(), g.double()
    mean = (wide_g * wide_y).sum(-1, keepdim=True) / wide_y.sum(-1, keepdim=True)
    wanted = wide_y * (wide_g - mean)
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    scale = wide_y * (wide_g.abs() + (size + 4) * (wide_g * wide_y).abs().sum(-1, keepdim=True))
    info = torch.finfo(dtype)
    assert_bound(got, wanted, 4 * u * scale + info.eps * wanted.abs() + info.smallest_normal)
    assert got[0, 0] == 0.0


def test_no_gradient_where_none_is_wanted(backend: str) -> None:
    assert not fr.softmax(logits(2, 3).to(backend)).requires_grad
    with torch.no_grad():
        assert not fr.softmax(logits(2, 3).to(backend).requires_grad_()).requires_grad


# ---- registration ------------------------------------------------------------------------------


def test_opcheck(backend: str) -> None:
    ops = torch.ops.fastmoe_route
    for dtype in (torch.float32, torch.float64):
        x = logits(4, 9, dtype=dtype).to(backend)
        torch.library.opcheck(ops.softmax, (x.clone().requires_grad_(), 0))
        torch.library.opcheck(ops.softmax_forward, (x, 2))
        torch.library.opcheck(ops.softmax_plain_forward, (x,))
        torch.library.opcheck(ops.softmax_out, (x, torch.empty_like(x), 1))
        torch.library.opcheck(ops.softmax_plain_out, (x[None], torch.empty_like(x[None])))
        torch.library.opcheck(ops.softmax_backward, (x, x.clone()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(
        lambda x: fr.softmax(x * 2, 1), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    x = logits(3, 6, 5).to(backend).requires_grad_()
    y = compiled(x)
    assert_exact(y, fr.softmax(x * 2, 1))
    y.square().sum().backward()
    assert x.grad is not None


def test_export(backend: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fr.softmax(x)

    x = logits(3, 6).to(backend)
    assert_exact(torch.export.export(Module(), (x,)).module()(x), fr.softmax(x))


# ---- edges -------------------------------------------------------------------------------------

SPECIAL_ROWS = (
    [0.0, NAN, 1.0],
    [0.0, INF, 1.0],
    [INF, INF, INF],
    [-INF, -INF, -INF],
    [-INF, NAN, -INF],
    [INF, NAN, -INF],
    [1e30, -1e30, 0.0],
    [1e30, 1e30, 5e29],
    [5000.0, 4999.0, -3e38],
    [-6000.0, -6001.0, -6000.0],
    [-3.4e38, -3.4e38, -INF],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_special_values_as_torch(backend: str, method: str, dtype: torch.dtype) -> None:
    for row in SPECIAL_ROWS:
        for repeats in (1, 6, 200, 7000):
            x = torch.tensor(row).to(dtype).repeat(repeats)[None]
            y = fr.softmax(x.to(backend), method=method)
            plain = torch.softmax(x, -1)
            assert torch.equal(y.isnan().cpu(), plain.isnan()), (row, repeats)
            assert torch.equal((y == 0).cpu(), plain == 0), (row, repeats)
            wanted = torch.softmax(x.double(), -1)
            assert_bound(y, wanted, softmax_limit(x, wanted.nan_to_num()))


@pytest.mark.parametrize("method", METHODS)
def test_one_special_value_in_a_long_row(backend: str, method: str) -> None:
    for value in (NAN, INF):
        for at in (0, 20000, 49999):
            x = torch.full((2, 50000), -INF, device=backend)
            x[:, ::3] = 1.0
            x[0, at] = value
            y = fr.softmax(x, method=method)
            assert y[0].isnan().all()
            assert_exact(y[1], fr.softmax(x[1:], method=method)[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_only_number_of_a_row_has_all_the_probability(backend: str, method: str) -> None:
    """Published two-pass kernels give NaN on -inf, online ones where two empty pieces merge."""
    for size in (1, 2, 15, 16, 17, 64, 65, 200, 4099, 40000):
        places = sorted({0, size // 3, size // 2, size - 1})
        for value in (0.0, -3e38, 88.0):
            x = torch.full((len(places), size), -INF)
            x[range(len(places)), places] = value
            wanted = torch.zeros_like(x)
            wanted[range(len(places)), places] = 1.0
            assert_exact(fr.softmax(x.to(backend), method=method).cpu(), wanted)


def test_empty_and_scalar(backend: str) -> None:
    for shape in ((0, 5), (5, 0), (0,), (2, 0, 3)):
        assert fr.softmax(torch.empty(shape, device=backend), 0).shape == shape
    assert fr.softmax(torch.tensor(3.0, device=backend)).item() == 1.0
    assert fr.softmax(torch.tensor(NAN, device=backend)).isnan()
    x = torch.empty(0, 5, device=backend, requires_grad=True)
    fr.softmax(x).sum().backward()
    assert x.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_threads_and_batch_do_not_show(
    backend: str, threads, method: str, dtype: torch.dtype
) -> None:
    for shape in ((300, 200), (3, 40000), (1, 200001), (5, 33000)):
        x = logits(*shape, dtype=dtype).to(backend)
        grads = []
        results = []
        for count in (1, 2, 4):
            threads(count)
            results.append(fr.softmax(x, method=method))
            grads.append(torch.ops.fastmoe_route.softmax_backward(x, results[0]))
        threads(2)
        alone = torch.cat([fr.softmax(x[i : i + 1], method=method) for i in range(shape[0])])
        for other in (*results[1:], alone):
            assert_exact(other, results[0])
        for other in grads[1:]:
            assert_exact(other, grads[0])


@pytest.mark.parametrize("columns", [64, 100, 300])
def test_gradient_of_rows_that_one_column_dominates(backend: str, columns: int) -> None:
    """Where y is close to 1 its g - sum(g * y) is less than the rounding of sum(y) brings."""
    x = (1.5 * logits(500, columns)).to(torch.bfloat16)
    g = logits(500, columns, dtype=torch.bfloat16, seed=1)
    wide = x.double().requires_grad_()
    expected = torch.autograd.grad(wide.softmax(-1), wide, g.double())[0]

    def error(softmax: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.to(backend).requires_grad_()
        (grad,) = torch.autograd.grad(softmax(leaf), leaf, g.to(backend))
        difference = grad.cpu().double() - expected
        return (difference.norm(dim=1) / expected.norm(dim=1)).mean()

    assert error(fr.softmax) < 3e-3
    assert error(lambda t: t.softmax(-1)) > 2e-2  # or the rows test nothing


def test_streamed_output_has_the_same_bits(backend: str) -> None:
    """Outputs beyond 32 MB are written past the caches."""
    for method, columns in (("three_pass", 30001), ("online", 140001), ("two_pass", 140001)):
        x = logits(1, columns).expand((1 << 23) // columns + 2, columns).to(backend)
        y = fr.softmax(x, method=method)
        one = fr.softmax(x[:1].clone(), method=method)
        assert torch.equal(y, one.expand_as(y))


@pytest.mark.parametrize("level", LEVELS[:3])
def test_every_instruction_set(level: str) -> None:
    """A short subset."""
    chosen = "test_within or test_exp_over or test_special or test_literals or test_rows_of"
    run_python(level, "-m", "pytest", "-q", "-x", __file__, "-k", chosen)


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend: str, guarded, method: str, dtype: torch.dtype) -> None:
    for size in (5, 16, 61, 300, 5000):
        x = logits(6, size, dtype=dtype).to(backend)
        wanted = fr.softmax(x, method=method)
        wide = torch.full((6, size + 3), NAN, dtype=dtype, device=backend)
        wide[:, 1 : size + 1] = x
        columns = x.T.contiguous().T
        for view in (guarded(x), wide[:, 1 : size + 1], columns):
            assert_exact(fr.softmax(view, method=method), wanted)
        assert_exact(fr.softmax(x[:1].expand(4, size), method=method), wanted[:1].repeat(4, 1))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_every_dim(backend: str, dim: int) -> None:
    x = logits(4, 5, 6)
    y = fr.softmax(x.to(backend), dim)
    assert y.shape == x.shape
    wanted = torch.softmax(x.double(), dim)
    limit = softmax_limit(x.movedim(dim, -1), wanted.movedim(dim, -1)).movedim(-1, dim)
    assert_bound(y, wanted, limit)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 300), (2, 40000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_is_written_and_nothing_around_it(
    backend: str, shape: tuple, dtype: torch.dtype
) -> None:
    x = logits(*shape, dtype=dtype).to(backend)
    for dim in (0, -1):
        store = torch.full((x.numel() + 201,), 7.0, dtype=dtype, device=backend)
        out = store[101 : 101 + x.numel()].view(shape)
        assert fr.softmax(x, dim, out=out) is out
        assert_exact(out, fr.softmax(x, dim).contiguous())
        assert (store[:101] == 7).all()
        assert (store[101 + x.numel() :] == 7).all()


@pytest.mark.parametrize("method", METHODS)
def test_out_is_x_itself_or_apart_from_it(backend: str, method: str) -> None:
    store = logits(1, 90).to(backend)[0]
    x = store[20:60].view(2, 20)
    wanted = fr.softmax(x, method=method)
    for start in (0, 19, 21, 40, 49):
        with pytest.raises(RuntimeError, match="softmax: out must be x itself or share no memory"):
            fr.softmax(x, method=method, out=store[start : start + 40].view(2, 20))
    assert_exact(store[20:60].view(2, 20), x)  # nothing was written
    for out in (store[:20], store[60:80]):  # next to it
        beside = fr.softmax(x[:, :10], method=method, out=out.view(2, 10))
        assert_exact(beside, fr.softmax(x[:, :10].clone(), method=method))
    assert_exact(fr.softmax(x, method=method, out=x), wanted)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, "softmax: x must be a torch.Tensor"),
        ({"x": torch.ones(3, dtype=torch.int32)}, TypeError, "softmax: x must be float32"),
        ({"dim": 2}, ValueError, r"softmax: dim must be in \[-2, 1\], got 2"),
        ({"dim": 1.0}, TypeError, "softmax: dim must be an int"),
        ({"method": "fast"}, ValueError, "softmax: method must be one of auto, three_pass"),
        ({"out": torch.ones(3)}, ValueError, r"softmax: out must have shape \[2, 3\]"),
        ({"out": torch.ones(3, 2).T}, ValueError, "softmax: out must be contiguous"),
        ({"out": torch.ones(2, 3).double()}, TypeError, "softmax: out must be float32"),
        ({"out": torch.ones(2, 3, device="meta")}, ValueError, "out must be on cpu, got meta"),
        ({"x": torch.ones(2, 3, device="meta"), "out": torch.ones(2, 3)}, ValueError, "be on meta"),
        ({"out": torch.ones(2, 3, requires_grad=True)}, RuntimeError, "softmax: out must not be"),
    ],
)
def test_arguments(options: dict, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        fr.softmax(**{"x": torch.ones(2, 3), **options})


def test_raw_op_checks_its_own_arguments(backend: str) -> None:
    ops = torch.ops.fastmoe_route
    with pytest.raises(RuntimeError, match="softmax: x must have 2 dimensions"):
        ops.softmax_forward(torch.ones(3, device=backend), 0)
    with pytest.raises(RuntimeError, match=r"softmax: method must be in \[0, 3\], got 4"):
        ops.softmax_forward(torch.ones(3, 3, device=backend), 4)
    x = torch.ones(2, 3, device=backend)
    with pytest.raises(RuntimeError, match="softmax: out must have 2 dimensions"):
        ops.softmax_plain_out(x, torch.ones(6, device=backend))
    with pytest.raises(RuntimeError, match="softmax: out must have size 2 in dimension 0"):
        ops.softmax_plain_out(x, torch.ones(3, 2, device=backend))
    with pytest.raises(RuntimeError, match="softmax_backward: grad_y must have size 3"):
        ops.softmax_backward(torch.ones(3, 2, device=backend), torch.ones(3, 3, device=backend))


def test_rows_of_a_narrow_view_are_read_in_place_into_out():
    whole = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3))
    x, out = whole[..., :20], torch.empty(2, 3, 20)
    assert_exact(fr.softmax(x, out=out), fr.softmax(x.contiguous()))
    apart = whole.transpose(0, 1)[..., :20]  # rows at more than one distance
    assert_exact(fr.softmax(apart, out=torch.empty(3, 2, 20)), fr.softmax(apart.contiguous()))


def test_out_is_checked_without_data_too():
    x = torch.empty(2, 3, 4, device="meta")
    assert fr.softmax(x, out=torch.empty_like(x)).shape == x.shape
    for out, kind in (
        (torch.empty(5, device="meta"), ValueError),
        (torch.empty(2, 3, 4, device="meta", dtype=torch.float64), TypeError),
        (torch.empty(2, 4, 3, device="meta").transpose(1, 2), ValueError),
    ):
        with pytest.raises(kind, match=r"^softmax: out must"):
            fr.softmax(x, out=out)
    with pytest.raises(TypeError, match=r"^softmax: x must"):
        fr.softmax(x.int(), out=x.int())
