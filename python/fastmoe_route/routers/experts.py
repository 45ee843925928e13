"""The experts of a layer as routers see them: tensors, and three ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoe_route.moe_mlp import moe_mlp
from fastmoe_route.results import DispatchPlan, Routing


class Experts(NamedTuple):
    """`E` feed-forward networks; the arguments of `moe_mlp` that do not change from call to call.

    Attributes:
        w_up: `[E, H, 2I]` for gated activations, else `[E, H, I]`.
        w_down: `[E, I, H]`.
        activation: one of those of `moe_mlp`.
        bias_up: `[E, 2I]` or `[E, I]`, or None.
        bias_down: `[E, H]` or None.
    """

    w_up: Tensor
    w_down: Tensor
    activation: str = "swiglu"
    bias_up: Tensor | None = None
    bias_down: Tensor | None = None

    def __call__(
        self, x: Tensor, routing: Routing | tuple[Tensor, Tensor], plan: DispatchPlan | None = None
    ) -> Tensor:
        """The weighted sum of every token's experts, `[T, H] -> [T, H]`."""
        return moe_mlp(
            x,
            routing,
            self.w_up,
            self.w_down,
            activation=self.activation,
            bias_up=self.bias_up,
            bias_down=self.bias_down,
            plan=plan,
        )

    def each(self, x: Tensor) -> Tensor:
        """What every expert makes of every token, `[T, H] -> [T, E, H]`."""
        num_tokens, num_experts = x.shape[0], self.w_up.shape[0]
        experts = torch.arange(num_experts, dtype=torch.int32, device=x.device)
        experts = experts.repeat(num_tokens)[:, None]
        weights = torch.ones(experts.shape, dtype=torch.float32, device=x.device)
        rows = x.repeat_interleave(num_experts, dim=0)
        return self(rows, (experts, weights)).view(num_tokens, num_experts, x.shape[1])

    def part(self, which: slice) -> Experts:
        """Some of the experts, without a copy."""
        return self._changed(lambda value: value[which])

    def merged(self, weights: Tensor) -> Experts:
        """Experts whose parameters are weighted sums, `weights [S, E]`; the result has `S`."""
        return self._changed(
            lambda value: torch.einsum("se,e...->s...", weights.to(value.dtype), value)
        )

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Experts:
        biases = (None if b is None else change(b) for b in (self.bias_up, self.bias_down))
        return Experts(change(self.w_up), change(self.w_down), self.activation, *biases)
