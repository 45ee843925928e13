"""Losses around softmax: ranking with other surrogates, classes sampled or spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastmoe_route._arguments import (
    INT_DTYPES,
    check_choice,
    check_dtype,
    check_ids,
    check_int,
    check_number,
    check_rows,
    check_shape,
    check_tensor,
    describe,
    fail,
)
from fastmoe_route._autograd import guarded
from fastmoe_route.methods import register
from fastmoe_route.softmax_variants.online import normalizer

SURROGATES = ("tanh", "relu", "atan", "exp")


# ---- ranking losses ----------------------------------------------------------------------------


@register("pairwise_softmax_loss", row="X8", source="arXiv:2411.00163", verified="code")
def pairwise_softmax_loss(
    positive: Tensor, negative: Tensor, tau: float = 0.1, surrogate: str = "tanh"
) -> Tensor:
    """PSL: `log(sum over j of s(d_j)^(1 / tau))` over users' `d_j = negative_j - positive`.

    The mean over users. `s(d)` is `tanh(d) + 1`, `relu(d + 1)`, `atan(d) + 1` or `exp(d)`, the
    last giving the softmax loss. For differences in [-1, 1] the first two lie between the step
    function and exp, so they bound the ranking measure more tightly (arXiv:2411.00163).

    Args:
        positive: `[U]` scores of the users' items; the paper halves cosines, so that differences
            stay in [-1, 1].
        negative: `[U, N]` scores of sampled other items.
        tau: the temperature.
        surrogate: `tanh`, `relu`, `atan` or `exp`.

    Returns:
        A scalar, differentiable.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("pairwise_softmax_loss", "negative", negative, 2)
    check_shape("pairwise_softmax_loss", "positive", positive, negative.shape[:1])
    code = check_choice("pairwise_softmax_loss", "surrogate", surrogate, SURROGATES)
    check_number("pairwise_softmax_loss", "tau", tau, above=0)
    d = negative - positive[:, None]
    if code < 3:
        s = (d.tanh() + 1, (d + 1).relu(), d.atan() + 1)[code]
        d = s.clamp(min=torch.finfo(s.dtype).tiny).log()
    return (d / tau).logsumexp(1).mean()


@register("topk_softmax_loss", row="X9", source="arXiv:2508.05673", verified="code")
def topk_softmax_loss(
    positive: Tensor,
    negative: Tensor,
    quantile: Tensor,
    *,
    tau: float = 0.1,
    tau_weight: float = 1.0,
) -> Tensor:
    """SL@K: the softmax loss of items that are near the top `K`, for recommendation at `K`.

    The mean over users of `sigmoid((positive - quantile) / tau_weight)` times
    `log(sum over j of exp((negative_j - positive) / tau))` (arXiv:2508.05673).

    Args:
        positive: `[U]`.
        negative: `[U, N]`.
        quantile: `[U]`, each user's `K`-th largest score, a constant that the paper refreshes
            every 20 epochs with `K = 20`; -inf gives the plain softmax loss.
        tau: temperature of the loss.
        tau_weight: temperature of the weight.

    Returns:
        A scalar, differentiable in the scores.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("topk_softmax_loss", "negative", negative, 2)
    check_shape("topk_softmax_loss", "positive", positive, negative.shape[:1])
    check_shape("topk_softmax_loss", "quantile", quantile, positive.shape)
    for name, value in (("tau", tau), ("tau_weight", tau_weight)):
        check_number("topk_softmax_loss", name, value, above=0)
    weight = ((positive - quantile.detach()) / tau_weight).sigmoid()
    return (weight * ((negative - positive[:, None]) / tau).logsumexp(1)).mean()


# ---- sharded and sampled classes ---------------------------------------------------------------


@register("sample_classes", row="X11", source="arXiv:2203.15565", verified="code")
def sample_classes(
    labels: Tensor, num_classes: int, rate: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Partial FC: the classes of the batch, and random others up to `rate * num_classes`.

    Args:
        labels: integers `[N]`; entries outside `[0, num_classes)` belong to other ranks.
        num_classes: `C` of this rank.
        rate: in (0, 1]; 1 takes every class. The paper uses 0.1 (arXiv:2203.15565).
        generator: draws the others.

    Returns:
        int64 ids, ascending, without repetition; always with every class of the batch.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("sample_classes", "labels", labels, 1)
    check_dtype("sample_classes", "labels", labels, INT_DTYPES)
    num_classes = check_int("sample_classes", "num_classes", num_classes, 1)
    check_number("sample_classes", "rate", rate, high=1, above=0)
    mine = labels[(labels >= 0) & (labels < num_classes)].long()
    rank = torch.rand(num_classes, generator=generator).to(labels.device)
    rank[mine] = 2.0  # before every other class
    wanted = max(int(rate * num_classes), int((rank == 2.0).sum()), 1)
    return rank.topk(wanted).indices.sort().values


@register("sharded_cross_entropy", row="X11", source="arXiv:2203.15565", verified="code")
def sharded_cross_entropy(
    logits: Tensor, labels: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Cross entropy over classes that are spread over the ranks of a group.

    Three all-reduces of one number per row: maximum, sum of exponentials, logit of the label.

    Args:
        logits: `[N, C]`, this rank's classes (or the sampled ones).
        labels: integers `[N]`, the column of the label, or -1 where another rank has it.
        group: the ranks that share the classes; None for this rank alone.

    Returns:
        The mean over rows, the same on every rank; differentiable once, in this rank's logits
        (arXiv:2203.15565).

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("sharded_cross_entropy", "logits", logits, 2)
    check_shape("sharded_cross_entropy", "labels", labels, logits.shape[:1])
    if group is None and logits.shape[1] == 0:
        fail(ValueError, "sharded_cross_entropy", "logits", "have a class", describe(logits))
    check_ids("sharded_cross_entropy", "labels", labels, -1, logits.shape[1] - 1)
    loss: Tensor = _ShardedCrossEntropy.apply(logits, labels.long(), group)
    return loss


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        has_label = labels >= 0
        own = F.one_hot(labels.clamp(min=0), logits.shape[1]) * has_label[:, None]
        m, d = normalizer(logits)
        if group is not None:
            most = m.clone()
            dist.all_reduce(most, dist.ReduceOp.MAX, group)
            d = d * (m - most).exp()
            dist.all_reduce(d, group=group)
            m = most
        picked = (logits.masked_fill(own == 0, 0.0)).sum(1)
        if group is not None:
            dist.all_reduce(picked, group=group)
        p = (logits - m[:, None]).exp() / d[:, None]
        ctx.save_for_backward(logits, (p - own) / max(logits.shape[0], 1))
        return (m + d.log() - picked).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        logits, per_row = ctx.saved_tensors
        gradients = guarded("sharded_cross_entropy", (grad * per_row,), (logits, grad))
        return gradients[0], None, None
