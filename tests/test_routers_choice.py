"""Acceptance checks of survey rows in which tokens choose: token choice, groups, structure."""

from __future__ import annotations

import itertools
import math

import fastmoe_route as fr
import pytest
import torch
import torch.nn.functional as F
from fastmoe_route import losses
from fastmoe_route.losses._beta import beta_cdf
from fastmoe_route.routers.estimators import score_function
from router_cases import EXPERTS, HIDDEN, experts, inputs, layer, make, set_logits, tokens
from tolerance import close
from torch import Tensor, nn

# ---- token choice ------------------------------------------------------------------------------


def test_switch_loss_and_capacity() -> None:
    router = fr.routers.build("switch", HIDDEN, EXPERTS, jitter=0.0, aux_coef=0.01)
    router.score.weight.data.zero_()
    close(router(tokens(40)).losses["balance"], 0.01, 1e-5)
    x = set_logits(router, torch.tensor([[60.0] + [0.0] * 7]).repeat(40, 1))
    close(router(x).losses["balance"], 0.01 * EXPERTS, 1e-5)
    small = fr.routers.build("switch", HIDDEN, 2, capacity_factor=1.0)
    small.score.weight.data.zero_()
    x = tokens(8)
    routed = small(x)
    assert (routed.plan.slot_to_row[:, 0] >= 0).tolist() == [True] * 4 + [False] * 4
    two = fr.routers.Experts(torch.randn(2, HIDDEN, 8), torch.randn(2, 4, HIDDEN))
    y = small.mix(x, routed, two)
    assert bool((y[:4] != 0).all())
    assert bool((y[4:] == 0).all())


def test_open_moe_drops_the_end_of_the_batch() -> None:
    router = make("open_moe", top_k=1).train()
    router.score.weight.data[0] += 0.5
    x = tokens(400).abs()
    dropped = router(x).plan.slot_to_row[:, 0] < 0
    rate = dropped.float().view(4, 100).mean(1)
    assert rate.diff().min() >= 0
    assert rate[-1] > rate[0]
    z = torch.zeros(5, EXPERTS)
    close(losses.z_loss(fr.gate(z - z.logsumexp(1, keepdim=True), 1, stats=True)), 0.0, 1e-5)
    assert losses.z_loss(fr.gate(z, 1, stats=True)) > 1


def test_tutel_capacity_and_priority() -> None:
    router = make("tutel", capacity_factor=None).train()
    assert router(tokens(100)).plan is None
    # T=10, E=4, K=2, factor 1: K * floor(ceil(10 / 4)) = 6; all ask for experts 0 and 1.
    router = fr.routers.build("tutel", HIDDEN, 4, 2).train()
    x = set_logits(router, torch.tensor([[3.0, 2.0, 0.0, 0.0]]).repeat(10, 1))
    assert router(x).plan.kept.tolist() == [6, 6, 0, 0]
    # Expert 1 is the first choice of the last tokens and the second of the others: those wait.
    logits = torch.tensor([[3.0, 2.0, 0, 0]] * 6 + [[2.0, 3.0, 0, 0]] * 4)
    plan = router(set_logits(router, logits)).plan
    assert (plan.slot_to_row[6:, 0] >= 0).all()
    assert (plan.slot_to_row[:6, 1] >= 0).sum() == 2
    # By score, the tokens with the largest best probability come first.
    router = fr.routers.build("tutel", HIDDEN, 2, 1, batch_prioritized=True).train()
    strength = torch.tensor([0.1, 0.4, 0.2, 0.3])
    x = set_logits(router, torch.stack([strength, -strength], 1))
    assert (router(x).plan.slot_to_row[:, 0] >= 0).tolist() == [False, True, False, True]
    assert fr.routers.build("tutel", 8, 2, batch_prioritized=True).train().invariance == "B"


def test_tutel_weights_before_or_after_linear_experts() -> None:
    x, routing = tokens(12), make("tutel").eval()(tokens(12)).routing
    own = experts()
    both = [
        fr.moe_mlp(x, routing, own.w_up[:, :, :12], own.w_down, activation="relu", weights_on=where)
        for where in ("output", "input")
    ]
    close(both[0], both[1], 1e-4)
    both = [
        fr.moe_mlp(x, routing, own.w_up, own.w_down, weights_on=where)
        for where in ("output", "input")
    ]
    assert (both[0] - both[1]).abs().max() > 1e-2


def test_topk_softmax_has_three_equal_forms() -> None:
    router = make("topk_softmax", top_k=3).eval()
    x = tokens(50)
    routing, z = router(x).routing, router.score(x)
    chosen = routing.experts.long()
    masked = torch.full_like(z, -torch.inf).scatter(1, chosen, z.gather(1, chosen)).softmax(1)
    close(routing.weights, masked.gather(1, chosen), 1e-6)
    close(routing.weights, z.gather(1, chosen).softmax(1), 1e-6)
    p = z.softmax(1).gather(1, chosen)
    close(routing.weights, p / p.sum(1, keepdim=True), 1e-6)
    tied = fr.gate(torch.ones(1, 4), 2)
    assert tied.experts.tolist() == [[0, 1]]


def test_smoe_dropout_router_never_learns() -> None:
    router = make("smoe_dropout", top_k=EXPERTS)
    x = tokens(20).requires_grad_()
    y = layer(router, {"x": x, "experts": experts()})
    y.sum().backward()
    assert router.score.weight.grad is None
    dense = router.score(x.detach()).softmax(1)
    close(y.detach(), (dense[:, :, None] * experts().each(x.detach())).sum(1), 1e-4)
    router = make("smoe_dropout")
    steps = [router.set_progress(i / 20) for i in range(21)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (2, EXPERTS)
    with pytest.raises(ValueError, match=r"smoe_dropout: progress must be in \[0, 1\], got 2"):
        router.set_progress(2)


def test_mask_moe_rare_ids_have_one_expert() -> None:
    router = make("mask_moe").eval()
    ids = torch.arange(50)
    first, second = (router(tokens(50, seed), token_ids=ids).routing for seed in (0, 1))
    assert torch.equal(first.experts[20:], second.experts[20:])
    assert bool((first.weights[20:] == 1).all())
    assert not torch.equal(first.experts[:20], second.experts[:20])
    assert router.visible.sum(1).tolist() == [4] * 20 + [1] * 30
    assert bool(router.visible.gather(1, first.experts.long()).all())
    again = fr.routers.build("mask_moe", 8, EXPERTS, vocab_size=50, num_frequent=20, visible=4)
    assert torch.equal(again.visible, router.visible)
    other = fr.routers.build("mask_moe", 8, EXPERTS, vocab_size=50, table_seed=1)
    assert not torch.equal(other.visible[20:], router.visible[20:])


# ---- fixed and random choice -------------------------------------------------------------------


def test_hash_is_a_function_of_the_id() -> None:
    ids = torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(0))
    routing = make("hash")(tokens(300), token_ids=ids).routing
    assert routing.demand.tolist() == torch.bincount(ids % EXPERTS, minlength=EXPERTS).tolist()
    assert bool((routing.weights == 1).all())
    two = make("hash", top_k=2)(tokens(3), token_ids=torch.tensor([7, 8, 15])).routing
    assert two.experts.tolist() == [[7, 0], [0, 1], [7, 0]]


def test_rl_r_gradient_vanishes_at_the_baseline() -> None:
    router = make("rl_r").train()
    routed = router(tokens(30), seed=3)
    reward = torch.linspace(-1, 1, 30)
    loss = score_function(reward, routed.extra["log_prob"], baseline=reward)
    (grad,) = torch.autograd.grad(loss.sum(), router.score.weight, retain_graph=True)
    assert bool((grad == 0).all())
    loss = score_function(reward, routed.extra["log_prob"])
    (grad,) = torch.autograd.grad(loss.sum(), router.score.weight)
    assert bool((grad != 0).any())
    p = router.score(tokens(30)).softmax(1)
    chosen = routed.routing.experts.long()
    close(routed.extra["log_prob"], p.gather(1, chosen)[:, 0].log(), 1e-5)
    assert not torch.equal(chosen[:, 0], p.argmax(1))
    assert torch.equal(router.eval()(tokens(30)).routing.experts[:, 0].long(), p.argmax(1))


def test_thor_draws_uniformly() -> None:
    demand = make("thor")(tokens(4000), seed=1).routing.demand.double()
    chi_squared = ((demand - 500) ** 2 / 500).sum()
    assert chi_squared < 24.3  # 0.999 quantile for 7 degrees of freedom
    given = inputs()
    routing = make("thor", level="sequence")(**given).routing
    for sequence in range(3):
        assert len(routing.experts[given["sequence_ids"] == sequence].unique()) == 1
    p = torch.rand(5, 7).softmax(1)
    close(losses.consistency(p.log(), p.log()), 0.0, 1e-5)


# ---- groups ------------------------------------------------------------------------------------


def test_m6_t_takes_one_expert_of_every_group() -> None:
    router = make("m6_t", top_k=4).eval()
    routing = router(tokens(60)).routing
    assert (routing.experts.sort(1).values // 2).tolist() == [[0, 1, 2, 3]] * 60
    assert routing.weights.max() <= 1
    assert routing.weights.sum(1).max() > 1
    single, switch = make("m6_t", top_k=1).eval(), make("switch").eval()
    switch.load_state_dict(single.state_dict())
    for got, wanted in zip(
        single(tokens(60)).routing[:3], switch(tokens(60)).routing, strict=False
    ):
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="m6_t: top_k must divide the number of experts 8, got 3"):
        make("m6_t", top_k=3)


def test_sam_stays_in_one_group() -> None:
    router = make("sam").eval()
    routing = router(tokens(60)).routing
    assert bool((routing.experts // 4 == routing.experts[:, :1] // 4).all())
    group = router.group_score(tokens(60)).softmax(1)
    assert bool((routing.weights <= group.amax(1, keepdim=True)).all())
    single, switch = make("sam", top_k=1, num_groups=EXPERTS).eval(), make("switch").eval()
    switch.score.weight.data.copy_(single.group_score.weight)
    got, wanted = single(tokens(60)).routing, switch(tokens(60)).routing
    assert torch.equal(got.experts, wanted.experts)
    close(got.weights, wanted.weights, 1e-6)
    with pytest.raises(ValueError, match=r"sam: top_k must be in \[1, 4\], got 5"):
        make("sam", top_k=5)


def test_smile_weights_are_products_of_two_levels() -> None:
    router = make("smile").eval()
    routed = router(tokens(60))
    p = router.node_score(tokens(60)).softmax(1).amax(1)
    q = router.device_score(tokens(60)).softmax(1).amax(1)
    close(routed.routing.weights[:, 0], p * q, 1e-6)
    assert bool((routed.routing.weights[:, 0] <= torch.minimum(p, q)).all())
    place = routed.extra["node"] * 4 + routed.extra["device"]
    assert torch.equal(routed.routing.experts[:, 0], place)
    # what each level's exchange moves: rows to every node, and inside it to every device
    to_node, to_device = torch.bincount(routed.extra["node"]), torch.bincount(place, minlength=8)
    assert routed.routing.demand.tolist() == to_device.tolist()
    assert routed.routing.demand.view(2, 4).sum(1).tolist() == to_node.tolist()
    single, switch = make("smile", num_nodes=1).eval(), make("switch").eval()
    switch.score.weight.data.copy_(single.device_score.weight)
    got, wanted = single(tokens(60)).routing, switch(tokens(60)).routing
    assert torch.equal(got.experts, wanted.experts)
    close(got.weights, wanted.weights, 1e-6)
    assert set(make("smile").train()(tokens(60)).losses) == {"node_balance", "device_balance"}


def test_loc_moe_gate_rows_are_orthogonal() -> None:
    router = make("loc_moe", capacity_factor=None, aux_coef=0.0)
    rows = torch.eye(HIDDEN).view(HIDDEN, EXPERTS, -1).mean(2).t()
    product = rows @ rows.t()
    close(product, torch.diag(product.diagonal()), 1e-5)
    assert bool((product.diagonal() > 0).all())
    balanced = torch.cat([torch.eye(EXPERTS).repeat_interleave(2, 1)] * 4) * 50
    routed = router.train()(balanced)
    close(routed.losses["locality"], 0.0, 1e-5)
    assert router(balanced[:3]).losses["locality"] > 1e-3
    with pytest.raises(ValueError, match="loc_moe: num_experts must divide the hidden size 20"):
        fr.routers.build("loc_moe", 20, 8)


def test_loc_moe_least_capacity_follows_the_angle() -> None:
    """Above the bound of normal coordinates, falling as the angle widens, and a true bound."""
    last = math.inf
    for cosine in (0.5, 0.3, 0.2, 0.1, 0.05, 0.0):
        least = fr.routers.angle_capacity(cosine, 128, 4)
        assert least >= math.exp(128 * cosine**2 / 2) / 4
        assert 1 <= least <= last
        last = least
        # the probability of such an angle: half of a Beta's tail, for directions on the sphere
        half, d = torch.tensor(0.5), torch.tensor(63.5)
        inside = 0.5 * beta_cdf(torch.tensor(1 - cosine**2, dtype=torch.float64), d, half)
        assert float(inside) <= math.exp(-128 * cosine**2 / (2 - cosine**2))
    assert fr.routers.angle_capacity(1.0, 10**6, 4) == math.inf
    router, x = make("loc_moe"), tokens(30)
    gates = torch.eye(EXPERTS).repeat_interleave(2, 1)
    cosines = F.normalize(x, dim=1) @ F.normalize(gates, dim=1).t()
    experts = router.eval()(x).routing.experts.long()
    worst = float(cosines.gather(1, experts).min())
    assert router.least_capacity(x) == min(fr.routers.angle_capacity(worst, HIDDEN, EXPERTS), 30)
    assert router.least_capacity(gates) == 8  # along the gates: every token
    assert router.least_capacity(x[:0]) == 1
    with pytest.raises(ValueError, match=r"angle_capacity: cosine must be in \[0, 1\], got 1.5"):
        fr.routers.angle_capacity(1.5, 8, 8)


# ---- structure ---------------------------------------------------------------------------------


def test_x_moe_is_a_cosine() -> None:
    router = make("x_moe", temperature=0.2).eval()
    x = tokens(30)
    z = router.logits(x)
    assert bool((z.abs() <= 5.0001).all())
    close(router.logits(x * 9), z, 1e-4)
    released = make("x_moe", temperature=0.2, normalize_tokens=False).eval()
    close(released.logits(x * 9), released.logits(x) * 9, 1e-3)
    router.embeddings.data[3] *= 7
    close(router.logits(x), z, 1e-4)
    alike = make("x_moe").train()
    alike.embeddings.data.copy_(alike.embeddings.data[:1].expand(EXPERTS, -1))
    assert alike(tokens(25)).plan.kept[0] == 5  # floor(1.25 * ceil(25 / 8)); ties go to expert 0
    thinned = make("x_moe", top_k=2, second="random", capacity_factor=None).train()
    routing = thinned(tokens(400)).routing
    kept = (routing.experts[:, 1] >= 0).float().mean()
    assert bool((routing.experts[:, 0] >= 0).all())
    assert 0.1 < kept < 0.95
    close(routing.weights.sum(1), 1.0, 1e-5)
    assert bool((routing.weights[routing.experts[:, 1] < 0, 0] == 1).all())


def test_x_moe_with_two_experts_shares_what_was_not_dropped() -> None:
    router = make("x_moe", top_k=2).train()
    routed = router(tokens(25))
    assert routed.plan.kept.max() == 8  # 2 * ceil(25 / 8)
    p = router.logits(tokens(25)).softmax(1).gather(1, routed.routing.experts.long())
    p = p * (routed.plan.slot_to_row >= 0)
    close(routed.routing.weights, p / p.sum(1, keepdim=True), 1e-6)
    assert bool((routed.routing.weights == 1).any())  # the other one was dropped
    router.embeddings.data.copy_(router.embeddings.data[:1].expand(EXPERTS, -1))
    alike = router(tokens(25)).routing.weights  # all ask for experts 0 and 1
    close(alike, torch.tensor([[0.5, 0.5]] * 8 + [[0.0, 0.0]] * 17), 1e-6)


def test_x_moe_draws_the_second_expert() -> None:
    """The second is a draw from the softmax over all but the first: chi squared, 6 degrees."""
    router = make("x_moe", top_k=2, second="gumbel", capacity_factor=None, temperature=0.5).train()
    x = tokens(1).expand(6000, -1)
    routing = router(x, seed=3).routing
    z = router.logits(x[:1])[0]
    first = int(z.argmax())
    assert bool((routing.experts[:, 0] == first).all())
    expected = 6000 * z.index_fill(0, torch.tensor([first]), -torch.inf).softmax(0)
    counts = torch.bincount(routing.experts[:, 1].long(), minlength=EXPERTS)
    others = expected > 0
    assert ((counts - expected)[others].square() / expected[others]).sum() < 22.5  # 0.1%
    assert torch.equal(router.eval()(x[:1]).routing.experts, router.logits(x[:1]).topk(2)[1].int())
    with pytest.raises(ValueError, match="x_moe: second must be one of best, random, gumbel"):
        make("x_moe", second="worst")


def test_hyper_router_learns_its_embedding_only() -> None:
    router = make("hyper_router")
    weight, bias = router.weights()
    assert weight.shape == (EXPERTS, HIDDEN)
    assert bias.shape == (EXPERTS,)
    layer(router, inputs()).sum().backward()
    assert bool((router.embedding.grad != 0).any())
    assert all(p.grad is None for p in router.hyper.parameters())


def test_rmoe_with_a_transparent_cell_is_linear() -> None:
    router = make("rmoe", state_size=12).eval()
    x = tokens(30)
    first = router(x)
    assert first.state.shape == (30, 12)
    second = router(x, state=first.state)
    assert not torch.equal(second.routing.weights, first.routing.weights)
    permutation = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    moved = router(x[permutation], state=first.state[permutation]).routing
    assert torch.equal(moved.experts, second.routing.experts[permutation])

    class Transparent(nn.Module):
        def forward(self, u: Tensor, state: Tensor) -> Tensor:
            return u

    router.cell = Transparent()
    got = router(x, state=first.state).routing
    wanted = fr.gate(router.leave(router.enter(x)), 2, normalize=True)
    assert torch.equal(got.experts, wanted.experts)
    assert torch.equal(got.weights, wanted.weights)
    with pytest.raises(ValueError, match=r"rmoe: state must have shape \[30, 12\], got"):
        router(x, state=torch.zeros(30, 11))
    with pytest.raises(ValueError, match="rmoe: state must be finite, got inf or NaN"):
        router(x, state=torch.full((30, 12), torch.nan))
    shared = make("rmoe", state_size=12, cell=make("rmoe", state_size=12).cell)
    assert shared.cell.input.weight.shape == (36, 12)


def test_yuan_attention_without_queries_is_a_mean() -> None:
    router = make("yuan_attention").eval()
    x = tokens(30)
    q, k, v = router.project(x).chunk(3, 1)
    wanted = torch.stack([((q[:, i : i + 1] * k).softmax(1) * v).sum(1) for i in range(EXPERTS)], 1)
    close(router.logits(x), wanted, 1e-5)
    router.project.weight.data[:EXPERTS] = 0
    close(router.logits(x), v.mean(1, keepdim=True).expand(-1, EXPERTS), 1e-5)


def test_finedeep_slices_add_up_to_the_dense_network() -> None:
    x, own = tokens(10), experts()
    router = make("finedeep", sublayers=1).eval()
    router.readers.data.zero_()  # sigmoid(0) = 1/2 for every expert
    dense = own.each(x).sum(1)
    close(layer(router, {"x": x, "experts": own}), dense / 2, 1e-4)
    deep = make("finedeep").eval()
    routed = deep(x, experts=own)
    weights = routed.routing.weights
    assert bool(((weights > 0) & (weights < 1)).all())
    assert (weights.sum(1) - 1.0).abs().max() > 0.1
    first = own.part(slice(0, 4)).each(x)
    w = (first * deep.readers[:4]).sum(2).sigmoid()
    close(weights[:, :4], w, 1e-5)
    y = (w[:, :, None] * first).sum(1)
    second = own.part(slice(4, 8)).each(F.rms_norm(x + y, (HIDDEN,), eps=1e-6))
    w = (second * deep.readers[4:]).sum(2).sigmoid()
    close(deep.mix(x, routed, own), y + (w[:, :, None] * second).sum(1), 1e-4)


def test_uni_pool_scores_do_not_see_the_scale() -> None:
    router = make("uni_pool").eval()
    x = tokens(40)
    first, second = router(x).routing, router(x * 31).routing
    assert torch.equal(first.experts, second.experts)
    close(first.weights, second.weights, 1e-5)
    own = experts()
    layers = [make("uni_pool").train() for _ in range(2)]
    pointers = {own.part(slice(None)).w_up.data_ptr() for _ in layers}
    assert pointers == {own.w_up.data_ptr()}
    half = torch.cat([torch.eye(EXPERTS)[:4]] * 4) * 5
    uneven = [set_logits(layers[0], half), set_logits(layers[1], half.roll(4, 1))]
    routings = [r(x).routing for r, x in zip(layers, uneven, strict=True)]
    assert all(r.demand.max() == 4 and r.demand.min() == 0 for r in routings)
    even = losses.pool_balance(routings)
    assert even < losses.pool_balance([routings[0], routings[0]])


def test_uni_pool_fades_and_locks() -> None:
    router, x = make("uni_pool", top_k=2).eval(), tokens(40)
    free = router(x).routing
    owned = torch.arange(EXPERTS) % 4 == 1
    scores = F.normalize(router.score(x), dim=1).relu()
    for progress, rest in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        router.lock(owned, progress)
        routing = router(x).routing
        wanted = torch.where(owned, scores, rest * scores).gather(1, routing.experts.long())
        close(routing.weights, wanted, 1e-6)
        if progress == 0:
            assert torch.equal(routing.experts, free.experts)
    assert bool(owned[routing.experts.long()].all())  # locked: nothing else, whatever it scores
    close(routing.weights, scores.gather(1, routing.experts.long()), 1e-6)
    with pytest.raises(ValueError, match=r"uni_pool: progress must be in \[0, 1\], got 2"):
        router.lock(owned, 2)
    with pytest.raises(ValueError, match=r"uni_pool: owned must have shape \[8\]"):
        router.lock(owned[:3])


def test_pool_partition_gives_every_expert_one_layer() -> None:
    pytest.importorskip("scipy")
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 100, (3, 6), generator=generator)
    share = counts / counts.sum(1, keepdim=True)

    def worth(owner: Tensor) -> tuple[float, float]:
        kept = (share * owner).sum(1)
        return -float((0.6 - kept).clamp(min=0).sum()), float(kept.sum())

    found = fr.routers.pool_partition(counts, 0.6)
    assert found.sum(0).tolist() == [1] * 6
    assert found.sum(1).tolist() == [2] * 3
    every = {tuple(p) for p in itertools.permutations([0, 0, 1, 1, 2, 2])}
    best = max(worth(F.one_hot(torch.tensor(p), 3).t()) for p in every)
    assert worth(found) == pytest.approx(best, abs=1e-6)
    planted = torch.eye(4).repeat(1, 8)[:, torch.randperm(32, generator=generator)] * 7
    assert torch.equal(fr.routers.pool_partition(planted), planted > 0)
    for bad, message in (
        (counts[:, :4], "counts must have a multiple of as many columns as rows"),
        (-counts, "counts must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=f"pool_partition: {message}"):
            fr.routers.pool_partition(bad)
    with pytest.raises(ValueError, match=r"pool_partition: coverage must be in \[0, 1\], got 2"):
        fr.routers.pool_partition(counts, 2)


def test_block_ffn_runs_what_is_active() -> None:
    router = make("block_ffn").eval()
    x, own = tokens(64), experts()
    routed = router(x)
    a = routed.extra["activation"]
    assert torch.equal((routed.routing.experts >= 0).sum(1), (a > 0).sum(1))
    g = a / (a.square().mean(1, keepdim=True) + 1e-6).sqrt()
    dense = (g[:, :, None] * own.each(x)).sum(1)
    close(router.mix(x, routed, own), dense, 1e-4)
    idle = a <= 0
    token_sparsity = idle.float().mean()
    chunk_sparsity = idle.view(8, 8, EXPERTS).all(1).float().mean()
    assert chunk_sparsity <= token_sparsity
    router.score.weight.data.copy_(-router.score.weight.abs())
    silent = router(x.abs())
    assert bool((router.mix(x.abs(), silent, own) == 0).all())
    trained = router.train()(x)
    assert set(trained.losses) == {"locality", "chunk"}
