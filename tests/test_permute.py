"""permute and unpermute. Tolerance classes: exact (permute), bound (unpermute)."""

from __future__ import annotations

import math

import fastmoe_route as fr
import pytest
import torch
import vm_backend
from cases import describe, normal, plan_cases
from fastmoe_route import DispatchPlan, reference
from tolerance import assert_bound, assert_exact, assert_has_power, combine_limit, rounding
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STREAM_BYTES = 2**25  # calls that move more are sure to write past the caches
WIDTHS = (1, 7, 8, 16, 31, 33, 63, 64, 65, 127, 128, 130)


def make_plan(
    num_tokens: int, top_k: int, num_experts: int, *, seed: int = 0, **options: object
) -> DispatchPlan:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator)
    return fr.plan_dispatch(experts, num_experts, **options)


def assert_unpermute(rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> None:
    expected = reference.unpermute(rows, plan, weights, dtype=torch.float64)
    limit = combine_limit(rows, plan, weights, expected)
    actual = fr.unpermute(rows, plan, weights)
    assert actual.dtype == rows.dtype
    assert actual.is_contiguous()
    assert_bound(actual, expected, limit)


# ---- literals ----------------------------------------------------------------------------------


def test_two_tokens(backend: str) -> None:
    plan = fr.plan_dispatch(torch.tensor([[1, 0], [-1, 1]]), 2, align=2)
    # Rows: expert 0 holds slot 1 and padding, expert 1 slots 0 and 3; the rest is padding.
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = fr.permute(x, plan)
    assert rows.tolist() == [[1, 2], [0, 0], [1, 2], [3, 4], [0, 0], [0, 0]]
    weights = torch.tensor([[2.0, 10.0], [math.nan, 0.5]])
    assert fr.unpermute(rows, plan).tolist() == [[2, 4], [3, 4]]
    assert fr.unpermute(rows, plan, weights).tolist() == [[12, 24], [1.5, 2]]


def test_dropped_token_gives_zero(backend: str) -> None:
    plan = fr.plan_dispatch(torch.zeros(3, 1, dtype=torch.int32), 1, capacity=1)
    rows = torch.full((1, 5), 7.0)
    assert fr.unpermute(rows, plan).tolist() == [[7.0] * 5, [0.0] * 5, [0.0] * 5]


def test_sum_is_taken_in_slot_order_in_float32(backend: str) -> None:
    plan = fr.plan_dispatch(torch.tensor([[2, 0, 1]]), 3)
    # Slot order 2^24, 1, -2^24 loses the 1; the order of the rows (1, -2^24, 2^24) would keep it.
    rows = torch.tensor([[1.0], [-(2.0**24)], [2.0**24]])
    assert fr.unpermute(rows, plan).item() == 0.0
    # A sum in bfloat16 would stay at 256.
    plan = fr.plan_dispatch(torch.tensor([[0, 1, 2]]), 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert fr.unpermute(rows, plan).item() == 258.0


# ---- reference ---------------------------------------------------------------------------------


def test_equals_reference(backend: str) -> None:
    for i, case in enumerate(plan_cases(2, 150)):
        plan = fr.plan_dispatch(**case)
        num_tokens, top_k = plan.slot_to_row.shape
        dtype, hidden = DTYPES[i % len(DTYPES)], WIDTHS[i % len(WIDTHS)]
        x = normal(num_tokens, hidden, dtype=dtype, seed=i)
        rows = normal(plan.row_to_slot.shape[0], hidden, dtype=dtype, seed=i)
        weights = normal(num_tokens, top_k, dtype=DTYPES[i // 2 % len(DTYPES)], seed=i)
        try:
            assert_exact(fr.permute(x, plan), reference.permute(x, plan))
            assert_unpermute(rows, plan, weights if i % 3 else None)
        except Exception as error:
            raise AssertionError(f"case {i}, {dtype}, H={hidden}: {describe(case)}") from error


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_are_streamed(backend: str, dtype: torch.dtype) -> None:
    """Results of many megabytes take other stores than small ones, and padding lies between."""
    num_tokens = STREAM_BYTES // (2 * 512 * dtype.itemsize) + 9
    plan = fr.plan_dispatch(torch.arange(num_tokens)[:, None] % 5, 5, align=64)
    x = normal(num_tokens, 512, dtype=dtype)
    rows = fr.permute(x, plan)
    assert_exact(rows, reference.permute(x, plan))
    assert_exact(fr.unpermute(rows, plan), x)
    weights = normal(num_tokens, 1).requires_grad_()
    leaf = rows.requires_grad_()
    y = fr.unpermute(leaf, plan, weights)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    assert_exact(y.detach(), (x.to(arithmetic) * weights.detach()).to(dtype))
    grad_rows, grad_weights = torch.autograd.grad(y, (leaf, weights), x)
    assert_exact(grad_rows, reference.permute(y.detach(), plan))
    squares = x.double().square().sum(1, keepdim=True)
    assert_bound(grad_weights, squares, squares * 512 * 2.0**-23)


@pytest.mark.cpu_only
@pytest.mark.parametrize("hidden", [512, 509])
def test_large_permute_by_token(backend: str, hidden: int) -> None:
    """More slots a token than are written side by side, rows of whole lines and others."""
    top_k = 11
    num_tokens = STREAM_BYTES // (4 * hidden * top_k) + 9
    plan = make_plan(num_tokens, top_k, 5, align=64)
    x = normal(num_tokens, hidden)
    assert_exact(fr.permute(x, plan), reference.permute(x, plan))


@pytest.mark.cpu_only
@pytest.mark.parametrize("num_tokens", [255, 256, 257, 1024])
def test_permute_around_the_size_that_is_streamed(backend: str, num_tokens: int) -> None:
    """Half a second-level cache, 512 KB here, stays in the caches; the next row up does not."""
    plan = make_plan(num_tokens, 4, 5)
    x = normal(num_tokens, 128)
    assert_exact(fr.permute(x, plan), reference.permute(x, plan))


@pytest.mark.cpu_only
def test_results_are_the_same_wherever_they_were_before(backend: str) -> None:
    """What lies in a second-level cache of 2 MB is overwritten there."""
    x = normal(192, 1024, seed=1)
    plan = make_plan(192, 2, 8)
    wanted = reference.permute(x, plan)
    for _ in range(4):
        rows = fr.permute(x, plan)
        assert_exact(rows, wanted)
        del rows  # the next call gets its memory


def test_the_checks_have_power(backend: str) -> None:
    plan = make_plan(20, 3, 4)
    x, rows, weights = normal(20, 9), normal(60, 9, seed=1), normal(20, 3, seed=2)
    wanted = reference.permute(x, plan)
    assert_has_power(lambda actual: assert_exact(actual, wanted), fr.permute(x, plan))
    expected = reference.unpermute(rows, plan, weights, dtype=torch.float64)
    limit = combine_limit(rows, plan, weights, expected)
    assert_has_power(
        lambda actual: assert_bound(actual, expected, limit), fr.unpermute(rows, plan, weights)
    )


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"align": 4}, {"capacity": 3}])
def test_gradcheck(backend: str, options: dict) -> None:
    plan = make_plan(7, 3, 4, **options)
    x = normal(7, 5, dtype=torch.float64).requires_grad_()
    rows = normal(plan.row_to_slot.shape[0], 5, dtype=torch.float64).requires_grad_()
    weights = normal(7, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fr.permute(x, plan), (x,))
    assert torch.autograd.gradgradcheck(lambda x: fr.permute(x, plan), (x,))
    assert torch.autograd.gradcheck(lambda rows: fr.unpermute(rows, plan), (rows,))
    assert torch.autograd.gradcheck(lambda r, w: fr.unpermute(r, plan, w), (rows, weights))
    assert torch.autograd.gradcheck(lambda w: fr.unpermute(rows.detach(), plan, w), (weights,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights_dtype", [None, *DTYPES])
@pytest.mark.parametrize("hidden", [1, 37, 64, 200])
def test_gradients_equal_reference(
    backend: str, dtype: torch.dtype, weights_dtype: torch.dtype | None, hidden: int
) -> None:
    plan = make_plan(40, 3, 6, align=4, capacity=15)
    num_rows = plan.row_to_slot.shape[0]
    grad_y, rows = normal(40, hidden, dtype=dtype), normal(num_rows, hidden, dtype=dtype, seed=1)
    weights = None if weights_dtype is None else normal(40, 3, seed=2).to(weights_dtype)

    def gradients(unpermute, rows: Tensor, weights: Tensor | None, **options) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (rows, weights) if t is not None]
        y = unpermute(leaves[0], plan, *leaves[1:], **options)
        return list(torch.autograd.grad(y, leaves, grad_y.to(y.dtype)))

    got = gradients(fr.unpermute, rows, weights)
    exact = gradients(
        reference.unpermute,
        rows.double(),
        None if weights is None else weights.double(),
        dtype=torch.float64,
    )
    u = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    limit = rounding(exact[0], dtype) + u * exact[0].abs()
    assert_bound(got[0], exact[0], limit)
    assert not got[0][plan.row_to_slot < 0].any()
    if weights is not None:
        # <|grad|, |rows|>: a sum of H products, each rounded.
        sizes = reference.permute(grad_y.double().abs(), plan).mul(rows.double().abs()).sum(1)
        sizes = torch.where(plan.slot_to_row < 0, 0.0, sizes[plan.slot_to_row.long().clamp(min=0)])
        limit = (hidden + 1) * u * sizes + rounding(exact[1], weights.dtype)
        assert_bound(got[1], exact[1], limit)
        assert not got[1][plan.slot_to_row < 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [192, 201])
@pytest.mark.parametrize("top_k", [4, 6, 9])
def test_gradients_of_slots_side_by_side(
    backend: str, top_k: int, hidden: int, dtype: torch.dtype
) -> None:
    """A slot's gradients have the bits they have where every slot is a token of its own."""
    num_tokens = vm_backend.repeats(700, vm=20)
    plan = make_plan(num_tokens, top_k, 6, align=4, capacity=num_tokens * top_k // 7)
    alone = plan._replace(slot_to_row=plan.slot_to_row.view(-1, 1))
    assert int(plan.dropped.sum()) > 0
    rows = normal(plan.row_to_slot.shape[0], hidden, dtype=dtype).requires_grad_()
    weights = normal(num_tokens, top_k, seed=1).requires_grad_()
    grad_y = normal(num_tokens, hidden, dtype=dtype, seed=2)
    own_weights = weights.detach().view(-1, 1).requires_grad_()
    wanted = torch.autograd.grad(
        fr.unpermute(rows, alone, own_weights),
        (rows, own_weights),
        grad_y.repeat_interleave(top_k, 0),
    )
    got = torch.autograd.grad(fr.unpermute(rows, plan, weights), (rows, weights), grad_y)
    assert_exact(got[0], wanted[0])
    assert_exact(got[1].view(-1, 1), wanted[1])
    assert torch.equal(
        torch.autograd.grad(fr.unpermute(rows, plan).sum(), rows)[0][:, 0],
        (plan.row_to_slot >= 0).to(dtype),
    )


def test_only_wanted_gradients_are_computed(backend: str) -> None:
    plan = make_plan(9, 2, 3)
    rows, weights = normal(18, 8), normal(9, 2)
    for wanted in ((rows,), (weights,)):
        for t in (rows, weights):
            t.requires_grad_(any(t is w for w in wanted))
        y = fr.unpermute(rows, plan, weights)
        grads = torch.autograd.grad(y.sum(), wanted)
        assert [g.shape for g in grads] == [w.shape for w in wanted]
    assert fr.unpermute(rows.detach(), plan, weights.detach()).grad_fn is None


def test_backward_takes_strided_and_expanded_gradients(backend: str) -> None:
    plan = make_plan(9, 2, 3, align=2)
    num_rows = plan.row_to_slot.shape[0]
    rows, weights, x = normal(num_rows, 8), normal(9, 2), normal(9, 8)
    for grad in (
        torch.ones(1, 1).expand(9, 8),
        normal(8, 9).t(),
        normal(9, 20)[:, 4:12],
        normal(1, 8).expand(9, 8),
    ):
        leaves = [t.detach().requires_grad_() for t in (rows, weights)]
        y = fr.unpermute(leaves[0], plan, leaves[1])
        got = torch.autograd.grad(y, leaves, grad)
        y = fr.unpermute(leaves[0], plan, leaves[1])
        wanted = torch.autograd.grad(y, leaves, grad.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    leaf = x.requires_grad_()
    (got,) = torch.autograd.grad(fr.permute(leaf, plan).sum(), leaf)
    assert torch.equal(got, (plan.slot_to_row >= 0).sum(1, keepdim=True).float().expand(9, 8))


# ---- determinism -------------------------------------------------------------------------------


class Movement:
    """One plan of 500 tokens, enough for eight threads, and everything that is moved by it."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(4)
        self.experts = torch.randint(-1, 8, (500, 4), generator=generator)
        self.plan = fr.plan_dispatch(self.experts, 8, align=8)
        self.x = normal(500, 300, dtype=dtype).requires_grad_()
        self.rows = normal(self.plan.row_to_slot.shape[0], 300, dtype=dtype, seed=1)
        self.rows.requires_grad_()
        self.weights = normal(500, 4, seed=2).requires_grad_()

    def results(self) -> list[Tensor]:
        """Rows, sums, and the gradients of x, of the rows and of the weights."""
        rows = fr.permute(self.x, self.plan)
        y = fr.unpermute(self.rows, self.plan, self.weights)
        grads = torch.autograd.grad(
            (rows, y), (self.x, self.rows, self.weights), (self.rows.detach(), self.x.detach())
        )
        return [rows.detach(), y.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_on_one_to_eight_threads_are_equal(backend: str, threads, dtype: torch.dtype) -> None:
    """Over both dtypes, 1,008 runs."""
    movement = Movement(dtype)
    threads(1)
    wanted = movement.results()
    for n in range(1, 9):
        threads(n)
        for _ in range(63):
            for got, expected in zip(movement.results(), wanted, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_does_not_show(backend: str, dtype: torch.dtype) -> None:
    movement = Movement(dtype)
    experts, plan = movement.experts, movement.plan
    rows, weights = movement.rows.detach(), movement.weights.detach()
    y = fr.unpermute(rows, plan, weights)
    # A token alone, with its own rows, has the bits it has in the batch.
    for token in (0, 123, 499):
        alone = fr.plan_dispatch(experts[token : token + 1], 8)
        mine = plan.slot_to_row[token][plan.slot_to_row[token] >= 0].long()
        own_rows = torch.zeros(4, 300, dtype=dtype)
        own_rows[alone.slot_to_row[0][alone.slot_to_row[0] >= 0].long()] = rows[mine]
        y_alone = fr.unpermute(own_rows, alone, weights[token : token + 1])
        assert_exact(y_alone[0], y[token])


# ---- registration ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_weights", [False, True])
def test_opcheck(backend: str, with_weights: bool) -> None:
    plan = make_plan(6, 2, 3, align=2)
    maps = (plan.row_to_slot, plan.slot_to_row)
    x, rows = normal(6, 5).requires_grad_(), normal(plan.row_to_slot.shape[0], 5).requires_grad_()
    weights = normal(6, 2).requires_grad_() if with_weights else None
    ops = torch.ops.fastmoe_route
    torch.library.opcheck(ops.permute.default, (x, *maps))
    torch.library.opcheck(ops.unpermute.default, (rows, weights, *maps))
    bare_weights = None if weights is None else weights.detach()
    torch.library.opcheck(ops.permute_forward.default, (x.detach(), *maps))
    torch.library.opcheck(ops.unpermute_forward.default, (rows.detach(), bare_weights, *maps))
    torch.library.opcheck(
        ops.unpermute_backward.default,
        (x.detach(), rows.detach(), bare_weights, *maps, True, with_weights),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    def layer(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        plan = fr.plan_dispatch(experts, 4, align=2)
        return fr.unpermute(fr.permute(x, plan) * 2, plan, weights)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (6, 11):
        experts = torch.randint(-1, 4, (num_tokens, 2))
        results = []
        for function in (layer, compiled):
            x = normal(num_tokens, 8).requires_grad_()
            weights = normal(num_tokens, 2).requires_grad_()
            y = function(x, experts, weights)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, weights))])
        for got, wanted in zip(*results, strict=True):
            assert_exact(got.detach(), wanted.detach())


def test_export(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            plan = fr.plan_dispatch(experts, 4)
            return fr.unpermute(fr.permute(x, plan), plan, weights)

    def arguments(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        experts = torch.randint(-1, 4, (num_tokens, 2))
        return normal(num_tokens, 8), experts, normal(num_tokens, 2)

    tokens = {0: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(
        Layer(),
        arguments(6),
        dynamic_shapes={"x": tokens, "experts": tokens, "weights": tokens},
    )
    other = arguments(13)
    assert_exact(program.module()(*other), Layer()(*other))


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (3, 0), (1, 1), (2, 70)])
@pytest.mark.parametrize("hidden", [0, 1, 65])
@pytest.mark.parametrize("align", [1, 4])
def test_sizes(backend: str, num_tokens: int, top_k: int, hidden: int, align: int) -> None:
    plan = make_plan(num_tokens, top_k, 3, align=align)
    x = normal(num_tokens, hidden).requires_grad_()
    rows = fr.permute(x, plan)
    assert_exact(rows.detach(), reference.permute(x, plan).detach())
    weights = normal(num_tokens, top_k).requires_grad_()
    y = fr.unpermute(rows, plan, weights)
    assert y.shape == (num_tokens, hidden)
    if hidden:
        assert_unpermute(rows.detach(), plan, weights.detach())
    grads = torch.autograd.grad(y.sum(), (x, weights))
    assert [g.shape for g in grads] == [x.shape, weights.shape]
    if hidden == 0:
        assert not grads[1].any()


def test_padding_never_shows(backend: str) -> None:
    """Padding rows full of NaN, and weights of NaN where there is no row, change nothing."""
    plan = make_plan(30, 3, 5, align=8, capacity=9)
    rows, weights = normal(plan.row_to_slot.shape[0], 40), normal(30, 3)
    is_padding, is_unused = plan.row_to_slot < 0, plan.slot_to_row < 0
    assert is_padding.any()
    assert is_unused.any()
    results = []
    for poison in (0.0, math.nan, math.inf):
        r = rows.clone().masked_fill_(is_padding[:, None], poison).requires_grad_()
        w = weights.masked_fill(is_unused, poison).requires_grad_()
        y = fr.unpermute(r, plan, w)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), (r, w))])
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert_exact(a, b)
    assert not results[0][1][is_padding].any()


def test_special_values_travel(backend: str) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3e38]).repeat(12)
    for dtype in DTYPES:
        x = special.to(dtype).repeat(3, 1)
        plan = make_plan(3, 2, 2)
        assert_exact(fr.permute(x, plan), reference.permute(x, plan))
        assert_unpermute(fr.permute(x, plan), plan, None)
        assert_unpermute(fr.permute(x, plan), plan, torch.tensor([[0.0, 1.0]]).repeat(3, 1))


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_past_two_to_the_31_elements(backend: str, dtype: torch.dtype) -> None:
    """R * H = 2^31 + 2^15 elements: the last rows lie past what 32 bits can index."""
    num_tokens, top_k, hidden = 8194, 16, 16384
    experts = (torch.arange(num_tokens)[:, None] + torch.arange(top_k)) % 16
    plan = fr.plan_dispatch(experts.int(), 16)
    assert plan.row_to_slot.shape[0] * hidden > 2**31
    x = torch.arange(num_tokens).remainder(251)[:, None].to(dtype).repeat(1, hidden)
    x[:, 1::2] += 1
    rows = fr.permute(x, plan)
    assert torch.equal(rows[:, 0].long(), plan.row_to_slot.long() // top_k % 251)
    assert torch.equal(rows[-3:], x[plan.row_to_slot[-3:].long() // top_k])
    weights = torch.full((num_tokens, top_k), 1.0 / top_k)
    assert torch.equal(fr.unpermute(rows, plan, weights), x)
    grad_rows, grad_weights = torch.ops.fastmoe_route.unpermute_backward(
        x, rows, weights, plan.row_to_slot, plan.slot_to_row, True, True
    )
    del rows
    assert torch.equal(grad_rows[-3:], x[plan.row_to_slot[-3:].long() // top_k] / top_k)
    products = x.double().square().sum(1, keepdim=True).expand(num_tokens, top_k)
    assert_bound(grad_weights, products, products * hidden * 2.0**-23)


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, guarded, dtype: torch.dtype) -> None:
    plan = make_plan(33, 3, 5, align=2)
    num_rows = plan.row_to_slot.shape[0]
    x, rows = normal(33, 70, dtype=dtype), normal(num_rows, 70, dtype=dtype, seed=1)
    weights = normal(33, 3)

    def views(t: Tensor) -> list[Tensor]:
        apart = torch.cat([t, torch.full_like(t, math.nan)], 1)[:, : t.shape[1]]
        every_other = t.repeat_interleave(2, 1)[:, ::2]
        return [guarded(t), t.t().contiguous().t(), apart, every_other, t.flip(0).flip(0)]

    strided_plan = DispatchPlan(
        plan.offsets,
        torch.stack([plan.row_to_slot] * 2, 1)[:, 0],
        plan.slot_to_row.t().contiguous().t(),
        plan.kept,
        plan.dropped,
    )
    wanted_rows, wanted_y = fr.permute(x, plan), fr.unpermute(rows, plan, weights)
    for view in views(x):
        assert_exact(fr.permute(view, strided_plan), wanted_rows)
    for view, w in zip(views(rows), views(weights), strict=True):
        assert_exact(fr.unpermute(view, strided_plan, w), wanted_y)
    one = normal(1, 70, dtype=dtype).expand(33, 70)
    assert_exact(fr.permute(one, plan), reference.permute(one, plan))


# ---- errors ------------------------------------------------------------------------------------

PLAN = fr.plan_dispatch(torch.tensor([[0, 1], [1, -1], [1, 0]]), 2)
X, ROWS, WEIGHTS = torch.ones(3, 4), torch.ones(6, 4), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((X.tolist(), PLAN), TypeError, r"x must be a torch.Tensor"),
        ((X[0], PLAN), ValueError, r"x must have 2 dimensions, got float32 tensor of shape \[4\]"),
        ((X.int(), PLAN), TypeError, r"x must be float32 or .*, got int32 tensor"),
        ((X[:2], PLAN), ValueError, r"x must have shape \[3, any\], got .* of shape \[2, 4\]"),
        ((X, tuple(PLAN)), TypeError, r"plan must be a DispatchPlan"),
        ((X, PLAN._replace(row_to_slot=None)), TypeError, r"plan.row_to_slot must be a torch.Tens"),
        ((X.to("meta"), PLAN), ValueError, r"plan.row_to_slot must be on meta, got cpu"),
        (
            (X, PLAN._replace(slot_to_row=PLAN.slot_to_row.to("meta"))),
            ValueError,
            r"plan.slot_to_row must be on cpu, got meta",
        ),
    ],
)
def test_permute_arguments(backend: str, arguments: tuple, kind: type, message: str) -> None:
    with pytest.raises(kind, match="^permute: " + message):
        fr.permute(*arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((None, PLAN), TypeError, r"rows must be a torch.Tensor, got None"),
        ((ROWS[None], PLAN), ValueError, r"rows must have 2 dimensions"),
        ((ROWS.long(), PLAN), TypeError, r"rows must be float32 or"),
        ((ROWS[:5], PLAN), ValueError, r"rows must have shape \[6, any\], got .*\[5, 4\]"),
        (
            (ROWS, PLAN, WEIGHTS[:2]),
            ValueError,
            r"weights must have shape \[3, 2\], got .*\[2, 2\]",
        ),
        ((ROWS, PLAN, WEIGHTS.int()), TypeError, r"weights must be float32 or"),
        ((ROWS, PLAN, 2.0), TypeError, r"weights must be a torch.Tensor, got 2.0"),
        ((ROWS, None), TypeError, r"plan must be a DispatchPlan, got None"),
        ((ROWS.to("meta"), PLAN), ValueError, r"plan.row_to_slot must be on meta, got cpu"),
        ((ROWS, PLAN, WEIGHTS.to("meta")), ValueError, r"weights must be on cpu, got meta"),
    ],
)
def test_unpermute_arguments(backend: str, arguments: tuple, kind: type, message: str) -> None:
    with pytest.raises(kind, match="^unpermute: " + message):
        fr.unpermute(*arguments)


@pytest.mark.cpu_only
def test_plans_made_by_hand_are_checked(backend: str) -> None:
    """A wrong map is an error, never a read or a write outside, nor a row left unwritten."""
    for stray in (-2, 5, 6, 2**31 - 1, -(2**31)):
        spoiled = PLAN.slot_to_row.clone()
        spoiled[2, 0] = stray
        with pytest.raises(RuntimeError, match=r"permute: plan must come from plan_dispatch"):
            fr.permute(X, PLAN._replace(slot_to_row=spoiled))
        if stray != 5:
            with pytest.raises(RuntimeError, match=r"plan.slot_to_row must be in \[-1, 6\)"):
                fr.unpermute(ROWS, PLAN._replace(slot_to_row=spoiled))
    for stray in (-2, 1, 6, 2**31 - 1, -(2**31)):
        spoiled = PLAN.row_to_slot.clone()
        spoiled[0] = stray
        with pytest.raises(RuntimeError, match=r"permute: plan must come from plan_dispatch"):
            fr.permute(X, PLAN._replace(row_to_slot=spoiled))
    # A row that two slots name, and one that is padding to one map alone: gradients would be lost.
    shared, unused = PLAN.slot_to_row.clone(), PLAN.row_to_slot.clone()
    shared[2, 0], unused[0] = shared[0, 1], -1
    for plan in (PLAN._replace(slot_to_row=shared), PLAN._replace(row_to_slot=unused)):
        with pytest.raises(RuntimeError, match=r"permute: plan must come from plan_dispatch"):
            fr.permute(X, plan)
        rows = normal(6, 4).requires_grad_()
        y = fr.unpermute(rows, plan, WEIGHTS)  # which slot_to_row alone says
        assert_exact(y.detach(), reference.unpermute(rows.detach(), plan, WEIGHTS))
        with pytest.raises(RuntimeError, match=r"unpermute_backward: plan must come from plan_d"):
            y.sum().backward()
    for wrong in (PLAN.slot_to_row.long(), PLAN.slot_to_row.flatten()):
        with pytest.raises((RuntimeError, ValueError), match="slot_to_row must"):
            torch.ops.fastmoe_route.permute(X, PLAN.row_to_slot, wrong)
