"""Balance without a loss: biases that only choose, and prices from the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.results import Routing
from fastmoe_route.routers.base import Common, Context, Routed
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.plans import balanced, expert_plan
from fastmoe_route.routers.rare import rare
from fastmoe_route.routers.routings import every_expert
from fastmoe_route.routers.scores import sigmoid
from fastmoe_route.softmax import softmax
from fastmoe_route.transport import transport


def reduce_over_ranks(*values: Tensor) -> None:
    """Sums tensors over all processes of the default group, where there is one, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for value in values:
            torch.distributed.all_reduce(value)


def _in_backward() -> bool:
    """Whether a backward pass is under way: checkpointing runs calls anew there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class BiasedRouter(LinearRouter):
    """A router with a bias that only chooses, moved by the load of finished batches.

    Training calls count the slots that ask for each expert, in the buffer `load`, once also where
    checkpointing runs them again; `update`, called after the optimizer's step, moves `bias` and
    empties `load`. The bias never sees the batch it routes, which would leak later tokens into
    earlier ones (arXiv:2408.15664).

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        rate: the step `u`.
        rule: `sign`, `b += u sign(n - n_e)`; `proportional`, `b += u (n - n_e)`; or
            `multiplicative`, keys `s b` from `b = 1` on, moved as by `sign`.
        common: see `Common`.
    """

    bias: Tensor
    load: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        rate: float = 1e-3,
        rule: str = "sign",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.rate = self.check_number("rate", rate, 0)
        self.rule = self.check_choice("rule", rule, ("sign", "proportional", "multiplicative"))
        self.register_buffer("bias", torch.empty(num_experts))
        self.register_buffer("load", torch.empty(num_experts, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the bias to its start, 0 or 1 by the rule, and the load to 0."""
        nn.init.constant_(self.bias, 1.0 if self.rule == "multiplicative" else 0.0)
        nn.init.zeros_(self.load)

    def key_bias(self, logits: Tensor) -> Tensor:
        """What is added to the scores for choosing, `[E]` or `[T, E]`."""
        if self.rule == "multiplicative":
            return sigmoid(logits.detach()) * (self.bias - 1).to(logits.dtype)
        return self.bias.to(logits.dtype)

    def observed(self, routing: Routing) -> Routing:
        """Counts the slots of a training call; returns the routing."""
        if self.training and not _in_backward():
            with torch.no_grad():
                self.load.add_(routing.demand)
        return routing

    @torch.no_grad()
    def update(self) -> None:
        """Moves the bias by the load of all calls, on all ranks, since the last update."""
        reduce_over_ranks(self.load)
        gap = self.load.double().mean() - self.load
        step = gap if self.rule == "proportional" else gap.sign()
        self.bias.add_((self.rate * step).to(self.bias.dtype))
        self.load.zero_()


@register("loss_free", row="R26", source="arXiv:2408.15664", verified="paper")
class LossFree(BiasedRouter):
    """Loss-free balancing: sigmoid scores, chosen by `s + b`, weighed by `s`.

    `b` never enters a weight, so weights are those of a run without it wherever the same experts
    are chosen. Call `update()` after each optimizer step: `b_e += rate * sign(mean load - load_e)`.

    Defaults: two experts, rate 1e-3 (1e-4 is slow, 1e-2 oscillates), bias 0.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        rate: the step of the bias.
        rule: `sign`, `proportional` or `multiplicative`, see `BiasedRouter`.
        common: see `Common`.
    """

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        bias = self.key_bias(logits)
        routing = gate(logits, self.top_k, score="sigmoid", bias=bias, stats=self.stats)
        return self.routed(self.observed(routing), context)


@register("deepseek_v3", row="R22", source="arXiv:2412.19437", verified="mem")
class DeepSeekV3(BiasedRouter):
    """DeepSeek-V3: sigmoid scores, a bias that only chooses, limited groups, weights normalised.

    `s = sigmoid(z)`; experts by `s + bias` inside the `topk_groups` best groups, a group scored by
    the sum of its two best; `w = scale * s_i / sum_{chosen} s_j`. Shared experts are the layer's
    and have weight 1. Unlike softmax, adding a constant to all logits changes the weights.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        num_groups: equal groups of neighbouring experts; V3 has 8 groups of 32.
        topk_groups: groups a token may use; V3 has 4.
        scale: factor on the weights; V3 has 2.5.
        rate: the step of the bias, see `BiasedRouter`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 8,
        *,
        num_groups: int = 1,
        topk_groups: int | None = None,
        scale: float = 2.5,
        rate: float = 1e-3,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, rate=rate, **common)
        self.num_groups = self.check_divisor("num_groups", num_groups)
        if topk_groups is not None:
            topk_groups = self.check_int("topk_groups", topk_groups, 1, self.num_groups)
        self.topk_groups = topk_groups
        self.scale = self.check_number("scale", scale)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        routing = gate(
            logits,
            self.top_k,
            score="sigmoid",
            bias=self.key_bias(logits),
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            group_score="top2_sum",
            normalize=True,
            scale=self.scale,
            stats=self.stats,
        )
        return self.routed(self.observed(routing), context)


@register(
    "bip", row="R27", source="arXiv:2502.15451", verified="mem", invariance="B*", decode="leak"
)
class Bip(LinearRouter):
    """BIP balancing: prices from the dual of the balanced assignment problem, as a bias.

    `bias = transport(softmax(z), "bip", iters, top_k)`, experts by `p + bias`, `w = p`. Training
    prices the batch itself, which leaks later tokens into earlier choices, unless `carry` is on:
    then it chooses by the prices of the batch before. Evaluation uses the last prices, the buffer
    `bias`. The balance it reaches was simulated.

    Defaults: two experts, 4 iterations (the paper has 2 to 14).

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        iters: iterations of the prices.
        carry: choose by the prices of the batch before; not for checkpointed layers, whose second
            run would find the prices of their own batch.
        common: see `Common`.
    """

    bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        iters: int = 4,
        carry: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.iters = self.check_int("iters", iters, 1)
        self.carry = self.check_flag("carry", carry)
        self.register_buffer("bias", torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the prices to 0."""
        nn.init.zeros_(self.bias)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        bias = self.bias.to(logits.dtype)
        if self.training and x.shape[0] > 0:
            scores = softmax(logits.detach())
            priced = transport(scores, "bip", iters=self.iters, top_k=self.top_k)
            bias = bias.clone() if self.carry else priced
            with torch.no_grad():
                self.bias.copy_(priced)
        return self.routed(gate(logits, self.top_k, bias=bias, stats=self.stats), context)


def _plan(
    scores: Tensor, scope_ids: Tensor | None, num_scopes: int, iters: int, temperature: float
) -> list[Tensor]:
    context = Context(scope_ids=scope_ids, num_scopes=num_scopes)
    return [balanced(scores, "sinkhorn", context, iters=iters, temperature=temperature)]


_rare_plan = rare(
    "ssr_plan",
    "Tensor scores, Tensor? scope_ids, SymInt num_scopes, int iters, float temperature",
    _plan,
    lambda scores, *_: [torch.ones_like(scores)],
)


@register(
    "ssr", row="R28", source="arXiv:2511.08972", verified="2nd", invariance="B*", decode="leak"
)
class Ssr(LinearRouter):
    """Selective Sinkhorn routing: a few training steps choose by the balanced plan.

    With probability `plan_share` a training step takes the `top_k` largest of
    `transport(softmax(z), "sinkhorn")`, renormalised, as weights, differentiable through the
    iterations; all other calls are softmax, top-k, renormalised. Those few steps look at later
    tokens. The call that a plan decided has `extra["planned"]` 1; others have none, or 0 where they
    train in a compiled graph, which holds both.

    Defaults: two experts, temperature 0.05, 100 iterations (the paper stops at a tolerance of
    1e-4, which would wait for the device), `plan_share` 1e-3.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        plan_share: probability of a planned training step.
        temperature: of the plan.
        iters: iterations of the plan.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        plan_share: float = 1e-3,
        temperature: float = 0.05,
        iters: int = 100,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.plan_share = self.check_number("plan_share", plan_share, 0, 1)
        self.temperature = self.check_number("temperature", temperature, above=0)
        self.iters = self.check_int("iters", iters, 1)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        usual = gate(logits, self.top_k, normalize=True, stats=self.stats)
        if not self.training or x.shape[0] == 0:
            return self.routed(usual, context)
        is_planned = torch.rand(()) < self.plan_share
        options = (context.scope_ids, context.num_scopes, self.iters, self.temperature)
        if torch.compiler.is_compiling():
            (plan,) = _rare_plan(is_planned, softmax(logits), *options)
        elif is_planned:
            (plan,) = _plan(softmax(logits), *options)
        else:
            return self.routed(usual, context)
        chosen = gate(plan, self.top_k, score="identity", normalize=True)
        experts = torch.where(is_planned, chosen.experts, usual.experts)
        weights = torch.where(is_planned, chosen.weights, usual.weights)
        routing = self.built(experts, weights, logits)
        return self.routed(routing, context, extra={"planned": is_planned.float()})


@register(
    "sparse_ot",
    row="R29",
    source="arXiv:2209.15466",
    verified="code",
    invariance="B",
    decode="leak",
)
class SparseOt(LinearRouter):
    """Sparsity-constrained optimal transport: the plan chooses, the softmax weighs.

    The plan has at most `top_k` experts per token and even column sums as far as `iters` steps of
    Adam reach; a token's experts are where its plan is positive, `w = softmax(z)` there, as it is.
    No auxiliary loss. With `sparse="expert"` it is the experts whose number of tokens is limited,
    to `ceil(T * top_k / E)`: their column sums are even and it is tokens that have prices.

    Defaults: two experts, `gamma` 1, Adam 0.01, 20 iterations.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token, at most or (`sparse="expert"`) on average at most.
        sparse: `token` or `expert`, whose choices are limited.
        iters: iterations of the prices.
        gamma: weight of the quadratic term.
        learning_rate: Adam's.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        sparse: str = "token",
        iters: int = 20,
        gamma: float = 1.0,
        learning_rate: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.sparse = self.check_choice("sparse", sparse, ("token", "expert"))
        self.options: dict[str, Any] = {
            "iters": self.check_int("iters", iters, 1),
            "gamma": self.check_number("gamma", gamma, above=0),
            "learning_rate": self.check_number("learning_rate", learning_rate, above=0),
        }

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        p = softmax(logits)
        if self.sparse == "expert":
            plan = expert_plan(p.detach(), self.top_k, context, **self.options)
            slots = every_expert(x.shape[0], self.num_experts, x.device)
            return self.routed(self.built(slots.masked_fill(plan == 0, -1), p, logits), context)
        plan = balanced(p.detach(), "ksparse", context, k=self.top_k, **self.options)
        chosen = gate(plan, self.top_k, score="identity", threshold=0.0, min_k=0)
        weights = p.gather(1, chosen.experts.long().clamp(min=0))
        return self.routed(self.built(chosen.experts, weights, logits), context)
