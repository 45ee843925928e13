"""What becomes of slots that a full expert turned away, and who was turned away."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    ID_DTYPES,
    INT32_LIMIT,
    arithmetic_dtype,
    check_device,
    check_dtype,
    check_float,
    check_scopes,
    check_shape,
    check_tensor,
    describe,
    fail,
)
from fastmoe_route.results import DispatchPlan

_MIN_SUM = 1e-20  # the floor under which gate does not normalise either


class DropCounts(NamedTuple):
    """Slots by scope and expert, `S` scopes and `E` experts; all int32 `[S, E]`.

    Attributes:
        asked: slots that ask for the expert.
        kept: those of them that hold a row.
        dropped: those turned away.
    """

    asked: Tensor
    kept: Tensor
    dropped: Tensor


def renormalize_after_drop(weights: Tensor, plan: DispatchPlan, scale: float = 1.0) -> Tensor:
    """Scales the weights of every token's kept slots so that they sum to `scale`.

    Args:
        weights: float `[T, K]`.
        plan: from `plan_dispatch`.
        scale: the sum to reach.

    Returns:
        `[T, K]` in the dtype of `weights`: `scale * weights / sum of the kept weights`, the sum
        floored at 1e-20 as in `gate`; exactly 0 for slots without a row, whatever their weight
        was. Differentiable in `weights`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `weights` does not fit the plan.

    >>> from fastmoe_route import plan_dispatch
    >>> plan = plan_dispatch(torch.tensor([[0, 1], [0, 1]]), 2, capacity=1)
    >>> renormalize_after_drop(torch.tensor([[0.5, 0.25], [0.5, 0.25]]), plan).tolist()
    [[0.6666666865348816, 0.3333333432674408], [0.0, 0.0]]
    """
    check_float("renormalize_after_drop", "scale", scale)
    kept = torch.where(_has_row("renormalize_after_drop", weights, plan), weights, 0.0)
    wide = kept.to(arithmetic_dtype(kept))
    total = wide.sum(1, keepdim=True).clamp(min=_MIN_SUM)
    return (wide / total * (scale * 1.0)).to(weights.dtype)


def pass_through(y: Tensor, x: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    """Lets tokens that experts turned away keep their own input: the residual rule.

    Args:
        y: float `[T, H]`, the sum of the experts' outputs, from `unpermute` or `moe_mlp`.
        x: `[T, H]`, the layer's input, of the dtype of `y`.
        plan: from `plan_dispatch`.
        weights: None, or float `[T, K]`, weights that are 0 where a slot asks for no expert.

    Returns:
        `[T, H]`. Without `weights`: `x` where a token holds no row, `y` elsewhere. With `weights`:
        `y + x * (sum of the weights of the slots without a row)`, so that a dropped expert counts
        as the identity. Differentiable in `y`, `x` and `weights`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit.

    >>> from fastmoe_route import plan_dispatch
    >>> plan = plan_dispatch(torch.tensor([[0], [0]]), 1, capacity=1)
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [0.0]])
    >>> pass_through(y, x, plan).tolist()
    [[10.0], [2.0]]
    """
    for name, rows in (("y", y), ("x", x)):
        check_tensor("pass_through", name, rows, 2)
        check_dtype("pass_through", name, rows, FLOAT_DTYPES)
    check_shape("pass_through", "x", x, y.shape)
    check_dtype("pass_through", "x", x, (y.dtype,))
    check_device("pass_through", "x", x, y)
    if weights is None:
        has_row = _has_row("pass_through", y, plan, name="y", columns=-1)
        return torch.where(has_row.any(1, keepdim=True), y, x)
    has_row = _has_row("pass_through", weights, plan)
    check_device("pass_through", "weights", weights, y)
    wide = arithmetic_dtype(y)
    lost = torch.where(has_row, 0.0, weights).to(wide).sum(1, keepdim=True)
    mixed = (y.to(wide) + x.to(wide) * lost).to(y.dtype)
    return torch.where(has_row.all(1, keepdim=True), y, mixed)


def _has_row(
    op: str, value: Tensor, plan: DispatchPlan, *, name: str = "weights", columns: int | None = None
) -> Tensor:
    """Which slots of the plan hold a row; `value` has to fit it."""
    if not isinstance(plan, DispatchPlan):
        fail(TypeError, op, "plan", "be a DispatchPlan", describe(plan))
    check_tensor(op, name, value, 2)
    check_dtype(op, name, value, FLOAT_DTYPES)
    check_tensor(op, "plan.slot_to_row", plan.slot_to_row, 2)
    num_tokens, top_k = plan.slot_to_row.shape
    check_shape(op, name, value, (num_tokens, top_k if columns is None else columns))
    check_device(op, "plan.slot_to_row", plan.slot_to_row, value)
    return plan.slot_to_row >= 0


def batch_priority(weights: Tensor) -> Tensor:
    """The order of batch-prioritized routing, to be given to `plan_dispatch` as `weights`.

    With `drop_policy="score"` and these weights first choices come before second choices, and
    within a choice tokens with a larger largest weight before others (arXiv:2106.05974), ties to
    the lower token. What a token keeps then depends on later tokens: not for causal serving.

    Args:
        weights: float `[T, K]`.

    Returns:
        float64 `[T, K]` of distinct whole numbers. Not differentiable. A NaN row ranks last.

    Raises:
        TypeError: `weights` is no float tensor.
        ValueError: `weights` does not have two dimensions.

    >>> batch_priority(torch.tensor([[0.5, 0.2], [0.9, 0.1]])).tolist()
    [[-1.0, -3.0], [-0.0, -2.0]]
    """
    check_tensor("batch_priority", "weights", weights, 2)
    check_dtype("batch_priority", "weights", weights, FLOAT_DTYPES)
    num_tokens, top_k = weights.shape
    if top_k == 0:
        return weights.new_empty((num_tokens, 0), dtype=torch.float64)
    # amax passes NaN on, and negated values sort rising with NaN at the end.
    best_first = (-weights.detach().amax(1)).argsort(stable=True)
    place = torch.empty_like(best_first)
    place[best_first] = torch.arange(num_tokens, device=weights.device)
    choice = torch.arange(top_k, device=weights.device)
    return -(choice[None, :] * num_tokens + place[:, None]).double()


def drop_counts(
    experts: Tensor,
    plan: DispatchPlan,
    *,
    scope_ids: Tensor | None = None,
    num_scopes: int = 1,
) -> DropCounts:
    """How many slots of each scope every expert was asked for, kept and turned away.

    For operators: a request whose slots are turned away while it asks for little itself is the
    sign of a buffer overflow (arXiv:2402.05526). The sums over scopes are the plan's own `kept`
    and `dropped`.

    Args:
        experts: int32 or int64 `[T, K]`, what the plan was made from; ids outside `[0, E)` count
            nowhere.
        plan: from `plan_dispatch`.
        scope_ids: int32 `[T]` in `[0, num_scopes)`; None for one scope. Others count nowhere.
        num_scopes: `S`; the result has `S * E` elements, below 2^31.

    Returns:
        `DropCounts`, three int32 `[S, E]`. No host synchronisation.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, or `S * E` is too large.

    >>> from fastmoe_route import plan_dispatch
    >>> experts = torch.tensor([[0], [0], [0]])
    >>> plan = plan_dispatch(experts, 2, capacity=2)
    >>> scopes = torch.tensor([0, 0, 1], dtype=torch.int32)
    >>> drop_counts(experts, plan, scope_ids=scopes, num_scopes=2).dropped.tolist()
    [[0, 0], [1, 0]]
    """
    if not isinstance(plan, DispatchPlan):
        fail(TypeError, "drop_counts", "plan", "be a DispatchPlan", describe(plan))
    check_tensor("drop_counts", "experts", experts, 2)
    check_dtype("drop_counts", "experts", experts, ID_DTYPES)
    check_tensor("drop_counts", "plan.slot_to_row", plan.slot_to_row, 2)
    check_tensor("drop_counts", "plan.kept", plan.kept, 1)
    check_shape("drop_counts", "experts", experts, plan.slot_to_row.shape)
    check_device("drop_counts", "plan.slot_to_row", plan.slot_to_row, experts)
    num_experts = plan.kept.shape[0]
    most = (INT32_LIMIT - 1) // num_experts
    num_scopes = check_scopes("drop_counts", scope_ids, num_scopes, experts, most)
    counts = num_scopes * num_experts
    is_slot = (experts >= 0) & (experts < num_experts)
    bins = experts.long()
    if scope_ids is not None:
        is_slot = is_slot & ((scope_ids >= 0) & (scope_ids < num_scopes))[:, None]
        bins = bins + scope_ids.long()[:, None] * num_experts
    bins = torch.where(is_slot, bins, counts).flatten()

    def count(ones: Tensor) -> Tensor:
        zeros = torch.zeros(counts + 1, dtype=torch.int32, device=experts.device)
        return zeros.index_add_(0, bins, ones.flatten().int())[:-1].view(num_scopes, num_experts)

    asked, kept = count(torch.ones_like(is_slot)), count(plan.slot_to_row >= 0)
    return DropCounts(asked, kept, asked - kept)
