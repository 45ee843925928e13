"""Cases that move slots and rows: plan_dispatch, permute, unpermute."""

from __future__ import annotations

import torch
from torch import Tensor

import fastmoe_route as fr
from fastmoe_route.bench import baselines
from fastmoe_route.bench.case import Case, Function, backward, compare
from fastmoe_route.bench.check import TOLERANCE, Finding, exact
from fastmoe_route.bench.machine import Limits
from fastmoe_route.bench.shapes import Row
from fastmoe_route.bench.timing import Call
from fastmoe_route.bench.workload import (
    Tokens,
    copies_for,
    make_tokens,
    random_tensor,
    require_memory,
)


def plan_case(row: Row, limits: Limits, seed: int) -> Case:
    """The stable counting sort beside argsort."""
    shape, slots = row.shape, row.tokens * row.shape.top_k
    num_bytes = 3 * slots * 4 + 3 * shape.num_experts * 4
    copies, cached = copies_for(num_bytes, limits.cached_set, limits.rotation_bytes)
    first = make_tokens(shape, row.tokens, torch.float32, seed).experts
    inputs = [first, *(first.clone() for _ in range(copies - 1))]
    wide_inputs = [experts.long() for experts in inputs]

    def check() -> list[Finding]:
        plan = fr.plan_dispatch(first, shape.num_experts)
        wanted = baselines.sort_slots(first.long(), shape.num_experts)
        return [
            exact("offsets", plan.offsets, wanted.offsets),
            exact("row_to_slot", plan.row_to_slot, wanted.order.int()),
            exact("slot_to_row", plan.slot_to_row.flatten(), wanted.row_of_slot.int()),
            exact("kept", plan.kept, wanted.offsets.diff()),
        ]

    return Case(
        row,
        {
            "fastmoe_route": lambda i: fr.plan_dispatch(inputs[i % copies], shape.num_experts),
            "argsort + bincount": lambda i: baselines.sort_slots(
                wide_inputs[i % copies], shape.num_experts
            ),
        },
        num_bytes,
        0.0,
        copies,
        cached,
        check,
    )


def _movers(row: Row, tokens: Tokens) -> tuple[Function, Function]:
    """Ours and the plain form of a row's op, `(rows, weights) -> rows`; the plan is given."""
    num_experts = row.shape.num_experts
    plan = fr.plan_dispatch(tokens.experts, num_experts)
    slots = baselines.sort_slots(tokens.experts.long(), num_experts)
    if row.op == "permute":
        return lambda x, w: fr.permute(x, plan), lambda x, w: baselines.gather_rows(x, slots)
    return (
        lambda x, w: fr.unpermute(x, plan, w),
        lambda x, w: baselines.combine_rows(x, w, slots, row.tokens),
    )


def _copy(row: Row, dtype: torch.dtype, num_bytes: int, copies: int) -> Call:
    """The yardstick: `copy_` that reads and writes as many bytes together."""
    half = num_bytes // 2 // dtype.itemsize
    require_memory(2 * copies * half * dtype.itemsize, str(row))
    sources, targets = ([torch.ones(half, dtype=dtype) for _ in range(copies)] for _ in range(2))
    return lambda i: targets[i % copies].copy_(sources[i % copies])


def move_case(row: Row, limits: Limits, seed: int) -> Case:
    """permute and unpermute: their plan is given, rows move."""
    shape = row.shape
    dtype: torch.dtype = getattr(torch, row.dtype)
    num_rows = row.tokens * shape.top_k
    row_bytes = shape.hidden * dtype.itemsize
    is_permute = row.op == "permute"
    passes = 2 if row.training else 1
    num_bytes = (row.tokens + num_rows) * row_bytes * passes
    if row.training and not is_permute:
        num_bytes += num_rows * row_bytes  # the rows once more, for the gradient of the weights
    copies, cached = copies_for(num_bytes, limits.cached_set, limits.rotation_bytes)
    tokens = make_tokens(shape, row.tokens, dtype, seed)
    weights, (ours, plain) = tokens.weights, _movers(row, tokens)
    in_rows, out_rows = (row.tokens, num_rows) if is_permute else (num_rows, row.tokens)
    require_memory((copies + 6) * in_rows * row_bytes, str(row))
    first = random_tensor((in_rows, shape.hidden), dtype, seed + 2, 1.0)
    inputs = [first, *(first.clone() for _ in range(copies - 1))]
    grad = random_tensor((out_rows, shape.hidden), dtype, seed + 3, 1.0)

    def run(function: Function, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        if not row.training:
            return (function(x, weights),)
        leaves = [x.detach().requires_grad_()]
        if not is_permute:
            wide = torch.promote_types(weights.dtype, x.dtype)
            leaves.append(weights.detach().to(wide).requires_grad_())
        out = function(leaves[0], leaves[-1])
        return backward(out, leaves, g)

    def check() -> list[Finding]:
        got = run(ours, first, grad)
        theirs = run(plain, first, grad)
        if is_permute and not row.training:
            return [exact("rows", got[0], theirs[0])]
        wanted = run(plain, first.double(), grad.double())
        names = ("values",) if not row.training else ("gradient", "gradient of weights")
        findings = []
        for name, g, t, w in zip(names, got, theirs, wanted, strict=False):
            findings += compare(name, g, t, w, TOLERANCE[dtype])
        return findings

    return Case(
        row,
        {
            "fastmoe_route": lambda i: run(ours, inputs[i % copies], grad),
            "index_select" if is_permute else "index_add_": lambda i: run(
                plain, inputs[i % copies], grad
            ),
        },
        num_bytes,
        0.0 if is_permute else 2.0 * num_rows * shape.hidden,
        copies,
        cached,
        check,
        written=(in_rows + out_rows if row.training else out_rows) * row_bytes,
        yardsticks={"copy_ of as many bytes": _copy(row, dtype, num_bytes, copies)},
    )
