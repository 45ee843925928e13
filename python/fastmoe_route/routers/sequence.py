"""Routers that decide for a sequence, or let tokens of a sequence speak for each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route._segments import segment_mean, segment_softmax, segment_sum
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.routings import per_token
from fastmoe_route.routers.scores import linear, wide


@register("graph_of_tokens", row="R53", source="arXiv:2505.00792", verified="mem", invariance="S")
class GraphOfTokens(LinearRouter):
    """Graph of Tokens: a token's probabilities are averaged with those of similar tokens.

    `p~_i = sum over j of S_ij softmax(z_j)` over the token's own sequence, `S` row-stochastic:
    `softmax_j(-|x_i - x_j|^2 / (2 sigma^2 H))` (`gaussian`), `softmax_j(x_i . x_j / sqrt(H))`
    (`dot`) or the identity; then the `top_k` largest `p~`, renormalised. With `causal`, `j` is
    never after `i`, which decoding needs. Mixed in float64, so that a sequence's result does not
    depend on the others.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        similarity: `gaussian`, `dot` or `identity`.
        sigma: width of the Gaussian.
        causal: only earlier tokens speak.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        similarity: str = "gaussian",
        sigma: float = 1.0,
        causal: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        kinds = ("gaussian", "dot", "identity")
        self.similarity = self.check_choice("similarity", similarity, kinds)
        self.causal = self.check_flag("causal", causal)
        self.sigma = self.check_number("sigma", sigma, above=0)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        p = z.softmax(1)
        if self.similarity != "identity":
            p = self._mixed(p.double(), x, context).to(z.dtype)
        routing = gate(p, self.top_k, score="identity", normalize=True)
        if self.stats:
            routing = routing._replace(score_sum=p.sum(0), logsumexp=z.logsumexp(1))
        return self.routed(routing, context)

    def _mixed(self, p: Tensor, x: Tensor, context: Context) -> Tensor:
        """The means; NaN for those who see one, and for nobody else: 0 times NaN is NaN."""
        similarity, barred = self._similarity(x, context)
        is_broken = p.isnan().any(1)
        sees_broken = (is_broken & ~barred).any(1)
        mixed = similarity @ p.masked_fill(is_broken[:, None], 0.0)
        return mixed.masked_fill(sees_broken[:, None], torch.nan)

    def _similarity(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """`S` `[T, T]`, and which of its entries are 0 since a token may not look there."""
        x, ids = x.double(), context.sequences(x)[0]
        dot = x @ x.T
        if self.similarity == "gaussian":
            size = dot.diagonal()
            far = size[:, None] + size - 2 * dot
            logits = -far / (2 * self.sigma**2 * self.hidden_size)
        else:
            logits = dot * self.hidden_size**-0.5
        barred = ids[:, None] != ids
        if self.causal:
            barred = barred | torch.ones_like(barred).triu(1)
        return logits.masked_fill(barred, -torch.inf).softmax(1), barred


@register(
    "milora", row="R66", source="arXiv:2410.18035", verified="mem", invariance="S", decode="pre"
)
class MiLoRA(LinearRouter):
    """MiLoRA: the prompt chooses its LoRA modules once, before the first new token.

    Logits of the sequence's mean hidden state, softmax top-k, renormalised, the same for all its
    tokens. Decoding hands `extra["decision"]` `[num_sequences, E]` of the prefill back as `state`:
    no logits are computed then.

    Args:
        hidden_size: `H`.
        num_experts: `E` LoRA modules.
        top_k: modules per sequence.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)

    def pool(self, x: Tensor, ids: Tensor, num: int) -> Tensor:
        """What stands for each sequence, `[S, H]`."""
        return segment_mean(x, ids, num)

    def route(self, x: Tensor, context: Context) -> Routed:
        ids, num = context.sequences(x)
        z = context.state
        if z is None:
            z = self.score(self.pool(wide(x), ids, num))
        self.check_state(z, num, self.num_experts)
        routing = per_token(gate(z, self.top_k, normalize=True), ids)
        return self.routed(self.measured(routing, z[ids]), context, extra={"decision": z})


@register(
    "accord", row="L9", source="arXiv:2506.11052", verified="mem", invariance="S", decode="pre"
)
class Accord(MiLoRA):
    """ACCORD: a sequence picks the LoRA modules of its problem type, by attention.

    A learned query attends over the sequence's tokens; the logits of that mean choose as in
    `milora`. `state` `[num_sequences, E]` overrides them: a large number at the known type gives
    that module alone.

    Args:
        hidden_size: `H`.
        num_experts: `E` modules.
        top_k: modules per sequence.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 1, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.query = nn.Parameter(torch.empty(1, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the query to 0: a plain mean."""
        nn.init.zeros_(self.query)

    def pool(self, x: Tensor, ids: Tensor, num: int) -> Tensor:
        """The attention-weighted mean of each sequence."""
        attention = linear(x, self.query) * self.hidden_size**-0.5
        return segment_sum(x * segment_softmax(attention, ids, num), ids, num)
