"""Routers that look at what experts answer, or route a token twice."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._arguments import arithmetic_dtype, fail
from fastmoe_route.adapters import LoraExperts
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.results import Routing
from fastmoe_route.routers.base import Common, Context, Routed
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.random import normal
from fastmoe_route.routers.rare import rare
from fastmoe_route.routers.scores import Linear, wide


def _loud_outputs(outputs: Tensor) -> Tensor:
    """`mean over features of softplus`, `[T, E, H] -> [T, E]`."""
    return F.softplus(outputs).mean(2)


def _loud_norms(outputs: Tensor) -> Tensor:
    """`softplus` of the norm."""
    return F.softplus(outputs.norm(dim=2))


_LOUDNESS = {"mean": _loud_outputs, "norm": _loud_norms}


def _responses(x: Tensor, experts: Any, loudness: str, top_k: int) -> list[Tensor]:
    """How loud every expert answers `[T, E]`, and what the loudest answer `[T, K, H]`."""
    outputs = wide(experts.each(x))
    response = _LOUDNESS[loudness](outputs)
    loudest = gate(response, top_k, score="identity", normalize=True).experts.long()
    return [response, outputs.gather(1, loudest[:, :, None].expand(-1, -1, outputs.shape[2]))]


def _responses_of_parts(x: Tensor, *given: Any) -> list[Tensor]:
    """The same, of experts in parts; without an activation, those of `LoraExperts`."""
    w_up, w_down, bias_up, bias_down, activation, scaling, loudness, top_k = given
    if activation == "":
        return _responses(x, LoraExperts(w_up, w_down, scaling), loudness, top_k)
    experts = Experts(w_up, w_down, activation, bias_up, bias_down)
    return _responses(x, experts, loudness, top_k)


def _blank_responses(x: Tensor, w_up: Tensor, w_down: Tensor, *others: Any) -> list[Tensor]:
    dtype, num_tokens = arithmetic_dtype(x), x.shape[0]
    shapes = (w_up.shape[0],), (others[-1], w_down.shape[2])
    return [x.new_ones((num_tokens, *shape), dtype=dtype) for shape in shapes]


_rare_responses = rare(
    "competition",
    "Tensor x, Tensor w_up, Tensor w_down, Tensor? bias_up, Tensor? bias_down, str activation, "
    "float scaling, str loudness, int top_k",
    _responses_of_parts,
    _blank_responses,
)


class Competition(LinearRouter):
    """Base of the two CompeteSMoE routers; a subclass says by `loudness` how loud an answer is.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        rate: probability that a training call is a competition; 1 always, 0 never.
        match_coef: coefficient of the loss `match`.
        diversity_coef: coefficient of the loss `diversity`.
        entropy_coef: coefficient of the loss `usage`.
        common: see `Common`.
    """

    loudness: ClassVar[str]

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        rate: float = 0.05,
        match_coef: float = 1.0,
        diversity_coef: float = 0.01,
        entropy_coef: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.rate = self.check_number("rate", rate, 0, 1)
        self.coefs = (
            self.check_number("match_coef", match_coef),
            self.check_number("diversity_coef", diversity_coef),
            self.check_number("entropy_coef", entropy_coef),
        )

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        usual = gate(z, self.top_k, normalize=True, stats=self.stats)
        if not self.training or self.rate == 0:
            return self.routed(usual, context)
        competes, is_compiling = torch.rand(()) < self.rate, torch.compiler.is_compiling()
        if not is_compiling and not competes:
            return self.routed(usual, context)
        if context.experts is None:
            self.fail("experts", "be given in a competition", None)
        if is_compiling:
            parts = self._parts_of(context.experts)
            response, outputs = _rare_responses(competes, x, *parts, self.loudness, self.top_k)
        else:
            response, outputs = _responses(x, context.experts, self.loudness, self.top_k)
        loudest = gate(response, self.top_k, score="identity", normalize=True)
        p = z.softmax(1)
        match, diversity, entropy = self.coefs
        found = {
            "match": match * losses.response_matching(p, response.softmax(1)),
            "diversity": diversity * losses.diversity(outputs),
            "usage": -entropy * losses.usage_entropy(p),
        }
        if is_compiling:
            found = {name: torch.where(competes, loss, 0.0) for name, loss in found.items()}
            response = torch.where(competes, response, 0.0)
        routing = self.built(
            torch.where(competes, loudest.experts, usual.experts),
            torch.where(competes, loudest.weights, usual.weights),
            z,
        )
        return self.routed(routing, context, losses=found, extra={"response": response})

    def _parts_of(self, experts: Any) -> tuple[Any, ...]:
        """What `_responses_of_parts` takes in the place of experts."""
        if type(experts) is LoraExperts:
            return experts.lora_a, experts.lora_b, None, None, "", experts.scaling
        if type(experts) is not Experts:
            rule = "be Experts or LoraExperts in a compiled graph"
            fail(TypeError, self.name, "experts", rule, type(experts).__name__)
        w_up, w_down, activation, bias_up, bias_down = experts
        return w_up, w_down, bias_up, bias_down, activation, 1.0


@register("compete_smoe_v2", row="R51", source="arXiv:2505.13380", verified="code")
class CompeteSMoEv2(Competition):
    """CompeteSMoE v2: in some steps all experts run, and the loudest win.

    Loudness `a_e = mean over features of softplus(E_e(x))`; the `top_k` loudest, weighed by
    `a / sum of chosen a`. The router learns to foresee it: losses `match`
    (`mean (softmax(z) - softmax(a))^2`, `a` constant), `diversity` (cosine between the winners'
    outputs) and `usage` (negative entropy of the mean `softmax(z)`). All other steps and evaluation
    are `topk_softmax`. A competition needs `experts` and costs `E / K` times the work.

    The paper's schedule of competitions is a rate here, drawn on the host with torch's generator.
    A competition hands out `extra["response"]`, the loudness `[T, E]`. A compiled graph that trains
    holds both kinds of step, and needs `experts`; losses and response of the others are 0 there.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        options: those of `Competition`: `rate`, `match_coef`, `diversity_coef`, `entropy_coef`.
    """

    loudness = "mean"


@register("compete_smoe_v1", row="R52", source="arXiv:2402.02526", verified="mem")
class CompeteSMoEv1(Competition):
    """CompeteSMoE v1: as `compete_smoe_v2`, but the loudness is that of the output's norm.

    `a_e = softplus(|E_e(x)|)`: an expert whose output is scaled up wins more often.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        options: those of `Competition`: `rate`, `match_coef`, `diversity_coef`, `entropy_coef`.
    """

    loudness = "norm"


@register("s2moe", row="R54", source="arXiv:2503.23007", verified="mem")
class S2MoE(LinearRouter):
    """S2MoE: in training the token and a noisy copy are both routed, and their outputs fused.

    `x~ = x * N(1, sigma) + N(0, sigma)`; `y = g * moe(x) + (1 - g) * moe(x~)` with
    `g = sigmoid(w . x)`. Loss `uncertainty`: InfoNCE between the two outputs of each token, against
    those of the other tokens, when `experts` are given. `sigma = 0` and evaluation are
    `topk_softmax`.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        sigma: standard deviation of both noises.
        uncertainty_coef: coefficient of the loss.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        sigma: float = 0.1,
        uncertainty_coef: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.sigma = self.check_number("sigma", sigma, 0)
        self.uncertainty_coef = self.check_number("uncertainty_coef", uncertainty_coef)
        self.fuse = Linear(hidden_size, 1, bias=True)

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(self.score(x), self.top_k, normalize=True, stats=self.stats)
        if not self.training:
            return self.routed(routing, context)
        scale, shift = (normal(context, x, x.shape[1], s).to(x.dtype) for s in (0, 1))
        noisy = x * (1 + self.sigma * scale) + self.sigma * shift
        other = gate(self.score(noisy), self.top_k, normalize=True)
        extra = {"noisy": noisy, "experts": other.experts, "weights": other.weights}
        extra["fuse"] = self.fuse(x).sigmoid()
        found = {}
        if context.experts is not None and x.shape[0] > 0 and self.uncertainty_coef != 0:
            pair = (context.experts(x, routing), context.experts(noisy, other))
            one, two = (F.normalize(wide(y), dim=1) for y in pair)
            labels = torch.arange(x.shape[0], device=x.device)
            found["uncertainty"] = self.uncertainty_coef * F.cross_entropy(
                one @ two.T / 0.1, labels
            )
        return self.routed(routing, context, losses=found, extra=extra)

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        """The fused outputs of both branches in training, the clean one otherwise."""
        clean = experts(x, routed.routing, routed.plan)
        if routed.extra is None:
            return clean
        part = routed.extra
        noisy = experts(part["noisy"], (part["experts"], part["weights"]))
        return (part["fuse"] * clean + (1 - part["fuse"]) * noisy).to(clean.dtype)


@register("mixture_of_routers", row="R65", source="arXiv:2503.23362", verified="mem")
class MixtureOfRouters(LinearRouter):
    """Mixture of Routers: several routers, weighed by a main one.

    `z = sum over j of g_j z^(j)` with `g = softmax(x G)`, then softmax top-k, renormalised. One
    sub-router is `topk_softmax`. The paper may mix probabilities.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        num_routers: sub-routers.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_routers: int = 4,
        **common: Unpack[Common],
    ) -> None:
        num_routers = self.check_int("num_routers", num_routers, 1)
        super().__init__(hidden_size, num_experts, top_k, num_experts * num_routers, **common)
        self.main = Linear(hidden_size, num_routers)
        self.num_routers = num_routers

    def route(self, x: Tensor, context: Context) -> Routed:
        each = self.score(x).view(-1, self.num_routers, self.num_experts)
        z = (self.main(x).softmax(1)[:, :, None] * each).sum(1)
        return self.routed(gate(z, self.top_k, normalize=True, stats=self.stats), context)


@register("lora_mixer", row="R63", source="arXiv:2507.00029", verified="2nd")
class LoRAMixer(LinearRouter):
    """LoRA-Mixer: all experts in training, softly; the best three in evaluation.

    Training weighs every expert by `softmax(z)`; evaluation takes `top_k`, renormalised, so that
    `top_k = E` is the training forward. Losses: `aux_coef` times load balancing of the `top_k`
    choice and `-entropy_coef * mean H(p)`. A text that quotes the paper prints that sign, which
    *raises* the entropy, and says the opposite; pass a negative coefficient for peaked scores. The
    quoted penalty on the change of weights is the optimizer's business.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token in evaluation.
        entropy_coef: coefficient of the loss `entropy`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 3,
        *,
        entropy_coef: float = 1e-3,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.entropy_coef = self.check_number("entropy_coef", entropy_coef)

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        if not self.training:
            return self.routed(gate(z, self.top_k, normalize=True), context)
        routing = gate(z, self.num_experts, stats=True, keep_scores=True)
        found = {"entropy": -self.entropy_coef * losses.entropy(routing)}
        if self.aux_coef != 0:
            chosen: Routing = gate(z, self.top_k, stats=True)
            found["balance"] = self.aux_coef * losses.load_balancing(chosen)
        return self.routed(routing, context, losses=found)
