"""Memory of the expert layer: scratch keeps to its formula; meta tensors have none."""

from __future__ import annotations

import os
import threading
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


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# The address sanitizer holds freed memory back, so every process grows under it.
keeps_freed_memory = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer keeps freed memory"
)


@keeps_freed_memory
def test_scratch_does_not_grow() -> None:
    case = make(64, 256, 128, 4, torch.float32)
    for _ in range(3):
        train(case)
    before = resident()
    for _ in range(60):
        train(case)
    assert resident() - before < 8 * 2**20


@keeps_freed_memory
def test_ten_thousand_calls_do_not_grow() -> None:
    x, ids, weights, up, down = make(2, 16, 8, 3, torch.float32)
    for _ in range(100):
        fr.moe_mlp(x, (ids, weights), up, down)
    before = resident()
    for _ in range(10_000):
        fr.moe_mlp(x, (ids, weights), up, down)
    assert resident() - before < 4 * 2**20


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
    allowed = rows * per_row + torch.get_num_threads() * (6 << 20) + 4 * experts + hidden * size
    assert rows * per_row <= held[0] <= allowed + (14 << 20)  # every buffer ends on a huge page


def test_meta_tensors_give_shapes():
    x, ids, weights, up, down = (value.to("meta") for value in make(6, 16, 8, 3, torch.bfloat16))
    y = fr.moe_mlp(x, [ids, weights], up, down)
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, torch.bfloat16)


def test_a_pair_may_be_a_list():
    x, ids, weights, up, down = make(6, 16, 8, 3, torch.float32)
    listed = fr.moe_mlp(x, [ids, weights], up, down)
    assert torch.equal(listed, fr.moe_mlp(x, (ids, weights), up, down))
