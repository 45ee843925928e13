"""What stands around a drop: new weights, the residual rule, priorities, counts. Class: exact."""

from __future__ import annotations

import math

import fastmoe_route as fr
import pytest
import torch
from tolerance import assert_exact

EXPERTS = torch.tensor([[0, 1], [1, 2]])


# ---- literals ----------------------------------------------------------------------------------


def test_renormalize_after_drop(backend: str) -> None:
    plan = fr.plan_dispatch(torch.tensor([[0, 1], [0, 1], [0, 2]]), 3, capacity=1)
    weights = torch.tensor([[0.5, 0.25], [math.nan, math.inf], [math.nan, 0.25]])
    got = fr.renormalize_after_drop(weights, plan, 3.0)
    assert_exact(got, torch.tensor([[2.0, 1.0], [0.0, 0.0], [0.0, 3.0]]))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = fr.renormalize_after_drop(weights.to(dtype), plan, 3.0)
        assert_exact(got, torch.tensor([[2.0, 1.0], [0.0, 0.0], [0.0, 3.0]], dtype=dtype))
    tiny = torch.full((3, 2), 1e-30)
    assert_exact(fr.renormalize_after_drop(tiny, plan)[:1], torch.full((1, 2), 1e-30) / 1e-20)


def test_pass_through(backend: str) -> None:
    plan = fr.plan_dispatch(torch.tensor([[0, 1], [0, 2], [0, 1], [-1, -1]]), 3, capacity=1)
    assert (plan.slot_to_row >= 0).tolist() == [
        [True, True],
        [False, True],
        [False] * 2,
        [False] * 2,
    ]
    y = torch.tensor([[1.0], [2.0], [0.0], [0.0]])
    x = torch.tensor([[math.inf], [10.0], [20.0], [30.0]])
    assert fr.pass_through(y, x, plan).tolist() == [[1.0], [2.0], [20.0], [30.0]]
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.25], [0.5, 0.25], [0.0, 0.0]])
    assert fr.pass_through(y, x, plan, weights).tolist() == [[1.0], [7.0], [15.0], [0.0]]


def test_batch_priority_orders_tokens_within_a_choice(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = (torch.rand(40, 3, generator=generator) * 8).round() / 8
    experts = torch.randint(0, 4, (40, 3), generator=generator)
    best = weights.amax(1).tolist()
    order = fr.batch_priority(weights)
    assert order.flatten().unique().numel() == order.numel()
    plan = fr.plan_dispatch(experts, 4, capacity=13, drop_policy="score", weights=order)
    kept = (plan.slot_to_row >= 0).flatten().tolist()
    slots = sorted(range(120), key=lambda s: (s % 3, -best[s // 3], s // 3))
    room = [13] * 4
    for slot in slots:
        expert = int(experts.flatten()[slot])
        assert kept[slot] == (room[expert] > 0)
        room[expert] -= 1
    weights[5, 1] = math.nan
    assert (fr.batch_priority(weights)[5] <= fr.batch_priority(weights)).sum(0).tolist() == [40] * 3


def test_drop_counts(backend: str) -> None:
    generator = torch.Generator().manual_seed(6)
    experts = torch.randint(-1, 5, (50, 3), generator=generator)
    scopes = torch.randint(0, 4, (50,), generator=generator).int()
    options = {"scope_ids": scopes, "num_scopes": 4}
    plan = fr.plan_dispatch(experts, 5, capacity=4, **options)
    counts = fr.drop_counts(experts, plan, **options)
    for scope in range(4):
        mine = experts[scopes == scope]
        for expert in range(5):
            asked = int((mine == expert).sum())
            assert counts.asked[scope, expert] == asked
            assert counts.dropped[scope, expert] == max(0, asked - 4)
    assert_exact(counts.kept.sum(0).int(), plan.kept)
    assert_exact(counts.dropped.sum(0).int(), plan.dropped)
    assert_exact(fr.drop_counts(experts, plan).dropped[0], plan.dropped)
    sentinel = torch.where(experts < 0, 5, experts)
    assert_exact(fr.drop_counts(sentinel, plan).asked, fr.drop_counts(experts, plan).asked)


# ---- gradients ---------------------------------------------------------------------------------


def test_gradcheck(backend: str) -> None:
    plan = fr.plan_dispatch(torch.tensor([[0, 1], [0, 1], [2, 0]]), 3, capacity=1)
    weights = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    x, y = (torch.rand(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    check = torch.autograd.gradcheck
    assert check(lambda w: fr.renormalize_after_drop(w, plan, 2.5), (weights,))
    assert check(lambda y, x, w: fr.pass_through(y, x, plan, w), (y, x, weights))
    assert check(lambda y, x: fr.pass_through(y, x, plan), (y, x))


# ---- errors ------------------------------------------------------------------------------------


def test_arguments(backend: str) -> None:
    plan = fr.plan_dispatch(EXPERTS, 3)
    x = torch.ones(2, 4)
    for call, kind, message in (
        (lambda: fr.renormalize_after_drop(x, plan), ValueError, "after_drop: weights must"),
        (
            lambda: fr.renormalize_after_drop(x, None),
            TypeError,
            "after_drop: plan must be",
        ),
        (lambda: fr.pass_through(x, x[:1], plan), ValueError, "pass_through: x must have shape"),
        (
            lambda: fr.pass_through(x, x.double(), plan),
            TypeError,
            "pass_through: x must be f",
        ),
        (lambda: fr.pass_through(x, x, plan, x), ValueError, "pass_through: weights must"),
        (lambda: fr.pass_through(x[:1], x[:1], plan), ValueError, "pass_through: y must have"),
        (lambda: fr.batch_priority(x[0]), ValueError, "batch_priority: weights must have 2"),
        (lambda: fr.batch_priority(x.int()), TypeError, "batch_priority: weights must be float32"),
        (lambda: fr.drop_counts(x, plan), TypeError, "drop_counts: experts must be int32"),
        (
            lambda: fr.drop_counts(EXPERTS[:1], plan),
            ValueError,
            "drop_counts: experts must",
        ),
        (lambda: fr.drop_counts(EXPERTS, plan, num_scopes=2**30), ValueError, "num_scopes must"),
        (lambda: fr.drop_counts(EXPERTS.to("meta"), plan), ValueError, "slot_to_row must be on me"),
        (lambda: fr.pass_through(x, x.to("meta"), plan), ValueError, "x must be on cpu, got meta"),
        (lambda: fr.pass_through(x.to("meta"), x.to("meta"), plan), ValueError, "be on meta, got"),
        (
            lambda: fr.pass_through(x.to("meta"), x.to("meta"), plan, x[:, :2]),
            ValueError,
            "pass_through: weights must be on meta",
        ),
        (
            lambda: fr.renormalize_after_drop(x[:, :2].to("meta"), plan),
            ValueError,
            "plan.slot_to_row must be on meta, got cpu",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
