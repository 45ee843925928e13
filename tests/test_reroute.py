"""reroute. Tolerance class: exact."""

from __future__ import annotations

import math

import fastmoe_route as fr
import pytest
import torch
import vm_backend
from cases import describe, reroute_cases
from fastmoe_route import Routing, reference
from tolerance import assert_exact, assert_has_power
from torch import Tensor


def assert_routing(actual: Routing, expected: Routing) -> None:
    for name, got, wanted in zip(actual._fields[:3], actual, expected, strict=False):
        assert got.is_contiguous(), name
        assert_exact(got, wanted)


def pair(experts: list, weights: list | None = None) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(experts)
    falling = torch.arange(ids.shape[1], 0, -1).float().expand(ids.shape)
    return ids, falling if weights is None else torch.tensor(weights)


# ---- literals ----------------------------------------------------------------------------------


def test_next_best_expert_with_room(backend: str) -> None:
    # Token 0 takes expert 0. Token 1 finds 0 full and takes 1. Token 2 finds both full: 2.
    routing = pair([[0, 1, 2]] * 4, [[0.5, 0.3, 0.2]] * 4)
    got = fr.reroute(routing, 3, 1, 1)
    assert got.experts.tolist() == [[0], [1], [2], [-1]]
    assert got.weights.tolist() == [[0.5], [pytest.approx(0.3)], [pytest.approx(0.2)], [0.0]]
    assert got.demand.tolist() == [1, 1, 1]
    by_score = (routing[0], routing[1] * torch.tensor([[1.0], [2.0], [4.0], [3.0]]))
    got = fr.reroute(by_score, 3, 1, 1, drop_policy="score")
    assert got.experts.tolist() == [[-1], [2], [0], [1]]
    assert fr.reroute(routing, 3, 1, 1, overflow="drop").experts.tolist() == [[0], [-1], [-1], [-1]]


def test_choices_of_all_tokens_come_before_any_fallback(backend: str) -> None:
    # Token 0 is short after its choices, but expert 1 is the choice of token 1.
    got = fr.reroute(pair([[0, 1], [0, 1], [1, 2]]), 3, 1, 1)
    assert got.experts.tolist() == [[0], [-1], [1]]


def test_who_has_an_expert_keeps_it(backend: str) -> None:
    """A later asker with a larger weight does not push out an earlier round's."""
    routing = pair([[0, 2], [1, 0]], [[0.1, 0.0], [0.2, 0.9]])
    got = fr.reroute(routing, 3, 1, 1, drop_policy="score")
    assert got.experts.tolist() == [[0], [1]]


def test_best_expert_of_the_same_rank(backend: str) -> None:
    routing = pair([[0, 1, 2, 3]] * 3)
    homes = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    places = torch.tensor([0, 1, 0], dtype=torch.int32)
    case = {"overflow": "local", "rank_of_expert": homes, "rank_of_token": places}
    got = fr.reroute(routing, 4, 1, 1, **case)
    # Token 1 lives on rank 1, whose best expert is 2; token 2 on rank 0, where 1 has room.
    assert got.experts.tolist() == [[0], [2], [1]]
    # Nobody moves between ranks who was not sent there by its own choice.
    assert fr.reroute(pair([[0, 2], [0, 1]]), 4, 1, 1, **{**case, "rank_of_token": places[:2]})[
        0
    ].tolist() == [[0], [-1]]


def test_fill_takes_the_best_turned_away(backend: str) -> None:
    routing = pair(
        [[0, 1], [0, 1], [0, 1], [2, 1]], [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]
    )
    case = {"overflow": "drop", "fill": "turned_away"}
    assert fr.reroute(routing, 3, 1, 1, **case).experts.tolist() == [
        [0, -1],
        [-1, -1],
        [1, -1],
        [2, -1],
    ]
    # Of all tokens, the last likes expert 1 best, and has two experts then.
    got = fr.reroute(routing, 3, 1, 1, overflow="drop", fill="any")
    assert got.experts.tolist() == [[0, -1], [-1, -1], [-1, -1], [2, 1]]
    assert got.weights[3].tolist() == [pytest.approx(0.6), pytest.approx(0.4)]
    assert got.demand.tolist() == [1, 1, 1]


def test_ties_go_to_the_lower_slot_and_nan_last(backend: str) -> None:
    routing = pair([[0, 1]] * 5, [[0, math.nan], [0, -1.0], [0, -0.0], [0, 0.0], [0, -math.inf]])
    taken = []
    for capacity in range(1, 6):
        got = fr.reroute(routing, 2, 0, capacity, overflow="drop", fill="any")
        taken.append((got.experts == 1).any(1).nonzero()[:, 0].tolist())
    assert taken == [[2], [2, 3], [1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_a_token_wants_as_many_experts_as_it_has_choices(backend: str) -> None:
    got = fr.reroute(pair([[0, -1, 1, 2], [0, 3, 1, 2]]), 4, 2, 1)
    assert got.experts.tolist() == [[0, -1], [3, 1]]


def test_an_expert_named_before_is_not_asked_again(backend: str) -> None:
    got = fr.reroute(pair([[0, 0, 0, 1]]), 2, 2, 1)
    assert got.experts.tolist() == [[0, 1]]  # the second choice found no room, nor would column 2
    got = fr.reroute(pair([[0, 1, 1, 0]]), 2, 1, 2, fill="any")
    assert got.experts.tolist() == [[0, 1, -1, -1]]


# ---- reference ---------------------------------------------------------------------------------


def test_equals_reference(backend: str) -> None:
    for i, case in enumerate(reroute_cases(1, vm_backend.repeats(800, vm=200))):
        try:
            assert_routing(fr.reroute(**case), reference.reroute(**case))
        except Exception as error:
            raise AssertionError(f"case {i}: {describe(case)}") from error


def test_the_check_has_power(backend: str) -> None:
    case = {"routing": pair([[0, 1], [0, 2], [1, 0]]), "num_experts": 3, "top_k": 1, "capacity": 1}
    wanted = reference.reroute(**case).experts
    assert_has_power(lambda actual: assert_exact(actual, wanted), fr.reroute(**case).experts)


@pytest.mark.parametrize("policy", ["position", "score"])
def test_large_case_equals_reference(backend: str, policy: str) -> None:
    generator = torch.Generator().manual_seed(4)
    num_tokens = vm_backend.repeats(3000, vm=300)
    logits = torch.randn(num_tokens, 32, generator=generator) + torch.linspace(2, 0, 32)
    routing = fr.gate(logits, 12)
    for fill in (None, "any"):
        case = {
            "num_experts": 32,
            "top_k": 4,
            "capacity": num_tokens // 8,
            "drop_policy": policy,
            "fill": fill,
        }
        assert_routing(fr.reroute(routing, **case), reference.reroute(routing, **case))


@pytest.mark.parametrize("policy", ["position", "score"])
def test_without_other_rules_it_keeps_what_a_plan_keeps(backend: str, policy: str) -> None:
    for case in reroute_cases(2, vm_backend.repeats(150, vm=10)):
        experts, weights = case["routing"]
        top_k = case["top_k"]
        scopes = {k: case[k] for k in ("scope_ids", "num_scopes") if k in case}
        options = {"capacity": case["capacity"], "drop_policy": policy, **scopes}
        got = fr.reroute(case["routing"], case["num_experts"], top_k, overflow="drop", **options)
        plan = fr.plan_dispatch(
            experts[:, :top_k], case["num_experts"], weights=weights[:, :top_k], **options
        )
        kept = torch.where(plan.slot_to_row >= 0, experts[:, :top_k].int(), -1)
        assert torch.equal(got.experts.sort(1).values, kept.sort(1).values)
        assert torch.equal(got.demand, plan.kept)


def test_a_plan_of_the_result_drops_nothing(backend: str) -> None:
    for case in reroute_cases(3, vm_backend.repeats(150, vm=10)):
        got = fr.reroute(**case)
        scopes = {k: case[k] for k in ("scope_ids", "num_scopes") if k in case}
        plan = fr.plan_dispatch(
            got.experts, case["num_experts"], capacity=case["capacity"], **scopes
        )
        assert not plan.dropped.any()
        assert torch.equal(plan.kept, got.demand)
        # A token's experts stand first.
        assert not ((got.experts[:, 1:] >= 0) & (got.experts[:, :-1] < 0)).any()
        assert not got.weights[got.experts < 0].any()


def test_rectified_router_fills_every_expert(backend: str) -> None:
    """R14: after the intra-rank step and fill-in every expert holds exactly its capacity."""
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(64, 8, generator=generator) + torch.linspace(3, 0, 8)
    routing = fr.gate(logits, 8)
    homes = (torch.arange(8) // 2).int()
    places = (torch.arange(64) // 16).int()
    case = {"overflow": "local", "rank_of_expert": homes, "rank_of_token": places}
    local = fr.reroute(routing, 8, 2, 16, **case)
    filled = fr.reroute(routing, 8, 2, 16, fill="any", **case)
    assert filled.demand.tolist() == [16] * 8
    before = fr.reroute(routing, 8, 2, 16, overflow="drop")
    for token in range(64):
        moved = set(local.experts[token].tolist()) - set(before.experts[token].tolist()) - {-1}
        assert {int(homes[e]) for e in moved} <= {int(places[token])}


# ---- determinism and isolation -----------------------------------------------------------------


def test_thousand_runs_and_threads_are_equal(backend: str, threads) -> None:
    generator = torch.Generator().manual_seed(2)
    routing = fr.gate((torch.randn(64, 16, generator=generator) * 4).round() / 4, 8)
    case = {"drop_policy": "score", "fill": "any"}
    wanted = fr.reroute(routing, 16, 2, 6, **case)
    for run in range(1000):
        if run % 125 == 0:
            threads(run // 125 + 1)
        got = fr.reroute(routing, 16, 2, 6, **case)
        assert torch.equal(got.experts, wanted.experts)
        assert torch.equal(got.weights, wanted.weights)


@pytest.mark.parametrize("fill", [None, "turned_away", "any"])
def test_what_a_request_gets_never_depends_on_another(backend: str, fill: str | None) -> None:
    generator = torch.Generator().manual_seed(9)
    for trial in range(vm_backend.repeats(30, vm=4)):
        num_tokens = int(torch.randint(1, 60, (), generator=generator))
        routing = fr.gate(torch.randn(num_tokens, 6, generator=generator).round(), 5)
        scopes = torch.randint(0, 4, (num_tokens,), generator=generator).int()
        options = {"drop_policy": ("position", "score")[trial % 2], "fill": fill}
        mixed = fr.reroute(routing, 6, 2, 1 + trial % 4, scope_ids=scopes, num_scopes=4, **options)
        for scope in range(4):
            mine = scopes == scope
            own = (routing.experts[mine], routing.weights[mine])
            alone = fr.reroute(own, 6, 2, 1 + trial % 4, **options)
            assert torch.equal(mixed.experts[mine], alone.experts)
            assert torch.equal(mixed.weights[mine], alone.weights)


# ---- gradients ---------------------------------------------------------------------------------


def test_gradients_reach_the_weights_of_the_experts_given(backend: str) -> None:
    experts, _ = pair([[0, 1, 2], [0, 1, 2], [0, 2, 1]])
    weights = torch.rand(3, 3, dtype=torch.float64).requires_grad_()
    got = fr.reroute((experts, weights), 3, 1, 1)
    assert got.experts.tolist() == [[0], [1], [2]]
    (grad,) = torch.autograd.grad(
        (got.weights * torch.tensor([[1.0], [2.0], [3.0]])).sum(), weights
    )
    assert grad.tolist() == [[1, 0, 0], [0, 2, 0], [0, 3, 0]]
    assert torch.autograd.gradcheck(lambda w: fr.reroute((experts, w), 3, 1, 1).weights, (weights,))


# ---- registration ------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("fill", [0, 2])
def test_opcheck(backend: str, local: bool, fill: int) -> None:
    experts, weights = pair([[0, 1], [0, 2], [0, 1]])
    ranks = (torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32))
    torch.library.opcheck(
        torch.ops.fastmoe_route.reroute.default,
        (experts, weights, 3, 1, 1, 2 if local else 1, fill, 1, ranks[0], 2, *ranks),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    def layer(logits: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        capacity = fr.expert_capacity(logits.shape[0], 4, 2, 1.0)
        routing = fr.reroute(fr.gate(logits, 4), 4, 2, capacity, fill="turned_away")
        plan = fr.plan_dispatch(routing.experts, 4)
        weights = fr.renormalize_after_drop(routing.weights, plan)
        counts = fr.drop_counts(routing.experts, plan)
        order = fr.batch_priority(weights)
        return fr.pass_through(x * 2, x, plan, weights), weights, counts.asked, order

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (6, 11):
        logits, x = torch.randn(num_tokens, 4), torch.randn(num_tokens, 8)
        for got, wanted in zip(compiled(logits, x), layer(logits, x), strict=True):
            assert_exact(got, wanted)


def test_export(backend: str) -> None:
    class Reroute(torch.nn.Module):
        def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
            return fr.reroute(fr.gate(logits, 4), 4, 2, 3)[:2]

    tokens = {"logits": {0: torch.export.Dim("tokens", min=2)}}
    program = torch.export.export(Reroute(), (torch.randn(6, 4),), dynamic_shapes=tokens)
    other = torch.randn(13, 4)
    for got, wanted in zip(program.module()(other), Reroute()(other), strict=True):
        assert_exact(got, wanted)


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (3, 0), (1, 1)])
@pytest.mark.parametrize("fill", [None, "any"])
def test_empty_and_single(backend: str, shape: tuple, fill: str | None) -> None:
    experts = torch.zeros(shape, dtype=torch.int32)
    case = {"num_experts": 2, "top_k": shape[1], "capacity": 1, "fill": fill}
    routing = (experts, torch.ones(shape))
    assert_routing(fr.reroute(routing, **case), reference.reroute(routing, **case))


def test_huge_capacity_and_scopes_do_not_size_anything(backend: str) -> None:
    scopes = torch.tensor([2**31 - 1, 5], dtype=torch.int32)
    got = fr.reroute(
        pair([[65535, 0], [65535, 1]]), 65536, 1, 2**70, scope_ids=scopes, num_scopes=2**31
    )
    assert got.experts.tolist() == [[65535], [65535]]


def test_statistics_are_handed_on(backend: str) -> None:
    routing = fr.gate(torch.randn(5, 4), 4, stats=True, keep_scores=True)
    got = fr.reroute(routing, 4, 2, 3)
    assert all(a is b for a, b in zip(got[3:], routing[3:], strict=True))


# ---- layouts -----------------------------------------------------------------------------------


def test_layouts(backend: str, guarded) -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.rand(40, 8, generator=generator).argsort(1).int()
    weights = torch.rand(40, 8, generator=generator)
    case = {"num_experts": 8, "top_k": 2, "capacity": 11, "drop_policy": "score", "fill": "any"}
    wanted = reference.reroute((plain, weights), **case)
    views = (
        guarded(plain),
        plain.t().contiguous().t(),
        plain.repeat_interleave(2, 1)[:, ::2],
        torch.cat([plain, plain * 0 + 77], 1)[:, :8],
    )
    for experts in views:
        for strided in (guarded(weights), weights.t().contiguous().t()):
            assert_routing(fr.reroute((experts, strided), **case), wanted)


# ---- errors ------------------------------------------------------------------------------------

ROUTING = (torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2))
INT = torch.tensor([0, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"routing": ROUTING[0]}, TypeError, r"routing must be a Routing or a pair"),
        ({"routing": (ROUTING[0],)}, TypeError, r"routing must be a Routing or a pair"),
        ({"routing": (ROUTING[0].float(), ROUTING[1])}, TypeError, r"experts must be int32 or"),
        ({"routing": (ROUTING[0][0], ROUTING[1])}, ValueError, r"experts must have 2 dimensions"),
        (
            {"routing": (ROUTING[0], ROUTING[1][:1])},
            ValueError,
            r"weights must have shape \[2, 2\]",
        ),
        ({"routing": (ROUTING[0], ROUTING[0])}, TypeError, r"weights must be float32 or"),
        ({"num_experts": 0}, ValueError, r"num_experts must be in \[1, 65536\], got 0"),
        ({"top_k": 3}, ValueError, r"top_k must be in \[0, 2\], got 3"),
        ({"top_k": -1}, ValueError, r"top_k must be in \[0, 2\], got -1"),
        ({"capacity": 0}, ValueError, r"capacity must be at least 1, got 0"),
        ({"capacity": None}, TypeError, r"capacity must be an int, got None"),
        ({"overflow": "residual"}, ValueError, r"overflow must be one of drop, next, local"),
        ({"fill": "all"}, ValueError, r"fill must be None, 'turned_away' or 'any', got 'all'"),
        ({"drop_policy": "random"}, ValueError, r"drop_policy must be one of position, score"),
        ({"num_scopes": 0}, ValueError, r"num_scopes must be in \[1, 2147483648\], got 0"),
        ({"scope_ids": INT[:1]}, ValueError, r"scope_ids must have shape \[2\]"),
        ({"scope_ids": INT.long()}, TypeError, r"scope_ids must be int32, got int64"),
        ({"overflow": "local"}, ValueError, r"rank_of_expert must be given with overflow 'local'"),
        ({"rank_of_expert": INT}, ValueError, r"rank_of_expert must have shape \[3\]"),
        ({"rank_of_token": INT.float()}, TypeError, r"rank_of_token must be int32"),
    ],
)
def test_arguments(backend: str, options: dict, kind: type, message: str) -> None:
    case = {"routing": ROUTING, "num_experts": 3, "top_k": 1, "capacity": 1}
    with pytest.raises(kind, match="^reroute: " + message):
        fr.reroute(**(case | options))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("stray", [-2, 3, 2**31 - 1, -(2**31), 2**32, 2**32 + 1])
def test_stray_ids(backend: str, dtype: torch.dtype, stray: int) -> None:
    if dtype == torch.int32 and stray >= 2**31:
        pytest.skip("no int32")
    experts = torch.tensor([[0, 1], [1, stray]], dtype=dtype)
    message = rf"reroute: experts must be in \[-1, 3\), got {stray} at token 1, column 1"
    with pytest.raises(RuntimeError, match=message):
        fr.reroute((experts, torch.ones(2, 2)), 3, 1, 1)
    if dtype == torch.int32:
        scopes = torch.tensor([0, stray], dtype=torch.int32)
        message = rf"reroute: scope_ids must be in \[0, 2\), got {stray} at token 1"
        with pytest.raises(RuntimeError, match=message):
            fr.reroute(ROUTING, 3, 1, 1, scope_ids=scopes, num_scopes=2)


def test_raw_op_checks_its_own_arguments(backend: str) -> None:
    names = ("weights", "num_experts", "top_k", "capacity", "overflow", "fill", "drop_policy")
    names += ("scope_ids", "num_scopes", "rank_of_expert", "rank_of_token")
    good = dict(zip(names, (None, 3, 1, 1, 1, 0, 0, None, 1, None, None), strict=True))
    for options, message in (
        ({"drop_policy": 1}, "weights"),
        ({"fill": 1, "weights": torch.ones(1, 2)}, "weights"),
        ({"num_experts": 2**20}, "num_experts"),
        ({"top_k": 5}, "top_k"),
        ({"capacity": 0}, "capacity"),
        ({"overflow": 3}, "overflow"),
        ({"overflow": 2}, "rank_of_expert and rank_of_token"),
        ({"fill": -1}, "fill"),
        ({"drop_policy": 2}, "drop_policy"),
        ({"scope_ids": INT.float()}, "scope_ids"),
        ({"num_scopes": 0}, "num_scopes"),
        ({"rank_of_token": INT[:1]}, "rank_of_token"),
    ):
        with pytest.raises(RuntimeError, match=f"reroute: {message} must"):
            torch.ops.fastmoe_route.reroute(ROUTING[0], **(good | options))
    wide = torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15)
    with pytest.raises(RuntimeError, match=r"experts must hold fewer than 2\^31 slots"):
        torch.ops.fastmoe_route.reroute(wide, **(good | {"top_k": 0}))
