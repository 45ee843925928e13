"""expert_choice: every expert takes its best tokens, in every scope on its own."""

from __future__ import annotations

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import reference
from tolerance import assert_exact, assert_has_power, assert_literal
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF, NAN = torch.inf, torch.nan


def random_scores(
    num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Scores with ties, zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    kind = torch.randint(0, 12, scores.shape, generator=generator)
    for code, value in enumerate((0.0, -0.0, NAN, INF, -INF)):
        scores[kind == code] = value
    return torch.where(kind == 5, scores.round(), scores).to(dtype)


def check(scores: Tensor, capacity: int, backend: str, **scopes) -> None:
    on_device = {k: v.to(backend) if isinstance(v, Tensor) else v for k, v in scopes.items()}
    got = fr.expert_choice(scores.to(backend), capacity, **on_device)
    wanted = reference.expert_choice(scores, capacity, **scopes)
    assert_exact(got.experts.cpu(), wanted.experts, stride=False)
    assert_exact(got.demand.cpu(), wanted.demand)
    assert_exact(got.weights.isnan().cpu(), wanted.weights.isnan(), stride=False)
    assert_exact(got.weights.nan_to_num(7.0).cpu(), wanted.weights.nan_to_num(7.0), stride=False)
    assert got[3:] == (None, None, None)


# ---- literals ----------------------------------------------------------------------------------


def test_literals(backend: str) -> None:
    scores = torch.tensor([[0.9, 0.2], [0.5, 0.4], [0.5, 0.4]], device=backend)
    routing = fr.expert_choice(scores, 2)
    assert_literal(routing.experts, [[0, -1], [0, 1], [-1, 1]])
    assert_literal(routing.weights, [[0.9, 0.0], [0.5, 0.4], [0.0, 0.4]])
    assert_literal(routing.demand, [2, 2])


def test_nan_is_taken_last(backend: str) -> None:
    scores = torch.tensor([[NAN], [-INF], [NAN], [1.0]], device=backend)
    for capacity, taken in ((1, [3]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])):
        experts = fr.expert_choice(scores, capacity).experts[:, 0]
        assert experts.eq(0).nonzero()[:, 0].tolist() == taken


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(backend: str, dtype: torch.dtype) -> None:
    for num_tokens, num_experts in ((1, 1), (7, 3), (100, 15), (65, 33), (3000, 17)):
        for capacity in (1, 2, num_tokens // 3 + 1, num_tokens, num_tokens + 5):
            scores = random_scores(num_tokens, num_experts, dtype, seed=num_tokens)
            check(scores, capacity, backend)
            scope_ids = torch.randint(
                0, 5, (num_tokens,), generator=torch.Generator().manual_seed(1), dtype=torch.int32
            )
            check(scores, capacity, backend, scope_ids=scope_ids, num_scopes=6)


def test_the_check_has_power(backend: str) -> None:
    scores = random_scores(20, 8).nan_to_num(0.5)
    wanted = reference.expert_choice(scores, 3)
    got = fr.expert_choice(scores.to(backend), 3)
    assert_has_power(lambda e: assert_exact(e, wanted.experts, stride=False), got.experts)
    assert_has_power(lambda w: assert_exact(w, wanted.weights, stride=False), got.weights)


def test_scopes_without_a_token_cost_nothing(backend: str) -> None:
    """Memory by the largest scope would be 16 GiB here; ids may be hashes of requests."""
    scores = torch.randint(0, 5, (60, 4), generator=torch.Generator().manual_seed(5)).float()
    few = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    many = torch.tensor([0, 77, 2**31 - 2], dtype=torch.int32)[few.long()]
    wanted = fr.expert_choice(scores.to(backend), 4, scope_ids=few.to(backend), num_scopes=3)
    for count in (61, 2**31 - 1):
        ids = many if count > 61 else few * 30
        got = fr.expert_choice(scores.to(backend), 4, scope_ids=ids.to(backend), num_scopes=count)
        for field in ("experts", "weights", "demand"):
            assert_exact(getattr(got, field), getattr(wanted, field))
    none = fr.expert_choice(scores[:0], 4, scope_ids=few[:0], num_scopes=2**31 - 1)
    assert none.experts.shape == (0, 4)


def test_a_scope_never_depends_on_another(backend: str) -> None:
    scores = random_scores(60, 9)
    scope_ids = (torch.arange(60) % 3).int()
    together = fr.expert_choice(
        scores.to(backend), 4, scope_ids=scope_ids.to(backend), num_scopes=3
    )
    for scope in range(3):
        alone = fr.expert_choice(scores[scope_ids == scope].to(backend), 4)
        assert_exact(together.experts.cpu()[scope_ids == scope], alone.experts.cpu())


# ---- gradients ---------------------------------------------------------------------------------


def test_gradcheck(backend: str) -> None:
    scores = torch.randn(6, 4, dtype=torch.float64, device=backend, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: fr.expert_choice(s, 2).weights, scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_reaches_taken_scores_only(backend: str, dtype: torch.dtype) -> None:
    scores = random_scores(40, 6, dtype).to(backend).requires_grad_()
    routing = fr.expert_choice(scores, 5)
    grad = torch.full_like(routing.weights, NAN)
    grad[routing.experts >= 0] = 3.0
    (got,) = torch.autograd.grad(routing.weights, scores, grad)
    assert_exact(got, (routing.experts >= 0).to(dtype) * 3)


# ---- registration ------------------------------------------------------------------------------


def test_opcheck(backend: str) -> None:
    ops = torch.ops.fastmoe_route
    scores = torch.randn(6, 4, device=backend)
    scope_ids = torch.tensor([0, 1, 0, 1, 1, 1], dtype=torch.int32, device=backend)
    torch.library.opcheck(ops.expert_choice, (scores.clone().requires_grad_(), 2, None, 1))
    torch.library.opcheck(ops.expert_choice_forward, (scores, 2, scope_ids, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(
        lambda s: fr.expert_choice(s * 2, 3), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    scores = torch.randn(9, 4, device=backend, requires_grad=True)
    got, wanted = compiled(scores), fr.expert_choice(scores * 2, 3)
    assert_exact(got.experts, wanted.experts)
    assert_exact(got.weights, wanted.weights)
    got.weights.sum().backward()
    assert scores.grad is not None


def test_export(backend: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return fr.expert_choice(scores, 2).experts

    scores = torch.randn(6, 4, device=backend)
    got = torch.export.export(Module(), (scores,)).module()(scores)
    assert_exact(got, fr.expert_choice(scores, 2).experts)


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_empty_and_single(backend: str, shape: tuple) -> None:
    check(torch.ones(shape), 3, backend)
    scope_ids = torch.zeros(shape[0], dtype=torch.int32)
    check(torch.ones(shape), 3, backend, scope_ids=scope_ids, num_scopes=2)


def test_equal_scores_go_to_the_lower_tokens(backend: str) -> None:
    for value in (0.0, -1.0, INF, -INF, NAN):
        experts = fr.expert_choice(torch.full((50, 20), value, device=backend), 7).experts
        assert (experts[:7] == torch.arange(20, device=backend)).all()
        assert (experts[7:] == -1).all()


def test_threads_do_not_show(backend: str, threads) -> None:
    scores = random_scores(2000, 40).to(backend)
    scope_ids = (torch.arange(2000) % 7).int().to(backend)
    results = []
    for count in (1, 2, 4):
        threads(count)
        results.append(fr.expert_choice(scores, 50, scope_ids=scope_ids, num_scopes=7))
    for result in results[1:]:
        for got, wanted in zip(result[:3], results[0][:3], strict=True):
            assert_exact(got, wanted)


# ---- layouts -----------------------------------------------------------------------------------


def test_layouts(backend: str, guarded) -> None:
    scores = random_scores(70, 18).nan_to_num(0.5)
    wanted = fr.expert_choice(scores.to(backend), 9)
    wide = torch.full((70, 40), INF)
    wide[:, 2:38:2] = scores
    for view in (guarded(scores.to(backend)), wide.to(backend)[:, 2:38:2], scores.T.contiguous().T):
        got = fr.expert_choice(view, 9)
        assert_exact(got.experts, wanted.experts)
        assert_exact(got.weights, wanted.weights)
    scope_ids = torch.arange(140, dtype=torch.int32) % 4
    check(scores, 3, backend, scope_ids=scope_ids[::2], num_scopes=4)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scores": [1.0]}, TypeError, "expert_choice: scores must be a torch.Tensor"),
        ({"scores": torch.ones(3)}, ValueError, "expert_choice: scores must have 2 dimensions"),
        ({"scores": torch.ones(3, 2).int()}, TypeError, "expert_choice: scores must be float32"),
        ({"capacity": 0}, ValueError, "expert_choice: capacity must be at least 1, got 0"),
        ({"capacity": 1.5}, TypeError, "expert_choice: capacity must be an int"),
        ({"num_scopes": 0}, ValueError, "expert_choice: num_scopes must be in"),
        ({"scope_ids": torch.zeros(3)}, TypeError, "expert_choice: scope_ids must be int32"),
        (
            {"scope_ids": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            r"expert_choice: scope_ids must have shape \[3\]",
        ),
        pytest.param(
            {"scope_ids": torch.tensor([0, 1, 0], dtype=torch.int32)},
            RuntimeError,
            r"expert_choice: scope_ids must be in \[0, 1\), got 1 at token 1",
            marks=pytest.mark.cpu_only,
        ),
    ],
)
def test_arguments(options: dict, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        fr.expert_choice(**{"scores": torch.ones(3, 2), "capacity": 1, **options})
