"""Every op's case, by name."""

from __future__ import annotations

from collections.abc import Callable

from fastmoe_route.bench.case import Case
from fastmoe_route.bench.expert_cases import grouped_mm_case, layer_case
from fastmoe_route.bench.machine import Limits
from fastmoe_route.bench.row_cases import move_case, plan_case
from fastmoe_route.bench.score_cases import gate_case, softmax_case, softmax_topk_case
from fastmoe_route.bench.shapes import Row
from fastmoe_route.bench.workload import Weights

_LIGHT: dict[str, Callable[[Row, Limits, int], Case]] = {
    "softmax": softmax_case,
    "softmax_topk": softmax_topk_case,
    "gate": gate_case,
    "plan_dispatch": plan_case,
    "permute": move_case,
    "unpermute": move_case,
}
_HEAVY: dict[str, Callable[[Row, int, Weights], Case]] = {
    "grouped_mm": grouped_mm_case,
    "moe_mlp": layer_case,
    "layer": layer_case,
}


def build_case(row: Row, limits: Limits, seed: int, weights: Weights | None) -> Case:
    """The case of a row; `weights` for the ops that multiply by them.

    Raises:
        OutOfMemory: the row does not fit.
    """
    if row.op in _LIGHT:
        return _LIGHT[row.op](row, limits, seed)
    assert weights is not None
    weights.require_grad(row.training)
    return _HEAVY[row.op](row, seed, weights)
