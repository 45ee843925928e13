"""Memory of the expert layer: scratch and kept gradients keep to their formulas; meta tensors
have none."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route.bench.machine import library_info
from torch import Tensor


def make(
    num_tokens: int, hidden: int, width: int, experts: int, dtype: torch.dtype
) -> list[Tensor]:
    """x, experts, weights, w_up, w_down of a SwiGLU layer with two slots per token."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights, ids = torch.rand(num_tokens, experts, generator=generator).topk(2, 1)
    up, down = normal(experts, 2 * width, hidden), normal(experts, hidden, width)
    return [normal(num_tokens, hidden), ids, weights, up.transpose(1, 2), down.transpose(1, 2)]


def train(case: list[Tensor]) -> None:
    x, ids, weights, up, down = case
    leaves = [value.detach().requires_grad_() for value in (x, weights, up, down)]
    y = fr.moe_mlp(leaves[0], (ids, leaves[1]), *leaves[2:])
    torch.autograd.grad(y, leaves, torch.ones_like(y))


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_LIBC = ctypes.CDLL(None)
counts_allocations = pytest.mark.skipif(
    not hasattr(_LIBC, "mallinfo2") or "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="only glibc 2.33 or newer counts what is allocated; a sanitizer has its own malloc",
)


def usual_growth(call: Callable[[], object], calls: int) -> int:
    """By how many bytes so many calls increase what is allocated: the median of five runs of them.

    What leaks grows in every run. A thread gets its scratch with the first task that it is in time
    for, which on a busy machine is any. Resident memory would tell less: it moves by megabytes when
    the system joins pages, and a leak into what other tests have freed does not show in it.
    """
    count = _LIBC.mallinfo2
    count.restype = MallocInfo
    growth = []
    for _ in range(5):
        before = count()
        for _ in range(calls):
            call()
        after = count()
        growth.append(after.uordblks + after.hblkhd - before.uordblks - before.hblkhd)
    return sorted(growth)[2]


@counts_allocations
def test_scratch_does_not_grow() -> None:
    case = make(64, 256, 128, 4, torch.float32)
    held = kept()
    assert usual_growth(lambda: train(case), 8) < 8 * 256  # the least tensor, ids, has 1 KB
    assert kept() == held  # which is mapped, not allocated


@counts_allocations
def test_ten_thousand_calls_do_not_grow() -> None:
    x, ids, weights, up, down = make(2, 16, 8, 3, torch.float32)
    assert usual_growth(lambda: fr.moe_mlp(x, (ids, weights), up, down), 2000) < 2000 * 8


@counts_allocations
def test_growth_is_seen() -> None:
    held = []
    assert usual_growth(lambda: held.append(torch.ones(64)), 8) >= 8 * 256


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_keeps_to_its_formula(dtype: torch.dtype, training: bool) -> None:
    """The formula of docs/experts.md. A new thread has no scratch yet."""
    num_tokens, hidden, inter, experts = 600, 256, 1500, 4
    case = make(num_tokens, hidden, inter, experts, dtype)
    held = []

    def run() -> None:
        if training:
            train(case)
        else:
            x, ids, weights, up, down = case
            fr.moe_mlp(x, (ids, weights), up, down)
        held.append(int(library_info()["scratch_bytes"]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    rows, size = num_tokens * 2, dtype.itemsize
    per_row = inter * size + 4 * hidden
    if training:
        per_row += 2 * inter * size + 4 * (-(-inter // 64)) + 40
    allowed = rows * per_row + torch.get_num_threads() * (7 << 20) + 4 * experts + hidden * size
    assert rows * per_row <= held[0] <= allowed + (14 << 20)  # every buffer ends on a huge page


def test_meta_tensors_give_shapes():
    x, ids, weights, up, down = (value.to("meta") for value in make(6, 16, 8, 3, torch.bfloat16))
    y = fr.moe_mlp(x, [ids, weights], up, down)
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, torch.bfloat16)


def test_a_pair_may_be_a_list():
    x, ids, weights, up, down = make(6, 16, 8, 3, torch.float32)
    listed = fr.moe_mlp(x, [ids, weights], up, down)
    assert torch.equal(listed, fr.moe_mlp(x, (ids, weights), up, down))


# ---- results that share memory through time (csrc/common/kept_memory.h) ------------------------

MEGABYTE = 1 << 20
# torch_from_blob came with torch 2.11; before, large gradients are fresh in every step.
_TORCH = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
keeps_memory = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(_TORCH, "torch_from_blob"),
    reason="torch cannot be told who takes memory back",
)


def kept() -> int:
    return int(library_info()["kept_bytes"])


def up_gradient(dtype: torch.dtype, hidden: int = 1024, width: int = 2048, seed: int = 0) -> Tensor:
    """The gradient `[8, width, hidden]` of an up projection, 64 MB in float32; expert 2 is idle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, hidden, generator=generator).to(dtype)
    grad = torch.randn(40, width, generator=generator).to(dtype)
    offsets = torch.tensor([0, 7, 8, 8, 20, 21, 33, 37, 40], dtype=torch.int32)
    return torch.ops.fastmoe_route.grouped_mm_wgrad(x, grad, offsets, True, True, False)[0]


@keeps_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_lies_where_the_last_one_did(dtype: torch.dtype) -> None:
    first = up_gradient(dtype)
    address, values = first.data_ptr(), first.clone()
    assert address % (2 * MEGABYTE) == 0
    for _ in range(6):  # among them the one that moves to huge pages
        first.fill_(torch.nan)
        del first
        first = up_gradient(dtype)
        assert first.data_ptr() == address
        assert torch.equal(first, values)
        assert not first[2].any()


@keeps_memory
def test_gradients_that_live_keep_their_memory() -> None:
    held = [up_gradient(torch.float32, seed=seed) for seed in range(3)]
    copies = [value.clone() for value in held]
    assert len({value.data_ptr() for value in held}) == 3
    for i in (1, 0, 2):
        view = held[i][5]
        held[i] = up_gradient(torch.float32, seed=i)  # the view keeps the old memory in use
        assert held[i].untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
        assert torch.equal(view, copies[i][5])
        for value, copy in zip(held, copies, strict=True):
            assert torch.equal(value, copy)


@keeps_memory
def test_what_backward_needs_lies_where_it_did_before() -> None:
    x, ids, weights, up, down = make(1024, 8, 2048, 4, torch.float32)  # 32 MB of products
    plan = fr.plan_dispatch(ids, 4)
    maps = plan.offsets, plan.row_to_slot, plan.slot_to_row
    found = []
    for _ in range(3):
        op = torch.ops.fastmoe_route.moe_mlp
        products = op(x, weights, up, down, None, None, *maps, 0, False, False)[1]
        assert products.data_ptr() % (2 * MEGABYTE) == 0
        found.append((products.data_ptr(), products.double().sum().item()))
        products.fill_(torch.nan)
        del products
    assert found[0] == found[1] == found[2]


_COMES_AND_GOES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_expert_memory import MEGABYTE, kept, up_gradient

most = 0
for width in (1100, 2048, 1500, 2900, 1024, 2500):
    held = [up_gradient(torch.float32, width=width) for _ in range(2)]
    most = max(most, sum(-(-value.nbytes // (2 * MEGABYTE)) * 2 * MEGABYTE for value in held))
    del held
    assert kept() <= most, (width, kept(), most)
assert kept() > 32 * MEGABYTE
for _ in range(100):
    up_gradient(torch.bfloat16)
assert kept() == 32 * MEGABYTE, kept()
"""


@keeps_memory
def test_kept_memory_is_what_was_needed_at_once() -> None:
    """In a process of its own: the bound is the most it ever had in use."""
    command = [sys.executable, "-c", _COMES_AND_GOES, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@keeps_memory
def test_gradients_may_be_freed_by_any_thread() -> None:
    expected = up_gradient(torch.bfloat16)
    wrong = []

    def work() -> None:
        for _ in range(8):
            if not torch.equal(up_gradient(torch.bfloat16), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@keeps_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [1056, 1051])  # whole lines and none
def test_nothing_is_written_behind_a_gradient(dtype: torch.dtype, hidden: int) -> None:
    """Its block ends on a huge page; canaries lie between."""
    width = 2100 if dtype == torch.float32 else 4100
    first = up_gradient(dtype, hidden, width)
    expected = first.clone()
    end = first.data_ptr() + first.nbytes
    size = -end % (2 * MEGABYTE)
    assert size > 0
    for _ in range(3):
        ctypes.memset(end, 0x5A, size)
        address = first.data_ptr()
        del first
        first = up_gradient(dtype, hidden, width)
        assert first.data_ptr() == address
        assert torch.equal(first, expected)
        behind = ctypes.string_at(end, size)
        assert set(behind) <= {0x5A, 0}, "only the system may have cleared it"
