"""Experts in a fixed order, of which a token runs the first few: nested widths, early stops."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route._arguments import check_choice, check_divides, check_shape, check_tensor
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.moe_mlp import ACTIVATIONS, GATED_ACTIVATIONS
from fastmoe_route.routers.base import Common, Context, Routed
from fastmoe_route.routers.estimators import straight_through
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.random import gumbel
from fastmoe_route.routers.routings import every_expert
from fastmoe_route.routers.scores import sigmoid


@register("flextron", row="R45", source="arXiv:2406.10260", verified="mem")
class Flextron(LinearRouter):
    """Flextron: a token picks how wide its feed-forward network is; narrower ones are nested.

    The experts are the `E` equal slices of one network's neurons, sorted by importance
    (`slice_experts` makes them), and width `j` is the first `j + 1` slices, each with weight 1: its
    output is that of the network cut off there, and the widest is the whole network. The width is
    the argmax over `E` logits, in training a Gumbel draw whose probability carries the gradient.
    `static` fixes it. The paper's router also sees the wanted latency.

    Args:
        hidden_size: `H`.
        num_experts: `E` slices.
        top_k: the widest width allowed; None for all slices.
        static: use this width, 1 to `top_k`, for every token.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        static: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        top_k = num_experts if top_k is None else top_k
        super().__init__(hidden_size, num_experts, top_k, top_k, **common)
        if static is not None:
            static = self.check_int("static", static, 1, top_k)
        self.static = static

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        noise = gumbel(context, x, self.top_k) if self.training else None
        width = gate(z, 1, noise=noise)
        last = (
            width.experts
            if self.static is None
            else torch.full_like(width.experts, self.static - 1)
        )
        slices = every_expert(x.shape[0], self.top_k, x.device)
        weights = torch.ones_like(slices, dtype=z.dtype)
        if self.training and self.static is None:
            weights = straight_through(weights, width.weights.expand_as(weights))
        routing = self.built(torch.where(slices <= last, slices, -1), weights, z)
        return self.routed(routing, context, extra={"width": last[:, 0] + 1})


def slice_experts(w_up: Tensor, w_down: Tensor, num_slices: int, activation: str) -> Experts:
    """A dense network's neurons as `num_slices` equal experts; all of them together are it.

    Args:
        w_up: `[H, 2I]` for gated activations (gate half first), else `[H, I]`.
        w_down: `[I, H]`.
        num_slices: `E`, a divisor of `I`.
        activation: as of `moe_mlp`.

    Returns:
        Experts of width `I / E`, in the order of the neurons.

    Raises:
        ValueError: `E` does not divide `I`, or a shape or the activation does not fit.
    """
    code = check_choice("slice_experts", "activation", activation, ACTIVATIONS)
    check_tensor("slice_experts", "w_down", w_down, 2)
    inner, hidden = w_down.shape
    halves = 2 if code < len(GATED_ACTIVATIONS) else 1
    check_shape("slice_experts", "w_up", w_up, (hidden, halves * inner))
    num_slices = check_divides("slice_experts", "num_slices", num_slices, inner, "width")
    up = w_up.reshape(hidden, halves, num_slices, -1).permute(2, 0, 1, 3)
    down = w_down.reshape(num_slices, -1, hidden)
    return Experts(up.reshape(num_slices, hidden, -1), down, activation)


@register("ride", row="L5", source="arXiv:2010.01809", verified="code")
class Ride(LinearRouter):
    """RIDE: experts in a fixed order, until the token needs no more help.

    Expert 0 always runs; expert `e` runs if all before it did and `sigmoid(help_e) > threshold`.
    The output is the mean of those that ran. The diversity loss between experts is
    `losses.kl_diversity`, with 0.2. The paper's help gates read the experts' logits, these the
    hidden state.

    Defaults: threshold 0.5; 1 stops after one expert, 0 runs all.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: the most experts; None for all.
        threshold: in [0, 1].
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        threshold: float = 0.5,
        **common: Unpack[Common],
    ) -> None:
        top_k = num_experts if top_k is None else top_k
        super().__init__(hidden_size, num_experts, top_k, top_k, **common)
        self.threshold = self.check_number("threshold", threshold, 0, 1)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        soft = sigmoid(z[:, 1:])
        on = (soft > self.threshold).to(soft.dtype)
        hard = torch.nn.functional.pad(on.cumprod(1), (1, 0), value=1.0)
        weights = hard / hard.sum(1, keepdim=True)
        if self.training:
            both = torch.nn.functional.pad(soft.cumprod(1), (1, 0), value=1.0)
            weights = straight_through(weights, both / both.sum(1, keepdim=True))
        slots = every_expert(x.shape[0], self.top_k, x.device)
        routing = self.built(torch.where(hard > 0, slots, -1), weights, z)
        return self.routed(routing, context, extra={"help": soft})
