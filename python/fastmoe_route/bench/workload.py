"""The data of a row: weights and inputs, in as many copies as it takes to outgrow the caches.

Everything is derived from one seed. Large tensors are filled from a block of random values whose
length is no divisor of an expert, so experts differ although only the block was drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmoe_route.bench.machine import available_bytes
from fastmoe_route.bench.shapes import Shape

_BLOCK = (1 << 22) + 8191
MAX_COPIES = 256


class OutOfMemory(RuntimeError):
    """The row does not fit the memory that is free; it is skipped with this message."""


def generator(seed: int) -> torch.Generator:
    """A generator of its own for every purpose."""
    return torch.Generator().manual_seed(seed)


def require_memory(num_bytes: int, what: str) -> None:
    """Raises OutOfMemory if `num_bytes` are more than four fifths of what is free."""
    free = available_bytes()
    if num_bytes > 0.8 * free:
        raise OutOfMemory(f"{what} needs {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float) -> Tensor:
    """Normal values times `scale`; repeats with period `_BLOCK`."""
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    block = torch.randn(min(_BLOCK, flat.numel()), generator=generator(seed)) * scale
    block = block.to(dtype)
    for begin in range(0, flat.numel(), _BLOCK):
        part = flat[begin : begin + _BLOCK]
        part.copy_(block[: part.numel()])
    return out


@dataclass
class Weights:
    """Expert weights of one shape and dtype: `up [E, 2I, H]`, `down [E, H, I]`, some copies."""

    ups: list[Tensor]
    downs: list[Tensor]
    cached: bool  # small enough to be left in the caches
    # The kernels of others on every copy (bench/peers.py), and why some are missing.
    peers: dict[str, list[Callable[..., Tensor]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def copies(self) -> int:
        """How many sets there are."""
        return len(self.ups)

    def require_grad(self, wanted: bool) -> None:
        """Switches gradients on or off."""
        for tensor in (*self.ups, *self.downs):
            tensor.requires_grad_(wanted)


def make_weights(
    shape: Shape, dtype: torch.dtype, seed: int, cached_set: int, rotation_bytes: int
) -> Weights:
    """As many copies as outgrow `rotation_bytes`, within half of the free memory, at least one.

    Raises:
        OutOfMemory: not even one copy fits.
    """
    one_copy = shape.num_experts * shape.expert_elements * dtype.itemsize
    require_memory(one_copy, f"the weights of {shape.name} in {str(dtype).removeprefix('torch.')}")
    copies, cached = copies_for(one_copy, cached_set, rotation_bytes)
    copies = min(copies, max(1, available_bytes() // (2 * one_copy)))
    up_shape = (shape.num_experts, 2 * shape.intermediate, shape.hidden)
    down_shape = (shape.num_experts, shape.hidden, shape.intermediate)
    up_scale, down_scale = shape.hidden**-0.5, shape.intermediate**-0.5
    up = random_tensor(up_shape, dtype, seed, up_scale)
    down = random_tensor(down_shape, dtype, seed + 1, down_scale)
    # Copies hold the same values: only their place in memory matters.
    return Weights(
        [up, *(up.clone() for _ in range(copies - 1))],
        [down, *(down.clone() for _ in range(copies - 1))],
        cached,
    )


@dataclass
class Tokens:
    """One set of inputs: hidden states, and the routing plain PyTorch finds for random logits."""

    x: Tensor  # [T, H]
    experts: Tensor  # int32 [T, K]
    weights: Tensor  # float32 [T, K]


def make_tokens(shape: Shape, tokens: int, dtype: torch.dtype, seed: int) -> Tokens:
    """Normal hidden states; logits with the mild imbalance of a trained router."""
    gen = generator(seed)
    x = torch.randn(tokens, shape.hidden, generator=gen).to(dtype)
    logits = torch.randn(tokens, shape.num_experts, generator=gen)
    logits += 0.5 * torch.randn(shape.num_experts, generator=gen)
    scores = logits.softmax(-1)
    weights, experts = scores.topk(shape.top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return Tokens(x, experts.int(), weights)


def copies_for(set_bytes: int, cached_set: int, rotation_bytes: int) -> tuple[int, bool]:
    """Copies of an input set of `set_bytes`, and whether the set is left in the caches instead.

    >>> copies_for(1000, 2_000_000, 10**9), copies_for(10**8, 2_000_000, 10**9)
    ((1, True), (10, False))
    """
    if set_bytes <= cached_set:
        return 1, True
    return min(MAX_COPIES, -(-rotation_bytes // set_bytes)), False
