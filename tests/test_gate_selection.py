"""gate: which experts are chosen, whatever a row holds; bugs that other gates shipped, by name."""

from __future__ import annotations

import math

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import reference
from fastmoe_route.gate import SCORES
from tolerance import assert_bound, assert_exact, assert_literal, gate_weight_limit

INF, NAN = math.inf, math.nan
SCORE_OPTIONS = [{"score": score} for score in SCORES]


def gate(rows, top_k, **options):
    return fr.gate(torch.tensor(rows, dtype=torch.float32), top_k, **options)


# ---- literals ------------------------------------------------------------------------------------


def test_grouped_literal_of_deepseek_v3():
    # groups {0,1} {2,3} {4,5} {6,7}; best sums: 0.9+0.1, 0.6+0.6, 0.5+0.3, 0.7+0.4 -> groups 1, 3
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6, 0.5, 0.3, 0.7, 0.4]])
    options = {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum", "normalize": True}
    routing = fr.gate(scores.logit(), 3, score="sigmoid", **options)
    assert_literal(routing.experts, [[6, 2, 3]])
    assert_literal(routing.weights, [[0.7 / 1.9, 0.6 / 1.9, 0.6 / 1.9]])


def test_stop_rules_literals():
    logits = [[math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]]
    assert_literal(gate(logits, 4, top_p=0.7).experts, [[0, 1, -1, -1]])
    assert_literal(gate(logits, 4, threshold=0.1).experts, [[0, 1, 2, -1]])
    assert_literal(gate(logits, 4, threshold=0.9, min_k=2).experts, [[0, 1, -1, -1]])
    none = torch.tensor([0], dtype=torch.int32)
    assert_literal(gate(logits, 2, k_per_token=none).experts, [[-1, -1]])


def test_null_columns_use_up_choices_and_give_no_slot():
    routing = gate([[1.0, 3.0, 2.0]], 2, num_null=1, score="identity")
    assert_literal(routing.experts, [[1, -1]])
    assert_literal(routing.weights, [[3.0, 0.0]])
    assert_literal(routing.demand, [0, 1])


def test_signed_zeros_are_equal():
    assert_literal(gate([[-0.0, 0.0, -0.0]], 3).experts, [[0, 1, 2]])


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_underflow_loses_no_expert(score):
    routing = gate([[-100.0, -101.0, -99.0, -98.0]], 4, score=score, normalize=True)
    assert_literal(routing.experts, [[3, 2, 0, 1]])
    assert (routing.weights > 0).all()
    deep = gate([[-200.0, -103.0]], 2, score="sqrtsoftplus").weights
    assert (deep > 0).all()
    assert gate([[-103.0]], 1, score="sigmoid").weights.item() == 2.0**-149


def test_nan_rows_have_valid_distinct_ids_and_nan_weights():
    routing = gate([[NAN, 1.0, NAN, 0.0], [NAN] * 4], 3, stats=True)
    assert_literal(routing.experts, [[1, 3, 0], [0, 1, 2]])
    assert routing.weights.isnan().all()
    masked = gate([[NAN, 1.0]], 1, mask=torch.tensor([False, True]))
    assert_literal(masked.experts, [[1]])
    assert masked.weights.isnan().all()


def test_disallowed_rows():
    routing = gate([[-INF, -INF], [1.0, 1.0]], 2, stats=True)
    assert_literal(routing.experts, [[-1, -1], [0, 1]])
    assert_literal(routing.weights, [[0.0, 0.0], [0.5, 0.5]])
    assert_literal(routing.score_sum, [0.5, 0.5])
    assert routing.logsumexp[0] == -INF
    masked = gate([[1.0, 2.0]], 1, mask=torch.zeros(2, dtype=torch.bool), stats=True)
    assert_literal(masked.score_sum, [0.0, 0.0])
    assert masked.logsumexp[0] == -INF


def test_plus_infinity_is_nan_as_in_torch():
    routing = gate([[INF, 0.0]], 2, normalize=True)
    assert_literal(routing.experts, [[0, 1]])
    assert routing.weights.isnan().all()


# ---- bugs that other gates shipped ---------------------------------------------------------------


def assert_valid(routing, num_experts):
    """Ids in range and distinct per token, real ones first; weights 0 where there is none."""
    experts = routing.experts
    assert ((experts >= -1) & (experts < num_experts)).all()
    used = experts >= 0
    assert (used[:, 1:] <= used[:, :-1]).all()
    ranked = experts.masked_fill(~used, 0).long()
    seen = torch.zeros(len(experts), num_experts, dtype=torch.long).scatter_add(
        1, ranked, used.long()
    )
    assert (seen <= 1).all()
    assert (routing.weights[~used] == 0).all()
    assert torch.equal(seen.sum(0).int(), routing.demand)


# TransformerEngine, FlashInfer, DeepSpeed
@pytest.mark.parametrize("options", SCORE_OPTIONS, ids=str)
def test_all_negative_logits_choose_the_largest(options):
    logits = -1 - torch.rand(33, 70, generator=torch.Generator().manual_seed(0))
    expected = logits.argmax(1).int() if options["score"] != "relu" else torch.zeros(33).int()
    assert torch.equal(fr.gate(logits, 3, **options).experts[:, 0], expected)


# SGLang, FlashInfer: every score of a token underflows and the normalised weights are 0 / 0
@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus", "softmax"])
@pytest.mark.parametrize("shift", [-30.0, -100.0])
def test_underflow_gives_no_zero_over_zero(score, shift):
    logits = shift + torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    routing = fr.gate(logits, 4, score=score, normalize=True)
    assert torch.equal(routing.experts.long(), logits.topk(4).indices)
    assert (routing.weights > 0).all()
    if score == "softmax" or shift > -50:  # further down the sum of the scores is below its floor
        assert (routing.weights.sum(1) - 1).abs().max() < 1e-5


# FlashInfer: a weight taken as key minus bias is cancelled, a negative bias is not supported
@pytest.mark.parametrize("value", [-1e30, -3e8, -1.0, 1e8, 1e30])
def test_huge_and_negative_bias_leave_the_weights_alone(value):
    logits = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    bias = torch.zeros(32)
    bias[7] = value
    options = {"score": "sigmoid", "bias": bias, "keep_scores": True}
    routing = fr.gate(logits, 32, **options)
    assert (routing.experts[:, 0 if value > 0 else -1] == 7).all()
    assert torch.equal(routing.weights, routing.scores.gather(1, routing.experts.long()))


# vLLM: groups that are closed count as 0, which beats negative keys
def test_closed_groups_lose_to_negative_keys():
    logits = torch.full((4, 16), -5.0)
    logits[:, 8:12] = -4.0
    routing = fr.gate(logits, 6, score="identity", num_groups=4, topk_groups=2)
    assert_literal(routing.experts, [[8, 9, 10, 11, 0, 1]] * 4)
    options = {"bias": torch.full((4,), -10.0), "num_groups": 2, "topk_groups": 1}
    assert_literal(gate([[0.0, 1.0, 2.0, 3.0]], 2, score="sigmoid", **options).experts, [[3, 2]])


def test_softmax_inside_one_group_compares_the_logits():
    logits = torch.tensor([[0.0, INF, 1.0], [NAN, 0.0, 1.0]])
    whole, inside = (fr.gate(logits, 2, softmax_over=over) for over in ("all", "group"))
    assert inside.experts.tolist() == whole.experts.tolist() == [[1, 2], [2, 1]]


# vLLM: groups of one expert have no second best
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_groups_of_one(group_score):
    logits = torch.randn(7, 24, generator=torch.Generator().manual_seed(3))
    options = {"num_groups": 24, "topk_groups": 5, "group_score": group_score}
    routing = fr.gate(logits, 5, score="identity", **options)
    assert torch.equal(routing.experts.long(), logits.topk(5).indices)


# SGLang: two equal maxima of a group count once
@pytest.mark.parametrize("size", [2, 8, 16, 32, 33])
def test_tied_group_maxima_count_twice(size):
    logits = torch.full((3, 2 * size), -9.0)
    logits[:, 0], logits[:, 1] = 3.0, 0.5
    logits[:, size], logits[:, 2 * size - 1] = 2.0, 2.0
    options = {"num_groups": 2, "topk_groups": 1, "group_score": "top2_sum"}
    routing = fr.gate(logits, 2, score="identity", **options)
    assert routing.experts.tolist() == [[size, 2 * size - 1]] * 3


# vLLM, FlashInfer: NaN rows give one id twice, and the next kernel reads out of bounds
@pytest.mark.parametrize("top_k", [1, 2, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("options", SCORE_OPTIONS, ids=str)
def test_no_input_gives_a_duplicate_or_an_id_out_of_range(options, top_k):
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(64, 40, generator=generator)
    for value in (NAN, INF, -INF, 0.0, 3e38, -3e38, 1e-45):
        logits = logits.masked_fill(torch.rand(64, 40, generator=generator) < 0.15, value)
    logits[:7] = torch.tensor([NAN, INF, -INF, 0.0, 3e38, -3e38, 1e-45])[:, None]
    for extra in ({}, {"num_groups": 5, "topk_groups": 2}, {"normalize": True, "stats": True}):
        assert_valid(fr.gate(logits, top_k, **options, **extra), 40)


def test_masked_rows_route_nowhere():
    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(6, 33, dtype=torch.bool)
    mask[2] = False
    logits[4] = -INF
    routing = fr.gate(logits, 4, mask=mask, stats=True, normalize=True)
    assert (routing.experts[[2, 4]] == -1).all()
    assert (routing.weights[[2, 4]] == 0).all()
    assert (routing.logsumexp[[2, 4]] == -INF).all()
    expected = logits[[0, 1, 3, 5]].softmax(1).sum(0)
    assert (routing.score_sum - expected).abs().max() < 1e-5


# torch.topk: ties are arbitrary; here they are the lower expert's for every way of selecting
@pytest.mark.parametrize("top_k", [1, 5, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("num_experts", [4, 17, 64, 65, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_expert(num_experts, top_k, dtype):
    top_k = min(top_k, num_experts)
    generator = torch.Generator().manual_seed(6)
    logits = (torch.randn(50, num_experts, generator=generator) * 2).round().to(dtype)
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    if top_k <= num_experts // 2:
        logits[2, : num_experts // 2] = -INF
    expected = logits.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(fr.gate(logits, top_k).experts.long(), expected)


# fp32 routers of torch and its peers: what a token gets depends on how many others there are
def test_a_token_alone_has_the_bits_it_has_in_a_batch():
    logits = torch.randn(257, 66, generator=torch.Generator().manual_seed(10))
    grouped = {"score": "sigmoid", "num_groups": 6, "topk_groups": 2, "normalize": True}
    for options in ({"normalize": True}, {"stats": True}, {"score": "sigmoid"}, grouped):
        together = fr.gate(logits, 8, **options)
        for t in (*range(97), 127, 128, 255, 256):
            alone = fr.gate(logits[t : t + 1], 8, **options)
            assert torch.equal(alone.experts[0], together.experts[t])
            assert torch.equal(alone.weights[0], together.weights[t])


# ---- every way of selecting ----------------------------------------------------------------------


# selection by parts: the best lie side by side, are equal, are signed zeros, or are fewer than K
@pytest.mark.parametrize("num_experts", [4, 8, 12, 16, 24, 40, 64, 100, 128, 256, 300])
@pytest.mark.parametrize("normalize", [False, True])
def test_choices_of_every_width_are_exact(num_experts, normalize):
    random = torch.randn(8, num_experts, generator=torch.Generator().manual_seed(3))
    few = random.where(random > 1, -torch.inf)
    zeros = torch.where(random > 0.5, 0.0, torch.where(random > -0.5, -0.0, random.clamp(max=-1)))
    rows = [random, (4 * random).round() / 4, random.sort(1, descending=True).values, random.sign()]
    rows += [few, zeros, 1000 + random, 3e8 + 1e8 * random, torch.zeros(1, num_experts)]
    logits = torch.cat(rows)
    for top_k in (1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 40, 63, 64, 65, num_experts):
        if top_k > num_experts:
            continue
        routing = fr.gate(logits, top_k, normalize=normalize)
        wide = reference.gate(logits, top_k, normalize=normalize, dtype=torch.float64)
        assert_exact(routing.experts, wide.experts.int())
        assert_exact(routing.demand, wide.demand.int())
        limit = gate_weight_limit(logits, routing.experts, normalize=normalize)
        assert_bound(routing.weights, wide.weights, limit)


@pytest.mark.parametrize("top_k", [8, 16])
def test_large_keys_that_share_their_places(top_k):
    """The largest logits one vector apart: the short list runs over, and the choice is the same."""
    logits = torch.randn(9, 1024, generator=torch.Generator().manual_seed(7))
    for step in (8, 16, 32):
        crowded = logits.clone()
        crowded[:, 3::step] += 10
        assert torch.equal(fr.gate(crowded, top_k).experts.long(), crowded.topk(top_k).indices)


@pytest.mark.parametrize("top_k", [1, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_weights_for_every_way_of_selecting(score, top_k):
    """Rows of which the short list holds all, some or too many; weights as float64 has them."""
    logits = torch.randn(23, 64, generator=torch.Generator().manual_seed(top_k)) * 3
    logits[1] = 0.25
    logits[2, 5:] = -INF  # five allowed: the slots past them stay empty
    logits[3, :32] += 20
    logits[4:8] = logits[4:8].round()
    exact = reference.gate(logits.double(), top_k, score=score, normalize=True, scale=1.5)
    routing = fr.gate(logits, top_k, score=score, normalize=True, scale=1.5)
    assert torch.equal(routing.experts, exact.experts)
    assert (routing.weights - exact.weights).abs().max() < 4e-7
    assert (routing.experts[2, 5:] == -1).all()


@pytest.mark.parametrize("num_groups", [2, 3, 8, 16, 17])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_groups_of_whole_vectors(num_groups, group_score):
    """Groups that a kernel may rank and search by vectors; eighths, so that every tie is one."""
    generator = torch.Generator().manual_seed(num_groups)
    shape = (9, 32 * num_groups)
    logits = torch.randint(-16, 17, shape, generator=generator) / 8
    logits[3] = 0.0
    bias = torch.randint(-8, 9, shape[1:], generator=generator) / 8
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[4] = False
    mask[5, 32:] = False
    limited = {"num_groups": num_groups, "topk_groups": (num_groups + 1) // 2}
    for top_k in (1, 8, 16, 24):
        for options in ({}, {"bias": bias}, {"mask": mask}, {"bias": bias, "mask": mask}):
            case = {"logits": logits, "top_k": top_k, "score": "identity", **limited, **options}
            wanted = reference.gate(**case, group_score=group_score)
            assert_exact(fr.gate(**case, group_score=group_score).experts, wanted.experts.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_weights_with_closed_groups_are_scores_of_the_whole_row(
    score, normalize, group_score, dtype
):
    logits = torch.randn(9, 24, generator=torch.Generator().manual_seed(12)).to(dtype)
    options = {"score": score, "num_groups": 3, "topk_groups": 1, "group_score": group_score}
    exact = reference.gate(logits.double(), 4, normalize=normalize, **options)
    for stats in (False, True):
        routing = fr.gate(logits, 4, normalize=normalize, stats=stats, **options)
        assert torch.equal(routing.experts, exact.experts)
        assert (routing.weights - exact.weights).abs().max() < 2e-6


def test_the_choice_does_not_depend_on_what_else_is_asked_for():
    logits = torch.randn(37, 96, generator=torch.Generator().manual_seed(8))
    for options in ({}, {"score": "sigmoid"}, {"num_groups": 6, "topk_groups": 2}):
        plain = fr.gate(logits, 6, **options)
        for more in ({"stats": True}, {"keep_scores": True}, {"stats": True, "keep_scores": True}):
            full = fr.gate(logits, 6, **options, **more)
            assert torch.equal(full.experts, plain.experts)
            assert torch.equal(full.weights, plain.weights)
        leaf = fr.gate(logits.clone().requires_grad_(), 6, **options)
        assert torch.equal(leaf.experts, plain.experts)
        assert torch.equal(leaf.weights, plain.weights)


def test_every_expert_and_one_expert():
    logits = torch.randn(5, 19, generator=torch.Generator().manual_seed(4))
    everyone = fr.gate(logits, 19, normalize=True)
    assert torch.equal(everyone.experts.long(), logits.argsort(dim=1, descending=True, stable=True))
    assert (everyone.weights.sum(1) - 1).abs().max() < 1e-6
    alone = fr.gate(logits[:, :1], 1)
    assert alone.experts.tolist() == [[0]] * 5
    assert alone.weights.tolist() == [[1.0]] * 5
