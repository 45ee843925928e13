"""The expert layer in one op: gather, up projection, activation, down projection, combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    ID_DTYPES,
    arithmetic_dtype,
    autocast_dtype,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_routing,
    check_shape,
    check_tensor,
    describe,
    fail,
    kept,
    needs_grad,
)
from fastmoe_route._autograd import direct, register_autograd
from fastmoe_route.dispatch import plan_dispatch
from fastmoe_route.results import DispatchPlan, Routing

_moe_mlp_forward = torch.ops.fastmoe_route.moe_mlp_forward.default
_moe_mlp_backward = torch.ops.fastmoe_route.moe_mlp_backward.default

# For a few tokens. Tens of megabytes of weights leave nothing of the caller in the caches: a plan
# and checks apart took 80 us more than one operator, 6% of a token's call.
_routed_forward = direct(torch.ops.fastmoe_route.moe_mlp_routed_forward.default)
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_FLOAT64, _HALVES = torch.float64, (torch.bfloat16, torch.float16)

GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu", "swiglu_clamped")
ACTIVATIONS = (*GATED_ACTIVATIONS, "silu", "gelu", "relu", "relu2")
WEIGHTS_ON = ("output", "input")
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_ON_INPUT = {"output": False, "input": True}


def moe_mlp(
    x: Tensor,
    routing: Routing | Sequence[Tensor],
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "swiglu",
    interleaved: bool = False,
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    weights_on: str = "output",
    plan: DispatchPlan | None = None,
    allow_unrouted: bool = False,
) -> Tensor:
    """Sends every token through its experts and sums what they return.

    `y[t] = sum over j ascending of weights[t, j] * expert(x[t])` over the kept slots of token `t`,
    in float32 (float64 for float64), where
    `expert_e(x) = act(x @ w_up[e] + bias_up[e]) @ w_down[e] + bias_down[e]`.
    A token without a kept slot gives 0. No permuted copy of `x` and no expert output is kept; the
    backward saves `x`, the up projection's output and integer maps.

    Activations: `silu`, `gelu` (exact, erf), `relu`, `relu2` (`relu(x)^2`), and the gated
    `swiglu`, `geglu`, `reglu` = `f(gate) * up` with `f` = silu, gelu, relu, and `swiglu_clamped`
    (gpt-oss): `(clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g)` with `g = min(gate, 7)`.

    Deterministic with any number of threads, and batch-invariant: a token's result does not depend
    on the other tokens (unless a capacity drops slots). Under `torch.autocast`, `x`, the expert
    weights and the biases are cast to the autocast dtype.

    Args:
        x: float `[T, H]`, rows may be strided.
        routing: a `Routing`, or a pair `(experts [T, K], weights [T, K])`, tuple or list, with
            weights of any float dtype. `experts` is read only if `plan` is None.
        w_up: `[E, H, 2I]` for gated activations, else `[E, H, I]`; the dtype of `x`. Any view whose
            last two dimensions are row- or column-major is used in place, so an `nn.Linear`-style
            `[E, out, in]` parameter is passed as `w.transpose(1, 2)`.
        w_down: `[E, I, H]`, likewise.
        activation: see above.
        interleaved: gate and up are the even and odd columns of `w_up` instead of its halves.
        bias_up: `[E, 2I]` or `[E, I]`, laid out as the columns of `w_up`.
        bias_down: `[E, H]`.
        weights_on: `"output"`, or `"input"`: the expert sees `weights[t, j] * x[t]` and outputs are
            summed unweighted (Llama 4).
        plan: where the slots go; None makes one without capacity.
        allow_unrouted: where that is made, the id `E` means none, too, as in `plan_dispatch`.

    Returns:
        `[T, H]` in the dtype of `x`. Differentiable in `x`, the routing weights, `w_up`, `w_down`,
        `bias_up` and `bias_down`; gradients of weights have the memory layout of their weights, and
        experts without rows get zeros.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a shape, device or name that does not fit.
        RuntimeError: for an id of `experts` outside `[-1, E)`, or a plan that was not made for
            these sizes or whose maps are not inverse to each other (checked on CPU).

    Example:
        >>> import torch, fastmoe_route as fr
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> w_up = torch.eye(2).repeat(3, 1, 1)  # three experts, H = I = 2
        >>> w_down = torch.eye(2) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
        >>> pair = (torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.5]]))
        >>> fr.moe_mlp(x, pair, w_up, w_down, activation="relu")
        tensor([[ 50.5000, 101.0000]])
    """
    failed = None
    if plan is None and not is_dynamo_compiling() and not _is_any_autocast_enabled():
        try:
            experts, weights = routing[0], routing[1]
            if (
                isinstance(routing, (tuple, list))
                and isinstance(interleaved, bool)
                and isinstance(allow_unrouted, bool)
                and x.dtype is not _FLOAT64
                and weights.dtype is not _FLOAT64
                and not (
                    (_is_grad_enabled() or forward_ad._current_level >= 0)
                    and needs_grad(x, weights, w_up, w_down, bias_up, bias_down)
                )
            ):
                if weights.dtype in _HALVES:
                    weights = weights.float()
                options = (_CODES[activation], interleaved, _ON_INPUT[weights_on], allow_unrouted)
                return _routed_forward(  # type: ignore[no-any-return]
                    x, experts, weights, w_up, w_down, bias_up, bias_down, *options
                )
        except RuntimeError as error:
            failed = kept(error)  # unless an argument is wrong
        except (TypeError, ValueError, AttributeError, LookupError):
            pass  # what follows says what is wrong
    code = check_choice("moe_mlp", "activation", activation, ACTIVATIONS)
    on_input = check_choice("moe_mlp", "weights_on", weights_on, WEIGHTS_ON) == 1
    check_flag("moe_mlp", "interleaved", interleaved)
    check_flag("moe_mlp", "allow_unrouted", allow_unrouted)
    check_tensor("moe_mlp", "x", x, 2)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, w_up, w_down = (_cast(v, dtype) for v in (x, w_up, w_down))
        bias_up = None if bias_up is None else _cast(bias_up, dtype)
        bias_down = None if bias_down is None else _cast(bias_down, dtype)
    is_gated = code < len(GATED_ACTIVATIONS)
    fits = failed is None and _fits(x, routing, w_up, w_down, bias_up, bias_down, is_gated)
    if not fits:
        check_routing("moe_mlp", routing, x)
        _check_weights(x, w_up, w_down, bias_up, bias_down, is_gated)
    if failed is not None:
        raise failed.pop()
    experts, weights = routing[0], routing[1]
    if plan is None:
        plan = plan_dispatch(experts, w_up.shape[0], allow_unrouted=allow_unrouted)
    elif not _fits_plan(x, plan, w_up.shape[0], weights.shape[1]):
        check_plan("moe_mlp", x, plan, w_up.shape[0], weights.shape[1])
    weights = weights.to(arithmetic_dtype(x))
    tensors = (x, weights, w_up, w_down, bias_up, bias_down)
    y: Tensor
    if needs_grad(*tensors):
        y, _ = _differentiable(*tensors, *plan[:3], code, interleaved, on_input)
    else:
        y = _moe_mlp_forward(*tensors, *plan[:3], code, interleaved, on_input)
    return y


def _cast(value: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        names = "x, w_up, w_down and the biases"
        fail(TypeError, "moe_mlp", names, "be tensors", describe(value))
    return value.to(dtype)


def _fits(
    x: Tensor,
    routing: Any,
    w_up: Any,
    w_down: Any,
    bias_up: Any,
    bias_down: Any,
    is_gated: bool,
) -> bool:
    """Whether nothing is wrong. One by one, the checks that can say what is take 15 us more."""
    if not isinstance(routing, (tuple, list)) or len(routing) < 2 or bias_up is not None:
        return False
    experts, weights = routing[0], routing[1]
    for value in (experts, weights, w_up, w_down):
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
            return False
    if bias_down is not None or experts.dim() != 2 or not w_up.dim() == w_down.dim() == 3:
        return False
    num_tokens, hidden = x.shape
    num_experts, width, hidden_out = w_down.shape
    device, dtype = x.device, x.dtype
    return (
        hidden_out == hidden
        and num_experts > 0
        and width > 0
        and w_up.shape == (num_experts, hidden, 2 * width if is_gated else width)
        and experts.shape == weights.shape
        and experts.shape[0] == num_tokens
        and dtype in FLOAT_DTYPES
        and w_up.dtype == w_down.dtype == dtype
        and experts.dtype in ID_DTYPES
        and weights.dtype in FLOAT_DTYPES
        and device == w_up.device == w_down.device == experts.device == weights.device
    )


def _fits_plan(x: Tensor, plan: Any, num_experts: int, top_k: int) -> bool:
    """As `_fits`, for a plan."""
    if not isinstance(plan, DispatchPlan):
        return False
    offsets, row_to_slot, slot_to_row = plan[:3]
    for value in (offsets, row_to_slot, slot_to_row):
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
            return False
    return (
        offsets.dim() == row_to_slot.dim() == 1
        and offsets.shape[0] == num_experts + 1
        and slot_to_row.shape == (x.shape[0], top_k)
        and offsets.dtype == row_to_slot.dtype == slot_to_row.dtype == torch.int32
        and x.device == offsets.device == row_to_slot.device == slot_to_row.device
    )


def _check_weights(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    is_gated: bool,
) -> None:
    check_dtype("moe_mlp", "x", x, FLOAT_DTYPES)
    check_tensor("moe_mlp", "w_up", w_up, 3)
    check_tensor("moe_mlp", "w_down", w_down, 3)
    num_experts, hidden = w_up.shape[0], x.shape[1]
    if num_experts == 0:
        fail(ValueError, "moe_mlp", "w_up", "hold at least 1 expert", describe(w_up))
    check_shape("moe_mlp", "w_up", w_up, (-1, hidden, -1))
    check_shape("moe_mlp", "w_down", w_down, (num_experts, -1, hidden))
    up = w_down.shape[1] * (2 if is_gated else 1)
    if up == 0:
        rule = "have an expert width of at least 1"
        fail(ValueError, "moe_mlp", "w_down", rule, describe(w_down))
    check_shape("moe_mlp", "w_up", w_up, (num_experts, hidden, up))
    named = [("w_up", w_up), ("w_down", w_down)]
    for name, bias, size in (("bias_up", bias_up, up), ("bias_down", bias_down, hidden)):
        if bias is not None:
            check_tensor("moe_mlp", name, bias, 2)
            check_shape("moe_mlp", name, bias, (num_experts, size))
            named.append((name, bias))
    for name, value in named:
        check_dtype("moe_mlp", name, value, (x.dtype,))
        check_device("moe_mlp", name, value, x)


def check_plan(op: str, x: Tensor, plan: Any, num_experts: int, top_k: int) -> None:
    """Requires a `DispatchPlan` of these sizes."""
    if not isinstance(plan, tuple) or len(plan) < 3:
        fail(TypeError, op, "plan", "be a DispatchPlan", describe(plan))
    wanted = (
        ("plan.offsets", plan[0], (num_experts + 1,)),
        ("plan.row_to_slot", plan[1], (-1,)),
        ("plan.slot_to_row", plan[2], (x.shape[0], top_k)),
    )
    for name, value, shape in wanted:
        check_tensor(op, name, value)
        check_dtype(op, name, value, (torch.int32,))
        check_shape(op, name, value, shape)
        check_device(op, name, value, x)


@torch.library.register_fake("fastmoe_route::moe_mlp")
def _moe_mlp_fake(
    x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    _, _, _, row_to_slot, *_ = others  # after both biases and the offsets
    return x.new_empty(x.shape), x.new_empty(row_to_slot.shape[0], w_up.shape[2])


@torch.library.register_fake("fastmoe_route::moe_mlp_forward")
def _moe_mlp_forward_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastmoe_route::moe_mlp_routed_forward")
def _moe_mlp_routed_forward_fake(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: int,
    *_: bool,
) -> Tensor:
    check_routing("moe_mlp", (experts, weights), x)
    _check_weights(x, w_up, w_down, bias_up, bias_down, activation < len(GATED_ACTIVATIONS))
    return x.new_empty(x.shape)


def _empty_with_layout(w: Tensor) -> Tensor:
    """An empty tensor of the shape of `w`, column-major where `w` is."""
    experts, rows, cols = w.shape
    if w.stride(1) == 1 and w.stride(2) != 1:
        return w.new_empty(experts, cols, rows).transpose(1, 2)
    return w.new_empty(experts, rows, cols)


@torch.library.register_fake("fastmoe_route::moe_mlp_backward")
def _moe_mlp_backward_fake(
    grad_y: Tensor, x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    wanted: int = others[-1]
    num_experts = w_up.shape[0]
    return (
        x.new_empty(x.shape if wanted & 1 else 0),
        weights.new_empty(weights.shape if wanted & 2 else 0),
        _empty_with_layout(w_up) if wanted & 4 else x.new_empty(0),
        _empty_with_layout(w_down) if wanted & 8 else x.new_empty(0),
        x.new_empty((num_experts, w_up.shape[2]) if wanted & 16 else 0),
        x.new_empty((num_experts, x.shape[1]) if wanted & 32 else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, w_up, w_down, _, bias_down, *maps, activation, interleaved, on_input = inputs
    ctx.save_for_backward(x, weights, w_up, w_down, bias_down, *maps, output[1])
    ctx.options = (activation, interleaved, on_input)


def _backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 12
    wanted = sum(1 << i for i in range(6) if ctx.needs_input_grad[i])
    grads = _moe_mlp_backward(grad_y, *ctx.saved_tensors, *ctx.options, wanted)
    return (*(grad if wanted >> i & 1 else None for i, grad in enumerate(grads)), *(None,) * 6)


_differentiable = register_autograd(
    "moe_mlp", _backward, setup_context=_setup_context, num_differentiable=1
)
