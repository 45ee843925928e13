"""Routers of trained models, moved at test time: shifts of the logits, replaced weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route._arguments import check_int, check_number, check_shape, check_tensor, fail
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.random import normal


@register("rewiring", row="R47", source="arXiv:2510.14853", verified="2nd", invariance="S")
class Rewiring(LinearRouter):
    """Rewiring experts on the fly: a shift of the logits, learned from the text so far.

    `z' = z + delta`, softmax top-k of `z'`, renormalised; unlike a selection bias the shift enters
    the weights, which is how it learns. `rewire` takes a few gradient steps on the loss of the
    tokens already generated, at the prefill and every 128 tokens or so; `reset` before the next
    request. `delta = 0` is the base router. Past tokens only, so decoding stays causal, but one
    shift serves one request: route others with another copy.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.delta = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset(self) -> None:
        """Back to the base router."""
        nn.init.zeros_(self.delta)

    def reset_parameters(self) -> None:
        """Sets the shift to 0, as `reset`."""
        self.reset()

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x) + self.delta
        return self.routed(gate(z, self.top_k, normalize=True, stats=self.stats), context)


def rewire(
    routers: Sequence[Rewiring], loss: Callable[[], Tensor], *, steps: int = 4, lr: float = 0.1
) -> float:
    """Gradient descent on the shifts of some layers, and on nothing else (arXiv:2510.14853).

    Args:
        routers: the layers that may be rewired.
        loss: runs the model on the tokens so far and returns their mean cross entropy.
        steps: gradient steps (the paper's number is not known: unverified).
        lr: their size, likewise.

    Returns:
        The loss before the last step.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    steps = check_int("rewire", "steps", steps, 1)
    for router in routers:
        if not isinstance(router, Rewiring):
            fail(TypeError, "rewire", "routers", "be Rewiring routers", repr(router))
    deltas = [router.delta for router in routers]
    value = math.nan
    for _ in range(steps):
        now = loss()
        value = float(now.detach())
        for delta, grad in zip(deltas, torch.autograd.grad(now, deltas), strict=True):
            with torch.no_grad():
                delta.sub_(lr * grad)
    return value


@register("multilingual_steer", row="R48", source="arXiv:2510.04694", verified="2nd")
class MultilingualSteer(LinearRouter):
    """Multilingual routing: experts that serve the task in English are called for in any language.

    For the experts marked in the buffer `steered` (`task_experts` finds them, for middle layers):
    `soft` adds `strength * std(z_t)` to their logits, `hard` lifts them just above the token's
    largest logit, in a random order, so that up to `top_k` of them are always chosen. The shift
    enters the weights (softmax, renormalised). Nothing marked, or strength 0, is the base router.

    Defaults: soft, strength 0.5.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        mode: `soft` or `hard`.
        strength: of the soft shift.
        common: see `Common`.
    """

    steered: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        mode: str = "soft",
        strength: float = 0.5,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.mode = self.check_choice("mode", mode, ("soft", "hard"))
        self.strength = self.check_number("strength", strength)
        self.register_buffer("steered", torch.empty(num_experts, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Marks no expert."""
        nn.init.zeros_(self.steered)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        if self.mode == "soft":
            variance = (z - z.mean(1, keepdim=True)).square().mean(1, keepdim=True)
            lifted = z + self.strength * variance.clamp(min=torch.finfo(z.dtype).tiny).sqrt()
        else:
            jitter = 1e-6 * normal(context, z, self.num_experts).abs()
            lifted = z.amax(1, keepdim=True) + jitter
            lifted = lifted + (torch.nextafter(lifted, lifted + 1) - lifted).detach()
        z = torch.where(self.steered, lifted, z)
        return self.routed(gate(z, self.top_k, normalize=True, stats=self.stats), context)


def task_experts(task_frequency: Tensor, general_frequency: Tensor, tau: float = 0.2) -> Tensor:
    """The experts that a task uses more than general text does: a bool mask for `steered`.

    Args:
        task_frequency: `[E]`, share of English task tokens that went to each expert.
        general_frequency: `[E]`, the same for general text of many languages.
        tau: by how much more.

    Returns:
        bool `[E]`, `task - general > tau` (arXiv:2510.04694).

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("task_experts", "task_frequency", task_frequency, 1)
    check_number("task_experts", "tau", tau)
    check_shape("task_experts", "general_frequency", general_frequency, task_frequency.shape)
    return task_frequency - general_frequency > tau


@register(
    "r2t2", row="R49", source="arXiv:2502.20395", verified="code", invariance="S", decode="pre"
)
class R2T2(LinearRouter):
    """R2-T2: routing weights optimised at test time, given from outside.

    With `state`, `[T, E]` weights of every expert or `[num_sequences, E]` of every sequence, the
    `top_k` largest are taken as they are, renormalised, and the gradient flows back into them;
    without, this is `topk_softmax`. `rerouted` finds them from a sample's nearest correct
    references.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)

    def route(self, x: Tensor, context: Context) -> Routed:
        if context.state is None:
            routing = gate(self.score(x), self.top_k, normalize=True, stats=self.stats)
            return self.routed(routing, context)
        given = context.state
        num = context.num_sequences
        if context.sequence_ids is not None and given.shape[0] == num != x.shape[0]:
            given = given[context.sequence_ids.long()]
        self.check_state(given, x.shape[0], self.num_experts)
        routing = gate(given, self.top_k, score="identity", normalize=True, stats=self.stats)
        return self.routed(routing, context)


def rerouted(
    weights: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    references: Tensor,
    *,
    k: int = 5,
    steps: int = 10,
    lr: float = 1e-2,
    last_lr: float = 1e-5,
) -> Tensor:
    """R2-T2's neighbourhood gradient descent on one sample's routing weights.

    The `k` references most similar to the sample (cosine) each have a loss under the weights; the
    weights descend on the mean of those losses weighted by similarity, with a step size that falls
    as a cosine (arXiv:2502.20395).

    Args:
        weights: `[E]` (or any shape), where to start: the router's own.
        loss: `loss(weights, ids [k])` gives the losses `[k]` of those references, differentiable.
        query: `[D]`, the sample's embedding.
        references: `[N, D]`, embeddings of samples that the model got right.
        k: neighbours.
        steps: 0 returns the weights as they are.
        lr: first step size.
        last_lr: last step size.

    Returns:
        The new weights, a constant.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("rerouted", "references", references, 2)
    check_shape("rerouted", "query", query, references.shape[1:])
    k = check_int("rerouted", "k", k, 1, references.shape[0])
    steps = check_int("rerouted", "steps", steps, 0)
    similarity = torch.nn.functional.cosine_similarity(query[None], references, dim=1)
    near, ids = similarity.topk(k)
    share = near.clamp(min=0) / near.clamp(min=0).sum().clamp(min=1e-20)
    weights = weights.detach().clone()
    for step in range(steps):
        size = last_lr + (lr - last_lr) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2
        weights.requires_grad_()
        (grad,) = torch.autograd.grad((share * loss(weights, ids)).sum(), weights)
        weights = (weights - size * grad).detach()
    return weights
