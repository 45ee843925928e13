"""Gradients through a choice: straight-through, SparseMixer, score function, dense mixing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    check_ids,
    check_number,
    check_shape,
    check_tensor,
    describe,
    fail,
)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, bit for bit, with the gradient of `soft` (arXiv:1308.3432).

    Args:
        hard: any shape; no gradient flows into it.
        soft: the same shape, finite.

    Returns:
        `hard + (soft - soft)`, whose second part has value 0 and the gradient of `soft`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_shape("straight_through", "soft", soft, hard.shape)
    return hard.detach() + (soft - soft.detach())


def ordered_log_prob(logits: Tensor, experts: Tensor) -> Tensor:
    """The log-probability of drawing experts in this order, without replacement, from a softmax.

    `log Q = sum over j of log(q_{e_j} / (1 - sum over j' < j of q_{e_j'}))` with
    `q = softmax(logits)`, computed from logsumexps of what is left, so that it stays exact when the
    first draws take nearly everything. The `k` largest of `logits + gumbel` are such a draw
    (ReMix, arXiv:2603.10160).

    Args:
        logits: `[T, E]`.
        experts: integers `[T, K]`, distinct in a row, in order of drawing; -1 is no draw.

    Returns:
        `[T]`, differentiable in `logits`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("ordered_log_prob", "logits", logits, 2)
    check_shape("ordered_log_prob", "experts", experts, (logits.shape[0], -1))
    check_ids("ordered_log_prob", "experts", experts, -1, logits.shape[1] - 1)
    used, chosen = experts >= 0, experts.clamp(min=0).long()
    left, total = logits, logits.new_zeros(logits.shape[0])
    for j in range(experts.shape[1]):
        own = chosen[:, j : j + 1]
        step = logits.gather(1, own)[:, 0] - left.logsumexp(1)
        total = total + torch.where(used[:, j], step, torch.zeros_like(step))
        left = torch.where(used[:, j : j + 1], left.scatter(1, own, -torch.inf), left)
    return total


def rloo(losses: Tensor, log_probs: Tensor) -> Tensor:
    """A scalar whose gradient is the leave-one-out estimate of that of the expected loss.

    `1 / (M - 1) * sum over m of (L_m - mean of L) * log Q_m`, losses as constants: each draw's
    baseline is the mean loss of the others. Unbiased for every `M >= 2`, zero when all losses agree
    (ReMix, arXiv:2603.10160). Only the gradient means something, not the value.

    Args:
        losses: `[M]`, the loss of each of `M` independent draws.
        log_probs: `[M]`, the log-probability of each draw, summed over all choices it made.

    Returns:
        A scalar, differentiable in `log_probs`.

    Raises:
        ValueError: fewer than two draws.
    """
    check_tensor("rloo", "losses", losses, 1)
    check_shape("rloo", "log_probs", log_probs, losses.shape)
    if losses.shape[0] < 2:
        fail(ValueError, "rloo", "losses", "hold at least 2 draws", describe(losses))
    losses = losses.detach()
    return ((losses - losses.mean()) * log_probs).sum() / (losses.shape[0] - 1)


def score_function(reward: Tensor, log_prob: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """REINFORCE: a scalar with the gradient of `-(reward - baseline) * log_prob`, mean over draws.

    Args:
        reward: `[N]`, a constant.
        log_prob: `[N]`, of what was drawn.
        baseline: what the reward is compared with; must not depend on the draw.

    Returns:
        A scalar to minimise, differentiable in `log_prob` (arXiv:1308.3432).

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("score_function", "log_prob", log_prob, 1)
    check_shape("score_function", "reward", reward, log_prob.shape)
    advantage = (reward - baseline).detach()
    return -(advantage * log_prob).sum() / max(log_prob.numel(), 1)


def dense_mixing(y: Tensor, scores: Tensor, outputs: Tensor) -> Tensor:
    """The value of the sparse output `y`, with the router's gradient of the dense mixture.

    Backward, every expert's score receives `<dL/dy, its output>`, not only those of the chosen: a
    straight-through estimate of the choice, at the price of all experts' outputs. Make `y` with
    detached weights, or the sparse gradient is added to the dense one.

    Args:
        y: `[T, H]`, what the chosen experts made.
        scores: `[T, E]`, differentiable.
        outputs: `[T, E, H]`, what every expert makes; constants.

    Returns:
        `[T, H]`, the bits of `y`; differentiable in `y` and `scores`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("dense_mixing", "y", y, 2)
    check_shape("dense_mixing", "scores", scores, (y.shape[0], -1))
    check_shape("dense_mixing", "outputs", outputs, (*scores.shape, y.shape[1]))
    mixture = torch.einsum("te,teh->th", scores.to(outputs.dtype), outputs.detach())
    return y + (mixture - mixture.detach())


class _SparseMixer(torch.autograd.Function):
    """`p_e * m` forward; backward `g * p_e * (onehot_e - p)` with the unscaled `p_e`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, chosen: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(logits, chosen)
        return logits.softmax(1).gather(1, chosen[:, None])[:, 0] * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, chosen = ctx.saved_tensors
        p, at = logits.softmax(1), chosen[:, None]
        one_hot = torch.zeros_like(p).scatter(1, at, 1.0)
        return grad[:, None] * p.gather(1, at) * (one_hot - p), None, None


def sparsemixer(
    logits: Tensor,
    epsilon: float = 0.01,
    *,
    gumbel: Tensor | None = None,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One pick of SparseMixer-v2: an expert, and a weight with a third-order gradient estimate.

    Experts with `(max - z) / max(|z|, max) > 2 epsilon` are masked, `p` is the softmax of the rest.
    In training an expert is drawn from `p`; its weight is `p * m` with `m = 1` where the draw is
    the argmax or `u > 0.75`, else 1/3. Backward, the logits get `g * p * (onehot - p)` with the
    unscaled `p`: Heun's third-order method for the sampled term (GRIN, arXiv:2409.12136;
    SparseMixer, arXiv:2310.00811). In evaluation the argmax is taken, with weight `p`.

    Args:
        logits: `[T, E]`, -inf where an expert is barred.
        epsilon: width of the band around the largest logit; inf masks nothing.
        gumbel: `[T, E]` Gumbel numbers for the draw; None in evaluation.
        uniform: `[T]` numbers in (0, 1) for `m`; given together with `gumbel`.

    Returns:
        int64 `[T]` experts and their weights `[T]`, differentiable in `logits`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("sparsemixer", "logits", logits, 2)
    if epsilon != math.inf:
        check_number("sparsemixer", "epsilon", epsilon, 0)
    if (gumbel is None) != (uniform is None):
        name = "gumbel" if gumbel is None else "uniform"
        fail(ValueError, "sparsemixer", name, "be given together with the other", None)
    if gumbel is not None:
        check_shape("sparsemixer", "gumbel", gumbel, logits.shape)
        check_shape("sparsemixer", "uniform", uniform, logits.shape[:1])
    z = logits.detach()
    best, argmax = z.max(1, keepdim=True)
    barred = (best - z) / torch.maximum(z.abs(), best) > 2 * epsilon
    near = logits.masked_fill(barred | (z == -torch.inf), -torch.inf)
    if gumbel is None or uniform is None:
        return argmax[:, 0], near.softmax(1).gather(1, argmax)[:, 0]
    chosen = (near.detach() + gumbel).argmax(1)
    exact = (chosen == argmax[:, 0]) | (uniform > 0.75)
    factor = torch.where(exact, 1.0, 1.0 / 3.0).to(logits.dtype)
    weight: Tensor = _SparseMixer.apply(near, chosen, factor)
    return chosen, weight
