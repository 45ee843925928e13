"""`lora_grouped_mm`: the low-rank experts of every token, as two grouped products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    autocast_dtype,
    check_dtype,
    check_float,
    check_routing,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from fastmoe_route.dispatch import permute, plan_dispatch, unpermute
from fastmoe_route.grouped_mm import grouped_mm
from fastmoe_route.moe_mlp import check_plan
from fastmoe_route.results import DispatchPlan, Routing


def lora_grouped_mm(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    routing: Routing | Sequence[Tensor],
    *,
    scaling: float = 1.0,
    plan: DispatchPlan | None = None,
) -> Tensor:
    """The low-rank experts of every token: `y_t = sum over j of s w_tj x_t A_e B_e`, `e = e_tj`.

    Rows are grouped by expert once; two grouped products of rank `r` follow, and the weighted sum
    in float32. Slots of -1, and those that a plan drops, add nothing. Deterministic and
    batch-invariant like its parts.

    Args:
        x: float `[T, H]`.
        lora_a: `[E, H, r]` in the dtype of `x`; a parameter `[E, r, H]` is passed transposed.
        lora_b: `[E, r, D]`, likewise.
        routing: a `Routing` or a pair of experts `[T, K]` and weights `[T, K]`.
        scaling: `s`, such as `alpha / r`.
        plan: where the slots go; None makes one without capacity.

    Returns:
        `[T, D]` in the dtype of `x`, to add to the frozen layer's output. Differentiable in `x`,
        `lora_a`, `lora_b` and the weights; experts without a row get zero gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> a, b = torch.ones(2, 2, 1), torch.tensor([[[1.0]], [[10.0]]])  # rank 1, two experts
        >>> pair = (torch.tensor([[0, 1], [1, -1]]), torch.ones(2, 2))
        >>> lora_grouped_mm(x, a, b, pair)
        tensor([[33.],
                [70.]])
    """
    check_tensor("lora_grouped_mm", "x", x, 2)
    check_dtype("lora_grouped_mm", "x", x, FLOAT_DTYPES)
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_tensor("lora_grouped_mm", name, value, 3)
        if autocast_dtype(x) is None:
            check_same_dtype("lora_grouped_mm", name, value, x)
    check_shape("lora_grouped_mm", "lora_a", lora_a, (-1, x.shape[1], -1))
    check_shape("lora_grouped_mm", "lora_b", lora_b, (lora_a.shape[0], lora_a.shape[2], -1))
    check_routing("lora_grouped_mm", routing, x)
    if type(scaling) is not float or scaling != 1.0:
        check_float("lora_grouped_mm", "scaling", scaling)
    experts, weights = routing[0], routing[1]
    if plan is None:
        plan = plan_dispatch(experts, lora_a.shape[0])
    else:
        check_plan("lora_grouped_mm", x, plan, lora_a.shape[0], experts.shape[1])
    inner = grouped_mm(permute(x, plan), lora_a, plan.offsets)
    outer = grouped_mm(inner, lora_b, plan.offsets)
    return unpermute(outer, plan, weights * (scaling * 1.0) if scaling != 1.0 else weights)
