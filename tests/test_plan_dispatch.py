"""plan_dispatch and expert_capacity. Tolerance class: exact."""

from __future__ import annotations

import math

import fastmoe_route as fr
import pytest
import torch
import vm_backend
from cases import describe, plan_cases
from fastmoe_route import DispatchPlan, reference
from tolerance import assert_exact, assert_has_power
from torch import Tensor

TILE_SLOTS = 16384  # slots counted by one thread; above it the plan is made by tiles


def assert_plan(actual: DispatchPlan, expected: DispatchPlan) -> None:
    for name, got, wanted in zip(actual._fields, actual, expected, strict=True):
        assert got.is_contiguous(), name
        assert_exact(got, wanted)


def assert_valid(plan: DispatchPlan, experts: Tensor, num_experts: int, align: int = 1) -> None:
    """What any plan owes, for sizes at which the oracle is slow."""
    offsets, row_to_slot, slot_to_row, kept, dropped = (t.long() for t in plan)
    ids = experts.flatten().long()
    assert offsets[0] == 0
    assert torch.equal(offsets.diff(), (kept + align - 1) // align * align)
    demand = torch.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)
    assert torch.equal(kept + dropped, demand)
    used_rows = (row_to_slot >= 0).nonzero()[:, 0]
    used_slots = row_to_slot[used_rows]
    assert torch.equal(slot_to_row.flatten()[used_slots], used_rows)
    assert int((slot_to_row >= 0).sum()) == used_rows.numel() == int(kept.sum())
    expert_of_row = torch.searchsorted(offsets, used_rows, right=True) - 1
    assert torch.equal(ids[used_slots], expert_of_row)
    first = offsets[expert_of_row]
    assert bool((used_rows - first < kept[expert_of_row]).all())
    same_expert = expert_of_row[1:] == expert_of_row[:-1]
    assert bool((used_slots.diff()[same_expert] > 0).all())


# ---- literals ----------------------------------------------------------------------------------


def test_three_tokens(backend: str) -> None:
    experts = torch.tensor([[0, 2], [2, -1], [2, 0]], device=backend)
    plan = fr.plan_dispatch(experts, 3)
    assert plan.offsets.tolist() == [0, 2, 2, 5]
    assert plan.row_to_slot.tolist() == [0, 5, 1, 2, 4, -1]
    assert plan.slot_to_row.tolist() == [[0, 2], [3, -1], [4, 1]]
    assert plan.kept.tolist() == [2, 0, 3]
    assert plan.dropped.tolist() == [0, 0, 0]


def test_alignment_pads_each_expert(backend: str) -> None:
    experts = torch.tensor([[0, 2], [2, -1], [2, 0]], device=backend)
    plan = fr.plan_dispatch(experts, 3, align=4)
    assert plan.offsets.tolist() == [0, 4, 4, 8]
    assert plan.row_to_slot.tolist() == [0, 5, -1, -1, 1, 2, 4, -1] + [-1] * 7
    assert plan.slot_to_row.tolist() == [[0, 4], [5, -1], [6, 1]]


def test_position_keeps_first_choices_before_second_choices(backend: str) -> None:
    experts = torch.tensor([[1, 0], [2, 0], [0, 1]], device=backend)
    plan = fr.plan_dispatch(experts, 3, capacity=1)
    # Expert 0 is the first choice of token 2, the second of tokens 0 and 1.
    assert plan.row_to_slot.tolist() == [4, 0, 2]
    assert plan.slot_to_row.tolist() == [[1, -1], [2, -1], [0, -1]]
    assert plan.kept.tolist() == [1, 1, 1]
    assert plan.dropped.tolist() == [2, 1, 0]


def test_score_keeps_larger_weights_and_nan_last(backend: str) -> None:
    experts = torch.zeros(5, 1, dtype=torch.int32, device=backend)
    weights = torch.tensor([[math.nan], [0.0], [-1.0], [-0.0], [-math.inf]], device=backend)
    kept = [
        fr.plan_dispatch(experts, 1, capacity=c, drop_policy="score", weights=weights)
        .row_to_slot[:c]
        .tolist()
        for c in range(1, 6)
    ]
    # Both zeros are equal, so the lower slot goes first; NaN is worse than -inf.
    assert kept == [[1], [1, 3], [1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_capacity_is_per_scope(backend: str) -> None:
    experts = torch.tensor([[0], [0], [0], [0]], device=backend)
    scopes = torch.tensor([1, 0, 1, 0], dtype=torch.int32, device=backend)
    plan = fr.plan_dispatch(experts, 1, capacity=1, scope_ids=scopes, num_scopes=2)
    assert plan.row_to_slot.tolist() == [0, 1]
    assert plan.slot_to_row.tolist() == [[0], [1], [-1], [-1]]
    assert plan.dropped.tolist() == [2]


def test_duplicates_get_two_rows_and_the_sentinel_none(backend: str) -> None:
    experts = torch.tensor([[1, 1], [2, 1]], device=backend)
    plan = fr.plan_dispatch(experts, 2, allow_unrouted=True)
    assert plan.offsets.tolist() == [0, 0, 3]
    assert plan.slot_to_row.tolist() == [[0, 1], [-1, 2]]


def test_expert_capacity() -> None:
    assert fr.expert_capacity(100, 8, 2, 1.25) == 32
    assert fr.expert_capacity(10, 4, 1, 1.0) == 3
    assert fr.expert_capacity(10, 4, 1, 1.0, min_capacity=4) == 4
    assert fr.expert_capacity(10, 4, 1, 1.0, min_capacity=5, multiple_of=4) == 8
    assert fr.expert_capacity(0, 4, 2, 2.0) == 1
    assert fr.expert_capacity(10, 4, 1, 0.0) == 1


# ---- reference ---------------------------------------------------------------------------------


def test_equals_reference(backend: str) -> None:
    for i, case in enumerate(plan_cases(1, vm_backend.repeats(1000, vm=150))):
        try:
            assert_plan(fr.plan_dispatch(**case), reference.plan_dispatch(**case))
        except Exception as error:
            raise AssertionError(f"case {i}: {describe(case)}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_score_equals_reference_for_every_dtype(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    experts = torch.randint(-1, 4, (200, 3), generator=generator)
    weights = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    weights[::7] = 1e-300  # distinct from zero in float64 only
    weights[3::7] = math.inf
    case = {
        "experts": experts,
        "num_experts": 4,
        "capacity": 20,
        "drop_policy": "score",
        "weights": weights.to(dtype),
    }
    assert_plan(fr.plan_dispatch(**case), reference.plan_dispatch(**case))


def test_the_check_has_power(backend: str) -> None:
    case = {"experts": torch.tensor([[0, 1], [2, 0], [1, 2]]), "num_experts": 3}
    wanted = reference.plan_dispatch(**case).slot_to_row
    assert_has_power(
        lambda actual: assert_exact(actual, wanted), fr.plan_dispatch(**case).slot_to_row
    )


@pytest.mark.parametrize("policy", ["position", "score"])
@pytest.mark.parametrize("num_scopes", [1, 7])
def test_tiled_equals_reference(backend: str, policy: str, num_scopes: int) -> None:
    """Several tiles of slots, uneven experts, scopes in no order."""
    generator = torch.Generator().manual_seed(3)
    num_tokens, top_k, num_experts = 3 * TILE_SLOTS // 4 + 5, 5, 6
    experts = torch.rand(num_tokens, top_k, generator=generator).square() * (num_experts + 1)
    case = {
        "experts": experts.long() - 1,
        "num_experts": num_experts,
        "capacity": 9000 // num_scopes,
        "drop_policy": policy,
        "weights": torch.rand(num_tokens, top_k, generator=generator).bfloat16(),
        "scope_ids": torch.randint(0, num_scopes, (num_tokens,), generator=generator).int(),
        "num_scopes": num_scopes,
        "align": 8,
    }
    assert_plan(fr.plan_dispatch(**case), reference.plan_dispatch(**case))


# ---- determinism and isolation -----------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "position", "score", "scopes"])
def test_threads_do_not_show(backend: str, threads, options: str) -> None:
    generator = torch.Generator().manual_seed(11)
    num_tokens, top_k, num_experts = 2 * TILE_SLOTS + 77, 4, 33
    experts = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator)
    weights = (torch.rand(num_tokens, top_k, generator=generator) * 16).round()
    scopes = torch.randint(0, 50, (num_tokens,), generator=generator).int()
    case = {
        "plain": {},
        "position": {"capacity": 3000},
        "score": {"capacity": 3000, "drop_policy": "score", "weights": weights},
        "scopes": {"capacity": 60, "scope_ids": scopes, "num_scopes": 50, "align": 64},
    }[options]
    threads(1)
    wanted = fr.plan_dispatch(experts, num_experts, **case)
    assert_valid(wanted, experts, num_experts, case.get("align", 1))
    for n in range(2, 9):
        threads(n)
        assert_plan(fr.plan_dispatch(experts, num_experts, **case), wanted)


@pytest.mark.parametrize("options", ["plain", "score"])
def test_thousand_runs_are_equal(backend: str, threads, options: str) -> None:
    """Nine tiles on 1 to 8 threads; `score` turns slots away, and threads fill the padding."""
    generator = torch.Generator().manual_seed(2)
    num_tokens, num_experts = vm_backend.repeats(2 * TILE_SLOTS + 77, vm=300), 33
    ids = torch.randint(-1, num_experts, (num_tokens, 4), generator=generator)
    ids[::5] = ids[::5].clamp(max=2)  # the first experts are asked for too often
    weights = (torch.rand(num_tokens, 4, generator=generator) * 16).round()
    case = {
        "plain": {},
        "score": {
            "capacity": num_tokens * 4 // 25,
            "drop_policy": "score",
            "weights": weights,
            "align": vm_backend.repeats(TILE_SLOTS, vm=8),
        },
    }[options]
    experts = ids.int()
    threads(1)
    wanted = fr.plan_dispatch(experts, num_experts, **case)
    assert_valid(wanted, experts, num_experts, case.get("align", 1))
    assert (int(wanted.dropped.sum()) > num_tokens // 5) == (options == "score")
    num_runs = vm_backend.repeats(1000, vm=16)
    for n in range(1, 9):
        threads(n)
        for _ in range(num_runs // 8):
            plan = fr.plan_dispatch(experts, num_experts, **case)
            assert all(torch.equal(a, b) for a, b in zip(plan, wanted, strict=True))


@pytest.mark.parametrize("policy", ["position", "score"])
@pytest.mark.parametrize("num_attackers", [1, 300])
def test_attack_works_on_shared_capacity_and_fails_on_scopes(
    backend: str, policy: str, num_attackers: int
) -> None:
    """An attacker's tokens stand first and shout loudest for the victim's experts.

    The buffer overflow of arXiv:2402.05526: with one capacity for the whole batch the victim loses
    slots; with a scope for each request it keeps exactly what it keeps alone.
    """
    generator = torch.Generator().manual_seed(7)
    num_experts, capacity = 8, 3
    victim = torch.randint(0, num_experts, (12, 2), generator=generator)
    victim_weights = torch.rand(12, 2, generator=generator)
    attacker = victim[:1].expand(num_attackers, 2)

    def kept(shared: bool, with_attacker: bool) -> Tensor:
        n = num_attackers if with_attacker else 0
        weights = torch.cat([torch.full((n, 2), 100.0), victim_weights])
        scopes = torch.cat([torch.full((n,), 1), torch.zeros(12)]).int()
        plan = fr.plan_dispatch(
            torch.cat([attacker[:n], victim]),
            num_experts,
            capacity=capacity,
            drop_policy=policy,
            weights=weights,
            scope_ids=None if shared else scopes,
            num_scopes=1 if shared else 2,
        )
        return plan.slot_to_row[n:] >= 0

    alone = kept(shared=True, with_attacker=False)
    assert bool((alone & ~kept(shared=True, with_attacker=True)).any())
    assert torch.equal(kept(shared=False, with_attacker=True), alone)


def test_what_a_request_keeps_never_depends_on_another(backend: str) -> None:
    """Every request of a mixed batch, in any order of its tokens, keeps what it keeps alone."""
    generator = torch.Generator().manual_seed(9)
    for trial in range(vm_backend.repeats(60, vm=8)):
        num_tokens = int(torch.randint(1, 80, (), generator=generator))
        experts = torch.randint(-1, 5, (num_tokens, 3), generator=generator)
        weights = (torch.rand(num_tokens, 3, generator=generator) * 8).round()
        scopes = torch.randint(0, 6, (num_tokens,), generator=generator).int()
        if trial % 2:
            scopes = scopes.sort().values
        case = {"capacity": 1 + trial % 4, "drop_policy": ("position", "score")[trial % 3 == 0]}
        mixed = fr.plan_dispatch(
            experts, 5, weights=weights, scope_ids=scopes, num_scopes=6, **case
        )
        for scope in range(6):
            mine = scopes == scope
            alone = fr.plan_dispatch(experts[mine], 5, weights=weights[mine], **case)
            assert torch.equal(mixed.slot_to_row[mine] >= 0, alone.slot_to_row >= 0)


# ---- registration ------------------------------------------------------------------------------


def op_arguments(**options: object) -> tuple:
    experts = torch.tensor([[0, 2], [2, -1], [2, 0]])
    names = ("capacity", "drop_policy", "weights", "scope_ids", "num_scopes", "align", "max_rows")
    defaults = dict(zip(names, (0, 0, None, None, 1, 1, -1), strict=True))
    return (experts, 3, *(defaults | options).values(), False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity": 1, "align": 4},
        {"capacity": 1, "drop_policy": 1, "weights": torch.rand(3, 2)},
        {"capacity": 1, "scope_ids": torch.tensor([0, 1, 1], dtype=torch.int32), "num_scopes": 2},
        {"max_rows": 5},
    ],
)
def test_opcheck(backend: str, options: dict) -> None:
    torch.library.opcheck(
        torch.ops.fastmoe_route.plan_dispatch.default,
        op_arguments(**options),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_opcheck_of_the_plain_op(backend: str) -> None:
    torch.library.opcheck(
        torch.ops.fastmoe_route.plan_dispatch_plain_forward.default,
        op_arguments()[:2],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    def plan(experts: Tensor, weights: Tensor) -> DispatchPlan:
        capacity = fr.expert_capacity(experts.shape[0], 8, experts.shape[1], 1.25)
        return fr.plan_dispatch(
            experts, 8, capacity=capacity, drop_policy="score", weights=weights, align=4
        )

    compiled = torch.compile(plan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (16, 33):
        experts, weights = torch.randint(-1, 8, (num_tokens, 2)), torch.rand(num_tokens, 2)
        assert_plan(compiled(experts, weights), plan(experts, weights))


def test_export(backend: str) -> None:
    class Plan(torch.nn.Module):
        def forward(self, experts: Tensor) -> tuple[Tensor, ...]:
            return tuple(fr.plan_dispatch(experts, 8, align=2))

    tokens = torch.export.Dim("tokens", min=2)
    experts = torch.randint(-1, 8, (16, 2))
    program = torch.export.export(Plan(), (experts,), dynamic_shapes={"experts": {0: tokens}})
    other = torch.randint(-1, 8, (21, 2))
    assert_plan(DispatchPlan(*program.module()(other)), fr.plan_dispatch(other, 8, align=2))


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2), (0, 0), (3, 0), (1, 1)])
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("capacity", [None, 2])
def test_empty_and_single(backend: str, shape: tuple, align: int, capacity: int | None) -> None:
    case = {
        "experts": torch.zeros(shape, dtype=torch.int32),
        "num_experts": 3,
        "align": align,
        "capacity": capacity,
        "scope_ids": torch.zeros(shape[0], dtype=torch.int32),
    }
    assert_plan(fr.plan_dispatch(**case), reference.plan_dispatch(**case))


@pytest.mark.parametrize("num_slots", [TILE_SLOTS - 1, TILE_SLOTS, TILE_SLOTS + 1])
@pytest.mark.parametrize("kind", ["one expert", "even", "none"])
def test_around_the_tile(backend: str, num_slots: int, kind: str) -> None:
    slots = torch.arange(num_slots)
    ids = {"one expert": slots * 0 + 1, "even": slots % 3, "none": slots * 0 - 1}[kind]
    experts = ids[:, None]
    assert_valid(fr.plan_dispatch(experts, 3), experts, 3)
    plan = fr.plan_dispatch(experts, 3, capacity=100)
    assert_valid(plan, experts, 3)
    assert plan.kept.max() == (0 if kind == "none" else 100)


@pytest.mark.parametrize(
    ("num_slots", "num_experts", "align"),
    [
        *((512, 3, 1), (2047, 130, 4), (2048, 512, 1), (2050, 512, 8), (4094, 31, 1)),
        *((140_002, 512, 8), (34_000, 9, 32_768)),
    ],
)
def test_around_the_tiles_of_cuda(
    backend: str, num_slots: int, num_experts: int, align: int
) -> None:
    """No count up to 2,048 slots; several chunks a tile past 131,072; more tiles than padding."""
    generator = torch.Generator().manual_seed(num_slots)
    experts = torch.randint(-1, num_experts, (num_slots // 2, 2), generator=generator).int()
    experts = experts.to(backend)
    for ids in (experts, experts.T.contiguous().T):
        assert_valid(fr.plan_dispatch(ids, num_experts, align=align), ids, num_experts, align)


@pytest.mark.parametrize("num_experts", [1, 3000, pytest.param(65536, marks=pytest.mark.cpu_only)])
def test_extreme_numbers_of_experts(backend: str, num_experts: int) -> None:
    for experts in ([[0]], [[num_experts - 1]], [[num_experts - 1, 0], [-1, 0]]):
        ids = torch.tensor(experts)
        for options in ({}, {"capacity": 1}, {"align": 2}):
            plan = fr.plan_dispatch(ids, num_experts, **options)
            assert_plan(plan, reference.plan_dispatch(ids, num_experts, **options))


@pytest.mark.cpu_only  # 65,536 experts are a minute in the vm
def test_huge_arguments_do_not_size_anything(backend: str) -> None:
    experts = torch.tensor([[0, 1], [1, -1]])
    scopes = torch.tensor([2**31 - 1, 5], dtype=torch.int32)
    plan = fr.plan_dispatch(
        experts,
        65536,
        capacity=2**70,
        scope_ids=scopes,
        num_scopes=2**31,
        max_rows=2**70,
    )
    assert plan.row_to_slot.tolist() == [0, 1, 2, -1]
    plan = fr.plan_dispatch(experts, 2, align=2**20)
    assert plan.offsets.tolist() == [0, 2**20, 2**21]
    assert plan.slot_to_row.tolist() == [[0, 2**20], [2**20 + 1, -1]]


def test_max_rows_bounds_the_rows(backend: str) -> None:
    experts = torch.tensor([[0, -1, 1], [-1, 1, -1]])
    plan = fr.plan_dispatch(experts, 2, max_rows=3)
    assert plan.row_to_slot.tolist() == [0, 2, 4]
    empty = fr.plan_dispatch(experts * 0 - 1, 2, max_rows=0)
    assert empty.row_to_slot.shape == (0,)


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_layouts(backend: str, guarded, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.randint(-1, 9, (50, 6), generator=generator).to(dtype)
    weights = torch.rand(50, 6, generator=generator)
    case = {"capacity": 20, "drop_policy": "score", "align": 2}
    wanted = reference.plan_dispatch(plain, 9, weights=weights, **case)
    views = {
        "guarded": guarded(plain),
        "transposed": plain.t().contiguous().t(),
        "every other": plain.repeat_interleave(2, 1)[:, ::2],
        "rows apart": torch.cat([plain, plain * 0 + 77], 1)[:, :6],
    }
    for experts in views.values():
        for strided in (weights, weights.t().contiguous().t(), weights.repeat(1, 2)[:, 6:]):
            assert_plan(fr.plan_dispatch(experts, 9, weights=strided, **case), wanted)
    one = torch.tensor([[3]], dtype=dtype).expand(40, 2)
    assert_plan(fr.plan_dispatch(one, 9), reference.plan_dispatch(one, 9))


def test_strided_scopes(backend: str) -> None:
    experts = torch.tensor([[0], [0], [0]])
    scopes = torch.tensor([0, 99, 1, 99, 0, 99], dtype=torch.int32)[::2]
    plan = fr.plan_dispatch(experts, 1, capacity=1, scope_ids=scopes, num_scopes=2)
    assert plan.slot_to_row.tolist() == [[0], [1], [-1]]


# ---- errors ------------------------------------------------------------------------------------

EXPERTS = torch.tensor([[0, 1], [1, 2]])
SCOPES = torch.tensor([0, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"experts": [[0]]}, TypeError, r"experts must be a torch.Tensor, got \[\[0\]\]"),
        ({"experts": EXPERTS[0]}, ValueError, r"experts must have 2 dimensions, got int64 tensor"),
        ({"experts": EXPERTS.float()}, TypeError, r"experts must be int32 or int64, got float32"),
        ({"experts": EXPERTS.short()}, TypeError, r"experts must be int32 or int64, got int16"),
        ({"num_experts": 0}, ValueError, r"num_experts must be in \[1, 65536\], got 0"),
        ({"num_experts": 65537}, ValueError, r"num_experts must be in \[1, 65536\], got 65537"),
        ({"num_experts": 3.0}, TypeError, r"num_experts must be an int, got 3.0"),
        ({"num_experts": True}, TypeError, r"num_experts must be an int, got True"),
        ({"capacity": 0}, ValueError, r"capacity must be at least 1, got 0"),
        ({"capacity": -1}, ValueError, r"capacity must be at least 1, got -1"),
        ({"drop_policy": "random"}, ValueError, r"drop_policy must be one of position, score"),
        ({"drop_policy": "score"}, ValueError, r"weights must be given"),
        (
            {"drop_policy": "score", "weights": torch.ones(2, 1)},
            ValueError,
            r"weights must have shape \[2, 2\], got float32 tensor of shape \[2, 1\]",
        ),
        ({"drop_policy": "score", "weights": EXPERTS}, TypeError, r"weights must be float32 or"),
        ({"scope_ids": SCOPES[:1]}, ValueError, r"scope_ids must have shape \[2\]"),
        ({"scope_ids": SCOPES.long()}, TypeError, r"scope_ids must be int32, got int64"),
        ({"num_scopes": 0}, ValueError, r"num_scopes must be in \[1, 2147483648\], got 0"),
        ({"align": 0}, ValueError, r"align must be in \[1, 2147483647\], got 0"),
        ({"align": 2**31}, ValueError, r"align must be in \[1, 2147483647\], got 2147483648"),
        ({"align": 1.0}, TypeError, r"align must be an int, got 1.0"),
        ({"align": True}, TypeError, r"align must be an int, got True"),
        ({"num_scopes": 1.0}, TypeError, r"num_scopes must be an int, got 1.0"),
        ({"weights": torch.ones(2, 1)}, ValueError, r"weights must have shape \[2, 2\]"),
        ({"weights": 1.0}, TypeError, r"weights must be a torch.Tensor, got 1.0"),
        ({"allow_unrouted": 1}, TypeError, r"allow_unrouted must be a bool, got 1"),
        ({"max_rows": -1}, ValueError, r"max_rows must be at least 0, got -1"),
    ],
)
def test_arguments(backend: str, options: dict, kind: type, message: str) -> None:
    with pytest.raises(kind, match="plan_dispatch: " + message):
        fr.plan_dispatch(**({"experts": EXPERTS, "num_experts": 3} | options))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("stray", [-2, 8, 9, 2**31 - 1, -(2**31), 2**32, 2**32 + 3, -(2**63)])
@pytest.mark.parametrize("num_tokens", [3, TILE_SLOTS])
def test_stray_experts(backend: str, dtype: torch.dtype, stray: int, num_tokens: int) -> None:
    if dtype == torch.int32 and not -(2**31) <= stray < 2**31:
        pytest.skip("no int32")
    experts = torch.zeros(num_tokens, 3, dtype=dtype)
    experts[num_tokens - 1, 1] = experts[num_tokens - 1, 2] = stray
    message = rf"experts must be in \[-1, 8\), got {stray} at token {num_tokens - 1}, slot 1"
    with pytest.raises(RuntimeError, match="plan_dispatch: " + message):
        fr.plan_dispatch(experts, 8)
    if stray == 8:
        fr.plan_dispatch(experts, 8, allow_unrouted=True)
    else:
        with pytest.raises(RuntimeError, match=rf"\[-1, 8\], got {stray} at token"):
            fr.plan_dispatch(experts, 8, allow_unrouted=True)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("stray", [-2, 5, 2**31 - 1, -(2**31)])
def test_a_stray_expert_at_any_place(backend: str, dtype: torch.dtype, stray: int) -> None:
    """In the blocks that are looked at as a whole, and among the ids behind the last one."""
    for where in range(70):
        experts = torch.tensor([-1] * where + [stray] + [4] * (69 - where), dtype=dtype)
        with pytest.raises(RuntimeError, match=rf"got {stray} at token {where}, slot 0"):
            fr.plan_dispatch(experts[:, None], 5)


@pytest.mark.cpu_only
@pytest.mark.parametrize("stray", [-1, 2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("capacity", [None, 1])
def test_stray_scopes(backend: str, stray: int, capacity: int | None) -> None:
    scopes = torch.tensor([0, stray, stray], dtype=torch.int32)
    message = rf"plan_dispatch: scope_ids must be in \[0, 2\), got {stray} at token 1"
    with pytest.raises(RuntimeError, match=message):
        fr.plan_dispatch(
            torch.zeros(3, 1, dtype=torch.int32),
            1,
            capacity=capacity,
            scope_ids=scopes,
            num_scopes=2,
        )


@pytest.mark.cpu_only
def test_too_many_slots_for_max_rows(backend: str) -> None:
    message = "plan_dispatch: max_rows must be at least the 4 slots in use, got 3"
    with pytest.raises(RuntimeError, match=message):
        fr.plan_dispatch(EXPERTS, 3, max_rows=3)
    assert fr.plan_dispatch(EXPERTS, 3, max_rows=3, capacity=1).kept.tolist() == [1, 1, 1]


def test_sizes_past_int32(backend: str) -> None:
    wide = torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15)
    with pytest.raises(RuntimeError, match=r"experts must hold fewer than 2\^31 slots, got shape"):
        fr.plan_dispatch(wide, 1)
    with pytest.raises(RuntimeError, match=r"align must keep the plan below 2\^31 rows"):
        fr.plan_dispatch(EXPERTS, 65536, align=2**31 - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": -1}, r"num_tokens must be at least 0, got -1"),
        ({"num_experts": 0}, r"num_experts must be at least 1, got 0"),
        ({"factor": 1e308}, r"factor must give a finite capacity, got 1e\+308"),
        ({"factor": -1.0}, r"factor must be finite and at least 0, got -1.0"),
        ({"factor": math.nan}, r"factor must be finite and at least 0, got nan"),
        ({"min_capacity": 0}, r"min_capacity must be at least 1, got 0"),
        ({"multiple_of": 0}, r"multiple_of must be at least 1, got 0"),
    ],
)
def test_expert_capacity_arguments(options: dict, message: str) -> None:
    case = {"num_tokens": 8, "num_experts": 2, "top_k": 1, "factor": 1.0}
    with pytest.raises(ValueError, match="expert_capacity: " + message):
        fr.expert_capacity(**(case | options))
    for factor in ("1", None, True):
        with pytest.raises(TypeError, match="expert_capacity: factor must be a number, got"):
            fr.expert_capacity(8, 2, 1, factor)  # type: ignore[arg-type]


def test_raw_op_checks_its_own_arguments(backend: str) -> None:
    op = torch.ops.fastmoe_route.plan_dispatch
    for options, message in (
        ({"capacity": -1}, "capacity"),
        ({"drop_policy": 2}, "drop_policy"),
        ({"capacity": 1, "drop_policy": 1}, "weights"),
        ({"scope_ids": torch.zeros(2, dtype=torch.int32)}, "scope_ids"),
        ({"scope_ids": torch.zeros(3)}, "scope_ids"),
        ({"num_scopes": 0}, "num_scopes"),
        ({"align": 0}, "align"),
        ({"max_rows": -2}, "max_rows"),
    ):
        with pytest.raises(RuntimeError, match=f"plan_dispatch: {message} must"):
            op(*op_arguments(**options))
