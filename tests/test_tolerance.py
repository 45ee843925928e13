"""The tolerance classes reject what they should, and their limits hold for float32 plain torch."""

from __future__ import annotations

import cases
import pytest
import torch
from fastmoe_route import reference
from tolerance import (
    assert_bound,
    assert_exact,
    assert_has_power,
    assert_literal,
    assert_near_tie,
    assert_ratio,
    combine_limit,
    gate_weight_limit,
    key_limit,
    logsumexp_limit,
    score_limit,
    score_sum_limit,
    softmax_limit,
)

NAN, INF = torch.nan, torch.inf


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- classes -----------------------------------------------------------------------------------


def test_exact_compares_bits_dtype_shape_and_stride():
    x = random(4, 3)
    assert_has_power(lambda got: assert_exact(got, x), x)
    nan = torch.tensor([NAN, 1.0])
    assert_exact(nan, nan.clone())
    for other in (
        x.double(),
        x[:3],
        x.T.contiguous().T,
        x.clone().index_fill_(0, torch.tensor(0), 0),
    ):
        with pytest.raises(AssertionError):
            assert_exact(other, x)
    with pytest.raises(AssertionError, match="1 of 1 fail"):
        assert_exact(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert_exact(x[:1, ::2], x[:1, ::2].clone(), stride=False)


def test_bound_is_per_element_and_fails_on_nan():
    wanted = torch.tensor([1.0, INF, NAN, 4.0], dtype=torch.float64)
    limit = torch.tensor([0.1, 0.0, 0.0, 1.0])
    assert_bound(torch.tensor([1.05, INF, NAN, 4.9]), wanted, limit)
    for got in ([1.2, INF, NAN, 4.0], [1.0, 9.0, NAN, 4.0], [1.0, INF, 0.0, 4.0],
                [NAN, INF, NAN, 4.0], [1.0, -INF, NAN, 4.0], [INF, INF, NAN, 4.0]):  # fmt: skip
        with pytest.raises(AssertionError, match="1 of 4 fail"):
            assert_bound(torch.tensor(got), wanted, limit)
    with pytest.raises(AssertionError, match=r"worst at \[0\]: got nan, expected 1.0, limit inf"):
        assert_bound(torch.tensor([NAN]), wanted[:1], INF)
    assert_bound(torch.zeros(0, 3), torch.zeros(0, 3), 0.0)


def test_literal_wants_int32():
    assert_literal(torch.tensor([1, 2], dtype=torch.int32), [1, 2])
    with pytest.raises(AssertionError, match="dtype"):
        assert_literal(torch.tensor([1, 2]), [1, 2])


def test_ratio_allows_twice_the_error_of_plain_torch():
    wanted = random(6, 256).double()
    plain, noise = wanted.bfloat16(), 2.0**-9 * random(6, 256, seed=1) * wanted.abs()
    assert assert_ratio(plain, plain, wanted) <= 1
    assert_ratio((wanted + noise).bfloat16(), plain, wanted)
    assert_has_power(lambda got: assert_ratio(got, plain, wanted), plain)
    for wrong in (
        (wanted + 8 * noise).bfloat16(),
        plain.clone().index_fill_(0, torch.tensor(2), 0),
    ):
        with pytest.raises(AssertionError, match="ratio"):
            assert_ratio(wrong, plain, wanted)
    wanted[3] = 0
    plain = wanted.bfloat16()
    wrong = plain.clone()
    wrong[3, 5] = 1e-30  # a row that must be 0
    with pytest.raises(AssertionError, match=r"worst at \[3\]"):
        assert_ratio(wrong, plain, wanted)


def test_near_tie_excuses_only_close_keys():
    keys = torch.tensor([[1.0, 0.9, 0.901, 0.1], [0.1, 0.2, 0.3, 0.4]])
    wanted = torch.tensor([[0, 2], [3, 2]], dtype=torch.int32)
    assert assert_near_tie(wanted, wanted, keys, 0.0) == 0
    swapped = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
    assert assert_near_tie(swapped, wanted, keys, 0.0006) == 1  # 0.001 <= twice 0.0006
    assert_has_power(lambda got: assert_near_tie(got, wanted, keys, 0.0006), wanted)
    for wrong in ([[0, 3], [3, 2]], [[0, -1], [3, 2]], [[0, 0], [3, 2]], [[0, 7], [3, 2]]):
        with pytest.raises(AssertionError):
            assert_near_tie(torch.tensor(wrong), wanted, keys, 0.0006)
    with pytest.raises(AssertionError):
        assert_near_tie(swapped, wanted, keys, 0.0004)
    undecided = torch.tensor([True, False])
    assert assert_near_tie(torch.tensor([[3, -1], [3, 2]]), wanted, keys, 0.0, undecided) == 2
    with pytest.raises(AssertionError, match="twice"):
        assert_near_tie(torch.tensor([[3, 3], [3, 2]]), wanted, keys, 0.0, undecided)


def test_power_is_denied_to_blind_checks():
    x = random(5, 3)
    with pytest.raises(AssertionError, match="accepts zeros"):
        assert_has_power(lambda got: None, x)
    with pytest.raises(AssertionError, match="swapped"):
        assert_has_power(lambda got: assert_bound(got.sum(), x.sum().double(), 1e-4), x)

    def blind_to_nan(got):
        assert not ((got - x).abs() > 1e-6).any()

    with pytest.raises(AssertionError, match="one element spoiled"):
        assert_has_power(blind_to_nan, x)
    for powerless in (torch.zeros(3, 2), torch.ones(3, 2), torch.ones(1, 2)):
        with pytest.raises(AssertionError, match="shows nothing"):
            assert_has_power(lambda got: None, powerless)


# ---- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_softmax_limit_holds_for_torch_and_is_tight(dtype):
    x = (4 * random(30, 200)).to(dtype)
    x[0, :50] = -INF
    wanted = reference.softmax(x, dtype=torch.float64)
    limit = softmax_limit(x, wanted)
    if dtype == torch.float64:
        limit = limit * 2  # here the reference rounds as often as torch
    assert_has_power(lambda got: assert_bound(got, wanted, limit), torch.softmax(x, -1))
    assert (limit[1:] <= 300 * torch.finfo(dtype).eps * wanted[1:] + 1e-7).all()


@pytest.mark.parametrize("score", cases.SCORES)
def test_score_limit_holds_for_float32(score):
    z = torch.cat(
        [random(20, 64), 30 * random(20, 64), torch.linspace(-210, 100, 640).view(10, 64)]
    )
    for options in ({}, {"softmax_over": "group", "num_groups": 4}):
        got = reference.gate_scores(z, score, **options)
        wanted = reference.gate_scores(z, score, **options, dtype=torch.float64)
        assert_has_power(
            lambda x, w=wanted, o=options: assert_bound(x, w, score_limit(z, score, **o)), got
        )


def test_gate_limits_hold_for_float32_over_all_options():
    """float32 against float64 on random options: what a kernel will be asked, asked of torch."""
    num_slots = num_differing = num_undecided = 0
    for case in cases.gate_cases(seed=5, n=250, max_experts=129):
        got, wanted = reference.gate(**case), reference.gate(**case, dtype=torch.float64)
        how = {k: case[k] for k in ("score", "softmax_over", "num_groups") if k in case}
        keyed = how | {k: case[k] for k in ("bias", "mask", "noise") if k in case}
        keys = reference.gate_keys(case["logits"], **keyed, dtype=torch.float64).key
        limit = key_limit(case["logits"], **keyed)
        # A group is two keys, a cumulative score up to K of them and as many additions.
        slack = (case["top_k"] + 2) * (limit.nan_to_num(0.0).amax(1) + 2.0**-22)
        undecided = reference.gate_margin(**case) <= slack
        num_differing += assert_near_tie(got.experts, wanted.experts, keys, limit, undecided)
        num_undecided += int(undecided.sum())
        num_slots += got.experts.numel()
        how |= {k: case[k] for k in ("normalize", "scale") if k in case}
        weights = reference.gate_weights(case["logits"], got.experts, **how, dtype=torch.float64)
        assert_bound(got.weights, weights, gate_weight_limit(case["logits"], got.experts, **how))
        if got.score_sum is not None:
            how = {k: how[k] for k in ("score", "softmax_over", "num_groups") if k in how}
            total = score_sum_limit(case["logits"], got.demand.shape[0], **how)
            assert_bound(got.score_sum, wanted.score_sum, total)
            assert_bound(got.logsumexp, wanted.logsumexp, logsumexp_limit(case["logits"]))
    assert num_differing < 0.01 * num_slots
    assert num_undecided < 0.01 * num_slots


def test_combine_limit_holds_for_float32():
    experts = torch.randint(-1, 4, (30, 6), generator=torch.Generator().manual_seed(1))
    plan = reference.plan_dispatch(experts, 4)
    weights = random(30, 6)
    for dtype in (torch.float32, torch.bfloat16):
        rows = random(plan.row_to_slot.shape[0], 16, seed=2).to(dtype)
        wanted = reference.unpermute(rows, plan, weights, dtype=torch.float64)
        limit = combine_limit(rows, plan, weights, wanted)
        good = reference.unpermute(rows, plan, weights)
        assert_has_power(lambda got, w=wanted, b=limit: assert_bound(got, w, b), good)


# ---- cases -------------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a.stride() == b.stride() and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    return all(map(same, a, b)) if isinstance(a, tuple) else a == b


@pytest.mark.parametrize("make", [cases.gate_cases, cases.plan_cases, cases.expert_cases])
def test_cases_are_reproducible_and_do_not_depend_on_how_many(make):
    some, more = list(make(7, 10)), list(make(7, 20))
    for a, b in zip(some, more, strict=False):
        assert a.keys() == b.keys()
        assert all(same(a[name], b[name]) for name in a), cases.describe(a)
    assert cases.describe(more[0]) != cases.describe(more[1])


def test_gate_cases_reach_every_option_value():
    seen = {}
    for case in cases.gate_cases(seed=0, n=600):
        for name, value in case.items():
            kind = f"{value.dim()}-d" if isinstance(value, torch.Tensor) else value
            seen.setdefault(name, set()).add(kind)
        assert case["top_k"] <= case["logits"].shape[1] - case.get("num_null", 0)
        assert not ("num_null" in case and "num_groups" in case)
    assert seen["score"] == set(cases.SCORES)
    assert seen["bias"] == seen["mask"] == {"1-d", "2-d"}
    assert seen["group_score"] == {"max", "top2_sum"}
    assert {"noise", "max_per_group", "k_per_token", "min_k", "scale", "softmax_over"} <= set(seen)
    for name in ("top_p", "threshold"):
        assert "1-d" in seen[name]
        assert any(isinstance(kind, float) for kind in seen[name])
