"""LoRA experts and the adapters of the survey: values by hand, gradients, acceptance checks."""

from __future__ import annotations

import fastmoe_route as fr
import pytest
import torch
from cases import normal
from deferred import assert_alike, deferred
from fastmoe_route import adapters
from router_cases import EXPERTS, HIDDEN
from tolerance import assert_bound, close

F64 = torch.float64


# ---- low-rank experts --------------------------------------------------------------------------


def test_merged_low_rank_experts_are_the_sum_of_the_unmerged():
    x, w = normal(5, HIDDEN, dtype=F64), normal(2, EXPERTS, seed=2, dtype=F64).softmax(1)
    a, b = normal(EXPERTS, HIDDEN, 3, seed=3, dtype=F64), normal(EXPERTS, 3, 4, seed=4, dtype=F64)
    lora = adapters.LoraExperts(a, b, 0.5)
    ids = torch.tensor([0, 1, 0, 0, 1])
    merged = lora.merged(w)(x, (ids[:, None], torch.ones(5, 1, dtype=F64)))
    assert_bound(merged, torch.einsum("te,ted->td", w[ids], lora.each(x)), 1e-12)


def test_lora_grouped_mm_by_hand_and_gradients():
    x, a, b = (normal(*s, seed=i, dtype=F64) for i, s in enumerate(((6, 5), (4, 5, 2), (4, 2, 3))))
    routing = fr.gate(normal(6, 4, seed=7, dtype=F64), 2)
    experts = routing.experts.clone()
    experts[0, 1] = -1
    weights = routing.weights.masked_fill(experts < 0, 0)
    y = fr.lora_grouped_mm(x, a, b, (experts, weights), scaling=0.5)
    for t in range(6):
        terms = [
            0.5 * weights[t, j] * x[t] @ a[e] @ b[e]
            for j, e in enumerate(experts[t].tolist())
            if e >= 0
        ]
        assert_bound(y[t], sum(terms), 1e-12)
    tensors = [v.requires_grad_() for v in (x, a, b, weights)]

    def call(x, a, b, w):
        return fr.lora_grouped_mm(x, a, b, (experts, w), scaling=0.5)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    idle = (torch.zeros(6, 1, dtype=torch.int32), torch.ones(6, 1, dtype=F64))
    (grad,) = torch.autograd.grad(fr.lora_grouped_mm(x, a, b, idle).sum(), a)
    assert (grad[1:] == 0).all()
    assert grad[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_grouped_mm_is_batch_invariant_and_compiles(dtype):
    x, a, b = (
        normal(*s, seed=i).to(dtype) for i, s in enumerate(((33, 64), (4, 64, 8), (4, 8, 32)))
    )
    routing = fr.gate(normal(33, 4, seed=7), 2)
    y = fr.lora_grouped_mm(x, a, b, routing)
    index = torch.tensor([7, 3, 30])
    some = fr.lora_grouped_mm(x[index], a, b, (routing.experts[index], routing.weights[index]))
    assert torch.equal(some, y[index])
    compiled = torch.compile(fr.lora_grouped_mm, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, a, b, routing), y)
    view = fr.lora_grouped_mm(x, a.transpose(1, 2).contiguous().transpose(1, 2), b, routing)
    assert_bound(view, y.double(), 0.2 if dtype == torch.bfloat16 else 1e-4)
    nothing = (routing.experts[:0], routing.weights[:0])
    assert fr.lora_grouped_mm(x[:0], a, b, nothing).shape == (0, 32)


def test_mixture_of_shards_glues_rows_from_two_pools():
    generator = torch.Generator().manual_seed(0)
    module = adapters.MixtureOfShards(
        16, 8, 3, 4, num_shards=2, pool_size=6, num_private=1, generator=generator
    )
    lora = module.experts()
    assert lora.lora_a.shape == (3, 16, 4)
    assert lora.lora_b.shape == (3, 4, 8)
    row = lora.lora_a[1, :, 2]
    assert torch.equal(row, module.pool_a[module.index_a[1, 2]].flatten())
    counts = torch.bincount(module.index_a.flatten(), minlength=12)
    assert (counts[6:] == 1).all()  # private shards are used once
    assert int(counts.sum()) == 3 * 4 * 2
    lora.lora_a.sum().backward()
    assert torch.equal(module.pool_a.grad, counts[:, None].expand(12, 8).float())
    x = normal(5, 16)
    assert (lora(x, (torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1))) == 0).all()


def test_queryable_lora_with_one_atom_is_lora():
    module = adapters.QueryableLora(16, 8, 4, num_atoms=1, scaling=2.0)
    with torch.no_grad():
        module.lora_b.normal_(generator=torch.Generator().manual_seed(0))
    x = normal(5, 16)
    y, summary = module(x)
    assert_bound(y, (2 * x @ module.lora_a @ module.lora_b).detach().double(), 1e-4)
    many = adapters.QueryableLora(16, 8, 4, num_atoms=3)
    with torch.no_grad():
        many.lora_b.copy_(module.lora_b)
        many.lora_a.copy_(module.lora_a)
        many.atoms.copy_(many.atoms * torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    prior = torch.tensor([0.0, 0.0, 1e9])
    assert_bound(many(x, summary, prior)[0], 1.5 * y.detach().double(), 1e-4)
    # alpha sums to 1: equal atoms are one atom, whatever the attention
    with torch.no_grad():
        many.atoms.copy_(normal(4, 4, seed=7).expand(3, 4, 4))
    u = x @ many.lora_a
    expected = u.double() @ many.atoms[0].double() @ many.lora_b.double()
    for given in (None, torch.tensor([0.3, -2.0, 1.0]), normal(5, 3, seed=8)):
        assert_bound(many(x, summary, given)[0].detach(), expected.detach(), 1e-4)
    assert_bound(many(x, summary)[1].detach(), ((summary + u) / 2).detach().double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queryable_lora_keeps_the_bits_of_a_token(dtype):
    module = adapters.QueryableLora(64, 48, 8, num_atoms=5).to(dtype)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(normal(*value.shape, dtype=dtype))
    x, summary = normal(97, 64, dtype=dtype), normal(97, 8, seed=1, dtype=dtype)
    together = module(x, summary)
    for index in (slice(0, 1), slice(5, 8), slice(40, 97)):
        for got, whole in zip(module(x[index], summary[index]), together, strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, whole[index])


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapters.MixtureOfShards(16, 8, 3, 4, num_shards=2, num_private=2),
        lambda: adapters.QueryableLora(16, 8, 4, num_atoms=3),
    ],
)
def test_weights_are_drawn_later(make):
    later = deferred(make)
    torch.manual_seed(0)
    assert_alike(later, make())


def test_same_projects_and_freezes():
    inputs_of_old = normal(50, 12, dtype=F64) @ normal(12, 12, seed=1, dtype=F64).tril()
    kept = adapters.kept_directions(inputs_of_old, 0.9)
    assert 1 <= kept.shape[1] < 12
    update = normal(12, 4, seed=2, dtype=F64)
    projected = adapters.project_update(update, kept)
    close(kept.T @ projected, torch.zeros(kept.shape[1], 4), 1e-12)
    assert_bound(adapters.project_update(projected, kept), projected, 1e-12)
    assert_bound(adapters.project_update(update, kept * 3), projected, 1e-12)
    # columns that depend on each other, or are 0, span no direction more
    dependent = torch.cat([kept, kept @ normal(kept.shape[1], 3, seed=4, dtype=F64)], 1)
    dependent = torch.cat([dependent, torch.zeros(12, 2, dtype=F64)], 1)
    assert_bound(adapters.project_update(update, dependent), projected, 1e-12)
    assert torch.equal(adapters.project_update(update, torch.zeros(12, 2, dtype=F64)), update)
    assert adapters.kept_directions(inputs_of_old, 1.0).shape == (12, 12)
    c = torch.diag(torch.tensor([0.0, 3.0], dtype=F64))
    step = adapters.precondition_update(torch.ones(2, 1, dtype=F64), c, damping=1.0)
    close(step, [[1.0], [0.25]], 1e-12)
    weight = torch.ones(4, 2, 3, requires_grad=True)
    handle = adapters.freeze_experts(weight, torch.tensor([False, True, False, True]))
    weight.sum().backward()
    assert weight.grad[:, 0, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
    handle.remove()


# ---- errors ------------------------------------------------------------------------------------

PAIRS = torch.ones(2, HIDDEN, 1), torch.ones(2, 1, 4)
ROUTED = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: fr.lora_grouped_mm(x, torch.ones(2, 5, 1), torch.ones(2, 1, 4), None),
            r"lora_grouped_mm: lora_a must have shape \[any, 16, any\]",
        ),
        (
            lambda x: fr.lora_grouped_mm(x, torch.ones(2, 16, 1), torch.ones(2, 2, 4), None),
            r"lora_grouped_mm: lora_b must have shape \[2, 1, any\]",
        ),
        (
            lambda x: fr.lora_grouped_mm(x, *PAIRS, (torch.zeros(2, 1).int(), torch.ones(2, 1))),
            r"lora_grouped_mm: experts must have shape \[3, any\]",
        ),
        (
            lambda x: fr.lora_grouped_mm(
                x, *PAIRS, ROUTED, plan=fr.plan_dispatch(ROUTED[0][:2], 2)
            ),
            r"lora_grouped_mm: plan\.slot_to_row must have shape \[3, 1\]",
        ),
        (
            lambda x: fr.lora_grouped_mm(x.bfloat16(), *PAIRS, ROUTED),
            "lora_grouped_mm: lora_a must have the dtype of x, bfloat16, got float32 tensor",
        ),
        (
            lambda x: fr.lora_grouped_mm(x.int(), *PAIRS, ROUTED),
            "lora_grouped_mm: x must be float32 or",
        ),
        (
            lambda x: adapters.freeze_experts(PAIRS[0], torch.tensor([True, False])),
            "freeze_experts: weight must require a gradient",
        ),
        (
            lambda x: adapters.freeze_experts(
                torch.ones(2, 3, requires_grad=True), torch.tensor([1, 0])
            ),
            "freeze_experts: frozen must be bool",
        ),
        (
            lambda x: adapters.precondition_update(x.T, torch.eye(HIDDEN), -1.0),
            r"precondition_update: damping must be at least 0, got -1\.0",
        ),
        (
            lambda x: adapters.QueryableLora(8, 8, scaling=float("nan")),
            "queryable_lora: scaling must be a number that a float can hold, got nan",
        ),
        (
            lambda x: adapters.MixtureOfShards(10, 8, 2, num_shards=4),
            "mixture_of_shards: hidden_size must be a multiple of num_shards 4, got 10",
        ),
        (
            lambda x: adapters.LoraExperts(
                torch.ones(1, 5, 2), torch.ones(1, 2, 4)
            ).merged_blockwise(torch.ones(1, 2, 1)),
            "merged_blockwise: H must be a multiple of 2 heads, got 5",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(normal(3, HIDDEN))
