"""gate: scores, choice, weights, statistics and their gradients."""

from __future__ import annotations

import math

import cases
import fastmoe_route as fr
import pytest
import torch
import vm_backend
from fastmoe_route import reference
from fastmoe_route.gate import SCORES
from tolerance import (
    assert_bound,
    assert_exact,
    assert_has_power,
    assert_literal,
    assert_near_tie,
    gate_weight_limit,
    key_limit,
    logsumexp_limit,
    rounding,
    score_limit,
    score_sum_limit,
)

INF, NAN = math.inf, math.nan


def gate(rows, top_k, **options):
    return fr.gate(torch.tensor(rows, dtype=torch.float32), top_k, **options)


# ---- literals ----------------------------------------------------------------------------------


def test_softmax_literals():
    # e^ln1, e^ln2, e^ln5 over their sum 8: 1/8, 2/8, 5/8
    logits = [[math.log(1), math.log(2), math.log(5)]]
    routing = gate(logits, 2, stats=True, keep_scores=True)
    assert_literal(routing.experts, [[2, 1]])
    assert_literal(routing.weights, [[0.625, 0.25]])
    assert_literal(routing.demand, [0, 1, 1])
    assert_literal(routing.score_sum, [0.125, 0.25, 0.625])
    assert_literal(routing.logsumexp, [math.log(8)])
    assert_literal(routing.scores, [[0.125, 0.25, 0.625]])


def test_normalised_and_scaled_literal():
    logits = [[math.log(1), math.log(2), math.log(5)]]
    assert_literal(gate(logits, 2, normalize=True, scale=7.0).weights, [[5.0, 2.0]])


@pytest.mark.parametrize(
    ("score", "z", "expected"),
    [
        ("sigmoid", 0.0, 0.5),
        ("sigmoid", math.log(3), 0.75),
        ("sqrtsoftplus", math.log(math.e - 1), 1.0),
        ("sqrtsoftplus", 0.0, math.sqrt(math.log(2))),
        ("relu", -2.0, 0.0),
        ("relu", 3.0, 3.0),
        ("identity", -2.5, -2.5),
    ],
)
def test_score_literals(score, z, expected):
    assert_literal(gate([[z]], 1, score=score).weights, [[expected]])


def test_ties_go_to_the_lower_expert_across_vector_edges():
    for num_experts in (4, 16, 17, 64, 257, 1000):
        routing = gate([[1.0] * num_experts], min(num_experts, 40))
        assert_literal(routing.experts, [list(range(min(num_experts, 40)))])
    assert_literal(gate([[-0.0, 0.0, -0.0]], 3).experts, [[0, 1, 2]])


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


# ---- bugs that other gates shipped -------------------------------------------------------------


def test_all_negative_scores_choose_the_largest():
    assert_literal(gate([[-5.0, -1.0, -3.0] * 11], 2, score="identity").experts, [[1, 4]])


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_underflow_loses_no_expert(score):
    routing = gate([[-100.0, -101.0, -99.0, -98.0]], 4, score=score, normalize=True)
    assert_literal(routing.experts, [[3, 2, 0, 1]])
    assert (routing.weights > 0).all()
    deep = gate([[-200.0, -103.0]], 2, score="sqrtsoftplus").weights
    assert (deep > 0).all()
    assert gate([[-103.0]], 1, score="sigmoid").weights.item() == 2.0**-149


def test_weights_are_not_recovered_from_keys():
    bias = torch.tensor([1e8, 0.0])
    assert_literal(gate([[0.0, 0.0]], 1, score="sigmoid", bias=bias).weights, [[0.5]])


def test_negative_bias_and_closed_groups_are_not_zeros():
    bias = torch.full((4,), -10.0)
    options = {"num_groups": 2, "topk_groups": 1}
    routing = gate([[0.0, 1.0, 2.0, 3.0]], 2, score="sigmoid", bias=bias, **options)
    assert_literal(routing.experts, [[3, 2]])


def test_groups_of_one_and_tied_group_maxima():
    options = {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"}
    assert_literal(gate([[1.0, 4.0, 3.0, 2.0]], 2, score="identity", **options).experts, [[1, 2]])
    # 2 + 2 beats 3 + 0.5: two equal maxima count twice
    pair = {"num_groups": 2, "topk_groups": 1, "group_score": "top2_sum"}
    assert_literal(gate([[3.0, 0.5, 2.0, 2.0]], 2, score="identity", **pair).experts, [[2, 3]])


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


# ---- reference ---------------------------------------------------------------------------------


def check_against_reference(case):
    """Compares every result of one case with the float64 oracle; returns the slots that differ."""
    got = fr.gate(**case)
    wide = reference.gate(**case, dtype=torch.float64)
    names = ("score", "softmax_over", "num_groups")
    scoring = {name: case[name] for name in names if name in case}
    keying = {n: case[n] for n in ("bias", "mask", "noise") if n in case} | scoring
    keys = reference.gate_keys(case["logits"], dtype=torch.float64, **keying)
    limit = key_limit(case["logits"], **keying)
    margin = reference.gate_margin(**case)
    doubt = limit.nan_to_num(0.0).sum(1) * 2 + 1e-30 if limit.numel() else margin
    is_exact = keys.rank is not keys.key
    num_different = assert_near_tie(
        got.experts,
        wide.experts,
        keys.rank.double(),
        0.0 if is_exact else limit,
        undecided=~(margin > doubt),
    )
    weighing = scoring | {n: case[n] for n in ("normalize", "scale") if n in case}
    weights = reference.gate_weights(case["logits"], got.experts, dtype=torch.float64, **weighing)
    assert_bound(got.weights, weights, gate_weight_limit(case["logits"], got.experts, **weighing))
    assert (got.weights[got.experts < 0] == 0).all()
    used = got.experts[got.experts >= 0]
    assert_exact(got.demand, torch.bincount(used, minlength=len(got.demand)).int())
    if case.get("keep_scores"):
        bound = score_limit(case["logits"], **scoring)[:, : len(got.demand)]
        assert_bound(got.scores, wide.scores, bound)
    if case.get("stats"):
        bound = score_sum_limit(case["logits"], len(got.demand), **scoring)
        assert_bound(got.score_sum, wide.score_sum, bound)
        assert_bound(got.logsumexp, wide.logsumexp, logsumexp_limit(case["logits"]))
    return num_different


def test_random_option_combinations_agree_with_the_reference():
    num_different = 0
    for i, case in enumerate(cases.gate_cases(seed=20, n=vm_backend.repeats(1200, vm=250))):
        try:
            num_different += check_against_reference(case)
        except Exception as error:
            raise AssertionError(f"case {i}: {cases.describe(case)}") from error
    assert num_different < 200  # near ties are rare


def test_float64_combinations_agree_with_the_reference():
    for i, case in enumerate(cases.gate_cases(seed=21, n=300, dtypes=(torch.float64,))):
        got, wanted = fr.gate(**case), reference.gate(**case)
        try:
            assert_exact(got.experts, wanted.experts.int())
            assert_bound(
                got.weights, wanted.weights, 1e-12 * (1 + wanted.weights.abs().nan_to_num())
            )
        except AssertionError as error:
            raise AssertionError(f"case {i}: {cases.describe(case)}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts", [8, 16, 32, 40, 64, 104, 128, 200, 256])
def test_plain_rows_of_every_width(dtype, num_experts):
    """Calls without options, whose rows a GPU keeps in registers; ties, -inf and NaN among them."""
    logits = torch.randn(37, num_experts, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[5] = 0.5
    logits[6, ::2] = -math.inf
    logits[7, 3] = math.nan
    for top_k in (1, 5, 8):
        case = {"logits": logits, "top_k": top_k}
        check_against_reference({**case, "normalize": True})
        check_against_reference({**case, "score": "sigmoid", "stats": True})
        check_against_reference({**case, "score": "identity", "scale": 2.5})
    leaf = logits[:5].clone().requires_grad_()
    routing = fr.gate(leaf, 5, normalize=True)
    (got,) = torch.autograd.grad(routing.weights.square().sum(), leaf)
    wide = logits[:5].double().requires_grad_()
    chosen = wide.softmax(-1).gather(1, routing.experts.long())
    wanted = (chosen / chosen.sum(-1, keepdim=True)).square().sum()
    (exact,) = torch.autograd.grad(wanted, wide)
    assert_bound(got, exact, 1e-5 + torch.finfo(dtype).eps * exact.abs())


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


def test_bounds_can_fail():
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    routing = fr.gate(logits, 4, stats=True)
    wide = reference.gate(logits, 4, stats=True, dtype=torch.float64)
    limit = gate_weight_limit(logits, routing.experts)
    assert_has_power(lambda w: assert_bound(w, wide.weights, limit), routing.weights)
    assert_has_power(lambda e: assert_exact(e, wide.experts.int()), routing.experts)
    bound = score_sum_limit(logits, 64)
    assert_has_power(lambda s: assert_bound(s, wide.score_sum, bound), routing.score_sum)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_rows_and_large_k(dtype):
    generator = torch.Generator().manual_seed(1)
    for num_experts, top_k in ((8192, 1), (8192, 64), (4097, 4097), (300, 300), (64, 64)):
        logits = torch.randn(3, num_experts, generator=generator).to(dtype)
        check_against_reference({"logits": logits, "top_k": top_k, "stats": True})


# ---- gradients ---------------------------------------------------------------------------------

GRADIENT_CASES = [
    {"score": score, "normalize": normalize, "scale": 1.5}
    for score in SCORES
    for normalize in (False, True)
] + [
    {"softmax_over": "group", "num_groups": 3, "topk_groups": 2, "normalize": True},
    {"num_null": 2, "normalize": True},
    {"top_p": 0.3, "score": "sigmoid"},
]


@pytest.mark.parametrize("options", GRADIENT_CASES, ids=str)
@pytest.mark.parametrize("stats", [False, True])
def test_gradcheck(options, stats):
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits = logits.mul(2).requires_grad_()

    def floats(z):
        routing = fr.gate(z, 3, stats=stats, keep_scores=stats, **options)
        results = (routing.weights, routing.score_sum, routing.logsumexp, routing.scores)
        return tuple(result for result in results if result is not None)

    assert torch.autograd.gradcheck(floats, (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_agree_with_the_reference(dtype):
    tried = 0
    for case in cases.gate_cases(seed=31, n=250, max_experts=129, dtypes=(dtype,)):
        if not case["logits"].numel() or not case["logits"].isfinite().all():
            continue
        generator = torch.Generator().manual_seed(tried)

        def grad_of(op, logits, generator=generator, case=case):
            generator.manual_seed(7)
            logits = logits.detach().clone().requires_grad_()
            routing = op(**{**case, "logits": logits})
            outputs = (routing.weights, routing.score_sum, routing.logsumexp, routing.scores)
            total = 0.0
            for output in outputs:
                if output is not None:
                    noise = torch.randn(output.shape, generator=generator)
                    total = total + (output.double() * noise).sum()
            total.backward()
            return routing.experts, logits.grad

        experts, got = grad_of(fr.gate, case["logits"])
        expected_experts, expected = grad_of(reference.gate, case["logits"].double())
        if not torch.equal(experts, expected_experts) or not expected.to(dtype).isfinite().all():
            continue
        size = expected.abs().amax(1, keepdim=True)
        assert_bound(got, expected, 3e-4 * size + 1e-5 + rounding(expected, dtype))
        tried += 1
    assert tried > 60


def test_gradient_at_minus_infinity_is_exactly_zero():
    for score in SCORES:
        logits = torch.tensor([[1.0, -INF, 0.5, -INF]], requires_grad=True)
        routing = fr.gate(logits, 2, score=score, stats=score != "identity", normalize=True)
        total = routing.weights[0, 0] * 3
        if routing.logsumexp is not None:
            total = total + routing.logsumexp.sum() + (routing.score_sum * torch.arange(4)).sum()
        total.backward()
        assert (logits.grad[0, [1, 3]] == 0).all()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_gradient_of_a_row_with_nan_and_minus_infinity(score, normalize, stats):
    clean = torch.randn(6, 21)
    clean[:, 5] = -INF
    spoiled = clean.clone()
    spoiled[3, 7] = NAN

    def gradient(logits):
        logits = logits.clone().requires_grad_()
        routing = fr.gate(logits, 3, score=score, normalize=normalize, stats=stats)
        total = (routing.weights * torch.tensor([1.0, 2.0, 3.0])).sum()
        total = total + routing.logsumexp.sum() if stats else total
        total.backward()
        return routing.experts, logits.grad

    _, wanted = gradient(clean)
    experts, got = gradient(spoiled)
    assert_exact(got[[0, 1, 2, 4, 5]], wanted[[0, 1, 2, 4, 5]])  # no row sees another
    assert (got[:, 5] == 0).all()
    assert got[3, 7].isnan() or (score == "identity" and not stats)  # whose slope is 1
    if score == "softmax":
        assert got[3, experts[3].long()].isnan().all()


def test_integer_results_and_unused_outputs_need_no_gradient():
    logits = torch.randn(4, 8, requires_grad=True)
    routing = fr.gate(logits, 2, stats=True)
    assert not routing.experts.requires_grad
    assert not routing.demand.requires_grad
    routing.logsumexp.sum().backward()
    assert_bound(logits.grad, logits.detach().double().softmax(1), 1e-6)


def test_what_only_chooses_asks_for_no_gradient():
    """A bias is often a parameter; the weights of a frozen router then stay out of the graph."""
    options = {
        "bias": torch.zeros(6, requires_grad=True),
        "noise": torch.zeros(5, 6, requires_grad=True),
        "top_p": torch.ones(5, requires_grad=True),
        "threshold": torch.zeros(5, requires_grad=True),
    }
    for name, value in options.items():
        for stats in (False, True):
            routing = fr.gate(torch.randn(5, 6), 2, **{name: value}, stats=stats)
            assert not routing.weights.requires_grad, name
            logits = torch.randn(5, 6, requires_grad=True)
            fr.gate(logits, 2, **{name: value}, stats=stats).weights.sum().backward()
            assert logits.grad is not None, name
            assert value.grad is None, name


def test_gradient_through_a_tensor_that_outlived_a_transform():
    """torch.func leaves a dead wrapper behind; the gradient must reach what is in it."""
    weight = torch.randn(3, 8, requires_grad=True)
    kept = []

    def outer(x):
        kept.append(x * weight)
        return x.sum()

    torch.func.grad(outer)(torch.randn(3, 8))
    for stats in (False, True):
        (grad,) = torch.autograd.grad(
            fr.gate(kept[0], 2, stats=stats).weights[:, 0].sum(), [weight], retain_graph=True
        )
        assert grad.abs().sum() > 0


# ---- registration ------------------------------------------------------------------------------


def test_opcheck():
    ops = torch.ops.fastmoe_route
    bias = torch.randn(8)
    score = (0, True, 1.0)
    options = (bias, 2, 1, 0, None, None, False, 2, 0.9, None, None, None, 1, None, 0)
    for logits in (torch.randn(5, 8), torch.randn(5, 8, requires_grad=True), torch.randn(0, 8)):
        for op in (ops.gate, ops.gate_stats_forward):
            torch.library.opcheck(op, (logits.detach(), 2, *score, True, True, *options))
            torch.library.opcheck(op, (logits.detach(), 2, *score, False, True, *options))
        torch.library.opcheck(ops.gate, (logits, 2, *score, True, True, *options))
        torch.library.opcheck(ops.gate, (logits, 2))
        torch.library.opcheck(ops.gate_forward, (logits.detach(), 2, *score, *options))
        torch.library.opcheck(ops.gate_forward, (logits.detach(), 2, 1, True))
        torch.library.opcheck(ops.gate_plain_forward, (logits.detach(), 2, *score))
    logits = torch.randn(5, 8)
    experts = fr.gate(logits, 2).experts
    args = (torch.randn(5, 2), None, None, None, logits, experts, None, 0, False, 1, 0, True, 1.0)
    torch.library.opcheck(ops.gate_backward, args)


def test_compile_fullgraph_and_dynamic():
    def layer(logits):
        routing = fr.gate(logits, 2, normalize=True, stats=True, top_p=0.9)
        return routing.weights.sum() + routing.logsumexp.mean(), routing.experts

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (3, 17):
        logits = torch.randn(num_tokens, 8, requires_grad=True)
        total, experts = compiled(logits)
        total.backward()
        plain = logits.detach().clone().requires_grad_()
        expected, expected_experts = layer(plain)
        expected.backward()
        assert_exact(experts, expected_experts)
        assert_exact(logits.grad, plain.grad)


def test_export():
    class Router(torch.nn.Module):
        def forward(self, logits):
            return fr.gate(logits, 2, score="sigmoid").weights

    program = torch.export.export(Router(), (torch.randn(4, 8),))
    logits = torch.randn(4, 8)
    assert_exact(program.module()(logits), Router()(logits))


# ---- edges -------------------------------------------------------------------------------------


def test_no_tokens():
    logits = torch.empty(0, 8, requires_grad=True)
    routing = fr.gate(logits, 2, stats=True, keep_scores=True)
    assert routing.experts.shape == (0, 2)
    assert_literal(routing.demand, [0] * 8)
    assert_literal(routing.score_sum, [0.0] * 8)
    (routing.weights.sum() + routing.score_sum.sum()).backward()
    assert logits.grad.shape == (0, 8)


def test_a_token_does_not_depend_on_its_batch(threads):
    logits = torch.randn(257, 100, generator=torch.Generator().manual_seed(5))
    options = {"score": "sigmoid", "num_groups": 10, "topk_groups": 4, "normalize": True}
    whole = fr.gate(logits, 6, **options)
    for t in (0, 63, 64, 256):
        alone = fr.gate(logits[t : t + 1], 6, **options)
        assert_exact(whole.experts[t : t + 1], alone.experts)
        assert_exact(whole.weights[t : t + 1], alone.weights)


def test_same_bits_for_any_number_of_threads(threads):
    logits = torch.randn(1000, 60, generator=torch.Generator().manual_seed(6))
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        leaf = logits.clone().requires_grad_()
        routing = fr.gate(leaf, 4, stats=True)
        (routing.weights.square().sum() + routing.score_sum.square().sum()).backward()
        results.append((*routing[:5], leaf.grad))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_exact(got, expected)


# ---- layouts -----------------------------------------------------------------------------------


def test_strided_and_guarded_inputs(guarded):
    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(8))
    expected = fr.gate(logits, 4, stats=True)
    wide = torch.full((6, 70), 1e30)
    wide[:, 2:68:2] = logits
    for view in (wide[:, 2:68:2], logits.t().contiguous().t(), guarded(logits)):
        got = fr.gate(view, 4, stats=True)
        assert_exact(got.experts, expected.experts)
        assert_exact(got.weights, expected.weights)
        leaf = view.detach().requires_grad_()
        fr.gate(leaf, 4).weights.sum().backward()


# ---- errors ------------------------------------------------------------------------------------

LOGITS = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (ValueError, r"gate: top_k must be in \[1, 8\], got 9", {"top_k": 9}),
        (ValueError, r"gate: top_k must be in \[1, 8\], got 0", {"top_k": 0}),
        (TypeError, "gate: top_k must be an int, got 2.0", {"top_k": 2.0}),
        (TypeError, r"gate: logits must be a torch.Tensor, got \[1\]", {"logits": [1]}),
        (TypeError, "gate: logits must be float32 or", {"logits": LOGITS.int()}),
        (ValueError, "gate: logits must have 2 dimensions", {"logits": LOGITS[0]}),
        (ValueError, "gate: score must be one of softmax, .* got 'tanh'", {"score": "tanh"}),
        (ValueError, "gate: num_groups must divide the number of experts 8", {"num_groups": 3}),
        (ValueError, r"gate: topk_groups must be in \[1, 2\]", {"num_groups": 2, "topk_groups": 3}),
        (ValueError, "gate: num_null must be 0 with groups", {"num_groups": 7, "num_null": 1}),
        (ValueError, r"gate: num_null must be in \[0, 7\], got 8", {"num_null": 8}),
        (ValueError, r"gate: min_k must be in \[0, 2\], got 3", {"min_k": 3}),
        (ValueError, r"gate: bias must have shape \[8\]", {"bias": torch.zeros(7)}),
        (TypeError, "gate: bias must be float32", {"bias": torch.zeros(8, dtype=torch.int32)}),
        (TypeError, "gate: mask must be bool", {"mask": torch.zeros(8)}),
        (ValueError, "gate: noise must have 2 dimensions", {"noise": torch.zeros(8)}),
        (TypeError, "gate: top_p must be a float or", {"top_p": "0.5"}),
        (ValueError, r"gate: threshold must have shape \[3\]", {"threshold": torch.zeros(4)}),
        (TypeError, "gate: k_per_token must be int32", {"k_per_token": torch.zeros(3)}),
        (ValueError, "gate: max_per_group must be at least 1", {"max_per_group": 0}),
    ],
)
def test_errors_name_the_argument(kind, message, arguments):
    with pytest.raises(kind, match=message):
        fr.gate(**{"logits": LOGITS, "top_k": 2, **arguments})


def test_too_many_experts():
    with pytest.raises(ValueError, match="gate: logits must have 1 to 8192 experts"):
        fr.gate(torch.zeros(1, 8193), 1)


def test_the_bare_op_checks_as_well():
    with pytest.raises(RuntimeError, match=r"gate: top_k must be in \[1, 8\], got 9"):
        torch.ops.fastmoe_route.gate_forward(LOGITS, 9)
