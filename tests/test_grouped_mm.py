"""grouped_mm. Tolerance classes: bound and ratio (values), exact (invariance, zeros, threads)."""

from __future__ import annotations

import fastmoe_route as fr
import products
import pytest
import torch
import vm_backend
from cases import normal
from fastmoe_route import reference
from levels import LEVELS, run_python
from tolerance import (
    assert_bound,
    assert_exact,
    assert_has_power,
    assert_literal,
    assert_ratio,
    rounding,
    unit_roundoff,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("row_major", "column_major")
# (rows of each expert, rows past the last, A, B): one of everything, around vectors, tiles, blocks
SHAPES = (
    ((1,), 0, 1, 1),
    ((0, 3, 0), 2, 7, 3),
    ((4, 5), 0, 1, 9),
    ((7, 6, 1, 13), 1, 33, 65),
    ((12, 0, 100), 5, 64, 127),
    ((2, 300), 0, 129, 201),
    ((5, 19), 3, 1030, 66),
    ((1, 2, 3, 4), 0, 2049, 130),
)


def offsets_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(counts[:e]) for e in range(len(counts) + 1)], dtype=torch.int32)


def weights(num_experts: int, a: int, b: int, dtype: torch.dtype, layout: str) -> Tensor:
    scale = max(a, 1) ** -0.5
    if layout == "row_major":
        return (normal(num_experts, a, b, seed=1) * scale).to(dtype)
    return (normal(num_experts, b, a, seed=1) * scale).to(dtype).transpose(1, 2)


def product_limit(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """A products and A sums (the bias one more), each good to u, and the rounding of the result.

    A level without fused bfloat16 products of full range flushes subnormals: under 2^-126 a term.
    """
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    magnitude = reference.grouped_mm(
        x.abs(), w.abs(), offsets, bias=None if bias is None else bias.abs(), dtype=torch.float64
    )
    expected = reference.grouped_mm(x, w, offsets, bias=bias, dtype=torch.float64)
    terms = x.shape[1] + 2
    return terms * (unit_roundoff(arithmetic) * magnitude + 2.0**-126) + rounding(expected, x.dtype)


def check_product(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    y = fr.grouped_mm(x, w, offsets, bias=bias)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    expected = reference.grouped_mm(x, w, offsets, bias=bias, dtype=torch.float64)
    assert_bound(y, expected, product_limit(x, w, offsets, bias))
    assert not y[int(offsets[-1]) :].any()
    return y


# ---- literals ----------------------------------------------------------------------------------


def test_literals():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    w = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [9.0, 9.0]], [[1.0, 2.0], [3.0, 4.0]]])
    offsets = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    y = fr.grouped_mm(x, w, offsets)
    assert_literal(y, [[1.0, 2.0], [15.0, 22.0], [23.0, 34.0], [0.0, 0.0]])
    bias = torch.tensor([[0.5, 0.0], [100.0, 100.0], [0.0, -1.0]])
    y = fr.grouped_mm(x, w.transpose(1, 2), offsets, bias=bias)
    assert_literal(y, [[1.5, 2.0], [11.0, 24.0], [17.0, 38.0], [0.0, 0.0]])


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(backend, dtype, layout):
    for counts, padding, a, b in SHAPES:
        x = normal(sum(counts) + padding, a, dtype=dtype)
        w = weights(len(counts), a, b, dtype, layout)
        bias = normal(len(counts), b, dtype=dtype, seed=2)
        for given in (None, bias):
            check_product(x, w, offsets_of(counts), given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_errs_no_more_than_plain_torch(dtype, layout):
    counts, a, b = (40, 0, 3, 70), 1500, 192
    x, offsets = normal(sum(counts), a, dtype=dtype), offsets_of(counts)
    w = weights(len(counts), a, b, dtype, layout)
    plain = torch.cat([products.matmul(part, w[e]) for e, part in enumerate(x.split(list(counts)))])
    expected = reference.grouped_mm(x, w, offsets, dtype=torch.float64)
    y = fr.grouped_mm(x, w, offsets)
    assert_has_power(lambda t: assert_ratio(t, plain, expected), y)
    assert_has_power(lambda t: assert_bound(t, expected, product_limit(x, w, offsets, None)), y)


# ---- invariance --------------------------------------------------------------------------------


def check_bits(total: int, batches: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Parts of `total` rows, from their start and elsewhere, give the rows of the whole."""
    a, b = (300, 70) if dtype == torch.float64 else (1100, 133)
    x, w = normal(total, a, dtype=dtype), weights(2, a, b, dtype, layout)
    whole = fr.grouped_mm(x, w, torch.tensor([0, 0, total], dtype=torch.int32))
    for m in batches:
        for start in (0, (97 * m) % (total - m)):
            part = x[start : start + m]
            alone = fr.grouped_mm(part, w, torch.tensor([0, 0, m], dtype=torch.int32))
            assert_exact(alone, whole[start : start + m])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype, layout):
    check_bits(512, (1, 2, 3, 4, 5, 6, 7, 12, 17, 33, 130), dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_threads_change_no_bit(threads, dtype, layout):
    for counts, a, b in (((1, 0, 1), 500, 1000), ((700, 3, 0, 20), 200, 257)):
        x, w = normal(sum(counts), a, dtype=dtype), weights(len(counts), a, b, dtype, layout)
        results = []
        for n in (1, 2, 4):
            threads(n)
            results.append(fr.grouped_mm(x, w, offsets_of(counts)))
        for other in results[1:]:
            assert_exact(other, results[0])


LEVEL_PROGRAM = """
import torch
import test_grouped_mm as t
for dtype in t.DTYPES[:3]:
    for layout in t.LAYOUTS:
        t.check_bits(34, (1, 2, 3, 5, 7, 17), dtype, layout)
        for counts, a, b in (((7, 6, 1, 13), 33, 65), ((5, 19), 1030, 66)):
            x = t.normal(sum(counts), a, dtype=dtype)
            w = t.weights(len(counts), a, b, dtype, layout)
            t.check_product(x, w, t.offsets_of(counts), None)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    run_python(level, "-c", LEVEL_PROGRAM)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    x = normal(6, 4, dtype=torch.float64).requires_grad_()
    w = weights(3, 4, 5, torch.float64, layout).detach().requires_grad_()
    bias = normal(3, 5, dtype=torch.float64, seed=2).requires_grad_()

    def product(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return fr.grouped_mm(x, w, offsets, bias=bias)

    assert torch.autograd.gradcheck(product, (x, w, bias))
    assert torch.autograd.gradgradcheck(product, (x, w, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_agree_with_the_reference(dtype, layout):
    counts, padding, a, b = (0, 9, 40, 0), 3, 70, 35
    offsets = offsets_of(counts)
    x = normal(sum(counts) + padding, a, dtype=dtype)
    w = weights(len(counts), a, b, dtype, layout)
    bias = normal(len(counts), b, dtype=dtype, seed=2)
    grad_y = normal(x.shape[0], b, dtype=dtype, seed=3)
    grad_y[int(offsets[-1]) :] = torch.nan  # belongs to no expert
    given = [t.detach().requires_grad_() for t in (x, w, bias)]
    fr.grouped_mm(given[0], given[1], offsets, bias=given[2]).backward(grad_y)
    wide = [t.detach().double().requires_grad_() for t in (x, w, bias)]
    expected = reference.grouped_mm(wide[0], wide[1], offsets, bias=wide[2])
    expected.backward(grad_y.double().nan_to_num(0.0))
    unit = unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
    for got, wanted in zip(given, wide, strict=True):
        assert got.grad.dtype == dtype
        # At most 70 products of numbers below 5.
        assert_bound(got.grad, wanted.grad, 72 * unit * 72 * 25 + rounding(wanted.grad, dtype))
    assert given[1].grad.stride() == w.stride()
    assert not given[0].grad[int(offsets[-1]) :].any()
    for empty in (0, 3):
        assert not given[1].grad[empty].any()
        assert not given[2].grad[empty].any()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_only_where_asked(wanted):
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    tensors = [normal(3, 4), normal(2, 4, 5, seed=1), normal(2, 5, seed=2)]
    for i in wanted:
        tensors[i].requires_grad_()
    fr.grouped_mm(tensors[0], tensors[1], offsets, bias=tensors[2]).sum().backward()
    for i, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (i in wanted)
        assert tensor.grad is None or tensor.grad.shape == tensor.shape


@pytest.mark.cpu_only
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_many_rows_keep_their_accuracy(backend: str, transposed: bool) -> None:
    """Of one sign, where one running sum has eight times the error of torch's product."""
    x, grad_y = normal(4096, 24).abs(), normal(4096, 64, seed=1).abs()
    offsets = torch.tensor([0, 4096], dtype=torch.int32)
    op = torch.ops.fastmoe_route.grouped_mm_wgrad
    grad, grad_bias = op(x, grad_y, offsets, transposed, True, True)
    got = grad[0].t() if transposed else grad[0]
    assert_ratio(got, x.t() @ grad_y, x.double().t() @ grad_y.double())
    assert_ratio(grad_bias[0], grad_y.sum(0), grad_y.double().sum(0))


# ---- registration ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    ops = torch.ops.fastmoe_route
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    x, w = normal(6, 4).requires_grad_(), weights(3, 4, 5, torch.float32, layout).requires_grad_()
    bias = normal(3, 5).requires_grad_()
    torch.library.opcheck(ops.grouped_mm, (x, w, offsets, bias))
    detached = (x.detach(), w.detach(), offsets, None)
    torch.library.opcheck(ops.grouped_mm_forward, detached)
    grad_y = normal(6, 5)
    for flags in ((False, True, True), (True, True, False), (False, False, True)):
        torch.library.opcheck(ops.grouped_mm_wgrad, (x.detach(), grad_y, offsets, *flags))


def test_fullgraph_compile_and_export():
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    w = weights(3, 4, 5, torch.float32, "column_major")

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fr.grouped_mm(x, w, offsets) * 2.0

    layer, x = Layer(), normal(6, 4)
    assert_exact(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert_exact(torch.export.export(layer, (x,)).module()(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == torch.bfloat16
        assert_exact(y, layer(x))


def test_autocast_casts_all_but_float64():
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    x, w, bias = normal(3, 4), normal(2, 4, 5, seed=1), normal(2, 5, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fr.grouped_mm(x.half(), w, offsets, bias=bias)
        wide = fr.grouped_mm(x.double(), w.double(), offsets)
    assert wide.dtype == torch.float64
    low = (t.bfloat16() for t in (x.half(), w))
    assert_exact(y, fr.grouped_mm(*low, offsets, bias=bias.bfloat16()))


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_sizes(dtype):
    def product(rows: int, num_experts: int, a: int, b: int, counts: tuple[int, ...]) -> Tensor:
        x, w = normal(rows, a, dtype=dtype), normal(num_experts, a, b, dtype=dtype)
        bias = normal(num_experts, b, dtype=dtype, seed=2)
        return fr.grouped_mm(x, w, offsets_of(counts), bias=bias), bias

    assert product(0, 2, 3, 4, (0, 0))[0].shape == (0, 4)
    assert product(3, 2, 3, 0, (1, 2))[0].shape == (3, 0)
    y, bias = product(4, 2, 0, 5, (1, 2))  # an empty sum is 0
    assert_exact(y, torch.cat([bias[:1], bias[1:], bias[1:], torch.zeros_like(bias[:1])]))
    assert_exact(product(3, 2, 3, 4, (0, 0))[0], torch.zeros(3, 4, dtype=dtype))
    assert_exact(product(3, 0, 3, 4, ())[0], torch.zeros(3, 4, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row_and_expert(dtype, layout):
    counts, a, b = (3, 9, 2), 37, 70
    offsets, x = offsets_of(counts), normal(15, a, dtype=dtype)
    w = weights(3, a, b, dtype, layout)
    clean = fr.grouped_mm(x, w, offsets)
    x[4], x[14], w[2, 5] = torch.nan, torch.inf, torch.inf
    spoiled = fr.grouped_mm(x, w, offsets)
    assert spoiled[4].isnan().all()
    assert not spoiled[12:14].isfinite().any()
    kept = [r for r in range(15) if r not in (4, 12, 13)]
    assert_exact(spoiled[kept], clean[kept])


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_the_arguments_is_left_alone(guarded, dtype):
    counts = (1, 0, 5, 14)
    for a, b in ((1, 1), (31, 33), (65, 129)):
        for layout in LAYOUTS:
            x = guarded(normal(21, a, dtype=dtype))
            w = weights(4, a, b, dtype, layout)
            w = guarded(w) if layout == "row_major" else guarded(w.mT.contiguous()).mT
            bias, offsets = guarded(normal(4, b, dtype=dtype, seed=2)), guarded(offsets_of(counts))
            check_product(x, w, offsets, bias)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_views(dtype):
    offsets = offsets_of((3, 10))
    x = normal(13, 40, dtype=dtype)
    w = weights(2, 40, 50, dtype, "row_major")
    expected = fr.grouped_mm(x, w, offsets)
    rows = torch.full((13, 99), torch.nan, dtype=dtype)
    rows[:, 7:47] = x
    assert_exact(fr.grouped_mm(rows[:, 7:47], w, offsets), expected)
    assert_exact(fr.grouped_mm(x.T.contiguous().T, w, offsets), expected)
    wide = torch.full((2, 41, 77), torch.nan, dtype=dtype)
    wide[:, 1:, 3:53] = w
    assert_exact(fr.grouped_mm(x, wide[:, 1:, 3:53], offsets), expected)
    spread = torch.full((2, 40, 50, 2), torch.nan, dtype=dtype)
    spread[..., 0] = w
    assert_exact(fr.grouped_mm(x, spread[..., 0], offsets), expected)
    shared = w[:1].expand(2, 40, 50)
    assert_exact(fr.grouped_mm(x, shared, offsets), fr.grouped_mm(x, shared.contiguous(), offsets))
    bias = normal(50, 2, dtype=dtype).T
    assert_exact(
        fr.grouped_mm(x, w, offsets, bias=bias),
        fr.grouped_mm(x, w, offsets, bias=bias.contiguous()),
    )


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor"),
        ({"x": torch.zeros(3)}, ValueError, "x must have 2 dimensions"),
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "x must be float32 or bfloat16"),
        ({"x": torch.zeros(3, 5)}, ValueError, r"x must have shape \[any, 4\], got float32 tensor"),
        ({"w": torch.zeros(4, 5)}, ValueError, "w must have 3 dimensions"),
        ({"w": torch.zeros(2, 4, 5).double()}, TypeError, "w must have the dtype of x, float32"),
        ({"bias": torch.zeros(5)}, ValueError, "bias must have 2 dimensions"),
        ({"bias": torch.zeros(2, 4)}, ValueError, r"bias must have shape \[2, 5\]"),
        ({"bias": torch.zeros(2, 5).half()}, TypeError, "bias must have the dtype of x"),
        ({"offsets": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, r"have shape \[3\]"),
        ({"offsets": torch.tensor([0, 1, 3])}, TypeError, "offsets must be int32"),
        pytest.param(
            {"offsets": [1, 2, 3]},
            RuntimeError,
            "offsets must start at 0, got 1",
            marks=pytest.mark.cpu_only,
        ),
        pytest.param(
            {"offsets": [0, 3, 2]},
            RuntimeError,
            "offsets must never fall, got 3 then 2 at expert 1",
            marks=pytest.mark.cpu_only,
        ),
        pytest.param(
            {"offsets": [0, -1, 2]},
            RuntimeError,
            "offsets must never fall, got 0 then -1",
            marks=pytest.mark.cpu_only,
        ),
        pytest.param(
            {"offsets": [0, 1, 4]},
            RuntimeError,
            "offsets must end at most at 3, got 4",
            marks=pytest.mark.cpu_only,
        ),
    ],
)
def test_errors(change, kind, message):
    arguments = {
        "x": torch.zeros(3, 4),
        "w": torch.zeros(2, 4, 5),
        "offsets": [0, 1, 3],
        "bias": None,
        **change,
    }
    if isinstance(arguments["offsets"], list):
        arguments["offsets"] = torch.tensor(arguments["offsets"], dtype=torch.int32)
    with pytest.raises(kind, match="grouped_mm: .*" + message):
        fr.grouped_mm(arguments["x"], arguments["w"], arguments["offsets"], bias=arguments["bias"])


@pytest.mark.cpu_only
@pytest.mark.parametrize("change", ["x", "w", "offsets"])
def test_meta_tensors_have_to_fit(change: str) -> None:
    sizes = {"x": (3, 4), "w": (2, 4, 5), "offsets": (3,)}
    x, w, offsets = (torch.zeros(size, device="meta") for size in sizes.values())
    assert fr.grouped_mm(x, w, offsets.int()).shape == (3, 5)
    sizes[change] = tuple(size + 1 for size in sizes[change])
    x, w, offsets = (torch.zeros(size, device="meta") for size in sizes.values())
    with pytest.raises(ValueError, match="grouped_mm: "):
        fr.grouped_mm(x, w, offsets.int())


def test_the_bare_operators_check_too():
    ops = torch.ops.fastmoe_route
    x, w, offsets = torch.zeros(3, 4), torch.zeros(2, 4, 5), torch.tensor([0, 1, 3]).int()
    with pytest.raises(RuntimeError, match="grouped_mm: x must have size 4 in dimension 1"):
        ops.grouped_mm_forward(x[:, :3], w, offsets, None)
    with pytest.raises(RuntimeError, match="grouped_mm: w must have the dtype of x"):
        ops.grouped_mm_forward(x, w.half(), offsets, None)
    with pytest.raises(RuntimeError, match="grouped_mm_wgrad: grad_y must have size 3"):
        ops.grouped_mm_wgrad(x, torch.zeros(2, 5), offsets, False, True, True)


@pytest.mark.cpu_only
def test_the_bare_gradient_checks_offsets():
    ops = torch.ops.fastmoe_route
    x, offsets = torch.zeros(3, 4), torch.tensor([0, 1, 3]).int()
    with pytest.raises(RuntimeError, match="grouped_mm_wgrad: offsets must end at most at 3"):
        ops.grouped_mm_wgrad(x, torch.zeros(3, 5), offsets + offsets, False, True, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tf32_where_torch_allows_it(backend: str, allow_tf32, layout: str) -> None:
    """Values and both gradients of multiples of 16 bytes; products of 11-bit numbers are exact."""
    cuda = vm_backend.runs_cuda()
    offsets = offsets_of((3, 0, 150))
    x = products.off_halves(normal(160, 40)).requires_grad_()
    w = products.off_halves(weights(3, 40, 136, torch.float32, layout)).requires_grad_()
    grad = products.off_halves(normal(160, 136, seed=2))
    allow_tf32()
    y = fr.grouped_mm(x, w, offsets)
    got = [y, *torch.autograd.grad(y, (x, w), grad)]
    inputs = [products.tf32(t.detach()) if cuda else t.detach() for t in (x, w, grad)]
    x64, w64, grad64 = (t.double().requires_grad_() for t in inputs)
    wanted = reference.grouped_mm(x64, w64, offsets, dtype=torch.float64)
    exact = [wanted, *torch.autograd.grad(wanted, (x64, w64), grad64)]
    for value, close in zip(got, exact, strict=True):
        error = (value.double() - close).abs().max().item()
        assert error <= 2e-5 * close.abs().max().item()
