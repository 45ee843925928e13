"""gate: scores, choice, weights, statistics and their gradients."""

from __future__ import annotations

import math

import cases
import fastmoe_route as fr
import pytest
import torch
import vm_backend
from fastmoe_route import reference
from fastmoe_route.bench.machine import library_info
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
from torch.profiler import profile

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
    if case.get("group_score") == "top2_sum" and limit.numel():  # two sums are rounded
        largest = keys.key.nan_to_num(0.0, 0.0, 0.0).abs().amax(1)
        doubt += 2 * rounding(2 * largest, torch.float32)
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


@pytest.mark.parametrize("num_experts", [3, 8, 16, 24, 64, 300])
def test_statistics_of_rows_of_every_range(num_experts, threads):
    """Rows whose scores may be subnormal are added apart from the others."""
    spread = torch.tensor([1.0, 63.0, 65.0, 90.0, 100.0, 150.0, 1.0, 2.0, 1000.0]).repeat(33)[:290]
    logits = cases.normal(290, num_experts, seed=num_experts).sigmoid() * spread[:, None]
    logits[::17, 0] = -torch.inf
    case = {"logits": logits, "top_k": min(8, num_experts), "stats": True}
    for rows in (logits, logits[3:4], logits[5:6]):
        check_against_reference(case | {"logits": rows})
        few = fr.gate(rows, case["top_k"])
        assert_exact(few.weights, fr.gate(rows, case["top_k"], stats=True).weights)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(fr.gate(**case))
    for one, other in zip(*results, strict=True):
        if one is not None:
            assert_exact(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [1, 2, 7, 8, 9, 16, 17, 31, 32, 255, 256, 272, 512])
def test_plain_choice_of_few_and_of_many_experts(num_experts, dtype):
    """Rows that a short list holds, and rows whose chosen logits are gathered, with ties."""
    logits = cases.normal(70, num_experts, seed=num_experts).to(dtype)
    logits[::3] = (logits[::3] * 2).round() / 2
    logits[1::5, : num_experts // 2] = 0.5
    logits[2::7, num_experts // 3] = -torch.inf
    ranked = logits.sort(dim=-1, descending=True, stable=True).indices.int()
    for top_k in {min(k, num_experts) for k in (1, 2, 8, 9, 16)}:
        experts = fr.gate(logits, top_k, normalize=True).experts
        is_chosen = experts >= 0
        assert_exact(experts[is_chosen], ranked[:, :top_k][is_chosen])
        assert (logits.gather(1, ranked[:, :top_k].long())[~is_chosen] == -torch.inf).all()


def test_bounds_can_fail():
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    routing = fr.gate(logits, 4, stats=True)
    wide = reference.gate(logits, 4, stats=True, dtype=torch.float64)
    limit = gate_weight_limit(logits, routing.experts)
    assert_has_power(lambda w: assert_bound(w, wide.weights, limit), routing.weights)
    assert_has_power(lambda e: assert_exact(e, wide.experts.int()), routing.experts)
    bound = score_sum_limit(logits, 64)
    assert_has_power(lambda s: assert_bound(s, wide.score_sum, bound), routing.score_sum)


@pytest.mark.parametrize("num_experts", [8, 40, 64, 256])
def test_statistics_of_finite_and_other_rows(num_experts):
    """Finite rows reach the statistics on another way than those with -inf, in turns here."""
    logits = torch.randn(150, num_experts, generator=torch.Generator().manual_seed(4))
    logits[::7, 1::2] = -INF
    logits[3::11] = -INF
    logits[100:] = logits[100:].masked_fill(logits[100:] < -1, -INF)
    for top_k in (4, min(num_experts, 20)):
        for normalize in (False, True):
            case = {"logits": logits, "top_k": top_k, "normalize": normalize, "stats": True}
            check_against_reference(case)


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
@pytest.mark.parametrize(("stats", "keep_scores"), [(False, False), (True, False), (True, True)])
def test_gradcheck(options, stats, keep_scores):
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits = logits.mul(2).requires_grad_()

    def floats(z):
        routing = fr.gate(z, 3, stats=stats, keep_scores=keep_scores, **options)
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
        for op in (ops.gate_plain_forward, ops.gate_plain_stats_forward):
            torch.library.opcheck(op, (logits.detach(), 2, *score))
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


# ---- edges -------------------------------------------------------------------------------------


# SGLang CPU and kt-kernel die on no tokens
def test_no_tokens():
    logits = torch.empty(0, 8, requires_grad=True)
    routing = fr.gate(logits, 2, stats=True, keep_scores=True)
    assert routing.experts.shape == (0, 2)
    assert_literal(routing.demand, [0] * 8)
    assert_literal(routing.score_sum, [0.0] * 8)
    (routing.weights.sum() + routing.score_sum.sum()).backward()
    assert logits.grad.shape == (0, 8)


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
        assert all(torch.equal(a, b) for a, b in zip(got[:5], expected[:5], strict=True))
        leaf = view.detach().requires_grad_()
        fr.gate(leaf, 4).weights.sum().backward()


# zentorch: a view that is not contiguous is read as if it were
def test_views_are_read_by_their_strides():
    wide = torch.randn(2 * 41, 3 * 50, generator=torch.Generator().manual_seed(9))
    for view in (wide[::2, :50], wide[:, ::3], wide.t(), wide.flip(1)[:, 7:70]):
        got, expected = fr.gate(view, 8, stats=True), fr.gate(view.clone(), 8, stats=True)
        assert all(torch.equal(a, b) for a, b in zip(got[:5], expected[:5], strict=True))


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
        (
            ValueError,
            r"gate: num_null must be in \[0, 8192\], got 9000",
            {"logits": torch.zeros(3, 9008), "num_null": 9000},
        ),
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


# 16 GiB were asked for on behalf of a number of experts that nobody had checked
@pytest.mark.parametrize("num_experts", [8193, 1 << 40])
def test_too_many_experts(num_experts):
    with pytest.raises(ValueError, match="gate: logits must have 1 to 8192 experts"):
        fr.gate(torch.zeros(1, 1).expand(1, num_experts), 1)


# five projects: T * K past 2^31 wraps; ours is an error before anything is allocated
def test_too_many_slots_are_an_error():
    logits = torch.zeros(1, 8).expand(1 << 28, 8)
    with pytest.raises(RuntimeError, match=r"gate: logits must have fewer than 2\^31 / top_k rows"):
        fr.gate(logits, 8)


def test_the_bare_op_checks_as_well():
    with pytest.raises(RuntimeError, match=r"gate: top_k must be in \[1, 8\], got 9"):
        torch.ops.fastmoe_route.gate_forward(LOGITS, 9)
