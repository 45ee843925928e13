"""Score functions that routers share: hidden states `[T, H]` to logits `[T, E]`, in float32.

All of them give a token the same bits whatever other tokens share the batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fastmoe_route._arguments import arithmetic_dtype
from fastmoe_route._initial import draw_normal
from fastmoe_route.grouped_mm import one_product


def wide(x: Tensor) -> Tensor:
    """`x` in the arithmetic of routers: float64 stays, all else becomes float32."""
    dtype = arithmetic_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + e^-x)`, the same bits for an element in any tensor.

    `torch.sigmoid` (like its gelu and softplus) rounds the last elements of a tensor, which do not
    fill a vector, in another way than the rest; tanh and erf it does not.
    """
    half: Tensor = (x / 2).tanh()
    return (half + 1) / 2


def gelu(x: Tensor) -> Tensor:
    """`x Phi(x)`, the same bits for an element in any tensor, as `sigmoid`."""
    return x * (torch.erf(x * 2**-0.5) + 1) / 2


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, operators take the dtypes they are given; the meta device has no autocast at all."""
    if not is_dynamo_compiling() and not torch._C._is_any_autocast_enabled():
        return nullcontext()  # a tenth of the time
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` in float32 (float64 for float64), never in an autocast dtype.

    Args:
        x: `[T, H]`.
        weight: `[E, H]`.
        bias: `[E]` or None.

    Returns:
        `[T, E]`.
    """
    x = wide(x)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    with without_autocast(x.device):
        y = one_product(x, weight.t())
    return y if bias is None else y + bias.to(y.dtype)


class Linear(nn.Module):
    """A linear map to logits, batch-invariant and in float32.

    Args:
        hidden_size: `H`.
        num_outputs: `E`.
        bias: add a learned bias.
    """

    def __init__(self, hidden_size: int, num_outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, of deviation `H ** -0.5`, and sets the bias to 0."""
        draw_normal(self.weight, self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, H] -> [T, E]`."""
        return linear(x, self.weight, self.bias)


class Recurrent(nn.Module):
    """A gated recurrent unit, batch-invariant and in float32 (arXiv:1406.1078).

    `r, u = sigmoid(W x + V h)`, `n = tanh(W_n x + r * V_n h)`, `h' = (1 - u) n + u h`.

    Args:
        size: of input and state.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input = Linear(size, 3 * size, bias=True)
        self.state = Linear(size, 3 * size, bias=True)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """`[T, size]` and `[T, size]` to the next state."""
        reset_x, keep_x, new_x = self.input(x).chunk(3, dim=1)
        reset_h, keep_h, new_h = self.state(state).chunk(3, dim=1)
        keep = sigmoid(keep_x + keep_h)
        new = (new_x + sigmoid(reset_x + reset_h) * new_h).tanh()
        mixed: Tensor = (1 - keep) * new + keep * state
        return mixed
