"""Calls of permute and the expert ops for mutant_cases.py."""

from __future__ import annotations

import fastmoe_route as fr
import torch
from engine_fixture import engine
from fastmoe_route import reference
from mutant_checks import close, few_blocks, random


def permute(
    width: int,
    blocks: int,
    dtype: torch.dtype = torch.float32,
    *,
    of: str = "rows weights",
    has_weights: bool = True,
    top_k: int = 3,
) -> None:
    """The gradients are those of `of`."""
    ids = torch.randint(-1, 5, (60, top_k), generator=torch.Generator().manual_seed(1))
    made = fr.plan_dispatch(ids, 5, align=4)
    x = random(60, width).to(dtype)
    with few_blocks(blocks):
        rows = fr.permute(x, made)
        assert torch.equal(rows, reference.permute(x, made))
        leaves = {"rows": rows.clone()}
        if has_weights:
            leaves["weights"] = random(60, top_k).to(dtype)
        wanted_of = [leaves[name].requires_grad_() for name in of.split()
                     if name in leaves]  # fmt: skip
        expected = reference.unpermute(leaves["rows"], made, leaves.get("weights"))
        wanted = torch.autograd.grad(expected.square().sum(), wanted_of)
        y = fr.unpermute(leaves["rows"], made, leaves.get("weights"))
        grads = torch.autograd.grad(y.square().sum(), wanted_of)
    close(y, expected)
    for mine, theirs in zip(grads, wanted, strict=True):
        close(mine, theirs)


def experts(
    dtype: torch.dtype,
    has_bias: bool,
    blocks: int,
    width: int = 72,
    allows_tf32: bool = False,
    num_tokens: int = 70,
    *,
    activation: str = "swiglu",
    align: int = 1,
    trains: bool = True,
    has_holes: bool = True,
    **options: object,
) -> None:
    """The last token and the last expert take part, so that no row behind theirs is a tensor's."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1 if has_holes else 0, 3, (num_tokens, 2), generator=generator)
    ids[-1] = torch.tensor([2, 0])
    weights = torch.rand(num_tokens, 2, generator=torch.Generator().manual_seed(2))
    up = width * (2 if "glu" in activation else 1)
    leaves = [
        (random(num_tokens, width) / 8),
        (random(3, width, up, seed=1) / 8),
        (random(3, width, width, seed=2) / 8),
    ]
    if has_bias:
        leaves += [random(3, up, seed=3), random(3, width, seed=4)]
    leaves = [leaf.to(dtype).requires_grad_(trains) for leaf in leaves]
    weights.requires_grad_(trains)
    options["activation"] = activation
    if align > 1:
        options["plan"] = fr.plan_dispatch(ids, 3, align=align)

    def run(module: object) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        biases = {"bias_up": leaves[3], "bias_down": leaves[4]} if has_bias else {}
        chosen = biases | options
        if module is reference:
            chosen.pop("plan", None)
        y = module.moe_mlp(leaves[0], (ids.int(), weights), leaves[1], leaves[2], **chosen)
        if not trains:
            return y, ()
        return y, torch.autograd.grad(y.float().square().sum(), [*leaves, weights])

    expected, wanted = run(reference)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allows_tf32 else before)
    try:
        with few_blocks(blocks):
            y, grads = run(fr)
    finally:
        torch.set_float32_matmul_precision(before)
    close(y, expected)
    for mine, theirs in zip(grads, wanted, strict=True):
        close(mine / theirs.abs().max(), theirs / theirs.abs().max())


def rows_of_no_expert() -> None:
    """Offsets that end before the maps do: slots whose rows lie behind them have no expert."""
    ids = torch.randint(0, 3, (40, 2), generator=torch.Generator().manual_seed(3)).int()
    made = fr.plan_dispatch(ids, 3)
    clean = ids.masked_fill(ids == 2, -1)
    x, w_up, w_down = (
        random(40, 24) / 4,
        random(3, 24, 48, seed=1) / 4,
        random(3, 24, 24, seed=2) / 4,
    )
    bias_up, bias_down = random(3, 48, seed=3) / 4, random(3, 24, seed=4) / 4
    weights = torch.rand(40, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    short = made.offsets.clone()
    short[3] = short[2]
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w_up, w_down, bias_up, bias_down)]
        biases = {"bias_up": leaves[3], "bias_down": leaves[4]}
        expected = reference.moe_mlp(leaves[0], (clean, weights), *leaves[1:3], **biases)
        wanted = torch.autograd.grad(expected.float().square().sum(), [*leaves, weights])
        spoiled = made._replace(offsets=short)
        y = fr.moe_mlp(leaves[0], (ids, weights), *leaves[1:3], **biases, plan=spoiled)
        grads = torch.autograd.grad(y.float().square().sum(), [*leaves, weights])
        close(y, expected)
        for mine, theirs in zip(grads, wanted, strict=True):
            close(mine / theirs.abs().max(), theirs / theirs.abs().max())


def rows_of_stray_slots() -> None:
    """Rows that name slots that do not exist are padding, in every part of a tile."""
    ids = torch.randint(0, 2, (120, 2), generator=torch.Generator().manual_seed(3)).int()
    made = fr.plan_dispatch(ids, 2)
    weights = torch.rand(120, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    spoiled, clean = made.row_to_slot.clone(), ids.clone()
    for row, stray in zip(range(3, 110, 15), (240, -2, 2**31 - 1, -(2**31)) * 2, strict=True):
        clean.view(-1)[spoiled[row]] = -1
        spoiled[row] = stray
    plan = made._replace(row_to_slot=spoiled)
    x, w_up, w_down = random(120, 24), random(2, 24, 48, seed=1) / 4, random(2, 24, 24, seed=2) / 4
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [(t / 2).to(dtype).requires_grad_() for t in (x, w_up, w_down)]
        expected = reference.moe_mlp(leaves[0], (clean, weights), *leaves[1:])
        wanted = torch.autograd.grad(expected.float().square().sum(), [*leaves, weights])
        y = fr.moe_mlp(leaves[0], (ids, weights), *leaves[1:], plan=plan)
        grads = torch.autograd.grad(y.float().square().sum(), [*leaves, weights])
        close(y, expected)
        for mine, theirs in zip(grads, wanted, strict=True):
            close(mine / theirs.abs().max(), theirs / theirs.abs().max())


def preactivations_of_padding() -> None:
    """Rows without a slot are zeros in what the forward pass keeps."""
    ids = torch.randint(0, 3, (40, 2), generator=torch.Generator().manual_seed(3)).int()
    made = fr.plan_dispatch(ids, 3, align=16)
    weights = torch.rand(40, 2, generator=torch.Generator().manual_seed(2))
    for width in (17, 24):
        given = random(40, width), random(3, width, 2 * width), random(3, width, width)
        x, w_up, w_down = (t.bfloat16() for t in given)
        bias_up = random(3, 2 * width, seed=3).bfloat16()
        _, pre = torch.ops.fastmoe_route.moe_mlp(
            x, weights.requires_grad_(), w_up, w_down, bias_up, None, *made[:3], 0, False, False
        )
        assert bool((pre[made.row_to_slot < 0] == 0).all())
        assert bool((pre[made.row_to_slot >= 0] != 0).any(-1).all())


def biased_product() -> None:
    """The last group ends with the buffer, and its columns inside a warp."""
    offsets = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    x, w = random(20, 12).requires_grad_(), random(3, 12, 10, seed=1).requires_grad_()
    bias = random(3, 10, seed=2).requires_grad_()
    expected = reference.grouped_mm(x, w, offsets, bias=bias)
    wanted = torch.autograd.grad(expected.square().sum(), (x, w, bias))
    y = fr.grouped_mm(x, w, offsets, bias=bias)
    close(y, expected)
    for mine, theirs in zip(
        torch.autograd.grad(y.square().sum(), (x, w, bias)), wanted, strict=True
    ):
        close(mine / theirs.abs().max(), theirs / theirs.abs().max())


def many_groups(blocks: int) -> None:
    """More experts than the threads of the kernel that lays out the groups, some without rows."""
    counts = torch.arange(700) % 3
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    x = random(int(counts.sum()) + 5, 8).bfloat16().requires_grad_()
    w = random(700, 8, 8, seed=1).bfloat16().requires_grad_()
    bias = random(700, 8, seed=2).bfloat16().requires_grad_()
    expected = reference.grouped_mm(x, w, offsets, bias=bias)
    wanted = torch.autograd.grad(expected.float().square().sum(), (x, w, bias))
    with few_blocks(blocks):
        y = fr.grouped_mm(x, w, offsets, bias=bias)
        grads = torch.autograd.grad(y.float().square().sum(), (x, w, bias))
    close(y / 8, expected / 8)
    for mine, theirs in zip(grads, wanted, strict=True):
        close(mine / theirs.abs().max(), theirs / theirs.abs().max())


def native(blocks: int, num_experts: int) -> None:
    """The arrays of products for one architecture alone, and the zeros where they have no tiles."""
    counts = torch.arange(num_experts) % 3
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    engine().set_options(capability=90)
    x = random(int(counts.sum()) + 9, 8).bfloat16().requires_grad_()
    w = random(num_experts, 8, 16, seed=1).bfloat16().requires_grad_()
    expected = reference.grouped_mm(x, w, offsets)
    wanted = torch.autograd.grad(expected.float().square().sum(), (x, w))
    with few_blocks(blocks):
        y = fr.grouped_mm(x, w, offsets)
        grads = torch.autograd.grad(y.float().square().sum(), (x, w))
    engine().set_options(capability=80)
    close(y / 8, expected / 8)
    for mine, theirs in zip(grads, wanted, strict=True):
        close(mine / theirs.abs().max(), theirs / theirs.abs().max())
