"""What happens to slots that a full expert turns away, and who was turned away."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    ID_DTYPES,
    at_most_int64,
    check_choice,
    check_device,
    check_dtype,
    check_int,
    check_shape,
    check_tensor,
    check_vector,
    describe,
    fail,
)
from fastmoe_route.dispatch import DROP_POLICIES, INT32_LIMIT, MAX_EXPERTS
from fastmoe_route.results import DispatchPlan, Routing

_ops = torch.ops.fastmoe_route
OVERFLOWS = ("drop", "next", "local")
FILLS = (None, "turned_away", "any")
_MIN_SUM = 1e-20  # the floor under which gate does not normalise either


class DropCounts(NamedTuple):
    """Slots by scope and expert, `S` scopes and `E` experts; all int32 `[S, E]`.

    Attributes:
        asked: slots that ask for the expert.
        kept: those of them that hold a row.
        dropped: those turned away.
    """

    asked: Tensor
    kept: Tensor
    dropped: Tensor


# ---- reroute -----------------------------------------------------------------------------------


def reroute(
    routing: Routing | tuple[Tensor, Tensor],
    num_experts: int,
    top_k: int,
    capacity: int,
    *,
    overflow: str = "next",
    fill: str | None = None,
    drop_policy: str = "position",
    scope_ids: Tensor | None = None,
    num_scopes: int = 1,
    rank_of_expert: Tensor | None = None,
    rank_of_token: Tensor | None = None,
) -> Routing:
    """Gives every token the best of its candidate experts that have room.

    Experts are handed out in rounds, and who got one keeps it. In a round every expert (of every
    scope, if given) takes the best of those who ask, while it has room:

    1. Columns `0 .. top_k - 1`, a token's choices, ask together. `drop_policy` ranks them as in
       `plan_dispatch`: `position`, lower column, then lower token; `score`, larger weight, then
       lower slot, NaN last. Without the other rounds the result is what `plan_dispatch` keeps.
    2. `overflow="next"`: columns `top_k, top_k + 1, ...` ask one after another, for the tokens that
       have fewer experts than choices. `"local"`: the same, but only experts of the token's own
       rank are asked (Rectify-Router's intra-GPU step, arXiv:2402.12399). `"drop"`: no round.
    3. `fill="turned_away"`: the room left goes to the other candidates of tokens that have fewer
       experts than choices, all columns together, larger weight first, ties to the lower slot;
       `fill="any"`: of all tokens (Rectify-Router's fill-in). A token may get more than `top_k`.

    No token asks in rounds 2 and 3 for an expert that an earlier column of its names. Weights are
    taken as they are; `renormalize_after_drop` makes them sum to one again. A token that gets
    nothing has -1 and weight 0 in every column; `pass_through` gives it its own input back.

    Shared capacity lets one request push out another (arXiv:2402.05526), and a fill looks at the
    whole batch even where nothing overflows: serve with `scope_ids`, see `dispatch_invariance`.

    Args:
        routing: a `Routing`, or a pair `(experts, weights)`: int32 or int64 `[T, M]` candidates,
            best first, -1 for none, and their weights, float `[T, M]`; `gate(logits, M)` makes it.
        num_experts: `E`, at most 65,536.
        top_k: how many columns are choices; at most `M`.
        capacity: the most slots of an expert, per scope if `scope_ids` is given.
        overflow: `next`, `local` or `drop`.
        fill: None, `turned_away` or `any`.
        drop_policy: `position` or `score`.
        scope_ids: int32 `[T]` in `[0, num_scopes)`: the request of each token. What one scope gets
            never depends on another.
        num_scopes: the number of scopes.
        rank_of_expert: int32 `[E]`, where each expert lives; for `local`.
        rank_of_token: int32 `[T]`, where each token lives; for `local`.

    Returns:
        A `Routing` with `experts` int32 `[T, top_k]` (`[T, M]` with a fill), a token's experts
        first, in the order of its candidates; their `weights`, differentiable; `demand` of the
        result; the statistics of a `Routing` that was given. No expert is asked for more than
        `capacity` times (per scope), so a plan of it without capacity drops nothing.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or is out of range.
        RuntimeError: an id of `experts` or `scope_ids` is out of range, or `T * M` reaches 2^31.

    >>> experts = torch.tensor([[0, 1], [0, 2], [0, 1]])
    >>> weights = torch.tensor([[0.5, 0.4], [0.6, 0.3], [0.7, 0.2]])
    >>> reroute((experts, weights), num_experts=3, top_k=1, capacity=1).experts.tolist()
    [[0], [2], [1]]
    >>> reroute((experts, weights), 3, 1, 1, drop_policy="score").experts.tolist()
    [[1], [2], [0]]
    """
    experts, weights = _candidates(routing)
    num_experts = check_int("reroute", "num_experts", num_experts, 1, MAX_EXPERTS)
    top_k = check_int("reroute", "top_k", top_k, 0, experts.shape[1])
    capacity = check_int("reroute", "capacity", capacity, 1)
    overflow_code = check_choice("reroute", "overflow", overflow, OVERFLOWS)
    if fill not in FILLS:
        fail(ValueError, "reroute", "fill", "be None, 'turned_away' or 'any'", repr(fill))
    policy = check_choice("reroute", "drop_policy", drop_policy, DROP_POLICIES)
    num_scopes = check_int("reroute", "num_scopes", num_scopes, 1, INT32_LIMIT)
    _check_ids("scope_ids", scope_ids, experts.shape[0], experts)
    if overflow == "local" and (rank_of_expert is None or rank_of_token is None):
        name = "rank_of_expert" if rank_of_expert is None else "rank_of_token"
        fail(ValueError, "reroute", name, "be given with overflow 'local'", None)
    _check_ids("rank_of_expert", rank_of_expert, num_experts, experts)
    _check_ids("rank_of_token", rank_of_token, experts.shape[0], experts)
    choice, granted, demand = _ops.reroute(
        experts,
        weights.detach() if policy or fill is not None else None,
        num_experts,
        top_k,
        at_most_int64(capacity),
        overflow_code,
        FILLS.index(fill),
        policy,
        scope_ids,
        num_scopes,
        rank_of_expert,
        rank_of_token,
    )
    return Routing(granted, _take(weights, choice), demand, *routing[3:])


def _candidates(routing: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(routing, tuple) or len(routing) < 2:
        rule = "be a Routing or a pair (experts, weights)"
        fail(TypeError, "reroute", "routing", rule, describe(routing))
    experts, weights = routing[0], routing[1]
    check_tensor("reroute", "experts", experts, 2)
    check_dtype("reroute", "experts", experts, ID_DTYPES)
    check_tensor("reroute", "weights", weights, 2)
    check_shape("reroute", "weights", weights, experts.shape)
    check_dtype("reroute", "weights", weights, FLOAT_DTYPES)
    check_device("reroute", "weights", weights, experts)
    return experts, weights


def _check_ids(name: str, ids: Tensor | None, size: int, like: Tensor) -> None:
    if ids is not None:
        check_vector("reroute", name, ids, size, (torch.int32,), like)


def _take(weights: Tensor, choice: Tensor) -> Tensor:
    """The weights of the chosen columns, exactly 0 where there is none."""
    taken = weights.gather(1, choice.clamp(min=0).long())
    return torch.where(choice < 0, taken.new_zeros(()), taken)


@torch.library.register_fake("fastmoe_route::reroute")
def _(
    experts: Tensor,
    weights: Tensor | None,
    num_experts: int,
    top_k: int,
    capacity: int,
    overflow: int,
    fill: int,
    drop_policy: int,
    scope_ids: Tensor | None,
    num_scopes: int,
    rank_of_expert: Tensor | None,
    rank_of_token: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_candidates = experts.shape
    size = (num_tokens, num_candidates if fill else top_k)
    choice, granted = (experts.new_empty(size, dtype=torch.int32) for _ in range(2))
    return choice, granted, experts.new_empty((num_experts,), dtype=torch.int32)


# ---- after a drop ------------------------------------------------------------------------------


def renormalize_after_drop(weights: Tensor, plan: DispatchPlan, scale: float = 1.0) -> Tensor:
    """Scales the weights of every token's kept slots so that they sum to `scale`.

    Args:
        weights: float `[T, K]`.
        plan: from `plan_dispatch`.
        scale: the sum to reach.

    Returns:
        `[T, K]` in the dtype of `weights`: `scale * weights / sum of the kept weights`, the sum
        floored at 1e-20 as in `gate`; exactly 0 for slots without a row, whatever their weight
        was. Differentiable in `weights`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `weights` does not fit the plan.

    >>> from fastmoe_route import plan_dispatch
    >>> plan = plan_dispatch(torch.tensor([[0, 1], [0, 1]]), 2, capacity=1)
    >>> renormalize_after_drop(torch.tensor([[0.5, 0.25], [0.5, 0.25]]), plan).tolist()
    [[0.6666666865348816, 0.3333333432674408], [0.0, 0.0]]
    """
    kept = torch.where(_has_row("renormalize_after_drop", weights, plan), weights, 0.0)
    wide = kept if kept.dtype == torch.float64 else kept.float()
    total = wide.sum(1, keepdim=True).clamp(min=_MIN_SUM)
    return (wide / total * scale).to(weights.dtype)


def pass_through(y: Tensor, x: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    """Lets tokens that experts turned away keep their own input: the residual rule.

    Args:
        y: float `[T, H]`, the sum of the experts' outputs, from `unpermute` or `moe_mlp`.
        x: `[T, H]`, the layer's input, of the dtype of `y`.
        plan: from `plan_dispatch`.
        weights: None, or float `[T, K]`, weights that are 0 where a slot asks for no expert.

    Returns:
        `[T, H]`. Without `weights`: `x` where a token holds no row, `y` elsewhere. With `weights`:
        `y + x * (sum of the weights of the slots without a row)`, so that a dropped expert counts
        as the identity. Differentiable in `y`, `x` and `weights`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit.

    >>> from fastmoe_route import plan_dispatch
    >>> plan = plan_dispatch(torch.tensor([[0], [0]]), 1, capacity=1)
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [0.0]])
    >>> pass_through(y, x, plan).tolist()
    [[10.0], [2.0]]
    """
    for name, rows in (("y", y), ("x", x)):
        check_tensor("pass_through", name, rows, 2)
        check_dtype("pass_through", name, rows, FLOAT_DTYPES)
    check_shape("pass_through", "x", x, y.shape)
    check_dtype("pass_through", "x", x, (y.dtype,))
    if weights is None:
        has_row = _has_row("pass_through", y, plan, name="y", columns=-1)
        return torch.where(has_row.any(1, keepdim=True), y, x)
    has_row = _has_row("pass_through", weights, plan)
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    lost = torch.where(has_row, 0.0, weights).to(wide).sum(1, keepdim=True)
    mixed = (y.to(wide) + x.to(wide) * lost).to(y.dtype)
    return torch.where(has_row.all(1, keepdim=True), y, mixed)


def _has_row(
    op: str, value: Tensor, plan: DispatchPlan, *, name: str = "weights", columns: int | None = None
) -> Tensor:
    """Which slots of the plan hold a row; `value` has to fit it."""
    if not isinstance(plan, DispatchPlan):
        fail(TypeError, op, "plan", "be a DispatchPlan", describe(plan))
    check_tensor(op, name, value, 2)
    check_dtype(op, name, value, FLOAT_DTYPES)
    num_tokens, top_k = plan.slot_to_row.shape
    check_shape(op, name, value, (num_tokens, top_k if columns is None else columns))
    return plan.slot_to_row >= 0


def batch_priority(weights: Tensor) -> Tensor:
    """The order of batch-prioritized routing, to be given to `plan_dispatch` as `weights`.

    With `drop_policy="score"` and these weights first choices come before second choices, and
    within a choice tokens with a larger largest weight before others (arXiv:2106.05974), ties to
    the lower token. What a token keeps then depends on later tokens: not for causal serving.

    Args:
        weights: float `[T, K]`.

    Returns:
        float64 `[T, K]` of distinct whole numbers. Not differentiable. A NaN row ranks last.

    Raises:
        TypeError: `weights` is no float tensor.
        ValueError: `weights` does not have two dimensions.

    >>> batch_priority(torch.tensor([[0.5, 0.2], [0.9, 0.1]])).tolist()
    [[-1.0, -3.0], [-0.0, -2.0]]
    """
    check_tensor("batch_priority", "weights", weights, 2)
    check_dtype("batch_priority", "weights", weights, FLOAT_DTYPES)
    num_tokens, top_k = weights.shape
    if top_k == 0:
        return weights.new_empty((num_tokens, 0), dtype=torch.float64)
    # amax passes NaN on, and negated values sort rising with NaN at the end.
    best_first = (-weights.detach().amax(1)).argsort(stable=True)
    place = torch.empty_like(best_first)
    place[best_first] = torch.arange(num_tokens, device=weights.device)
    choice = torch.arange(top_k, device=weights.device)
    return -(choice[None, :] * num_tokens + place[:, None]).double()


def drop_counts(
    experts: Tensor,
    plan: DispatchPlan,
    *,
    scope_ids: Tensor | None = None,
    num_scopes: int = 1,
) -> DropCounts:
    """How many slots of each scope every expert was asked for, kept and turned away.

    For operators: a request whose slots are turned away while it asks for little itself is the
    sign of a buffer overflow (arXiv:2402.05526). The sums over scopes are the plan's own `kept`
    and `dropped`.

    Args:
        experts: int32 or int64 `[T, K]`, what the plan was made from; ids outside `[0, E)` count
            nowhere.
        plan: from `plan_dispatch`.
        scope_ids: int32 `[T]` in `[0, num_scopes)`; None for one scope. Others count nowhere.
        num_scopes: `S`; the result has `S * E` elements, below 2^31.

    Returns:
        `DropCounts`, three int32 `[S, E]`. No host synchronisation.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, or `S * E` is too large.

    >>> from fastmoe_route import plan_dispatch
    >>> experts = torch.tensor([[0], [0], [0]])
    >>> plan = plan_dispatch(experts, 2, capacity=2)
    >>> scopes = torch.tensor([0, 0, 1], dtype=torch.int32)
    >>> drop_counts(experts, plan, scope_ids=scopes, num_scopes=2).dropped.tolist()
    [[0, 0], [1, 0]]
    """
    if not isinstance(plan, DispatchPlan):
        fail(TypeError, "drop_counts", "plan", "be a DispatchPlan", describe(plan))
    check_tensor("drop_counts", "experts", experts, 2)
    check_dtype("drop_counts", "experts", experts, ID_DTYPES)
    check_shape("drop_counts", "experts", experts, plan.slot_to_row.shape)
    num_experts = plan.kept.shape[0]
    most = (INT32_LIMIT - 1) // num_experts
    num_scopes = check_int("drop_counts", "num_scopes", num_scopes, 1, most)
    counts = num_scopes * num_experts
    is_slot = (experts >= 0) & (experts < num_experts)
    bins = experts.long()
    if scope_ids is not None:
        size = experts.shape[0]
        check_vector("drop_counts", "scope_ids", scope_ids, size, (torch.int32,), experts)
        is_slot = is_slot & ((scope_ids >= 0) & (scope_ids < num_scopes))[:, None]
        bins = bins + scope_ids.long()[:, None] * num_experts
    bins = torch.where(is_slot, bins, counts).flatten()

    def count(ones: Tensor) -> Tensor:
        zeros = torch.zeros(counts + 1, dtype=torch.int32, device=experts.device)
        return zeros.index_add_(0, bins, ones.flatten().int())[:-1].view(num_scopes, num_experts)

    asked, kept = count(torch.ones_like(is_slot)), count(plan.slot_to_row >= 0)
    return DropCounts(asked, kept, asked - kept)
