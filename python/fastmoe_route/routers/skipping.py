"""Routers that leave work out: whole tokens, whole sequences, parts of an expert's width.

Where a method says that a skipped token keeps its value, the layer's output holds the input
(`identity=True`). In a block that adds its input itself, pass `identity=False`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._arguments import (
    check_choice,
    check_divides,
    check_int,
    check_shape,
    check_tensor,
)
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.moe_mlp import ACTIVATIONS, GATED_ACTIVATIONS
from fastmoe_route.routers.base import Common, Context, Routed
from fastmoe_route.routers.estimators import straight_through
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.parts import (
    LinearRouter,
    every_expert,
    only_where,
    segment_mean,
    segment_rank,
    sequences,
)
from fastmoe_route.routers.random import gumbel, uniform
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
        top_k: int = 1,
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
        if top_k != 1:
            self.fail("top_k", "be 1: a token takes one path", top_k)
        self.random = self.check_flag("random", random)
        self.forced: Tensor | None = None
        paths = self.check_numbers("costs", [1.0] * num_experts if costs is None else costs)
        if paths.shape != (num_experts,):
            self.fail("costs", f"have {num_experts} entries", len(paths))
        self.register_buffer("costs", torch.cat([paths, paths.new_zeros(1)]))

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
        ids, num = sequences(context, x)
        s = context.state
        if s is None:
            s = sigmoid(self.decide(segment_mean(wide(x), ids, num))[:, 0])
        check_shape(self.name, "state", s, (num,))
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
        self.num_windows = check_int(self.name, "num_windows", num_windows, 1)
        width = check_int(self.name, "width", width, 1)
        self.inner = Linear(hidden_size, width, bias=True)
        self.outer = Linear(width, 3, bias=True)

    def route(self, x: Tensor, context: Context) -> Routed:
        ids, num = sequences(context, x)
        extra = {}
        decision = context.state
        if decision is None:
            logits = extra["logits"] = self._decide(wide(x), ids, num)
            decision = logits.argmax(1)
        check_shape(self.name, "state", decision, (num,))
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
        width = check_int(self.name, "width", width, 1)
        self.inner = Linear(4, width, bias=True)
        self.outer = Linear(width, 1, bias=True)

    def route(self, x: Tensor, context: Context) -> Routed:
        assert context.attention_mass is not None
        ids, num = sequences(context, x)
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
        top_k = num_experts if top_k is None else top_k
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


@register("flextron", row="R45", source="arXiv:2406.10260", verified="mem")
class Flextron(LinearRouter):
    """Flextron: a token picks how wide its feed-forward network is; narrower ones are nested.

    The experts are the `E` equal slices of one network's neurons, sorted by importance
    (`slice_experts` makes them), and width `j` is the first `j + 1` slices, each with weight 1: its
    output is that of the network cut off there, and the widest is the whole network. The width is
    the argmax over `E` logits, in training a Gumbel draw whose probability carries the gradient.
    `static` fixes it. The paper's router also sees the wanted latency.

    Args:
        hidden_size: `H`.
        num_experts: `E` slices.
        top_k: the widest width allowed; None for all slices.
        static: use this width, 1 to `top_k`, for every token.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        static: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        top_k = num_experts if top_k is None else top_k
        super().__init__(hidden_size, num_experts, top_k, top_k, **common)
        if static is not None:
            static = check_int(self.name, "static", static, 1, top_k)
        self.static = static

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        noise = gumbel(context, x, self.top_k) if self.training else None
        width = gate(z, 1, noise=noise)
        last = (
            width.experts
            if self.static is None
            else torch.full_like(width.experts, self.static - 1)
        )
        slices = every_expert(x.shape[0], self.top_k, x.device)
        weights = torch.ones_like(slices, dtype=z.dtype)
        if self.training and self.static is None:
            weights = straight_through(weights, width.weights.expand_as(weights))
        routing = self.built(torch.where(slices <= last, slices, -1), weights, z)
        return self.routed(routing, context, extra={"width": last[:, 0] + 1})


def slice_experts(w_up: Tensor, w_down: Tensor, num_slices: int, activation: str) -> Experts:
    """A dense network's neurons as `num_slices` equal experts; all of them together are it.

    Args:
        w_up: `[H, 2I]` for gated activations (gate half first), else `[H, I]`.
        w_down: `[I, H]`.
        num_slices: `E`, a divisor of `I`.
        activation: as of `moe_mlp`.

    Returns:
        Experts of width `I / E`, in the order of the neurons.

    Raises:
        ValueError: `E` does not divide `I`, or a shape or the activation does not fit.
    """
    code = check_choice("slice_experts", "activation", activation, ACTIVATIONS)
    check_tensor("slice_experts", "w_down", w_down, 2)
    inner, hidden = w_down.shape
    halves = 2 if code < len(GATED_ACTIVATIONS) else 1
    check_shape("slice_experts", "w_up", w_up, (hidden, halves * inner))
    num_slices = check_divides("slice_experts", "num_slices", num_slices, inner, "width")
    up = w_up.reshape(hidden, halves, num_slices, -1).permute(2, 0, 1, 3)
    down = w_down.reshape(num_slices, -1, hidden)
    return Experts(up.reshape(num_slices, hidden, -1), down, activation)


@register("read_me", row="R46", source="arXiv:2410.19123", verified="mem")
class ReadMe(LinearRouter):
    """Read-ME: experts are chosen once, before the first layer, for all layers.

    The first layer scores the tokens (softmax top-k, renormalised) and hands the logits on as
    `state`; every later layer uses them instead of its own, so the whole model's experts are known
    before it runs, and caches can look ahead.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 1, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x) if context.state is None else context.state
        check_shape(self.name, "state", z, (x.shape[0], self.num_experts))
        routing = gate(z, self.top_k, normalize=True, stats=self.stats)
        return self.routed(routing, context, state=z)


@register("ride", row="L5", source="arXiv:2010.01809", verified="code")
class Ride(LinearRouter):
    """RIDE: experts in a fixed order, until the token needs no more help.

    Expert 0 always runs; expert `e` runs if all before it did and `sigmoid(help_e) > threshold`.
    The output is the mean of those that ran. The diversity loss between experts is
    `losses.kl_diversity`, with 0.2. The paper's help gates read the experts' logits, these the
    hidden state.

    Defaults: threshold 0.5; 1 stops after one expert, 0 runs all.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: the most experts; None for all.
        threshold: in [0, 1].
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        threshold: float = 0.5,
        **common: Unpack[Common],
    ) -> None:
        top_k = num_experts if top_k is None else top_k
        super().__init__(hidden_size, num_experts, top_k, top_k, **common)
        self.threshold = self.check_number("threshold", threshold, 0, 1)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        soft = sigmoid(z[:, 1:])
        on = (soft > self.threshold).to(soft.dtype)
        hard = torch.nn.functional.pad(on.cumprod(1), (1, 0), value=1.0)
        weights = hard / hard.sum(1, keepdim=True)
        if self.training:
            both = torch.nn.functional.pad(soft.cumprod(1), (1, 0), value=1.0)
            weights = straight_through(weights, both / both.sum(1, keepdim=True))
        slots = every_expert(x.shape[0], self.top_k, x.device)
        routing = self.built(torch.where(hard > 0, slots, -1), weights, z)
        return self.routed(routing, context, extra={"help": soft})
