"""What the CUDA kernels do where those of the processor raise: they look at no tensor on the host.

Run by the vm backend; `make test` starts that once for this file, where the vm has been built.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import cuda_backend
import fastmoe_route as fr
import pytest
import torch
import vm_backend
from fastmoe_route import DispatchPlan, reference
from tolerance import assert_exact


@pytest.fixture
def on_device(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--backend") == "cpu":
        pytest.skip("runs in the PTX virtual machine: make test-cuda-vm")


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--backend") != "vm":
        pytest.skip("the engine of the PTX virtual machine counts: make test-cuda-vm")


def assert_same_plan(actual: DispatchPlan, expected: DispatchPlan) -> None:
    for mine, wanted in zip(actual, expected, strict=True):
        assert_exact(mine, wanted)


def test_these_tests_run_in_the_virtual_machine(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--backend") != "cpu":
        pytest.skip("they do")
    if not (vm_backend.folder() / "fastmoe_route_vm.so").exists():
        pytest.skip("the PTX virtual machine is not built: make test-cuda-vm, with nvcc on PATH")
    command = [sys.executable, "-m", "pytest", "--backend", "vm", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", __file__], capture_output=True, text=True, cwd=vm_backend.ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stray", [-2, 8, 9, 2**31 - 1, -(2**31), 2**32 + 3, -(2**63)])
@pytest.mark.parametrize("capacity", [None, 3])
def test_stray_experts_are_none(on_device: None, stray: int, capacity: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    experts = torch.randint(-1, 8, (70, 3), generator=generator)
    clean = experts.clone()
    experts[5, 1] = experts[69, 2] = stray
    clean[5, 1] = clean[69, 2] = -1
    assert_same_plan(
        fr.plan_dispatch(experts, 8, capacity=capacity),
        reference.plan_dispatch(clean, 8, capacity=capacity),
    )


@pytest.mark.parametrize("stray", [-1, 2, 2**31 - 1, -(2**31)])
def test_tokens_of_stray_scopes_are_none(on_device: None, stray: int) -> None:
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]])
    scopes = torch.tensor([0, stray, 1], dtype=torch.int32)
    clean = experts.clone()
    clean[1] = -1
    options = {"capacity": 1, "num_scopes": 2}
    assert_same_plan(
        fr.plan_dispatch(experts, 2, scope_ids=scopes, **options),
        reference.plan_dispatch(clean, 2, scope_ids=scopes.clamp(0, 1), **options),
    )


def test_highest_slots_give_way_to_max_rows(on_device: None) -> None:
    experts = torch.tensor([[0, 2], [2, -1], [2, 0]])
    plan = fr.plan_dispatch(experts, 3, max_rows=3)
    assert plan.slot_to_row.tolist() == [[0, 1], [2, -1], [-1, -1]]
    assert plan.kept.tolist() == [1, 0, 2]
    assert plan.dropped.tolist() == [1, 0, 1]
    assert plan.offsets.tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("stray", [-2, 6, 2**31 - 1, -(2**31)])
def test_maps_that_disagree_touch_nothing_outside(on_device: None, stray: int) -> None:
    plan = fr.plan_dispatch(torch.tensor([[0, 2], [2, -1], [2, 0]]), 3)
    x = torch.arange(12.0).reshape(3, 4)
    for name in ("slot_to_row", "row_to_slot"):
        spoiled = getattr(plan, name).clone()
        spoiled.view(-1)[0] = stray
        rows = fr.permute(x, plan._replace(**{name: spoiled}))
        # The row that lost its slot holds zeros, or the token it still names; nothing else moves.
        wanted = reference.permute(x, plan)
        assert_exact(rows[1:], wanted[1:])
        assert rows[0].tolist() in ([0.0] * 4, wanted[0].tolist())


def test_trip_to_a_gpu_keeps_strides_and_writes_back() -> None:
    """The backend `cuda` of the tests, with the processor for the GPU."""
    base = torch.arange(24.0).reshape(4, 6)
    view = base[1:, 1::2]
    seen = cuda_backend.moved(view, "cpu")
    assert (seen.stride(), seen.storage_offset()) == (view.stride(), view.storage_offset())
    assert seen.data_ptr() != view.data_ptr()
    assert torch.equal(seen, view)
    wanted = base.clone()
    wanted[1:, 1::2] += 1
    cuda_backend.through(torch.ops.aten.add_.Tensor, "cpu")(view, torch.tensor(1.0))
    assert torch.equal(base, wanted)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "most"),
    [
        (8, 2, 22),
        (16, 4, 48),
        (64, 8, 290),
        (64, 16, 400),
        (128, 8, 345),
        (256, 8, 350),
        (256, 32, 950),
        (4096, 64, 30_000),
    ],
)
def test_a_row_of_the_gate_takes_few_instructions(
    counted: None, num_experts: int, top_k: int, most: int, normalize: bool
) -> None:
    """Warp instructions of PTX a row, what a launch sets up included, as the engine counts them.

    K picks took 6600 of 256 logits and K = 32, and 99 000 of 4096 and K = 64.
    """
    num_tokens = 512 if num_experts <= 256 else 16
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
    before = vm_backend.engine().instructions()
    fr.gate(logits, top_k, normalize=normalize)
    assert (vm_backend.engine().instructions() - before) / num_tokens <= most


@pytest.mark.parametrize("stray", [-2, 3, 2**31 - 1, -(2**31), 2**32 + 1])
@pytest.mark.parametrize("options", [{}, {"fill": "any"}, {"drop_policy": "score"}])
def test_reroute_takes_stray_candidates_for_none(
    on_device: None, stray: int, options: dict
) -> None:
    experts = torch.tensor([[0, 1, 2], [1, stray, 0], [stray, 0, 1], [0, 2, stray]])
    clean = torch.where(experts == stray, -1, experts)
    weights = torch.tensor([[0.5, 0.3, 0.2]]).repeat(4, 1)
    case = {"num_experts": 3, "top_k": 1, "capacity": 1, **options}
    for got, wanted in zip(
        fr.reroute((experts, weights), **case)[:3],
        reference.reroute((clean, weights), **case)[:3],
        strict=True,
    ):
        assert_exact(got, wanted)
    scopes = torch.tensor([0, 5, -1, 1], dtype=torch.int32)
    clean[1:3] = -1
    scoped = {"num_scopes": 2, **case}
    for got, wanted in zip(
        fr.reroute((experts, weights), scope_ids=scopes, **scoped)[:3],
        reference.reroute((clean, weights), scope_ids=scopes.clamp(0, 1), **scoped)[:3],
        strict=True,
    ):
        assert_exact(got, wanted)


# ---- launches and memory traffic, as the engine counts them --------------------------------------


def launches_of(call: Callable[[], object]) -> int:
    """How many kernels a call launches."""
    before = sum(vm_backend.engine().launches().values())
    call()
    return sum(vm_backend.engine().launches().values()) - before


def traffic_of(call: Callable[[], object]) -> dict[str, int]:
    """Requests (warp instructions) and 32-byte sectors of global memory of a call."""
    engine = vm_backend.engine()
    engine.set_options(counts=True)
    engine.clear_counters()
    call()
    engine.set_options(counts=False)
    return dict(engine.counters())


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 8), (70, 128), (4096, 64), (60, 512)])
def test_a_plan_is_two_launches_at_most(
    counted: None, num_tokens: int, num_experts: int, id_dtype: torch.dtype
) -> None:
    """Without a limit that can bind; the sizes go from one token to many tiles of slots."""
    wanted = 1 if num_tokens * 8 <= 2048 else 2
    generator = torch.Generator().manual_seed(2)
    experts = torch.randint(-1, num_experts, (num_tokens, 8), generator=generator).to(id_dtype)
    for options in ({}, {"align": 16}, {"capacity": num_tokens * 8}):
        assert launches_of(lambda o=options: fr.plan_dispatch(experts, num_experts, **o)) == wanted


def test_rows_move_in_one_launch_each(counted: None) -> None:
    """Padding and the gradient of the weights included."""
    plan = fr.plan_dispatch(torch.arange(30).reshape(10, 3) % 4, 4, align=8)
    x, weights = torch.randn(10, 64), torch.rand(10, 3).requires_grad_()
    rows = fr.permute(x, plan).requires_grad_()
    assert launches_of(lambda: fr.permute(x, plan)) == 1
    y = fr.unpermute(rows, plan, weights)
    assert launches_of(lambda: fr.unpermute(rows, plan, weights)) == 1
    assert launches_of(lambda: torch.autograd.grad(y.sum(), (rows, weights))) == 1


@pytest.mark.parametrize("op", ["permute", "unpermute", "unpermute_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_cost_the_sectors_they_fill(counted: None, op: str, dtype: torch.dtype) -> None:
    """Rows go 16 bytes a lane: 16 sectors a request, and no byte of a row is moved twice.

    Rows of 2048 bytes beside rows of 1024: what is more is the rows' own, but for the maps and
    weights that unpermute reads once more for every 512 bytes, a sector to each request.
    """
    num_tokens, top_k, narrow = 40, 4, 1024
    generator = torch.Generator().manual_seed(3)
    experts = torch.rand(num_tokens, 8, generator=generator).argsort(1)[:, :top_k]
    plan = fr.plan_dispatch(experts, 8)
    weights = torch.rand(num_tokens, top_k, generator=generator)

    def traffic(row_bytes: int) -> dict[str, int]:
        hidden = row_bytes // dtype.itemsize
        x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
        rows = fr.permute(x, plan)
        maps = (plan.row_to_slot, plan.slot_to_row)
        ops = torch.ops.fastmoe_route
        calls = {
            "permute": lambda: fr.permute(x, plan),
            "unpermute": lambda: fr.unpermute(rows, plan, weights),
            "unpermute_backward": lambda: ops.unpermute_backward(
                x, rows, weights, *maps, True, True
            ),
        }
        return traffic_of(calls[op])

    less, more = traffic(narrow), traffic(2 * narrow)
    num_slots = num_tokens * top_k
    # permute reads tokens and writes rows, unpermute the reverse; the backward reads, for every
    # slot, its token's gradient and its row.
    loaded = {"permute": num_tokens, "unpermute": num_slots, "unpermute_backward": 2 * num_slots}
    stored = {"permute": num_slots, "unpermute": num_tokens, "unpermute_backward": num_slots}
    for kind, num_rows in (("load", loaded[op]), ("store", stored[op])):
        requests, sectors = (
            more[f"global_{kind}_{unit}"] - less[f"global_{kind}_{unit}"]
            for unit in ("requests", "sectors")
        )
        ideal = num_rows * narrow // 32
        others = requests - ideal // 16
        assert others >= 0, kind
        assert others == 0 or (op == "unpermute" and kind == "load"), kind
        assert ideal <= sectors - others <= 1.1 * ideal, kind
