"""Dispatch: the plan that groups slots by expert, and the two row movements it drives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    ID_DTYPES,
    INT32_LIMIT,
    at_most_int64,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_int,
    check_scopes,
    check_shape,
    check_tensor,
    describe,
    fail,
    kept,
)
from fastmoe_route._autograd import direct, register_autograd
from fastmoe_route.results import DispatchPlan

_ops = torch.ops.fastmoe_route
_plan_dispatch = _ops.plan_dispatch.default
_permute_forward = _ops.permute_forward.default
_unpermute_forward = _ops.unpermute_forward.default
_unpermute_gradients = _ops.unpermute_backward.default
_plan_dispatch_direct = direct(_plan_dispatch)
_plan_dispatch_plain_direct = direct(_ops.plan_dispatch_plain_forward.default)
_permute_direct = direct(_permute_forward)
_unpermute_direct = direct(_unpermute_forward)
MAX_EXPERTS = 65536
_POSITION = "position"  # the default, told by identity: an array has its error
DROP_POLICIES = (_POSITION, "score")


# ---- plan_dispatch -----------------------------------------------------------------------------


def expert_capacity(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    factor: float,
    *,
    min_capacity: int = 1,
    multiple_of: int = 1,
) -> int:
    """The usual capacity of an expert: its even share of the slots, times a factor.

    Args:
        num_tokens: `T`.
        num_experts: `E`.
        top_k: `K`.
        factor: 1.0 leaves room for a perfectly even load only.
        min_capacity: the least result before rounding.
        multiple_of: the result is rounded up to a multiple of it.

    Returns:
        `max(ceil(factor * T * K / E), min_capacity)`, rounded up to a multiple of `multiple_of`.

    Raises:
        TypeError: a count is no int, or `factor` no number.
        ValueError: a count is out of range, or `factor` is negative or not finite.

    >>> expert_capacity(100, 8, 2, 1.25)
    32
    """
    num_tokens = check_int("expert_capacity", "num_tokens", num_tokens, 0)
    num_experts = check_int("expert_capacity", "num_experts", num_experts, 1)
    top_k = check_int("expert_capacity", "top_k", top_k, 0)
    min_capacity = check_int("expert_capacity", "min_capacity", min_capacity, 1)
    multiple_of = check_int("expert_capacity", "multiple_of", multiple_of, 1)
    check_float("expert_capacity", "factor", factor, "be finite and at least 0")
    if not 0 <= factor < math.inf:
        fail(ValueError, "expert_capacity", "factor", "be finite and at least 0", factor)
    slots = factor * num_tokens * top_k / num_experts
    if slots == math.inf:
        fail(ValueError, "expert_capacity", "factor", "give a finite capacity", factor)
    if isinstance(slots, torch.SymFloat):  # torch.export.save knows no ceil
        whole = torch.sym_int(slots)
        share = torch.sym_ite(whole < slots, whole + 1, whole)
    else:
        share = math.ceil(slots)
    capacity = max(share, min_capacity)
    return (capacity + multiple_of - 1) // multiple_of * multiple_of


def plan_dispatch(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = _POSITION,
    weights: Tensor | None = None,
    scope_ids: Tensor | None = None,
    num_scopes: int = 1,
    align: int = 1,
    max_rows: int | None = None,
    allow_unrouted: bool = False,
) -> DispatchPlan:
    """Groups slots by expert, and inside an expert by slot number: a stable counting sort.

    The result is the same on every device and with any number of threads. With `capacity` one
    request can push out another's tokens (arXiv:2402.05526) unless each has its own scope.

    Args:
        experts: int32 or int64 `[T, K]`, any strides: the expert of each slot, -1 for none. An
            expert that a token names twice gets two rows.
        num_experts: `E`, at most 65,536.
        capacity: the most slots an expert keeps; with `scope_ids`, per scope and expert. None
            keeps all.
        drop_policy: which slots are kept: `position`, first choices before second choices, then
            lower tokens; `score`, larger `weights`, ties to the lower slot, NaN last.
        weights: float `[T, K]`, needed by `score`, ignored by `position`.
        scope_ids: int32 `[T]` in `[0, num_scopes)`: the request each token belongs to. What one
            scope keeps never depends on another.
        num_scopes: the number of scopes.
        align: every expert starts at a multiple of it, and `offsets[E]` is one too.
        max_rows: the caller's bound on the slots in use, for methods with a wide `K`.
        allow_unrouted: the id `E` means none, too.

    Returns:
        A `DispatchPlan`, not differentiable, with
        `R = min(T * K, E * capacity * num_scopes, max_rows) + E * (align - 1)` rows.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or is out of range.
        RuntimeError: an id of `experts` or `scope_ids` is out of range, more slots are in use than
            `max_rows`, or `T * K` or `R` reaches 2^31. On CUDA an id out of range is none, and
            surplus slots are dropped, highest first.

    >>> plan = plan_dispatch(torch.tensor([[0, 2], [2, -1], [2, 0]]), num_experts=3)
    >>> plan.offsets.tolist(), plan.row_to_slot.tolist()
    ([0, 2, 2, 5], [0, 5, 1, 2, 4, -1])
    """
    failed = None
    if (
        capacity is None
        and max_rows is None
        and weights is None
        and scope_ids is None
        and drop_policy is _POSITION
        and type(num_experts) is type(num_scopes) is type(align) is int
        and num_scopes == align == 1
        and allow_unrouted is False
        and not is_dynamo_compiling()
    ):
        # The operator checks in a fifth of the time of what follows, which says more.
        try:
            return tuple.__new__(DispatchPlan, _plan_dispatch_plain_direct(experts, num_experts))
        except RuntimeError as error:
            failed = kept(error)  # unless an argument is wrong
        except TypeError:
            pass  # said below
    check_tensor("plan_dispatch", "experts", experts, 2)
    check_dtype("plan_dispatch", "experts", experts, ID_DTYPES)
    num_experts = check_int("plan_dispatch", "num_experts", num_experts, 1, MAX_EXPERTS)
    if capacity is not None:
        capacity = check_int("plan_dispatch", "capacity", capacity, 1)
        capacity = at_most_int64(capacity)
    if max_rows is not None:
        max_rows = check_int("plan_dispatch", "max_rows", max_rows, 0)
        max_rows = at_most_int64(max_rows)
    align = check_int("plan_dispatch", "align", align, 1, INT32_LIMIT - 1)
    policy = check_choice("plan_dispatch", "drop_policy", drop_policy, DROP_POLICIES)
    if policy or weights is not None:
        weights = _score_weights(experts, weights)
    num_scopes = check_scopes("plan_dispatch", scope_ids, num_scopes, experts)
    check_flag("plan_dispatch", "allow_unrouted", allow_unrouted)
    if failed is not None:
        raise failed.pop()
    make_plan = _plan_dispatch if is_dynamo_compiling() else _plan_dispatch_direct
    return DispatchPlan(
        *make_plan(
            experts,
            num_experts,
            0 if capacity is None else capacity,
            policy,
            weights if policy else None,
            scope_ids,
            num_scopes,
            align,
            -1 if max_rows is None else max_rows,
            allow_unrouted,
        )
    )


def _score_weights(experts: Tensor, weights: Tensor | None) -> Tensor:
    """The weights that drop policy `score` ranks by."""
    if weights is None:
        fail(ValueError, "plan_dispatch", "weights", "be given with drop_policy 'score'", None)
    check_tensor("plan_dispatch", "weights", weights, 2)
    check_shape("plan_dispatch", "weights", weights, experts.shape)
    check_dtype("plan_dispatch", "weights", weights, FLOAT_DTYPES)
    check_device("plan_dispatch", "weights", weights, experts)
    return weights.detach()


@torch.library.register_fake("fastmoe_route::plan_dispatch")
def _plan_dispatch_fake(
    experts: Tensor,
    num_experts: int,
    capacity: int = 0,
    drop_policy: int = 0,
    weights: Tensor | None = None,
    scope_ids: Tensor | None = None,
    num_scopes: int = 1,
    align: int = 1,
    max_rows: int = -1,
    allow_unrouted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = experts.shape[0] * experts.shape[1]
    if capacity > 0:
        num_rows = torch.sym_min(num_rows, num_experts * capacity * num_scopes)
    if max_rows >= 0:
        num_rows = torch.sym_min(num_rows, max_rows)
    sizes = (
        (num_experts + 1,),
        (num_rows + num_experts * (align - 1),),
        experts.shape,
        (num_experts,),
        (num_experts,),
    )
    offsets, row_to_slot, slot_to_row, kept, dropped = (
        experts.new_empty(size, dtype=torch.int32) for size in sizes
    )
    return offsets, row_to_slot, slot_to_row, kept, dropped


@torch.library.register_fake("fastmoe_route::plan_dispatch_plain_forward")
def _plan_dispatch_plain_fake(experts: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    # Calls with tensors without data come here unchecked.
    check_tensor("plan_dispatch", "experts", experts, 2)
    check_dtype("plan_dispatch", "experts", experts, ID_DTYPES)
    check_int("plan_dispatch", "num_experts", num_experts, 1, MAX_EXPERTS)
    plan: tuple[Tensor, ...] = _plan_dispatch_fake(experts, num_experts)
    return plan


# ---- permute -----------------------------------------------------------------------------------


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Copies each token's row to every row its slots hold: tokens in, rows of experts out.

    Args:
        x: `[T, H]`, float32, bfloat16, float16 or float64; any strides.
        plan: from `plan_dispatch`.

    Returns:
        `[R, H]` in the dtype of `x`; row `r` is `x[row_to_slot[r] // K]`, bit for bit, and zero
        where `row_to_slot[r]` is -1. Differentiable in `x`; the gradient is `unpermute`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `x` does not fit the plan.
        RuntimeError: the maps of the plan are not inverse to each other (checked on CPU).

    >>> plan = plan_dispatch(torch.tensor([[1], [0]]), num_experts=2)
    >>> permute(torch.tensor([[1.0], [2.0]]), plan).tolist()
    [[2.0], [1.0]]
    """
    if not isinstance(plan, DispatchPlan):
        fail(TypeError, "permute", "plan", "be a DispatchPlan", describe(plan))
    try:
        # needs_grad without its call: that is a tenth of the time of a token.
        if (x.requires_grad and is_grad_enabled()) or forward_ad._current_level >= 0:
            copy_rows = _differentiable_permute
        else:
            copy_rows = _permute_forward if is_dynamo_compiling() else _permute_direct
        rows: Tensor = copy_rows(x, plan.row_to_slot, plan.slot_to_row)
        return rows
    except (RuntimeError, TypeError, AttributeError) as caught:
        error = caught
    _check_fit("permute", "x", x, plan)
    raise error


def _check_fit(op: str, argument: str, value: Tensor, plan: DispatchPlan) -> None:
    """Says what is wrong with an argument that the operator refused, if anything is.

    The operators check all of this themselves; before a call it would take a fifth of the time of
    a token or two.
    """
    check_tensor(op, "plan.row_to_slot", plan.row_to_slot, 1)
    check_tensor(op, "plan.slot_to_row", plan.slot_to_row, 2)
    check_tensor(op, argument, value, 2)
    check_dtype(op, argument, value, FLOAT_DTYPES)
    fitted = plan.slot_to_row if argument == "x" else plan.row_to_slot
    check_shape(op, argument, value, (fitted.shape[0], -1))
    check_device(op, "plan.row_to_slot", plan.row_to_slot, value)
    check_device(op, "plan.slot_to_row", plan.slot_to_row, value)


@torch.library.register_fake("fastmoe_route::permute")
@torch.library.register_fake("fastmoe_route::permute_forward")
def _permute_fake(x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor) -> Tensor:
    _check_fake("permute", x, slot_to_row, row_to_slot)
    return x.new_empty((row_to_slot.shape[0], x.shape[1]))


def _check_fake(op: str, value: Tensor, of_map: Tensor, *others: Tensor | None) -> None:
    """`of_map` is the map that `value` has to fit; a call with one meta tensor comes here, too."""
    check_dtype(op, "x" if op == "permute" else "rows", value, FLOAT_DTYPES)
    torch._check(
        value.dim() == 2 and value.shape[0] == of_map.shape[0],
        lambda: f"{op}: the matrix must fit the plan, got shape {list(value.shape)}",
    )
    torch._check(
        all(other is None or other.device == value.device for other in (of_map, *others)),
        lambda: f"{op}: all tensors must be on {value.device}",
    )


def _save_maps(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, row_to_slot, slot_to_row = inputs
    ctx.save_for_backward(row_to_slot, slot_to_row)


def _permute_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    if (grad.requires_grad and is_grad_enabled()) or forward_ad._current_level >= 0:  # as there
        sum_rows = _differentiable_unpermute
    else:
        sum_rows = _unpermute_forward if is_dynamo_compiling() else _unpermute_direct
    return sum_rows(grad, None, *ctx.saved_tensors), None, None


_differentiable_permute = register_autograd(
    "permute",
    _permute_backward,
    setup_context=_save_maps,
    once=False,
    bare="permute_forward",
    one_input=True,
)


# ---- unpermute ---------------------------------------------------------------------------------


def unpermute(rows: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    """Sums each token's rows, weighted: rows of experts in, tokens out.

    Args:
        rows: `[R, H]`, float32, bfloat16, float16 or float64; any strides. Padding rows are not
            read.
        plan: from `plan_dispatch`.
        weights: `[T, K]`, any float dtype; None for 1. Weights of slots without a row are ignored.

    Returns:
        `[T, H]` in the dtype of `rows`: the sum over `j` ascending of
        `weights[t, j] * rows[slot_to_row[t, j]]`, taken in float32 (float64 for float64 rows) and
        rounded once; 0 for a token without a row. Differentiable in `rows` and `weights`, both in
        one read.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `rows` or `weights` does not fit the plan.
        RuntimeError: the plan names rows outside `[-1, R)`, or, in backward, its maps are not
            inverse to each other (checked on CPU). The sum reads `slot_to_row` alone, which says
            all of it for a plan of any origin; only the gradient of a row needs both.

    >>> plan = plan_dispatch(torch.tensor([[1, 0], [0, -1]]), num_experts=2)
    >>> rows = torch.tensor([[1.0], [10.0], [100.0], [0.0]])
    >>> unpermute(rows, plan, torch.tensor([[0.5, 2.0], [3.0, 7.0]])).tolist()
    [[52.0], [30.0]]
    """
    if not isinstance(plan, DispatchPlan):
        fail(TypeError, "unpermute", "plan", "be a DispatchPlan", describe(plan))
    try:
        if (  # as in permute
            (rows.requires_grad or (weights is not None and weights.requires_grad))
            and is_grad_enabled()
        ) or forward_ad._current_level >= 0:
            sum_rows = _differentiable_unpermute
        else:
            sum_rows = _unpermute_forward if is_dynamo_compiling() else _unpermute_direct
        y: Tensor = sum_rows(rows, weights, plan.row_to_slot, plan.slot_to_row)
        return y
    except (RuntimeError, TypeError, AttributeError) as caught:
        error = caught
    _check_fit("unpermute", "rows", rows, plan)
    if weights is not None:
        check_tensor("unpermute", "weights", weights, 2)
        check_shape("unpermute", "weights", weights, plan.slot_to_row.shape)
        check_dtype("unpermute", "weights", weights, FLOAT_DTYPES)
        check_device("unpermute", "weights", weights, rows)
    raise error


@torch.library.register_fake("fastmoe_route::unpermute")
@torch.library.register_fake("fastmoe_route::unpermute_forward")
def _unpermute_fake(
    rows: Tensor, weights: Tensor | None, row_to_slot: Tensor, slot_to_row: Tensor
) -> Tensor:
    _check_fake("unpermute", rows, row_to_slot, slot_to_row, weights)
    return rows.new_empty((slot_to_row.shape[0], rows.shape[1]))


@torch.library.register_fake("fastmoe_route::unpermute_backward")
def _unpermute_backward_fake(
    grad_y: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    needs_rows: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    num_tokens, top_k = slot_to_row.shape
    grad_rows = grad_y.new_empty((row_to_slot.shape[0] if needs_rows else 0, grad_y.shape[1]))
    weights_dtype = torch.float32 if weights is None else weights.dtype
    grad_weights = grad_y.new_empty(
        (num_tokens if needs_weights else 0, top_k), dtype=weights_dtype
    )
    return grad_rows, grad_weights


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, row_to_slot, slot_to_row = inputs
    # The rows are read again only for the gradient of the weights.
    needed_rows = rows if weights is not None and ctx.needs_input_grad[1] else None
    ctx.save_for_backward(needed_rows, weights, row_to_slot, slot_to_row)


def _unpermute_backward(
    ctx: Any, grad: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    if grad is None:
        return None, None, None, None
    needs_rows, needs_weights = ctx.needs_input_grad[:2]
    grad_rows, grad_weights = _unpermute_gradients(
        grad, *ctx.saved_tensors, needs_rows, needs_weights
    )
    return grad_rows if needs_rows else None, grad_weights if needs_weights else None, None, None


_differentiable_unpermute = register_autograd(
    "unpermute", _unpermute_backward, setup_context=_save_rows, bare="unpermute_forward"
)
