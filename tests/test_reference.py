"""The oracle of everything but the gate: hand-worked answers, peers' bugs, plain torch."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from fastmoe_route import reference
from fastmoe_route.reference import (
    grouped_mm,
    moe_mlp,
    permute,
    plan_dispatch,
    softmax,
    softmax_topk,
    unpermute,
)
from fastmoe_route.results import Routing
from tolerance import assert_bound, assert_exact, assert_literal

INF, NAN = math.inf, math.nan


def logs(*rows: list[float]) -> torch.Tensor:
    """Logits whose exponentials are the given numbers."""
    return torch.tensor(rows).log()


# ---- softmax -----------------------------------------------------------------------------------


def test_softmax_literals():
    assert_literal(softmax(logs([1, 3])), [[0.25, 0.75]])
    assert_literal(softmax(torch.tensor([[1000.0, 1000.0]])), [[0.5, 0.5]])  # e^1000 would overflow
    assert_literal(softmax(torch.tensor([-INF, 0.0])), [0.0, 1.0])
    assert_literal(softmax(torch.tensor([-INF, -INF])), [NAN, NAN])  # 0 / 0, as torch
    assert_literal(softmax(torch.tensor([INF, 0.0])), [NAN, NAN])
    assert_literal(softmax(logs([1, 3], [3, 1]), dim=0), [[0.25, 0.75], [0.75, 0.25]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("special", [0.0, -INF, INF, NAN])
def test_softmax_agrees_with_torch(dtype, special):
    x = torch.randn(7, 33, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[2, 3:9, 1] = special
    for dim in (0, 1, -1):
        got = softmax(x, dim)
        assert got.dtype == dtype
        assert_bound(got, torch.softmax(x.double(), dim), 2 * torch.finfo(dtype).eps)
    assert softmax(x[:0]).shape == (0, 33, 5)
    assert softmax(x, dtype=torch.float64).dtype == torch.float64


def test_softmax_topk_literals():
    values, columns = softmax_topk(logs([1, 2, 5]), 2)  # shares 1/8, 2/8, 5/8
    assert_literal(values, [[0.625, 0.25]])
    assert columns.tolist() == [[2, 1]]
    assert columns.dtype == torch.int64
    values, columns = softmax_topk(torch.zeros(4), 2)  # ties: the lower column
    assert_literal(values, [0.25, 0.25])
    assert columns.tolist() == [0, 1]
    assert softmax_topk(torch.tensor([-0.0, 0.0, -1.0]), 2)[1].tolist() == [0, 1]  # -0 ties with 0
    values, columns = softmax_topk(torch.tensor([NAN, -INF, 3.0]), 3)  # NaN below even -inf
    assert columns.tolist() == [2, 1, 0]
    assert values.isnan().all()
    # Ranked by x: both probabilities are 0 in float32, yet -200 is larger than -300.
    assert softmax_topk(torch.tensor([-300.0, 0.0, -200.0]), 2)[1].tolist() == [1, 2]


def test_softmax_topk_agrees_with_torch_on_distinct_values():
    x = torch.randn(9, 1000, generator=torch.Generator().manual_seed(1))
    values, columns = softmax_topk(x, 64)
    assert torch.equal(columns, x.topk(64).indices)
    assert_bound(values, torch.softmax(x.double(), -1).topk(64).values, 1e-6)
    assert softmax_topk(x.bfloat16(), 3)[0].dtype == torch.bfloat16


def test_falling_order_literals():
    order = reference.falling_order
    assert order(torch.tensor([1.0, 3.0, 2.0, 3.0])).tolist() == [1, 3, 2, 0]
    assert order(torch.tensor([NAN, -INF, INF, NAN])).tolist() == [2, 1, 0, 3]
    allowed = torch.tensor([False, True, True, False])
    # 9 is not allowed: behind even the allowed NaN, in order of its own.
    assert order(torch.tensor([9.0, NAN, -5.0, 9.5]), allowed).tolist() == [2, 1, 3, 0]


# ---- dispatch plan -----------------------------------------------------------------------------


def check_plan(plan, offsets, row_to_slot, slot_to_row, kept, dropped):
    for got, want in zip(plan, (offsets, row_to_slot, slot_to_row, kept, dropped), strict=True):
        assert_literal(got, want)


def test_plan_literals():
    # Slots 0..5 ask for 1, 0, 1, -1, 2, 1: expert 0 gets slot 1, expert 1 slots 0 2 5, expert 2 4.
    experts = torch.tensor([[1, 0], [1, -1], [2, 1]])
    check_plan(
        plan_dispatch(experts, 3),
        [0, 1, 4, 5], [1, 0, 2, 5, 4, -1], [[1, 0], [2, -1], [4, 3]], [1, 3, 1], [0, 0, 0],
    )  # fmt: skip
    # Aligned to 2: expert 0 in rows 0-1, 1 in 2-5, 2 in 6-7; R = 6 + 3 * 1 = 9.
    check_plan(
        plan_dispatch(experts, 3, align=2),
        [0, 2, 6, 8], [1, -1, 0, 2, 5, -1, 4, -1, -1], [[2, 0], [3, -1], [6, 4]], [1, 3, 1],
        [0, 0, 0],
    )  # fmt: skip
    # Capacity 2: expert 1 keeps first choices (slots 0 and 2) and turns slot 5 away; R = 6.
    check_plan(
        plan_dispatch(experts, 3, capacity=2),
        [0, 1, 3, 4], [1, 0, 2, 4, -1, -1], [[1, 0], [2, -1], [3, -1]], [1, 2, 1], [0, 1, 0],
    )  # fmt: skip


def test_capacity_by_position_is_first_come():
    # Megatron's position is not. All ask for expert 0: slots 0 and 2 are first choices, 1 and 3
    # second. Room for 3: slots 0, 2, then the second choice of the lower token, slot 1.
    experts = torch.zeros(2, 2, dtype=torch.int32)
    plan = plan_dispatch(experts, 1, capacity=3)
    assert_literal(plan.slot_to_row, [[0, 1], [2, -1]])  # rows in slot order all the same
    assert_literal(plan.dropped, [1])
    assert_literal(plan_dispatch(experts, 1, capacity=2).slot_to_row, [[0, -1], [1, -1]])
    assert_literal(plan_dispatch(experts, 1, capacity=1).row_to_slot, [0])  # R = 1


def test_capacity_by_score_literals():
    experts = torch.zeros(2, 2, dtype=torch.int32)
    weights = torch.tensor([[0.1, 0.4], [0.4, 0.3]])
    options = {"drop_policy": "score", "weights": weights}
    assert_literal(plan_dispatch(experts, 1, capacity=2, **options).slot_to_row, [[-1, 0], [1, -1]])
    assert_literal(
        plan_dispatch(experts, 1, capacity=1, **options).slot_to_row, [[-1, 0], [-1, -1]]
    )  # tie
    options["weights"] = torch.tensor([[NAN, -INF], [-0.0, 0.0]])
    assert_literal(
        plan_dispatch(experts, 1, capacity=1, **options).slot_to_row, [[-1, -1], [0, -1]]
    )
    assert_literal(plan_dispatch(experts, 1, capacity=3, **options).slot_to_row, [[-1, 0], [1, 2]])


def test_capacity_per_scope():
    # One slot per expert and scope; tokens 0, 2 are scope 0, tokens 1, 3 scope 1.
    experts = torch.zeros(4, 1, dtype=torch.int64)
    scope_ids = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    plan = plan_dispatch(experts, 2, capacity=1, scope_ids=scope_ids, num_scopes=2)
    check_plan(plan, [0, 2, 2], [0, 1, -1, -1], [[0], [1], [-1], [-1]], [2, 0], [2, 0])
    # What scope 0 keeps does not depend on what scope 1 asks for.
    experts[1::2] = 1
    plan = plan_dispatch(experts, 2, capacity=1, scope_ids=scope_ids, num_scopes=2)
    assert (plan.slot_to_row[0::2] >= 0).tolist() == [[True], [False]]


def test_number_of_rows():
    experts = torch.zeros(10, 2, dtype=torch.int32)
    experts[:, 1] = -1

    def num_rows(**options):
        return plan_dispatch(experts, 3, **options).row_to_slot.shape[0]

    assert num_rows() == 20
    assert num_rows(capacity=2) == 6
    assert num_rows(capacity=2, num_scopes=3, scope_ids=torch.zeros(10, dtype=torch.int32)) == 18
    assert num_rows(capacity=100) == 20
    assert num_rows(max_rows=12) == 12
    assert num_rows(max_rows=12, align=8) == 12 + 3 * 7


def test_max_rows_and_bad_ids():
    experts = torch.tensor([[0, 1], [1, 0], [0, -1]])
    with pytest.raises(ValueError, match="max_rows must be at least 5, got 3"):
        plan_dispatch(experts, 2, max_rows=3)
    # On CUDA the highest slots go: slots 3 and 4, both of expert 0.
    plan = plan_dispatch(experts, 2, max_rows=3, rules="cuda")
    check_plan(plan, [0, 1, 3], [0, 1, 2], [[0, 1], [2, -1], [-1, -1]], [1, 2], [2, 0])
    for stray in (2, -2, 10**6):  # vLLM's CPU kernel segfaults on them
        experts[1, 1] = stray
        with pytest.raises(ValueError, match=rf"experts must be in \[-1, 2\), got {stray}"):
            plan_dispatch(experts, 2)
        assert_literal(
            plan_dispatch(experts, 2, rules="cuda").slot_to_row, [[0, 2], [3, -1], [1, -1]]
        )
    experts[1, 1] = 2
    assert_literal(
        plan_dispatch(experts, 2, allow_unrouted=True).slot_to_row, [[0, 2], [3, -1], [1, -1]]
    )


def test_plan_edges():
    plan = plan_dispatch(torch.zeros(0, 2, dtype=torch.int32), 3, align=4)
    assert plan.slot_to_row.shape == (0, 2)
    assert_literal(plan.row_to_slot, [-1] * 9)
    assert_literal(plan.offsets, [0, 0, 0, 0])
    twice = plan_dispatch(torch.tensor([[1, 1]]), 2)  # a duplicate gets two rows
    assert_literal(twice.slot_to_row, [[0, 1]])
    assert_literal(twice.offsets, [0, 0, 2])


def test_plan_invariants():
    for case in cases.plan_cases(seed=0, n=300):
        plan, name = plan_dispatch(**case), cases.describe(case)
        experts, num_experts = case["experts"].long(), case["num_experts"]
        wanted = experts.where(experts < num_experts, -1)
        assert ((plan.slot_to_row < 0) | (wanted >= 0)).all(), name
        used = plan.row_to_slot >= 0
        slots = plan.row_to_slot[used].long()
        assert torch.equal(plan.slot_to_row.flatten()[slots].long(), used.nonzero()[:, 0]), name
        assert used.sum() == (plan.slot_to_row >= 0).sum() == plan.kept.sum(), name
        demand = wanted[wanted >= 0].bincount(minlength=num_experts)
        assert torch.equal((plan.kept + plan.dropped).long(), demand), name
        assert (plan.offsets % case.get("align", 1) == 0).all(), name
        row_expert = torch.searchsorted(plan.offsets[1:], used.nonzero()[:, 0], right=True)
        assert torch.equal(wanted.flatten()[slots], row_expert), name
        same_expert = row_expert[1:] == row_expert[:-1]
        assert (slots[1:] > slots[:-1])[same_expert].all(), name  # slot order inside an expert
        if "capacity" in case:
            most = case["capacity"] * case.get("num_scopes", 1)
            assert (plan.kept <= most).all(), name


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((100, 8, 2, 1.0), {}, 25),
        ((100, 8, 2, 1.25), {}, 32),  # 31.25 rounded up
        ((100, 8, 2, 1.25), {"multiple_of": 16}, 32),
        ((100, 8, 2, 1.0), {"multiple_of": 16}, 32),
        ((1, 64, 2, 1.0), {}, 1),  # ceil(1 / 32)
        ((1, 64, 2, 1.0), {"min_capacity": 4}, 4),
        ((0, 64, 2, 1.0), {"min_capacity": 5, "multiple_of": 4}, 8),
    ],
)
def test_expert_capacity_literals(arguments, options, expected):
    assert reference.expert_capacity(*arguments, **options) == expected


# ---- permute, unpermute ------------------------------------------------------------------------


def small_plan(**options):
    """Slots 0..5 ask for 1, 0, 1, -1, 2, 1: see `test_plan_literals`."""
    return plan_dispatch(torch.tensor([[1, 0], [1, -1], [2, 1]]), 3, **options)


def test_permute_literals():
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    rows = [[1.0, 10.0], [1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [3.0, 30.0], [0.0, 0.0]]
    assert permute(x, small_plan()).tolist() == rows  # tokens 0, 0, 1, 2, 2, padding
    aligned = permute(x[:, 0:1], small_plan(align=2))[:, 0].tolist()
    assert aligned == [1.0, 0.0, 1.0, 2.0, 3.0, 0.0, 3.0, 0.0, 0.0]
    poisoned = x.masked_fill(torch.tensor([[True], [False], [False]]), NAN)
    assert permute(poisoned, small_plan())[5].tolist() == [0.0, 0.0]  # padding is not 0 * NaN
    empty = plan_dispatch(torch.zeros(0, 2, dtype=torch.int32), 3, align=2)
    assert permute(torch.zeros(0, 4), empty).tolist() == [[0.0] * 4] * 3
    assert_exact(permute(x.bfloat16(), small_plan()), permute(x, small_plan()).bfloat16())


def test_unpermute_literals():
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [NAN]])
    # Token 0 has rows 1 and 0, token 1 row 2, token 2 rows 4 and 3.
    assert_literal(unpermute(rows, small_plan()), [[3.0], [4.0], [24.0]])
    weights = torch.tensor([[0.5, 1.0], [0.25, NAN], [1.0, 2.0]])  # the NaN has no row
    assert_literal(unpermute(rows, small_plan(), weights), [[2.0], [1.0], [32.0]])
    # Capacity 1 keeps slots 1, 0, 4 in rows 0, 1, 2; token 1 is left with nothing and gets 0.
    assert_literal(unpermute(rows[:3], small_plan(capacity=1), weights), [[2.0], [0.0], [4.0]])
    assert unpermute(rows.bfloat16(), small_plan(), weights).dtype == torch.bfloat16
    # Summed in float32: 256 + 1 + 1 in bfloat16 steps would stay 256.
    plan = plan_dispatch(torch.tensor([[0, 0, 0]]), 1)
    assert_literal(unpermute(torch.tensor([[256.0], [1.0], [1.0]]).bfloat16(), plan), [[258.0]])


def test_unpermute_undoes_permute():
    for case in cases.plan_cases(seed=3, n=60):
        plan = plan_dispatch(**case)
        num_tokens = case["experts"].shape[0]
        x = torch.randn(num_tokens, 3, dtype=torch.float64)
        num_kept = (plan.slot_to_row >= 0).sum(1, keepdim=True)
        assert_bound(unpermute(permute(x, plan), plan), x * num_kept, 1e-12)


def test_movement_gradcheck():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    plan = small_plan(align=2)
    assert torch.autograd.gradcheck(
        lambda x, w: unpermute(permute(x, plan).sin(), plan, w), (x, weights)
    )


# ---- grouped product, expert MLP ---------------------------------------------------------------


def test_grouped_mm_literals():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [NAN, NAN]])
    w = torch.tensor([[[1.0], [10.0]], [[7.0], [7.0]], [[2.0], [0.5]]])
    offsets = torch.tensor([0, 1, 1, 2], dtype=torch.int32)  # expert 1 is empty, row 2 is past all
    assert_literal(grouped_mm(x, w, offsets), [[21.0], [8.0], [0.0]])
    bias = torch.tensor([[0.5], [9.0], [-8.0]])
    assert_literal(grouped_mm(x, w, offsets, bias=bias), [[21.5], [0.0], [0.0]])
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert_literal(grouped_mm(x, transposed, offsets), [[21.0], [8.0], [0.0]])
    assert grouped_mm(x[:0], w, torch.zeros(4, dtype=torch.int32)).shape == (0, 1)
    all_to_one = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    assert_literal(grouped_mm(x, w, all_to_one), [[21.0], [49.0], [0.0]])


def test_grouped_mm_gradients_of_empty_experts_and_padding_are_zero():
    # torch and transformers leave garbage in both.
    x = torch.randn(4, 2, requires_grad=True)
    w = torch.randn(3, 2, 2, requires_grad=True)
    offsets = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    grouped_mm(x, w, offsets).sum().backward()
    assert (w.grad[1] == 0).all()
    assert (x.grad[2:] == 0).all()
    assert (w.grad[0] == x.detach()[0][:, None]).all()


@pytest.mark.parametrize(
    ("activation", "gate_value", "up", "expected"),
    [
        ("silu", 0.0, None, 0.0),
        ("silu", math.log(3), None, 0.75 * math.log(3)),  # z * sigmoid(z)
        ("gelu", 1.0, None, 0.8413447460685429),  # z * Phi(z), Phi(1) from the table
        ("gelu", -1.0, None, -0.15865525393145707),
        ("relu", -2.0, None, 0.0),
        ("relu2", 3.0, None, 9.0),
        ("relu2", -3.0, None, 0.0),
        ("swiglu", math.log(3), 2.0, 1.5 * math.log(3)),
        ("geglu", 1.0, -2.0, -1.6826894921370859),
        ("reglu", 3.0, -2.0, -6.0),
        ("swiglu_clamped", math.log(3) / 1.702, 1.0, 2 * 0.75 * math.log(3) / 1.702),
        # Gate 50 counts as 7, up 50 as 7: 8 * 7 * sigmoid(11.914), which is 1 - 6.695e-6.
        ("swiglu_clamped", 50.0, 50.0, 56 / (1 + math.exp(-11.914))),
        # Up -50 counts as -7; the gate has no lower clamp: -6 * -10 * sigmoid(-17.02).
        ("swiglu_clamped", -10.0, -50.0, 60 / (1 + math.exp(17.02))),
    ],
)
def test_activation_literals(activation, gate_value, up, expected):
    halves = [gate_value] if up is None else [gate_value, up]
    for interleaved in (False, True):
        z = torch.tensor([halves], dtype=torch.float64)
        assert_literal(reference.activate(z, activation, interleaved), [[expected]])


def test_interleaved_halves():
    z = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert_literal(reference.activate(z, "reglu"), [[3.0, 8.0]])  # gates 1, 2; ups 3, 4
    assert_literal(
        reference.activate(z, "reglu", interleaved=True), [[2.0, 12.0]]
    )  # gates 1, 3; ups 2, 4


def test_moe_mlp_literals():
    # H = I = 1, relu: expert e maps x to relu(u_e x + a_e) d_e + b_e.
    x = torch.tensor([[1.0], [2.0], [-1.0]])
    experts = torch.tensor([[0, 1], [1, -1], [1, 0]])
    weights = torch.tensor([[0.5, 1.0], [2.0, NAN], [1.0, 1.0]])  # the NaN's slot is unused
    up, down = torch.tensor([[[2.0]], [[-1.0]]]), torch.tensor([[[3.0]], [[10.0]]])
    routing = (experts, weights)
    # Token 0: 0.5 * relu(2) * 3 + relu(-1) * 10 = 3; 1: 2 * relu(-2) * 10 = 0; 2: relu(1) * 10.
    assert_literal(moe_mlp(x, routing, up, down, activation="relu"), [[3.0], [0.0], [10.0]])
    biases = {"bias_up": torch.tensor([[0.0], [3.0]]), "bias_down": torch.tensor([[1.0], [0.0]])}
    # 0: 0.5 * (6 + 1) + relu(-1 + 3) * 10 = 23.5; 1: 2 * relu(1) * 10 = 20; 2: 40 + 1.
    assert_literal(
        moe_mlp(x, routing, up, down, activation="relu", **biases), [[23.5], [20.0], [41.0]]
    )
    # On the input: 0: (relu(2 * 0.5) * 3 + 1) + relu(2) * 10 = 24; 1: relu(-4 + 3) = 0; 2: 41.
    on_input = moe_mlp(x, routing, up, down, activation="relu", weights_on="input", **biases)
    assert_literal(on_input, [[24.0], [0.0], [41.0]])
    plan = plan_dispatch(experts, 2, capacity=1)  # keeps slots 0 and 2
    assert_literal(
        moe_mlp(x, routing, up, down, activation="relu", plan=plan), [[3.0], [0.0], [0.0]]
    )
    full = Routing(experts.int(), weights, torch.tensor([2, 3]))
    assert_literal(moe_mlp(x, full, up, down, activation="relu"), [[3.0], [0.0], [10.0]])


def dense_moe(x, routing, w_up, w_down, activation="swiglu", interleaved=False, bias_up=None,
              bias_down=None, weights_on="output"):  # fmt: skip
    """Every expert on every token, by einsum, then the routed ones picked by a one-hot."""
    experts, weights = routing
    one_hot = torch.nn.functional.one_hot(experts.long() + 1, w_up.shape[0] + 1)[..., 1:].double()
    x, weights = x.double(), weights.double()
    slots = x[:, None].expand(*experts.shape, -1)
    if weights_on == "input":
        slots, weights = slots * weights[..., None], torch.ones_like(weights)
    up = torch.einsum("tkh,ehf->tkef", slots, w_up.double())
    up = up if bias_up is None else up + bias_up.double()
    hidden = reference.activate(up.flatten(0, 2), activation, interleaved)
    hidden = hidden.reshape(*up.shape[:3], w_down.shape[1])
    down = torch.einsum("tkef,efh->tkeh", hidden, w_down.double())
    down = down if bias_down is None else down + bias_down.double()
    return torch.einsum("tkeh,tke,tk->th", down, one_hot, weights)


def test_moe_mlp_agrees_with_a_dense_einsum():
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for case in cases.expert_cases(seed=0, n=120, max_size=33, dtypes=dtypes):
        want = dense_moe(**case)
        assert_bound(moe_mlp(**case, dtype=torch.float64), want, 1e-11)
        got = moe_mlp(**case)
        assert got.dtype == case["x"].dtype, cases.describe(case)
        assert_bound(got, want, 60 * torch.finfo(got.dtype).eps * want.abs().clamp(min=1.0))


def test_an_id_of_minus_one_changes_no_other_token():
    # transformers' grouped_mm: silently other tokens.
    generator = torch.Generator().manual_seed(6)
    x, w_up, w_down = (torch.randn(*s, generator=generator) for s in ((5, 4), (3, 4, 6), (3, 3, 4)))
    experts, weights = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]]), torch.ones(5, 2)
    before = moe_mlp(x, (experts, weights), w_up, w_down)
    experts[2] = -1
    after = moe_mlp(x, (experts, weights), w_up, w_down)
    assert_bound(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]].double(), 1e-5)
    assert (after[2] == 0).all()


@pytest.mark.parametrize("options", [
    {"activation": "swiglu"}, {"activation": "swiglu_clamped", "interleaved": True},
    {"activation": "geglu", "weights_on": "input"}, {"activation": "silu"},
])  # fmt: skip
def test_moe_mlp_gradcheck(options):
    generator = torch.Generator().manual_seed(7)
    width = 2 if options["activation"] == "silu" else 4

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    experts = torch.tensor([[0, 2], [2, -1], [0, 0]])
    leaves = leaf(3, 3), leaf(3, 2), leaf(3, 3, width), leaf(3, 2, 3), leaf(3, width), leaf(3, 3)

    def run(x, weights, w_up, w_down, bias_up, bias_down):
        biases = {"bias_up": bias_up, "bias_down": bias_down}
        return moe_mlp(x, (experts, weights), w_up, w_down, **biases, **options)

    assert torch.autograd.gradcheck(run, leaves)
    grads = torch.autograd.grad(run(*leaves).sum(), leaves)
    assert all((grad[1] == 0).all() for grad in grads[2:])  # expert 1 received nothing
