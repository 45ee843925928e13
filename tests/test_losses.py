"""Losses of routers: answers by hand, the survey's acceptance checks, gradients, errors."""

from __future__ import annotations

import math

import fastmoe_route as fr
import numpy as np
import pytest
import torch
from fastmoe_route import losses
from fastmoe_route.losses._beta import beta_cdf
from tolerance import assert_bound, assert_exact, close

F64 = torch.float64


def routing_of(logits, top_k=1, **options):
    return fr.gate(logits, top_k, stats=True, keep_scores=True, **options)


def skewed(num_tokens=24, num_experts=6, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_tokens, num_experts, generator=generator, dtype=dtype)
    return noise + torch.linspace(1.0, -1.0, num_experts, dtype=dtype)


# ---- literals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_switch_loss_is_alpha_on_uniform_logits(top_k):
    routing = fr.gate(torch.zeros(16, 8), top_k, stats=True)
    assert float(losses.load_balancing(routing)) == 1.0
    assert float(losses.load_balancing(routing, alpha=0.25)) == 0.25


def test_switch_loss_is_alpha_times_experts_when_one_takes_all():
    logits = torch.full((10, 4), -torch.inf)
    logits[:, 2] = 0.0
    assert float(losses.load_balancing(fr.gate(logits, 1, stats=True), alpha=0.5)) == 2.0


def test_switch_loss_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    loss = losses.load_balancing(routing_of(p.log()))
    # counts 3, 1, 0; mean scores 0.475, 0.35, 0.175
    close(loss, 3 * (0.75 * 0.475 + 0.25 * 0.35))


def test_z_loss_is_zero_iff_logsumexp_is():
    assert float(losses.z_loss(routing_of(torch.full((3, 4), -math.log(4.0))))) < 1e-12
    close(losses.z_loss(routing_of(torch.zeros(3, 4))), math.log(4.0) ** 2)
    barred = torch.zeros(2, 4)
    barred[1] = -torch.inf
    close(losses.z_loss(routing_of(barred)), math.log(4.0) ** 2 / 2)


def test_cv_squared_literals():
    assert float(losses.cv_squared(torch.full((5,), 3.0))) == 0.0
    assert float(losses.cv_squared(torch.zeros(5))) == 0.0
    assert float(losses.cv_squared(torch.tensor([4, 0, 0, 0]))) == 3.0
    close(losses.cv_squared(torch.tensor([1.0, 3.0])), 0.25)


def test_cv_squared_of_values_whose_squares_leave_the_range():
    for scale in (1e-30, 1e30):
        values = torch.tensor([1.0, 2.0], requires_grad=True)
        loss = losses.cv_squared(values * scale)
        assert_bound(loss, torch.tensor(1 / 9, dtype=torch.float64), 1e-6)
        loss.backward()
        assert_bound(values.grad, torch.tensor([-8 / 27, 4 / 27], dtype=torch.float64), 1e-6)


def test_importance_of_scores_and_of_weights():
    routing = routing_of(torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
    high = 1 / (1 + math.exp(-2.0))
    close(losses.importance(routing), (2 * high - 1) ** 2)
    assert float(losses.importance(routing, of="weights")) == pytest.approx(1.0)


def test_smooth_load_by_hand():
    # thresholds 1 and 1: token 0 has logits (1, 0), token 1 (0, 1); Phi(0) = 0.5, Phi(-1)
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=F64)
    low = 0.5 * (1 + math.erf(-1 / math.sqrt(2)))
    mean = (0.5 + low) / 2
    close(losses.smooth_load(logits, logits, 1.0, 1), (0.5 - mean) ** 2 / mean**2, 1e-12)


def test_null_columns_are_averaged():
    uniform = fr.gate(torch.zeros(8, 6), 4, num_null=2, stats=True)
    close(losses.null_balancing(uniform, 2), 1.0)
    # E = 1, m = 2, K = 1, all to null column 1: f = (0 | 1/2 each), p = (.2 | .4 each)
    p = torch.tensor([[0.2, 0.3, 0.5]])
    skew = fr.gate(p.log(), 1, num_null=2, stats=True)
    close(losses.null_balancing(skew, 2), 3 * 2 * 0.5 * 0.4)


def test_assigned_balance_is_zero_when_counts_are_equal():
    even = fr.Routing(
        torch.tensor([[0], [1], [0], [1]], dtype=torch.int32),
        torch.tensor([[0.9], [0.2], [0.3], [0.4]]),
        torch.tensor([2, 2], dtype=torch.int32),
    )
    assert float(losses.assigned_balance(even)) == 0.0
    odd = even._replace(
        experts=torch.tensor([[0], [0], [0], [1]], dtype=torch.int32),
        demand=torch.tensor([3, 1], dtype=torch.int32),
    )
    close(losses.assigned_balance(odd), 0.5 * 1.4 - 0.5 * 0.4)


def test_pool_balance_needs_only_the_sum_of_layers_to_be_even():
    def one_sided(expert):
        logits = torch.full((6, 2), -torch.inf)
        logits[:, expert] = 0.0
        return fr.gate(logits, 1, stats=True)

    assert float(losses.pool_balance([one_sided(0), one_sided(1)])) == 1.0
    assert float(losses.pool_balance([one_sided(0), one_sided(0)])) == 2.0
    assert float(losses.load_balancing(one_sided(0))) == 2.0


def test_locality_is_zero_at_the_target_and_the_divergence_elsewhere():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=F64).log()
    node = torch.tensor([0, 0, 1, 1])
    routing = routing_of(logits)
    close(losses.locality(routing, node, torch.tensor([0.7, 0.3], dtype=F64)), 0.0, 1e-12)
    expected = 0.7 * math.log(1.4) + 0.3 * math.log(0.6)
    close(losses.locality(routing, node, torch.tensor([0.5, 0.5], dtype=F64)), expected, 1e-12)


def test_entropies_of_uniform_and_one_hot_rows():
    uniform, one_hot = torch.full((8, 8), 0.125, dtype=F64), torch.eye(8, dtype=F64)
    close(losses.entropy(uniform), math.log(8), 1e-12)
    assert float(losses.entropy(one_hot)) == 0.0
    close(losses.usage_entropy(one_hot), math.log(8), 1e-12)
    close(losses.information_gain(one_hot), math.log(8), 1e-12)
    close(losses.information_gain(uniform), 0.0, 1e-12)
    close(losses.entropy_target(one_hot, 8), 0.0, 1e-12)
    close(losses.entropy_target(one_hot[:1].expand(8, 8), 8), math.log(8) ** 2, 1e-12)
    close(losses.usage_entropy(routing_of(torch.zeros(4, 8, dtype=F64))), math.log(8), 1e-12)


def test_tsallis_entropy_of_the_survey():
    uniform = torch.full((1, 8), 0.125, dtype=F64)
    close(losses.tsallis_entropy(uniform, 1.1), [1.8775], 5e-5)
    close(losses.tsallis_entropy(uniform, 1.0), [math.log(8)], 1e-12)
    close(losses.tsallis_entropy(uniform, 1 + 1e-7), [math.log(8)], 1e-5)
    assert losses.tsallis_entropy(torch.eye(3, dtype=F64)).tolist() == [0.0, 0.0, 0.0]


def test_chunk_sparsity_and_locality_by_hand():
    active = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=F64)
    # expert 0 is sure to be active (idle 1e-5 a token), expert 1 never
    close(losses.chunk_sparsity(active, 2), 1 - (1e-10 + (1 + 1e-5) ** 2) / 2, 1e-12)
    close(losses.chunk_sparsity(active, 1), 1 - (1e-5 + 1 + 1e-5) / 2, 1e-12)
    close(losses.activation_locality(torch.zeros(3, 2, dtype=F64)), math.log(2), 1e-12)
    assert float(losses.activation_locality(torch.ones(3, 2, dtype=F64))) < 1e-12


def test_agreement_literals():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    assert float(losses.consistency(logits, logits + 3.0)) < 1e-12
    p, q = 1 / (1 + math.exp(-2)), 0.5
    kl = lambda a, b: a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))  # noqa: E731
    other = torch.zeros(1, 2, dtype=F64)
    close(losses.consistency(logits[:1], other), (kl(p, q) + kl(q, p)) / 2, 1e-12)
    experts = torch.tensor([[0], [-1]], dtype=torch.int32)
    close(losses.imitation(logits, experts), -math.log(p), 1e-12)
    close(losses.focal(logits, experts), -((1 - p) ** 2) * math.log(p), 1e-12)
    close(losses.focal(logits, experts, gamma=0.0), losses.imitation(logits, experts), 1e-12)
    close(losses.response_matching(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])), 0.25)
    close(losses.budget(torch.tensor([0.0, 1.0, 1.0]), 2 / 3), 0.0)
    close(losses.budget(torch.tensor([1.0, 1.0]), 0.5), 0.25)
    close(losses.commitment(torch.tensor([[1.0]]), torch.tensor([[3.0]])), 5.0)
    same = torch.ones(2, 3, 4)
    close(losses.diversity(same), 1.0)
    opposite = torch.stack([torch.ones(2, 4), -torch.ones(2, 4)], 1)
    close(losses.diversity(opposite), -1.0)
    assert float(losses.kl_diversity([logits, logits]).abs()) < 1e-12
    close(losses.kl_diversity([logits[:1], -logits[:1]]), -kl(p, 0.5), 1e-12)


# ---- acceptance checks of the survey -----------------------------------------------------------


def test_prior_shaping_values_of_the_survey():
    num_tokens, num_experts, alpha = 4096, 4, 0.75
    generator = torch.Generator().manual_seed(0)
    torch_state = torch.get_rng_state()
    torch.manual_seed(1)
    samples = torch.distributions.Dirichlet(torch.full((num_experts,), alpha, dtype=F64)).sample(
        (num_tokens,)
    )
    torch.set_rng_state(torch_state)
    assert float(losses.prior_shaping(samples, alpha)) < 1e-4
    uniform = torch.full((num_tokens, num_experts), 0.25, dtype=F64)
    close(losses.prior_shaping(uniform, alpha), 0.091, 1e-3)
    ids = torch.arange(num_tokens) % num_experts
    one_hot = torch.eye(num_experts, dtype=F64)[ids][
        torch.randperm(num_tokens, generator=generator)
    ]
    close(losses.prior_shaping(one_hot, alpha), 0.146, 1e-3)


def test_prior_shaping_by_hand():
    """Two experts of concentration 1 are uniform: F(p) = p, and ranks over T + 1 are thirds."""
    p = torch.tensor([[1 / 3, 2 / 3], [2 / 3, 1 / 3]], dtype=F64)
    close(losses.prior_shaping(p, 1.0), 0.0, 1e-12)
    close(losses.prior_shaping(torch.full((2, 2), 0.5, dtype=F64), 1.0), 1 / 36, 1e-12)


@pytest.mark.parametrize(("a", "b"), [(0.75, 2.25), (1.0, 3.0), (5.0, 0.5), (30.0, 70.0)])
def test_beta_cdf_against_its_density(a, b):
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(400))
    x = torch.tensor([1e-6, 0.01, 0.1, 0.25, 0.4, 0.6, 0.9, 0.999], dtype=F64)
    a, b = torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64)
    # The density by Gauss and Legendre: with x = sin^2(t) and t = t_end s^4 it is smooth.
    end = x.sqrt().asin()[:, None]
    s = (nodes + 1) / 2
    t = end * s**4
    each = 2 * t.sin() ** (2 * a - 1) * t.cos() ** (2 * b - 1) * end * 4 * s**3 / 2
    beta = (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)).exp()
    assert_bound(beta_cdf(x, a, b), (each * weights).sum(1) / beta, 1e-9)
    assert beta_cdf(torch.tensor([0.0, 1.0], dtype=F64), a, b).tolist() == [0.0, 1.0]


def test_beta_cdf_has_second_derivatives():
    x = torch.tensor([0.1, 0.4, 0.9], dtype=F64, requires_grad=True)
    a, b = torch.tensor(2.5, dtype=F64), torch.tensor(0.75, dtype=F64)
    assert torch.autograd.gradgradcheck(lambda x: beta_cdf(x, a, b), x)
    ends = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(beta_cdf(ends, a, b).sum(), ends, create_graph=True)
    assert torch.autograd.grad(grad.sum(), ends)[0].tolist() == [0.0, 0.0]


def test_coupling_is_zero_where_the_own_expert_answers_loudest():
    num_experts, hidden = 4, 8
    router = torch.eye(num_experts, hidden, dtype=F64)
    w_up = torch.zeros(num_experts, hidden, 3, dtype=F64)
    for expert in range(num_experts):
        w_up[expert, expert] = 1.0
    quiet = torch.zeros(num_experts, hidden, dtype=F64)
    assert float(losses.expert_router_coupling(router, w_up, noise=quiet)) == 0.0
    assert float(losses.expert_router_coupling(router, w_up)) == 0.0  # any noise in range
    swapped = w_up[torch.tensor([1, 0, 2, 3])]
    assert float(losses.expert_router_coupling(router, swapped, noise=quiet)) > 0.1
    alike = w_up.sum(0, keepdim=True).expand_as(w_up)
    assert float(losses.expert_router_coupling(router, alike, noise=quiet)) < 1e-12
    halved = losses.expert_router_coupling(router, alike, alpha=0.5, noise=quiet)
    close(halved, math.sqrt(3), 1e-12)  # M = sqrt 3 everywhere, two terms of half of it


def test_coupling_noise_reaches_half_way_to_the_nearest_row():
    """Rows 2 e_i are 2 sqrt 2 apart: eps = sqrt(2) / 2; identity experts answer with the norm."""
    router, w_up = 2 * torch.eye(2, dtype=F64), torch.eye(2, dtype=F64).expand(2, 2, 2)
    for sign in (1.0, 0.0, -1.0):
        noise = torch.full_like(router, sign)
        loss = losses.expert_router_coupling(router, w_up, alpha=0.5, noise=noise)
        close(loss, 2 * (1 + sign * math.sqrt(0.5)), 1e-12)
    drawn = losses.expert_router_coupling(router, w_up, alpha=0.5)
    assert 2 - math.sqrt(2) <= float(drawn) <= 2 + math.sqrt(2)


def test_contrastive_is_least_at_the_class_means():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator, dtype=F64)
    ids = (torch.arange(40) % 3).to(torch.int32)[:, None]  # expert 3 gets nothing
    routing = fr.Routing(ids, torch.ones(40, 1), torch.bincount(ids[:, 0], minlength=4).int())
    means = torch.stack([x[ids[:, 0] == e].mean(0) for e in range(3)])
    fourth = torch.randn(1, 8, generator=generator, dtype=F64)
    fourth = fourth - fourth @ means.T @ torch.linalg.pinv(means.T)
    at_means = losses.contrastive(x, routing, torch.cat([means, fourth]))
    swapped = losses.contrastive(x, routing, torch.cat([means[[1, 0, 2]], fourth]))
    scaled = losses.contrastive(x, routing, 7 * torch.cat([means, fourth]))
    assert float(at_means) < float(swapped)
    close(scaled, at_means, 1e-12)


def test_losses_equal_their_formula_on_random_routings():
    logits = skewed()
    routing = routing_of(logits, 2)
    p = logits.softmax(1)
    n = torch.bincount(routing.experts.flatten().long(), minlength=6).double()
    f = n / n.sum()
    close(losses.load_balancing(routing), 6 * (f * p.mean(0)).sum(), 1e-12)
    close(losses.z_loss(routing), logits.logsumexp(1).square().mean(), 1e-12)
    mean = p.sum(0).mean()
    close(losses.importance(routing), p.sum(0).var(unbiased=False) / mean**2, 1e-12)
    close(losses.entropy(routing), -(p * p.log()).sum(1).mean(), 1e-12)


# ---- gradients ---------------------------------------------------------------------------------


def routed(loss, **options):
    return lambda logits: loss(routing_of(logits, 2, **options))


def scores_of(loss):
    return lambda logits: loss(logits.softmax(1))


OTHER = skewed(seed=5)
IDS = torch.arange(24) % 6
NODE = torch.tensor([0, 0, 1, 1, 2, 2])
TARGET = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
TOKENS = torch.randn(24, 6, generator=torch.Generator().manual_seed(9), dtype=F64)
GRADIENTS = {
    "load_balancing": routed(losses.load_balancing),
    "z_loss": routed(losses.z_loss),
    "importance": routed(losses.importance),
    "importance_of_weights": routed(lambda r: losses.importance(r, of="weights")),
    "smooth_load": lambda z: losses.smooth_load(z, z + 0.1 * OTHER, 0.5, 2),
    "null_balancing": routed(lambda r: losses.null_balancing(r, 2), num_null=2),
    "assigned_balance": routed(losses.assigned_balance),
    "pool_balance": lambda z: losses.pool_balance([routing_of(z), routing_of(2 * z)]),
    "locality": routed(lambda r: losses.locality(r, NODE, TARGET)),
    "entropy": routed(losses.entropy),
    "usage_entropy": routed(losses.usage_entropy),
    "information_gain": routed(losses.information_gain),
    "tsallis_entropy": scores_of(lambda p: losses.tsallis_entropy(p).mean()),
    "entropy_target": routed(lambda r: losses.entropy_target(r, 4)),
    "prior_shaping": routed(losses.prior_shaping),
    "activation_locality": lambda z: losses.activation_locality(z, 2.0),
    "chunk_sparsity": lambda z: losses.chunk_sparsity(z.exp(), 5),
    "imitation": lambda z: losses.imitation(z, IDS),
    "focal": lambda z: losses.focal(z, IDS),
    "response_matching": routed(lambda r: losses.response_matching(r, OTHER.softmax(1))),
    "diversity": lambda z: losses.diversity(z.view(4, 6, 6)),
    "consistency": lambda z: losses.consistency(z, OTHER),
    "kl_diversity": lambda z: losses.kl_diversity([z, OTHER], 2.0),
    "contrastive": lambda z: losses.contrastive(z, routing_of(OTHER, 2), TOKENS[:6]),
    "budget": lambda z: losses.budget(z.sigmoid(), 0.3),
    "coupling_router": lambda z: losses.expert_router_coupling(
        z[:6], TOKENS.view(6, 4, 6).transpose(1, 2), noise=torch.zeros(6, 6, dtype=F64)
    ),
    "coupling_experts": lambda z: losses.expert_router_coupling(
        TOKENS[:6], z.view(6, 4, 6).transpose(1, 2), noise=torch.zeros(6, 6, dtype=F64)
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name):
    logits = skewed().requires_grad_()
    loss = GRADIENTS[name]
    assert loss(logits).dim() == 0
    assert torch.autograd.grad(loss(logits), logits)[0].abs().max() > 1e-6
    assert torch.autograd.gradcheck(loss, (logits,), fast_mode=True)


def test_commitment_pulls_both_sides():
    x = TOKENS.clone().requires_grad_()
    codes = OTHER.clone().requires_grad_()
    losses.commitment(x, codes).backward()
    assert_bound(codes.grad, 2 * (codes - x).detach() / x.numel(), 1e-12)
    assert_bound(x.grad, 0.25 * 2 * (x - codes).detach() / x.numel(), 1e-12)


@pytest.mark.parametrize("loss", [losses.entropy, losses.tsallis_entropy, losses.prior_shaping])
def test_gradient_is_finite_where_scores_underflow(loss):
    logits = torch.tensor([[0.0, -300.0, 300.0], [1.0, 0.0, -400.0]], requires_grad=True)
    value = loss(logits.softmax(1))
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


def test_focal_loss_of_a_sure_token_has_a_gradient():
    for gamma in (0.0, 0.5, 1.0, 2.0):
        logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
        losses.focal(logits, torch.tensor([0]), gamma=gamma).backward()
        assert_exact(logits.grad, torch.zeros(1, 3))


def test_contrastive_does_not_look_at_tokens_without_an_expert():
    logits = torch.eye(3)
    logits[1] = -torch.inf
    x = torch.eye(3) + 0.1
    expected = losses.contrastive(x, fr.gate(logits, 1), torch.eye(3))
    x[1] = torch.nan
    assert_exact(losses.contrastive(x, fr.gate(logits, 1), torch.eye(3)), expected)


def test_imitation_and_matching_leave_the_teacher_alone():
    teacher = skewed(seed=2).requires_grad_()
    student = skewed(seed=3).requires_grad_()
    losses.response_matching(student.softmax(1), teacher.softmax(1)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


# ---- registration ------------------------------------------------------------------------------


def test_losses_compile_without_a_break():
    def total(logits):
        routing = routing_of(logits, 2)
        return (
            losses.load_balancing(routing)
            + losses.z_loss(routing)
            + losses.importance(routing)
            + losses.entropy(routing)
        )

    logits = skewed(dtype=torch.float32)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    close(compiled(logits), total(logits).double(), 1e-5)


# ---- edges -------------------------------------------------------------------------------------


OF_TOKENS = [n for n in GRADIENTS if not n.startswith(("coupling", "tsallis", "diversity"))]


@pytest.mark.parametrize("name", OF_TOKENS)
def test_no_tokens_is_no_nan(name):
    empty = {
        "smooth_load": lambda z: losses.smooth_load(z, z, 0.5, 2),
        "imitation": lambda z: losses.imitation(z, IDS[:0]),
        "focal": lambda z: losses.focal(z, IDS[:0]),
        "response_matching": routed(lambda r: losses.response_matching(r, r)),
        "consistency": lambda z: losses.consistency(z, z),
        "contrastive": lambda z: losses.contrastive(z, routing_of(z), TOKENS[:6]),
        "kl_diversity": lambda z: losses.kl_diversity([z, z]),
    }
    loss = empty.get(name, GRADIENTS[name])(torch.zeros(0, 6, dtype=F64))
    assert loss.isfinite()


def test_one_expert():
    routing = routing_of(torch.zeros(3, 1))
    assert float(losses.load_balancing(routing)) == 1.0
    assert float(losses.entropy(routing)) == 0.0
    assert float(losses.importance(routing)) == 0.0
    assert float(losses.expert_router_coupling(torch.ones(1, 2), torch.ones(1, 2, 3))) == 0.0


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (losses.load_balancing, "load_balancing: routing must carry score_sum: pass stats=True"),
        (losses.z_loss, "z_loss: routing must carry logsumexp: pass stats=True to gate, got None"),
        (losses.entropy, "entropy: routing must carry scores: pass keep_scores=True to gate"),
        (
            lambda r: losses.importance(r, of="hits"),
            "importance: of must be one of scores, weights",
        ),
        (lambda r: losses.null_balancing(r, 0), "null_balancing: num_null must be at least 1"),
        (lambda r: losses.pool_balance([]), "pool_balance: pool must be a non-empty list"),
        (lambda r: losses.pool_balance(r), "pool_balance: pool must be a non-empty list"),
        (
            lambda r: losses.tsallis_entropy(torch.ones(1, 2), 0.0),
            "tsallis_entropy: q must be above 0, got 0.0",
        ),
        (
            lambda r: losses.prior_shaping(torch.ones(2, 2), 0.0),
            "prior_shaping: concentration must be above 0, got 0.0",
        ),
        (
            lambda r: losses.prior_shaping(torch.ones(2, 1)),
            "prior_shaping: source must have at least 2 experts",
        ),
        (
            lambda r: losses.smooth_load(torch.ones(2, 2), torch.ones(2, 2), 0.0, 1),
            "smooth_load: noise_std must be above 0, got 0.0",
        ),
        (
            lambda r: losses.expert_router_coupling(torch.ones(2, 3), torch.ones(2, 4, 5)),
            r"expert_router_coupling: w_up must have shape \[2, 3, any\]",
        ),
        (
            lambda r: losses.imitation(torch.ones(2, 3), torch.ones(3)),
            r"imitation: experts must have shape \[2\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(fr.gate(torch.zeros(2, 3), 1))


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, z: losses.focal(z, LABELS, gamma=-1.0), "focal: gamma must be at least 0"),
        (lambda r, z: losses.focal(z, LABELS + 2), r"focal: labels must be in \[-1, 2\], got 3"),
        (lambda r, z: losses.focal(z, LABELS.float()), "focal: labels must be int32"),
        (lambda r, z: losses.imitation(z, LABELS - 2), r"imitation: experts must be in .*, got -2"),
        (lambda r, z: losses.tsallis_entropy(z, torch.inf), "tsallis_entropy: q must be finite"),
        (lambda r, z: losses.prior_shaping(z, torch.ones(2)), "prior_shaping: concentration must"),
        (
            lambda r, z: losses.entropy_target(z, "8"),
            "entropy_target: num_experts must be a number",
        ),
        (
            lambda r, z: losses.locality(r, torch.tensor([0, 1, 2]), torch.ones(2) / 2),
            r"locality: node_of_expert must be in \[0, 1\], got 2",
        ),
        (
            lambda r, z: losses.locality(r, torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.0])),
            "locality: target must be positive",
        ),
        (lambda r, z: losses.contrastive(z[:1], r, z), "contrastive: routing.experts must have"),
        (lambda r, z: losses.contrastive(z, z, z), "contrastive: routing must be a Routing"),
        (lambda r, z: losses.pool_balance([z]), "pool_balance: routing must be a Routing"),
        (lambda r, z: losses.assigned_balance(z), "assigned_balance: routing must be a Routing"),
        (lambda r, z: losses.kl_diversity([z, z[:1]]), "kl_diversity: logits must have shape"),
        (lambda r, z: losses.commitment(z, 3), "commitment: codes must be a torch.Tensor"),
    ],
)
def test_errors_that_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(fr.gate(torch.zeros(2, 3), 1, stats=True), torch.zeros(2, 3))


def test_a_tensor_is_no_routing():
    with pytest.raises(TypeError, match="z_loss: routing must be a Routing, got"):
        losses.z_loss(torch.zeros(2, 2))
