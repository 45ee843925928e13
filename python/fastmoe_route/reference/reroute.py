"""Which of its candidate experts a token gets, one ask after another."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from fastmoe_route.results import Routing


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
    """Experts handed out round by round; in a round the askers stand in one queue."""
    experts, weights = routing[0], routing[1]
    num_tokens, num_candidates = experts.shape
    ids: list[list[int]] = experts.tolist()
    values = weights.detach().double().tolist()
    scopes = [0] * num_tokens if scope_ids is None else scope_ids.tolist()
    used: dict[tuple[int, int], int] = defaultdict(int)
    got: list[list[int]] = [[] for _ in range(num_tokens)]  # columns
    wanted = [sum(e >= 0 for e in row[:top_k]) for row in ids]

    def by_position(ask: tuple[int, int]) -> tuple[float, ...]:
        token, column = ask
        return column, token

    def by_score(ask: tuple[int, int]) -> tuple[float, ...]:
        token, column = ask
        value = values[token][column]
        return (1, 0.0, *ask) if math.isnan(value) else (0, -value, *ask)

    def serve(asks: list[tuple[int, int]], key: object) -> None:
        for token, column in sorted(asks, key=key):  # type: ignore[call-overload]
            place = scopes[token], ids[token][column]
            if used[place] < capacity:
                used[place] += 1
                got[token].append(column)

    def is_short(token: int) -> bool:
        return len(got[token]) < wanted[token]

    def is_new(token: int, column: int) -> bool:
        return ids[token][column] >= 0 and ids[token][column] not in ids[token][:column]

    order = by_position if drop_policy == "position" else by_score
    tokens = range(num_tokens)
    serve([(t, j) for t in tokens for j in range(top_k) if ids[t][j] >= 0], order)
    for column in range(top_k, num_candidates if overflow != "drop" else top_k):
        askers = [t for t in tokens if is_short(t) and is_new(t, column)]
        if overflow == "local":
            assert rank_of_expert is not None
            assert rank_of_token is not None
            homes, places = rank_of_expert.tolist(), rank_of_token.tolist()
            askers = [t for t in askers if homes[ids[t][column]] == places[t]]
        serve([(t, column) for t in askers], order)
    if fill is not None:
        askers = [t for t in tokens if fill == "any" or is_short(t)]
        rest = range(top_k, num_candidates)
        serve([(t, j) for t in askers for j in rest if j not in got[t] and is_new(t, j)], by_score)

    width = top_k if fill is None else num_candidates
    columns = torch.tensor(
        [sorted(row) + [-1] * (width - len(row)) for row in got], dtype=torch.long
    ).reshape(num_tokens, width)
    columns = columns.to(experts.device)
    is_used = columns >= 0
    place = columns.clamp(min=0)
    granted = torch.where(is_used, experts.long().gather(1, place), -1).int()
    taken = torch.where(is_used, weights.gather(1, place), 0.0)
    demand = torch.zeros(num_experts, dtype=torch.int32, device=experts.device)
    for (_, expert), count in used.items():
        demand[expert] += count
    return Routing(granted, taken, demand, *routing[3:])
