"""assign_balanced: every expert receives exactly as many tokens as every other."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    check_choice,
    check_dtype,
    check_tensor,
    describe,
    fail,
)

METHODS = ("auction", "exact")

_ops = torch.ops.fastmoe_route
_library = torch.library.Library("fastmoe_route", "FRAGMENT")
_library.define("assign_balanced_exact(Tensor scores) -> Tensor")


def assign_balanced(scores: Tensor, *, method: str = "auction") -> Tensor:
    """Gives every expert exactly `T / E` tokens so that the total score is as large as it can be.

    The assignment of BASE layers (arXiv:2103.16716). `auction` is that of Bertsekas with equal
    seats per expert; its total is within `T * eps` of the optimum, `eps = max(range / 50, 1e-4)`
    with the range of all scores, and it runs on one CPU core. `exact` is the optimum, by SciPy's
    linear sum assignment, in time `T^3` and memory `T^2`. Scores on a GPU are copied to the host
    and the result back, which waits for the GPU.

    Args:
        scores: `[T, E]`, finite, float32, bfloat16, float16 or float64; any strides. `E` divides
            `T`.
        method: `auction` or `exact`.

    Returns:
        int32 `[T]`, the expert of each token; every expert occurs `T / E` times. No gradient.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `T` is no multiple of `E`, or the method is unknown.
        RuntimeError: a score is infinite or NaN.
        ImportError: `exact` without SciPy.

    >>> assign_balanced(torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.5, 0.4], [0.3, 0.1]]))
    tensor([1, 0, 1, 0], dtype=torch.int32)
    """
    check_tensor("assign_balanced", "scores", scores, 2)
    check_dtype("assign_balanced", "scores", scores, FLOAT_DTYPES)
    code = check_choice("assign_balanced", "method", method, METHODS)
    num_tokens, num_experts = scores.shape
    if num_experts < 1:
        rule = "have at least 1 expert"
        fail(ValueError, "assign_balanced", "scores", rule, describe(scores))
    if num_tokens % num_experts != 0:
        rule = f"have a multiple of {num_experts} tokens"
        fail(ValueError, "assign_balanced", "scores", rule, num_tokens)
    op = _ops.assign_balanced_exact if code else _ops.assign_balanced
    return op(scores.detach())  # type: ignore[no-any-return]


def _exact(scores: Tensor) -> Tensor:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        text = "assign_balanced: method 'exact' needs SciPy: pip install fastmoe-route[routers]"
        raise ImportError(text) from error
    num_tokens, num_experts = scores.shape
    values = scores.double().cpu()
    if not bool(torch.isfinite(values).all()):
        fail(RuntimeError, "assign_balanced", "scores", "be finite", "inf or NaN")
    seats = num_tokens // num_experts
    _, seat = linear_sum_assignment(values.repeat_interleave(seats, 1).numpy(), maximize=True)
    expert = torch.from_numpy(seat) // max(seats, 1)
    return expert.to(device=scores.device, dtype=torch.int32)


def _on_host(scores: Tensor) -> Tensor:
    result: Tensor = _ops.assign_balanced(scores.cpu())
    return result.to(scores.device)


_library.impl("assign_balanced_exact", _exact, "CompositeExplicitAutograd")
_library.impl("assign_balanced", _on_host, "CUDA")


@torch.library.register_fake("fastmoe_route::assign_balanced")
@torch.library.register_fake("fastmoe_route::assign_balanced_exact")
def _assign_balanced_fake(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.int32)
