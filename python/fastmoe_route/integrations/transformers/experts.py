"""The experts backend: one function that runs any experts module of transformers 5.

A module says how its weights lie (`is_transposed`), whether it has biases, a gate, a norm after
each expert, and how gate and up projection meet (`_apply_gate`). Weights and biases are used in
place in either layout. The activation is recognised by what it computes: the module's own function
is evaluated once on a grid of numbers, values and gradients, and compared with each activation of
`moe_mlp`. What matches, and has no tensors of its own that could be learned or loaded, runs fused
in `moe_mlp`. Everything else runs the module's own function, between two grouped products. So a
custom activation is never replaced by a similar one, and a known formula under a new name is still
fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe_route._arguments import FLOAT_DTYPES, check_module
from fastmoe_route._environment import logger
from fastmoe_route.dispatch import permute, plan_dispatch, unpermute
from fastmoe_route.grouped_mm import grouped_mm
from fastmoe_route.moe_mlp import ACTIVATIONS, GATED_ACTIVATIONS, moe_mlp
from fastmoe_route.reference.experts import activate

_TRAITS = ("has_bias", "is_transposed", "_apply_gate")  # whatever the version of transformers 5
_CACHE = "_fastmoe_route_activation"
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj", "parametrizations.")
_SIMPLE = frozenset((bool, float, int, str))
OWN = ""  # stands for the module's own function where an activation is named

# Both sides of every threshold in use (0 of relu, the limits of clamped activations, the range in
# which sigmoid and erf are curved), and none of the thresholds themselves, where gradients jump.
_GRID = (-1e5, -301.0, -33.0, -11.3, -7.6, -6.4, -4.0, -2.2, -1.1, -0.6, -0.2, -0.01)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What `experts_implementation="fastmoe_route"` calls in place of an experts module's forward.

    Args:
        module: a module whose class is decorated with `use_experts_implementation`.
        hidden_states: float `[T, H]`.
        top_k_index: int `[T, K]`, the expert of each slot; -1 and `num_experts` mean none, the
            latter being the sentinel of transformers' expert parallelism.
        top_k_weights: float `[T, K]`.

    Returns:
        `[T, H]` in the dtype of `hidden_states`, the weighted sum of every token's experts.
        Differentiable in `hidden_states`, `top_k_weights` and the module's parameters.

    Raises:
        TypeError: the module's weights are no plain floating-point tensors, or it lacks a trait;
            the message says what to use instead.
    """
    has_gate, w_up = _up_of(module)
    w_down = module.down_proj
    _check_dtypes(module, w_up, w_down)
    bias_up = bias_down = None
    if module.has_bias:
        bias_up = module.gate_up_proj_bias if has_gate else module.up_proj_bias
        bias_down = module.down_proj_bias
    if not module.is_transposed:
        w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)
    dtype = hidden_states.dtype
    x = hidden_states
    if dtype != w_up.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(w_up.dtype)
    activation, interleaved = activation_of(module)
    if activation != OWN:
        y = moe_mlp(
            x,
            (top_k_index, top_k_weights),
            w_up,
            w_down,
            activation=activation,
            interleaved=interleaved,
            bias_up=bias_up,
            bias_down=bias_down,
            allow_unrouted=True,
        )
    else:
        plan = plan_dispatch(top_k_index, w_up.shape[0], allow_unrouted=True)
        rows = grouped_mm(permute(x, plan), w_up, plan.offsets, bias=bias_up)
        rows = module._apply_gate(rows) if has_gate else module.act_fn(rows)
        rows = grouped_mm(rows, w_down, plan.offsets, bias=bias_down)
        if getattr(module, "has_post_expert_norm", False):
            rows = module.post_expert_norm(rows)
        y = unpermute(rows, plan, top_k_weights)
    return y if y.dtype == dtype else y.to(dtype)


def explain(model: nn.Module) -> dict[str, str]:
    """How each experts module of a model would run on this backend.

    Args:
        model: any module; those below it with the traits of an experts module are listed.

    Returns:
        By module name: `fused NAME`, NAME being an activation of `moe_mlp`; `own activation`, for
        the module's own function between two grouped products; or `refused: WHY`.

    Raises:
        TypeError: `model` is no module.
    """
    check_module("explain", "model", model)
    found = {}
    for name, module in model.named_modules():
        if all(hasattr(module, trait) for trait in _TRAITS):
            found[name] = _explain(module)
    return found


def _explain(module: Any) -> str:
    try:
        w_up = _up_of(module)[1]
        _check_dtypes(module, w_up, module.down_proj)
    except (TypeError, AttributeError) as error:
        return f"refused: {error}"
    activation, interleaved = activation_of(module)
    if activation == OWN:
        return "own activation"
    return f"fused {activation}" + (", interleaved" if interleaved else "")


def _up_of(module: Any) -> tuple[bool, Tensor]:
    """Whether there is a gate, and the up projection; the first transformers 5 knew no other."""
    has_gate = getattr(module, "has_gate", True)
    return has_gate, module.gate_up_proj if has_gate else module.up_proj


def _check_dtypes(module: Any, w_up: Tensor, w_down: Tensor) -> None:
    if w_up.dtype in FLOAT_DTYPES and w_down.dtype == w_up.dtype:
        return
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
    raise TypeError(
        f"fastmoe_route: the weights of {type(module).__name__} must share one of {names}, got "
        f"{w_up.dtype} and {w_down.dtype}; load the model unquantised, or choose "
        'experts_implementation="grouped_mm" or "eager" for it'
    )


# ---- which activation a module computes --------------------------------------------------------


def activation_of(module: Any) -> tuple[str, bool]:
    """The activation of `moe_mlp` that the module computes, and whether its gate is interleaved.

    The answer is kept on the module and found again when its class or its `act_fn` has changed, or
    a number, flag or string (a clamp limit, say, or `training`) of either or, for a class with an
    `_apply_gate` of its own, of its config. A compiled module is traced again when anything that
    its gate reads has changed.

    Returns:
        `("", False)` where only the module's own function will do.
    """
    if torch.compiler.is_compiling():
        found: tuple[str, bool] = _recognise(module)
        is_guarded = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        if found[0] != OWN and is_guarded:
            _trace_what_is_read(module)
        return found
    state = module.__dict__
    gate = type(module)._apply_gate
    act = module._modules.get("act_fn", state.get("act_fn"))
    values = [*state.values(), *getattr(act, "__dict__", {}).values()]
    if gate.__name__ != "_default_apply_gate":
        values += getattr(state.get("config"), "__dict__", {}).values()
    key = (gate, act, [value for value in values if type(value) in _SIMPLE])
    kept = state.get(_CACHE, ())
    for known, found in kept:
        if known == key:
            return found
    found = _recognise(module)
    state[_CACHE] = ((key, found), *kept[:3])  # a few, as `training` goes back and forth
    logger.info("%s runs with %s", type(module).__name__, found[0] or "its own activation")
    return found


def _trace_what_is_read(module: Any) -> None:
    """Runs the activation on no rows: the compiler then guards all it reads, and drops the rest."""
    has_gate, w_up = _up_of(module)
    shape = (0, w_up.shape[-1 if module.is_transposed else 1])
    no_rows = torch.empty(shape, dtype=w_up.dtype, device=w_up.device)
    if has_gate:
        module._apply_gate(no_rows)
    else:
        module.act_fn(no_rows)


@torch.compiler.assume_constant_result
def _recognise(module: Any) -> tuple[str, bool]:
    has_gate = _up_of(module)[0]
    if getattr(module, "has_post_expert_norm", False) or _has_learned_activation(module):
        return OWN, False
    with _apart():
        numbers = _numbers()
        halves = torch.cartesian_prod(numbers, numbers).t()  # every gate beside every up
        for name in ACTIVATIONS:
            if name not in GATED_ACTIVATIONS:
                if not has_gate and _agree(module.act_fn, numbers, name):
                    return name, False
            elif has_gate:
                for interleaved in (False, True):
                    joined = (halves.t() if interleaved else halves).reshape(1, -1)
                    if _agree(module._apply_gate, joined, name, interleaved):
                        return name, interleaved
    return OWN, False


def _has_learned_activation(module: Any) -> bool:
    """Whether there are tensors beside the projections, which the activation may read."""
    named = (*module.named_parameters(), *module.named_buffers())
    return not all(name.startswith(_PROJECTIONS) for name, _ in named)


@contextmanager
def _apart() -> Iterator[None]:
    """Real numbers and their gradients, whatever goes on around this call.

    That may be a trace, of which the modes set here are no part; a transform of torch.func; a
    default device; or a checkpoint, which counts what is saved.
    """
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    own_hooks: Any = nullcontext()
    autograd: Any = torch._C._autograd
    if autograd._saved_tensors_hooks_is_enabled():  # they are not under torch.func.grad
        own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with (
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        torch.inference_mode(False),
        torch.enable_grad(),
        own_hooks,
    ):
        yield


def _numbers() -> Tensor:
    grid = torch.tensor(_GRID, dtype=torch.float64)
    return torch.cat([grid, -grid.flip(0) * 1.03])


def _agree(own: Any, numbers: Tensor, *known: Any) -> bool:
    """Whether `own` and `activate` have the same values and gradients, up to float32 rounding."""
    results = []
    for function, arguments in ((activate, known), (own, ())):
        x = numbers.clone().requires_grad_()
        try:
            y = function(x, *arguments)
            results.append((y, *torch.autograd.grad(y.sum(), x)))
        except (RuntimeError, TypeError, ValueError):
            return False
    return all(
        got.shape == want.shape
        and got.dtype == want.dtype
        and bool(((got - want).abs() <= 4e-6 * want.abs() + 1e-6).all())
        for want, got in zip(*results, strict=True)
    )
