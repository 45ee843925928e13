"""Expert-choice routing: every expert takes its best tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    INT32_LIMIT,
    arithmetic_dtype,
    at_most_int64,
    check_dtype,
    check_int,
    check_scopes,
    check_tensor,
    needs_grad,
)
from fastmoe_route._autograd import register_autograd
from fastmoe_route.results import Routing

_ops = torch.ops.fastmoe_route


def expert_choice(
    scores: Tensor, capacity: int, *, scope_ids: Tensor | None = None, num_scopes: int = 1
) -> Routing:
    """Each expert takes its `capacity` best tokens, in every scope on its own (arXiv:2202.09368).

    Ties go to the lower token; NaN ranks below every number, and is taken if room is left. Where a
    scope has no more than `capacity` tokens, every expert takes them all. With scopes, what one
    request gets never depends on another.

    Args:
        scores: `[T, E]`, float32, bfloat16, float16 or float64; any strides.
        capacity: tokens per expert (and scope), at least 1.
        scope_ids: int32 `[T]`, the scope of each token, in `[0, num_scopes)`; None for one scope.
        num_scopes: the number of scopes.

    Returns:
        `Routing` with `K = E`: slot `j` holds expert `j`, or -1 where it did not take the token.
        The weights are the scores taken, float32 (float64 for float64 scores), differentiable.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if a shape, `capacity` or `num_scopes` does not fit.
        RuntimeError: if a scope id is out of range, or `T * E` is 2^31 or more.

    Example:
        >>> expert_choice(torch.tensor([[0.9, 0.2], [0.5, 0.4], [0.1, 0.4]]), 1).experts
        tensor([[ 0, -1],
                [-1,  1],
                [-1, -1]], dtype=torch.int32)
    """
    check_tensor("expert_choice", "scores", scores, 2)
    check_dtype("expert_choice", "scores", scores, FLOAT_DTYPES)
    capacity = check_int("expert_choice", "capacity", capacity, 1)
    num_scopes = check_scopes("expert_choice", scope_ids, num_scopes, scores, INT32_LIMIT - 1)
    capacity = at_most_int64(capacity)
    op = _ops.expert_choice if needs_grad(scores) else _ops.expert_choice_forward
    weights, experts, demand = op(scores, capacity, scope_ids, num_scopes)
    return Routing(experts, weights, demand)


@torch.library.register_fake("fastmoe_route::expert_choice")
@torch.library.register_fake("fastmoe_route::expert_choice_forward")
def _expert_choice_fake(
    scores: Tensor, capacity: int, scope_ids: Tensor | None, num_scopes: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = scores.shape
    return (
        scores.new_empty(tokens, experts, dtype=arithmetic_dtype(scores)),
        scores.new_empty(tokens, experts, dtype=torch.int32),
        scores.new_empty(experts, dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_weights: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    if grad_weights is None:
        return None, None, None, None
    (experts,) = ctx.saved_tensors
    grad_scores = grad_weights.masked_fill(experts < 0, 0.0).to(ctx.dtype)
    return grad_scores, None, None, None


register_autograd(
    "expert_choice", _backward, setup_context=_setup_context, num_differentiable=1, once=False
)
