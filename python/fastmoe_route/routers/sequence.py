"""Routers that decide for a sequence, or let tokens of a sequence speak for each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route._arguments import check_choice, check_dtype, check_int, check_shape
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.parts import (
    LinearRouter,
    assemble,
    every_expert,
    per_token,
    segment_mean,
    sequences,
)
from fastmoe_route.routers.scores import Linear, linear, sigmoid, wide


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
        check_choice(self.name, "similarity", similarity, ("gaussian", "dot", "identity"))
        self.similarity, self.causal = similarity, self.check_flag("causal", causal)
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
        x, ids = x.double(), sequences(context, x)[0]
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
        ids, num = sequences(context, x)
        z = context.state
        if z is None:
            z = self.score(self.pool(wide(x), ids, num))
        check_shape(self.name, "state", z, (num, self.num_experts))
        routing = per_token(gate(z, self.top_k, normalize=True), ids)
        if self.stats:
            mine = z[ids]
            sums, logsumexp = mine.softmax(1).sum(0), mine.logsumexp(1)
            routing = routing._replace(score_sum=sums, logsumexp=logsumexp)
        return self.routed(routing, context, extra={"decision": z})


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
        self.query = nn.Parameter(torch.zeros(1, hidden_size))

    def pool(self, x: Tensor, ids: Tensor, num: int) -> Tensor:
        """The attention-weighted mean of each sequence."""
        attention = linear(x, self.query)[:, 0] * self.hidden_size**-0.5
        most = attention.new_full((num,), -torch.inf).scatter_reduce(0, ids, attention, "amax")
        weight = (attention - most.detach()[ids]).exp()
        total = segment_mean(weight, ids, num)[ids]
        return segment_mean(x * (weight / total)[:, None], ids, num)


class Merging(Router):
    """Base of routers that give every sequence one expert, merged from all.

    The routing takes every expert with its coefficient; `mix` merges the parameters first and runs
    one expert per sequence. For linear experts the two are the same.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: `E`; every expert takes part.
        common: see `Common`.
    """

    unused = ("z_coef",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            hidden_size, num_experts, num_experts if top_k is None else top_k, **common
        )

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """The coefficient of every expert for each sequence, `[S, E]`."""
        raise NotImplementedError

    def route(self, x: Tensor, context: Context) -> Routed:
        ids, num = sequences(context, x)
        share = self.coefficients(wide(x), ids, num, context)
        slots = every_expert(x.shape[0], self.num_experts, x.device)
        weights, experts = share[ids].sort(dim=1, descending=True, stable=True)
        routing = assemble(slots.gather(1, experts), weights, self.num_experts)
        if self.stats:
            routing = routing._replace(score_sum=share[ids].sum(0))
        return self.routed(routing, context, extra={"share": share, "sequence": ids})

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        """The merged expert of each token's sequence."""
        assert routed.extra is not None
        merged = experts.merged(routed.extra["share"])
        ids = routed.extra["sequence"].to(torch.int32)[:, None]
        return merged(x, (ids, torch.ones_like(ids, dtype=wide(x).dtype)))


@register(
    "cond_conv",
    row="L6",
    source="arXiv:2406.00210",
    verified="mem",
    invariance="S",
    decode="leak",
)
class CondConv(Merging):
    """A-SDM's conditional weights: per sequence `W = sum over e of sigmoid(f(mean of x))_e W_e`.

    The coefficients do not sum to 1.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: `E`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.score = Linear(hidden_size, num_experts, bias=True)

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """The sigmoids."""
        share: Tensor = sigmoid(self.score(segment_mean(x, ids, num)))
        return share


@register("supernet_mixture", row="L8", source="arXiv:2306.04845", verified="mem", invariance="S")
class SupernetMixture(Merging):
    """Mixture-of-Supernets: an architecture's encoding decides how supernet weights are merged.

    `W = sum over e of softmax(f(encoding))_e W_e`; `state` `[num_sequences, encoding_size]` holds
    the encodings, zeros without it. One expert is the plain supernet.

    Args:
        hidden_size: `H`.
        num_experts: `E` supernets.
        top_k: `E`.
        encoding_size: length of an encoding.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        encoding_size: int = 16,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        encoding_size = check_int(self.name, "encoding_size", encoding_size, 1)
        self.encoding_size = encoding_size
        self.score = Linear(encoding_size, num_experts, bias=True)

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """The softmax of the encodings' logits."""
        encoding = context.state
        if encoding is None:
            encoding = x.new_zeros(num, self.encoding_size)
        check_shape(self.name, "state", encoding, (num, self.encoding_size))
        share: Tensor = self.score(encoding.to(x.dtype)).softmax(1)
        return share


@register("mhr", row="R64", source="arXiv:2211.03831", verified="code", invariance="S")
class Mhr(Merging):
    """MHR and Poly: a table says how a task mixes the skills, for every head of the features.

    `alpha_{e,h} = sigmoid(Z[task, h, e]) / sum over e of the same`. With `LoraExperts`, `A` and `B`
    are cut into `num_heads` blocks of features and every block is mixed by its own coefficients
    (`num_heads = 1` is Poly, arXiv:2202.13914); with other experts, by their mean over heads.
    `state`, int64 `[num_sequences]`, is the task of each sequence, 0 without it. MHR-z trains `Z`
    alone, whose learning rate is ten times the others'.

    Args:
        hidden_size: `H`.
        num_experts: `E` skills.
        top_k: `E`.
        num_tasks: rows of the table.
        num_heads: a divisor of `H`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        num_tasks: int = 1,
        num_heads: int = 1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        num_tasks = check_int(self.name, "num_tasks", num_tasks, 1)
        num_heads = check_int(self.name, "num_heads", num_heads, 1)
        self.table = nn.Parameter(torch.empty(num_tasks, num_heads, num_experts))
        nn.init.uniform_(self.table, -1e-3, 1e-3)

    def heads(self, num: int, context: Context) -> Tensor:
        """The coefficients `[S, heads, E]`, rows that sum to 1."""
        tasks = context.state
        if tasks is None:
            tasks = torch.zeros(num, dtype=torch.int64, device=self.table.device)
        check_shape(self.name, "state", tasks, (num,))
        check_dtype(self.name, "state", tasks, (torch.int64, torch.int32))
        self.check_ids("state", tasks, self.table.shape[0])
        skills = self.table[tasks].sigmoid()
        return skills / skills.sum(2, keepdim=True)

    def coefficients(self, x: Tensor, ids: Tensor, num: int, context: Context) -> Tensor:
        """Their mean over heads."""
        return self.heads(num, context).mean(1).to(x.dtype)

    def route(self, x: Tensor, context: Context) -> Routed:
        routed = super().route(x, context)
        assert routed.extra is not None
        heads = self.heads(sequences(context, x)[1], context)
        return routed._replace(extra={**routed.extra, "heads": heads})

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        """The merged expert of each token's sequence, block by block for LoRA experts."""
        blockwise = getattr(experts, "merged_blockwise", None)
        if blockwise is None:
            return super().mix(x, routed, experts)
        assert routed.extra is not None
        ids = routed.extra["sequence"].to(torch.int32)[:, None]
        ones = torch.ones_like(ids, dtype=wide(x).dtype)
        y: Tensor = blockwise(routed.extra["heads"])(x, (ids, ones))
        return y
