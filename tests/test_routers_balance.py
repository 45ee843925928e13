"""Acceptance checks of survey rows about balance: experts that choose, assignment, transport."""

from __future__ import annotations

import copy

import fastmoe_route as fr
import numpy as np
import pytest
import torch
from fastmoe_route.routers.base import Context
from fastmoe_route.routers.plans import capped_plan, expert_plan, sparse_columns
from router_cases import (
    EXPERTS,
    HIDDEN,
    experts,
    inputs,
    layer,
    make,
    rows,
    set_logits,
    tokens,
)
from tolerance import close
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def violation(demand: Tensor) -> float:
    """How far the fullest expert is above an even load, as a share of it."""
    load = demand.double()
    return float(load.max() / load.mean() - 1)


def skewed(num_tokens: int = 1024, num_experts: int = 16, seed: int = 0) -> Tensor:
    """Logits of which a few experts get the most."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_tokens, num_experts, generator=generator)
    return z + torch.randn(num_experts, generator=generator)


def wide(name: str, logits: Tensor, **arguments: object) -> tuple[fr.routers.Router, Tensor]:
    """A router over 16 experts, and the `x` that gives it these logits."""
    router = fr.routers.build(name, 16, 16, **arguments)
    return router, set_logits(router, logits)


# ---- experts choose ----------------------------------------------------------------------------


def test_expert_choice_fills_every_expert() -> None:
    router, x = make("expert_choice").eval(), tokens(40)
    routing = router(x).routing
    assert routing.demand.tolist() == [10] * EXPERTS  # 40 tokens, 2 slots each, 8 experts
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    moved = router(x[order]).routing
    assert torch.equal(moved.experts, routing.experts[order])
    assert torch.equal(moved.weights, routing.weights[order])
    more = router(torch.cat([x, x[:8] * 2])).routing
    assert not torch.equal(more.experts[:40], routing.experts)
    p = router.score(x).softmax(1)
    close(routing.weights, torch.where(routing.experts >= 0, p, 0.0), 1e-6)
    alone = router(x, scope_ids=torch.zeros(40, dtype=torch.int32)).routing
    assert torch.equal(alone.experts, routing.experts)


def test_expert_choice_with_a_cap_spreads_what_every_expert_wants() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(64, 8, generator=generator).mul(2).softmax(1)
    scores[:16] = 1 / 8 + 0.2 * torch.rand(16, 8, generator=generator)  # wanted by all
    plan = capped_plan(scores, 2, 2, Context())
    assert 0 <= float(plan.min()) <= float(plan.max()) <= 1
    assert float(plan.sum(1).max()) <= 2 * 1.01
    close(plan.sum(0), torch.full((8,), 16.0), 0.3)
    linprog = pytest.importorskip("scipy.optimize").linprog
    token_sums = np.kron(np.eye(64), np.ones((1, 8)))
    expert_sums = np.kron(np.ones((1, 64)), np.eye(8))
    best = linprog(
        -scores.flatten().numpy(), A_ub=token_sums, b_ub=np.full(64, 2.0), A_eq=expert_sums,
        b_eq=np.full(8, 16.0), bounds=(0, 1),
    )  # fmt: skip
    assert 0.97 <= float((scores * plan).sum()) / -best.fun <= 1.01
    scopes = torch.arange(64, dtype=torch.int32) % 2
    both = capped_plan(scores, 2, 2, Context(scope_ids=scopes, num_scopes=2))
    close(both[scopes == 1], capped_plan(scores[scopes == 1], 2, 2, Context()), 1e-4)

    taken = []
    for cap in (None, 2):
        router = fr.routers.build("expert_choice", 8, 8, token_cap=cap).eval()
        experts = router(set_logits(router, scores.log())).routing.experts
        taken.append((experts >= 0).sum(1))
    assert taken[0].sum() == taken[1].sum() == 128
    assert 2 * int((taken[1] > 2).sum()) <= int((taken[0] > 2).sum())
    assert int(taken[1].max()) <= 3 < int(taken[0].max())


def test_pmoe_gives_every_expert_its_patches_of_every_sample() -> None:
    given = inputs()
    router = make("pmoe", patches=3).eval()
    routing = router(**given).routing
    for sequence in range(3):
        taken = routing.experts[given["sequence_ids"] == sequence] >= 0
        assert taken.sum(0).tolist() == [3] * EXPERTS
    everything = make("pmoe", patches=TOO_MANY)
    everything.load_state_dict(router.state_dict())
    weights = everything.eval()(**given).routing.weights
    for sequence in range(3):
        close(weights[given["sequence_ids"] == sequence].sum(0), 1.0, 1e-5)


TOO_MANY = 100


def test_uoe_weights_depend_on_the_batch() -> None:
    """The authors' normalisation over the batch, documented by what it does."""
    router, x = make("uoe").eval(), tokens(16)
    alone, together = router(x[:8]).routing, router(x).routing
    assert not torch.equal(alone.weights, together.weights[:8])
    assert together.demand.max() <= 4  # 16 tokens, 2 slots each, 8 experts
    g = torch.zeros(16, EXPERTS).scatter(
        1, fr.gate(router.score(x), 2).experts.long(), fr.gate(router.score(x), 2).weights.detach()
    )
    scaled = 4 * g / (g.sum(0) + 1e-6)
    kept = scaled.topk(4, dim=0).values.amin(0).clamp(min=1e-30)
    wanted = torch.where(scaled >= kept, scaled, 0.0)
    got = torch.zeros(16, EXPERTS + 1).scatter(
        1, together.experts.long() % (EXPERTS + 1), together.weights.detach()
    )
    close(got[:, :EXPERTS], wanted, 1e-5)
    own = experts()
    up, down = own.w_up[:, :, :12], own.w_down
    dense = torch.relu(x @ up.permute(1, 0, 2).flatten(1)) @ down.flatten(0, 1)
    slices = fr.routers.Experts(up, down, "relu").each(x).sum(1)
    close(slices, dense, 1e-4)


def test_rectify_keeps_tokens_local_and_fills_room() -> None:
    x = tokens(64)
    router = make("rectify", fill=False).eval()
    router.score.weight.data[0] *= 3
    candidates = fr.gate(router.score(x), EXPERTS)
    routing = router(x).routing
    rank = torch.arange(64) // 32
    assert routing.demand.max() <= 16
    moved = 0
    for t in range(64):
        first = set(candidates.experts[t, :2].tolist())
        for expert in routing.experts[t].tolist():
            if expert >= 0 and expert not in first:
                moved += 1
                assert expert // 4 == rank[t], "a rectified slot left its rank"
    assert moved > 0
    filled = make("rectify").eval()
    filled.load_state_dict(router.state_dict())
    assert filled(x).routing.demand.tolist() == [16] * EXPERTS
    # One rank holds everything, so there is always room somewhere: nothing is dropped.
    single = make("rectify", num_ranks=1, fill=False).eval()
    assert bool((single(x).routing.experts >= 0).all())


# ---- balanced assignment -----------------------------------------------------------------------


def test_base_is_balanced_in_training_and_greedy_in_evaluation() -> None:
    router, x = make("base"), tokens(64)
    router.score.weight.data[0] += 1
    routed, scores = router(x), router.score(x)
    assert routed.routing.demand.tolist() == [8] * EXPERTS
    best = fr.assign_balanced(scores, method="exact").long()[:, None]
    scores = scores.detach()
    eps = max(float(scores.max() - scores.min()) / 50, 1e-4)
    chosen = routed.routing.experts.long()
    assert scores.gather(1, best).sum() - scores.gather(1, chosen).sum() <= 64 * eps
    alpha = scores.gather(1, chosen).sigmoid()
    close(routed.routing.weights, alpha, 1e-6)
    own = experts()
    outputs = own.each(x)[torch.arange(64), chosen[:, 0]]
    close(router.mix(x, routed, own), alpha * outputs + (1 - alpha) * x, 1e-4)
    assert torch.equal(router.eval()(x).routing.experts[:, 0].long(), scores.argmax(1))
    with pytest.raises(ValueError, match="base: x must have a multiple of 8 tokens in training"):
        router.train()(tokens(63))
    plain = make("base", keep_input=False).eval()
    assert plain(x).residual is None


def test_s_base_plan_chooses_and_softmax_weighs() -> None:
    router, x = wide("s_base", skewed())
    logits = router.score(x)
    plan = fr.transport(logits, "sinkhorn", iters=20, temperature=1.0)
    assert bool(((plan.sum(1) - 1).abs() <= 1e-4).all())
    assert bool(((plan.sum(0) / 64 - 1).abs() <= 1e-4).all())
    routing = router(x).routing
    assert torch.equal(routing.experts[:, 0].long(), plan.argmax(1))
    chosen = logits.softmax(1).gather(1, routing.experts.long())
    close(routing.weights, chosen, 1e-6)
    plain = fr.gate(logits, 1)
    assert violation(routing.demand) < violation(plain.demand) / 2
    assert torch.equal(router.eval()(x).routing.experts, plain.experts)


def test_stable_moe_freezes_into_the_ids() -> None:
    router = make("stable_moe").train()
    given = inputs()
    routed = router(**given)
    assert set(routed.losses) == {"balance", "distil"}
    assert routed.losses["distil"] > 0
    chosen = routed.routing.experts.long()
    close(routed.routing.weights, router.score(given["x"]).gather(1, chosen).sigmoid(), 1e-6)
    (grad,) = torch.autograd.grad(routed.losses["balance"], router.score.weight, retain_graph=True)
    assert bool((grad != 0).any())
    assert torch.autograd.grad(
        routed.losses["balance"], router.words.weight, allow_unused=True
    ) == (None,)
    even = set_logits(router, torch.eye(EXPERTS).repeat(3, 1))
    close(router(**{**given, "x": even}).losses["balance"], 0.0, 1e-5)
    router.freeze()
    first, second = (router(**inputs(seed=0) | {"x": tokens(24, seed)}).routing for seed in (1, 2))
    assert torch.equal(first.experts, second.experts)
    assert not torch.equal(first.weights, second.weights)
    assert not any(p.requires_grad for p in router.word_score.parameters())
    same = torch.full((24,), 7)
    assert len(router(**{**given, "token_ids": same}).routing.experts.unique()) == 1
    router.reset_parameters()
    assert not router.is_frozen
    assert all(p.requires_grad for p in router.parameters())


# ---- balance by bias and price -----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sign", "proportional", "multiplicative"])
def test_loss_free_balances_a_skewed_stream(rule: str) -> None:
    rate = {"sign": 2e-3, "proportional": 1e-5, "multiplicative": 4e-3}[rule]
    router, x = wide("loss_free", skewed(512), rate=rate, rule=rule)
    router.train()
    before = violation(router(x).routing.demand)
    for _ in range(1200):
        router(x)
        router.update()
    routing = router.eval()(x).routing
    assert before > 1
    assert violation(routing.demand) < 0.1
    scores = router.score(x).sigmoid().gather(1, routing.experts.long())
    close(routing.weights, scores, 1e-6)


def test_loss_free_update_uses_finished_batches_only() -> None:
    router, x = wide("loss_free", skewed(64))
    first = router(x).routing
    assert torch.equal(router(x).routing.experts, first.experts)
    assert router.load.tolist() == (2 * first.demand).tolist()
    router.update()
    mean = first.demand.double().mean()
    close(router.bias, 1e-3 * (mean - first.demand).sign(), 1e-7)
    assert router.load.sum() == 0
    router.eval()(x)
    assert router.load.sum() == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_loss_free_counts_a_checkpointed_call_once(use_reentrant: bool) -> None:
    router, x = wide("loss_free", skewed(64).requires_grad_())
    demand, calls = router(x).routing.demand, []
    router.load.zero_()

    def run(x: Tensor) -> Tensor:
        calls.append(x)
        return router(x).routing.weights.square()

    checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == 2
    assert torch.equal(router.load, demand.long())


def test_a_bias_moves_in_a_model_of_16_bits() -> None:
    """A step of 1e-3 is less than half a place of a bfloat16 bias of 0.5."""
    model = torch.nn.Sequential(make("loss_free")).bfloat16()
    (router,) = model
    router.bias.fill_(0.5)
    for _ in range(10):
        router.train()(inputs()["x"].bfloat16())
        router.update()
    assert router.bias.dtype == torch.float32
    moved = (router.bias - 0.5).abs()
    assert 0.005 < moved.max().item() < 0.0105
    assert model.double()[0].bias.dtype == torch.float64


def test_update_reaches_every_router_of_a_model() -> None:
    model = torch.nn.Sequential(make("loss_free"), torch.nn.Linear(4, 4), make("switch"))
    model[0](tokens(64))
    assert fr.routers.update(model) == 2
    assert bool((model[0].bias != 0).any())


def test_deepseek_v3_weights_sum_to_the_scale() -> None:
    router = make("deepseek_v3").eval()
    x = tokens(40)
    routing = router(x).routing
    close(routing.weights.sum(1), 2.5, 1e-5)
    groups = routing.experts // 2
    assert max(len(row.unique()) for row in groups) <= 2
    logits = router.score(x)
    one, other = (fr.gate(z, 3, score="sigmoid", normalize=True) for z in (logits, logits + 2))
    assert (one.weights - other.weights).abs().max() > 1e-3
    softmax = [fr.gate(z, 3, normalize=True).weights for z in (logits, logits + 2)]
    close(softmax[0], softmax[1], 1e-5)
    with_bias = make("deepseek_v3", num_groups=1, topk_groups=None).eval()
    with_bias.bias[5] = 3.0
    moved = with_bias(x).routing
    assert bool((moved.experts == 5).any(1).all())
    s = with_bias.score(x).sigmoid().gather(1, moved.experts.long())
    close(moved.weights, 2.5 * s / s.sum(1, keepdim=True), 1e-5)


def test_bip_balances_from_the_first_batch() -> None:
    logits = skewed()
    found = []
    for iters in (1, 4, 14):
        router, x = wide("bip", logits, iters=iters)
        routing = router.train()(x).routing
        found.append(violation(routing.demand))
        assert bool((router.bias <= 0).all())
        p = logits.softmax(1).gather(1, routing.experts.long())
        close(routing.weights, p, 1e-5)
    plain = violation(fr.gate(logits, 2).demand)
    assert plain > 1.5
    assert found[0] < plain
    assert found[1] < 0.5
    assert found[2] < 0.1
    frozen = router.eval()(x).routing
    assert torch.equal(frozen.experts, routing.experts)
    router, x = wide("bip", torch.eye(16).repeat(4, 1) + torch.eye(16).roll(1, 1).repeat(4, 1) / 2)
    router.train()(x)
    assert router.bias.tolist() == [0.0] * 16
    carried, x = wide("bip", logits, carry=True)
    first = carried.train()(x).routing
    assert torch.equal(first.experts, fr.gate(logits, 2).experts)
    assert violation(carried(x).routing.demand) < 0.5


def test_ssr_plans_a_share_of_the_steps() -> None:
    logits = skewed()
    router, x = wide("ssr", logits, plan_share=0.0)
    plain = fr.gate(logits, 2, normalize=True)
    assert torch.equal(router.train()(x).routing.experts, plain.experts)
    planned, _ = wide("ssr", logits, plan_share=1.0)
    routed = planned.train()(x)
    assert routed.extra["planned"] == 1
    close(routed.routing.weights.sum(1), 1.0, 1e-5)
    assert violation(routed.routing.demand) < violation(plain.demand) / 2
    routed.routing.weights[:, 0].sum().backward()
    assert bool((planned.score.weight.grad != 0).any())
    assert torch.equal(planned.eval()(x).routing.experts, plain.experts)
    some, _ = wide("ssr", logits[:32], plan_share=0.5)
    torch.manual_seed(0)
    share = sum(some.train()(x[:32]).extra is not None for _ in range(60)) / 60
    assert 0.25 < share < 0.75


def test_sparse_ot_weighs_by_softmax_where_the_plan_is_positive() -> None:
    logits = skewed(256)
    router, x = wide("sparse_ot", logits, iters=100)
    routing = router.eval()(x).routing
    assert bool(((routing.experts >= 0).sum(1) >= 1).all())
    p = logits.softmax(1).gather(1, routing.experts.long().clamp(min=0))
    close(routing.weights, torch.where(routing.experts >= 0, p, 0.0), 1e-5)
    plan = fr.transport(logits.softmax(1), "ksparse", iters=100, k=2)
    assert torch.equal((routing.experts >= 0).sum(1), (plan > 0).sum(1))
    assert violation(routing.demand) < violation(fr.gate(logits, 2).demand) / 2


def test_sparse_columns_are_projections_of_the_largest() -> None:
    column = torch.tensor([[0.5], [0.4], [0.3], [0.1]], dtype=torch.float64)
    one = torch.zeros(4, dtype=torch.int64)
    for room, wanted in (
        (1, [1, 0, 0, 0]),
        (2, [0.55, 0.45, 0, 0]),
        (3, [13 / 30, 1 / 3, 7 / 30, 0]),
    ):
        got = sparse_columns(column, one, 1, torch.full((4, 1), room))
        close(got[:, 0], torch.tensor(wanted, dtype=torch.float64), 1e-12)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, generator=generator, dtype=torch.float64) * torch.tensor(
        [9, 3, 1, 0.3, 0.01]
    )
    ids = torch.arange(90) % 3
    room = torch.tensor([4, 30, 11])
    got = sparse_columns(x, ids, 3, room[ids, None])
    for segment in range(3):
        for j in range(5):
            v = x[ids == segment, j]
            top = v.sort(descending=True).values[: room[segment]]
            excess = (top.cumsum(0) - 1) / torch.arange(1, len(top) + 1)
            shift = excess[(top > excess).nonzero().max()]
            wanted = (v - shift).clamp(min=0) * (v >= top[-1])
            close(got[ids == segment, j], wanted, 1e-12)


def test_sparse_ot_with_few_tokens_per_expert() -> None:
    logits = skewed(256)
    router, x = wide("sparse_ot", logits, iters=150, sparse="expert")
    routing = router.eval()(x).routing
    plan = expert_plan(logits.softmax(1), 2, Context(), **router.options)
    assert torch.equal(routing.experts >= 0, plan > 0)
    assert int(routing.demand.max()) <= 256 * 2 // 16
    close(plan.sum(0), torch.full((16,), 16.0), 1e-3)
    assert float((plan.sum(1) - 1).abs().mean()) < 0.2  # columns are exact, rows as it converges
    first = expert_plan(logits.softmax(1), 2, Context(), iters=1, gamma=1.0, learning_rate=0.01)
    assert float((plan.sum(1) - 1).abs().mean()) < float((first.sum(1) - 1).abs().mean()) / 2
    close(routing.weights, torch.where(plan > 0, logits.softmax(1), 0.0), 1e-5)
    router, given = make("sparse_ot", sparse="expert").serve(), inputs()
    together = layer(router, given)
    for scope in range(3):
        mine = (given["scope_ids"] == scope).nonzero()[:, 0]
        assert torch.equal(layer(router, rows(given, mine)), together[mine])
    assert layer(router, inputs(0)).shape == (0, HIDDEN)
    with pytest.raises(ValueError, match="sparse_ot: sparse must be one of token, expert"):
        make("sparse_ot", sparse="row")


# ---- k-means -----------------------------------------------------------------------------------


def test_kmeans_separates_two_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(HIDDEN)[:2] * 5
    label = torch.randint(0, 2, (200,), generator=generator)
    x = centres[label] + 0.3 * torch.randn(200, HIDDEN, generator=generator)
    router = fr.routers.build("kmeans", HIDDEN, 2, rate=0.3).train()
    for _ in range(20):
        router(x)
        router.update()
    routing = router.eval()(x).routing
    match = (routing.experts[:, 0] == label).float().mean()
    assert max(match, 1 - match) == 1
    assert bool((routing.weights == 1).all())
    means = torch.stack([x[label == i].mean(0) for i in (0, 1)])
    distance = torch.cdist(router.centroids, means).amin(1)
    assert bool((distance < 0.05).all())
    low, high = x.amin(0), x.amax(0)
    assert bool(((router.centroids >= low) & (router.centroids <= high)).all())
    before = router.centroids.clone()
    router(x)
    router.update()
    assert torch.equal(router.centroids, before)


def test_kmeans_trains_in_one_graph() -> None:
    router, given = make("kmeans").train(), inputs()
    twin = copy.deepcopy(router)
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    for _ in range(2):
        wanted, got = twin(**given), compiled(**given)
        assert torch.equal(got.routing.experts, wanted.routing.experts)
        twin.update()
        router.update()
    assert torch.equal(router.centroids, twin.centroids)


def test_router_row_and_expert_input_weights_share_a_direction() -> None:
    """Geometric coupling: for one token, both gradients are multiples of the token."""
    x = tokens(1).double()
    router = make("topk_softmax", torch.float64, aux_coef=0.0)
    w_up = torch.randn(EXPERTS, HIDDEN, 12, dtype=torch.float64).requires_grad_()
    own = fr.routers.Experts(w_up, torch.randn(EXPERTS, 12, HIDDEN, dtype=torch.float64), "relu")
    routed = router(x)
    router.mix(x, routed, own).square().sum().backward()
    expert = int(routed.routing.experts[0, 0])
    row = router.score.weight.grad[expert]
    column = w_up.grad[expert].t()
    column = column[column.abs().sum(1).argmax()]
    for gradient in (row, column):
        cosine = torch.nn.functional.cosine_similarity(gradient, x[0], dim=0)
        close(cosine.abs(), 1.0, 1e-9)


# ---- mixtures ----------------------------------------------------------------------------------


def test_v_moe_rounds_capacity_and_balances() -> None:
    router = make("v_moe").train()
    routed = router(tokens(41))
    assert routed.plan.kept.max() <= 12  # ceil(1.05 * 41 * 2 / 8) = 11, rounded up to 12
    x, noisy = tokens(41), routed.routing  # losses: noiseless importance, chances to be chosen
    torch.manual_seed(5)
    noise = torch.randn(41, EXPERTS) / EXPERTS
    torch.manual_seed(5)
    routed, z = router(x), router.score(x).double()
    floor = (z + noise).topk(2, dim=1).values[:, 1:]
    chance = (1 - torch.special.ndtr((floor - z) * EXPERTS)).mean(0)
    sums = z.softmax(1).sum(0)
    squares = [v.var(correction=0) / v.mean() ** 2 for v in (sums, chance)]
    close(routed.losses["balance"], 0.01 * sum(squares) / 2, 1e-6)
    chosen = (z + noise).softmax(1).gather(1, routed.routing.experts.long())
    close(routed.routing.weights, chosen, 1e-6)
    assert not torch.equal(noisy.weights, routed.routing.weights)
    router.score.weight.data.zero_()
    noisy = [router(tokens(41)).routing.experts for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(*(router.eval()(tokens(41)).routing.experts for _ in range(2)))


def test_soft_moe_mixes_tokens_and_answers() -> None:
    router, given = make("soft_moe", slots=2).eval(), inputs()
    routed, own = router(**given), given["experts"]
    dispatch, combine = routed.extra["dispatch"], routed.extra["combine"]
    close(combine.sum(1), 1.0, 1e-5)
    x, y = given["x"], router.mix(given["x"], routed, own)
    for sequence in range(3):
        mine = given["sequence_ids"] == sequence
        close(dispatch[mine].sum(0), 1.0, 1e-5)
        mixed = dispatch[mine].t() @ x[mine]
        answers = torch.stack([own.each(row[None])[0, i // 2] for i, row in enumerate(mixed)])
        close(y[mine], combine[mine] @ answers, 1e-4)


def test_one_hot_dispatch_is_switch_and_expert_choice() -> None:
    """y = sum over e, c of C[t, e, c] E_e(sum over t' of D[t', e, c] x_t') covers both."""
    x, own = tokens(24), experts()
    for name in ("switch", "expert_choice"):
        router = make(name).train() if name == "expert_choice" else make(name, jitter=0.0).train()
        routed = router(x)
        routing, plan = routed.routing, routed.plan
        if plan is None:
            plan = fr.plan_dispatch(routing.experts, EXPERTS)
        y = torch.zeros_like(x)
        for row, slot in enumerate(plan.row_to_slot.tolist()):
            if slot >= 0:
                t, j = divmod(slot, routing.experts.shape[1])
                expert = int(routing.experts[t, j])
                assert plan.offsets[expert] <= row < plan.offsets[expert + 1]
                one_hot = torch.zeros(24, 1)
                one_hot[t] = 1
                answer = own.each((one_hot * x).sum(0, keepdim=True))[0, expert]
                y += one_hot * routing.weights[t, j] * answer
        close(router.mix(x, routed, own), y.detach(), 1e-4)


def test_smear_merges_parameters() -> None:
    given = inputs()
    own = experts()
    router = make("smear").eval()
    routed = router(**given)
    p, ids = routed.extra["share"], given["sequence_ids"]
    one = fr.routers.Experts(own.w_up[:, :, :12], own.w_down, "relu")
    positive = fr.routers.Experts(one.w_up.abs(), one.w_down, "relu")
    x = given["x"].abs()  # relu of positive numbers is linear in each matrix, not in both
    merged = router.mix(x, routed, positive._replace(w_down=one.w_down[:1].expand(8, -1, -1)))
    same_down = positive._replace(w_down=one.w_down[:1].expand(8, -1, -1))
    mixed = (p[ids][:, :, None] * same_down.each(x)).sum(1)
    close(merged, mixed, 1e-3)
    merged = router.mix(given["x"], routed, own)
    assert (merged - layer_of_outputs(own, given, p)).abs().max() > 1e-2
    hot = torch.eye(EXPERTS)[[3, 0, 5]]
    single = routed._replace(extra={**routed.extra, "share": hot})
    wanted = own.each(given["x"])[torch.arange(24), torch.tensor([3, 0, 5])[ids]]
    close(router.mix(given["x"], single, own), wanted, 1e-5)
    dropped = make("smear", dropout=0.5).train()(**given).extra["share"]
    assert bool((dropped == 0).any())
    close(dropped.sum(1), 1.0, 1e-5)
    last = make("smear", dropout=0.9999).train()(**given).extra["share"]
    close(last.amax(1), 1.0, 1e-5)


def layer_of_outputs(own: fr.routers.Experts, given: dict, p: Tensor) -> Tensor:
    """The weighted sum of outputs, which merging is not for non-linear experts."""
    return (p[given["sequence_ids"]][:, :, None] * own.each(given["x"])).sum(1)


# ---- capacity per request ----------------------------------------------------------------------


@pytest.mark.parametrize("drop_policy", ["position", "score"])
def test_a_request_has_the_capacity_of_its_own_length(drop_policy: str) -> None:
    """Eight rows that all want expert 0 keep two, with or without others in the batch."""
    router = fr.routers.build(
        "switch", HIDDEN, 4, eval_capacity_factor=1.0, drop_policy=drop_policy
    ).serve()
    router.score.weight.data.zero_()
    router.score.weight.data[0] = 1
    x = tokens(32).abs() + 0.1
    scopes = torch.tensor([1] * 24 + [0] * 8, dtype=torch.int32)
    given = {"x": x, "scope_ids": scopes, "num_scopes": 2}
    plan = router(**given).plan
    assert (plan.slot_to_row[24:, 0] >= 0).sum() == 2
    assert plan.dropped.tolist() == [24 - 6 + 8 - 2, 0, 0, 0]
    four = fr.routers.Experts(torch.randn(4, HIDDEN, 8), torch.randn(4, 4, HIDDEN))
    together = layer(router, {**given, "experts": four})[24:]
    alone = layer(router, {**rows(given, torch.arange(24, 32)), "experts": four})
    assert torch.equal(together, alone)
    shared = router.eval()(x).plan  # one capacity of 8 for all
    served = shared.slot_to_row[24:, 0] >= 0
    if drop_policy == "position":
        assert served.sum() == 0
