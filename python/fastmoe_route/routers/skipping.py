"""Routers that pass tokens by: single ones, whole sequences, single paths.

Where a method says that a skipped token keeps its value, the layer's output holds the input
(`identity=True`). In a block that adds its input itself, pass `identity=False`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._segments import segment_mean, segment_rank
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed
from fastmoe_route.routers.estimators import straight_through
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.random import uniform
from fastmoe_route.routers.routings import only_where
from fastmoe_route.routers.scores import Linear, gelu, sigmoid, wide


class SkippingRouter(LinearRouter):
    """Base of routers that pass some tokens by: the rest goes to its softmax top-k.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts of a token that is not skipped.
        num_columns: columns of the logits; None for `E`.
        identity: the output holds the input, so that a skipped token keeps its value; False where
            a residual connection around the layer already carries it.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = 1,
        num_columns: int | None = None,
        *,
        identity: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, num_columns, **common)
        self.identity = self.check_flag("identity", identity)

    def residual(self, x: Tensor) -> Tensor | None:
        """The weight of the input in the output, `[T]` ones, or None."""
        return wide(x).new_ones(x.shape[0]) if self.identity else None

    def gated(self, x: Tensor, open_: Tensor, context: Context, **parts: object) -> Routed:
        """The result where tokens with `open_ = 0` are skipped and the others weighed by it."""
        routing = only_where(self.score(x), self.top_k, open_ > 0, stats=self.stats)
        routing = routing._replace(weights=routing.weights * open_[:, None].to(routing.weights))
        return self.routed(routing, context, residual=self.residual(x), **parts)


@register("duo_llm", row="R40", source="arXiv:2410.10846", verified="2nd")
class DuoLLM(SkippingRouter):
    """Duo-LLM: a token takes one expert, big or small, or skips the layer.

    Logits over `E` experts and one skip; the best wins, with weight 1, so that a forced path is the
    dense model of that path. In training the weight of the expert, or of a skipped token's own
    input, carries the gradient of its probability (straight-through). `random=True` is the first
    training stage, a uniform choice; the paper's oracle stage enumerates paths by `forced`.
    `extra["cost"]` sums `costs` over the choices. Formula from a summary and memory: unverified.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: 1.
        costs: the cost of each expert, for `extra["cost"]`; skipping costs 0. None for 1 each.
        random: choose uniformly.
        identity: see `SkippingRouter`.
        common: see `Common`.

    Attribute `forced`: int64 `[T]` choices to take instead, `E` for skip, or None.
    """

    costs: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        costs: list[float] | None = None,
        random: bool = False,
        identity: bool = True,
        **common: Unpack[Common],
    ) -> None:
        columns = num_experts + 1
        super().__init__(hidden_size, num_experts, top_k, columns, identity=identity, **common)
        self.check_int("top_k", top_k, 1, 1)
        self.random = self.check_flag("random", random)
        self.forced: Tensor | None = None
        ones = [1.0] * num_experts
        costs = self.check_numbers("costs", ones if costs is None else costs, num_experts)
        self.cost_of_choice = [*costs, 0.0]
        self.register_buffer("costs", torch.empty(columns))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the costs to those given; nothing is drawn."""
        self.costs.copy_(torch.tensor(self.cost_of_choice))

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        choice = gate(z.detach(), 1).experts[:, 0].long()
        if self.random:
            choice = (uniform(context, x, 1)[:, 0] * z.shape[1]).long()
        if self.forced is not None:
            choice = self.forced
        soft = z.softmax(1).gather(1, choice.clamp(min=0)[:, None])
        weight = straight_through(torch.ones_like(soft), soft) if self.training else soft * 0 + 1
        skipped = choice == self.num_experts
        routing = self.built(choice.masked_fill(skipped, -1)[:, None], weight, z)
        residual = weight[:, 0] * skipped if self.identity else None
        cost = self.costs[choice]
        return self.routed(routing, context, residual=residual, extra={"cost": cost})


@register(
    "mindskip", row="R41", source="arXiv:2410.13184", verified="code", invariance="S", decode="pre"
)
class MindSkip(SkippingRouter):
    """Router-Tuning's MindSkip: a whole sequence runs the layer or passes it by.

    `s = sigmoid(w . mean over the sequence of h)`; the layer runs where `s >= tau`, and
    `y = x + 1[s >= tau] * f(x)` with the gradient of `s` (straight-through) in training. Loss
    `skip_coef * mean of s`. Decoding keeps the decision of the prompt: hand `extra["decision"]`
    `[S]` of the prefill back as `state`, and no mean is taken.

    Defaults: `tau` 0.5; only routers are trained.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts of a token of a running sequence (softmax, renormalised).
        tau: threshold.
        skip_coef: coefficient of the loss `skip`.
        identity: see `SkippingRouter`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        tau: float = 0.5,
        skip_coef: float = 0.01,
        identity: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, identity=identity, **common)
        self.tau = self.check_number("tau", tau)
        self.skip_coef = self.check_number("skip_coef", skip_coef)
        self.decide = Linear(hidden_size, 1, bias=True)

    def route(self, x: Tensor, context: Context) -> Routed:
        ids, num = context.sequences(x)
        s = context.state
        if s is None:
            s = sigmoid(self.decide(segment_mean(wide(x), ids, num))[:, 0])
        self.check_state(s, num)
        runs = (s >= self.tau).to(s.dtype)
        open_ = straight_through(runs, s) if self.training else runs
        found = {"skip": self.skip_coef * s.mean()} if self.training and num else {}
        return self.gated(x, open_[ids], context, losses=found, extra={"decision": s})


@register(
    "dr_llm", row="R42", source="arXiv:2510.12773", verified="code", invariance="S", decode="pre"
)
class DrLLM(SkippingRouter):
    """Dr.LLM: per sequence the layer is skipped, run, or run twice.

    An MLP `H -> hidden -> 3` on the means of `num_windows` equal windows of the sequence, logits
    averaged over the windows that hold a token; the argmax decides. Skip is the identity, repeat is
    `f(f(x))` with `f(x) = x + experts(x)`. Trained on searched paths: `losses.focal` on
    `extra["logits"]` `[S, 3]`. Decoding keeps the prompt's decision: hand `extra["decision"]` `[S]`
    back as `state`.

    Defaults: 8 windows, hidden size 128.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts of a token (softmax, renormalised).
        num_windows: windows per sequence.
        width: hidden size of the MLP.
        identity: see `SkippingRouter`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        num_windows: int = 8,
        width: int = 128,
        identity: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, identity=identity, **common)
        self.num_windows = self.check_int("num_windows", num_windows, 1)
        width = self.check_int("width", width, 1)
        self.inner = Linear(hidden_size, width, bias=True)
        self.outer = Linear(width, 3, bias=True)

    def route(self, x: Tensor, context: Context) -> Routed:
        ids, num = context.sequences(x)
        extra = {}
        decision = context.state
        if decision is None:
            logits = extra["logits"] = self._decide(wide(x), ids, num)
            decision = logits.argmax(1)
        self.check_state(decision, num)
        self.check_ids("state", decision, 3)
        extra["decision"] = decision
        mine = decision[ids]
        extra["repeats"] = mine == 2
        return self.gated(x, (mine > 0).to(wide(x).dtype), context, extra=extra)

    def _decide(self, x: Tensor, ids: Tensor, num: int) -> Tensor:
        place, length = segment_rank(torch.zeros_like(ids), ids, num)
        windows = ids * self.num_windows + place * self.num_windows // length.clamp(min=1)
        means = segment_mean(x, windows, num * self.num_windows)
        filled = x.new_zeros(means.shape[0]).index_fill(0, windows, 1.0)
        logits = self.outer(gelu(self.inner(means))) * filled[:, None]
        per_sequence = logits.view(num, self.num_windows, 3).sum(1)
        mean: Tensor = per_sequence / filled.view(num, -1).sum(1, keepdim=True).clamp(min=1)
        return mean

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        """`x` if `identity`, the experts of `x`, and for repeats those of that sum."""
        once = experts(x, routed.routing, routed.plan)
        assert routed.extra is not None
        again = only_where(self.score(x + once), self.top_k, routed.extra["repeats"])
        y = once + experts(x + once, again)
        return x + y if self.identity else y


@register(
    "ftp",
    row="R43",
    source="arXiv:2412.11494",
    verified="mem",
    invariance="S",
    decode="leak",
    needs=("attention_mass",),
)
class Ftp(SkippingRouter):
    """FTP: the least needed tokens of every sequence skip the layer, a fixed share of them.

    A small network sees four numbers of a token, its place in the sequence, the attention it
    received, the rank of that attention, and the sparsity; the `floor(sparsity * length)` tokens
    of each sequence with the lowest score skip, ties to the lower token. In training the others
    carry the gradient of their score. A sequence's share counts its later tokens too, so decoding
    cannot reproduce it, even where the attention is causal.

    Defaults: sparsity 0.22.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts of a token that is kept (softmax, renormalised).
        sparsity: share of tokens to skip, in [0, 1].
        width: hidden size of the small network.
        identity: see `SkippingRouter`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        sparsity: float = 0.22,
        width: int = 16,
        identity: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, identity=identity, **common)
        self.sparsity = self.check_number("sparsity", sparsity, 0, 1)
        width = self.check_int("width", width, 1)
        self.inner = Linear(4, width, bias=True)
        self.outer = Linear(width, 1, bias=True)

    def route(self, x: Tensor, context: Context) -> Routed:
        assert context.attention_mass is not None
        ids, num = context.sequences(x)
        mass = context.attention_mass.to(wide(x).dtype)
        place, length = segment_rank(torch.zeros_like(ids), ids, num)
        rank, _ = segment_rank(mass, ids, num)
        share = mass / segment_mean(mass, ids, num)[ids].clamp(min=1e-30)
        whole = length.to(mass.dtype)
        factors = (place / whole, share, rank / whole, torch.full_like(mass, self.sparsity))
        hidden = gelu(self.inner(torch.stack(factors, 1)))
        s = sigmoid(self.outer(hidden)[:, 0])
        order, _ = segment_rank(s.detach(), ids, num)
        # The small addition keeps floor from losing a token to rounding, as in 0.29 * 100.
        kept = (order >= (self.sparsity * whole + 1e-6).floor()).to(s.dtype)
        open_ = straight_through(kept, s * kept) if self.training else kept
        return self.gated(x, open_, context)


@register("dynamic_token_routing", row="R44", source="arXiv:2308.03409", verified="mem")
class DynamicTokenRouting(SkippingRouter):
    """Dynamic token routing of vision transformers: every path has a gate that can be shut.

    `y = x + sum over e of relu(tanh(z_e)) E_e(x)`; paths whose gate is 0 do no work. Loss
    `budget_coef * (mean share of open gates - budget)^2`, with the gradient of the gates' values
    (straight-through).

    Args:
        hidden_size: `H`.
        num_experts: `E` paths.
        top_k: the most paths of a token; None for all.
        budget: wanted share of open gates.
        budget_coef: coefficient of the loss `budget`.
        identity: see `SkippingRouter`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        budget: float = 0.5,
        budget_coef: float = 1.0,
        identity: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, identity=identity, **common)
        self.budget = self.check_number("budget", budget, 0, 1)
        self.budget_coef = self.check_number("budget_coef", budget_coef)

    def route(self, x: Tensor, context: Context) -> Routed:
        train = self.training and self.budget_coef != 0
        routing = gate(
            self.score(x).tanh(),
            self.top_k,
            score="relu",
            threshold=0.0,
            min_k=0,
            stats=self.stats,
            keep_scores=train,
        )
        found = {}
        if train and routing.scores is not None:
            gates = routing.scores
            cost = straight_through((gates > 0).to(gates.dtype), gates)
            found["budget"] = self.budget_coef * losses.budget(cost, self.budget)
        return self.routed(routing, context, residual=self.residual(x), losses=found)
