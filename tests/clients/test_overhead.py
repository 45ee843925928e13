"""What a call of the backend costs beyond the two operators it runs, without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable

import fastmoe_route as fr
import torch
from fastmoe_route.integrations.transformers import experts_forward

from clients.models import E, make_experts, routing

LIMIT = 25e-6


def seconds(call: Callable[[], object], rounds: int = 15, calls: int = 150) -> float:
    """CPU time of one call, the least over rounds: a busy machine says nothing else."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            call()
        found.append((time.thread_time() - start) / calls)
    return min(found)


def test_python_overhead_of_a_layer_call():
    module = make_experts("OlmoeExperts")
    x, index, weights = routing(1)
    ops, threads = torch.ops.fastmoe_route, torch.get_num_threads()
    plan = fr.plan_dispatch(index, E)
    w_up, w_down = module.gate_up_proj.transpose(1, 2), module.down_proj.transpose(1, 2)
    maps = (plan.offsets, plan.row_to_slot, plan.slot_to_row)
    tensors = (x, weights, w_up, w_down, None, None)

    def bare() -> None:
        ops.plan_dispatch(index, E, 0, 0, None, None, 1, 1, -1, True)
        ops.moe_mlp_forward(*tensors, *maps, 0, False, False)

    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            overhead = min(
                seconds(lambda: experts_forward(module, x, index, weights)) - seconds(bare)
                for _ in range(3)
            )
    finally:
        torch.set_num_threads(threads)
    print(f"overhead of a call: {overhead * 1e6:.1f} us")
    assert 0 < overhead < LIMIT
