"""transport: plans and biases that balance. Tolerance class: bound, from a float64 reference."""

from __future__ import annotations

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import reference
from tolerance import assert_bound, assert_has_power, assert_literal
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF, NAN = torch.inf, torch.nan
# In float32 a scaled logit x carries an error of u |x|, and so do the exponentials of a plan.
PLAN_ERROR = 1e-5


def scores_of(num_tokens: int, num_experts: int, seed: int = 0, skew: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_tokens, num_experts, generator=generator)
    return (z + skew * torch.randn(num_experts, generator=generator)).softmax(-1)


def scopes_of(num_tokens: int, num_scopes: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_scopes, (num_tokens,), generator=generator, dtype=torch.int32)


def violation(scores: Tensor, top_k: int, bias: Tensor | None) -> float:
    """How far the fullest expert is above an even load, as a share of it."""
    demand = fr.gate(scores, top_k, score="identity", bias=bias).demand.float()
    return float(demand.max() / demand.mean() - 1)


METHODS = {
    "sinkhorn": {"iters": 7, "temperature": 0.2},
    "bip": {"iters": 4, "top_k": 2},
    "ksparse": {"iters": 20, "k": 2, "gamma": 0.5},
}


# ---- literals ----------------------------------------------------------------------------------


def test_sinkhorn_literals(backend: str) -> None:
    # exp(ln 3) = 3: scaling [[3, 1], [1, 1]] evens out at [[a, 1 - a], [1 - a, a]],
    # a^2 / (1 - a)^2 = 3, a = sqrt(3) / (1 + sqrt(3)).
    scores = torch.tensor([[3.0, 1.0], [1.0, 1.0]], device=backend).log()
    plan = fr.transport(scores, "sinkhorn", iters=60, temperature=1.0)
    assert_bound(plan.cpu(), torch.tensor([[0.633975, 0.366025], [0.366025, 0.633975]]), PLAN_ERROR)
    # One iteration: columns [3, 1] / 4 and [1, 1] / 2 first, then rows.
    plan = fr.transport(scores, "sinkhorn", iters=1, temperature=1.0)
    assert_bound(plan.cpu(), torch.tensor([[0.6, 0.4], [1 / 3, 2 / 3]]), PLAN_ERROR)


def test_bip_literals(backend: str) -> None:
    # Both tokens want expert 0: p = [.1, .2]; column 0 minus p: [.8, .6], its 2nd largest is .6;
    # column 1 minus p: [0, 0].
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]], device=backend)
    assert_literal(fr.transport(scores, "bip", iters=1), [-0.6, 0.0])
    balanced = torch.tensor([[0.9, 0.1], [0.1, 0.9]], device=backend)
    bias = fr.transport(balanced, "bip", iters=5)
    assert bias.tolist() == [0.0, 0.0]
    assert not bool(bias.signbit().any())


def test_ksparse_projection_literals(backend: str) -> None:
    # With prices that do not move, rows are the projections themselves.
    row = torch.tensor([0.5, 0.4, 0.3, 0.1], device=backend)
    scores = torch.stack([row.roll(i) for i in range(4)])
    for k, wanted in ((1, [1, 0, 0, 0]), (2, [0.55, 0.45, 0, 0]), (3, [0.4333, 0.3333, 0.2333, 0])):
        plan = fr.transport(scores, "ksparse", iters=1, k=k, learning_rate=1e-9).cpu()
        expected = torch.tensor(wanted, dtype=torch.float32)
        for i in range(4):
            assert bool(((plan[i].roll(-i) - expected).abs() <= 1e-4).all())


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(backend: str, method: str, dtype: torch.dtype) -> None:
    for num_tokens, num_experts in ((1, 2), (7, 3), (33, 8)):
        scores = scores_of(num_tokens, num_experts, num_tokens).to(dtype)
        options = METHODS[method]
        wanted = reference.transport(scores.double(), method, **options)
        got = fr.transport(scores.to(backend), method, **options).cpu()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_bound(got, wanted, PLAN_ERROR)
        ids = scopes_of(num_tokens, 4)
        wanted = reference.transport(scores.double(), method, **options, scope_ids=ids)
        for number in (None, 4, 9):
            got = fr.transport(
                scores.to(backend), method, **options, scope_ids=ids.to(backend), num_scopes=number
            )
            assert_bound(got.cpu(), wanted, PLAN_ERROR)


def test_marginal(backend: str) -> None:
    scores = scores_of(50, 4).to(backend)
    marginal = torch.tensor([1.0, 2.0, 3.0, 4.0], device=backend)
    plan = fr.transport(scores, "sinkhorn", iters=200, temperature=0.3, marginal=marginal)
    assert_bound(plan.sum(0).cpu() / 5, marginal.cpu(), PLAN_ERROR)
    wanted = reference.transport(
        scores.cpu().double(), "sinkhorn", iters=200, temperature=0.3, marginal=marginal.cpu()
    )
    assert_bound(plan.cpu(), wanted, PLAN_ERROR)
    times_five = fr.transport(scores, "sinkhorn", iters=200, temperature=0.3, marginal=marginal * 5)
    assert_bound(times_five, plan, PLAN_ERROR)


def test_a_marginal_of_zero_gives_the_expert_nothing(backend: str) -> None:
    """Its column kept its unscaled entries, and the gradient of others went with it."""
    scores = scores_of(50, 4).double().to(backend).requires_grad_()
    options = {"iters": 200, "temperature": 0.3}
    marginal = torch.tensor([1.0, 0.0, 3.0, 4.0], dtype=torch.float64, device=backend)
    plan = fr.transport(scores, "sinkhorn", marginal=marginal, **options)
    others = scores.detach()[:, [0, 2, 3]].requires_grad_()
    wanted = fr.transport(others, "sinkhorn", marginal=marginal[[0, 2, 3]], **options)
    assert plan[:, 1].count_nonzero() == 0
    assert_bound(plan[:, [0, 2, 3]].detach().cpu(), wanted.detach().cpu(), 1e-12)
    upper = torch.randn(50, 4, dtype=torch.float64, device=backend)
    (plan * upper).sum().backward()
    (wanted * upper[:, [0, 2, 3]]).sum().backward()
    assert scores.grad[:, 1].count_nonzero() == 0
    assert_bound(scores.grad[:, [0, 2, 3]].cpu(), others.grad.cpu(), 1e-12)


def test_the_check_has_power(backend: str) -> None:
    scores = scores_of(20, 4)
    for method, options in METHODS.items():
        wanted = reference.transport(scores.double(), method, **options)
        got = fr.transport(scores.to(backend), method, **options).cpu()
        if method == "bip":
            got, wanted = got[:, None], wanted[:, None]
        assert_has_power(lambda x, wanted=wanted: assert_bound(x, wanted, PLAN_ERROR), got)


def test_sinkhorn_meets_its_marginals(backend: str) -> None:
    """Row sums 1 and column sums T / E, where T is no multiple of E either."""
    for num_tokens in (256, 250):
        scores = scores_of(num_tokens, 16).to(backend)
        plan = fr.transport(scores, "sinkhorn", iters=60)
        assert bool(((plan.sum(1) - 1).abs() <= 1e-5).all())
        assert bool(((plan.sum(0) / (num_tokens / 16) - 1).abs() <= 1e-4).all())


def test_ksparse_is_sparse_and_its_rows_sum_to_one(backend: str) -> None:
    scores = scores_of(300, 16).to(backend)
    for k in (1, 2, 3, 16):
        plan = fr.transport(scores, "ksparse", iters=20, k=k)
        assert bool(((plan != 0).sum(1) <= k).all())
        assert bool(((plan.sum(1) - 1).abs() <= 1e-5).all())
        assert bool((plan >= 0).all())


def test_balance_improves_with_iterations(backend: str) -> None:
    """On skewed scores every method is far better balanced than plain top-k."""
    scores = scores_of(1024, 16, skew=1.0).to(backend)
    plain = violation(scores, 2, None)
    assert plain > 1.5
    biases = [fr.transport(scores, "bip", iters=i, top_k=2) for i in (1, 4, 14)]
    found = [violation(scores, 2, bias) for bias in biases]
    assert found[0] < plain
    assert found[1] < 0.5
    assert found[2] < 0.05
    assert all(bool((bias <= 0).all()) for bias in biases)
    plan = fr.transport(scores, "sinkhorn", iters=50)
    assert violation(plan, 2, None) < plain / 4
    sparse = fr.transport(scores, "ksparse", iters=200, k=2)
    assert float(sparse.sum(0).max() / 64 - 1) < 0.35


@pytest.mark.parametrize("method", METHODS)
def test_a_scope_never_depends_on_another(backend: str, method: str) -> None:
    scores, ids = scores_of(60, 8).to(backend), scopes_of(60, 3).to(backend)
    options = METHODS[method]
    together = fr.transport(scores, method, **options, scope_ids=ids, num_scopes=3)
    for scope in range(3):
        mine = ids == scope
        other = torch.where(mine[:, None], scores, scores.flip(0) * 9)
        changed = fr.transport(other, method, **options, scope_ids=ids, num_scopes=3)
        assert torch.equal(changed[mine], together[mine])
        alone = fr.transport(scores[mine], method, **options, scope_ids=ids[mine], num_scopes=3)
        assert torch.equal(alone, together[mine])


def test_same_bits_with_any_number_of_threads(backend: str, threads) -> None:
    scores = scores_of(3000, 24).to(backend)
    for method, options in METHODS.items():
        results = []
        for count in (1, 2):
            threads(count)
            results.append(fr.transport(scores, method, **options))
        assert torch.equal(*results)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scoped", [False, True])
def test_gradient_of_sinkhorn(backend: str, scoped: bool) -> None:
    scores = scores_of(7, 3).double().to(backend).requires_grad_()
    ids = scopes_of(7, 3).to(backend) if scoped else None
    marginal = torch.tensor([1.0, 2.0, 3.0], device=backend, dtype=torch.float64)

    def plan(x: Tensor) -> Tensor:
        return fr.transport(
            x, "sinkhorn", iters=4, temperature=0.4, marginal=marginal, scope_ids=ids
        )

    assert torch.autograd.gradcheck(plan, scores)


def test_the_others_are_constants(backend: str) -> None:
    scores = scores_of(7, 3).to(backend).requires_grad_()
    assert not fr.transport(scores, "bip", iters=2).requires_grad
    assert not fr.transport(scores, "ksparse", iters=2).requires_grad


# ---- registration ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [0, 1, 2])
@pytest.mark.parametrize("scoped", [False, True])
def test_opcheck(backend: str, method: int, scoped: bool) -> None:
    scores = scores_of(6, 3).to(backend).requires_grad_(method == 0)
    ids = scopes_of(6, 2).to(backend) if scoped else None
    arguments = (scores, method, 2, 0.5, None, 2, 1.0, 0.01, ids, 2 * scoped)
    torch.library.opcheck(torch.ops.fastmoe_route.transport.default, arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, method: str, dynamic: bool) -> None:
    def call(x: Tensor, ids: Tensor) -> Tensor:
        return fr.transport(x, method, **METHODS[method], scope_ids=ids)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (12, 9):
        inputs = scores_of(num_tokens, 4).to(backend), scopes_of(num_tokens, 3).to(backend)
        assert torch.equal(compiled(*inputs), call(*inputs))


def test_export(backend: str) -> None:
    class Plan(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fr.transport(x, "sinkhorn", iters=3)

    scores = scores_of(12, 4).to(backend)
    program = torch.export.export(Plan(), (scores,))
    assert torch.equal(program.module()(scores), Plan()(scores))


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_edges(backend: str, method: str) -> None:
    options = METHODS[method]
    empty = torch.zeros(0, 4, device=backend)
    assert fr.transport(empty, method, **options).shape == ((4,) if method == "bip" else (0, 4))
    ids = torch.zeros(0, dtype=torch.int32, device=backend)
    assert fr.transport(empty, method, **options, scope_ids=ids).shape == (0, 4)
    one = {**options, **({"top_k": 1} if method == "bip" else {}), "iters": 3}
    one = {**one, **({"k": 1} if method == "ksparse" else {})}
    single = fr.transport(torch.randn(5, 1, device=backend), method, **one).cpu()
    assert_bound(single, torch.zeros(1) if method == "bip" else torch.ones(5, 1), PLAN_ERROR)


def test_wide_logits_do_not_overflow(backend: str) -> None:
    scores = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 1000).to(backend)
    plan = fr.transport(scores, "sinkhorn", iters=20)
    assert bool(plan.isfinite().all())
    assert bool(((plan.sum(1) - 1).abs() <= 1e-3).all())


def test_forbidden_pairs_get_nothing(backend: str) -> None:
    scores = scores_of(16, 4).to(backend)
    scores[3, 1] = scores[5] = -INF
    plan = fr.transport(scores, "sinkhorn", iters=30)
    assert float(plan[3, 1]) == 0
    assert plan[5].tolist() == [0.0] * 4
    rest = [t for t in range(16) if t != 5]
    assert bool(((plan[rest].sum(1) - 1).abs() <= 1e-5).all())
    sparse = fr.transport(scores, "ksparse", iters=5, k=2)
    assert float(sparse[3, 1]) == 0
    assert sparse[5].tolist() == [0.0] * 4


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_layouts(backend: str, method: str) -> None:
    scores = scores_of(24, 6).to(backend)
    wanted = fr.transport(scores, method, **METHODS[method])
    wide = torch.full((24, 13), 7.0, device=backend)
    wide[:, 1::2] = scores
    for view in (wide[:, 1::2], scores.t().contiguous().t()):
        assert torch.equal(fr.transport(view, method, **METHODS[method]), wanted)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "exact"}, ValueError, "method must be one of sinkhorn, bip, ksparse, got"),
        ({"iters": 0}, ValueError, r"iters must be in \[1, 2147483647\], got 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": NAN}, ValueError, "temperature must be positive, got nan"),
        ({"gamma": -1.0}, ValueError, "gamma must be positive, got -1.0"),
        ({"method": "bip", "top_k": 5}, ValueError, r"top_k must be in \[1, 4\], got 5"),
        ({"method": "ksparse", "k": 0}, ValueError, r"k must be in \[1, 4\], got 0"),
        ({"marginal": torch.ones(3)}, ValueError, r"marginal must have shape \[4\]"),
        ({"method": "bip", "marginal": torch.ones(4)}, ValueError, "marginal must be None for bip"),
        ({"method": "bip", "marginal": 1.0}, ValueError, "marginal must be None for bip, got 1.0"),
        ({"scope_ids": torch.zeros(3).int()}, ValueError, r"scope_ids must have shape \[8\]"),
        ({"scope_ids": torch.zeros(8)}, TypeError, "scope_ids must be int32 or int64"),
        ({"k": "x"}, TypeError, "k must be an int, got 'x'"),
        ({"num_scopes": 2**70}, ValueError, r"num_scopes must be in \[1, 2147483647\]"),
        ({"num_scopes": 2**31}, ValueError, r"num_scopes must be in \[1, 2147483647\]"),
        ({"num_scopes": 2}, ValueError, "scope_ids must be given with num_scopes, got None"),
    ],
)
def test_errors(backend: str, options: dict, error: type[Exception], text: str) -> None:
    arguments = {"method": "sinkhorn", "iters": 2, **options}
    with pytest.raises(error, match=f"transport: {text}"):
        fr.transport(torch.ones(8, 4, device=backend), **arguments)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"marginal": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "marginal must be finite and at least"),
        ({"marginal": torch.tensor([1.0, NAN, 1.0, 1.0])}, "marginal must be finite and at least"),
        ({"marginal": torch.zeros(4)}, "marginal must be finite and at least 0, and not 0 through"),
        ({"scope_ids": torch.tensor([0] * 7 + [-1]), "num_scopes": 2}, r"in \[0, 2\), got -1"),
        ({"scope_ids": torch.tensor([0] * 7 + [2]), "num_scopes": 2}, r"in \[0, 2\), got 2"),
    ],
)
def test_values_that_a_host_sees_are_checked(options: dict, text: str) -> None:
    """A negative column sum gave a plan of no meaning, a negative scope the last one's prices."""
    with pytest.raises(RuntimeError, match=f"transport: .*{text}"):
        fr.transport(torch.ones(8, 4), "sinkhorn", iters=2, **options)
