"""The oracle of the gate and of expert choice: hand-worked answers, peers' bugs, plain torch.

Logits are often logs of small integers, so that a softmax is read off as shares: log of 1, 2, 3, 4
has the softmax 0.1, 0.2, 0.3, 0.4.
"""

from __future__ import annotations

import math

import cases
import pytest
import torch
from fastmoe_route import reference
from fastmoe_route.reference import expert_choice, gate
from tolerance import assert_bound, assert_literal

INF, NAN = math.inf, math.nan


def logs(*rows: list[float]) -> torch.Tensor:
    """Logits whose exponentials are the given numbers."""
    return torch.tensor(rows).log()


def chosen(logits: list | torch.Tensor, top_k: int, **options: object) -> list:
    """The experts of one token."""
    row = logits if isinstance(logits, torch.Tensor) else torch.tensor([logits])
    return gate(row, top_k, **options).experts[0].tolist()


# ---- gate: scores and weights ------------------------------------------------------------------


def test_gate_softmax_literals():
    z = logs([1, 2, 3, 4])
    routing = gate(z, 2)
    assert_literal(routing.experts, [[3, 2]])
    assert_literal(routing.weights, [[0.4, 0.3]])
    assert_literal(routing.demand, [0, 0, 1, 1])
    assert routing[3:] == (None, None, None)
    assert_literal(gate(z, 2, normalize=True).weights, [[4 / 7, 3 / 7]])
    assert_literal(gate(z, 2, normalize=True, scale=7.0).weights, [[4.0, 3.0]])
    assert_literal(gate(z, 2, scale=2.5).weights, [[1.0, 0.75]])


def test_gate_softmax_over_group_literal():
    # Groups {1, 3} and {2, 6} give shares 1/4, 3/4 and 1/4, 3/4: the tie goes to the lower id.
    routing = gate(logs([1, 3, 2, 6]), 2, num_groups=2, softmax_over="group", keep_scores=True)
    assert_literal(routing.experts, [[1, 3]])
    assert_literal(routing.scores, [[0.25, 0.75, 0.25, 0.75]])
    # A group of -inf alone has no share to give; the other group is as ever.
    z = torch.tensor([[-INF, -INF, 0.0, math.log(3.0)]])
    routing = gate(z, 3, num_groups=2, softmax_over="group", keep_scores=True)
    assert_literal(routing.experts, [[3, 2, -1]])
    assert_literal(routing.scores, [[0.0, 0.0, 0.25, 0.75]])


@pytest.mark.parametrize(
    ("score", "z", "expected"),
    [
        ("sigmoid", [0.0, math.log(3), -math.log(3)], [0.5, 0.75, 0.25]),
        ("sigmoid", [INF, -INF, 200.0], [1.0, 0.0, 1.0]),
        # log(1 + e^0) = log 2; log(1 + e^log(e - 1)) = 1; log(1 + e^1000) = 1000
        ("sqrtsoftplus", [0.0, math.log(math.e - 1), 1000.0], [math.log(2) ** 0.5, 1, 1000**0.5]),
        ("sqrtsoftplus", [INF, -INF, -2 * math.log(10) - 50], [INF, 0.0, 0.1 * math.exp(-25)]),
        ("relu", [-1.0, 0.0, 2.5], [0.0, 0.0, 2.5]),
        ("identity", [-1.0, 0.0, 2.5], [-1.0, 0.0, 2.5]),
    ],
)
def test_gate_score_literals(score, z, expected):
    assert_literal(gate(torch.tensor([z]), 1, score=score, keep_scores=True).scores, [expected])


def test_scores_do_not_underflow_and_weights_do_not_become_0_over_0():
    # SGLang, FlashInfer. e^-100 = 3.720076e-44 is a float32 denormal; e^100 overflows float32.
    z = torch.tensor([[-100.0, -101.0, -102.0]])
    sigmoid = gate(z, 2, score="sigmoid")
    assert_literal(sigmoid.experts, [[0, 1]])
    assert_bound(sigmoid.weights, torch.tensor([[-100.0, -101.0]]).double().exp(), 2.0**-149)
    # sqrt(log(1 + e^-200)) = e^-100, while e^-200 is 0 in float32.
    root = gate(2 * z, 2, score="sqrtsoftplus")
    assert_bound(root.weights, torch.tensor([[-100.0, -101.0]]).double().exp(), 2.0**-149)
    # Over the floor of 1e-20, no 0 / 0; 27 and 10 times 2^-149 are nearest to e^-100 and e^-101.
    assert_literal(
        gate(z, 2, score="sigmoid", normalize=True).weights * 1e24, [[3.783506, 1.401298]]
    )
    deep = gate(torch.full((1, 4), -1000.0), 2, score="sqrtsoftplus", normalize=True)
    assert_literal(deep.experts, [[0, 1]])
    assert_literal(deep.weights, [[0.0, 0.0]])


def test_sqrtsoftplus_is_continuous_and_accurate_where_the_formulas_meet():
    z = torch.linspace(-45, -35, 101, dtype=torch.float64)[:, None]
    exact = (z / 2).exp() * (1 - z.exp() / 4)  # sqrt(x - x^2 / 2 + ...) with x = e^z
    assert_bound(reference.gate_scores(z, "sqrtsoftplus") / exact, torch.ones_like(z), 1e-15)


def test_all_negative_scores_choose_the_largest():
    # TransformerEngine, FlashInfer and DeepSpeed start their maximum at 0.
    routing = gate(torch.tensor([[-3.0, -1.0, -2.0]]), 2, score="identity")
    assert_literal(routing.experts, [[1, 2]])
    assert_literal(routing.weights, [[-1.0, -2.0]])
    assert chosen([-3.0, -1.0, -2.0], 2, score="sigmoid") == [1, 2]
    # relu compares scores: 0 = 0 = 0, so the lower ids.
    assert_literal(gate(torch.tensor([[-3.0, -1.0, -2.0]]), 2, score="relu").experts, [[0, 1]])


def test_ties_go_to_the_lower_id():
    # torch.topk picks arbitrary ones.
    assert chosen([0.0] * 100, 3) == [0, 1, 2]
    assert chosen([0.0, 1.0, 0.0, 1.0], 3) == [1, 3, 0]
    assert chosen([-0.0, 0.0, -0.0], 2) == [0, 1]
    # 30 and 40 both have the sigmoid 1.0 in float32; the logits still tell them apart.
    assert chosen([30.0, 40.0], 1, score="sigmoid") == [1]
    assert chosen([30.0, 40.0], 1, score="sigmoid", bias=torch.zeros(2)) == [0]


# ---- gate: bias, mask, noise -------------------------------------------------------------------


def test_bias_chooses_and_does_not_weigh():
    z = torch.tensor([[0.0, math.log(3), -math.log(3)]])  # sigmoids 0.5, 0.75, 0.25
    routing = gate(z, 2, score="sigmoid", bias=torch.tensor([0.0, -0.5, 0.4]))
    assert_literal(routing.experts, [[2, 0]])  # keys 0.5, 0.25, 0.65
    assert_literal(routing.weights, [[0.25, 0.5]])
    # FlashInfer recovers the weight as key minus bias: 1e6 + 0.25 - 1e6 in float32 is 0.25 only by
    # luck, and 1e9 + 0.25 - 1e9 is 0.
    routing = gate(z, 1, score="sigmoid", bias=torch.tensor([0.0, 0.0, 1e9]))
    assert_literal(routing.experts, [[2]])
    assert_literal(routing.weights, [[0.25]])
    # All keys negative: -1.5, -1.25, -1.75.
    routing = gate(z, 2, score="sigmoid", bias=torch.full((3,), -2.0))
    assert_literal(routing.experts, [[1, 0]])
    per_token = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert_literal(gate(z.expand(2, 3), 1, score="sigmoid", bias=per_token).experts, [[2], [0]])
    # A bias of -inf ranks last but forbids nothing.
    assert_literal(
        gate(z, 3, score="sigmoid", bias=torch.tensor([0.0, -INF, 0.0])).experts, [[0, 2, 1]]
    )


def test_mask_and_minus_infinity_forbid():
    z = logs([1, 2, 3, 4])
    routing = gate(z, 3, mask=torch.tensor([True, True, True, False]))
    assert_literal(routing.experts, [[2, 1, 0]])
    assert_literal(routing.weights, [[0.3, 0.2, 0.1]])  # the score is that before the mask
    assert_literal(
        gate(z, 3, mask=torch.tensor([[True, False, False, False]])).experts, [[0, -1, -1]]
    )
    routing = gate(torch.tensor([[-INF, 0.0, -INF, 0.0]]), 3)
    assert_literal(routing.experts, [[1, 3, -1]])
    assert_literal(routing.weights, [[0.5, 0.5, 0.0]])
    assert chosen([-INF, -1.0, -INF], 2, score="relu") == [1, -1]


def test_noise_chooses_and_does_not_weigh():
    z = logs([1, 2, 3, 4])
    routing = gate(z, 2, noise=torch.tensor([[10.0, 0.0, 0.0, 0.0]]))
    assert_literal(routing.experts, [[0, 3]])
    assert_literal(routing.weights, [[0.1, 0.4]])
    # The sum is rounded to float32: 2^24 + 1 is 2^24, so both tie and the lower id wins.
    assert chosen([2.0**24, 2.0**24], 1, noise=torch.tensor([[0.0, 1.0]])) == [0]
    assert chosen([2.0**24, 2.0**24], 1, noise=torch.tensor([[0.0, 2.0]])) == [1]
    assert chosen([1.0, -INF], 2, noise=torch.tensor([[-INF, INF]])) == [0, -1]


# ---- gate: groups ------------------------------------------------------------------------------


def test_groups_literals():
    z = [5.0, 0.0, 4.0, 4.0, 1.0, 2.0]  # groups (5, 0), (4, 4), (1, 2)
    options = {"score": "identity", "num_groups": 3}
    assert chosen(z, 3, topk_groups=1, **options) == [0, 1, -1]  # best keys 5, 4, 2
    assert chosen(z, 3, topk_groups=2, **options) == [0, 2, 3]
    # Sums 5, 8, 3: SGLang sums two equal maxima wrongly.
    assert chosen(z, 3, topk_groups=1, group_score="top2_sum", **options) == [2, 3, -1]
    assert chosen([4.0, 0.0, 0.0, 4.0], 2, score="identity", num_groups=2, topk_groups=1) == [0, 1]
    assert chosen(z, 3, max_per_group=1, **options) == [0, 2, 5]
    assert chosen(z, 6, max_per_group=1, **options) == [0, 2, 5, -1, -1, -1]


def test_a_closed_group_is_not_a_group_of_zeros():
    # vLLM masks closed groups to 0, which beats negative keys.
    z = [-1.0, -2.0, -3.0, -4.0]
    options = {"score": "identity", "num_groups": 2, "topk_groups": 1}
    assert chosen(z, 3, **options) == [0, 1, -1]
    assert chosen(z, 3, group_score="top2_sum", **options) == [0, 1, -1]


def test_groups_of_one_allowed_expert():
    # vLLM. Groups of one: sums are single keys. A masked expert is not part of any sum.
    options = {"score": "identity", "group_score": "top2_sum"}
    assert chosen([1.0, 3.0, 2.0], 2, num_groups=3, topk_groups=2, **options) == [1, 2]
    mask = torch.tensor([True, False, True, True])
    # Sums 5 (the 9 is masked) and 6.
    assert chosen([5.0, 9.0, 3.0, 3.0], 1, num_groups=2, topk_groups=1, mask=mask, **options) == [2]
    # -5 alone beats -3 - 3 = -6, and a group with nothing allowed is behind every other.
    z = [-5.0, -INF, -3.0, -3.0, -INF, -INF]
    assert chosen(z, 2, num_groups=3, topk_groups=1, **options) == [0, -1]
    assert chosen(z, 4, num_groups=3, topk_groups=3, **options) == [2, 3, 0, -1]


def test_top2_sum_uses_the_scores_and_not_the_logits():
    options = {"score": "sigmoid", "num_groups": 2, "topk_groups": 1, "group_score": "top2_sum"}
    # Sigmoids 1 + 0.881 against 0.9999 + 0.9991, logits 32 against 16.
    assert chosen([30.0, 2.0, 9.0, 7.0], 1, **options) == [2]
    # The bias counts: 0.5 + 0.5 + 2 against 1.0 + 1.0.
    bias = torch.tensor([0.0, 2.0, 0.0, 0.0])
    assert chosen([0.0, 0.0, 50.0, 50.0], 2, bias=bias, **options) == [1, 0]


# ---- gate: how many ----------------------------------------------------------------------------


def test_top_p_literals():
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])  # shares of 1/4; nearly all
    assert_literal(gate(z, 4, top_p=0.3).experts, [[0, 1, -1, -1], [0, -1, -1, -1]])
    # 1/4 + 1/4 equals 0.5 and does not exceed it.
    assert_literal(gate(z, 4, top_p=0.5).experts[:1], [[0, 1, 2, -1]])
    assert_literal(
        gate(z, 4, top_p=torch.tensor([0.9, 0.0])).experts, [[0, 1, 2, 3], [0, -1, -1, -1]]
    )
    assert_literal(gate(z, 3, top_p=0.0, min_k=2).experts, [[0, 1, -1], [0, 1, -1]])
    assert_literal(gate(z, 2, top_p=0.9).experts[:1], [[0, 1]])  # never more than top_k
    # The bias moves the order, the clean scores are summed: 0.1 + 0.2 + 0.3 > 0.5.
    bias = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert_literal(gate(logs([1, 2, 3, 4]), 4, top_p=0.5, bias=bias).experts, [[0, 1, 2, -1]])


def test_threshold_literals():
    z = torch.tensor([[0.0, math.log(3), -math.log(3)]])  # sigmoids 0.5, 0.75, 0.25
    assert_literal(gate(z, 3, score="sigmoid", threshold=0.4).experts, [[1, 0, -1]])
    assert_literal(
        gate(z, 3, score="sigmoid", threshold=0.5).experts, [[1, -1, -1]]
    )  # 0.5 is not above 0.5
    assert_literal(gate(z, 3, score="sigmoid", threshold=0.9).experts, [[1, -1, -1]])  # min_k is 1
    assert_literal(gate(z, 3, score="sigmoid", threshold=0.9, min_k=0).experts, [[-1, -1, -1]])
    assert_literal(gate(z, 3, score="sigmoid", threshold=torch.tensor([0.1])).experts, [[1, 0, 2]])
    # Compared with score + bias: 0.5, 0.75, 1.25.
    bias = torch.tensor([0.0, 0.0, 1.0])
    assert_literal(gate(z, 3, score="sigmoid", threshold=0.7, bias=bias).experts, [[2, 1, -1]])
    assert_literal(
        gate(z, 3, score="identity", threshold=0.0, min_k=0).experts, [[1, -1, -1]]
    )  # BlockFFN


def test_min_k_counts_allowed_experts_only():
    z = torch.tensor([[3.0, 2.0, -INF, -INF]])
    assert_literal(gate(z, 4, top_p=0.1, min_k=3).experts, [[0, 1, -1, -1]])
    assert_literal(gate(z, 4, top_p=0.1, threshold=5.0, min_k=2).experts, [[0, 1, -1, -1]])
    assert_literal(
        gate(z, 4, threshold=0.5, min_k=2, num_groups=2, topk_groups=1).experts, [[0, 1, -1, -1]]
    )
    # The quota of a group stands above min_k.
    options = {"num_groups": 2, "max_per_group": 1, "threshold": 9.0, "min_k": 4}
    assert_literal(gate(torch.zeros(1, 4), 4, **options).experts, [[0, 2, -1, -1]])


def test_k_per_token_literals():
    z = torch.tensor([[1.0, 2.0, 3.0]]).expand(4, 3)
    k = torch.tensor([0, 1, 9, -5], dtype=torch.int32)
    routing = gate(z, 2, k_per_token=k, stats=True)
    assert_literal(
        routing.experts, [[-1, -1], [2, -1], [2, 1], [-1, -1]]
    )  # clamped to [0, 2]; over min_k
    assert_literal(routing.demand, [0, 1, 2])
    # A token with no expert still counts in the statistics.
    assert_literal(routing.score_sum, (4 * torch.softmax(z[0].double(), 0)).tolist())


def test_null_columns_literals():
    z = logs([1, 2, 3, 4])  # experts 0, 1, 2 and one null column with the best score
    routing = gate(z, 2, num_null=1, stats=True, keep_scores=True)
    assert_literal(routing.experts, [[2, -1]])  # the null column used up the first choice
    assert_literal(routing.weights, [[0.3, 0.0]])
    assert_literal(routing.demand, [0, 0, 1])
    assert_literal(routing.score_sum, [0.1, 0.2, 0.3])
    assert_literal(routing.scores, [[0.1, 0.2, 0.3]])
    assert_literal(routing.logsumexp, [math.log(10)])
    assert_literal(
        gate(z, 3, num_null=1, normalize=True).weights, [[0.6, 0.4, 0.0]]
    )  # real ones only
    assert_literal(
        gate(z, 2, num_null=2).experts, [[-1, -1]]
    )  # nulls counted for top_k, before min_k
    # top_p: 0.4 of the null column, then 0.3 of expert 2 exceeds 0.5.
    assert_literal(gate(z, 4, num_null=1, top_p=0.5).experts, [[2, -1, -1, -1]])
    # The null column alone exceeds 0.35 but does not count for min_k, which expert 2 then meets.
    assert_literal(gate(z, 4, num_null=1, top_p=0.35).experts, [[2, -1, -1, -1]])
    assert_literal(gate(z, 4, num_null=1, top_p=0.35, min_k=0).experts, [[-1, -1, -1, -1]])
    assert_literal(
        gate(z, 2, num_null=1, mask=torch.tensor([True, True, True, False])).experts, [[2, 1]]
    )


# ---- gate: statistics, NaN, infinities, empties ------------------------------------------------


def test_statistics_literals():
    z = torch.cat([logs([1, 3], [2, 2]), torch.tensor([[-INF, -INF]])])
    routing = gate(z, 1, stats=True, keep_scores=True)
    assert_literal(routing.score_sum, [0.25 + 0.5, 0.75 + 0.5])
    assert_literal(routing.logsumexp, [math.log(4), math.log(4), -INF])
    assert_literal(routing.scores, [[0.25, 0.75], [0.5, 0.5], [0.0, 0.0]])
    # Raw logits: neither mask nor bias nor noise has a part in the statistics.
    options = {
        "bias": torch.ones(2),
        "noise": torch.ones(3, 2),
        "mask": torch.tensor([True, False]),
    }
    assert_literal(gate(z, 1, stats=True, **options).logsumexp, [math.log(4), math.log(4), -INF])
    assert_literal(gate(z, 1, stats=True, **options).score_sum, [0.75, 1.25])


def test_a_fully_disallowed_row_is_none():
    z = torch.tensor([[1.0, 2.0], [-INF, -INF], [NAN, 1.0]], requires_grad=True)
    mask = torch.tensor([[False, False], [True, True], [False, False]])
    routing = gate(z, 2, score="sigmoid", mask=mask, normalize=True, stats=True, keep_scores=True)
    assert_literal(routing.experts, [[-1, -1]] * 3)
    assert_literal(routing.weights, [[0.0, 0.0]] * 3)
    assert_literal(routing.logsumexp, [-INF] * 3)
    assert_literal(routing.score_sum, [0.0, 0.0])
    one, two = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert_literal(routing.scores, [[one, two], [0.0, 0.0], [NAN, one]])
    routing.logsumexp.backward(torch.ones(3), retain_graph=True)
    routing.score_sum.sum().backward(retain_graph=True)
    assert_literal(z.grad, [[0.0, 0.0]] * 3)
    # Nor does a NaN in a row without slots reach a gradient through the weights.
    gate(z, 1, mask=mask, normalize=True).weights.sum().backward()
    assert z.grad[[0, 2]].eq(0).all()
    # Not every token is lost with it.
    assert_literal(gate(torch.tensor([[-INF] * 2, [1.0, 2.0]]), 1).experts, [[-1], [1]])


def test_nan_ranks_last_and_ids_stay_distinct():
    # vLLM and FlashInfer return an id twice, and crash on it later.
    assert chosen([NAN] * 4, 3) == [0, 1, 2]
    for score in cases.SCORES:
        routing = gate(torch.tensor([[NAN, 1.0, -INF, 2.0, -1000.0]]), 5, score=score)
        assert_literal(routing.experts, [[3, 1, 4, 0, -1]])
        assert_literal(routing.weights, [[NAN, NAN, NAN, NAN, 0.0]])
        # The same with a bias, where keys are scores: the others stay in order.
        assert chosen([NAN, 1.0, -INF, 2.0, -9.0], 5, score=score, bias=torch.zeros(5)) == [
            3, 1, 4, 0, -1,
        ]  # fmt: skip
    # A masked NaN spoils the weights all the same, and so does one in another group.
    mask = torch.tensor([False, True, True])
    assert_literal(
        gate(torch.tensor([[NAN, 0.0, 1.0]]), 1, score="sigmoid", mask=mask).weights, [[NAN]]
    )
    z = torch.tensor([[NAN, 0.0, 1.0, 1.0]])
    assert_literal(gate(z, 1, num_groups=2, softmax_over="group").weights, [[NAN]])
    # A NaN bias ranks last too, but spoils nothing.
    routing = gate(torch.zeros(1, 2), 2, bias=torch.tensor([NAN, -9.0]))
    assert_literal(routing.experts, [[1, 0]])
    assert_literal(routing.weights, [[0.5, 0.5]])
    # A NaN never exceeds a threshold nor fills up top_p.
    assert chosen([NAN, 1.0, 2.0], 3, score="sigmoid", threshold=0.1) == [2, 1, -1]
    assert chosen([NAN, 1.0, 2.0], 3, top_p=0.1) == [2, 1, 0]


def test_plus_infinity():
    routing = gate(torch.tensor([[1.0, INF, 2.0]]), 2)
    assert_literal(routing.experts, [[1, 2]])
    assert_literal(routing.weights, [[NAN, NAN]])
    routing = gate(torch.tensor([[1.0, INF, 2.0]]), 1, score="sigmoid", stats=True)
    assert_literal(routing.weights, [[1.0]])
    assert_literal(routing.logsumexp, [INF])
    # With a bias every softmax key is NaN: lower ids.
    assert chosen([1.0, INF, 2.0], 2, bias=torch.zeros(3)) == [0, 1]


@pytest.mark.parametrize("score", cases.SCORES)
def test_gradient_at_minus_infinity_is_exactly_zero(score):
    z = torch.tensor([[1.0, -INF, 2.0], [-INF, -INF, -INF]], requires_grad=True)
    routing = gate(z, 3, score=score, normalize=True, stats=True, keep_scores=True)
    weighted = [
        (out * torch.rand(out.shape)).nan_to_num(0, 0, 0).sum()
        for out in (routing.weights, routing.scores, routing.score_sum, routing.logsumexp)
    ]
    sum(weighted).backward()
    assert (z.grad[torch.isinf(z)] == 0).all()
    assert z.grad[0, 0] != 0


def test_gate_of_no_tokens():
    for options in ({}, {"num_groups": 2, "topk_groups": 1}, {"top_p": 0.5, "num_null": 1}):
        num_experts = 4 - options.get("num_null", 0)
        routing = gate(torch.zeros(0, 4), 2, stats=True, keep_scores=True, **options)
        shapes = [tuple(out.shape) for out in routing]
        assert shapes == [(0, 2), (0, 2), (num_experts,), (num_experts,), (0,), (0, num_experts)]
        assert_literal(routing.score_sum, [0.0] * num_experts)


def test_gate_dtypes():
    def dtypes(logits, **options):
        routing = gate(logits, 2, stats=True, keep_scores=True, **options)
        ints, floats = (routing.experts, routing.demand), (routing.weights, *routing[3:])
        assert {out.dtype for out in ints} == {torch.int32}
        return {out.dtype for out in floats}

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dtypes(torch.randn(3, 4).to(dtype)) == {torch.float32}
    assert dtypes(torch.randn(3, 4).double()) == {torch.float64}
    assert dtypes(torch.randn(3, 4), dtype=torch.float64) == {torch.float64}


# ---- gate: against a second, naive implementation and plain torch ------------------------------


def naive_choice(case: dict, t: int) -> list[int]:
    """The contract's step 3 and 4 for one token, in scalar Python."""
    num_columns = case["logits"].shape[1]
    num_groups = case.get("num_groups", 1)
    num_experts, size = num_columns - case.get("num_null", 0), num_columns // num_groups
    names = ("score", "softmax_over", "bias", "mask", "noise", "num_groups")
    keys = reference.gate_keys(case["logits"], **{n: case[n] for n in names if n in case})
    allowed, rank, key = (part[t].tolist() for part in keys)
    clean = reference.gate_scores(
        case["logits"], case["score"], case.get("softmax_over", "all"), num_groups
    )[t]

    def best_first(columns, value):
        numbers = [c for c in columns if not math.isnan(value[c])]
        nans = [c for c in columns if math.isnan(value[c])]
        return sorted(numbers, key=lambda c: (-value[c], c)) + sorted(nans)

    members = [
        [c for c in range(g * size, (g + 1) * size) if allowed[c]] for g in range(num_groups)
    ]
    if case.get("topk_groups"):
        worth = {}
        for g, columns in enumerate(members):
            if columns:
                top = best_first(columns, rank)[:2]
                worth[g] = rank[top[0]]
                if case["group_score"] == "top2_sum":
                    total = sum((keys.key[t, c] for c in top), keys.key.new_zeros(()))
                    worth[g] = total.item()
        open_groups = best_first(worth, worth)[: case["topk_groups"]]
        members = [members[g] if g in open_groups else [] for g in range(num_groups)]

    def option(name):
        value = torch.as_tensor(case.get(name, math.nan), dtype=clean.dtype)
        return value[t].item() if value.dim() else value.item()

    limit = case["top_k"]
    if "k_per_token" in case:
        limit = min(max(int(case["k_per_token"][t]), 0), limit)
    min_k = case.get("min_k", 1)
    real, taken, total, stopped = [], [], clean.new_zeros(()), False
    for c in best_first([c for columns in members for c in columns], rank):
        if sum(other // size == c // size for other in taken) >= case.get("max_per_group", 10**9):
            continue
        stopped = stopped or ("threshold" in case and not key[c] > option("threshold"))
        if len(taken) == limit or (stopped and len(real) >= min_k):
            break
        taken.append(c)
        total = total + clean[c]
        if c < num_experts:
            real.append(c)
        stopped = stopped or ("top_p" in case and total.item() > option("top_p"))
    return real + [-1] * (case["top_k"] - len(real))


def test_choice_agrees_with_a_naive_one():
    for case in cases.gate_cases(seed=1, n=200, max_experts=33):
        got = gate(**case).experts.tolist()
        want = [naive_choice(case, t) for t in range(len(got))]
        assert got == want, cases.describe(case)


def test_gate_invariants():
    for case in cases.gate_cases(seed=2, n=300, max_experts=129):
        routing = gate(**case)
        experts, weights = routing.experts, routing.weights
        num_experts = case["logits"].shape[1] - case.get("num_null", 0)
        name = cases.describe(case)
        assert experts.shape == weights.shape == (case["logits"].shape[0], case["top_k"]), name
        is_used = experts >= 0
        assert ((experts >= -1) & (experts < num_experts)).all(), name
        assert (weights[~is_used] == 0).all(), name
        assert (is_used[:, 1:] <= is_used[:, :-1]).all(), name  # real ones first
        assert routing.demand.sum() == is_used.sum(), name
        for row in experts.tolist():
            used = [e for e in row if e >= 0]
            assert len(set(used)) == len(used), name
        spoiled = case["logits"].isnan().any(1)[:, None] & is_used
        assert weights[spoiled].isnan().all(), name


def test_gate_agrees_with_torch_on_distinct_values():
    z = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    routing = gate(z, 8, normalize=True, stats=True)
    values, experts = torch.softmax(z.double(), 1).topk(8)
    assert torch.equal(routing.experts.long(), experts)
    assert_bound(routing.weights, values / values.sum(1, keepdim=True), 1e-6)
    assert_bound(routing.score_sum, torch.softmax(z.double(), 1).sum(0), 1e-5)
    assert_bound(routing.logsumexp, z.double().logsumexp(1), 1e-5)


@pytest.mark.parametrize("score", cases.SCORES)
@pytest.mark.parametrize("normalize", [False, True])
def test_gate_gradcheck(score, normalize):
    z = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    z = z.abs() if score == "identity" else z  # a sum below the floor has no gradient
    z = (z * torch.tensor([1.0, 1.0, 30.0])[:, None]).requires_grad_()
    options = {"score": score, "normalize": normalize, "stats": True, "keep_scores": True}

    def floats(logits):
        routing = gate(logits, 2, scale=1.5, **options)
        return routing.weights, routing.score_sum, routing.logsumexp, routing.scores

    assert torch.autograd.gradcheck(floats, (z,))


def test_gate_margin_literals():
    z = torch.tensor([[4.0, 1.0, 3.0, 1.5]])
    options = {"score": "identity", "num_groups": 2, "group_score": "top2_sum"}
    assert_literal(reference.gate_margin(z, 1, topk_groups=1, **options), [0.5])  # 5 against 4.5
    assert_literal(reference.gate_margin(z, 1, score="identity", threshold=2.75), [0.25])
    assert_literal(
        reference.gate_margin(logs([1, 2, 3, 4]), 2, top_p=0.65), [0.05]
    )  # 0.4, then 0.7
    assert_literal(reference.gate_margin(z, 1), [INF])


# ---- expert choice -----------------------------------------------------------------------------


def test_expert_choice_literals():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.5, 0.3], [0.4, 0.9]], requires_grad=True)
    routing = expert_choice(scores, 1)  # ties: the lower token
    assert_literal(routing.experts, [[-1, 1], [0, -1], [-1, -1], [-1, -1]])
    assert_literal(routing.weights, [[0.0, 0.9], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert_literal(routing.demand, [1, 1])
    routing.weights.sum().backward()
    assert_literal(scores.grad, [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert_literal(expert_choice(scores, 2).experts, [[-1, 1], [0, -1], [0, -1], [-1, 1]])
    # Scopes {0, 3} and {1, 2} each choose for themselves.
    scope_ids = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    routing = expert_choice(scores, 1, scope_ids=scope_ids, num_scopes=2)
    assert_literal(routing.experts, [[-1, 1], [0, -1], [-1, 1], [0, -1]])


def test_expert_choice_edges():
    routing = expert_choice(torch.tensor([[NAN], [-INF], [1.0]]), 2)  # NaN below -inf
    assert_literal(routing.experts, [[-1], [0], [0]])
    assert_literal(
        expert_choice(torch.tensor([[NAN], [1.0]]), 9).experts, [[0], [0]]
    )  # room for all
    assert expert_choice(torch.zeros(0, 3), 2).experts.shape == (0, 3)
    assert_literal(expert_choice(torch.zeros(0, 3), 2).demand, [0, 0, 0])
    scores = torch.randn(40, 5, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert expert_choice(scores, 3).weights.dtype == torch.float32
