"""Experts over ranks: two processes on Gloo (with --large: one and four too) run every check.

Where there are GPUs, as many processes as there are run them on NCCL.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import fastmoe_route as fr
import pytest
import torch
from fastmoe_route.distributed import plan_placement

WORKER = Path(distributed_worker.__file__)
SECONDS = 90
GRACE = 8  # for the other ranks, once one has failed


def run_ranks(size: int, folder: Path, backend: str) -> list[dict[str, str]]:
    """What each rank wrote: by check, empty or a traceback. Ends soon after the first failure."""
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(size)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(size), str(folder), backend],
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]
    end = time.monotonic() + SECONDS
    while any(process.poll() is None for process in ranks) and time.monotonic() < end:
        if any(process.poll() for process in ranks):
            end = min(end, time.monotonic() + GRACE)
        time.sleep(0.02)
    for process, log in zip(ranks, logs, strict=True):
        process.kill()
        process.wait()
        log.close()
    found = []
    for rank in range(size):
        path = folder / f"rank{rank}.json"
        text = (folder / f"rank{rank}.log").read_text()[-3000:]
        found.append(json.loads(path.read_text()) if path.exists() else {"start": text or "killed"})
    return found


def run_every_check(size: int, folder: Path, backend: str) -> None:
    """One test, because processes are dear: a failure names its checks, ranks and tracebacks."""
    outcome = run_ranks(size, folder, backend)
    failures = {
        (name, rank): why
        for rank, results in enumerate(outcome)
        for name, why in results.items()
        if why
    }
    for rank, results in enumerate(outcome):
        missing = [name for name in distributed_worker.checks_of(size) if name not in results]
        if missing:
            failures[missing[0], rank] = "did not get there"
    text = "\n".join(f"---- {name}, rank {rank}:\n{why}" for (name, rank), why in failures.items())
    assert not failures, text
    assert len(outcome) == size


LARGE = pytest.mark.large


@pytest.mark.parametrize("size", [2, pytest.param(1, marks=LARGE), pytest.param(4, marks=LARGE)])
def test_every_check_on_every_rank(size, tmp_path):
    run_every_check(size, tmp_path, "gloo")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_every_check_on_nccl(tmp_path):
    run_every_check(min(torch.cuda.device_count(), 4), tmp_path, "nccl")


def test_without_a_process_group_the_way_out_is_named():
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        fr.distributed.ExpertParallel(fr.nn.MoE(8, 8, 2, 1))


GOODBYE = """
import os, sys
import torch
import torch.distributed as dist
import fastmoe_route as fr
from fastmoe_route.distributed import ExpertParallel

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
layer = ExpertParallel(fr.nn.MoE(8, 8, 4, 2))
layer(torch.randn(3, 8)).sum().backward()
assert "torch._dynamo" not in sys.modules, "a layer imports torch's compiler"
import torch.distributed.nn.functional as late  # an optimiser's first step imports it, for one

dist.destroy_process_group()
threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not [name for name in threads if "gloo" in name], threads
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_destroyed_group_leaves_no_thread(tmp_path):
    """One that is left may need Python while it shuts down, and then aborts the process."""
    command = [sys.executable, "-c", GOODBYE, str(tmp_path / "rendezvous")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- placement ---------------------------------------------------------------------------------


def trace_of_communities(num_tokens: int = 600, num_experts: int = 12) -> torch.Tensor:
    """Tokens take two experts of one of four scattered communities, some more often than others."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_experts, generator=generator).view(4, -1)
    weights = torch.tensor([1.0, 1.0, 2.0, 2.0])
    community = torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
    keys = torch.rand(num_tokens, order.shape[1], generator=generator)
    return order[community].gather(1, keys.topk(2, dim=1).indices)


@pytest.fixture(scope="module")
def scipy():
    return pytest.importorskip("scipy")


def test_placement_puts_together_what_is_chosen_together(scipy):
    trace = trace_of_communities()
    plan = plan_placement(trace, 12, 2, traffic_weight=0.7)
    assert sorted(plan.rank_of_expert.count(r) for r in range(2)) == [6, 6]
    assert plan.rows_moved < 0.75 * plan.rows_moved_before
    assert plan.max_load <= plan.max_load_before + 1e-9 or plan.max_load < 1.1
    counted = sum(len({plan.rank_of_expert[e] for e in row}) for row in trace.tolist())
    assert plan.rows_moved == round(counted / 2)


def test_placement_balances_load(scipy):
    demand = [40, 30, 20, 10, 5, 5, 5, 5]
    trace = torch.tensor([e for e, n in enumerate(demand) for _ in range(n)])[:, None]
    plan = plan_placement(trace, 8, 2, traffic_weight=0.0)
    assert plan.is_optimal
    loads = [sum(n for e, n in enumerate(demand) if plan.rank_of_expert[e] == r) for r in range(2)]
    assert max(loads) == 60
    assert plan.max_load == pytest.approx(1.0)
    assert plan.max_load_before == pytest.approx(100 / 60)


def test_placement_follows_the_tokens_home(scipy):
    trace = torch.tensor([[0], [1], [2], [3]]).repeat(10, 1)
    sources = torch.tensor([1, 1, 0, 0]).repeat(10)
    plan = plan_placement(trace, 4, 2, sources=sources)
    assert plan.rank_of_expert == (1, 1, 0, 0)
    assert (plan.rows_moved, plan.rows_moved_before) == (0, 40)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_placement_without_a_used_slot_is_the_default(num_tokens):
    plan = plan_placement(torch.full((num_tokens, 2), -1), 4, 2)
    assert plan.rank_of_expert == (0, 0, 1, 1)
    assert (plan.rows_moved, plan.max_load, plan.is_optimal) == (0, 0.0, True)


def test_placement_never_makes_it_worse(scipy):
    generator = torch.Generator().manual_seed(0)
    trace = torch.randint(-1, 6, (200, 3), generator=generator)
    for weight in (0.0, 0.5, 1.0):
        plan = plan_placement(trace, 6, 3, traffic_weight=weight, time_limit=2)
        before = (1 - weight) * plan.max_load_before + weight * plan.rows_moved_before / 600
        assert (1 - weight) * plan.max_load + weight * plan.rows_moved / 600 <= before + 1e-6
    assert plan_placement(trace[:0], 6, 3).rank_of_expert == (0, 0, 1, 1, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(3, 1, dtype=torch.long), 5, 2),
            "num_experts must be a multiple of num_ranks 2",
        ),
        ((torch.full((3, 1), 4), 4, 2), r"experts must be in \[-1, 4\), got 4 to 4"),
        ((torch.zeros(3, dtype=torch.long), 4, 2), "experts must have 2 dimensions"),
        ((torch.zeros(3, 1, dtype=torch.long), 4.0, 2), "num_experts must be an int, got 4.0"),
    ],
)
def test_placement_errors(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plan_placement(*arguments)
