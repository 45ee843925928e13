"""Routers whose experts are running means of the tokens they were given; no gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route._initial import draw_normal
from fastmoe_route._segments import segment_sum
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.results import Routing
from fastmoe_route.routers.balance import reduce_over_ranks
from fastmoe_route.routers.base import Common, Context, Routed, Router
from fastmoe_route.routers.scores import linear, wide


class Centroids(Router):
    """Base of routers whose experts are running means of the tokens they were given.

    Training calls add up the tokens of every expert; `update`, called after the optimizer's step,
    moves each centroid by `rate` towards their mean on all ranks, so it stays a convex combination
    of inputs. A centroid without a token stays where it is. No gradient is involved. The
    constructor of a method ends with `reset_parameters`.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        rate: weight of the new mean.
        common: see `Common`.
    """

    centroids: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        rate: float,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.rate = self.check_number("rate", rate, 0, 1)
        self.register_buffer("centroids", torch.empty(num_experts, hidden_size))
        self.register_buffer("sums", torch.empty(num_experts, hidden_size))
        self.register_buffer("counts", torch.empty(num_experts))

    def reset_parameters(self) -> None:
        """Draws new centroids, and forgets the tokens since the last update."""
        draw_normal(self.centroids)
        self._forget()

    def _forget(self) -> None:
        self.sums.zero_()
        self.counts.zero_()

    @torch.no_grad()
    def observe(self, tokens: Tensor, routing: Routing) -> None:
        """Adds the tokens of a training call to their experts."""
        for column in routing.experts.long().unbind(1):
            is_used = (column >= 0).to(self.sums.dtype)
            members = column.clamp(min=0)
            used = tokens.to(self.sums.dtype) * is_used[:, None]
            self.sums.add_(segment_sum(used, members, self.num_experts))
            self.counts.add_(segment_sum(is_used, members, self.num_experts))

    @torch.no_grad()
    def update(self) -> None:
        """Moves the centroids by the tokens of all calls, on all ranks, since the last update."""
        reduce_over_ranks(self.sums, self.counts)
        mean = self.sums / self.counts.clamp(min=1)[:, None]
        moved = torch.lerp(self.centroids, mean, self.rate)
        self.centroids.copy_(torch.where(self.counts[:, None] > 0, moved, self.centroids))
        self._forget()


@register("kmeans", row="R30", source="arXiv:2605.12476", verified="2nd")
class KMeans(Centroids):
    """K-means router: no parameters; an expert is the running mean of the tokens it was given.

    Experts are the `top_k` largest `cos(x, mu_e)`, weight `1 / K` (the source states none). The
    first training call places the centroids on tokens far from each other; `update()` moves them,
    see `Centroids`: `mu_e` to `(1 - rate) mu_e + rate * mean of its tokens`. With several ranks the
    first `update()` gives all of them the centroids of the first that has any, and moves nothing.
    After abstract and third-party text.

    Defaults: one expert, rate 0.05.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        rate: weight of the new mean.
        common: see `Common`.
    """

    is_placed: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        rate: float = 0.05,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, rate=rate, **common)
        self.register_buffer("is_placed", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As that of `Centroids`; the next training call places the centroids."""
        super().reset_parameters()
        self.is_placed.zero_()
        self.has_agreed = False

    def route(self, x: Tensor, context: Context) -> Routed:
        tokens = wide(x)
        if self.training and x.shape[0] > 0:
            self._place(tokens.detach())
        cosines = linear(F.normalize(tokens, dim=1), F.normalize(self.centroids, dim=1))
        routing = gate(cosines, self.top_k, score="identity", stats=self.stats)
        if self.training:
            self.observe(tokens.detach(), routing)
        weights = torch.full_like(routing.weights, 1 / self.top_k)
        return self.routed(routing._replace(weights=weights), context)

    @torch.no_grad()
    def _place(self, tokens: Tensor) -> None:
        """Far tokens as first centroids: each is the token least similar to those before it."""
        unit = F.normalize(tokens, dim=1)
        picked = [unit.new_zeros((), dtype=torch.int64)]
        nearest = unit @ unit[0]
        for _ in range(1, self.num_experts):
            picked.append(nearest.argmin())
            # An index of no dimension would wait for its value on the host.
            far = unit.index_select(0, picked[-1][None])[0]
            nearest = torch.maximum(nearest, unit @ far)
        first = tokens[torch.stack(picked)].to(self.centroids.dtype)
        self.centroids.copy_(torch.where(self.is_placed, self.centroids, first))
        self.is_placed.fill_(True)

    @torch.no_grad()
    def update(self) -> None:
        """As that of `Centroids`, but for the first one with several ranks."""
        if not self.has_agreed and dist.is_available() and dist.is_initialized():
            rank, size = dist.get_rank(), dist.get_world_size()
            owner = torch.where(self.is_placed, rank, size)
            dist.all_reduce(owner, dist.ReduceOp.MIN)
            self.centroids.mul_((owner == rank) | ((owner == size) & (rank == 0)))
            dist.all_reduce(self.centroids)
            self.is_placed.copy_(owner < size)
            self._forget()
            self.has_agreed = True
            return
        super().update()


@register("adapt_dhm", row="L3", source="arXiv:2211.12105", verified="mem")
class AdaptDHM(Centroids):
    """AdaptDHM: the nearest cluster names the expert; centres move by averages, not by gradient.

    `c = softmax(x . centroid / temperature)`, the largest wins, weight 1; see `Centroids` for the
    move.

    Args:
        hidden_size: `H`.
        num_experts: `E` clusters.
        top_k: 1.
        temperature: of the softmax in `extra["assignment"]`; does not change the winner.
        momentum: 1 less the rate; 0 makes a centroid the mean of its members since the last update.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        temperature: float = 1.0,
        momentum: float = 0.95,
        **common: Unpack[Common],
    ) -> None:
        rate = 1 - self.check_number("momentum", momentum, 0, 1)
        super().__init__(hidden_size, num_experts, top_k, rate=rate, **common)
        self.check_int("top_k", top_k, 1, 1)
        self.temperature = self.check_number("temperature", temperature, above=0)
        self.reset_parameters()

    def route(self, x: Tensor, context: Context) -> Routed:
        x = wide(x).detach()
        z = linear(x, self.centroids) / self.temperature
        routing = gate(z, self.top_k, stats=self.stats, keep_scores=True)
        assert routing.scores is not None
        if self.training:
            self.observe(x, routing)
        ones = (routing.experts >= 0).to(routing.weights.dtype)
        extra = {"assignment": routing.scores}
        return self.routed(routing._replace(weights=ones), context, extra=extra)
