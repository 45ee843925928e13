"""Survey rows 2d, 2e and L: gradient estimators, competition, prototypes, sequences, adapters."""

from __future__ import annotations

import math

import fastmoe_route as fr
import pytest
import torch
from cases import normal
from fastmoe_route import adapters, losses
from fastmoe_route.routers import estimators
from router_cases import EXPERTS, HIDDEN, SEQUENCES, inputs, layer, make, rows
from tolerance import assert_bound, close

F64 = torch.float64


def same_routing(one, two):
    assert torch.equal(one.experts, two.experts)
    assert_bound(one.weights, two.weights.detach().double(), 1e-6)


def plain(router, x, k, **options):
    return fr.gate(router.score(x), k, normalize=True, **options)


# ---- R50, R57, R59: draws ----------------------------------------------------------------------


def test_grin_evaluates_deterministically_in_turns():
    given = inputs()
    router = make("grin", epsilon=math.inf).eval()
    routed = router(**given).routing
    same = router(**{**given, "seed": 8}).routing
    assert torch.equal(routed.weights, same.weights)
    z = router.score(given["x"])
    best = z.topk(2, dim=1)
    assert torch.equal(routed.experts, best.indices.int())
    first = z.softmax(1).gather(1, best.indices[:, :1])
    left = z.scatter(1, best.indices[:, :1], -torch.inf)
    second = left.softmax(1).gather(1, best.indices[:, 1:])
    assert_bound(routed.weights, torch.cat([first, second], 1).double(), 1e-6)
    assert (routed.weights.sum(1) - 1).abs().max().item() > 0.05  # not renormalised


def test_grin_draws_distinct_experts_that_depend_on_seed_and_position():
    given = inputs()
    router = make("grin", epsilon=math.inf, top_k=3).train()
    one, two = router(**given).routing, router(**{**given, "seed": 9}).routing
    assert not torch.equal(one.experts, two.experts)
    assert (one.experts.sort(1).values.diff(dim=1) > 0).all()
    index = torch.tensor([9, 2])
    assert torch.equal(router(**rows(given, index)).routing.experts, one.experts[index])
    one.weights.sum().backward()
    assert router.score.weight.grad.abs().sum() > 0


def test_binary_gate_is_hard_and_its_gradient_soft():
    given = inputs()
    router = make("binary_gate").train()
    routed = router(**given)
    z = router.score(given["x"])
    assert torch.equal(routed.routing.weights, (z > 0).float())
    grad = torch.autograd.grad(routed.routing.weights.sum(), router.score.weight)[0]
    soft = torch.autograd.grad(z.sigmoid().sum(), router.score.weight)[0]
    assert_bound(grad, soft.double(), 1e-5)
    evaluated = router.eval()(**given).routing
    assert torch.equal((evaluated.experts >= 0).sum(1), (z > 0).sum(1))
    drawn = make("binary_gate", stochastic=True).train()(**given)
    p = torch.where(drawn.routing.weights > 0, z.sigmoid(), 1 - z.sigmoid())
    assert_bound(drawn.extra["log_prob"], p.log().sum(1).detach().double(), 1e-5)


def test_remix_has_constant_weights_and_the_probability_of_its_draw():
    given = inputs()
    router = make("remix", top_k=3, rank=4).train()
    routed = router(**given)
    assert (routed.routing.weights == 2 / 12).all()
    w = routed.routing.weights.double()
    close(w.sum(1) ** 2 / w.square().sum(1), torch.full((24,), 3.0))  # effective support
    z = router.score(given["x"])
    close(
        routed.extra["log_prob"].detach(),
        estimators.ordered_log_prob(z, routed.routing.experts).detach().double(),
    )
    other = router(**{**given, "seed": 1}).routing.experts
    assert not torch.equal(other, routed.routing.experts)
    same_routing(
        router.eval()(**given).routing,
        fr.gate(z, 3)._replace(weights=torch.full((24, 3), 2 / 12)),
    )
    assert make("remix", rank=8, rs=True).weight == 0.5  # 2 / sqrt(2 * 8): the active rank is K r
    router.train()
    losses_of_draws = torch.tensor([1.0, 2.0])
    log_probs = torch.stack(
        [router(**{**given, "seed": s}).extra["log_prob"].sum() for s in (1, 2)]
    )
    estimators.rloo(losses_of_draws, log_probs).backward()
    assert router.score.weight.grad.abs().sum() > 0


# ---- R51, R52, R54: what experts answer, two passes --------------------------------------------


@pytest.mark.parametrize("name", ["compete_smoe_v1", "compete_smoe_v2"])
def test_competition_takes_the_loudest(name):
    given = inputs()
    router = make(name, rate=1.0).train()
    routed = router(**given)
    outputs = given["experts"].each(given["x"])
    if name.endswith("v2"):
        loud = torch.nn.functional.softplus(outputs).mean(2)
    else:
        loud = torch.nn.functional.softplus(outputs.norm(dim=2))
    best = loud.topk(2, dim=1)
    assert torch.equal(routed.routing.experts, best.indices.int())
    assert_bound(
        routed.routing.weights, (best.values / best.values.sum(1, keepdim=True)).double(), 1e-6
    )
    assert set(routed.losses) == {"match", "diversity", "usage"}
    routed.losses["match"].backward()
    assert router.score.weight.grad.abs().sum() > 0
    same_routing(router.eval()(**given).routing, plain(router, given["x"], 2))
    quiet = make(name, rate=0.0).train()
    same_routing(quiet(**given).routing, plain(quiet, given["x"], 2))
    with pytest.raises(ValueError, match=f"{name}: experts must be given in a competition"):
        router.train()(**{**given, "experts": None})


def test_competition_loss_is_zero_where_the_router_foresees_it():
    """A router whose softmax is that of the responses chooses the same experts in both modes."""
    given = inputs()
    router = make("compete_smoe_v2", rate=1.0, diversity_coef=0.0, entropy_coef=0.0).train()
    outputs = given["experts"].each(given["x"])
    response = torch.nn.functional.softplus(outputs).mean(2)
    router.score = torch.nn.Identity()
    router.score.forward = lambda x: response
    routed = router(**given)
    assert float(routed.losses["match"]) < 1e-12
    assert torch.equal(routed.routing.experts, router.eval()(**given).routing.experts)


def test_a_louder_expert_wins_more_often():
    given = inputs()
    router = make("compete_smoe_v1", rate=1.0).train()
    before = router(**given).routing.demand[5]
    w_down = given["experts"].w_down.clone()
    w_down[5] *= 10
    louder = given["experts"]._replace(w_down=w_down)
    assert router(**{**given, "experts": louder}).routing.demand[5] > before


def test_s2moe_without_noise_is_one_pass():
    given = inputs()
    router = make("s2moe", sigma=0.0).train()
    y = layer(router, given)
    vanilla = given["experts"](given["x"], plain(router, given["x"], 2))
    assert_bound(y, vanilla.detach().double(), 1e-5)
    assert torch.equal(layer(router.eval(), given), vanilla)
    noisy = make("s2moe", sigma=0.5).train()
    routed = noisy(**given)
    assert not torch.equal(routed.extra["noisy"], given["x"])
    assert routed.losses["uncertainty"].item() > 0
    index = torch.tensor([3, 17])
    assert torch.equal(noisy(**rows(given, index)).extra["noisy"], routed.extra["noisy"][index])


# ---- R53: tokens that speak for each other -----------------------------------------------------


def test_graph_of_tokens_averages_over_the_own_sequence():
    given = inputs()
    base = make("graph_of_tokens", similarity="identity").eval()
    same_routing(base(**given).routing, plain(base, given["x"], 2))
    for similarity in ("gaussian", "dot"):
        router = make("graph_of_tokens", similarity=similarity, causal=False).train()
        router.aux_coef = 1.0
        routed = router(**given).routing
        p = router.score(given["x"]).softmax(1)
        s = router._similarity(given["x"], fr.routers.Context(sequence_ids=given["sequence_ids"]))[
            0
        ]
        close(s.sum(1), torch.ones(24), 1e-12)
        assert (s[:8, 8:] == 0).all()
        mixed = s @ p.double()
        close(mixed.sum(1).detach(), torch.ones(24), 1e-6)
        assert_bound(routed.score_sum, mixed.sum(0).detach(), 1e-5)
        best = mixed.topk(2, dim=1).values
        assert_bound(routed.weights, (best / best.sum(1, keepdim=True)).detach(), 1e-5)
        assert losses.entropy(mixed).item() > losses.entropy(p.double()).item()  # concave


def test_graph_of_tokens_is_causal_if_asked():
    given = inputs()
    changed = given["x"].clone()
    changed[5] += 1.0  # in sequence 0, tokens 0 to 7
    for causal in (True, False):
        router = make("graph_of_tokens", causal=causal).eval()
        one = router(**given).routing.weights
        two = router(**{**given, "x": changed}).routing.weights
        assert torch.equal(one[:5], two[:5]) == causal
        assert torch.equal(one[8:], two[8:])


# ---- R55, R56, R61, R62: prototypes ------------------------------------------------------------


def test_vqmoe_sends_a_code_to_its_expert():
    router = make("vqmoe", discrete=True).eval()
    routed = router(router.codes.detach())
    assert routed.routing.experts[:, 0].tolist() == list(range(8))
    assert (routed.routing.weights == 1).all()
    x = inputs()["x"].requires_grad_()
    routed = router.train()(x)
    distance = torch.cdist(x.detach(), router.codes.detach())
    assert torch.equal(routed.extra["code"].long(), distance.argmin(1))
    assert torch.equal(routed.extra["quantized"], router.codes[routed.extra["code"].long()])
    (grad,) = torch.autograd.grad(routed.extra["quantized"].sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    both = make("vqmoe").eval()(x.detach()).routing
    assert both.experts.shape == (24, 3)
    close(both.weights.double().sum(1).detach(), torch.ones(24))


def test_promoe_keeps_unconditional_tokens_apart():
    given = inputs()
    given["token_ids"][::3] = 1000
    free = given["token_ids"] == 1000
    for score in ("softmax", "sigmoid", "identity"):
        router = make("promoe", top_k=3, score=score).eval()
        routing = router(**given).routing
        assert routing.experts[free].tolist() == [[7, -1, -1]] * int(free.sum())
        assert routing.weights[free].tolist() == [[1.0, 0.0, 0.0]] * int(free.sum())
        assert (routing.experts[~free] < 7).all()
        assert (routing.experts[~free] >= 0).all()
        scaled = router(**{**given, "x": 8 * given["x"]}).routing
        same_routing(scaled, routing)
    router = make("promoe").train()
    routed = router(**given)
    experts = routed.routing.experts[:, 0].masked_fill(free, -1)
    used = experts[experts >= 0].unique().long()
    means = torch.stack([given["x"][experts == e].mean(0) for e in used]).double()
    unit = torch.nn.functional.normalize
    cosines = unit(means, dim=1) @ unit(router.prototypes.double(), dim=1).T
    assert cosines.shape[1] == 7  # the expert of unconditional tokens has no prototype
    wanted = torch.nn.functional.cross_entropy(cosines / 0.1, used)
    close(routed.losses["contrast"].detach(), wanted.detach(), 1e-5)


def test_phatgoose_ignores_scale_and_shift_of_a_gate():
    given = inputs()
    router = make("phatgoose").eval()
    z = router.local(given["x"])
    with torch.no_grad():
        router.gates[3] = 7 * router.gates[3] + 2
    assert_bound(router.local(given["x"]), z.detach().double(), 1e-3)  # the norm's epsilon
    norm = torch.nn.functional.layer_norm
    product = norm(given["x"], (HIDDEN,)).double() @ norm(router.gates, (HIDDEN,)).double().T
    assert_bound(router.local(given["x"]), (product / 4).detach(), 1e-5)
    one = fr.routers.build("phatgoose", HIDDEN, 1, 1).eval()(given["x"]).routing
    assert (one.weights == 1).all()


def test_glider_adds_the_global_part():
    given = inputs()
    router = make("glider").eval()
    phatgoose = make("phatgoose").eval()
    phatgoose.load_state_dict(router.state_dict())
    same_routing(router(**given).routing, phatgoose(**given).routing)
    state = normal(SEQUENCES, EXPERTS, seed=5)
    none = make("glider", alpha=0.0).eval()
    none.load_state_dict(router.state_dict())
    same_routing(none(**{**given, "state": state}).routing, phatgoose(**given).routing)
    router.alpha = 1e4
    chosen = router(**{**given, "state": state}).routing.experts
    expected = state.topk(2, dim=1).indices.int()[given["sequence_ids"]]
    assert torch.equal(chosen, expected)
    with pytest.raises(ValueError, match="glider: sequence_ids must be given with more than one"):
        router(**{**given, "state": state, "sequence_ids": None})


# ---- R63 to R67 --------------------------------------------------------------------------------


def test_lora_mixer_with_all_experts_is_its_training_forward():
    given = inputs()
    router = make("lora_mixer", top_k=8)
    trained = layer(router.train(), given)
    evaluated = layer(router.eval(), given)
    assert_bound(evaluated, trained.detach().double(), 1e-5)
    three = make("lora_mixer").eval()
    same_routing(three(**given).routing, plain(three, given["x"], 3))
    found = make("lora_mixer", aux_coef=0.1, entropy_coef=2.0).train()
    routed = found(**given)
    p = found.score(given["x"]).softmax(1)
    close(routed.losses["entropy"].detach(), -2.0 * losses.entropy(p).detach().double(), 1e-5)
    assert float(routed.losses["balance"].detach()) > 0


def test_mhr_mixes_every_block_by_the_coefficients_of_its_task():
    given = inputs()
    lora = adapters.LoraExperts(normal(EXPERTS, HIDDEN, 3), normal(EXPERTS, 3, HIDDEN, seed=1))
    router = make("mhr", num_tasks=4, num_heads=2).eval()
    state = torch.tensor([2, 0, 2])
    with torch.no_grad():
        router.table.normal_(generator=torch.Generator().manual_seed(0))
    routed = router(**{**given, "state": state})
    skills = router.table[2].sigmoid()
    skills = (skills / skills.sum(1, keepdim=True)).detach()
    a = torch.einsum("he,ehir->hir", skills, lora.lora_a.view(8, 2, 8, 3)).reshape(16, 3)
    b = torch.einsum("he,erho->rho", skills, lora.lora_b.view(8, 3, 2, 8)).reshape(3, 16)
    y = router.mix(given["x"], routed, lora)
    assert_bound(y[:8], (given["x"][:8].double() @ a.double() @ b.double()), 1e-4)
    assert_bound(y[16:], (given["x"][16:].double() @ a.double() @ b.double()), 1e-4)
    # one head is Poly: A and B are averaged as a whole; with one B it is the sum of the outputs
    poly = make("mhr", num_tasks=4, num_heads=1).eval()
    alike = lora._replace(lora_b=lora.lora_b[:1].expand(EXPERTS, -1, -1).contiguous())
    with torch.no_grad():
        poly.table.normal_(generator=torch.Generator().manual_seed(1))
    routed = poly(**{**given, "state": state})
    alpha = poly.table[state, 0].sigmoid()
    alpha = (alpha / alpha.sum(1, keepdim=True)).detach().double()[given["sequence_ids"]]
    close(routed.extra["share"].detach()[given["sequence_ids"]], alpha)
    expected = torch.einsum("te,ted->td", alpha, alike.each(given["x"]).double())
    assert_bound(poly.mix(given["x"], routed, alike), expected, 3e-6)
    flat = make("mhr", num_heads=1).eval()
    with torch.no_grad():
        flat.table.zero_()
    close(flat(**given).extra["share"].detach(), torch.full((3, 8), 0.125))


def test_mhr_gives_a_task_the_same_bits_beside_any_others():
    router = fr.routers.build("mhr", HIDDEN, 5, num_tasks=7, num_heads=3).eval()
    x, tasks, one = normal(7, HIDDEN), torch.arange(7), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        router.table.normal_(generator=torch.Generator().manual_seed(0))
        together = router(x, sequence_ids=tasks, num_sequences=7, state=tasks).extra["heads"]
        for task in range(7):
            alone = router(x[:1], sequence_ids=one, state=tasks[task : task + 1]).extra["heads"]
            assert torch.equal(alone[0], together[task])


def test_mixture_of_routers_of_one_is_topk_softmax():
    given = inputs()
    one = make("mixture_of_routers", num_routers=1).eval()
    same_routing(one(**given).routing, plain(one, given["x"], 2))
    router = make("mixture_of_routers", num_routers=3).eval()
    with torch.no_grad():
        router.main.weight.zero_()
        router.main.weight[1] = 1e6 * given["x"][4]  # for token 4 the second router alone
    z = router.score(given["x"][4:5])[:, 8:16]
    index = torch.tensor([4])
    same_routing(router(**rows(given, index)).routing, fr.gate(z, 2, normalize=True))


def test_milora_decides_once():
    given = inputs()
    router = make("milora").eval()
    routed = router(**given)
    pooled = torch.stack([given["x"][8 * s : 8 * s + 8].mean(0) for s in range(3)])
    chosen = fr.gate(router.score(pooled), 2, normalize=True)
    assert torch.equal(routed.routing.experts, chosen.experts[given["sequence_ids"]])

    def refuse(x):
        raise AssertionError("a decode step computed router logits")

    router.score = torch.nn.Module()
    router.score.forward = refuse
    step = {**rows(given, torch.tensor([0, 8, 16])), "state": routed.extra["decision"]}
    step["x"] = normal(3, HIDDEN, seed=9)
    assert torch.equal(router(**step).routing.experts, chosen.experts)


def test_sira_bars_some_experts_but_never_all():
    given = inputs()
    router = make("sira", expert_dropout=0.0, capacity_factor=None).train()
    same_routing(router(**given).routing, plain(router, given["x"], 4))
    dropping = make("sira", expert_dropout=0.6, capacity_factor=None).train()
    torch.manual_seed(3)
    demand = dropping(**given).routing.demand
    assert (demand == 0).sum() >= 2
    assert (demand > 0).any()
    assert make("sira").train()(**given).plan is not None
    none_left = make("sira", expert_dropout=0.999).train()
    assert int((none_left(**given).routing.demand > 0).sum()) >= 1


# ---- L1 to L4, L6, L8, L9 ----------------------------------------------------------------------


def test_magnet_flips_its_sign_once():
    given = inputs()
    router = make("magnet", entropy_coef=1.0).train()
    with torch.no_grad():
        router.score.weight.mul_(0.0)
        router.score.weight[0] = 50.0
    signs = []
    for scale in (1.0, 0.0, 1.0):
        x = given["x"].abs() * scale
        routed = router(x)
        signs.append(bool(router.specialises))
        p = router.score(x).softmax(1)
        sign = losses.entropy(p) if signs[-1] else -losses.usage_entropy(p)
        close(routed.losses["entropy"].detach(), sign.detach().double(), 1e-5)
    assert signs == [False, True, True]
    assert "specialises" in router.state_dict()


def test_drmc_hands_on_its_state_and_may_leave_the_input():
    given = inputs()
    router = make("drmc").eval()
    routed = router(**given)
    h = torch.nn.functional.gelu(router.inner(torch.cat([given["x"], 0 * given["x"]], 1)))
    assert_bound(routed.state, h.detach().double(), 1e-6)
    a = router.score(h).relu()
    assert torch.equal((routed.routing.experts >= 0).sum(1), (a > 0).sum(1))
    assert not torch.equal(router(**{**given, "state": routed.state}).state, routed.state)
    with torch.no_grad():
        router.score.weight.zero_()
        router.score.bias.fill_(-1.0)
    assert torch.equal(layer(router, given), given["x"])


def test_adapt_dhm_centers_are_means_of_members():
    x = torch.cat([normal(20, 16) * 0.1 + 3, normal(20, 16, seed=1) * 0.1 - 3])
    router = fr.routers.build("adapt_dhm", 16, 2, momentum=0.0).train()
    router.centroids.copy_(torch.stack([torch.ones(16), -torch.ones(16)]))
    ids = torch.cat([router(half).routing.experts[:, 0] for half in (x[:15], x[15:])])
    assert ids.tolist() == [0] * 20 + [1] * 20
    router.update()
    assert_bound(router.centroids, torch.stack([x[:20].mean(0), x[20:].mean(0)]).double(), 1e-5)
    moved = router.centroids.clone()
    routed = router.eval()(x)
    assert torch.equal(router.centroids, moved)
    assert not routed.routing.weights.requires_grad
    assert (routed.routing.weights == 1).all()
    empty = fr.routers.build("adapt_dhm", 16, 2, momentum=0.0).train()
    empty.centroids.copy_(torch.stack([torch.ones(16), -torch.ones(16)]))
    empty(x[:20])
    empty.update()
    assert torch.equal(empty.centroids[1], -torch.ones(16))  # without a member nothing moves


def test_cigt_gain_is_largest_for_sure_and_balanced_routes():
    router = fr.routers.build("cigt", 4, 4, temperature=1e-3, gain_coef=1.0).train()
    router.score = torch.nn.Identity()
    sure = router(torch.eye(4).repeat(3, 1))
    close(sure.losses["gain"], -math.log(4), 1e-6)
    one_sided = router(torch.eye(4)[:1].expand(12, 4))
    close(one_sided.losses["gain"], 0.0, 1e-6)
    assert (sure.routing.weights == 1).all()
    with pytest.raises(ValueError, match=r"cigt: temperature must be above 0, got 0\.0"):
        fr.routers.build("cigt", 4, 4, temperature=0.0)


@pytest.mark.parametrize("name", ["cond_conv", "supernet_mixture", "mhr"])
def test_merged_experts_are_weighted_sums_of_parameters(name):
    """Merged parameters are the weighted sums; with linear experts, the sum of the outputs."""
    given = inputs()
    lora = adapters.LoraExperts(normal(EXPERTS, HIDDEN, 3), normal(EXPERTS, 3, HIDDEN, seed=1))
    router = make(name).eval()
    routed = router(**given)
    share = routed.extra["share"][given["sequence_ids"]].detach()
    if name != "mhr":  # which averages the factors
        y = router.mix(given["x"], routed, lora)
        expected = torch.einsum("te,ted->td", share.double(), lora.each(given["x"]).double())
        assert_bound(y, expected, 1e-3)
        assert_bound(lora(given["x"], routed.routing), expected, 1e-3)
    one_hot = torch.zeros_like(routed.extra["share"])
    one_hot[:, 2] = 1.0
    y = router.mix(
        given["x"], routed._replace(extra={**routed.extra, "share": one_hot}), given["experts"]
    )
    assert_bound(y, given["experts"].each(given["x"])[:, 2].double(), 1e-5)
    single = fr.routers.build(name, HIDDEN, 1).eval()
    dense = given["experts"].merged(torch.eye(EXPERTS)[:1])
    if name != "cond_conv":
        got = single.mix(given["x"], single(given["x"]), dense)
        assert_bound(got, given["experts"].each(given["x"])[:, 0].double(), 1e-5)


def test_accord_attends_within_the_sequence():
    given = inputs()
    router = make("accord").eval()
    milora = make("milora", top_k=1).eval()
    milora.score.load_state_dict(router.score.state_dict())
    assert torch.equal(router(**given).routing.experts, milora(**given).routing.experts)
    with torch.no_grad():
        router.query.copy_(100 * given["x"][:1])  # sequence 0 listens to its first token
    pooled = router.pool(given["x"], given["sequence_ids"], 3)
    assert_bound(pooled[0], given["x"][0].double(), 1e-3)
    types = torch.zeros(3, 8)
    types[0, 4] = types[1, 1] = types[2, 7] = 100.0
    chosen = router(**{**given, "state": types}).routing
    assert torch.equal(chosen.experts[:, 0], torch.tensor([4, 1, 7])[given["sequence_ids"]].int())
    assert_bound(chosen.weights, torch.ones(24, 1, dtype=F64), 1e-6)


# ---- state -------------------------------------------------------------------------------------

STATES = {
    "mindskip": (SEQUENCES,),
    "dr_llm": (SEQUENCES,),
    "read_me": (24, EXPERTS),
    "drmc": (24, HIDDEN),
    "r2t2": (24, EXPERTS),
    "glider": (SEQUENCES, EXPERTS),
    "milora": (SEQUENCES, EXPERTS),
    "accord": (SEQUENCES, EXPERTS),
    "supernet_mixture": (SEQUENCES, 16),
    "mhr": (SEQUENCES,),
}


@pytest.mark.parametrize("name", STATES)
def test_state_must_fit_and_be_finite(name):
    given, router = inputs(), make(name).eval()
    state = torch.zeros(STATES[name], dtype=torch.int64 if name == "mhr" else torch.float32)
    router(**{**given, "state": state})
    with pytest.raises(ValueError, match=rf"{name}: state must have shape \["):
        router(**{**given, "state": state[:-1]})
    if name != "mhr":
        state.view(-1)[-1] = torch.nan
        with pytest.raises(ValueError, match=f"{name}: state must be finite, got"):
            router(**{**given, "state": state})


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: make("remix", rank=0), "remix: rank must be at least 1, got 0"),
        (lambda x: make("sira", expert_dropout=1.0), r"sira: expert_dropout must be in \[0, 1\)"),
        (lambda x: make("compete_smoe_v1", rate=2.0), r"compete_smoe_v1: rate must be in \[0, 1\]"),
        (lambda x: make("promoe", score="relu"), "promoe: score must be one of softmax, sigmoid"),
        (lambda x: make("promoe", top_k=8), r"promoe: top_k must be in \[1, 7\], got 8"),
        (
            lambda x: fr.routers.build("promoe", HIDDEN, 1),
            "promoe: num_experts must be at least 2, got 1",
        ),
        (lambda x: make("graph_of_tokens", similarity="l1"), "similarity must be one of gaussian"),
        (lambda x: make("glider")(x, state=x), r"glider: state must have shape \[1, 8\]"),
        (lambda x: make("r2t2")(x, state=x), r"r2t2: state must have shape \[3, 8\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(3, HIDDEN))
