"""One rank of the tests of `fastmoe_route.distributed`: runs every check, writes down what failed.

python distributed_worker.py RANK SIZE FOLDER [BACKEND]

BACKEND is gloo, with everything on the CPU, or nccl, with the GPU of the same number for each rank.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import fastmoe_route as fr
import pytest
import torch
import torch.distributed as dist
from deferred import deferred
from fastmoe_route.distributed import ExchangeError, ExpertParallel

H, WIDTH, E, K = 16, 12, 8, 2
TOKENS = (7, 0, 12, 3)  # by rank; one has none

device = torch.device("cpu")
checks: dict[str, Callable[[], None]] = {}
needs_others: set[str] = set()  # checks that say nothing on a single rank


def check(function: Callable[[], None]) -> Callable[[], None]:
    checks[function.__name__] = function
    return function


def check_of_several(function: Callable[[], None]) -> Callable[[], None]:
    needs_others.add(function.__name__)
    return check(function)


def checks_of(size: int) -> list[str]:
    """The names of those that this many ranks run, in order."""
    last = [] if size == 1 else ["a_dead_rank_is_an_error"]
    return [name for name in checks if size > 1 or name not in needs_others] + last


def layer_of(**options) -> fr.nn.MoE:
    torch.manual_seed(0)
    return fr.nn.MoE(H, WIDTH, E, K, **options).to(device)


def tokens_of(rank: int, num_tokens: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    num_tokens = TOKENS[rank] if num_tokens is None else num_tokens
    return torch.randn(num_tokens, H, generator=generator).to(device)


def weight_of(rank: int, y: torch.Tensor) -> torch.Tensor:
    """What the loss multiplies the output with."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(rank)).to(device)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape, (got.shape, want.shape)
    error = (got - want).norm() / want.norm().clamp(min=1e-12)
    limit = 1e-6 if device.type == "cpu" else 1e-5
    assert not want.numel() or error <= limit, f"relative error {error}"


def step(layer: torch.nn.Module, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient of one rank's tokens; parameters keep their gradients."""
    x = tokens_of(rank).requires_grad_()
    y = layer(x)
    (y * weight_of(rank, y)).sum().backward()
    return y.detach(), x.grad


def shared_options() -> list[dict]:
    return [{}, {"num_shared_experts": 1, "bias": True}, {"router": "deepseek_v3"}]


@contextmanager
def refused(text: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    with pytest.raises(kind, match=re.escape(text)):
        yield


# ---- checks ------------------------------------------------------------------------------------


@check_of_several
def routers_learn_from_the_tokens_of_all_ranks() -> None:
    """The state after an update is that of one router which saw them all; counts all times 4."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for name in ("loss_free", "deepseek_v3", "kmeans", "adapt_dhm"):
        torch.manual_seed(5 + rank * (name == "kmeans"))
        own = fr.routers.build(name, H, E, 1).to(device).train()
        if name == "kmeans":
            own(tokens_of(rank, 9) if rank else tokens_of(rank, 0))  # rank 0 has placed nothing
            own.update()
        else:
            for buffer in own.buffers():
                dist.broadcast(buffer, 0)
            own.score.weight.data.copy_(tokens_of(9, E)) if hasattr(own, "score") else None
        whole = copy.deepcopy(own)
        own(tokens_of(rank))
        whole(torch.cat([tokens_of(other) for other in range(size)]))
        own.update()
        whole.update()
        before = own.state_dict()
        for key, value in whole.state_dict().items():
            assert torch.equal(value, before[key]) or float((value - before[key]).norm()) < 1e-5, (
                key
            )
        for key in ("bias", "centroids"):
            if key in before:
                everywhere = before[key].clone()
                dist.broadcast(everywhere, 0)
                assert torch.equal(everywhere, before[key]), (name, key)
        if name == "kmeans":
            assert own.has_agreed
            own.reset_parameters()
            assert not own.has_agreed


@check
def forward_and_backward_equal_one_machine() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for options in shared_options():
        single = layer_of(**options)
        parallel = ExpertParallel(layer_of(**options))
        y, x_grad = step(parallel, rank)
        for other in range(size):
            expected, expected_grad = step(single, other)
            if other == rank:
                close(y, expected)
                close(x_grad, expected_grad)
        share = parallel.expert_ids
        for name, p in parallel.experts.named_parameters():
            close(p.grad, dict(single.experts.named_parameters())[name].grad[share])
        parallel.reduce_gradients()
        for name, p in parallel.layer.named_parameters():
            expected = dict(single.named_parameters())[name].grad / size
            close(p.grad, expected[share] if name.startswith("experts") else expected)


@check
def training_equals_one_machine() -> None:
    size = dist.get_world_size()
    single, parallel = layer_of(), ExpertParallel(layer_of())
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (single, parallel)]
    for _ in range(3):
        for optimiser in optimisers:
            optimiser.zero_grad()
        for other in range(size):
            step(single, other)
        for p in single.parameters():
            p.grad /= size
        step(parallel, dist.get_rank())
        parallel.reduce_gradients()
        for optimiser in optimisers:
            optimiser.step()
    close(parallel.layer.router.score.weight, single.router.score.weight)
    for name, value in parallel.gather_experts().items():
        close(value, single.experts.state_dict()[name])


@check
def two_runs_have_the_same_bits() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        parallel = ExpertParallel(layer_of(num_shared_experts=1))
        y, x_grad = step(parallel, dist.get_rank())
        results.append([y, x_grad, *(p.grad for p in parallel.parameters() if p.grad is not None)])
    torch.set_num_threads(1)
    assert len(results[0]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@check
def one_rank_gets_everything() -> None:
    """All tokens choose experts of the last rank; the others compute nothing, and still finish."""
    rank, size = dist.get_rank(), dist.get_world_size()
    single = layer_of()
    with torch.no_grad():
        single.router.score.weight[: E - K] = 0
        single.router.score.weight[E - K :] = 50
    parallel = ExpertParallel(copy.deepcopy(single))
    x = tokens_of(rank).abs().requires_grad_()
    y = parallel(x)
    y.sum().backward()
    close(y.detach(), single(x).detach())
    if rank != size - 1:
        assert not parallel.experts.w_up.grad.any()
        assert parallel.volume.rows_received == 0
        assert parallel.volume.rows_sent == x.shape[0]
    else:
        assert parallel.volume.rows_received == sum(TOKENS[: size - 1])


@check
def volume_counts_distinct_ranks() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    parallel = ExpertParallel(layer_of())
    x = tokens_of(rank)
    experts = parallel.layer.router(x).routing.experts
    reached = [set((row // (E // size)).tolist()) for row in experts]
    rows = sum(len(ranks - {rank}) for ranks in reached)
    with torch.no_grad():
        parallel(x)
    volume = parallel.volume
    assert volume.rows_sent == rows, (volume, rows)
    assert volume.slots == x.shape[0] * K
    assert volume.rows_dropped == 0
    there, back = 4 * (H + K + K), 4 * H
    assert volume.bytes_sent == rows * there + volume.rows_received * back


@check
def placement_changes_places_and_not_results() -> None:
    size = dist.get_world_size()
    ranks = [(E - 1 - e) % size for e in range(E)]
    parallel = ExpertParallel(layer_of(), placement=ranks)
    assert parallel.expert_ids == [e for e in range(E) if ranks[e] == dist.get_rank()]
    rank = dist.get_rank()
    close(step(parallel, rank)[0], step(layer_of(), rank)[0])
    for name, value in parallel.gather_experts().items():
        assert torch.equal(value, layer_of().experts.state_dict()[name])


@check
def weights_are_drawn_later() -> None:
    size = dist.get_world_size()
    ranks = [(E - 1 - e) % size for e in range(E)]

    def make() -> ExpertParallel:
        return ExpertParallel(fr.nn.MoE(H, WIDTH, E, K), placement=ranks)

    later, now = deferred(make).to(device), make().to(device)
    for name, table in now.named_buffers():
        assert torch.equal(later.get_buffer(name), table), name
    assert all(bool(p.isfinite().all()) for p in later.parameters())
    step(later, dist.get_rank())


@check
def capacity_per_rank_drops_the_last_tokens() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    parallel = ExpertParallel(layer_of(), rank_capacity_factor=0.5)
    x = tokens_of(rank)
    y = parallel(x)
    capacity = fr.expert_capacity(x.shape[0], size, min(size, K), 0.5)
    experts = parallel.layer.router(x).routing.experts
    expected, room, dropped = layer_of()(x).detach().clone(), [capacity] * size, 0
    for t, row in enumerate(experts):
        for r in sorted(set((row // (E // size)).tolist())):
            if room[r] == 0:
                dropped += 1
                expected[t] = torch.nan
            else:
                room[r] -= 1
    assert parallel.volume.rows_dropped == dropped
    full = ~expected.isnan().any(1)
    close(y[full], expected[full])
    assert not torch.equal(y[~full], layer_of()(x)[~full]) or full.all()
    y.sum().backward()


@check
def bfloat16_and_autocast_run() -> None:
    rank = dist.get_rank()
    single = layer_of(dtype=torch.bfloat16)
    single.load_state_dict(layer_of().state_dict())  # random numbers need not be those of float32
    half = ExpertParallel(single)
    x = tokens_of(rank).bfloat16().requires_grad_()
    y = half(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    expected = layer_of()(tokens_of(rank))
    error = (y - expected).norm() / expected.norm()
    assert not y.numel() or error < 0.03, f"relative error {error}"
    full = ExpertParallel(layer_of())
    with torch.autocast(device.type, torch.bfloat16):
        y = full(tokens_of(rank))
    y.float().sum().backward()
    assert full.experts.w_up.grad.dtype == torch.float32


@check
def a_capacity_of_the_router_is_kept() -> None:
    rank = dist.get_rank()
    options = {"capacity_factor": 0.5, "num_shared_experts": 1}
    close(step(ExpertParallel(layer_of(**options)), rank)[0], step(layer_of(**options), rank)[0])


@check_of_several
def ranks_that_differ_are_named() -> None:
    rank = dist.get_rank()
    placement = [e % dist.get_world_size() for e in range(E)]
    if rank == 1:
        placement = placement[::-1]
    with refused("layer must be the same on every rank; placement is"):
        ExpertParallel(layer_of(), placement=placement)
    is_second = rank == 1
    for options, text in (
        ({"bias": is_second}, "experts.bias_up is"),
        ({"num_shared_experts": int(is_second)}, "shared.w_up is"),
        ({"activation": "geglu" if is_second else "swiglu"}, "activation is"),
        ({"dtype": torch.float64 if is_second else None}, "experts.w_up is"),
    ):
        with refused(f"layer must be the same on every rank; {text}"):
            ExpertParallel(layer_of(**options))


@check_of_several
def tokens_that_differ_are_named() -> None:
    """On every rank, before rows arrive as other numbers than were sent."""
    is_second = dist.get_rank() == 1
    parallel = ExpertParallel(layer_of())
    x = tokens_of(0).to(torch.float64 if is_second else torch.float32)
    with refused("tokens must be alike on every rank; the dtype is torch.float32 on rank 0, got"):
        parallel(x)
    x, text = tokens_of(0), "the dtype of autocast is None on rank 0, got torch.bfloat16 on rank 1"
    with torch.autocast(device.type, torch.bfloat16, enabled=is_second), refused(text):
        parallel(x)
    close(step(parallel, dist.get_rank())[0], step(layer_of(), dist.get_rank())[0])


@check_of_several
def a_gradient_that_one_rank_needs_is_exchanged_by_all() -> None:
    """Rank 1 has no tokens, and made an empty tensor of its own that asks for no gradient."""
    rank = dist.get_rank()
    for is_frozen in (False, True):
        parallel, single = ExpertParallel(layer_of()), layer_of()
        for router in (parallel.layer.router, single.router):
            router.requires_grad_(not is_frozen)
        if rank == 1:
            parallel(torch.zeros(0, H, device=device)).sum().backward()
            assert parallel.experts.w_up.grad is not None
        else:
            for got, expected in zip(step(parallel, rank), step(single, rank), strict=True):
                close(got, expected)


@check_of_several
def what_fsdp_shards_is_averaged_once() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, size = dist.get_rank(), dist.get_world_size()
    single, parallel = layer_of(), ExpertParallel(layer_of())
    own = set(parallel.experts.parameters())
    fully_shard(parallel, mesh=init_device_mesh(device.type, (size,)), ignored_params=own)
    for other in range(size):
        step(single, other)
    step(parallel, rank)
    parallel.reduce_gradients()
    close(
        parallel.layer.router.score.weight.grad.full_tensor(),
        single.router.score.weight.grad / size,
    )
    close(parallel.experts.w_up.grad, single.experts.w_up.grad[parallel.expert_ids] / size)


@check_of_several
def experts_that_do_not_divide_are_refused() -> None:
    torch.manual_seed(0)
    with refused("ranks divide; change num_experts, or run"):
        ExpertParallel(fr.nn.MoE(H, WIDTH, 9, 2))
    for placement, text in (
        ([0] * E, "experts on each of"),
        ([0] * 3, "a rank for each of 8 experts, got 3"),
    ):
        with refused(text):
            ExpertParallel(layer_of(), placement=placement)
    for placement, text in (
        ("near", "placement must be a Placement or a sequence of ranks, got 'near'"),
        ([0.5] * E, "placement must be an int, got 0.5"),
    ):
        with refused(text, TypeError):
            ExpertParallel(layer_of(), placement=placement)
    with refused("rank_capacity_factor must be a number or None, got '1'", TypeError):
        ExpertParallel(layer_of(), rank_capacity_factor="1")


@check
def methods_that_read_experts_are_refused() -> None:
    with refused("layer must have a router that needs no experts, which are on other ranks, got"):
        ExpertParallel(fr.nn.MoE(H, WIDTH, E, router="finedeep"))
    parallel = ExpertParallel(layer_of())
    router = parallel.layer.router
    router.mix = lambda x, routed, experts: experts.each(x)
    with refused("router must not look into the experts"):
        parallel(tokens_of(dist.get_rank()))


@check_of_several
def a_group_of_two_works_alone() -> None:
    alone, group = dist.new_group([0]), dist.new_group([0, 1])
    if dist.get_rank() > 0:
        with refused("process_group must have this process as a member, got rank"):
            ExpertParallel(layer_of(), alone)
    if dist.get_rank() > 1:
        return
    parallel = ExpertParallel(layer_of(), group)
    assert parallel.num_ranks == 2
    rank = dist.get_rank()
    close(step(parallel, rank)[0], step(layer_of(), rank)[0])


@check
def profile_names_the_exchanges() -> None:
    from torch.profiler import ProfilerActivity, profile

    parallel = ExpertParallel(layer_of())
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(parallel, dist.get_rank())
    names = {event.key for event in recorded.key_averages()}
    for name in ("tokens to experts", "gradients of results to tokens", "row counts"):
        assert f"fastmoe_route::{name}" in names, name


@check_of_several
def a_late_rank_is_an_error_within_the_timeout() -> None:
    """The last rank never arrives; the others are told which exchange, at the group's timeout."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=2))
    parallel = ExpertParallel(layer_of(), group)
    dist.barrier(group)
    if rank == size - 1:
        time.sleep(4)
        return
    expect_error(lambda: parallel(tokens_of(rank)), "row counts", within=3.5)


def expect_error(call: Callable[[], object], exchange: str, within: float) -> None:
    start = time.monotonic()
    text = f"exchange '{exchange}' failed on rank {dist.get_rank()} of {dist.get_world_size()}"
    with refused(text, ExchangeError):
        call()
    took = time.monotonic() - start
    within += 0 if device.type == "cpu" else 10  # NCCL looks at its clock now and then
    assert took <= within, f"the error came after {took:.1f} s"


def a_dead_rank_is_an_error(results: dict[str, str], write: Callable[[], None]) -> None:
    """Comes last: the last rank is killed, before a forward and before a backward pass."""
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(size)), timeout=timedelta(seconds=5)) for _ in range(2)]
    parallel, other = (ExpertParallel(layer_of(), group) for group in groups)
    parallel(tokens_of(rank)).sum().backward()
    loss = other(tokens_of(rank).requires_grad_()).sum()
    name = "a_dead_rank_is_an_error"
    results[name] = ""
    write()
    for group in groups:
        dist.barrier(group)
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        expect_error(lambda: parallel(tokens_of(rank)), "row counts", within=6)
        expect_error(loss.backward, "gradients of results to tokens", within=6)
    except (Exception, pytest.fail.Exception):
        results[name] = traceback.format_exc()
        write()


def main() -> None:
    global device
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    backend = sys.argv[4] if len(sys.argv) > 4 else "gloo"
    if backend == "nccl":
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
    )
    results: dict[str, str] = {}

    def write() -> None:
        (folder / f"rank{rank}.json").write_text(json.dumps(results))

    for name in [name for name in checks_of(size) if name in checks]:
        try:
            checks[name]()
            results[name] = ""
        except (Exception, pytest.fail.Exception):
            # Others may wait for this rank in an exchange: its end is an error there at once.
            results[name] = traceback.format_exc()
            write()
            os._exit(1)
    write()
    if size > 1:
        a_dead_rank_is_an_error(results, write)
    os._exit(0)  # the group is broken by design; nothing is left to say goodbye to


if __name__ == "__main__":
    main()
