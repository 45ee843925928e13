"""Assignment by experts or by the batch: experts choose, or all choose at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._segments import segment_sizes, segment_softmax, segment_sum
from fastmoe_route.assign_balanced import METHODS, assign_balanced
from fastmoe_route.dispatch import expert_capacity
from fastmoe_route.expert_choice import expert_choice
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.reroute import reroute
from fastmoe_route.routers.base import Common, Context, Routed, with_defaults
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.plans import balanced, capped_plan, chosen_by_experts
from fastmoe_route.routers.scores import Linear, sigmoid
from fastmoe_route.softmax import softmax


@register(
    "expert_choice", row="R3", source="arXiv:2202.09368", verified="code", invariance="B",
    decode="leak",
)  # fmt: skip
class ExpertChoice(LinearRouter):
    """Expert choice: every expert takes the tokens that score it highest.

    `S = softmax(x W)` over experts; each expert takes its `C = T * top_k / E` best tokens, weight
    `S`. Loads are even by construction; a token may get none, or all. Later tokens decide about
    earlier ones, so teacher-forced perplexity is optimistic and decoding cannot reproduce it.

    With `token_cap`, experts choose by `capped_plan` instead of `S`; few tokens then go over the
    cap, since what experts choose is rounded from that plan.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token on average, the paper's capacity factor 2.
        token_cap: experts that a token should have at most, at least `top_k`; None for any number.
        common: see `Common`; the capacity factors are not looked at.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        token_cap: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if token_cap is not None:
            token_cap = self.check_int("token_cap", token_cap, top_k, num_experts)
        self.token_cap = token_cap

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        scores = keys = softmax(logits)
        if self.token_cap is not None:
            keys = capped_plan(scores, self.top_k, self.token_cap, context)
        experts = chosen_by_experts(keys, self.top_k, context).experts
        weights = scores.masked_fill(experts < 0, 0.0)
        return self.routed(self.built(experts, weights, logits), context, plan=None)


class _Orthogonal(Linear):
    """A map whose initial weights are 0.1 times an orthonormal matrix."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # its draws move the generator, so a seed's modules need them
        if not self.weight.is_meta:
            nn.init.orthogonal_(self.weight, gain=0.1)


@register("base", row="R4", source="arXiv:2103.16716", verified="code", invariance="B*")
class Base(LinearRouter):
    """BASE layer: in training a balanced assignment, in evaluation the best expert.

    `s = x W`; training maximises `sum_t s_{t, a(t)}` with `T / E` tokens per expert by
    `assign_balanced`, evaluation takes the largest. `alpha = sigmoid(s_a)`,
    `y = alpha E_a(x) + (1 - alpha) x`. The paper's expert contains a residual connection; where
    the expert is a plain network and the residual connection is around the layer, pass
    `keep_input=False` for `y = alpha E_a(x)`, which is then the same function.

    The auction's total is within `T * eps` of the optimum; the authors' code gives up on that
    after 100 rounds. They also shuffle tokens over workers first, which is the caller's.

    Args:
        hidden_size: `H`.
        num_experts: `E`; divides the number of tokens in training.
        top_k: 1.
        assignment: `auction` or `exact`, see `assign_balanced`.
        keep_input: add `(1 - alpha) x`.
        common: see `Common`.
    """

    score_class = _Orthogonal

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        assignment: str = "auction",
        keep_input: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.check_int("top_k", top_k, 1, 1)
        self.assignment = self.check_choice("assignment", assignment, METHODS)
        self.keep_input = self.check_flag("keep_input", keep_input)

    def route(self, x: Tensor, context: Context) -> Routed:
        scores = self.score(x)
        if not self.training:
            experts = gate(scores, 1, score="identity").experts
        else:
            if x.shape[0] % self.num_experts != 0:
                rule = f"have a multiple of {self.num_experts} tokens in training"
                self.fail("x", rule, x.shape[0])
            experts = assign_balanced(scores, method=self.assignment)[:, None]
        alpha = sigmoid(scores.gather(1, experts.long().clamp(min=0)))
        routing = self.built(experts, alpha, scores)
        residual = 1 - alpha[:, 0] if self.keep_input else None
        return self.routed(routing, context, residual=residual)


@register("s_base", row="R5", source="arXiv:2202.01169", verified="mem", invariance="B*")
class SBase(LinearRouter):
    """S-BASE: in training the largest entries of a Sinkhorn plan choose, the softmax weighs.

    `P = transport(z, "sinkhorn")`, experts by `P`, `w = softmax(z)` of them, as it is. Evaluation
    chooses by `z`. The number of iterations is fixed: a loop until convergence, as in Megatron,
    waits for the device every time.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        iters: iterations of the plan.
        temperature: of the plan.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        iters: int = 20,
        temperature: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.iters = self.check_int("iters", iters, 1)
        self.temperature = self.check_number("temperature", temperature, above=0)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        if not self.training:
            return self.routed(gate(logits, self.top_k), context)
        plan = balanced(
            logits.detach(), "sinkhorn", context, iters=self.iters, temperature=self.temperature
        )
        experts = gate(plan, self.top_k, score="identity").experts
        weights = softmax(logits).gather(1, experts.long().clamp(min=0))
        return self.routed(self.built(experts, weights, logits), context)


@register(
    "stable_moe", row="R6", source="arXiv:2204.08396", verified="code", invariance="C",
    needs=("token_ids",),
)  # fmt: skip
class StableMoE(LinearRouter):
    """StableMoE: learn to route, distil the routes into token ids, then freeze them.

    Stage 1: `s = x W`, `a = argmax s`, `alpha = sigmoid(s_a)`, `y = alpha E_a(x) + (1 - alpha) x`;
    losses `balance` = `aux_coef * sum_e ((n_e - n) / n) sum of alpha` and `distil` =
    `distil_coef *` cross entropy of a router on word embeddings against `a`. Stage 2, after
    `freeze()`: `a` is that router's, a function of the vocabulary id alone, and `alpha` still
    comes from `x`.

    Defaults: distillation with dimension 50 and coefficient 0.3, `aux_coef` 0.01 (the authors' is
    not known here), capacity factor 2. The paper freezes after 6,000 updates.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: 1.
        vocab_size: `V`.
        distil_size: dimension of the word embeddings.
        distil_coef: coefficient of `distil`.
        keep_input: add `(1 - alpha) x`, see `Base`.
        common: see `Common`.
    """

    is_frozen: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        vocab_size: int,
        distil_size: int = 50,
        distil_coef: float = 0.3,
        keep_input: bool = True,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, capacity_factor=2.0, aux_coef=0.01)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.check_int("top_k", top_k, 1, 1)
        vocab_size = self.check_int("vocab_size", vocab_size, 1)
        distil_size = self.check_int("distil_size", distil_size, 1)
        self.distil_coef = self.check_number("distil_coef", distil_coef)
        self.keep_input = self.check_flag("keep_input", keep_input)
        self.words = nn.Embedding(vocab_size, distil_size)
        self.word_score = Linear(distil_size, num_experts)
        self.register_buffer("is_frozen", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to stage 1, in which the word embeddings learn."""
        self._set_frozen(False)

    def freeze(self) -> None:
        """Begins stage 2: routes are those of the word embeddings, which no longer learn."""
        self._set_frozen(True)

    def _set_frozen(self, is_frozen: bool) -> None:
        self.is_frozen.fill_(is_frozen)
        self.words.requires_grad_(not is_frozen)
        self.word_score.requires_grad_(not is_frozen)

    def route(self, x: Tensor, context: Context) -> Routed:
        assert context.token_ids is not None
        scores = self.score(x)
        self.check_ids("token_ids", context.token_ids, self.words.num_embeddings)
        by_word = self.word_score(self.words(context.token_ids.long()))
        deciding = torch.where(self.is_frozen, by_word.to(scores.dtype), scores)
        experts = gate(deciding.detach(), 1, score="identity").experts
        alpha = sigmoid(scores.gather(1, experts.long().clamp(min=0)))
        routing = self.built(experts, alpha, scores)
        found = {}
        if self.training:
            found["balance"] = self.aux_coef * losses.assigned_balance(routing)
            distil = losses.imitation(by_word, experts)
            found["distil"] = self.distil_coef * torch.where(self.is_frozen, 0.0, distil)
        residual = 1 - alpha[:, 0] if self.keep_input else None
        return self.routed(routing, context, losses=found, residual=residual)


@register("v_moe", row="R9", source="arXiv:2401.15969", verified="code", invariance="C")
class VMoE(LinearRouter):
    """V-MoE: noisy softmax top-k of vision models, with importance and load losses.

    Training adds normal noise of deviation `1 / E` to the logits; `w = softmax` of the chosen (with
    the noise), as it is. Loss `aux_coef * (importance + load) / 2`, squared coefficients of
    variation of the sums of the noiseless softmax and of the chances to be chosen
    (arXiv:2106.05974). Capacity is a multiple of 4. Of the six routers of the comparison, the
    others are `expert_choice`, `s_base`, `sparse_ot` and `soft_moe`.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`; `aux_coef` is that of both losses.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        common = with_defaults(common, capacity_factor=1.05, aux_coef=0.01, rounding="four")
        super().__init__(hidden_size, num_experts, top_k, **common)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        if not self.training:
            return self.routed(gate(logits, self.top_k), context)
        deviation = 1 / self.num_experts
        noisy = logits + torch.randn_like(logits) * deviation
        routing = gate(noisy, self.top_k, stats=self.stats)
        load = losses.smooth_load(logits, noisy, deviation, self.top_k)
        importance = losses.cv_squared(softmax(logits).sum(0))
        both = (importance + load) / 2 if x.shape[0] > 0 else load * 0
        return self.routed(routing, context, losses={"balance": self.aux_coef * both})


@register(
    "pmoe", row="R10", source="arXiv:2306.04073", verified="code", invariance="S", decode="leak"
)
class PMoE(LinearRouter):
    """pMoE: in every sample, each expert takes the few patches it scores highest.

    `g = softmax over the patches of a sample (x w_e)`; each expert takes `patches` of them, with
    weight `g`. The sum of `g` over all patches of a sample is 1.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: not looked at.
        patches: `l`, patches per expert and sample.
        common: see `Common`; the capacity factors are not looked at.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        patches: int = 2,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.patches = self.check_int("patches", patches, 1)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        ids, number = context.sequences(x)
        scores = segment_softmax(logits, ids, number)
        routing = expert_choice(scores, self.patches, scope_ids=ids.int(), num_scopes=number)
        return self.routed(self.built(routing.experts, routing.weights, logits), context, plan=None)


@register(
    "rectify", row="R14", source="arXiv:2402.12399", verified="2nd", invariance="B", decode="leak"
)
class Rectify(LinearRouter):
    """Rectify-Router: dropped tokens stay on their device, free room takes runners-up.

    Softmax top-k under a capacity. Tokens that find it full go to the best expert of their own
    rank that has room (intra-device rectification), and room that is left goes to the tokens with
    the largest probability among those not chosen (fill-in rectification). Weights are the
    probabilities as they are (from memory, unverified).

    Tokens lie on ranks in equal shares, in order; with scopes, scope `i` lies on rank
    `i mod num_ranks` and capacity is `scope_capacity`, so that requests do not depend on others.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        num_ranks: devices, `E / num_ranks` neighbouring experts on each; divides `E`.
        fill: do the fill-in step.
        scope_capacity: capacity per expert and scope.
        common: see `Common`.
    """

    rank_of_expert: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_ranks: int = 2,
        fill: bool = True,
        scope_capacity: int = 8,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, capacity_factor=1.0, eval_capacity_factor=1.0)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.num_ranks = self.check_int("num_ranks", num_ranks, 1, num_experts)
        self.scope_capacity = self.check_int("scope_capacity", scope_capacity, 1)
        self.fill = self.check_flag("fill", fill)
        self.register_buffer("rank_of_expert", torch.empty(num_experts, dtype=torch.int32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives each rank its share of neighbouring experts; nothing is drawn."""
        ranks = [e * self.num_ranks // self.num_experts for e in range(self.num_experts)]
        self.rank_of_expert.copy_(torch.tensor(ranks))

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        candidates = gate(logits, self.num_experts, stats=self.stats)
        num_tokens = x.shape[0]
        if context.scope_ids is not None:
            capacity = self.scope_capacity
            rank_of_token = context.scope_ids % self.num_ranks
        else:
            factor = 1.0 if self.factor is None else self.factor
            capacity = expert_capacity(num_tokens, self.num_experts, self.top_k, factor)
            place = torch.arange(num_tokens, dtype=torch.int32, device=x.device)
            rank_of_token = place * self.num_ranks // max(num_tokens, 1)
        routing = reroute(
            candidates,
            self.num_experts,
            self.top_k,
            capacity,
            overflow="local",
            fill="any" if self.fill else None,
            scope_ids=context.scope_ids,
            num_scopes=context.num_scopes,
            rank_of_expert=self.rank_of_expert,
            rank_of_token=rank_of_token.int(),
        )
        return self.routed(routing, context, plan=None)


@register(
    "uoe", row="R24", source="arXiv:2503.02495", verified="code", invariance="B", decode="leak"
)
class UoE(LinearRouter):
    """Union of experts: top-k scores normalised over the batch, then experts choose.

    `g = softmax(z)` of the `top_k` best, 0 elsewhere; `g' = C g / (sum of g over the batch + eps)`
    with `C = T * top_k / E`; each expert keeps its `C` best tokens, weight `g'`. The sum over the
    batch makes a token's weight depend on the others: the defect is the authors' own, and with
    scopes the batch is the scope. Experts are meant to be slices of one dense block, whose sum
    with all weights 1 is that block. The authors' second variant sends whole sequences to experts,
    by a linear map of the flattened sequence; `milora` does so from its mean.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        eps: keeps the sum positive.
        common: see `Common`; the capacity factors are not looked at.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        eps: float = 1e-6,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.eps = self.check_number("eps", eps, above=0)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        chosen = gate(logits, self.top_k)
        columns = chosen.experts.long().clamp(min=0)
        g = torch.zeros_like(logits).scatter(1, columns, chosen.weights)
        ids, number = context.scopes(x)
        share = segment_sizes(ids, number).to(g.dtype) * (self.top_k / self.num_experts)
        total = segment_sum(g, ids, number) + self.eps
        scaled = g * (share[:, None] / total)[ids]
        taken = chosen_by_experts(scaled, self.top_k, context)
        experts = torch.where(taken.weights > 0, taken.experts, -1)
        return self.routed(self.built(experts, taken.weights, logits), context, plan=None)
