"""Argument checks of the public functions: ``op: argument must <rule>, got <value>``.

Messages are built only in the failing branch, so the checks vanish under ``torch.compile``.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

INT32_LIMIT = 2**31
_INT64_MAX = 2**63 - 1
_FLOAT_MAX = sys.float_info.max
_NUMBERS = (float, int, torch.SymInt, torch.SymFloat, numbers.Real)
ID_DTYPES = (torch.int32, torch.int64)
INT_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(kind: type[Exception], op: str, argument: str, rule: str, got: object) -> NoReturn:
    """Raises ``kind`` with the message ``op: argument must rule, got got``."""
    raise kind(f"{op}: {argument} must {rule}, got {got}")


def describe(value: Any) -> str:
    """A short text for an error: dtype and shape of tensors, alone or in a tuple; else the repr."""
    if isinstance(value, Tensor) and value.is_nested:  # which has no shape to show
        return f"a nested tensor of {value.size(0)}"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        return f"{type(value).__name__}({', '.join(map(describe, value))})"
    return repr(value)


def check_tensor(op: str, argument: str, value: Any, *dims: int) -> None:
    """Requires a dense tensor, with one of the given numbers of dimensions if any are given."""
    if not isinstance(value, Tensor):
        fail(TypeError, op, argument, "be a torch.Tensor", describe(value))
    if value.layout is not torch.strided or value.is_nested:
        got = describe(value) if value.is_nested else f"layout {value.layout}"
        fail(TypeError, op, argument, "be a dense tensor", got)
    if dims and value.dim() not in dims:
        rule = "have " + " or ".join(str(dim) for dim in dims)
        rule += " dimension" if dims == (1,) else " dimensions"
        fail(ValueError, op, argument, rule, describe(value))


def check_dtype(op: str, argument: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Requires one of ``dtypes``."""
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        fail(TypeError, op, argument, f"be {names}", describe(value))


def check_same_dtype(op: str, argument: str, value: Tensor, x: Tensor) -> None:
    """Requires the dtype of the argument ``x``."""
    if value.dtype != x.dtype:
        rule = f"have the dtype of x, {str(x.dtype).removeprefix('torch.')}"
        fail(TypeError, op, argument, rule, describe(value))


def check_shape(op: str, argument: str, value: Any, shape: Sequence[int]) -> None:
    """Requires a tensor of exactly ``shape``; -1 stands for any size."""
    if not isinstance(value, Tensor):
        fail(TypeError, op, argument, "be a torch.Tensor", describe(value))
    ok = value.dim() == len(shape)
    if ok:
        for size, wanted in zip(value.shape, shape, strict=True):
            if wanted != -1 and size != wanted:
                ok = False
    if not ok:
        text = "[" + ", ".join("any" if size == -1 else str(size) for size in shape) + "]"
        fail(ValueError, op, argument, f"have shape {text}", describe(value))


def check_rows(op: str, argument: str, value: Any, *dims: int) -> None:
    """Requires a floating-point tensor with at least one dimension, or one of ``dims``."""
    check_tensor(op, argument, value, *dims)
    check_dtype(op, argument, value, FLOAT_DTYPES)
    if value.dim() == 0:
        fail(ValueError, op, argument, "have at least 1 dimension", describe(value))


def check_device(op: str, argument: str, value: Tensor, like: Tensor) -> None:
    """Requires the device of ``like``."""
    if value.device != like.device:
        fail(ValueError, op, argument, f"be on {like.device}", value.device)


def check_vector(
    op: str, argument: str, value: Any, size: int, dtypes: Sequence[torch.dtype], like: Tensor
) -> None:
    """Requires ``[size]`` of one of ``dtypes``, on the device of ``like``."""
    check_tensor(op, argument, value, 1)
    check_dtype(op, argument, value, dtypes)
    check_shape(op, argument, value, (size,))
    check_device(op, argument, value, like)


def check_scopes(
    op: str, scope_ids: Any, num_scopes: Any, like: Tensor, most: int = INT32_LIMIT
) -> int:
    """Requires a number of scopes, which is returned as an int, and ids of the tokens ``like``.

    The ids may be None; operators look at their values.
    """
    number = check_int(op, "num_scopes", num_scopes, 1, most)
    if scope_ids is not None:
        check_vector(op, "scope_ids", scope_ids, like.shape[0], (torch.int32,), like)
    return number


def check_routing(op: str, routing: Any, x: Tensor | None = None) -> None:
    """Requires a `Routing`, or experts and weights `[T, K]`: of the tokens `x`, if given."""
    if not isinstance(routing, (tuple, list)) or len(routing) < 2:
        rule, kind = "be a Routing or a pair (experts, weights)", type(routing).__name__
        got = f"{kind} of {len(routing)}" if isinstance(routing, (tuple, list)) else kind
        fail(TypeError, op, "routing", rule, got)
    experts, weights = routing[0], routing[1]
    check_tensor(op, "experts", experts, 2)
    check_dtype(op, "experts", experts, ID_DTYPES)
    if x is not None:
        check_shape(op, "experts", experts, (x.shape[0], -1))
        check_device(op, "experts", experts, x)
    check_tensor(op, "weights", weights, 2)
    check_dtype(op, "weights", weights, FLOAT_DTYPES)
    check_shape(op, "weights", weights, experts.shape)
    check_device(op, "weights", weights, experts)


def check_int(op: str, argument: str, value: Any, low: int, high: int | None = None) -> int:
    """Requires an integer in [low, high], and returns it as an int.

    Whatever `operator.index` takes is one, NumPy's integers included; bools are refused, and so are
    tensors, whose value may be on a device.
    """
    number: int = value if type(value) is int else _index(op, argument, value)
    if number < low or (high is not None and number > high):
        rule = f"be at least {low}" if high is None else f"be in [{low}, {high}]"
        fail(ValueError, op, argument, f"be {low}" if low == high else rule, number)
    return number


def _index(op: str, argument: str, value: Any) -> int:
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, Tensor)):
        fail(TypeError, op, argument, "be an int", describe(value))
    try:
        return operator.index(value)
    except TypeError:
        fail(TypeError, op, argument, "be an int", describe(value))


def check_ids(op: str, argument: str, ids: Any, low: int, high: int) -> None:
    """Requires an integer tensor with values in [low, high], which are looked at on the CPU."""
    check_tensor(op, argument, ids)
    check_dtype(op, argument, ids, INT_DTYPES)
    check_ends(op, argument, ids, low, high)


def may_look(value: Tensor) -> bool:
    """Whether a check may read values: not where there are none, and never waiting for a device."""
    is_traced = torch.compiler.is_compiling() or isinstance(value, FakeTensor)
    return value.device.type == "cpu" and not is_traced


def check_ends(op: str, argument: str, ids: Tensor, low: int, high: int) -> None:
    """Requires whole values in [low, high], where `may_look`."""
    if may_look(ids) and ids.numel() > 0:
        for end in ids.aminmax():
            check_int(op, argument, int(end), low, high)


def check_divides(op: str, argument: str, value: Any, total: int, what: str) -> int:
    """Requires a positive divisor of ``total``, which is ``what``, and returns it as an int."""
    number = check_int(op, argument, value, 1)
    if total % number != 0:
        fail(ValueError, op, argument, f"divide the {what} {total}", number)
    return number


def check_float(
    op: str,
    argument: str,
    value: Any,
    rule: str = "be a number that a float can hold",
    kind: str = "a number",
) -> None:
    """Requires a number other than NaN that a float can hold; bools are refused."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        fail(TypeError, op, argument, f"be {kind}", describe(value))
    # A comparison, since math.isnan breaks a graph of torch.compile.
    if value != value:
        fail(ValueError, op, argument, rule, value)
    if isinstance(value, int) and abs(value) > _FLOAT_MAX:
        fail(ValueError, op, argument, "be a number that a float can hold", value)


def check_number(
    op: str,
    argument: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Requires a finite number in [low, high] and in (above, below), and returns it."""
    check_float(op, argument, value)
    if not (low <= value <= high and above < value < below):
        rule = _range_rule(low, high, above, below) if abs(value) < math.inf else "be finite"
        fail(ValueError, op, argument, rule, value)
    return value  # type: ignore[no-any-return]


def _range_rule(low: float, high: float, above: float, below: float) -> str:
    if min(high, below) < math.inf:
        left = f"({above}" if above >= low else f"[{low}"
        return f"be in {left}, " + (f"{below})" if below <= high else f"{high}]")
    return f"be above {above}" if above >= low else f"be at least {low}"


def check_module(op: str, argument: str, value: Any) -> None:
    """Requires a module of torch."""
    if not isinstance(value, torch.nn.Module):
        fail(TypeError, op, argument, "be a torch.nn.Module", repr(value))


def check_factor(op: str, argument: str, value: Any) -> None:
    """Requires a positive number that is finite, or None."""
    if value is not None:
        rule = "be positive or None"
        check_float(op, argument, value, rule, "a number or None")
        if not 0 < value < math.inf:
            fail(ValueError, op, argument, rule, value)


def check_flag(op: str, argument: str, value: Any) -> None:
    """Requires a bool."""
    # torch.compile turns what was computed from floats into a SymBool.
    if value is not True and value is not False and not isinstance(value, (bool, torch.SymBool)):
        fail(TypeError, op, argument, "be a bool", describe(value))


def at_most_int64(value: int) -> int:
    """A bound that is not reached either way, where an op would not take a larger number."""
    return _INT64_MAX if isinstance(value, int) and value > _INT64_MAX else value


def check_choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> int:
    """Requires one of ``choices`` and returns its position."""
    if not isinstance(value, str) or value not in choices:
        fail(ValueError, op, argument, "be one of " + ", ".join(choices), describe(value))
    return choices.index(value)


def kept(error: RuntimeError) -> list[RuntimeError]:
    """The error of an operator, to be raised by ``pop`` if no argument is found to be wrong.

    Nothing in the frame that keeps it then belongs to a cycle, or arguments would stay in memory
    until the garbage collector runs.
    """
    return [error.with_traceback(None)]


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What is computed in, and what weights and statistics are: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What ``torch.autocast`` asks ``x`` and what meets it to be cast to; None for as they are."""
    if not is_dynamo_compiling() and not torch._C._is_any_autocast_enabled():
        return None  # a quarter of the time
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta":  # which has no autocast
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see this call; without, the cheaper bare op is called.

    In forward mode it says that there is no such derivative, where the bare op would give zero.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0
