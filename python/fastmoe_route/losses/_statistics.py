"""What the losses take from a `Routing`, with the error that says how to ask for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe_route._arguments import check_tensor, describe, fail
from fastmoe_route.results import Routing

_ASK = {"score_sum": "stats=True", "logsumexp": "stats=True", "scores": "keep_scores=True"}


def check_is_routing(loss: str, routing: Routing) -> None:
    """Requires a `Routing`."""
    if not isinstance(routing, Routing):
        fail(TypeError, loss, "routing", "be a Routing", describe(routing))


def statistic(loss: str, routing: Routing, name: str) -> Tensor:
    """The field `name` of `routing`, which must be there."""
    check_is_routing(loss, routing)
    value = getattr(routing, name)
    if value is None:
        fail(ValueError, loss, "routing", f"carry {name}: pass {_ASK[name]} to gate", "None")
    return value  # type: ignore[no-any-return]


def probabilities(loss: str, source: Routing | Tensor) -> Tensor:
    """Distributions over experts `[T, E]`: the scores of a routing, or the tensor itself."""
    if isinstance(source, Tensor):
        check_tensor(loss, "source", source, 2)
        return source
    return statistic(loss, source, "scores")


def shares(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts over their sum, all zero for a sum of zero."""
    counts = counts.to(dtype)
    return counts / counts.sum().clamp(min=1)


def surprise(p: Tensor) -> Tensor:
    """`-p log p`, 0 at 0 with a finite gradient there."""
    return -p * p.clamp(min=torch.finfo(p.dtype).tiny).log()
