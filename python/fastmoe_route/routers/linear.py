"""The base class of routers whose logits are a linear map of the hidden states."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route.results import Routing
from fastmoe_route.routers.base import Common, Router
from fastmoe_route.routers.routings import assemble
from fastmoe_route.routers.scores import Linear


class LinearRouter(Router):
    """A router whose logits are a linear map of the hidden states.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token; None for `E`.
        num_columns: columns of the logits; None for `E`.
        common: see `Common`.

    Attribute `score_class`: the map's class, with its own way to draw weights.
    """

    score_class: ClassVar[type[Linear]] = Linear

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        num_columns: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.score = self.score_class(hidden_size, num_columns or num_experts)

    def built(self, experts: Tensor, weights: Tensor, logits: Tensor) -> Routing:
        """A routing of these slots `[T, K]`, with what the common losses need of the logits."""
        return self.measured(assemble(experts, weights, self.num_experts), logits)

    def measured(self, routing: Routing, logits: Tensor) -> Routing:
        """The routing, with what the common losses need of the logits."""
        if not self.stats:
            return routing
        score_sum = logits.softmax(1).sum(0)[: self.num_experts]
        return routing._replace(score_sum=score_sum, logsumexp=logits.logsumexp(1))
