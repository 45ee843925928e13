"""What a call of the backend costs beyond the operator it runs, without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from fastmoe_route.integrations.transformers import experts_forward

from clients.models import make_experts, routing

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
    run, threads = torch.ops.fastmoe_route.moe_mlp_routed_forward, torch.get_num_threads()
    w_up, w_down = module.gate_up_proj.transpose(1, 2), module.down_proj.transpose(1, 2)
    arguments = (x, index, weights, w_up, w_down, None, None, 0, False, False, True)

    def bare() -> None:
        run(*arguments)

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
