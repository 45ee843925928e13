"""reroute: which of its candidate experts each token gets under a capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    at_most_int64,
    check_choice,
    check_int,
    check_routing,
    check_scopes,
    check_vector,
    fail,
)
from fastmoe_route.dispatch import DROP_POLICIES, MAX_EXPERTS
from fastmoe_route.results import Routing

_ops = torch.ops.fastmoe_route
OVERFLOWS = ("drop", "next", "local")
FILLS = (None, "turned_away", "any")


def reroute(
    routing: Routing | Sequence[Tensor],
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
        routing: a `Routing`, or a pair `(experts, weights)`, tuple or list: int32 or int64
            `[T, M]` candidates, best first, -1 for none, and their weights, float `[T, M]`;
            `gate(logits, M)` makes it.
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
    check_routing("reroute", routing)
    experts, weights = routing[0], routing[1]
    num_experts = check_int("reroute", "num_experts", num_experts, 1, MAX_EXPERTS)
    top_k = check_int("reroute", "top_k", top_k, 0, experts.shape[1])
    capacity = check_int("reroute", "capacity", capacity, 1)
    overflow_code = check_choice("reroute", "overflow", overflow, OVERFLOWS)
    fill_code = check_fill("reroute", fill)
    policy = check_choice("reroute", "drop_policy", drop_policy, DROP_POLICIES)
    num_scopes = check_scopes("reroute", scope_ids, num_scopes, experts)
    if overflow == "local" and (rank_of_expert is None or rank_of_token is None):
        name = "rank_of_expert" if rank_of_expert is None else "rank_of_token"
        fail(ValueError, "reroute", name, "be given with overflow 'local'", None)
    for name, ranks, size in (
        ("rank_of_expert", rank_of_expert, num_experts),
        ("rank_of_token", rank_of_token, experts.shape[0]),
    ):
        if ranks is not None:
            check_vector("reroute", name, ranks, size, (torch.int32,), experts)
    choice, granted, demand = _ops.reroute(
        experts,
        weights.detach() if policy or fill is not None else None,
        num_experts,
        top_k,
        at_most_int64(capacity),
        overflow_code,
        fill_code,
        policy,
        scope_ids,
        num_scopes,
        rank_of_expert,
        rank_of_token,
    )
    return Routing(granted, _take(weights, choice), demand, *routing[3:])


def check_fill(op: str, fill: str | None) -> int:
    """Requires one of `FILLS` and returns its position."""
    if not (fill is None or isinstance(fill, str)) or fill not in FILLS:
        fail(ValueError, op, "fill", "be None, 'turned_away' or 'any'", repr(fill))
    return FILLS.index(fill)


def _take(weights: Tensor, choice: Tensor) -> Tensor:
    """The weights of the chosen columns, exactly 0 where there is none."""
    taken = weights.gather(1, choice.clamp(min=0).long())
    # torch.where gives no tokens other strides than its fake does.
    return taken.masked_fill(choice < 0, 0)


@torch.library.register_fake("fastmoe_route::reroute")
def _reroute_fake(
    experts: Tensor,
    weights: Tensor | None,
    num_experts: int,
    top_k: int,
    capacity: int,
    overflow: int,
    fill: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_candidates = experts.shape
    size = (num_tokens, num_candidates if fill else top_k)
    choice, granted = (experts.new_empty(size, dtype=torch.int32) for _ in range(2))
    return choice, granted, experts.new_empty((num_experts,), dtype=torch.int32)
