"""Bugs that other libraries shipped around dispatch, one test each; none may happen here."""

from __future__ import annotations

import fastmoe_route as fr
import pytest
import torch
from tolerance import assert_bound
from torch import Tensor


def layer(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, **options) -> Tensor:
    """Doubles every row; the plan, the permutation and the combine are what is tested."""
    plan = fr.plan_dispatch(experts, num_experts, **options)
    return fr.unpermute(fr.permute(x, plan) * 2, plan, weights)


def case(num_tokens: int = 40, top_k: int = 3, num_experts: int = 8, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k].int()
    x = torch.randn(num_tokens, 24, generator=generator)
    return x, experts, torch.rand(num_tokens, top_k, generator=generator)


@pytest.mark.cpu_only
@pytest.mark.parametrize("stray", [-(10**6), -2, 8, 10**6, 2**31 - 1])
def test_stray_id_is_an_error_and_no_crash(backend: str, stray: int) -> None:
    """vLLM's CPU kernels crash on ids such as 10^6."""
    x, experts, weights = case()
    experts[17, 1] = stray
    with pytest.raises(RuntimeError, match=rf"got {stray} at token 17, slot 1"):
        layer(x, experts, weights, 8)


def test_unrouted_slot_changes_no_other_token(backend: str) -> None:
    """In transformers' grouped_mm one id of -1 changes other tokens."""
    x, experts, weights = case()
    wanted = layer(x, experts, weights, 8)
    for unrouted, options in ((-1, {}), (8, {"allow_unrouted": True})):
        holed = experts.clone()
        holed[11] = unrouted
        got = layer(x, holed, weights, 8, **options)
        others = torch.arange(40) != 11
        assert torch.equal(got[others], wanted[others])
        assert not got[11].any()


def test_padding_is_written_forward_and_backward(backend: str) -> None:
    """torch's grouped product leaves rows past the last group, and their gradients, unwritten."""
    x, experts, weights = case()
    experts[::2] = -1
    plan = fr.plan_dispatch(experts, 8, align=16)
    padding = plan.row_to_slot < 0
    assert int(padding.sum()) > 100
    rows = fr.permute(x, plan)
    assert not rows[padding].any()
    rows = rows.requires_grad_()
    (grad,) = torch.autograd.grad(fr.unpermute(rows, plan, weights).sum(), rows)
    assert not grad[padding].any()


def test_no_tokens(backend: str) -> None:
    """SGLang's and kt-kernel's CPU kernels crash without tokens."""
    x, experts, weights = (t[:0].requires_grad_(t.is_floating_point()) for t in case())
    y = layer(x, experts, weights, 8, align=4, capacity=2)
    assert y.shape == (0, 24)
    grads = torch.autograd.grad(y.sum(), (x, weights))
    assert [g.shape for g in grads] == [x.shape, weights.shape]


def test_one_expert_takes_all(backend: str) -> None:
    """zentorch refuses it."""
    x, experts, weights = case()
    y = layer(x, experts * 0 + 5, weights, 8)
    limit = (weights.shape[1] + 3) * 2**-24 * 2 * x.abs() * weights.abs().sum(1, keepdim=True)
    assert_bound(y, 2 * x.double() * weights.double().sum(1, keepdim=True), limit)


def test_rows_that_are_not_contiguous(backend: str) -> None:
    """zentorch computes a silently wrong result."""
    x, experts, weights = case()
    wanted = layer(x, experts, weights, 8)
    for strided in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :24], x.repeat(1, 2)[:, 24:]):
        assert torch.equal(layer(strided, experts.t().contiguous().t(), weights, 8), wanted)


def test_shapes_that_do_not_fit(backend: str) -> None:
    """A mismatch corrupts the heap in vLLM's CPU kernels."""
    x, experts, weights = case()
    plan = fr.plan_dispatch(experts, 8)
    other = fr.plan_dispatch(experts[:39], 8)
    rows = fr.permute(x, plan)
    for call in (
        lambda: fr.permute(x[:39], plan),
        lambda: fr.permute(x, other),
        lambda: fr.unpermute(rows, other, weights),
        lambda: fr.unpermute(rows[:-1], plan, weights),
        lambda: fr.unpermute(rows, plan, weights[:, :2]),
        lambda: fr.unpermute(rows, plan, weights[:39]),
    ):
        with pytest.raises(ValueError, match=r"must have shape .*, got float32 tensor of shape"):
            call()


@pytest.mark.cpu_only
def test_maps_of_two_plans_do_not_fit(backend: str) -> None:
    x, experts, _ = case()
    mixed = fr.plan_dispatch(experts, 8)
    mixed = mixed._replace(slot_to_row=fr.plan_dispatch(experts[:39], 8).slot_to_row)
    with pytest.raises(RuntimeError, match="plan must come from plan_dispatch"):
        fr.permute(x[:39], mixed)


@pytest.mark.parametrize("policy", ["position", "score"])
def test_who_is_dropped_is_decided_once(backend: str, threads, policy: str) -> None:
    """In FastMoE it changes from run to run; in Megatron `position` is not first come."""
    generator = torch.Generator().manual_seed(3)
    experts = torch.randint(0, 3, (9000, 2), generator=generator)
    weights = (torch.rand(9000, 2, generator=generator) * 4).round()
    options = {"capacity": 1000, "drop_policy": policy, "weights": weights}
    kept = fr.plan_dispatch(experts, 3, **options).slot_to_row >= 0
    for n in (1, 2, 5):
        threads(n)
        for _ in range(5):
            assert torch.equal(fr.plan_dispatch(experts, 3, **options).slot_to_row >= 0, kept)
    if policy == "position":
        for expert in range(3):
            firsts = (experts[:, 0] == expert).nonzero()[:, 0]
            assert torch.equal(kept[firsts, 0], torch.arange(len(firsts)) < 1000)


def test_capacity_is_counted_after_scores_of_the_chosen_experts_only(backend: str) -> None:
    """DeepSpeed ordered by masked logits, and kept 0.001 experts per token where 2 were chosen."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(512, 16, generator=generator)
    for shift in (-50.0, 0.0, 50.0):
        routing = fr.gate(logits + shift, 2)
        plan = fr.plan_dispatch(
            routing.experts, 16, capacity=64, drop_policy="score", weights=routing.weights
        )
        demand = routing.demand.clamp(max=64)
        assert torch.equal(plan.kept, demand)
        assert int(plan.kept.sum()) > 0.9 * 1024


def test_sum_does_not_depend_on_the_order_of_arrival(backend: str, threads) -> None:
    """vLLM adds rows in the order of its atomics: 868,053 of 2,097,152 elements differed."""
    x, experts, weights = case(300, 8, 16)
    x = x * torch.logspace(-3, 3, 300)[:, None]
    threads(1)
    wanted = layer(x, experts, weights, 16)
    for run in range(40):
        threads(1 + run % 8)
        assert torch.equal(layer(x, experts, weights, 16), wanted)


def test_number_of_experts_and_scopes_is_bounded(backend: str) -> None:
    """An unbounded number of experts made a peer ask for 16 GiB."""
    _, experts, _ = case()
    with pytest.raises(ValueError, match=r"num_experts must be in \[1, 65536\]"):
        fr.plan_dispatch(experts, 2**32)
    scopes = torch.zeros(40, dtype=torch.int32)
    plan = fr.plan_dispatch(experts, 8, capacity=2**40, scope_ids=scopes, num_scopes=2**31)
    assert plan.row_to_slot.shape == (120,)


@pytest.mark.large
def test_offsets_past_32_bits(backend: str) -> None:
    """T = 37,450, H = 7168, K = 8 overflows 32 bits: five projects, silently in one of them."""
    num_tokens, top_k, hidden = 37_460, 8, 7168
    assert num_tokens * top_k * hidden > 2**31
    experts = (torch.arange(num_tokens)[:, None] * 5 + torch.arange(top_k)) % 64
    plan = fr.plan_dispatch(experts.int(), 64)
    x = torch.arange(num_tokens).remainder(241).to(torch.bfloat16)[:, None].repeat(1, hidden)
    rows = fr.permute(x, plan)
    tokens = plan.row_to_slot.long() // top_k
    for column in (0, hidden - 1):
        assert torch.equal(rows[:, column].long(), tokens % 241)
    assert torch.equal(fr.unpermute(rows, plan, torch.full((num_tokens, top_k), 0.125)), x)


@pytest.mark.large
def test_a_billion_slots(backend: str) -> None:
    """2^30 + 24 slots: every count and row past what 30 bits hold, in 8.6 GB of maps."""
    num_tokens, top_k = 2**27 + 3, 8
    experts = torch.tensor([[2, 0, 2, 1, 2, 2, -1, 2]], dtype=torch.int32).expand(num_tokens, top_k)
    plan = fr.plan_dispatch(experts, 3)
    assert plan.kept.tolist() == [num_tokens, num_tokens, 5 * num_tokens]
    assert plan.offsets.tolist() == [0, num_tokens, 2 * num_tokens, 7 * num_tokens]
    assert plan.slot_to_row[-1].tolist() == [
        7 * num_tokens - 5,
        num_tokens - 1,
        7 * num_tokens - 4,
        2 * num_tokens - 1,
        7 * num_tokens - 3,
        7 * num_tokens - 2,
        -1,
        7 * num_tokens - 1,
    ]
    assert plan.row_to_slot[7 * num_tokens - 1] == num_tokens * top_k - 1
    assert int(plan.row_to_slot[7 * num_tokens :].max()) == -1


@pytest.mark.cpu_only
def test_a_single_gradient_is_whole_when_a_graph_of_it_is_asked_for():
    """With constant weights `unpermute` has one gradient: its first row came in place of it."""
    experts, weights = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    plan = fr.plan_dispatch(experts, 3)
    x = torch.ones(2, 4, requires_grad=True)
    y = fr.unpermute(fr.permute(x, plan), plan, weights)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(grad, torch.tensor([2.5, 4.0])[:, None].expand(2, 4))
