"""Softmax rows X1 to X14 of the survey: each by its acceptance check, then gradients and errors."""

from __future__ import annotations

import itertools
import math
import threading
from functools import partial

import cases
import fastmoe_route as fr
import pytest
import torch
import torch.distributed as dist
from fastmoe_route import softmax_variants as sv
from fastmoe_route.softmax_variants import distributions
from tolerance import assert_bound, close

F64 = torch.float64
normal = partial(cases.normal, dtype=F64)
ROW = [2.0, 1.0, 0.0, -1.0, -3.0]


# ---- X1, X2: the exact algorithms --------------------------------------------------------------


def test_two_pass_is_exact_over_the_whole_range():
    generator = torch.Generator().manual_seed(1)
    x = torch.empty(64, 4097).uniform_(-1000, 1000, generator=generator)
    x[:, 0], x[0, 1] = 3e38, -3e38
    x[1:, 0] = 999.0
    p, exact = sv.two_pass_softmax(x), x.double().softmax(-1)
    is_normal = exact > 1e-37
    relative = ((p.double() - exact) / exact)[is_normal].abs()
    assert float(relative.max()) <= 5e-7
    assert torch.equal(p.argmax(-1), exact.argmax(-1))
    assert p.isfinite().all()
    assert not torch.equal(relative, torch.zeros_like(relative))


def test_normalizers_merge_in_any_split():
    x = normal(3, 60) * 20
    whole = sv.normalizer(x)
    close((x - whole[0][:, None]).exp() / whole[1][:, None], x.softmax(-1), 1e-12)
    parts = [sv.normalizer(part) for part in x.split([1, 7, 20, 0, 32], dim=1)]
    left = parts[0]
    for part in parts[1:]:
        left = sv.merge_normalizers(left, part)
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = sv.merge_normalizers(part, right)
    for merged in (left, right):
        assert torch.equal(merged[0], whole[0])
        close(merged[1] / whole[1], torch.ones(3), 1e-12)


def test_two_empty_normalizers_merge_to_an_empty_one():
    nothing = sv.normalizer(torch.full((2, 3), -torch.inf))
    m, d = sv.merge_normalizers(nothing, nothing)
    assert m.tolist() == [-math.inf] * 2
    assert d.tolist() == [0.0, 0.0]
    one = sv.normalizer(torch.zeros(2, 1))
    assert [t.tolist() for t in sv.merge_normalizers(nothing, one)] == [[0.0, 0.0], [1.0, 1.0]]


def test_online_topk_takes_the_ids_of_a_sort():
    x = normal(8, 25600, dtype=torch.float32)
    values, ids = fr.softmax_topk(x, 5)
    assert torch.equal(ids, x.sort(dim=-1, descending=True, stable=True).indices[:, :5])
    assert_bound(values, x.double().softmax(-1).gather(1, ids), 1e-7)


# ---- X3 to X5, X10, X13: other distributions ---------------------------------------------------


@pytest.mark.parametrize("k", [3, 70])
def test_sparse_softmax_is_the_softmax_of_the_largest(k):
    x = normal(4, 80)
    p = sv.sparse_softmax(x, k)
    top = x.topk(k, dim=1)
    assert ((p > 0).sum(1) == k).all()
    assert_bound(p.gather(1, top.indices), top.values.softmax(-1), 1e-12)
    assert_bound(sv.sparse_softmax(x, 80), x.softmax(-1), 1e-12)
    assert sv.sparse_softmax(x, 1).max(1).values.tolist() == [1.0] * 4
    assert sv.sparse_softmax(torch.zeros(1, 4), 2).tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_sparse_softmax_loss_and_its_gradient():
    x = torch.tensor([ROW], dtype=F64, requires_grad=True)
    far = torch.tensor([4])
    loss = sv.sparse_softmax_loss(x, far, 2)
    close(loss, math.log(math.exp(2) + math.exp(1)) + 3.0, 1e-12)
    (grad,) = torch.autograd.grad(loss, x)
    assert (grad[0] != 0).tolist() == [True, True, False, False, True]
    outside = sv.sparse_softmax_loss(-x, torch.tensor([0]), 2)
    inside = sv.sparse_softmax_loss(torch.tensor([[5.0, 4.0, 9.0]]), torch.tensor([2]), 1)
    assert outside.item() > 0
    assert float(inside) == 0.0
    lower = sv.sparse_softmax_loss(torch.tensor([[0.0, 5.0]]), torch.tensor([0]), 1)
    assert float(lower) == 5.0
    joined = sv.sparse_softmax_loss(
        torch.tensor([[0.0, 5.0]]), torch.tensor([0]), 1, include_target=True
    )
    assert float(joined) == 0.0


def test_sparse_softmax_loss_is_never_negative():
    """The largest logit is in the sum, so the sum is at least the target, inside or outside."""
    x, target = torch.tensor([[3.0, 2.0, -1.0]]), torch.tensor([2])
    full = sv.sparse_softmax_loss(x, target, 3)
    close(full, torch.nn.functional.cross_entropy(x.double(), target))
    assert 0 < float(sv.sparse_softmax_loss(x, target, 2)) < float(full)
    many, every = normal(1, 12) * 4, torch.arange(12)
    for k in (1, 3, 12):
        for include in (False, True):
            each = [
                float(sv.sparse_softmax_loss(many, t[None], k, include_target=include))
                for t in every
            ]
            assert min(each) >= 0
            # over all classes the weights sum to more than 1 unless every class is in the sum
            assert (sum(math.exp(-loss) for loss in each) > 1 + 1e-9) == (k < 12)


def row_of_entropy(h):
    """Logits of 4,096 classes whose softmax has the entropy `h`, by bisection."""
    low, high = 0.0, 60.0
    base = torch.zeros(4096, dtype=F64)
    for _ in range(80):
        base[0] = (low + high) / 2
        p = base.softmax(-1)
        now = float(-(p * (p + 1e-9).log()).sum())
        low, high = (base[0].item(), high) if now > h else (low, base[0].item())
    return base


@pytest.mark.parametrize(
    ("h", "beta"),
    [(0.4, 1.0), (0.6, 1.0), (1.0, 1.27), (1.5, 1.8456), (2.0, 2.099), (math.log(8), 2.1214),
     (3.0, 2.25), (4.0, 2.389), (5.0, 2.294), (6.0, 1.0)],
)  # fmt: skip
def test_adaptive_temperature_of_the_survey(h, beta):
    x = row_of_entropy(h)
    p = sv.adaptive_temperature_softmax(x)
    got = float((p[0] / p[1]).log() / (x[0] - x[1]))
    assert got == pytest.approx(beta, abs=1e-3)


def test_adaptive_temperature_has_a_gradient_beside_masked_logits():
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, 3] = True
    x.requires_grad_()
    y = sv.adaptive_temperature_softmax(x.masked_fill(mask, -torch.inf))
    rest = sv.adaptive_temperature_softmax(x[:, ~mask[0]])
    assert_bound(y[:, ~mask[0]].detach(), rest.detach(), 1e-15)
    weights = torch.arange(12, dtype=torch.float64)
    (grad,) = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad((rest * weights[~mask[0]]).sum(), x)
    assert_bound(grad, expected, 1e-13)


def test_softpick_of_the_survey():
    close(sv.softpick(torch.tensor(ROW, dtype=F64)), [0.65937, 0.17733, 0, 0, 0], 1e-5)
    close(sv.softpick(torch.tensor(ROW, dtype=F64)).sum(), 0.8367, 1e-4)
    assert sv.softpick(torch.tensor([0.0, -1.0, -1e4])).tolist() == [0.0, 0.0, 0.0]
    assert sv.softpick(torch.tensor([-500.0, -600.0])).tolist() == [0.0, 0.0]
    close(sv.softpick(torch.tensor([500.0, 500.0, 0.0])), [0.5, 0.5, 0.0])
    by_hand = math.expm1(3.0) / (math.expm1(3.0) + 1.0)  # eps is taken before e^-m is
    close(sv.softpick(torch.tensor([3.0], dtype=F64), eps=1.0), [by_hand], 1e-12)
    tiny = torch.tensor([1e-6, -1e-6])  # e^x - 1 without cancellation
    close(sv.softpick(tiny, eps=0.0), [0.5, 0.0], 1e-6)


def test_softpick_does_not_count_masked_entries():
    x = torch.tensor([[2.0, -torch.inf, -torch.inf]], dtype=F64)
    alone = sv.softpick(x[:, :1])
    assert_bound(sv.softpick(x)[:, :1], alone, 1e-12)
    full = torch.tensor([[2.0, 5.0, 7.0]], dtype=F64)
    mask = torch.tensor([True, False, False])
    assert_bound(sv.softpick(full, mask=mask), torch.cat([alone, alone * 0, alone * 0], 1), 1e-12)
    assert sv.softpick(full, mask=~mask & mask).tolist() == [[0.0, 0.0, 0.0]]


def test_stablemax_of_the_survey():
    close(
        sv.stablemax(torch.tensor(ROW, dtype=F64)), [0.4444, 0.2963, 0.1481, 0.0741, 0.0370], 5e-5
    )
    p = sv.stablemax(torch.tensor([[3e38, 3e38, -torch.inf], [-3e38, 0.0, 0.0]]))
    close(p, [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    x = torch.tensor([-1e-9, 0.0, 1e-9], dtype=F64, requires_grad=True)
    distributions._stable_scale(x).sum().backward()
    close(x.grad, [1.0, 1.0, 1.0], 1e-8)
    target = torch.tensor([0])
    close(sv.stablemax_cross_entropy(torch.tensor([ROW]), target), -math.log(12 / 27), 1e-6)


def test_small_temperature_is_one_hot_and_still_learns():
    x = torch.tensor([0.1, 0.2, -0.3], dtype=F64, requires_grad=True)
    close(sv.noisy_sparse_softmax(x, 1e-4).detach(), [0.0, 1.0, 0.0], 1e-12)
    p = sv.noisy_sparse_softmax(x, 0.1, noise=torch.tensor([0.2, 0.0, 0.0], dtype=F64), k=2)
    close(p.detach(), torch.softmax(torch.tensor([3.0, 2.0, -math.inf], dtype=F64), 0), 1e-12)
    (grad,) = torch.autograd.grad(p[0], x)
    assert grad[0] > 0.5
    assert grad[2] == 0
    values = [sv.temperature_schedule(step, 10, 4.0, 0.25) for step in range(13)]
    assert values[0] == 4.0
    assert values[10] == values[12] == 0.25
    assert all(a > b for a, b in itertools.pairwise(values[:11]))
    cosine = [sv.temperature_schedule(step, 10, 4.0, 0.0, shape="cosine") for step in range(13)]
    assert cosine[0] == 4.0
    assert cosine[5] == pytest.approx(2.0)
    assert cosine[10] == cosine[12] == 0.0
    assert all(a > b for a, b in itertools.pairwise(cosine[:11]))
    with pytest.raises(ValueError, match="temperature_schedule: end must be above 0, got 0"):
        sv.temperature_schedule(1, 10, 4.0, 0)


def test_entropy_temperature_reaches_its_share():
    x = normal(5, 9) * torch.tensor([[0.01], [1.0], [30.0], [1e4], [3.0]])
    for share in (0.99, 0.5, 0.05):
        temperature = sv.entropy_temperature(x, share)
        p = sv.noisy_sparse_softmax(x / temperature, 1.0)
        close(-(p * p.log()).sum(1), torch.full((5,), share * math.log(9)), 1e-6)
    assert sv.entropy_temperature(torch.zeros(1, 4), 0.5).isfinite().all()
    with pytest.raises(ValueError, match=r"entropy_temperature: share must be in \(0, 1\), got 1"):
        sv.entropy_temperature(x, 1)


# ---- X6, X7, X12, X14: running a model ---------------------------------------------------------


def test_unified_max_equals_softmax_and_falls_back_per_row():
    x = normal(5, 32) * 3
    for phi in (-5.0, 0.0, 7.0):
        p, redone = sv.unified_max_softmax(x, phi)
        assert not redone.any()
        assert_bound(p, x.softmax(-1), 1e-12)
    x = x.float()
    x[1, 3], x[2, 4], x[3, 0] = 200.0, -90.0, -torch.inf
    p, redone = sv.unified_max_softmax(x, 0.0)
    assert redone.tolist() == [False, True, True, False, False]
    assert p.isfinite().all()
    assert_bound(p, x.double().softmax(-1), 1e-6)


def test_quantization_bias_restores_the_row_sums():
    p = normal(64, 1024).softmax(-1)
    bias = sv.quantization_bias(p)
    assert float(bias) > 0
    before = sv.quantize_probabilities(p).sum(-1).mean()
    after = sv.quantize_probabilities(p, bias=bias).sum(-1).mean()
    assert float(before) < 0.9
    close(after, 1.0, 1e-9)
    heads = normal(2, 3, 8, 256).softmax(-1)
    per_head = sv.quantization_bias(heads, dims=(0, 2, 3))
    assert per_head.shape == (1, 3, 1, 1)
    close(sv.quantize_probabilities(heads, bias=per_head).sum(-1).mean((0, 2)), [1.0] * 3, 1e-9)
    exact = torch.tensor([0.0, 1.0, 128 / 255], dtype=F64)
    assert torch.equal(sv.quantize_probabilities(exact), exact)


def test_early_exit_leaves_at_the_first_stage_that_is_sure():
    stages = [normal(50, 4, seed=s) * (1 + s) for s in range(3)]
    assert sv.early_exit(stages, [0.0, 0.0]).tolist() == [0] * 50
    assert sv.early_exit(stages, [1.1, 1.1]).tolist() == [2] * 50
    cost = [float(sv.early_exit(stages, [d, d]).double().mean()) for d in (0.3, 0.5, 0.7, 0.9)]
    assert cost == sorted(cost)
    assert cost[0] < cost[-1]
    two = sv.early_exit([torch.tensor([[5.0, 0.0], [0.0, 0.1]])] * 2, [0.9])
    assert two.tolist() == [0, 1]


def test_entropy_tolerance_costs_nothing_inside_the_band():
    uniform = torch.full((2, 3, 8), 0.125, dtype=F64)
    assert float(sv.entropy_tolerance(uniform, torch.tensor([1.0, 0.9], dtype=F64), 0.2)) == 0.0
    loss = sv.entropy_tolerance(uniform, torch.tensor([1.0, 0.5], dtype=F64), 0.2)
    close(loss, 0.25, 1e-12)


# ---- X8, X9: ranking ---------------------------------------------------------------------------


def test_pairwise_softmax_loss_with_exp_is_the_softmax_loss():
    positive, negative = normal(6).tanh() / 2, normal(6, 9, seed=1).tanh() / 2
    d = negative - positive[:, None]
    softmax_loss = (d / 0.1).logsumexp(1).mean()
    close(sv.pairwise_softmax_loss(positive, negative, 0.1, "exp"), softmax_loss, 1e-12)
    for name, s in (("tanh", d.tanh() + 1), ("relu", (d + 1).relu()), ("atan", d.atan() + 1)):
        loss = sv.pairwise_softmax_loss(positive, negative, 0.1, name)
        close(loss, s.pow(10).sum(1).log().mean(), 1e-9)
    inside = torch.linspace(-1, 1, 201, dtype=F64)[:, None]
    zero = torch.zeros(201, dtype=F64)
    each = {
        name: torch.stack(
            [
                sv.pairwise_softmax_loss(z[None], i[None], 1.0, name)
                for z, i in zip(zero, inside, strict=True)
            ]
        ).exp()
        for name in ("tanh", "relu", "exp")
    }
    step = (inside[:, 0] >= 0).double()
    for name in ("tanh", "relu"):
        assert (each[name] >= step - 1e-9).all()
        assert (each[name] <= each["exp"] + 1e-9).all()


def test_topk_softmax_loss_halves_an_item_at_the_quantile():
    positive, negative = normal(6), normal(6, 9, seed=1)
    plain = ((negative - positive[:, None]) / 0.1).logsumexp(1).mean()
    close(sv.topk_softmax_loss(positive, negative, torch.full((6,), -torch.inf)), plain, 1e-12)
    half = sv.topk_softmax_loss(positive, negative, positive)
    close(half, plain / 2, 1e-12)


# ---- X11: sharded classes ----------------------------------------------------------------------


def test_sampled_classes_hold_every_label():
    labels = torch.tensor([3, 7, 7, 90, -1, 250])
    generator = torch.Generator().manual_seed(0)
    classes = sv.sample_classes(labels, 100, 0.1, generator=generator)
    assert classes.shape == (10,)
    assert {3, 7, 90} <= set(classes.tolist())
    assert torch.equal(classes, classes.unique())
    assert sv.sample_classes(labels, 100, 1.0).tolist() == list(range(100))
    assert sv.sample_classes(torch.arange(50), 100, 0.1).tolist() == list(range(50))


def test_one_shard_is_cross_entropy():
    logits, labels = normal(7, 12).requires_grad_(), torch.arange(7)
    ours = sv.sharded_cross_entropy(logits, labels)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    close(ours, plain, 1e-12)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, plain)]
    assert_bound(grads[0], grads[1], 1e-12)


def test_one_shard_is_differentiated_once():
    logits = normal(7, 12).requires_grad_()
    loss = sv.sharded_cross_entropy(logits, torch.arange(7)) + logits.pow(3).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="sharded_cross_entropy: gradients must be different"):
        torch.autograd.grad(grad.sum(), logits)


def test_shards_equal_the_whole(monkeypatch):
    """Three ranks as threads, their all-reduce a barrier and a shared list."""
    logits, labels, world = normal(7, 12), torch.tensor([0, 5, 6, 11, 3, 8, 2]), 3
    whole = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(whole, labels)
    expected.backward()
    meeting = threading.Barrier(world, timeout=20)
    given, results = {}, {}

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        given[threading.get_ident()] = tensor.clone()
        meeting.wait()
        parts = torch.stack(list(given.values()))
        meeting.wait()
        tensor.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))

    def shard(rank):
        mine = logits[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
        local = labels - 4 * rank
        local = local.masked_fill((local < 0) | (local >= 4), -1)
        loss = sv.sharded_cross_entropy(mine, local, group="ranks")
        loss.backward()
        results[rank] = (loss.detach(), mine.grad)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    threads = [threading.Thread(target=shard, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == world
    for rank, (loss, grad) in results.items():
        close(loss, expected.detach(), 1e-12)
        assert_bound(grad, whole.grad[:, 4 * rank : 4 * rank + 4], 1e-12)


# ---- gradients ---------------------------------------------------------------------------------

TARGET = torch.tensor([0, 2, 4])
GRADIENTS = {
    "sparse_softmax": lambda x: sv.sparse_softmax(x, 3).square().sum(),
    "sparse_softmax_loss": lambda x: sv.sparse_softmax_loss(x, TARGET, 3),
    "adaptive_temperature": lambda x: sv.adaptive_temperature_softmax(x).square().sum(),
    "softpick": lambda x: sv.softpick(x).square().sum(),
    "unified_max": lambda x: sv.unified_max_softmax(x, 0.5)[0].square().sum(),
    "stablemax": lambda x: sv.stablemax(x).square().sum(),
    "stablemax_cross_entropy": lambda x: sv.stablemax_cross_entropy(x, TARGET),
    "noisy_sparse": lambda x: sv.noisy_sparse_softmax(x, 0.5, k=4).square().sum(),
    "entropy_tolerance": lambda x: sv.entropy_tolerance(x.softmax(-1), x[:, 0], 0.01),
    "psl": lambda x: sv.pairwise_softmax_loss(x[:, 0] / 9, x[:, 1:] / 9, 0.3),
    "sl_at_k": lambda x: sv.topk_softmax_loss(x[:, 0], x[:, 1:], torch.zeros(3, dtype=F64)),
    "normalizer": lambda x: sum(t.sum() for t in sv.normalizer(x)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name):
    x = normal(3, 6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(GRADIENTS[name], (x,), fast_mode=True)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sv.sparse_softmax(x, 7), r"sparse_softmax: k must be in \[1, 6\], got 7"),
        (
            lambda x: sv.unified_max_softmax(x, 0.0, 1.0, 1.0),
            "unified_max_softmax: low must be below high, 1.0, got 1.0",
        ),
        (
            lambda x: sv.noisy_sparse_softmax(x, 0.0),
            "noisy_sparse_softmax: temperature must be above 0, got 0.0",
        ),
        (lambda x: sv.temperature_schedule(1, 2, 0.0, 1.0), "temperature_schedule: start must be"),
        (
            lambda x: sv.early_exit([x, x], []),
            "early_exit: thresholds must have 1 entries, one less than stages, got 0",
        ),
        (
            lambda x: sv.pairwise_softmax_loss(x[:, 0], x, 0.1, "sin"),
            "pairwise_softmax_loss: surrogate must be one of tanh, relu, atan, exp, got 'sin'",
        ),
        (lambda x: sv.sample_classes(TARGET, 5, 0.0), r"sample_classes: rate must be in \(0, 1\]"),
        (
            lambda x: sv.quantize_probabilities(x, 24),
            r"quantize_probabilities: bits must be in \[1, 23\], got 24",
        ),
        (
            lambda x: sv.sparse_softmax_loss(x, TARGET[:2]),
            r"sparse_softmax_loss: target must have shape \[3\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(3, 6))


# ---- L7 ----------------------------------------------------------------------------------------


def test_polytope_step_goes_to_the_best_vertex():
    losses = torch.tensor([[3.0, 1.0, 1.0, 2.0], [0.5, 0.7, 0.9, 0.1]], dtype=F64)
    assert sv.polytope_weights(losses, 0.0).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    close(sv.polytope_weights(losses[1:], 1e-3), [[0, 0, 0, 1]])
    close(sv.polytope_weights(losses, 1e9), torch.full((2, 4), 0.25))
    close(sv.polytope_weights(losses[1:], 0.5).log().diff(), -2 * losses[1:].diff())
    with pytest.raises(ValueError, match="epsilon must be at least 0, got -1"):
        sv.polytope_weights(losses, -1)
