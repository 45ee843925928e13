"""Leaving out any barrier, fence or wait of a kernel turns a result or the engine's reports red.

Every place of the CUDA sources where threads are ordered is left out in turn, in the decoded
kernels, and a few calls of the op are run. What may be left out without harm is listed below,
each with the reason.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from engine_fixture import ROOT, engine

sys.path.insert(0, str(ROOT / "tests"))

import fastmoe_route as fr
import torch
import vm_backend
from fastmoe_route import reference

pytestmark = pytest.mark.mutants
SEEDS = (1, 2, 3)

# Parts of source lines, innermost place first, that order nothing in what is run here.
EQUIVALENT: dict[str, str] = {}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(actual.double(), expected.double(), rtol=2e-2, atol=2e-2)


def equal_plans(actual: tuple, expected: tuple) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def run_plan() -> None:
    for num_tokens, num_experts in ((700, 8), (400, 2500)):
        generator = torch.Generator().manual_seed(num_tokens)
        experts = torch.randint(-1, num_experts, (num_tokens, 2), generator=generator)
        weights = torch.rand(num_tokens, 2, generator=generator)
        for options in (
            {},
            {"align": 4, "capacity": 30},
            {"capacity": 30, "drop_policy": "score", "weights": weights},
        ):
            plan = fr.plan_dispatch(experts, num_experts, **options)
            equal_plans(plan, reference.plan_dispatch(experts, num_experts, **options))
    fr.plan_dispatch(experts, num_experts, max_rows=500)


def run_permute() -> None:
    experts = torch.randint(-1, 5, (60, 3), generator=torch.Generator().manual_seed(1))
    plan = fr.plan_dispatch(experts, 5, align=4)
    for width in (8, 33):
        x = random(60, width)
        rows = fr.permute(x, plan)
        assert torch.equal(rows, reference.permute(x, plan))
        weights = random(60, 3).requires_grad_()
        close(fr.unpermute(rows, plan, weights), reference.unpermute(rows, plan, weights))
        fr.unpermute(rows.requires_grad_(), plan, weights).sum().backward()


def run_softmax() -> None:
    for width in (200, 1500):
        for method in ("three_pass", "online"):
            x = random(9, width).requires_grad_()
            y = fr.softmax(x, method=method)
            close(y, torch.softmax(x, -1))
            y.square().sum().backward()


def run_gate() -> None:
    for num_experts, top_k in ((8, 2), (64, 6), (300, 8), (1500, 20)):
        logits = random(70, num_experts).requires_grad_()
        for options in (
            {"stats": True, "normalize": True},
            {"score": "sigmoid", "num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"},
        ):
            routing = fr.gate(logits, top_k, **options)
            expected = reference.gate(logits, top_k, **options)
            assert torch.equal(routing.experts, expected.experts)
            assert torch.equal(routing.demand, expected.demand)
            close(routing.weights, expected.weights)
            loss = routing.weights.square().sum()
            if routing.score_sum is not None:
                close(routing.score_sum, expected.score_sum)
                loss = loss + routing.score_sum.square().sum() + routing.logsumexp.sum()
            loss.backward()


def run_softmax_topk() -> None:
    for width, k in ((300, 4), (5000, 40)):
        x = random(3, width).requires_grad_()
        values, columns = fr.softmax_topk(x, k)
        wanted = torch.softmax(x, -1).topk(k)
        assert torch.equal(columns, wanted.indices)
        close(values, wanted.values)
        values.square().sum().backward()


def run_expert_choice() -> None:
    scores = random(300, 7).requires_grad_()
    scope_ids = (torch.arange(300) % 3).int()
    for scopes in ({}, {"scope_ids": scope_ids, "num_scopes": 3}):
        routing = fr.expert_choice(scores, 9, **scopes)
        assert torch.equal(routing.experts, reference.expert_choice(scores, 9, **scopes).experts)
        routing.weights.sum().backward()


def run_experts() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        experts = torch.randint(-1, 3, (70, 2), generator=torch.Generator().manual_seed(1))
        routing = (experts.int(), torch.rand(70, 2))
        x = (random(70, 72) / 8).to(dtype).requires_grad_()
        w_up = (random(3, 72, 144, seed=1) / 8).to(dtype).requires_grad_()
        w_down = (random(3, 72, 72, seed=2) / 8).to(dtype).requires_grad_()
        y = fr.moe_mlp(x, routing, w_up, w_down)
        close(y, reference.moe_mlp(x, routing, w_up, w_down))
        y.float().square().sum().backward()
        offsets = torch.tensor([0, 30, 30, 70], dtype=torch.int32)
        close(fr.grouped_mm(x, w_up, offsets), reference.grouped_mm(x, w_up, offsets))


RUNS: dict[str, Callable[[], None]] = {
    "plan_dispatch": run_plan,
    "permute": run_permute,
    "softmax_topk": run_softmax_topk,
    "softmax": run_softmax,
    "gate": run_gate,
    "gate_backward": run_gate,
    "expert_choice": run_expert_choice,
    "surplus": run_plan,
}


def run_of(line: str) -> Callable[[], None]:
    """What runs the kernel of a place: by the outermost of the source files it is inlined into."""
    files = re.findall(r"csrc/cuda/((?:gemm/)?\w+)\.cu\b", line)
    return RUNS.get(files[-1] if files else "", run_experts)


@cache
def sites() -> list[str]:
    vm_backend.load()
    found = {line for line, _ in engine().synchronisation() if "csrc/" in line}
    return sorted(found)


@pytest.fixture(autouse=True)
def whole_again() -> Iterator[None]:
    yield
    engine().leave_out("")


def is_red(run: Callable[[], None]) -> bool:
    for seed in SEEDS:
        vm_backend.start(seed)
        try:
            run()
        except (AssertionError, RuntimeError):
            return True
        if vm_backend.reports():
            return True
    return False


def test_without_a_mutant_all_is_green() -> None:
    sites()
    for run in {*RUNS.values(), run_experts}:
        vm_backend.start(1)
        run()
        assert vm_backend.reports() == []


def test_every_place_is_needed() -> None:
    survivors = []
    for line in sites():
        engine().set_options(most_instructions=3_000_000)
        engine().leave_out(line)
        if not is_red(run_of(line)) and not any(part in line for part in EQUIVALENT):
            survivors.append(line)
    count = f"{len(survivors)} of {len(sites())} places can be left out:"
    assert not survivors, "\n".join([count, *survivors])
