"""Where to put experts: integer programming on recorded routing, for even load and few rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    ID_DTYPES,
    check_dtype,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    describe,
    fail,
)


class Placement(NamedTuple):
    """A placement and what it costs on the recorded routing.

    Loads are in slots; `1.0` is a perfectly even share. Traffic counts rows that go to a rank other
    than their own, one way.

    Attributes:
        rank_of_expert: the rank of each expert.
        max_load: the load of the fullest rank over the even share.
        rows_moved: rows that leave their rank.
        max_load_before: of neighbouring experts on each rank, the default.
        rows_moved_before: likewise.
        is_optimal: whether the solver proved its program's optimum within the time limit.
    """

    rank_of_expert: tuple[int, ...]
    max_load: float
    rows_moved: int
    max_load_before: float
    rows_moved_before: int
    is_optimal: bool


def plan_placement(
    experts: Tensor,
    num_experts: int,
    num_ranks: int,
    *,
    sources: Tensor | None = None,
    traffic_weight: float = 0.5,
    max_pairs: int = 256,
    time_limit: float = 10.0,
) -> Placement:
    """Places experts on ranks by mixed-integer programming (SciPy's `milp`, HiGHS).

    With `x[e, r]` = 1 where rank `r` holds expert `e`, every rank gets `E / W` experts, and
    `(1 - traffic_weight) * L + traffic_weight * m` is minimised: `L` is the load of the fullest
    rank over the even share, and `m` the share of rows moved. A token travels once to each rank
    that holds any of its experts, so `m` falls where experts that tokens choose together lie
    together (the `max_pairs` pairs seen most often are counted), and where experts lie on the rank
    their tokens come from. Of the solver's placement and the default one, neighbours, the better by
    the exact cost on the recorded routing is returned.

    Args:
        experts: int `[N, K]`, recorded routing: the experts of `N` tokens, -1 for none.
        num_experts: `E`, a multiple of `num_ranks`.
        num_ranks: `W`.
        sources: int `[N]`, the rank each token is on; None for tokens that are spread evenly, where
            it makes no difference to traffic.
        traffic_weight: 0 balances load only, 1 cuts traffic only.
        max_pairs: more pairs model traffic better and take longer.
        time_limit: seconds; the best placement found by then is returned.

    Returns:
        A `Placement`, for `ExpertParallel(placement=...)`.

    Raises:
        ImportError: SciPy is missing.
        TypeError, ValueError: an argument that does not fit, by name.

    >>> pairs = torch.tensor([[0, 2], [2, 0], [1, 3], [3, 1]]).repeat(8, 1)
    >>> plan = plan_placement(pairs, num_experts=4, num_ranks=2)
    >>> plan.rank_of_expert[0] == plan.rank_of_expert[2], plan.max_load
    (True, 1.0)
    >>> plan.rows_moved_before, plan.rows_moved
    (32, 16)
    """
    num_experts = check_int("plan_placement", "num_experts", num_experts, 1)
    num_ranks = check_int("plan_placement", "num_ranks", num_ranks, 1)
    max_pairs = check_int("plan_placement", "max_pairs", max_pairs, 0)
    check_number("plan_placement", "traffic_weight", traffic_weight, 0, 1)
    check_number("plan_placement", "time_limit", time_limit, above=0)
    trace = _check(experts, num_experts, num_ranks, sources)
    chosen = neighbours(num_experts, num_ranks)
    before = after = _cost(trace, sources, chosen, num_ranks)
    is_optimal = True
    if num_ranks > 1 and bool((trace >= 0).any()):
        problem = _Problem(trace, sources, num_experts, num_ranks, traffic_weight, max_pairs)
        solved, is_optimal = problem.solve(time_limit)
        cost = _cost(trace, sources, solved, num_ranks)
        if _value(cost, trace, traffic_weight) < _value(before, trace, traffic_weight):
            chosen, after = solved, cost
    return Placement(chosen, after[0], after[1], before[0], before[1], is_optimal)


def neighbours(num_experts: int, num_ranks: int) -> tuple[int, ...]:
    """The default placement, `[E]`: every rank holds a run of neighbouring experts."""
    return tuple(e * num_ranks // num_experts for e in range(num_experts))


def _check(experts: Any, num_experts: int, num_ranks: int, sources: Any) -> Tensor:
    check_tensor("plan_placement", "experts", experts, 2)
    check_dtype("plan_placement", "experts", experts, ID_DTYPES)
    if num_experts % num_ranks != 0:
        rule = f"be a multiple of num_ranks {num_ranks}"
        fail(ValueError, "plan_placement", "num_experts", rule, num_experts)
    trace: Tensor = experts.detach().long().cpu()
    if trace.numel() and not -1 <= int(trace.min()) <= int(trace.max()) < num_experts:
        rule = f"be in [-1, {num_experts})"
        got = f"{int(trace.min())} to {int(trace.max())}"
        fail(ValueError, "plan_placement", "experts", rule, got)
    if sources is not None:
        check_tensor("plan_placement", "sources", sources, 1)
        check_dtype("plan_placement", "sources", sources, ID_DTYPES)
        check_shape("plan_placement", "sources", sources, trace.shape[:1])
        if sources.numel() and not 0 <= int(sources.min()) <= int(sources.max()) < num_ranks:
            rule = f"be in [0, {num_ranks})"
            fail(ValueError, "plan_placement", "sources", rule, describe(sources))
    return trace


def _cost(
    trace: Tensor, sources: Tensor | None, ranks: tuple[int, ...], num_ranks: int
) -> tuple[float, int]:
    """The exact cost of a placement on the trace: fullest rank over even share, and rows moved."""
    real = trace >= 0
    owner = torch.where(real, torch.tensor(ranks)[trace.clamp(min=0)], -1)
    load = torch.bincount(owner[real], minlength=num_ranks).double()
    max_load = (load.max() / load.mean().clamp(min=1e-9)).item()
    reaches = (owner[:, :, None] == torch.arange(num_ranks)).any(1)  # [N, W]
    rows = int(reaches.sum())
    if sources is None:
        return max_load, round(rows * (num_ranks - 1) / num_ranks)
    at_home = reaches.gather(1, sources.long().cpu()[:, None]).sum()
    return max_load, rows - int(at_home)


def _value(cost: tuple[float, int], trace: Tensor, traffic_weight: float) -> float:
    slots = max(int((trace >= 0).sum()), 1)
    return (1 - traffic_weight) * cost[0] + traffic_weight * cost[1] / slots


class _Problem:
    """The program: `E * W` placements `x`, `P * W` pairs on one rank `y`, and the load `L`."""

    def __init__(
        self,
        trace: Tensor,
        sources: Tensor | None,
        num_experts: int,
        num_ranks: int,
        traffic_weight: float,
        max_pairs: int,
    ) -> None:
        self.num_experts, self.num_ranks = num_experts, num_ranks
        real = trace >= 0
        one_hot = torch.zeros(trace.shape[0], num_experts + 1, dtype=torch.float64)
        one_hot.scatter_(1, trace.remainder(num_experts + 1), 1.0)
        chosen = one_hot[:, :num_experts]
        self.demand = torch.bincount(trace[real], minlength=num_experts).double()
        together = (chosen.t() @ chosen).triu(1)
        order = together.flatten().argsort(descending=True, stable=True)[:max_pairs]
        order = order[together.flatten()[order] > 0]
        self.pairs = [(int(p) // num_experts, int(p) % num_experts) for p in order]
        slots = self.demand.sum().item()
        # A pair on one rank saves a row, but K experts on one rank save K - 1 and are K (K - 1) / 2
        # pairs: weigh each by 2 / K.
        saved = traffic_weight * 2 / (max(trace.shape[1], 2) * slots)
        self.pair_gain = saved * together.flatten()[order]
        self.home_gain = torch.zeros(num_experts, num_ranks, dtype=torch.float64)
        if sources is not None:
            for rank in range(num_ranks):
                self.home_gain[:, rank] = chosen[sources.cpu() == rank].sum(0)
            self.home_gain *= traffic_weight / slots
        self.load_weight = 1 - traffic_weight

    def solve(self, time_limit: float) -> tuple[tuple[int, ...], bool]:
        try:
            import numpy as np
            from scipy.optimize import Bounds, LinearConstraint, milp
            from scipy.sparse import coo_array
        except ImportError:
            raise ImportError(
                "plan_placement: needs SciPy: pip install fastmoe-route[routers]"
            ) from None
        num_x = self.num_experts * self.num_ranks
        num_y = len(self.pairs) * self.num_ranks
        size = num_x + num_y + 1
        cost = np.concatenate(
            [
                -self.home_gain.flatten().numpy(),
                -self.pair_gain.repeat_interleave(self.num_ranks).numpy(),
                [self.load_weight],
            ]
        )
        entries, low, high = self._constraints(num_x, size)
        rows, columns, values = zip(*entries, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(low), size)).tocsr()
        is_integer = np.concatenate([np.ones(num_x), np.zeros(num_y + 1)])
        upper = np.ones(size)
        upper[-1] = np.inf
        result = milp(
            cost,
            constraints=LinearConstraint(matrix, low, high),
            integrality=is_integer,
            bounds=Bounds(0, upper),
            options={"time_limit": time_limit},
        )
        if result.x is None:
            return neighbours(self.num_experts, self.num_ranks), False
        x = result.x[:num_x].reshape(self.num_experts, self.num_ranks)
        return tuple(int(rank) for rank in x.argmax(1)), bool(result.status == 0)

    def _constraints(
        self, num_x: int, size: int
    ) -> tuple[list[tuple[int, int, float]], list[float], list[float]]:
        """Entries (row, column, value) of the matrix, and the bounds of its rows."""
        ranks, inf = self.num_ranks, float("inf")
        entries: list[tuple[int, int, float]] = []
        low: list[float] = []
        high: list[float] = []

        def row(parts: list[tuple[int, float]], least: float, most: float) -> None:
            entries.extend((len(low), column, value) for column, value in parts)
            low.append(least)
            high.append(most)

        for e in range(self.num_experts):
            row([(e * ranks + r, 1.0) for r in range(ranks)], 1, 1)
        even = max(self.demand.sum().item() / ranks, 1e-9)
        share = self.num_experts / ranks
        for r in range(ranks):
            column = [e * ranks + r for e in range(self.num_experts)]
            row([(c, 1.0) for c in column], share, share)
            loads = [(c, load / even) for c, load in zip(column, self.demand.tolist(), strict=True)]
            row([*loads, (size - 1, -1.0)], -inf, 0)
        for p, pair in enumerate(self.pairs):
            for r in range(ranks):
                y = num_x + p * ranks + r
                for e in pair:
                    row([(y, 1.0), (e * ranks + r, -1.0)], -inf, 0)
        # Ranks without sources are alike: expert 0 goes first, so that the solver does not try
        # every order of them.
        if not self.home_gain.any():
            row([(0, 1.0)], 1, 1)
        return entries, low, high
