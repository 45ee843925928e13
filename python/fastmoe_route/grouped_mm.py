"""Grouped matrix product: every expert multiplies its own rows with its own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    autocast_dtype,
    check_device,
    check_dtype,
    check_same_dtype,
    check_shape,
    check_tensor,
    kept,
    needs_grad,
)
from fastmoe_route._autograd import direct, register_autograd

_ops = torch.ops.fastmoe_route
_grouped_mm_direct = direct(_ops.grouped_mm_forward.default)
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Multiplies the rows `offsets[e] : offsets[e + 1]` of `x` by `w[e]`, for every expert `e`.

    Products are accumulated in float32 (float64 for float64), the bias is added, and the result is
    rounded once. A row's result has the same bits whatever rows stand around it and with any number
    of threads. Under `torch.autocast`, `x`, `w` and `bias` are cast to the autocast dtype (float64
    is left alone, as everywhere in torch).

    Args:
        x: float `[R, A]`, rows may be strided.
        w: `[E, A, B]` in the dtype of `x`. Any view whose last two dimensions are row- or
            column-major is used in place, so an `nn.Linear`-style `[E, out, in]` parameter is
            passed as `w.transpose(1, 2)`.
        offsets: int32 `[E + 1]`, from 0, never falling, ending at most at `R`: those of a
            `DispatchPlan`.
        bias: `[E, B]` in the dtype of `x`, or None.

    Returns:
        `[R, B]` in the dtype of `x`; rows past `offsets[E]` are zero. Differentiable in `x`, `w`
        and `bias`: the gradient of `w` has the memory layout of `w`, experts without rows get
        exact zeros, and so do rows past `offsets[E]`.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a shape or device that does not fit.
        RuntimeError: for offsets that break their rule (checked on CPU).

    Example:
        >>> import torch, fastmoe_route as fr
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> w = torch.tensor([[[1.0], [1.0]], [[10.0], [0.0]]])  # two experts, A = 2, B = 1
        >>> fr.grouped_mm(x, w, torch.tensor([0, 1, 3], dtype=torch.int32))
        tensor([[ 3.],
                [30.],
                [50.]])
    """
    failed = None
    if not is_dynamo_compiling() and not _is_any_autocast_enabled():
        try:  # the operator checks in a third of the time of what follows, which says more
            if not needs_grad(x, w, bias):
                return _grouped_mm_direct(x, w, offsets, bias)  # type: ignore[no-any-return]
        except RuntimeError as error:
            failed = kept(error)  # unless an argument is wrong
        except (TypeError, AttributeError):
            pass  # said below
    _check_tensors(x, w, offsets, bias)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, w = x.to(dtype), w.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_fit(x, w, offsets, bias)
    if failed is not None:
        raise failed.pop()
    op = _ops.grouped_mm if needs_grad(x, w, bias) else _ops.grouped_mm_forward
    y: Tensor = op(x, w, offsets, bias)
    return y


def one_product(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w` as a product of one expert: a row has the same bits whatever rows are beside it.

    `torch.mm` rounds a row differently as the number of rows changes.
    """
    rows = x.shape[0]
    if type(rows) is int and rows > 0 and not is_dynamo_compiling():  # one operator, not two
        offsets = torch.arange(0, 2 * rows, rows, dtype=torch.int32, device=x.device)
    else:
        offsets = torch.arange(2, dtype=torch.int32, device=x.device) * rows
    return grouped_mm(x, w[None], offsets)


def _check_tensors(x: Any, w: Any, offsets: Any, bias: Any) -> None:
    check_tensor("grouped_mm", "x", x, 2)
    check_tensor("grouped_mm", "w", w, 3)
    check_tensor("grouped_mm", "offsets", offsets, 1)
    if bias is not None:
        check_tensor("grouped_mm", "bias", bias, 2)


def _check_fit(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    check_dtype("grouped_mm", "x", x, FLOAT_DTYPES)
    check_dtype("grouped_mm", "offsets", offsets, (torch.int32,))
    check_shape("grouped_mm", "x", x, (-1, w.shape[1]))
    check_shape("grouped_mm", "offsets", offsets, (w.shape[0] + 1,))
    check_same_dtype("grouped_mm", "w", w, x)
    check_device("grouped_mm", "w", w, x)
    check_device("grouped_mm", "offsets", offsets, x)
    if bias is not None:
        check_shape("grouped_mm", "bias", bias, (w.shape[0], w.shape[2]))
        check_same_dtype("grouped_mm", "bias", bias, x)
        check_device("grouped_mm", "bias", bias, x)


@torch.library.register_fake("fastmoe_route::grouped_mm")
@torch.library.register_fake("fastmoe_route::grouped_mm_forward")
def _grouped_mm_fake(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    _check_tensors(x, w, offsets, bias)
    _check_fit(x, w, offsets, bias)
    return x.new_empty((x.shape[0], w.shape[2]))


@torch.library.register_fake("fastmoe_route::grouped_mm_wgrad")
def _grouped_mm_wgrad_fake(
    x: Tensor, grad_y: Tensor, offsets: Tensor, transposed: bool, needs_w: bool, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    num_experts = offsets.shape[0] - 1
    shape = (grad_y.shape[1], x.shape[1]) if transposed else (x.shape[1], grad_y.shape[1])
    return (
        x.new_empty((num_experts if needs_w else 0, *shape)),
        x.new_empty((num_experts if needs_bias else 0, grad_y.shape[1])),
    )


def _is_column_major(w: Tensor) -> bool:
    return w.stride(1) == 1 and w.stride(2) != 1


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, offsets, bias = inputs
    needs_x, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    ctx.needs_bias = bias is not None and ctx.needs_input_grad[3]
    # The bias gradient needs no rows of x, but the operator takes its shape from them.
    ctx.save_for_backward(x if needs_w or ctx.needs_bias else None, w if needs_x else None, offsets)
    ctx.is_column_major = _is_column_major(w)


def _backward(
    ctx: Any, grad_y: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    if grad_y is None:
        return None, None, None, None
    x, w, offsets = ctx.saved_tensors
    needs_x, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    grad_x = grad_w = grad_bias = None
    if needs_x:
        grad_x = _ops.grouped_mm(grad_y, w.transpose(1, 2), offsets, None)
    if needs_w or ctx.needs_bias:
        is_column_major = ctx.is_column_major
        grad_w, grad_bias = _ops.grouped_mm_wgrad(
            x, grad_y, offsets, is_column_major, needs_w, ctx.needs_bias
        )
        if is_column_major:
            grad_w = grad_w.transpose(1, 2)
    return grad_x, grad_w if needs_w else None, None, grad_bias if ctx.needs_bias else None


register_autograd("grouped_mm", _backward, setup_context=_setup_context, once=False)


def _wgrad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, grad_y, offsets, ctx.transposed, ctx.needs_w, ctx.needs_bias = inputs
    ctx.save_for_backward(x, grad_y, offsets)


def _wgrad_backward(ctx: Any, grad_grad_w: Tensor | None, grad_grad_bias: Tensor | None) -> Any:
    """Second derivatives: both factors of the product `x^T grad_y` are multiplied again."""
    x, grad_y, offsets = ctx.saved_tensors
    grad_x = grad_grad_y = None
    v = grad_grad_w if ctx.needs_w else None
    if v is not None and ctx.transposed:
        v = v.transpose(1, 2)
    bias = grad_grad_bias if ctx.needs_bias else None
    if ctx.needs_input_grad[0] and v is not None:
        grad_x = _ops.grouped_mm(grad_y, v.transpose(1, 2), offsets, None)
    if ctx.needs_input_grad[1] and (v is not None or bias is not None):
        if v is None:
            v = x.new_zeros((offsets.shape[0] - 1, x.shape[1], grad_y.shape[1]))
        grad_grad_y = _ops.grouped_mm(x, v, offsets, bias)
    return grad_x, grad_grad_y, None, None, None, None


register_autograd(
    "grouped_mm_wgrad", _wgrad_backward, setup_context=_wgrad_setup_context, once=False
)
