"""The gate (score, key, allowed, choose, weight) and expert choice, from the contract's wording."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoe_route.reference.softmax import arithmetic_dtype, falling_order, softmax
from fastmoe_route.results import Routing

# Below this, log(1 + e^z) equals e^z to 18 digits, and e^z is on its way to underflow.
_SOFTPLUS_IS_EXP = -40.0


def gate_scores(
    logits: Tensor,
    score: str = "softmax",
    softmax_over: str = "all",
    num_groups: int = 1,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The clean score of every column, null columns included.

    - `softmax`: over all columns, or inside each group; over nothing but -inf it is 0.
    - `sigmoid`: `1 / (1 + e^-z)`, as `e^z / (1 + e^z)` for negative z, where `e^-z` overflows.
    - `sqrtsoftplus`: `sqrt(log(1 + e^z))`, as `e^(z/2)` far below 0, where `e^z` underflows.
    - `relu`: `max(z, 0)`.
    - `identity`: `z`.

    The gradient at a -inf logit is exactly 0.

    Args:
        logits: `[T, C]`.
        score: one of the five above.
        softmax_over: `all` or `group`.
        num_groups: groups of equal size that the columns fall into, in order.
        dtype: arithmetic and result dtype instead of the op's own.

    Returns:
        `[T, C]`.
    """
    z = logits.to(arithmetic_dtype(logits, dtype))
    z = torch.where(z == -torch.inf, -torch.inf, z)  # cuts the gradient, keeps the value
    if score == "softmax":
        num_tokens, num_columns = z.shape
        num_parts = num_groups if softmax_over == "group" else 1
        parts = z.reshape(num_tokens, num_parts, num_columns // num_parts)
        is_empty = (parts == -torch.inf).all(-1, keepdim=True)
        shares = softmax(torch.where(is_empty, 0.0, parts))
        return torch.where(is_empty, 0.0, shares).reshape(num_tokens, num_columns)
    if score == "sigmoid":
        is_negative = z < 0
        small = torch.where(is_negative, z, -z).exp()
        return torch.where(is_negative, small, 1.0) / (1.0 + small)
    if score == "sqrtsoftplus":
        is_tiny = z < _SOFTPLUS_IS_EXP
        softplus = torch.logaddexp(torch.where(is_tiny, 0.0, z), z.new_zeros(()))
        return torch.where(is_tiny, torch.where(is_tiny, z / 2, 0.0).exp(), softplus.sqrt())
    if score == "relu":
        return z.relu()
    if score == "identity":
        return z
    raise ValueError(f"gate: score must be a known score, got {score!r}")


class Keys(NamedTuple):
    """What the choice looks at, each `[T, C]`."""

    allowed: Tensor
    """bool: not masked, and the clean logit is not -inf."""
    rank: Tensor
    """What is compared to rank columns: the noisy logits themselves, or `key`."""
    key: Tensor
    """score(noisy logits) + bias: what `threshold` and `top2_sum` use. NaN for a NaN logit."""


@torch.no_grad()
def gate_keys(
    logits: Tensor,
    *,
    score: str = "softmax",
    softmax_over: str = "all",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    num_groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Keys:
    """Steps 1 to 3 of the contract, before groups: `key = score(logits + noise) + bias`.

    The noisy logits are always formed in the contract's own arithmetic: one rounded addition is
    part of the definition, so the ranking by logits is exact. `dtype` is for the scores alone.
    A NaN logit has a NaN key and is left out of the softmax of the others, which stay ordered.
    """
    noisy = logits.to(arithmetic_dtype(logits, None))
    allowed = logits != -torch.inf
    if mask is not None:
        allowed = allowed & mask
    if noise is not None:
        noisy = noisy + noise.to(noisy.dtype)
    is_nan = noisy.isnan()
    numbers = noisy.masked_fill(is_nan, -torch.inf)
    key = gate_scores(numbers, score, softmax_over, num_groups, dtype=dtype)
    if bias is not None:
        key = key + bias.to(key.dtype)
    key = key.masked_fill(is_nan, torch.nan)
    over_all = softmax_over == "all" or num_groups == 1
    is_monotone = score in ("sigmoid", "sqrtsoftplus", "identity") or (
        score == "softmax" and over_all
    )
    return Keys(allowed, noisy if is_monotone and bias is None else key, key)


def _in_groups(x: Tensor, num_groups: int) -> Tensor:
    """`[T, C]` as `[T, G, C / G]`."""
    return x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups)


def _group_terms(keys: Keys, num_groups: int, group_score: str) -> tuple[Tensor, Tensor]:
    """What a group's score is the sum of: its best key (`max`), its two best ones (`top2_sum`).

    Returns:
        `[T, G, 1 or 2]`, 0 for what is not allowed, and bool `[T, G]`: whether the group has an
        allowed expert at all.
    """
    allowed, rank, key = (_in_groups(x, num_groups) for x in keys)
    best_two = falling_order(rank, allowed)[..., :2]
    if group_score == "max":
        terms = rank.gather(-1, best_two[..., :1])
    elif group_score == "top2_sum":
        terms = torch.where(allowed.gather(-1, best_two), key.gather(-1, best_two), 0.0)
    else:
        raise ValueError(f"gate: group_score must be max or top2_sum, got {group_score!r}")
    return terms, allowed.any(-1)


def _only_best_groups(keys: Keys, num_groups: int, topk_groups: int, group_score: str) -> Keys:
    """`keys` with the experts outside the best groups no longer allowed. Ties: the lower group."""
    terms, has_allowed = _group_terms(keys, num_groups, group_score)
    best = falling_order(terms.sum(-1), has_allowed)[:, :topk_groups]
    is_open = torch.zeros(best.shape[0], num_groups, dtype=torch.bool, device=best.device)
    is_open = is_open.scatter(1, best, True)
    group_size = keys.allowed.shape[1] // num_groups
    return keys._replace(allowed=keys.allowed & is_open.repeat_interleave(group_size, dim=1))


@torch.no_grad()
def _choose(
    keys: Keys,
    clean_scores: Tensor,
    top_k: int,
    *,
    num_experts: int,
    num_groups: int,
    max_per_group: int | None,
    top_p: Tensor | None,
    threshold: Tensor | None,
    min_k: int,
    k_per_token: Tensor | None,
) -> Tensor:
    """Step 4: walk the columns by falling key, for all tokens at once.

    A stop by `top_p` or `threshold` takes effect once `min_k` real experts are chosen; the limit on
    the number of choices and the quota of a group always hold.

    Returns:
        int64 `[T, top_k]`, the chosen columns (null ones too) in order of choice, then -1.
    """
    order = falling_order(keys.rank, keys.allowed)
    num_tokens, num_columns = order.shape
    limit = order.new_full((num_tokens,), top_k)
    if k_per_token is not None:
        limit = k_per_token.long().clamp(0, top_k)
    columns = order.new_full((num_tokens, top_k), -1)
    num_chosen = order.new_zeros(num_tokens)
    num_real = order.new_zeros(num_tokens)
    num_from_group = order.new_zeros(num_tokens, num_groups)
    cumulative = clean_scores.new_zeros(num_tokens)
    is_stopped = num_chosen.bool()
    for column in order.unbind(1):
        at = column[:, None]
        is_candidate = keys.allowed.gather(1, at)[:, 0] & (num_chosen < limit)
        if not (is_candidate & (~is_stopped | (num_real < min_k))).any():
            break
        group = at // (num_columns // num_groups)
        if max_per_group is not None:
            is_candidate &= num_from_group.gather(1, group)[:, 0] < max_per_group
        if threshold is not None:
            is_stopped |= is_candidate & ~(keys.key.gather(1, at)[:, 0] > threshold)
        takes = is_candidate & (~is_stopped | (num_real < min_k))
        tokens = takes.nonzero()[:, 0]
        columns[tokens, num_chosen[tokens]] = column[tokens]
        num_chosen += takes
        num_real += takes & (column < num_experts)
        num_from_group.scatter_add_(1, group, takes.long()[:, None])
        if top_p is not None:
            score = clean_scores.gather(1, at)[:, 0]
            cumulative = torch.where(takes, cumulative + score, cumulative)
            is_stopped |= takes & (cumulative > top_p)
    return columns


def _per_token(value: Tensor | float | None, logits: Tensor) -> Tensor | None:
    """A float or `[T]` argument, rounded to the contract's arithmetic dtype as the op rounds it."""
    if value is None:
        return None
    return torch.as_tensor(value, dtype=arithmetic_dtype(logits, None), device=logits.device)


def _only_rows(logits: Tensor, rows: Tensor) -> Tensor:
    """`logits` with all other rows replaced by 0, so that nothing in them reaches a gradient."""
    return torch.where(rows[:, None], logits, 0.0)


def gate_weights(
    logits: Tensor,
    experts: Tensor,
    *,
    score: str = "softmax",
    softmax_over: str = "all",
    num_groups: int = 1,
    normalize: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Step 5 alone: the weights `[T, K]` that a given choice `experts` `[T, K]` must carry.

    `scale * score`, divided by `max(sum over the token's slots, 1e-20)` if asked; NaN throughout if
    the row has a NaN anywhere; 0 in unused slots. A test can judge by it the weights of a kernel's
    own choice where a near tie was decided the other way.
    """
    is_used = experts >= 0
    logits = _only_rows(logits, is_used.any(1))
    scores = gate_scores(logits, score, softmax_over, num_groups, dtype=dtype)
    weights = torch.where(is_used, scores.gather(1, experts.long().clamp(min=0)), 0.0)
    if normalize:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-20)
    poison = torch.where(logits.isnan().any(1, keepdim=True), torch.nan, 1.0).to(weights.dtype)
    return torch.where(is_used, weights * scale * poison, 0.0)


def gate(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    softmax_over: str = "all",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int | None = None,
    group_score: str = "max",
    max_per_group: int | None = None,
    top_p: Tensor | float | None = None,
    threshold: Tensor | float | None = None,
    min_k: int = 1,
    k_per_token: Tensor | None = None,
    num_null: int = 0,
    normalize: bool = False,
    scale: float = 1.0,
    stats: bool = False,
    keep_scores: bool = False,
    dtype: torch.dtype | None = None,
) -> Routing:
    """Chooses experts by `key = score(logits + noise) + bias`, weighs them by `score(logits)`."""
    num_experts = logits.shape[1] - num_null
    how: dict[str, Any] = {
        "score": score,
        "softmax_over": softmax_over,
        "num_groups": num_groups,
        "dtype": dtype,
    }
    keys = gate_keys(logits, bias=bias, mask=mask, noise=noise, **how)
    is_live = keys.allowed.any(1)
    if topk_groups is not None:
        keys = _only_best_groups(keys, num_groups, topk_groups, group_score)
    scores = gate_scores(logits, **how)
    columns = _choose(
        keys,
        scores,
        top_k,
        num_experts=num_experts,
        num_groups=num_groups,
        max_per_group=max_per_group,
        top_p=_per_token(top_p, logits),
        threshold=_per_token(threshold, logits),
        min_k=min_k,
        k_per_token=k_per_token,
    )
    is_real = (columns >= 0) & (columns < num_experts)
    real_first = (~is_real).long().argsort(dim=1, stable=True)
    experts = columns.masked_fill(~is_real, -1).gather(1, real_first)
    score_sum = logsumexp = None
    if stats:
        live_scores = gate_scores(_only_rows(logits, is_live), **how)
        score_sum = torch.where(is_live[:, None], live_scores, 0.0).sum(0)[:num_experts]
        logsumexp = _logsumexp(_only_rows(logits.to(scores.dtype), is_live), is_live)
    return Routing(
        experts.int(),
        gate_weights(logits, experts, normalize=normalize, scale=scale, **how),
        experts[experts >= 0].bincount(minlength=num_experts).int(),
        score_sum,
        logsumexp,
        scores[:, :num_experts] if keep_scores else None,
    )


def _logsumexp(z: Tensor, is_live: Tensor) -> Tensor:
    """`log(sum(e^z))` over all columns `[T]`; -inf for a row that is not live."""
    z = torch.where(z == -torch.inf, -torch.inf, z)  # cuts the gradient, keeps the value
    return torch.where(is_live, z.logsumexp(1), -torch.inf)


@torch.no_grad()
def gate_margin(
    logits: Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    topk_groups: int | None = None,
    group_score: str = "max",
    top_p: Tensor | float | None = None,
    threshold: Tensor | float | None = None,
    **options: Any,
) -> Tensor:
    """By how little a row's choice escaped going another way for a reason other than key order.

    The least of: the gap between the last open and the first closed group; the distance of any
    allowed key from `threshold`; the distance of the cumulative score from `top_p` at any choice.
    Groups with the same best keys, and those scored by plain logits, leave no doubt. In float64.
    A test may excuse a row only where this is within the bound on those numbers.

    Args:
        logits: `[T, C]`, and the other arguments of `gate` as given to it.

    Returns:
        float64 `[T]`, inf where nothing but key order decides.
    """
    wide = torch.float64
    score, softmax_over = options.get("score", "softmax"), options.get("softmax_over", "all")
    used = ("score", "softmax_over", "bias", "mask", "noise")
    keys = gate_keys(
        logits,
        num_groups=num_groups,
        dtype=wide,
        **{name: options[name] for name in used if name in options},
    )
    margin = torch.full(logits.shape[:1], torch.inf, dtype=wide, device=logits.device)
    if topk_groups is not None and topk_groups < num_groups:
        terms, has_allowed = _group_terms(keys, num_groups, group_score)
        edge = falling_order(terms.sum(-1), has_allowed)[:, topk_groups - 1 : topk_groups + 1]
        last_open, first_closed = terms.take_along_dim(edge[..., None], 1).unbind(1)
        gap = (last_open.sum(-1) - first_closed.sum(-1)).abs().to(wide)
        is_exact = group_score == "max" and keys.rank is not keys.key
        is_sure = (
            is_exact | (last_open == first_closed).all(-1) | ~has_allowed.gather(1, edge).all(1)
        )
        margin = torch.where(is_sure | gap.isnan(), margin, gap)
        keys = _only_best_groups(keys, num_groups, topk_groups, group_score)
    threshold, top_p = _per_token(threshold, logits), _per_token(top_p, logits)
    if threshold is not None:
        distance = (keys.key - threshold.reshape(-1, 1)).abs().nan_to_num(torch.inf)
        margin = margin.minimum(distance.masked_fill(~keys.allowed, torch.inf).amin(1))
    if top_p is not None:
        scores = gate_scores(logits, score, softmax_over, num_groups, dtype=wide)
        columns = _choose(
            keys,
            scores,
            top_k,
            num_experts=logits.shape[1] - options.get("num_null", 0),
            num_groups=num_groups,
            max_per_group=options.get("max_per_group"),
            top_p=None,
            threshold=None,
            min_k=0,
            k_per_token=None,
        )
        cumulative = scores.gather(1, columns.clamp(min=0)).cumsum(1)
        distance = (cumulative - top_p.reshape(-1, 1)).abs().nan_to_num(torch.inf)
        margin = margin.minimum(distance.masked_fill(columns < 0, torch.inf).amin(1))
    return margin


def expert_choice(
    scores: Tensor,
    capacity: int,
    *,
    scope_ids: Tensor | None = None,
    num_scopes: int = 1,
    dtype: torch.dtype | None = None,
) -> Routing:
    """Each expert takes its `capacity` best tokens, in every scope on its own (arXiv:2202.09368).

    Ties go to the lower token; NaN ranks below every number, and is taken if room is left.
    """
    num_tokens, num_experts = scores.shape
    takes = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=scores.device)
    if scope_ids is None:
        scope_ids = torch.zeros(num_tokens, dtype=torch.int64, device=scores.device)
    for scope in range(num_scopes):
        members = (scope_ids == scope).nonzero()[:, 0]
        best = members[falling_order(scores[members].T)[:, :capacity]]  # [E, <= capacity]
        takes.T.scatter_(1, best, True)
    expert_ids = torch.arange(num_experts, device=scores.device)
    return Routing(
        torch.where(takes, expert_ids, -1).int(),
        torch.where(takes, scores.to(arithmetic_dtype(scores, dtype)), 0.0),
        takes.sum(0).int(),
    )
