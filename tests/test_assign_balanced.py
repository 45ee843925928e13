"""assign_balanced: even counts, and a total within T * eps of the best. Tolerance class: bound."""

from __future__ import annotations

import sys
import time

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import reference
from tolerance import assert_literal
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METHODS = ("auction", "exact")


def scores_of(kind: str, num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_tokens, num_experts, generator=generator)
    skew = 3 * torch.randn(num_experts, generator=generator)
    return {
        "even": z,
        "skewed": (z + skew).softmax(-1),
        "ties": z.round(),
        "equal": torch.ones_like(z),
        "same rows": skew.expand_as(z),
        "tiny": z * 1e-6,
        "huge": z * 1e30,
    }[kind]


def total(scores: Tensor, experts: Tensor) -> float:
    return float(scores.double().gather(1, experts.long()[:, None]).sum())


def check(scores: Tensor, experts: Tensor, best: Tensor) -> None:
    """Even counts and the promised total."""
    num_tokens, num_experts = scores.shape
    assert experts.dtype == torch.int32
    assert experts.shape == (num_tokens,)
    counts = torch.bincount(experts.long(), minlength=num_experts)
    assert counts.tolist() == [num_tokens // num_experts] * num_experts
    eps = max(float(scores.double().max() - scores.double().min()) / 50, 1e-4)
    loss = total(scores, best) - total(scores, experts)
    assert loss <= num_tokens * eps
    assert loss >= -1e-9 * abs(total(scores, best)) - 1e-12


# ---- literals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_literals(backend: str, method: str) -> None:
    # Everyone prefers expert 0; giving 1 to the tokens that lose least by it is best.
    scores = torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.5, 0.4], [0.3, -0.5]], device=backend)
    assert_literal(fr.assign_balanced(scores, method=method), [1, 0, 1, 0])


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["even", "skewed", "ties", "tiny"])
def test_total_against_every_assignment(backend: str, method: str, kind: str) -> None:
    for num_tokens, num_experts in ((2, 2), (4, 4), (6, 3), (8, 2)):
        scores = scores_of(kind, num_tokens, num_experts, seed=num_tokens)
        best = reference.assign_balanced(scores)
        got = fr.assign_balanced(scores.to(backend), method=method).cpu()
        check(scores, got, best)
        if method == "exact":
            assert abs(total(scores, got) - total(scores, best)) <= 1e-12


@pytest.mark.parametrize("kind", ["even", "skewed", "ties", "equal", "same rows", "tiny", "huge"])
def test_auction_against_exact(backend: str, kind: str) -> None:
    for num_tokens, num_experts in ((64, 8), (120, 5), (64, 64), (33, 1)):
        scores = scores_of(kind, num_tokens, num_experts)
        best = fr.assign_balanced(scores, method="exact")
        check(scores, fr.assign_balanced(scores.to(backend)).cpu(), best)


def test_the_check_has_power() -> None:
    scores = scores_of("skewed", 64, 8)
    best = fr.assign_balanced(scores, method="exact")
    for wrong in (torch.zeros_like(best), scores.argmax(1).int()):
        with pytest.raises(AssertionError):
            check(scores, wrong, best)
    worst = fr.assign_balanced(-scores, method="exact")
    with pytest.raises(AssertionError):
        check(scores, worst, best)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    scores = scores_of("even", 64, 8).to(dtype)
    got = fr.assign_balanced(scores.to(backend)).cpu()
    assert torch.equal(got, fr.assign_balanced(scores.double()))


# ---- registration ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_opcheck_and_fullgraph(backend: str, method: str) -> None:
    scores = scores_of("even", 16, 4).to(backend)
    name = "assign_balanced_exact" if method == "exact" else "assign_balanced"
    torch.library.opcheck(
        getattr(torch.ops.fastmoe_route, name).default,
        (scores,),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )

    def call(x: Tensor) -> Tensor:
        return fr.assign_balanced(x, method=method)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores), call(scores))


def test_registered_for_cuda() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("fastmoe_route::assign_balanced", "CUDA")


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_edges(backend: str, method: str) -> None:
    for shape in ((0, 4), (5, 1), (1, 1)):
        got = fr.assign_balanced(torch.ones(shape, device=backend), method=method)
        assert got.tolist() == [0] * shape[0]


def test_worst_case_takes_well_under_a_second(backend: str) -> None:
    """No price war: bids are bounded by T * (range / eps + 2)."""
    for kind in ("even", "skewed", "equal", "same rows"):
        scores = scores_of(kind, 8192, 64).to(backend)
        start = time.perf_counter()
        fr.assign_balanced(scores)
        assert time.perf_counter() - start < 1.0


# ---- layouts -----------------------------------------------------------------------------------


def test_layouts(backend: str) -> None:
    scores = scores_of("even", 24, 6).to(backend)
    wanted = fr.assign_balanced(scores)
    wide = torch.full((24, 13), 7.0, device=backend)
    wide[:, 1::2] = scores
    assert torch.equal(fr.assign_balanced(wide[:, 1::2]), wanted)
    assert torch.equal(fr.assign_balanced(scores.t().contiguous().t()), wanted)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_errors(backend: str, method: str) -> None:
    def call(scores: Tensor, **options: str) -> Tensor:
        return fr.assign_balanced(scores.to(backend), **{"method": method, **options})

    with pytest.raises(ValueError, match="scores must have a multiple of 3 tokens, got 7"):
        call(torch.ones(7, 3))
    with pytest.raises(ValueError, match="scores must have at least 1 expert, got"):
        call(torch.ones(7, 0))
    for bad in (torch.inf, -torch.inf, torch.nan):
        scores = torch.ones(6, 3)
        scores[5, 2] = bad
        with pytest.raises(RuntimeError, match="scores must be finite, got inf or NaN"):
            call(scores)
    with pytest.raises(ValueError, match="method must be one of auction, exact, got 'best'"):
        call(torch.ones(6, 3), method="best")
    with pytest.raises(TypeError, match="scores must be float32"):
        call(torch.ones(6, 3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="scores must have a multiple of 3 tokens, got 7"):
        torch.ops.fastmoe_route.assign_balanced(torch.ones(7, 3, device=backend))


def test_exact_without_scipy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"needs SciPy: pip install fastmoe-route\[routers\]"):
        fr.assign_balanced(torch.ones(4, 2), method="exact")
