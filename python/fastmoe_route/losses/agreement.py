"""Losses between two predictions, or between tokens and what stands for their expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe_route._arguments import check_ids, check_number, check_shape, check_tensor, fail
from fastmoe_route._segments import segment_sum
from fastmoe_route.losses._statistics import check_is_routing, probabilities
from fastmoe_route.results import Routing


def imitation(logits: Tensor, experts: Tensor) -> Tensor:
    """Cross entropy of a student router's logits against the experts that a teacher chose.

    StableMoE's distillation of the learned router into one on token ids (arXiv:2204.08396,
    coefficient 0.3) and Dr.LLM's supervision by searched paths.

    Args:
        logits: `[T, E]` of the student.
        experts: integers `[T]` or `[T, 1]`, -1 where the token has none and is left out.

    Returns:
        The mean over tokens with an expert, differentiable in `logits`; 0 if there are none.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    labels = _labels("imitation", logits, "experts", experts)
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def focal(logits: Tensor, labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Cross entropy weighted by `(1 - p_label)^gamma`, so that easy tokens count less.

    Trains Dr.LLM's routers on rare decisions (arXiv:2510.12773); focal loss is arXiv:1708.02002.

    Args:
        logits: `[T, C]`.
        labels: integers `[T]`, -1 to leave a row out.
        gamma: 0 gives `imitation`.

    Returns:
        The mean over labelled rows, differentiable in `logits`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_number("focal", "gamma", gamma, 0)
    labels = _labels("focal", logits, "labels", labels)
    log_p = logits.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    # At p = 1 a power below 1 has no derivative; the product has, and it is 0.
    others = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)
    each = -others.pow(gamma) * log_p
    return each.masked_fill(labels < 0, 0.0).sum() / (labels >= 0).sum().clamp(min=1)


def _labels(loss: str, logits: Tensor, argument: str, labels: Tensor) -> Tensor:
    check_tensor(loss, "logits", logits, 2)
    check_tensor(loss, argument, labels)
    labels = labels.reshape(-1) if labels.dim() == 2 else labels
    check_shape(loss, argument, labels, logits.shape[:1])
    check_ids(loss, argument, labels, -1, logits.shape[1] - 1)
    return labels.long()


def response_matching(source: Routing | Tensor, target: Routing | Tensor) -> Tensor:
    """`mean of (p - q)^2` between a router's scores and those of a competition, a constant.

    The distillation of CompeteSMoE (arXiv:2505.13380): `q` is the softmax over the experts'
    measured responses.

    Args:
        source: a routing with `keep_scores=True`, or `[T, E]`, that learns.
        target: the same of the competition; no gradient flows into it.

    Returns:
        A scalar, differentiable through the scores of `source`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a routing without its statistics,
            by name.
    """
    p = probabilities("response_matching", source)
    q = probabilities("response_matching", target).detach()
    check_shape("response_matching", "target", q, p.shape)
    return (p - q).square().sum() / max(p.numel(), 1)


def diversity(outputs: Tensor) -> Tensor:
    """The mean cosine between the outputs of a token's different experts.

    Args:
        outputs: `[T, K, H]`, one output per slot; CompeteSMoE (arXiv:2505.13380) adds it.

    Returns:
        A scalar in [-1, 1], differentiable; 0 for fewer than two experts.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("diversity", "outputs", outputs, 3)
    num_tokens, k, _ = outputs.shape
    unit = F.normalize(outputs, dim=2)
    pairs = unit.sum(1).square().sum(1) - unit.square().sum((1, 2))
    return pairs.sum() / max(num_tokens * k * (k - 1), 1)


def consistency(logits: Tensor, other: Tensor) -> Tensor:
    """`(KL(p || q) + KL(q || p)) / 2`, mean over rows: two passes should agree.

    THOR (arXiv:2110.04260) adds it with coefficient 5 (from memory) for two passes of a batch
    through different random experts.

    Args:
        logits: `[N, V]` of the first pass.
        other: `[N, V]` of the second.

    Returns:
        A scalar, differentiable in both; 0 where both passes agree.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("consistency", "logits", logits, 2)
    check_tensor("consistency", "other", other, 2)
    check_shape("consistency", "other", other, logits.shape)
    log_p, log_q = logits.log_softmax(1), other.log_softmax(1)
    each = (log_p.exp() - log_q.exp()) * (log_p - log_q)
    return 0.5 * each.sum() / max(logits.shape[0], 1)


def kl_diversity(logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """`-mean over experts of KL(p_e || mean of the experts' p)`: experts should differ.

    RIDE (arXiv:2010.01809) scales its diversity term by 0.2; here the sign is the loss's: lower is
    more diverse.

    Args:
        logits: one `[N, V]` per expert.
        temperature: divides the logits.

    Returns:
        A scalar, differentiable; 0 where all experts predict the same.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    if not isinstance(logits, (list, tuple)) or not logits:
        fail(ValueError, "kl_diversity", "logits", "be a non-empty list of tensors", logits)
    check_number("kl_diversity", "temperature", temperature, above=0)
    for each in logits:
        check_tensor("kl_diversity", "logits", each, 2)
        check_shape("kl_diversity", "logits", each, logits[0].shape)
    log_p = torch.stack([each / temperature for each in logits]).log_softmax(-1)
    log_mean = log_p.logsumexp(0) - log_p.new_tensor(len(logits)).log()
    return -(log_p.exp() * (log_p - log_mean)).sum() / max(log_p[..., 0].numel(), 1)


def contrastive(
    x: Tensor, routing: Routing, prototypes: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """The mean token of each expert should lie closest to its own prototype (InfoNCE).

    For every expert with tokens, the cross entropy of `cos(mean of its tokens, prototype_j) /
    temperature` against `j = e`; mean over those experts (ProMoE, arXiv:2510.24711).

    Args:
        x: `[T, H]`.
        routing: who went where; every slot counts its token once.
        prototypes: `[E, H]`.
        temperature: 0.1 in the paper.

    Returns:
        A scalar, differentiable in `x` and `prototypes`; 0 without a slot.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("contrastive", "x", x, 2)
    check_number("contrastive", "temperature", temperature, above=0)
    check_is_routing("contrastive", routing)
    check_shape("contrastive", "routing.experts", routing.experts, (x.shape[0], -1))
    check_tensor("contrastive", "prototypes", prototypes, 2)
    num_experts = routing.demand.shape[0]
    check_shape("contrastive", "prototypes", prototypes, (num_experts, x.shape[1]))
    k = routing.experts.shape[1]
    used = (routing.experts >= 0).reshape(-1, 1)
    slots = routing.experts.clamp(min=0).flatten().long()
    tokens = x.repeat_interleave(k, dim=0).masked_fill(~used, 0.0)
    sums = segment_sum(tokens, slots, num_experts)
    has_tokens = routing.demand > 0
    cosines = F.normalize(sums, dim=1) @ F.normalize(prototypes.to(sums.dtype), dim=1).T
    labels = torch.arange(num_experts, device=x.device).masked_fill(~has_tokens, -1)
    return imitation(cosines / temperature, labels)


def commitment(x: Tensor, codes: Tensor, *, beta: float = 0.25) -> Tensor:
    """Vector quantisation's loss `|sg(x) - code|^2 + beta |x - sg(code)|^2` (arXiv:1711.00937).

    The mean over elements; `codes` are the chosen ones (VQMoE, arXiv:2411.19402).

    Args:
        x: `[T, H]`.
        codes: `[T, H]`, the code of each token.
        beta: how much tokens are drawn to their code.

    Returns:
        A scalar, differentiable in both.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("commitment", "x", x)
    check_tensor("commitment", "codes", codes)
    check_shape("commitment", "codes", codes, x.shape)
    pull = (x.detach() - codes).square() + beta * (x - codes.detach()).square()
    return pull.sum() / max(x.numel(), 1)


def budget(cost: Tensor, target: float) -> Tensor:
    """`(mean of cost - target)^2`: spend the target on average (arXiv:2308.03409).

    Args:
        cost: the share of compute that each token spends, any shape; open gates, or what they cost.
        target: the wanted mean.

    Returns:
        A scalar, differentiable in `cost`; 0 at the target.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("budget", "cost", cost)
    check_number("budget", "target", target)
    return (cost.mean() - target).square() if cost.numel() else cost.sum()
