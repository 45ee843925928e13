"""What the CUDA kernels do where those of the processor raise: they look at no tensor on the host.

Run by the vm backend; `make test` starts that once for this file, where the vm has been built.
"""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.parametrize(("num_experts", "most"), [(64, 500), (128, 565), (256, 635)])
def test_a_row_of_the_gate_takes_few_instructions(
    on_device: None, request: pytest.FixtureRequest, num_experts: int, most: int
) -> None:
    """Warp instructions of PTX a row, what a launch sets up included, as the engine counts them."""
    if request.config.getoption("--backend") != "vm":
        pytest.skip("the engine counts them")
    logits = torch.randn(512, num_experts, generator=torch.Generator().manual_seed(0))
    before = vm_backend.engine().instructions()
    fr.gate(logits, 8)
    assert (vm_backend.engine().instructions() - before) / 512 <= most
