"""Survey rows 2c: a number of experts per token, skipped work, moved routers. Acceptance checks."""

from __future__ import annotations

import math

import fastmoe_route as fr
import pytest
import torch
from cases import normal
from fastmoe_route import _segments, routers
from router_cases import EXPERTS, HIDDEN, SEQUENCES, inputs, layer, make
from tolerance import assert_bound, close
from torch import Tensor

F64 = torch.float64


def logits_of(router, rows: list[list[float]] | Tensor, **given) -> routers.Routed:
    """Routes tokens whose logits are these: the score is replaced by the identity."""
    z = torch.as_tensor(rows, dtype=torch.float32)
    router.score = torch.nn.Identity()
    router.hidden_size = z.shape[1]
    return router(z, **given)


# ---- R36 to R39: how many experts --------------------------------------------------------------


@pytest.mark.parametrize(("tau", "count"), [(0.4, 1), (0.45, 2), (0.5, 2), (0.75, 3), (0.9, 4)])
def test_dynamic_top_p_is_strict(tau, count):
    """p = (.45, .3, .15, .1) in float64, where the cumulative sums are what they look like."""
    p = torch.tensor([[0.45, 0.3, 0.15, 0.1]])
    # .45 and .75 are sums that float32 may round either way: the boundary is the gate's own sum
    cumulative = fr.gate(p.log(), 4, keep_scores=True).scores.cumsum(1)[0]
    exact = {0.45: cumulative[0], 0.75: cumulative[1]}
    router = fr.routers.build("dynamic_top_p", 4, 4, top_p=float(exact.get(tau, tau))).eval()
    routed = logits_of(router, p.log())
    assert int((routed.routing.experts >= 0).sum()) == count
    close(routed.routing.weights[0, :count], p[0, :count].double(), 1e-6)  # not renormalised


def test_dynamic_top_p_of_one_takes_all_and_learns_to_take_fewer():
    router = fr.routers.build("dynamic_top_p", 4, 4, top_p=1.0)
    routed = logits_of(router.eval(), [[0.0, 1.0, 2.0, 3.0]])
    assert int((routed.routing.experts >= 0).sum()) == 4
    found = logits_of(router.train(), [[0.0, 0.0, 0.0, 0.0]]).losses
    close(found["entropy"].detach(), 1e-4 * math.log(4))
    close(found["balance"].detach(), 0.01)


def test_adamoe_mean_of_null_experts():
    num, e, m, k = 4096, 8, 8, 4
    router = fr.routers.build("adamoe", e + m, e, k, num_null=m).eval()
    routing = logits_of(router, normal(num, e + m)).routing
    real = (routing.experts >= 0).sum(1).double()
    # hypergeometric: mean K m / (E + m) null columns, variance below K / 4
    assert abs(float((k - real).mean()) - k * m / (e + m)) < 5 * math.sqrt(k / 4 / num)
    sums = routing.weights.double().sum(1)
    close(sums[real > 0], torch.ones(int((real > 0).sum())), 1e-6)
    assert (sums[real == 0] == 0).all()
    assert (real == 0).any()


def test_adamoe_without_null_experts_is_topk_softmax():
    z = normal(12, 6)
    one = logits_of(fr.routers.build("adamoe", 6, 6, 3, num_null=0).eval(), z).routing
    two = logits_of(fr.routers.build("topk_softmax", 6, 6, 3).eval(), z).routing
    assert torch.equal(one.experts, two.experts)
    assert torch.equal(one.weights, two.weights)


def test_adamoe_loss_is_that_of_averaged_nulls():
    router = fr.routers.build("adamoe", 6, 4, 2, num_null=2, null_coef=0.5)
    found = logits_of(router, torch.zeros(8, 6)).losses
    close(found["null_balance"].detach(), 0.5)


def test_da_moe_counts_follow_attention():
    given = inputs()
    router = make("da_moe", top_k=2).eval()
    even = router(**{**given, "attention_mass": torch.full((24,), 0.3)})
    assert even.extra["k"].tolist() == [2] * 24
    mass = torch.ones(24)
    mass[0] = 5.0  # sequence 0 has 8 tokens, mean 1.5
    routed = router(**{**given, "attention_mass": mass})
    assert routed.extra["k"].tolist()[:8] == [7, 1, 1, 1, 1, 1, 1, 1]
    assert torch.equal((routed.routing.experts >= 0).sum(1).int(), routed.extra["k"])


def test_da_moe_capacity_is_a_multiple_of_its_mean():
    given = inputs()
    attention = torch.full((24,), 0.3)
    router = fr.routers.build("da_moe", HIDDEN, 8, 2, capacity_factor=1.0)
    alike = {**given, "x": given["x"][:1].expand(24, -1), "attention_mass": attention}
    plan = router(**alike).plan  # all tokens ask for the same two of 8 experts
    assert sorted(plan.kept.tolist()) == [0] * 6 + [6, 6]  # 24 tokens * 2 / 8
    scopes = torch.arange(24, dtype=torch.int32) // 12
    plan = router(**{**alike, "scope_ids": scopes, "num_scopes": 2}).plan
    assert sorted(plan.kept.tolist()) == [0] * 6 + [6, 6]  # 12 * 2 / 8 of each scope


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.3, 0.5, 0.75, 0.99, 1.0])
def test_dynamoe_activates_its_percentile(tau):
    router = fr.routers.build("dynamoe", 10, 10, tau=tau).eval()
    routing = logits_of(router, normal(20, 10)).routing
    wanted = max(1, math.ceil(round((1 - tau) * 10, 9)))
    assert ((routing.experts >= 0).sum(1) == wanted).all()
    close(routing.weights.double().sum(1), torch.ones(20))
    tied = logits_of(router, torch.zeros(1, 10)).routing
    assert int((tied.experts >= 0).sum()) == 10


@pytest.mark.parametrize("shape", routers.dynamic.SCHEDULES)
def test_expert_schedules_spend_the_budget(shape):
    for layers, total in ((1, 7), (4, 20), (7, 50), (12, 12)):
        counts = routers.expert_schedule(shape, layers, total)
        assert sum(counts) == total
        assert len(counts) == layers
        assert min(counts) >= 1
    long = routers.expert_schedule(shape, 9, 90)
    if shape in ("ascending", "descending"):
        assert long == sorted(long, reverse=shape == "descending")
        assert long[0] != long[-1]
    if shape == "pyramid":
        assert max(long) == long[4] > long[0]
    with pytest.raises(ValueError, match="expert_schedule: total must be at least 9, got 8"):
        routers.expert_schedule(shape, 9, 8)


# ---- R40 to R44: skipping ----------------------------------------------------------------------


def test_duo_llm_skips_exactly_and_follows_forced_paths():
    given = inputs()
    router = make("duo_llm", costs=[4.0] + [1.0] * 7).eval()
    skip = torch.arange(24) % 9
    router.forced = skip
    routed = router(**given)
    y = router.mix(given["x"], routed, given["experts"])
    assert torch.equal(y[skip == 8], given["x"][skip == 8])
    dense = given["experts"].each(given["x"])
    for expert in range(8):
        assert_bound(y[skip == expert], dense[skip == expert, expert].double(), 1e-5)
    assert routed.extra["cost"].tolist() == [[4.0, *[1.0] * 7, 0.0][c] for c in skip.tolist()]
    router.forced = None
    apart = {**given, "positions": torch.arange(24)}
    drawn = make("duo_llm", random=True).eval()(**apart).routing
    assert drawn.experts.unique().numel() > 4


def test_duo_llm_learns_the_probability_of_its_path():
    given = inputs()
    router = make("duo_llm").train()
    routed = router(**given)
    assert (routed.routing.weights[routed.routing.experts >= 0] == 1).all()
    routed.routing.weights.sum().backward()
    assert router.score.weight.grad.abs().sum() > 0


def test_mindskip_keeps_the_input_below_the_threshold():
    given = inputs()
    router = make("mindskip").eval()
    with torch.no_grad():
        router.decide.weight.copy_(normal(1, HIDDEN, seed=3) * 9)
    routed = router(**given)
    s = routed.extra["decision"]
    assert (s >= 0.5).any()
    assert (s < 0.5).any()
    y = router.mix(given["x"], routed, given["experts"])
    runs = (s >= 0.5)[given["sequence_ids"]]
    assert torch.equal(y[~runs], given["x"][~runs])
    expected = given["x"] + given["experts"](
        given["x"], fr.gate(router.score(given["x"]), 1, normalize=True)
    )
    assert_bound(y[runs], expected[runs].double(), 1e-5)
    again = router(**{**given, "x": given["x"] * -1, "state": s})
    assert torch.equal(again.extra["decision"], s)
    outside = make("mindskip", identity=False).eval()(**given)
    assert outside.residual is None


def test_mindskip_gate_is_hard_with_the_gradient_of_the_sigmoid():
    given = inputs()
    router = make("mindskip", skip_coef=0.0).train()
    routed = router(**given)
    hard = routed.routing.weights
    assert set(hard.flatten().tolist()) <= {0.0, 1.0}
    s = routed.extra["decision"]
    (grad,) = torch.autograd.grad(hard.sum(), router.decide.bias, retain_graph=True)
    lengths = torch.bincount(given["sequence_ids"][hard[:, 0] > 0], minlength=SEQUENCES)
    close(grad, (lengths * s * (1 - s)).sum()[None].detach().double(), 1e-5)


def test_dr_llm_skips_runs_and_repeats():
    given = inputs()
    router = make("dr_llm").eval()
    x, f = given["x"], given["experts"]

    def step(v):
        return v + f(v, fr.gate(router.score(v), 1, normalize=True))

    for decision, expected in ((0, x), (1, step(x)), (2, step(step(x)))):
        state = torch.full((SEQUENCES,), decision)
        y = layer(router, {**given, "state": state})
        if decision == 0:
            assert torch.equal(y, x)
        assert_bound(y, expected.double(), 1e-5)
    mixed = layer(router, {**given, "state": torch.tensor([0, 1, 2])})
    assert torch.equal(mixed[:8], x[:8])
    assert_bound(mixed[16:], step(step(x))[16:].double(), 1e-5)


def test_dr_llm_decides_by_windows():
    """The logits are the mean over windows: by hand for one sequence of 16 tokens, 8 windows."""
    router = make("dr_llm").eval()
    x = normal(16, HIDDEN, seed=4)
    routed = router(x)
    windows = x.view(8, 2, HIDDEN).mean(1)
    logits = router.outer(torch.nn.functional.gelu(router.inner(windows))).mean(0, keepdim=True)
    assert_bound(routed.extra["logits"], logits.double(), 1e-5)
    assert routed.extra["decision"].tolist() == logits.argmax(1).tolist()
    short = router(x[:3])  # three windows hold a token
    logits = router.outer(torch.nn.functional.gelu(router.inner(x[:3]))).mean(0, keepdim=True)
    assert_bound(short.extra["logits"], logits.double(), 1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.22, 0.5, 0.875, 1.0])
def test_ftp_skips_its_share_of_every_sequence(sparsity):
    given = inputs()
    router = make("ftp", sparsity=sparsity).eval()
    routed = router(**given)
    skipped = (routed.routing.experts < 0).all(1)
    counts = torch.bincount(given["sequence_ids"][skipped], minlength=SEQUENCES)
    assert counts.tolist() == [math.floor(sparsity * 8 + 1e-9)] * SEQUENCES
    y = router.mix(given["x"], routed, given["experts"])
    dense = layer(make("ftp", sparsity=0.0).eval(), given)
    assert torch.equal(y[skipped], given["x"][skipped])
    assert torch.equal(y[~skipped], dense[~skipped])


def test_dynamic_token_routing_shuts_paths_and_keeps_its_budget():
    router = fr.routers.build("dynamic_token_routing", 4, 4, budget=0.5).eval()
    shut = logits_of(router, torch.full((3, 4), -1.0))
    assert (shut.routing.experts == -1).all()
    assert shut.residual.tolist() == [1.0] * 3
    router.train()
    half = logits_of(router, [[1.0, -1.0, 2.0, -2.0]])
    assert float(half.losses["budget"]) == 0.0
    assert sorted(half.routing.experts[0].tolist()) == [-1, -1, 0, 2]
    close(half.routing.weights.sum(), math.tanh(1) + math.tanh(2))
    assert float(logits_of(router, [[1.0, 1.0, 2.0, 2.0]]).losses["budget"]) == 0.25


# ---- R45, R46, L5: widths, one choice for all layers, experts in turn --------------------------


@pytest.mark.parametrize("activation", ["relu", "reglu"])
def test_flextron_widths_are_nested(activation):
    """Small integers, whose sums are exact in any order: equality of bits means equality."""
    generator = torch.Generator().manual_seed(0)
    halves = 2 if activation == "reglu" else 1
    shapes = (HIDDEN, halves * 32), (32, HIDDEN), (EXPERTS, HIDDEN)
    w_up, w_down, x = (torch.randint(-3, 4, s, generator=generator).float() for s in shapes)
    sliced = routers.slice_experts(w_up, w_down, EXPERTS, activation)
    for width in range(1, EXPERTS + 1):
        router = make("flextron", static=width).eval()
        y = router.mix(x, router(x), sliced)
        n = width * 4
        hidden = (x @ w_up).view(EXPERTS, halves, 32)[:, :, :n]
        hidden = hidden[:, 0].relu() * (hidden[:, 1] if halves == 2 else 1)
        assert torch.equal(y, hidden @ w_down[:n])
    tokens = make("flextron").eval()(x)
    used = (tokens.routing.experts >= 0).sum(1)
    assert torch.equal(used.int(), tokens.extra["width"])
    with pytest.raises(ValueError, match="num_slices must divide the width 32, got 5"):
        routers.slice_experts(w_up, w_down, 5, activation)


def test_read_me_routes_all_layers_alike():
    given = inputs()
    first, later = make("read_me", top_k=2).eval(), make("read_me", top_k=2).eval()
    with torch.no_grad():
        later.score.weight.normal_()
    one = first(**given)
    two = later(**{**given, "x": given["x"] + 1.0, "state": one.state})
    assert torch.equal(one.routing.experts, two.routing.experts)
    assert torch.equal(one.routing.weights, two.routing.weights)
    assert torch.equal(two.state, one.state)


def test_ride_stops_when_no_help_is_needed():
    z = normal(40, 5)
    for threshold, count in ((1.0, 1), (0.0, 5)):
        router = fr.routers.build("ride", 5, 5, threshold=threshold).eval()
        routing = logits_of(router, z).routing
        assert ((routing.experts >= 0).sum(1) == count).all()
        close(routing.weights.double().sum(1), torch.ones(40))
    router = fr.routers.build("ride", 4, 4).eval()
    routing = logits_of(router, [[-9.0, 2.0, -1.0, 3.0]]).routing  # the third needs no help
    assert routing.experts.tolist() == [[0, 1, -1, -1]]
    assert routing.weights.tolist() == [[0.5, 0.5, 0.0, 0.0]]


# ---- R47 to R49: moved at test time ------------------------------------------------------------


def test_rewiring_starts_as_the_base_and_learns_only_its_shift():
    given = inputs()
    router = make("rewiring")
    base = fr.gate(router.score(given["x"]), 2, normalize=True)
    assert torch.equal(router(**given).routing.weights, base.weights)

    def loss():
        return layer(router, given).square().mean()

    def value():
        return float(loss().detach())

    (grad,) = torch.autograd.grad(loss(), router.delta)
    used = router(**given).routing.demand > 0
    assert (grad[~used] == 0).all()
    assert grad[used].abs().min() > 0
    before = value()
    weight = router.score.weight.detach().clone()
    routers.rewire([router], loss, steps=3, lr=0.05)
    assert value() < before
    assert torch.equal(router.score.weight, weight)
    router.reset()
    assert torch.equal(router(**given).routing.weights, base.weights)


def test_multilingual_steer_lifts_the_marked_experts():
    given = inputs()
    base = fr.gate(make("multilingual_steer").score(given["x"]), 2, normalize=True)
    for mode in ("soft", "hard"):
        router = make("multilingual_steer", mode=mode).eval()
        assert torch.equal(router(**given).routing.weights, base.weights)
        router.steered[torch.tensor([1, 6])] = True
        chosen = router(**given).routing.experts
        if mode == "hard":
            assert torch.equal(chosen.sort(1).values, torch.tensor([[1, 6]]).expand(24, 2).int())
        else:
            assert not torch.equal(chosen, base.experts)
    idle = make("multilingual_steer", strength=0.0).eval()
    idle.steered[3] = True
    assert torch.equal(idle(**given).routing.experts, base.experts)
    one = make("multilingual_steer", strength=0.5).eval()
    one.steered[3] = True
    z = one.score(given["x"])
    z[:, 3] += 0.5 * z.std(1, correction=0)
    assert torch.equal(one(**given).routing.experts, fr.gate(z, 2).experts)
    mask = routers.task_experts(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.2]))
    assert mask.tolist() == [True, False, False]


def test_r2t2_takes_weights_from_outside_with_their_gradient():
    given = inputs()
    router = make("r2t2").eval()
    base = router(**given).routing
    z = router.score(given["x"])
    same = router(**{**given, "state": z.softmax(1)}).routing
    assert torch.equal(base.experts, same.experts)
    assert_bound(same.weights, base.weights.detach().double(), 1e-6)
    per_sequence = normal(SEQUENCES, EXPERTS).softmax(1).requires_grad_()
    routing = router(**{**given, "state": per_sequence}).routing
    routing.weights[:, 0].sum().backward()
    assert per_sequence.grad.abs().sum() > 0
    assert routing.experts[:8].unique(dim=0).shape[0] == 1


def test_rerouted_descends_on_the_nearest_references():
    references, query = normal(20, 6, seed=1, dtype=F64), normal(6, seed=2, dtype=F64)
    wanted = normal(20, 4, seed=3, dtype=F64).softmax(1)
    start = torch.full((4,), 0.25, dtype=F64)
    asked = []

    def loss(weights, ids):
        asked.append(ids)
        return (weights - wanted[ids]).square().sum(1)

    assert torch.equal(routers.rerouted(start, loss, query, references, steps=0), start)
    end = routers.rerouted(start, loss, query, references, k=5, steps=10, lr=0.2)
    near = torch.nn.functional.cosine_similarity(query[None], references, dim=1).topk(5).indices
    assert sorted(asked[0].tolist()) == sorted(near.tolist())
    assert float(loss(end, near).mean()) < float(loss(start, near).mean())


# ---- R60 ---------------------------------------------------------------------------------------


def test_dynmole_takes_all_experts_where_entropy_is_high():
    router = fr.routers.build("dynmole", 8, 8).eval()
    rows = torch.zeros(3, 8)
    rows[1, 0] = 9.0  # nearly one-hot
    rows[2, :3] = 4.0
    routed = logits_of(router, rows)
    counts = (routed.routing.experts >= 0).sum(1).tolist()
    assert counts == [8, 2, 3]
    close(routed.extra["entropy"][0], 1.8775, 5e-5)
    close(routed.routing.weights.double().sum(1), torch.ones(3))
    spread = logits_of(router, normal(50, 8) * 3).routing
    assert ((spread.experts >= 0).sum(1) >= 2).all()


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dynamoe", {"tau": 1.5}, r"dynamoe: tau must be in \[0, 1\], got 1.5"),
        ("duo_llm", {"top_k": 2}, "duo_llm: top_k must be 1, got 2"),
        ("duo_llm", {"costs": [1.0]}, "duo_llm: costs must have 8 entries, got 1"),
        ("ftp", {"sparsity": -0.1}, r"ftp: sparsity must be in \[0, 1\], got -0.1"),
        ("flextron", {"static": 9}, r"flextron: static must be in \[1, 8\], got 9"),
        ("adamoe", {"num_null": -1}, "adamoe: num_null must be at least 0, got -1"),
        (
            "multilingual_steer",
            {"mode": "up"},
            "multilingual_steer: mode must be one of soft, hard",
        ),
    ],
)
def test_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name, **arguments)


def test_segment_rank_counts_inside_a_segment_with_ties_to_the_lower_token():
    values = torch.tensor([3.0, 1.0, 1.0, 0.0, 2.0, 5.0])
    ids = torch.tensor([0, 1, 0, 1, 0, 1])
    places, lengths = _segments.segment_rank(values, ids, 3)
    assert places.tolist() == [2, 1, 0, 0, 1, 2]
    assert lengths.tolist() == [3] * 6


def test_segment_sum_adds_in_order_and_has_a_form_for_other_devices():
    x = (torch.arange(12.0).reshape(6, 2).sin() * 10).requires_grad_()
    ids = torch.tensor([2, 0, 2, 2, 0, 2])
    wanted = torch.zeros(4, 2)
    for row, segment in zip(x.detach(), ids.tolist(), strict=True):
        wanted[segment] += row
    total = _segments.segment_sum(x, ids, 4)
    assert torch.equal(total, wanted)
    (grad,) = torch.autograd.grad(total, x, torch.arange(8.0).view(4, 2))
    assert torch.equal(grad, torch.arange(8.0).view(4, 2)[ids])
    elsewhere = _segments.segment_sum(x.detach().to("meta"), ids.to("meta"), 4)
    assert elsewhere.shape == wanted.shape
