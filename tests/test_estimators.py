"""Gradient estimators and seeded random numbers of the routers."""

from __future__ import annotations

import itertools
import math
from functools import partial

import cases
import pytest
import torch
from fastmoe_route.routers import estimators as est
from fastmoe_route.routers import random
from fastmoe_route.routers.base import Context
from tolerance import assert_bound, close

F64 = torch.float64
normal = partial(cases.normal, dtype=F64)


# ---- random numbers ----------------------------------------------------------------------------


def test_numbers_depend_on_seed_position_stream_and_column_only():
    x = torch.zeros(6, 3)
    positions = torch.tensor([5, 0, 1, 2, 3, 4])
    rows = random.uniform(Context(seed=3, positions=positions), x, 4)
    alone = random.uniform(Context(seed=3, positions=positions[2:3]), x[:1], 4)
    assert torch.equal(rows[2:3], alone)
    assert torch.equal(random.uniform(Context(seed=3), x, 4)[5], rows[0])
    others = [
        random.uniform(Context(seed=4, positions=positions), x, 4),
        random.uniform(Context(seed=3, positions=positions), x, 4, stream=1),
        random.uniform(Context(seed=3, positions=positions + 1), x, 4),
    ]
    for other in others:
        assert (other != rows).all()
    assert rows.unique().numel() == rows.numel()


def test_numbers_are_uniform_and_uncorrelated():
    u = random.uniform(Context(seed=11), torch.zeros(4096, 1, dtype=F64), 8)
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 16, 0, 1)
    expected = u.numel() / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 37.7  # chi squared, 15 d.f., 0.1%
    both = torch.cat([u, u[1:].new_zeros(0, 8)]), u.roll(1, 0)
    for pair in (
        torch.corrcoef(u.T),
        torch.corrcoef(torch.cat([both[0][:, :1], both[1][:, :1]], 1).T),
    ):
        off = pair - torch.eye(pair.shape[0], dtype=F64)
        assert float(off.abs().max()) < 5 / math.sqrt(4096)


def test_without_a_seed_torch_draws():
    x = torch.zeros(2, 3)
    torch.manual_seed(0)
    one = random.uniform(Context(), x, 4)
    assert not torch.equal(one, random.uniform(Context(), x, 4))
    torch.manual_seed(0)
    assert torch.equal(one, random.uniform(Context(), x, 4))


def test_normal_and_gumbel_have_their_moments():
    x = torch.zeros(20000, 1, dtype=F64)
    z, g = random.normal(Context(seed=1), x, 1), random.gumbel(Context(seed=2), x, 1)
    assert abs(float(z.mean())) < 0.03
    assert abs(float(z.std()) - 1) < 0.03
    assert abs(float(g.mean()) - 0.5772) < 0.04
    assert abs(float(g.var()) - math.pi**2 / 6) < 0.1


# ---- straight-through and dense mixing (R57) ---------------------------------------------------


def test_straight_through_is_hard_forward_and_soft_backward():
    a = normal(100).requires_grad_()
    soft = a.sigmoid()
    hard = (a > 0).double()
    y = est.straight_through(hard, soft)
    assert torch.equal(y, hard)
    (grad,) = torch.autograd.grad(y.sum(), a)
    assert_bound(grad, (soft * (1 - soft)).detach(), 1e-15)


def test_score_function_is_unbiased():
    """The mean over both outcomes of `h ~ Bernoulli(sigmoid(a))` is the derivative of E[L]."""
    a = torch.tensor(0.3, dtype=F64, requires_grad=True)
    loss = {1: 2.5, 0: -0.5}
    q = a.sigmoid()
    exact = float(q.detach() * (1 - q.detach())) * (loss[1] - loss[0])
    mean = 0.0
    for h, probability in ((1, q), (0, 1 - q)):
        log_prob = probability.log()[None]
        surrogate = est.score_function(-torch.tensor([loss[h]], dtype=F64), log_prob, baseline=0.7)
        (grad,) = torch.autograd.grad(surrogate, a, retain_graph=True)
        mean += float(probability.detach()) * float(grad)
    assert mean == pytest.approx(exact, abs=1e-12)
    zero = est.score_function(torch.ones(3), torch.zeros(3, requires_grad=True), baseline=1.0)
    assert zero.item() == 0.0


def test_dense_mixing_keeps_the_output_and_gives_every_score_its_gradient():
    scores = normal(5, 4).softmax(1).requires_grad_()
    outputs, y = normal(5, 4, 3, seed=1), normal(5, 3, seed=2)
    mixed = est.dense_mixing(y, scores, outputs)
    assert torch.equal(mixed, y)
    g = normal(5, 3, seed=3)
    (grad,) = torch.autograd.grad(mixed, scores, g)
    assert_bound(grad, torch.einsum("th,teh->te", g, outputs), 1e-12)


# ---- ordered sampling without replacement, RLOO (R59) ------------------------------------------


def orders(num_experts, k):
    return torch.tensor(list(itertools.permutations(range(num_experts), k)))


def test_probabilities_of_all_orders_sum_to_one():
    logits = normal(1, 5) * 2
    ids = orders(5, 3)
    log_q = est.ordered_log_prob(logits.expand(len(ids), 5), ids)
    close(log_q.exp().sum(), 1.0, 1e-12)
    q = logits[0].softmax(0)
    first = ids[17]
    by_hand = q[first[0]] * q[first[1]] / (1 - q[first[0]])
    by_hand = by_hand * q[first[2]] / (1 - q[first[0]] - q[first[1]])
    close(log_q[17].exp(), by_hand, 1e-12)


def test_log_prob_is_exact_where_the_first_draw_takes_nearly_all():
    logits = torch.tensor([[60.0, 0.0, 1.0]], dtype=F64)
    log_q = est.ordered_log_prob(logits, torch.tensor([[0, 2, -1]]))
    close(log_q, [-math.log(1 + math.exp(-1.0))], 1e-12)


def test_gumbel_topk_draws_with_these_probabilities():
    """20,000 draws over the 12 ordered pairs of 4 experts: chi squared with 11 degrees."""
    num = 20000
    logits = torch.tensor([0.5, -0.3, 1.0, 0.0], dtype=F64)
    noisy = logits + random.gumbel(Context(seed=5), torch.zeros(num, 1, dtype=F64), 4)
    drawn = noisy.topk(2, dim=1).indices
    ids = orders(4, 2)
    expected = est.ordered_log_prob(logits.expand(len(ids), 4), ids).exp() * num
    counts = torch.stack([(drawn == pair).all(1).sum() for pair in ids])
    assert int(counts.sum()) == num
    assert float(((counts - expected) ** 2 / expected).sum()) < 31.3  # 0.1%


@pytest.mark.parametrize("num_draws", [2, 3])
def test_rloo_is_the_gradient_of_the_expected_loss(num_draws):
    """Exactly: the mean over every combination of draws, each by its probability."""
    logits = normal(3).requires_grad_()
    ids = orders(3, 2)
    loss = normal(len(ids), seed=4)
    log_q = est.ordered_log_prob(logits.expand(len(ids), 3), ids)
    (exact,) = torch.autograd.grad((log_q.exp() * loss).sum(), logits, retain_graph=True)
    total = 0.0
    for draws in itertools.product(range(len(ids)), repeat=num_draws):
        picked = torch.tensor(draws)
        total = total + log_q[picked].sum().exp().detach() * est.rloo(loss[picked], log_q[picked])
    (estimate,) = torch.autograd.grad(total, logits)
    assert_bound(estimate, exact, 1e-12)
    same = est.rloo(torch.full((4,), 2.0), torch.zeros(4, requires_grad=True))
    assert same.item() == 0.0


# ---- SparseMixer (R50) -------------------------------------------------------------------------


def test_sparsemixer_gradient_of_a_fixed_draw():
    logits = (normal(50, 6) * 0.01 + 1.0).requires_grad_()
    gumbel, u = random.gumbel(Context(seed=1), logits, 6), torch.linspace(0.1, 0.9, 50, dtype=F64)
    chosen, weight = est.sparsemixer(logits, torch.inf, gumbel=gumbel, uniform=u)
    p = logits.detach().softmax(1)
    own = p.gather(1, chosen[:, None])
    exact = (chosen == p.argmax(1)) | (u > 0.75)
    assert exact.any()
    assert not exact.all()
    assert_bound(weight, own[:, 0] * torch.where(exact, 1.0, 1 / 3), 1e-7)
    g = normal(50, seed=2)
    (grad,) = torch.autograd.grad(weight, logits, g, create_graph=True)
    p = logits.softmax(1)
    one_hot = torch.nn.functional.one_hot(chosen, 6)
    wanted = g[:, None] * p.gather(1, chosen[:, None]) * (one_hot - p)
    assert_bound(grad, wanted, 1e-12)
    second = [torch.autograd.grad(first.square().sum(), logits)[0] for first in (grad, wanted)]
    assert_bound(second[0], second[1], 1e-12)


def test_sparsemixer_multiplier_is_half_on_average():
    num = 20000
    logits = torch.zeros(num, 4, dtype=F64)
    u = random.uniform(Context(seed=8), logits, 1)[:, 0]
    gumbel = random.gumbel(Context(seed=9), logits, 4)
    chosen, weight = est.sparsemixer(logits, 0.01, gumbel=gumbel, uniform=u)
    factor = (weight / 0.25)[chosen != 0]  # argmax of ties is expert 0
    assert float(factor.mean()) == pytest.approx(0.5, abs=0.01)
    assert sorted(set(factor.mul(3).round().tolist())) == [1.0, 3.0]


def test_sparsemixer_masks_by_relative_distance():
    logits = torch.tensor([[10.0, 9.9, 9.0, -1.0]], dtype=F64)
    chosen, weight = est.sparsemixer(logits, 0.01)
    assert chosen.tolist() == [0]
    close(weight, [1 / (1 + math.exp(-0.1))], 1e-12)
    everything = est.sparsemixer(logits, torch.inf)[1]
    close(everything, logits.softmax(1)[:, 0], 1e-12)


def test_rloo_needs_two_draws():
    with pytest.raises(ValueError, match="rloo: losses must hold at least 2 draws, got"):
        est.rloo(torch.zeros(1), torch.zeros(1))


def test_no_draw_takes_no_expert_away():
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = z.softmax(1)[0]
    found = est.ordered_log_prob(z, torch.tensor([[2, -1, 0]]))
    assert_bound(found, (q[2].log() + (q[0] / (1 - q[2])).log())[None], 1e-12)
