"""Softmax along any dimension, and the k best softmax probabilities of wide rows in one read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    check_choice,
    check_device,
    check_dtype,
    check_int,
    check_rows,
    check_shape,
    check_tensor,
    describe,
    fail,
    kept,
    needs_grad,
)
from fastmoe_route._autograd import direct, register_autograd

# Defaults, told by identity: -1.0 is no int and an array no method, and both have their errors.
_LAST, _AUTO = -1, "auto"
_METHODS = (_AUTO, "three_pass", "online", "two_pass")
MAX_K = 64  # of softmax_topk
_ops = torch.ops.fastmoe_route
_softmax_forward = _ops.softmax_forward.default
_softmax_out = _ops.softmax_out.default
_softmax_plain_direct = direct(_ops.softmax_plain_forward.default)
_softmax_plain_out_direct = direct(_ops.softmax_plain_out.default)
_softmax_backward_op = _ops.softmax_backward.default


def softmax(
    x: Tensor, dim: int = _LAST, *, method: str = _AUTO, out: Tensor | None = None
) -> Tensor:
    """Computes `exp(x - max) / sum(exp(x - max))` along `dim`.

    Same values and the same NaN/inf pattern as `torch.softmax`: a slice with a NaN or a +inf, and
    one that is all -inf, is NaN throughout; -inf beside finite values gives exactly 0. A slice has
    the same bits whatever else `x` holds and however many threads run.

    The methods differ in speed only: `three_pass` finds the max, the sum, and writes; `online` has
    one pass for max and sum (arXiv:1805.02867); `two_pass` sums mantissas and exponents and needs
    no max (arXiv:2001.04438). `auto` picks by the length of the slice and the device
    (docs/numerics.md). float64 is always computed in three passes on CPU.

    Args:
        x: any shape; float32, bfloat16, float16 (computed in float32) or float64; any strides.
        dim: the dimension that sums to 1.
        method: `auto`, `three_pass`, `online` or `two_pass`.
        out: where to write the result, contiguous, of the shape and dtype of `x`. As in torch,
            no gradient flows through it.

    Returns:
        Shape and dtype of `x`; differentiable. `out` if given.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if `dim`, `method` or `out` does not fit.
        RuntimeError: if `out` is given and `x` requires a gradient.

    Example:
        >>> softmax(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    failed = None
    if not is_dynamo_compiling() and dim is _LAST and method is _AUTO:
        # The operator checks in half the time of what follows, which says more; what needs_grad
        # asks first stands here without its call.
        try:
            if forward_ad._current_level >= 0:
                pass
            elif out is not None:
                if not is_grad_enabled() or not (x.requires_grad or out.requires_grad):
                    _softmax_plain_out_direct(x, out)
                    return out
            elif x.dim() == 2:
                if x.requires_grad and is_grad_enabled():
                    return _differentiable_softmax(x, 0)  # type: ignore[no-any-return]
                return _softmax_plain_direct(x)  # type: ignore[no-any-return]
        except RuntimeError as error:
            failed = kept(error)  # unless an argument is wrong
        except (TypeError, AttributeError):
            pass  # said below
    check_tensor("softmax", "x", x)
    check_dtype("softmax", "x", x, FLOAT_DTYPES)
    num_dims = x.dim() or 1
    dim = check_int("softmax", "dim", dim, -num_dims, num_dims - 1)
    method_idx = check_choice("softmax", "method", method, _METHODS)
    if out is not None:
        _check_out(x, out)
    if failed is not None:
        raise failed.pop()
    if out is not None:
        return _softmax_into(x, dim, method_idx, out)
    op: Callable[..., Any] = _differentiable_softmax if needs_grad(x) else _softmax_forward
    if num_dims == 2 and dim in (1, -1):
        result: Tensor = op(x, method_idx)
        return result
    if x.dim() < 2:
        row: Tensor = op(x.reshape(1, -1), method_idx)
        return row.reshape(x.shape)
    moved = x.movedim(dim, -1)
    # Not reshape(-1, ..), which has to know that no size is 0: torch.compile may not.
    rows: Tensor = op(moved.flatten(0, -2), method_idx)
    return rows.reshape(moved.shape).movedim(-1, dim)


def _check_out(x: Tensor, out: Any) -> None:
    _check_fits(x, out)
    if needs_grad(x, out):
        fail(RuntimeError, "softmax", "out", "not be given when a gradient is needed", describe(x))


def _check_fits(x: Tensor, out: Any) -> None:
    check_tensor("softmax", "out", out)
    check_dtype("softmax", "out", out, (x.dtype,))
    check_shape("softmax", "out", out, x.shape)
    check_device("softmax", "out", out, x)
    if not out.is_contiguous():
        fail(ValueError, "softmax", "out", "be contiguous", f"strides {out.stride()}")


def _softmax_into(x: Tensor, dim: int, method_idx: int, out: Tensor) -> Tensor:
    if dim not in (-1, x.dim() - 1) and x.dim() > 0:
        return out.copy_(softmax(x, dim, method=_METHODS[method_idx]))
    _softmax_out(x, out, method_idx)
    return out


@torch.library.register_fake("fastmoe_route::softmax")
@torch.library.register_fake("fastmoe_route::softmax_forward")
@torch.library.register_fake("fastmoe_route::softmax_plain_forward")
def _softmax_fake(x: Tensor, method: int = 0) -> Tensor:
    check_dtype("softmax", "x", x, FLOAT_DTYPES)  # tensors without data come here unchecked
    return x.new_empty(x.shape)


@torch.library.register_fake("fastmoe_route::softmax_out")
@torch.library.register_fake("fastmoe_route::softmax_plain_out")
def _softmax_out_fake(x: Tensor, out: Tensor, method: int = 0) -> None:
    check_dtype("softmax", "x", x, FLOAT_DTYPES)
    _check_fits(x, out)


@torch.library.register_fake("fastmoe_route::softmax_backward")
def _softmax_backward_fake(grad_y: Tensor, y: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _softmax_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, None]:
    if grad_y is None:
        return None, None
    (y,) = ctx.saved_tensors
    return _softmax_backward_op(grad_y, y), None


_differentiable_softmax = register_autograd(
    "softmax",
    _softmax_backward,
    setup_context=_softmax_setup_context,
    bare="softmax_forward",
    one_input=True,
)


def softmax_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest softmax probabilities of each row and their columns, in one read of `x`.

    Ranked by `x` itself, best first: ties go to the lower column, NaN ranks below every number
    (-inf included). A row with a NaN or a +inf, and one that is all -inf, has NaN values, as its
    softmax would; its columns are valid and distinct all the same. The sum of exponentials is the
    online softmax's (arXiv:1805.02867).

    Args:
        x: `[..., C]`, up to 2^31 - 1 columns; float32, bfloat16, float16 (computed in float32) or
            float64; rows may be strided.
        k: how many, in `[1, min(C, 64)]`.

    Returns:
        Values `[..., k]` in the dtype of `x`, differentiable, and their int64 columns `[..., k]`.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if `x` has no dimension or `k` is out of range.

    Example:
        >>> softmax_topk(torch.tensor([0.0, 1.0, 1.0, -torch.inf]), 2)
        (tensor([0.4223, 0.4223]), tensor([1, 2]))
    """
    check_rows("softmax_topk", "x", x)
    columns = x.shape[-1]
    k = check_int("softmax_topk", "k", k, 1, min(columns, MAX_K))
    rows = x if x.dim() == 2 else x.reshape(-1, columns)
    if needs_grad(x):
        values, _, indices = _ops.softmax_topk(rows, k)
    else:
        values, indices = _ops.softmax_topk_forward(rows, k)
    if x.dim() == 2:
        return values, indices
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


@torch.library.register_fake("fastmoe_route::softmax_topk")
def _softmax_topk_fake(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty(rows, k),
        x.new_empty(rows, 2, dtype=torch.float64),
        x.new_empty(rows, k, dtype=torch.int64),
    )


@torch.library.register_fake("fastmoe_route::softmax_topk_forward")
def _softmax_topk_forward_fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


@torch.library.register_fake("fastmoe_route::softmax_topk_backward")
def _softmax_topk_backward_fake(
    grad_values: Tensor, x: Tensor, statistics: Tensor, indices: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


def _topk_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output[1:])


def _topk_backward(ctx: Any, grad_values: Tensor | None) -> tuple[Tensor | None, None]:
    if grad_values is None:
        return None, None
    return _ops.softmax_topk_backward(grad_values, *ctx.saved_tensors), None


register_autograd(
    "softmax_topk", _topk_backward, setup_context=_topk_setup_context, num_differentiable=1
)
