"""Bugs that other gates shipped, each by its name; and what the whole gate may cost in memory."""

from __future__ import annotations

import math

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import reference
from fastmoe_route.bench.machine import library_info
from fastmoe_route.gate import SCORES
from torch.profiler import profile

INF, NAN = math.inf, math.nan
SCORE_OPTIONS = [{"score": score} for score in SCORES]


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
    assert routing.experts.tolist() == [[8, 9, 10, 11, 0, 1]] * 4


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


def test_every_expert_one_expert_no_token():
    logits = torch.randn(5, 19, generator=torch.Generator().manual_seed(4))
    everyone = fr.gate(logits, 19, normalize=True)
    assert torch.equal(everyone.experts.long(), logits.argsort(dim=1, descending=True, stable=True))
    assert (everyone.weights.sum(1) - 1).abs().max() < 1e-6
    alone = fr.gate(logits[:, :1], 1)
    assert alone.experts.tolist() == [[0]] * 5
    assert alone.weights.tolist() == [[1.0]] * 5
    # SGLang CPU and kt-kernel die on no tokens
    none = fr.gate(logits[:0], 4, stats=True)
    assert none.demand.tolist() == [0] * 19
    assert none.score_sum.tolist() == [0.0] * 19


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


# five projects: T * K past 2^31 wraps; ours is an error before anything is allocated
def test_too_many_slots_are_an_error():
    logits = torch.zeros(1, 8).expand(1 << 28, 8)
    with pytest.raises(RuntimeError, match=r"gate: logits must have fewer than 2\^31 / top_k rows"):
        fr.gate(logits, 8)


# torch.topk: ties are arbitrary; here they are the lower expert's for every way of selecting
@pytest.mark.parametrize("top_k", [1, 5, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("num_experts", [64, 65, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_expert(num_experts, top_k, dtype):
    generator = torch.Generator().manual_seed(6)
    logits = (torch.randn(50, num_experts, generator=generator) * 2).round().to(dtype)
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    if top_k <= num_experts // 2:
        logits[2, : num_experts // 2] = -INF
    expected = logits.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(fr.gate(logits, top_k).experts.long(), expected)


@pytest.mark.parametrize("top_k", [8, 16])
def test_large_keys_that_share_their_places(top_k):
    """The largest logits one vector apart: the short list runs over, and the choice is the same."""
    logits = torch.randn(9, 1024, generator=torch.Generator().manual_seed(7))
    for step in (8, 16, 32):
        crowded = logits.clone()
        crowded[:, 3::step] += 10
        assert torch.equal(fr.gate(crowded, top_k).experts.long(), crowded.topk(top_k).indices)


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


# 16 GiB were asked for on behalf of a number of experts that nobody had checked
def test_a_number_of_experts_without_bound_is_an_error():
    logits = torch.zeros(1, 1).expand(1, 1 << 40)
    with pytest.raises(ValueError, match="gate: logits must have 1 to 8192 experts"):
        fr.gate(logits, 1)


# zentorch: a view that is not contiguous is read as if it were
def test_views_are_read_by_their_strides():
    wide = torch.randn(2 * 41, 3 * 50, generator=torch.Generator().manual_seed(9))
    for view in (wide[::2, :50], wide[:, ::3], wide.t(), wide.flip(1)[:, 7:70]):
        got, expected = fr.gate(view, 8, stats=True), fr.gate(view.clone(), 8, stats=True)
        assert all(torch.equal(a, b) for a, b in zip(got[:5], expected[:5], strict=True))


# fp32 routers of torch and its peers: what a token gets depends on how many others there are
def test_a_token_alone_has_the_bits_it_has_in_a_batch():
    logits = torch.randn(97, 66, generator=torch.Generator().manual_seed(10))
    for options in ({"normalize": True}, {"stats": True}, {"score": "sigmoid"}):
        together = fr.gate(logits, 8, **options)
        for t in range(97):
            alone = fr.gate(logits[t : t + 1], 8, **options)
            assert torch.equal(alone.experts[0], together.experts[t])
            assert torch.equal(alone.weights[0], together.weights[t])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("depth", [0.0, 25.0, 60.0, 120.0])
def test_gradient_of_normalised_weights_far_below_the_largest_logit(depth, dtype):
    """Chosen logits `depth` below one that is masked: the gradient of the chosen alone."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(9, 40, generator=generator).to(dtype)
    logits[:, 17] = depth
    mask = torch.ones(40, dtype=torch.bool)
    mask[17] = False
    grad = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    for top_k in (3, 20):
        leaf = logits.clone().requires_grad_()
        routing = fr.gate(leaf, top_k, mask=mask, normalize=True, scale=2.0)
        got = torch.autograd.grad(routing.weights, leaf, grad[:, :top_k].to(routing.weights.dtype))
        wide = logits.double().requires_grad_()
        scores = wide.softmax(1).gather(1, routing.experts.long())
        weights = 2.0 * scores / scores.sum(1, keepdim=True).clamp_min(1e-20)
        expected = torch.autograd.grad(weights, wide, grad[:, :top_k])[0]
        assert (got[0].double() - expected).abs().max() < (
            0.03 if dtype == torch.bfloat16 else 2e-6
        )


@pytest.mark.cpu_only
@pytest.mark.parametrize("stats", [False, True])
def test_memory_of_the_whole_gate_is_its_outputs(stats):
    logits = torch.randn(20_000, 256)
    options = {"stats": stats, "keep_scores": stats}
    before = int(library_info()["scratch_bytes"])
    fr.gate(logits, 8, **options)
    with profile(profile_memory=True) as run:
        routing = fr.gate(logits, 8, **options)
    outputs = sum(x.numel() * x.element_size() for x in routing if x is not None)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in run.key_averages())
    assert allocated == outputs
    # Scratch is a few rows a thread, and the sums of at most 1024 tiles of rows for the statistics.
    assert int(library_info()["scratch_bytes"]) - before < 4 << 20


@pytest.mark.cpu_only
def test_a_trace_with_columns_holds_for_as_many_tokens_as_experts():
    """Shapes of unequal rank were compared: a trace was good for any number of tokens but `E`."""

    class Gate(torch.nn.Module):
        def forward(self, logits, bias, mask):
            return fr.gate(logits, 2, bias=bias, mask=mask, score="sigmoid")[:2]

    tokens = torch.export.Dim("tokens", min=2, max=64)
    columns = (torch.zeros(8), torch.ones(8, dtype=torch.bool))
    given = (torch.randn(5, 8), *columns)
    program = torch.export.export(Gate(), given, dynamic_shapes=({0: tokens}, None, None))
    logits = torch.randn(8, 8)
    experts, weights = program.module()(logits, *columns)
    routing = fr.gate(logits, 2, bias=columns[0], score="sigmoid")
    assert torch.equal(experts, routing.experts)
    assert torch.equal(weights, routing.weights)
