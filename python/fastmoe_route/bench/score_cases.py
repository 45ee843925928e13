"""Cases whose input is rows of scores: softmax, softmax_topk, gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastmoe_route as fr
from fastmoe_route.bench import baselines
from fastmoe_route.bench.case import EXP_FLOPS, Case, Function, backward, compare
from fastmoe_route.bench.check import TOLERANCE, Finding, exact
from fastmoe_route.bench.machine import Limits
from fastmoe_route.bench.shapes import Row
from fastmoe_route.bench.timing import Call
from fastmoe_route.bench.workload import copies_for, random_tensor


def _row_case(
    row: Row,
    limits: Limits,
    seed: int,
    *,
    ours: Function,
    plain: dict[str, Function],
    exact_function: Function,
    columns: int,
    num_bytes: int,
    flops: float,
    grad_columns: int,
    ids: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
    variants: dict[str, Function] | None = None,
) -> Case:
    """Softmax-like ops: contenders, gradients and check from functions of the rows.

    `variants` are other forms of ours, timed beside it and no baseline.
    """
    dtype: torch.dtype = getattr(torch, row.dtype)
    copies, cached = copies_for(num_bytes, limits.cached_set, limits.rotation_bytes)
    first = random_tensor((row.tokens, columns), dtype, seed, 2.0)
    inputs = [first, *(first.clone() for _ in range(copies - 1))]
    sample = ours(first)
    grad = torch.randn(row.tokens, grad_columns).to(sample.dtype)

    def contender(function: Function) -> Call:
        if not row.training:
            return lambda i: function(inputs[i % copies])

        def step(i: int) -> object:
            x = inputs[i % copies].detach().requires_grad_()
            return backward(function(x), [x], grad)

        return step

    baseline = next(iter(plain.values()))

    def check() -> list[Finding]:
        findings = []
        if ids is not None:
            findings.append(exact("chosen columns", *(find(first) for find in ids)))
        tolerance = TOLERANCE[sample.dtype]
        if not row.training:
            wanted = exact_function(first.double())
            return findings + compare("values", ours(first), baseline(first), wanted, tolerance)

        def gradient(function: Function, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return backward(function(x), [x], grad.to(function(x).dtype))[0]

        wanted = gradient(exact_function, first.double())
        got, theirs = gradient(ours, first), gradient(baseline, first)
        return findings + compare("gradient", got, theirs, wanted, TOLERANCE[dtype])

    contenders = {"fastmoe_route": contender(ours)}
    contenders.update({name: contender(function) for name, function in plain.items()})
    for name, function in (variants or {}).items():
        contenders[f"fastmoe_route {name}"] = contender(function)
    return Case(
        row,
        contenders,
        num_bytes,
        flops,
        copies,
        cached,
        check,
        written=row.tokens * grad_columns * first.element_size(),
    )


# From this many columns on, the methods of softmax are timed beside each other.
METHOD_COLUMNS = 1 << 20


def softmax_case(row: Row, limits: Limits, seed: int) -> Case:
    """Softmax over the last dimension; forward into a given tensor, which calls write again."""
    columns = row.shape.num_experts
    elements = row.tokens * columns
    dtype: torch.dtype = getattr(torch, row.dtype)
    shape = (row.tokens, columns)
    ours_out, plain_out = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    def into(out: Tensor, x: Tensor) -> Tensor | None:
        return None if row.training or x.dtype != out.dtype else out

    def by_method(method: str) -> Function:
        return lambda x: fr.softmax(x, method=method, out=into(ours_out, x))

    variants = {}
    if columns >= METHOD_COLUMNS and not row.training:
        variants = {name: by_method(name) for name in ("three_pass", "online", "two_pass")}
    return _row_case(
        row,
        limits,
        seed,
        ours=by_method("auto"),
        plain={"torch.softmax": lambda x: torch.softmax(x, -1, out=into(plain_out, x))},
        exact_function=lambda x: torch.softmax(x, -1),
        columns=columns,
        num_bytes=(5 if row.training else 2) * elements * dtype.itemsize,
        flops=(EXP_FLOPS + 4 if row.training else EXP_FLOPS) * elements,
        grad_columns=columns,
        variants=variants,
    )


def softmax_topk_case(row: Row, limits: Limits, seed: int) -> Case:
    """The k best of wide rows."""
    columns, k = row.shape.num_experts, row.shape.top_k
    elements = row.tokens * columns
    size: int = getattr(torch, row.dtype).itemsize

    def falling(x: Tensor) -> Tensor:
        return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]

    def plain(x: Tensor) -> Tensor:
        return torch.softmax(x, -1).topk(k, -1).values

    return _row_case(
        row,
        limits,
        seed,
        ours=lambda x: fr.softmax_topk(x, k)[0],
        plain={"softmax + topk": plain},
        exact_function=lambda x: torch.softmax(x, -1).gather(1, falling(x)),
        columns=columns,
        num_bytes=(3 if row.training else 1) * elements * size + row.tokens * k * (size + 8),
        flops=EXP_FLOPS * elements,
        grad_columns=k,
        ids=(lambda x: fr.softmax_topk(x, k)[1], falling),
    )


class _Recipe(NamedTuple):
    """A gate: ours, in plain PyTorch, the experts that this chooses, and the exact weights."""

    ours: Callable[[Tensor], fr.Routing]
    plain: Function
    ids: Function
    exact: Function


def _softmax_recipe(k: int, has_stats: bool) -> _Recipe:
    """Softmax and renormalise, or softmax with statistics."""
    composition = baselines.gate_with_statistics if has_stats else baselines.gate_softmax

    def plain(x: Tensor) -> Tensor:
        weights: Tensor = composition(x, k)[0]
        return weights

    def ids(x: Tensor) -> Tensor:
        return x.sort(dim=-1, descending=True, stable=True).indices[:, :k].int()

    def exact_weights(x: Tensor) -> Tensor:
        chosen = torch.softmax(x, -1).gather(1, ids(x).long())
        return chosen if has_stats else chosen / chosen.sum(-1, keepdim=True)

    return _Recipe(
        lambda x: fr.gate(x, k, normalize=not has_stats, stats=has_stats), plain, ids, exact_weights
    )


def _dsv3_recipe(k: int, num_experts: int, seed: int) -> _Recipe:
    """DeepSeek-V3: sigmoid, a bias that only chooses, the four best of eight groups."""
    bias = 0.1 * torch.randn(num_experts, generator=torch.Generator().manual_seed(seed))

    def ours(x: Tensor) -> fr.Routing:
        return fr.gate(
            x, k, score="sigmoid", bias=bias, num_groups=8, topk_groups=4,
            group_score="top2_sum", normalize=True, scale=2.5,
        )  # fmt: skip

    def exact_weights(x: Tensor) -> Tensor:
        chosen = x.sigmoid().gather(1, baselines.gate_dsv3(x.float(), k, bias)[1])
        return chosen / chosen.sum(-1, keepdim=True) * 2.5

    return _Recipe(
        ours,
        lambda x: baselines.gate_dsv3(x, k, bias)[0],
        lambda x: baselines.gate_dsv3(x, k, bias)[1].int(),
        exact_weights,
    )


def gate_case(row: Row, limits: Limits, seed: int) -> Case:
    """Softmax and renormalise, softmax with statistics, or DeepSeek-V3's recipe."""
    columns, k, kind = row.shape.num_experts, row.shape.top_k, row.shape.gate
    elements = row.tokens * columns
    size: int = getattr(torch, row.dtype).itemsize
    is_dsv3, has_stats = kind == "dsv3", kind == "stats"
    recipe = _dsv3_recipe(k, columns, seed) if is_dsv3 else _softmax_recipe(k, has_stats)
    variants: dict[str, Function] = {}
    if has_stats:
        variants["without statistics"] = lambda x: fr.gate(x, k).weights
    return _row_case(
        row,
        limits,
        seed,
        ours=lambda x: recipe.ours(x).weights,
        plain={"plain": recipe.plain},
        exact_function=recipe.exact,
        columns=columns,
        num_bytes=(3 if row.training else 1) * elements * size + row.tokens * k * 8,
        flops=EXP_FLOPS * elements * (2 if row.training else 1),
        grad_columns=k,
        ids=(lambda x: recipe.ours(x).experts, recipe.ids),
        variants=variants,
    )
