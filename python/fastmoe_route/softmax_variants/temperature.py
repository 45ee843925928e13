"""Temperatures: by the step, by the entropy that is wanted, and of the step of a search."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmoe_route._arguments import check_choice, check_int, check_number, check_rows
from fastmoe_route.methods import register
from fastmoe_route.softmax import softmax
from fastmoe_route.softmax_variants.distributions import top_columns


def temperature_schedule(
    step: int, num_steps: int, start: float, end: float, *, shape: str = "exponential"
) -> float:
    """Decay from `start` at step 0 to `end` at `num_steps`, constant from there.

    The exponential is that of architecture search (arXiv:2306.06855), the cosine that of the step
    of `polytope_weights` (arXiv:2605.01928).

    Args:
        step: 0 or more.
        num_steps: at least 1.
        start: above 0.
        end: above 0; a cosine may end at 0.
        shape: `exponential` or `cosine`.

    Returns:
        `start * (end / start)^s`, or `end + (start - end) * (1 + cos(pi s)) / 2`, with
        `s = step / num_steps`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    >>> temperature_schedule(5, 10, 4.0, 1.0), temperature_schedule(5, 10, 4.0, 0.0, shape="cosine")
    (2.0, 2.0)
    """
    is_cosine = check_choice("temperature_schedule", "shape", shape, ("exponential", "cosine")) == 1
    step = check_int("temperature_schedule", "step", step, 0)
    num_steps = check_int("temperature_schedule", "num_steps", num_steps, 1)
    for name, value in (("start", start), ("end", end)):
        may_end = is_cosine and name == "end"
        check_number("temperature_schedule", name, value, 0, above=-1 if may_end else 0)
    done = min(step / num_steps, 1.0)
    if is_cosine:
        return float(end + (start - end) * (1 + math.cos(math.pi * done)) / 2)
    return float(start * (end / start) ** done)


def entropy_temperature(x: Tensor, share: float, iters: int = 60) -> Tensor:
    """The temperature at which `softmax(x / temperature)` has a share of the largest entropy.

    An entropy-based schedule lowers `share` from 1 to 0 as a search goes on: rows that differ in
    scale then sharpen alike (arXiv:2306.06855; how the paper chooses it is unverified).

    Args:
        x: `[..., N]`, `N` at least 2.
        share: of `log N`, in (0, 1).
        iters: halvings of the temperature's logarithm, between `e^-20` and `e^20` times the range
            of the row.

    Returns:
        `[..., 1]`, without gradient. A row whose entries are all equal has no such temperature and
        gets a large one.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("entropy_temperature", "x", x)
    check_int("entropy_temperature", "N", x.shape[-1], 2)
    check_number("entropy_temperature", "share", share, above=0, below=1)
    iters = check_int("entropy_temperature", "iters", iters, 1)
    x = x.detach()
    span = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).clamp(min=1e-30)
    low, high = torch.full_like(span, -20.0), torch.full_like(span, 20.0)
    for _ in range(iters):
        middle = (low + high) / 2
        p = softmax(x / (span * middle.exp()))
        entropy = -torch.xlogy(p, p).sum(-1, keepdim=True)
        is_sharp = entropy < share * math.log(x.shape[-1])
        low, high = torch.where(is_sharp, middle, low), torch.where(is_sharp, high, middle)
    return span * ((low + high) / 2).exp()


@register("polytope_step", row="L7", source="arXiv:2605.01928", verified="code")
def polytope_weights(losses: Tensor, epsilon: float) -> Tensor:
    """`softmax(-losses / epsilon)`: how a gradient-free step weighs the vertices it tried.

    The step moves to the weighted mean of the vertices of a polytope around the parameters;
    `epsilon` falls along a cosine (`temperature_schedule`), towards the best vertex alone.

    Args:
        losses: `[..., V]`, the loss at each vertex.
        epsilon: above 0; 0 gives the vertex of least loss, ties to the lower one.

    Returns:
        `[..., V]`, rows sum to 1; differentiable where `epsilon` is above 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("polytope_weights", "losses", losses)
    check_number("polytope_weights", "epsilon", epsilon, 0)
    if epsilon == 0:
        best = torch.zeros_like(losses)
        return best.scatter(-1, top_columns(-losses, 1), 1.0)
    return softmax(-losses / epsilon)
