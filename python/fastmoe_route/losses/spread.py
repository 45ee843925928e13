"""Losses on how peaked the scores are: entropies, priors on their distribution, sparsity."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    check_int,
    check_number,
    check_shape,
    check_tensor,
    describe,
    fail,
    may_look,
)
from fastmoe_route.losses._beta import beta_cdf
from fastmoe_route.losses._statistics import probabilities, statistic, surprise
from fastmoe_route.methods import register
from fastmoe_route.results import Routing


def entropy(source: Routing | Tensor) -> Tensor:
    """The mean over tokens of `H(p_t) = -sum over e of p_te log p_te`, in nats.

    Added to a loss it makes tokens sure of their experts (Dynamic MoE, arXiv:2403.07652, with
    coefficient 1e-4); subtracted, unsure.

    Args:
        source: a softmax routing with `keep_scores=True`, or probabilities `[T, E]`.

    Returns:
        A scalar, differentiable through the scores: log E where they are uniform, 0 where one-hot.

    Raises:
        ValueError: the routing has no scores.
    """
    p = probabilities("entropy", source)
    return surprise(p).sum() / max(p.shape[0], 1)


def usage_entropy(source: Routing | Tensor) -> Tensor:
    """The entropy of the mean distribution, `H(mean over t of p_t)`, in nats.

    log E where the experts' mean scores are equal, however sure each token is; maximise it to use
    all experts (the coverage phase of MAGNET, the balance term of CompeteSMoE, arXiv:2505.13380).

    Args:
        source: a softmax routing with `stats=True`, or probabilities `[T, E]`.

    Returns:
        A scalar, differentiable through `score_sum`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a routing without its statistics,
            by name.
    """
    if isinstance(source, Tensor):
        total = probabilities("usage_entropy", source).sum(0)
    else:
        total = statistic("usage_entropy", source, "score_sum")
    return surprise(total / total.sum().clamp(min=torch.finfo(total.dtype).tiny)).sum()


def information_gain(source: Routing | Tensor) -> Tensor:
    """`H(mean over t of p_t) - mean over t of H(p_t)`: what a token tells about its expert.

    Between 0 (all tokens alike) and log E (sure tokens, spread evenly); trees of experts maximise
    it (CIGT, arXiv:2402.08345; unverified).

    Args:
        source: a softmax routing with `stats=True` and `keep_scores=True`, or probabilities.

    Returns:
        A scalar, differentiable through the scores.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a routing without its statistics,
            by name.
    """
    return usage_entropy(source) - entropy(source)


def tsallis_entropy(p: Tensor, q: float = 1.1) -> Tensor:
    """`(1 - sum over e of p^q) / (q - 1)` of every row; Shannon's entropy in the limit `q = 1`.

    DynMoLE (arXiv:2504.00661) routes by it and adds its mean to the loss.

    Args:
        p: `[..., E]`, rows that sum to 1.
        q: the entropic index, above 0. `q = 1` is computed as Shannon's.

    Returns:
        `[...]`, differentiable; 0 for one-hot rows, 1.8775 for 8 equal ones at `q = 1.1`.

    Raises:
        ValueError: `q` is not above 0.
    """
    check_tensor("tsallis_entropy", "p", p)
    check_number("tsallis_entropy", "q", q, above=0)
    if q == 1:
        return surprise(p).sum(-1)
    powers = p.clamp(min=torch.finfo(p.dtype).tiny).pow(q).masked_fill(p == 0, 0.0)
    return (1 - powers.sum(-1)) / (q - 1)


def entropy_target(source: Routing | Tensor, num_experts: float) -> Tensor:
    """`(H - log n)^2` with `H` the usage entropy: use as many experts as `n` equal ones.

    UniPool's lock term (arXiv:2605.06665), with `n = 8` and coefficient 5e-3, averaged over
    layers by the caller (known from a third party: unverified).

    Args:
        source: as in `usage_entropy`.
        num_experts: `n`, above 0.

    Returns:
        A scalar, differentiable through `score_sum`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a routing without its statistics,
            by name.
    """
    check_number("entropy_target", "num_experts", num_experts, above=0)
    entropy_now = usage_entropy(source)
    return (entropy_now - entropy_now.new_tensor(num_experts).log()).square()


@register("prior_shaping", row="R32", source="arXiv:2510.01185", verified="mem")
def prior_shaping(source: Routing | Tensor, concentration: float | Tensor = 0.75) -> Tensor:
    """Dirichlet-prior shaping: the scores of each expert should be distributed as a Beta.

    Under a Dirichlet prior with concentrations `a_e`, an expert's probability follows
    `Beta(a_e, sum(a) - a_e)`. With `p_(1) <= ... <= p_(T)` the sorted probabilities of expert `e`,
    the loss is the mean over `e` and `i` of `(i / (T + 1) - F_e(p_(i)))^2`, `F_e` that Beta's
    distribution function (DPSL, arXiv:2510.01185; the exact form is unverified).

    Args:
        source: a softmax routing with `keep_scores=True`, or probabilities `[T, E]`.
        concentration: `a`, one for all experts or `[E]`; the paper's range is 0.75 to 1.

    Returns:
        A scalar, differentiable through the scores (not at exactly 0 and 1, where it is 0).

    Raises:
        ValueError: a concentration is not positive, or there is only one expert.
    """
    p = probabilities("prior_shaping", source)
    num_tokens, num_experts = p.shape
    if num_experts < 2:
        fail(ValueError, "prior_shaping", "source", "have at least 2 experts", describe(p))
    if isinstance(concentration, Tensor):
        check_shape("prior_shaping", "concentration", concentration, (num_experts,))
    else:
        check_number("prior_shaping", "concentration", concentration, above=0)
    a = torch.as_tensor(concentration, dtype=p.dtype, device=p.device).expand(num_experts)
    if may_look(a) and not bool((a > 0).all()):
        fail(ValueError, "prior_shaping", "concentration", "be above 0", concentration)
    ranks = torch.arange(1, num_tokens + 1, dtype=p.dtype, device=p.device) / (num_tokens + 1)
    value = beta_cdf(p.sort(0).values, a, a.sum() - a)
    return (ranks[:, None] - value).square().sum() / max(p.numel(), 1)


@register("activation_locality", row="R35", source="arXiv:2507.08771", verified="code")
def activation_locality(activations: Tensor, sharpness: float = 100.0) -> Tensor:
    """BlockFFN's locality loss: neighbouring tokens should activate the same experts.

    The mean of the binary cross entropy between `sigmoid(s a_{t-1})` (the target) and
    `sigmoid(s a_t)`, with `s` = `sharpness` (arXiv:2507.08771, coefficient 2e-3). Both sides carry
    gradient.

    Args:
        activations: `[T, E]` router activations of one sequence, or `[B, T, E]` of several.
        sharpness: how steep the sigmoid is.

    Returns:
        A scalar, differentiable; 0 for fewer than two tokens.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("activation_locality", "activations", activations, 2, 3)
    check_number("activation_locality", "sharpness", sharpness)
    scaled = sharpness * activations
    before, after = scaled[..., :-1, :], scaled[..., 1:, :]
    if before.numel() == 0:
        return activations.sum() * 0.0
    return torch.nn.functional.binary_cross_entropy_with_logits(after, before.sigmoid())


@register("chunk_sparsity", row="R35", source="arXiv:2507.08771", verified="code")
def chunk_sparsity(activations: Tensor, chunk: int = 64, eps: float = 1e-5) -> Tensor:
    """BlockFFN's chunk loss: few experts should be active over any `chunk` neighbouring tokens.

    With `q_te = a_te / sum over e of a_te`, an expert is idle over a chunk with the probability
    `exp(sum over its tokens of log(1 - q_te + eps))`; the loss is 1 minus the mean of that over
    experts and chunks (arXiv:2507.08771, coefficient 5e-2). A last, shorter chunk counts like the
    others.

    Args:
        activations: `[T, E]` of one sequence, not negative.
        chunk: tokens per chunk.
        eps: keeps the logarithm finite at `q = 1`.

    Returns:
        A scalar, differentiable; 0 (but for `eps`) where nothing is active.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("chunk_sparsity", "activations", activations, 2)
    chunk = check_int("chunk_sparsity", "chunk", chunk, 1)
    check_number("chunk_sparsity", "eps", eps, 0)
    if activations.shape[0] == 0:
        return activations.sum()
    total = activations.sum(1, keepdim=True).clamp(min=torch.finfo(activations.dtype).tiny)
    idle = (1 - activations / total + eps).log()
    sums = [part.sum(0) for part in idle.split(chunk)]
    return 1 - torch.stack(sums).exp().mean()
