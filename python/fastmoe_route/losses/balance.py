"""Losses that spread tokens over experts, from the counts and score sums of a `Routing`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    check_choice,
    check_ids,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    describe,
    fail,
    may_look,
)
from fastmoe_route._segments import segment_sum
from fastmoe_route.losses._statistics import (
    check_is_routing,
    shares,
    statistic,
    surprise,
)
from fastmoe_route.results import Routing


def load_balancing(routing: Routing, *, alpha: float = 1.0) -> Tensor:
    """Switch's balance loss `alpha * E * sum over e of f_e P_e` (arXiv:2101.03961).

    `f_e` is the share of the used slots that ask for expert `e` (`demand`, a constant; of `T * K`
    slots where all are used) and `P_e` its mean score. For softmax scores the loss is `alpha` when
    either of the two is uniform, and `alpha * E` when every token gives all to one expert. The
    loss of transformers, with `f_e` summed instead of averaged over the `K` choices, is `K` times
    this one. For the balance over a global batch (arXiv:2501.11873), reduce `demand` over the
    ranks first and pass `routing._replace(demand=...)`.

    Args:
        routing: a routing with `stats=True`.
        alpha: the coefficient; the paper trains with 0.01.

    Returns:
        A scalar, differentiable through `score_sum`.

    Raises:
        ValueError: the routing has no statistics.

    >>> import fastmoe_route as fr
    >>> load_balancing(fr.gate(torch.zeros(6, 4), 2, stats=True), alpha=0.01)
    tensor(0.0100)
    """
    score_sum = statistic("load_balancing", routing, "score_sum")
    check_number("load_balancing", "alpha", alpha)
    num_tokens, num_experts = routing.experts.shape[0], score_sum.shape[0]
    f = shares(routing.demand, score_sum.dtype)
    return alpha * num_experts * (f * score_sum).sum() / max(num_tokens, 1)


def z_loss(routing: Routing) -> Tensor:
    """The mean over tokens of `logsumexp(logits)^2`, which keeps logits small (arXiv:2202.08906).

    A token without an allowed expert (`logsumexp` -inf) adds nothing and is counted. The paper's
    coefficient is 1e-3.

    Args:
        routing: a routing with `stats=True`.

    Returns:
        A scalar, differentiable through `logsumexp`; 0 if and only if every logsumexp is 0.

    Raises:
        ValueError: the routing has no statistics.
    """
    logsumexp = statistic("z_loss", routing, "logsumexp")
    seen = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
    return seen.square().sum() / max(seen.shape[0], 1)


def cv_squared(values: Tensor) -> Tensor:
    """The squared coefficient of variation, `variance / mean^2` with the population variance.

    Shazeer et al. (arXiv:1701.06538) add that of importance and load.

    Args:
        values: `[N]`, not negative.

    Returns:
        A scalar, differentiable; 0 where all values are equal, their sum being 0 included, and
        `N - 1` where one value holds everything.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("cv_squared", "values", values, 1)
    if not values.is_floating_point():
        values = values.float()
    if values.numel() == 0:
        return values.sum()
    # Squares of the ratios: those of the values leave the range of floats long before these do.
    ratios = values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    return (ratios - ratios.mean()).square().mean()


def importance(routing: Routing, *, of: str = "scores") -> Tensor:
    """`cv_squared` of the experts' importance (arXiv:1701.06538).

    Args:
        routing: a routing; `of="scores"` needs `stats=True`.
        of: an expert's importance is the sum over tokens of its `scores` (V-MoE,
            arXiv:2106.05974), or of its combine `weights`, which are 0 where it was not chosen
            (the sparsely-gated layer of Shazeer et al.).

    Returns:
        A scalar, differentiable through `score_sum` or `weights`. 0 for uniform importance.

    Raises:
        ValueError: `of` is something else, or the routing has no statistics.
    """
    if check_choice("importance", "of", of, ("scores", "weights")) == 0:
        return cv_squared(statistic("importance", routing, "score_sum"))
    check_is_routing("importance", routing)
    return cv_squared(_weight_sum(routing))


def _weight_sum(routing: Routing) -> Tensor:
    """The sum of each expert's combine weights, `[E]`."""
    slots = routing.experts.clamp(min=0).flatten().long()
    return segment_sum(routing.weights.flatten(), slots, routing.demand.shape[0])


def smooth_load(logits: Tensor, noisy_logits: Tensor, noise_std: float, top_k: int) -> Tensor:
    """`cv_squared` of the smooth load of noisy top-k gating (arXiv:1701.06538, 2106.05974).

    An expert's load is the mean over tokens of the probability that its logit would reach the
    token's `top_k`-th noisy logit if its noise were drawn again:
    `1 - Phi((threshold_t - z_te) / noise_std)`.

    Args:
        logits: `[T, E]`, clean.
        noisy_logits: `[T, E]`, those that the choice was made from.
        noise_std: standard deviation of the noise; V-MoE uses `1 / E`.
        top_k: experts per token.

    Returns:
        A scalar, differentiable in both logits.

    Raises:
        ValueError: shapes differ, `top_k` is out of range or `noise_std` is not positive.
    """
    check_tensor("smooth_load", "logits", logits, 2)
    check_tensor("smooth_load", "noisy_logits", noisy_logits, 2)
    check_shape("smooth_load", "noisy_logits", noisy_logits, logits.shape)
    top_k = check_int("smooth_load", "top_k", top_k, 1, logits.shape[1])
    check_number("smooth_load", "noise_std", noise_std, above=0)
    threshold = noisy_logits.topk(top_k, dim=1).values[:, -1:]
    load = torch.special.ndtr((logits - threshold) / noise_std).sum(0)
    return cv_squared(load / max(logits.shape[0], 1))


def null_balancing(routing: Routing, num_null: int) -> Tensor:
    """Switch's loss over real and null experts, with the null columns' shares averaged.

    AdaMoE (arXiv:2406.13233) lets `num_null` null experts compete and must not balance them among
    themselves: each null column counts with the mean share and the mean score of all of them. The
    loss is 1 where scores are uniform over all `E + num_null` columns. (The authors' released code
    slices the wrong dimension there, which makes the averaging a no-op.)

    Args:
        routing: a softmax routing of `gate(..., num_null=m, stats=True)`.
        num_null: `m`, at least 1. The null columns' scores and slots are what the real experts
            leave: `T - sum(score_sum)` and `T * K - sum(demand)`.

    Returns:
        A scalar, differentiable through `score_sum`.

    Raises:
        ValueError: the routing has no statistics, or `num_null` is below 1.
    """
    num_null = check_int("null_balancing", "num_null", num_null, 1)
    score_sum = statistic("null_balancing", routing, "score_sum")
    num_tokens, num_slots = max(routing.experts.shape[0], 1), max(routing.experts.numel(), 1)
    f = routing.demand.to(score_sum.dtype) / num_slots
    p = score_sum / num_tokens
    null = (1 - f.sum()) * (1 - p.sum()) / num_null
    return (score_sum.shape[0] + num_null) * ((f * p).sum() + null)


def assigned_balance(routing: Routing) -> Tensor:
    """StableMoE's loss `sum over e of (n_e - n) / n * sum of e's weights` (arXiv:2204.08396).

    `n` is the mean of the counts `n_e`, constants; the weights are those of the chosen experts,
    sigmoids of their scores in the paper.

    Args:
        routing: any routing.

    Returns:
        A scalar, differentiable through `weights`; 0 where all experts have equally many slots.

    Raises:
        TypeError: `routing` is not a `Routing`.
    """
    check_is_routing("assigned_balance", routing)
    n = routing.demand.to(routing.weights.dtype)
    mean = n.mean().clamp(min=torch.finfo(n.dtype).tiny)
    return ((n - mean) / mean * _weight_sum(routing)).sum()


def pool_balance(pool: Sequence[Routing]) -> Tensor:
    """Switch's loss on usage summed over layers that share one pool (arXiv:2605.06665).

    A layer may use few experts as long as all layers together use all of them: counts and score
    sums are added over the layers before the loss is taken, so for softmax scores it is 1 where
    the pool is used evenly. (Known from the authors' README and a third party: unverified.)

    Args:
        pool: one routing per layer, `stats=True`, over the same experts.

    Returns:
        A scalar, differentiable through every `score_sum`.

    Raises:
        ValueError: the list is empty, pools differ, or a routing has no statistics.
    """
    if isinstance(pool, Routing) or not isinstance(pool, Sequence) or not pool:
        rule = "be a non-empty list of Routing"
        fail(ValueError, "pool_balance", "pool", rule, describe(pool))
    sums = [statistic("pool_balance", routing, "score_sum") for routing in pool]
    sizes = {int(each.shape[0]) for each in sums}
    if len(sizes) > 1:
        rule = "be of layers with the same experts"
        fail(ValueError, "pool_balance", "pool", rule, f"sizes {sorted(sizes)}")
    score_sum = torch.stack(sums).sum(0)
    f = shares(torch.stack([routing.demand for routing in pool]).sum(0), score_sum.dtype)
    num_tokens = sum(routing.experts.shape[0] for routing in pool)
    return score_sum.shape[0] * (f * score_sum).sum() / max(num_tokens, 1)


def locality(routing: Routing, node_of_expert: Tensor, target: Tensor) -> Tensor:
    """LocMoE's loss: `KL(share of score per node || target)` (arXiv:2401.13920; unverified).

    Args:
        routing: a routing with `stats=True`.
        node_of_expert: integers `[E]`, the node that holds each expert, in `[0, N)`.
        target: `[N]`, the wanted share of each node, positive, sum 1: most of it on the local one.

    Returns:
        A scalar, differentiable through `score_sum`; 0 where the shares are the target.

    Raises:
        ValueError: a shape does not fit, or the routing has no statistics.
    """
    score_sum = statistic("locality", routing, "score_sum")
    check_tensor("locality", "target", target, 1)
    check_ids("locality", "node_of_expert", node_of_expert, 0, target.shape[0] - 1)
    check_shape("locality", "node_of_expert", node_of_expert, score_sum.shape)
    if may_look(target) and not bool((target > 0).all()):
        fail(ValueError, "locality", "target", "be positive", target.tolist())
    per_node = segment_sum(score_sum, node_of_expert.long(), target.shape[0])
    share = per_node / per_node.sum().clamp(min=torch.finfo(per_node.dtype).tiny)
    return -(surprise(share) + share * target.to(share.dtype).log()).sum()
