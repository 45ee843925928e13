"""Bad input is an error before anything is allocated, whether Python or the host code finds it."""

from __future__ import annotations

import fastmoe_route as fr
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

T, E, K, H, I = 64, 8, 2, 32, 16  # noqa: E741

_generator = torch.Generator().manual_seed(0)
logits = torch.randn(T, E, generator=_generator)
x = torch.randn(T, H, generator=_generator)
w_up = torch.randn(E, H, 2 * I, generator=_generator)
w_down = torch.randn(E, I, H, generator=_generator)
routing = fr.gate(logits, K)
experts, weights = routing.experts, routing.weights
plan = fr.plan_dispatch(experts, E)
rows = fr.permute(x, plan)
scopes = torch.zeros(T, dtype=torch.int32)


def changed(tensor: torch.Tensor, index: int, value: int) -> torch.Tensor:
    """A copy with one element changed."""
    copied = tensor.clone()
    copied.view(-1)[index] = value
    return copied


strange_ids, strange_scopes = changed(experts, 11, 99), changed(scopes, 3, 7)
integers, falling = logits.int(), changed(plan.offsets, 3, 10**6)
other_rows = plan._replace(row_to_slot=plan.row_to_slot + 10**5)
other_slots = plan._replace(slot_to_row=plan.slot_to_row + 1000)
other_offsets = plan._replace(offsets=falling)

CALLS = {
    "gate: top_k": lambda: fr.gate(logits, 9),
    "gate: logits": lambda: fr.gate(integers, 2),
    "gate: bias": lambda: fr.gate(logits, 2, bias=x),
    "gate: k_per_token": lambda: fr.gate(logits, 2, k_per_token=experts),
    "gate: min_k": lambda: fr.gate(logits, 2, min_k=3),
    "expert_choice: capacity": lambda: fr.expert_choice(logits, 0),
    "expert_choice: scope_ids": lambda: fr.expert_choice(
        logits, 2, scope_ids=strange_scopes, num_scopes=2
    ),
    "plan_dispatch: experts": lambda: fr.plan_dispatch(strange_ids, E),
    "plan_dispatch: scope_ids": lambda: fr.plan_dispatch(
        experts, E, capacity=2, scope_ids=strange_scopes, num_scopes=2
    ),
    "plan_dispatch: max_rows": lambda: fr.plan_dispatch(experts, E, max_rows=5),
    "plan_dispatch: capacity": lambda: fr.plan_dispatch(experts, E, capacity=0),
    "permute: x": lambda: fr.permute(rows, plan),
    "permute: plan": lambda: fr.permute(x, other_rows),
    "unpermute: plan.slot_to_row": lambda: fr.unpermute(rows, other_slots),
    "unpermute: weights": lambda: fr.unpermute(rows, plan, logits),
    "grouped_mm: offsets": lambda: fr.grouped_mm(rows, w_up, falling),
    "grouped_mm: x": lambda: fr.grouped_mm(rows, w_down, plan.offsets),
    "moe_mlp: w_up": lambda: fr.moe_mlp(x, routing, w_down, w_down),
    "moe_mlp: plan must have offsets": lambda: fr.moe_mlp(
        x, routing, w_up, w_down, plan=other_offsets
    ),
    "moe_mlp: plan must have slot_to_row and row_to_slot": lambda: fr.moe_mlp(
        x, routing, w_up, w_down, plan=other_rows
    ),
    "moe_mlp: plan must have slot_to_row in": lambda: fr.moe_mlp(
        x, routing, w_up, w_down, plan=other_slots
    ),
    "plan_dispatch: experts must": lambda: fr.moe_mlp(x, (strange_ids, weights), w_up, w_down),
    "softmax: dim": lambda: fr.softmax(logits, dim=3),
    "softmax_topk: k": lambda: fr.softmax_topk(logits, 9),
    "assign_balanced: scores": lambda: fr.assign_balanced(logits[:9]),
    "transport: method": lambda: fr.transport(logits, "sinkhorn2", iters=3),
    "transport: iters": lambda: fr.transport(logits, "sinkhorn", iters=0),
    "reroute: experts": lambda: fr.reroute((strange_ids, weights), E, K, 4),
}


def allocated(call) -> int:
    """Bytes of memory that tensors took during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in recorded.key_averages())


@pytest.mark.cpu_only
@pytest.mark.parametrize("message", CALLS)
def test_nothing_is_allocated(message):
    def call() -> None:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{message}"):
            CALLS[message]()

    assert allocated(call) == 0


@pytest.mark.cpu_only
def test_the_measure_sees_what_right_input_takes():
    assert allocated(lambda: fr.gate(logits, K)) == 2 * T * K * 4 + E * 4
