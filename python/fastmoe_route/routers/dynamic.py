"""Token choice with a number of experts that depends on the token."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._arguments import check_choice, check_int
from fastmoe_route._segments import segment_mean
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.results import Routing
from fastmoe_route.routers.base import Common, Context, Routed, with_defaults
from fastmoe_route.routers.linear import LinearRouter

SCHEDULES = ("uniform", "descending", "ascending", "pyramid", "inverse_pyramid", "wave")


@register("dynamic_top_p", row="R36", source="arXiv:2403.07652", verified="code")
class DynamicTopP(LinearRouter):
    """Dynamic MoE: as many experts as it takes for their probabilities to exceed `top_p`.

    Experts by falling `p = softmax(z)`, up to and including the first whose cumulative sum is
    above `top_p` (strictly); `w = p`, not renormalised, as in the authors' code. Losses in
    training: `entropy_coef * H(p)`, which makes tokens content with fewer, and load balancing.

    Defaults: `top_p` 0.4, at most all experts; the coefficients 1e-4 and 1e-2 are from memory.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: the most experts of a token; None for all.
        top_p: the probability to exceed; 1 takes all.
        entropy_coef: coefficient of the loss `entropy`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        top_p: float = 0.4,
        entropy_coef: float = 1e-4,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, aux_coef=0.01)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.top_p = self.check_number("top_p", top_p, 0)
        self.entropy_coef = self.check_number("entropy_coef", entropy_coef)

    def route(self, x: Tensor, context: Context) -> Routed:
        train = self.training and self.entropy_coef != 0
        routing = gate(
            self.score(x), self.top_k, top_p=self.top_p, stats=self.stats, keep_scores=train
        )
        found = {"entropy": self.entropy_coef * losses.entropy(routing)} if train else {}
        return self.routed(routing, context, losses=found)


@register("adamoe", row="R37", source="arXiv:2406.13233", verified="code")
class AdaMoE(LinearRouter):
    """AdaMoE: `num_null` null experts compete with the real ones; choosing them costs nothing.

    `top_k` of `softmax` over `E + num_null` columns; weights are renormalised over the chosen real
    experts (all 0 if there are none), so the mean number of real experts is `K E / (E + m)` for
    logits without preference. The loss `null_balance` averages the null columns' load
    (`losses.null_balancing`; the released code slices the wrong dimension there and averages
    nothing). Without null experts this is `topk_softmax`.

    Defaults: 3 slots, as many null as real experts, coefficient 0.01 (from memory).

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: slots, real and null.
        num_null: null experts; None for `E`.
        null_coef: coefficient of the loss `null_balance`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 3,
        *,
        num_null: int | None = None,
        null_coef: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        num_null = num_experts if num_null is None else num_null
        self.num_null = self.check_int("num_null", num_null, 0)
        columns = num_experts + self.num_null
        super().__init__(hidden_size, num_experts, top_k, columns, **common)
        self.null_coef = self.check_number("null_coef", null_coef)

    def route(self, x: Tensor, context: Context) -> Routed:
        train = self.training and self.null_coef != 0
        routing = gate(
            self.score(x),
            self.top_k,
            num_null=self.num_null,
            normalize=True,
            stats=train or self.stats,
        )
        found = {}
        if train and self.num_null:
            found["null_balance"] = self.null_coef * losses.null_balancing(routing, self.num_null)
        elif train:
            found["null_balance"] = self.null_coef * losses.load_balancing(routing)
        return self.routed(routing, context, losses=found)


@register(
    "da_moe",
    row="R38",
    source="arXiv:2409.06669",
    verified="mem",
    invariance="S",
    decode="leak",
    needs=("attention_mass",),
)
class DaMoE(LinearRouter):
    """DA-MoE: tokens that receive more attention take more experts.

    `k_t = clamp(round(top_k * I_t / mean of I over the sequence), 1, E)` with the importance `I_t`
    = `attention_mass`, the column mass of the attention matrix averaged over heads. Equal attention
    gives every token `top_k`. The map from importance to `k_t` is from memory. With bidirectional
    attention the mass knows later tokens, so decoding cannot reproduce it. A capacity counts
    `top_k` slots per token as the even share, the mean, and not the `E` that a token may take.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts of a token of mean importance.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **with_defaults(common, aux_coef=0.01))

    def route(self, x: Tensor, context: Context) -> Routed:
        assert context.attention_mass is not None
        ids, num = context.sequences(x)
        mass = context.attention_mass.double()
        share = mass / segment_mean(mass, ids, num)[ids].clamp(min=1e-300)
        k = (self.top_k * share).round().clamp(1, self.num_experts).to(torch.int32)
        routing = gate(
            self.score(x), self.num_experts, k_per_token=k, normalize=True, stats=self.stats
        )
        return self.routed(routing, context, extra={"k": k})

    def even_slots(self, routing: Routing) -> int:
        """The mean, where others have as many for each token."""
        return self.top_k


@register("dynamoe", row="R39", source="arXiv:2603.01697", verified="2nd")
class DynaMoE(LinearRouter):
    """DynaMoE: the experts whose score reaches a percentile of the token's own scores.

    Experts with `z_e >= percentile(z, tau)`, at least one, weighed by a softmax over them. The
    percentile is the `ceil((1 - tau) E)`-th largest logit, so that many are active where logits
    differ, more where they tie. The formula is from memory: unverified. How many experts a layer
    has is `expert_schedule`'s business.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: the most experts of a token; None for all.
        tau: the percentile, in [0, 1].
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        tau: float = 0.75,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, aux_coef=0.01)
        super().__init__(hidden_size, num_experts, top_k, **common)
        tau = self.check_number("tau", tau, 0, 1)
        # The guard keeps ceil from counting a rounding error of (1 - tau) * E as one more expert.
        self.num_active = max(1, math.ceil((1 - tau) * num_experts - 1e-9))

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        floor = z.detach().topk(self.num_active, dim=1).values[:, -1:]
        routing = gate(z, self.top_k, mask=z.detach() >= floor, normalize=True, stats=self.stats)
        return self.routed(routing, context)


def expert_schedule(shape: str, num_layers: int, total: int) -> list[int]:
    """How many experts each layer gets: DynaMoE's six schedules (arXiv:2603.01697).

    Args:
        shape: `uniform`, `descending`, `ascending`, `pyramid` (most in the middle),
            `inverse_pyramid` or `wave` (one period of a sine).
        num_layers: at least 1.
        total: experts of all layers together, at least one per layer.

    Returns:
        One number per layer, summing to `total`: one for each, the rest in proportion to the shape
        (largest remainders, ties to the lower layer).

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    >>> expert_schedule("descending", 4, 20)
    [7, 6, 4, 3]
    """
    check_choice("expert_schedule", "shape", shape, SCHEDULES)
    num_layers = check_int("expert_schedule", "num_layers", num_layers, 1)
    total = check_int("expert_schedule", "total", total, num_layers)
    n = num_layers
    middle = [min(layer + 1, n - layer) for layer in range(n)]
    share = {
        "uniform": [1.0] * n,
        "descending": [float(n - layer) for layer in range(n)],
        "ascending": [layer + 1.0 for layer in range(n)],
        "pyramid": [float(m) for m in middle],
        "inverse_pyramid": [float(max(middle) + 1 - m) for m in middle],
        "wave": [1.5 + math.sin(2 * math.pi * layer / n) for layer in range(n)],
    }[shape]
    exact = [(total - n) * s / sum(share) for s in share]
    counts = [1 + int(e) for e in exact]
    by_remainder = sorted(range(n), key=lambda layer: (int(exact[layer]) - exact[layer], layer))
    for layer in by_remainder[: total - sum(counts)]:
        counts[layer] += 1
    return counts


@register("dynmole", row="R60", source="arXiv:2504.00661", verified="2nd")
class DynMoLE(LinearRouter):
    """DynMoLE: all experts for tokens of high entropy, few for the others.

    With the Tsallis entropy `H_q` of `p = softmax(z)`: above `h_max` times its largest value the
    token takes every expert with weight `p`; else experts by falling `p` until their sum exceeds
    `top_p`, at least `min_k`, renormalised. Losses: load balancing and `entropy_coef * mean H_q`.
    That `h_max` is relative to the uniform distribution is our reading.

    Defaults: `q` 1.1, `h_max` 0.9, `top_p` 0.75, `min_k` 2, coefficients 1e-3 and 1e-2.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: the most experts of a token; None for all.
        q: entropic index.
        h_max: where all experts are taken, as a share of the largest entropy.
        top_p: the probability to exceed below it.
        min_k: the fewest experts.
        entropy_coef: coefficient of the loss `entropy`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        q: float = 1.1,
        h_max: float = 0.9,
        top_p: float = 0.75,
        min_k: int = 2,
        entropy_coef: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, aux_coef=1e-3)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.q = self.check_number("q", q, above=0)
        self.top_p = self.check_number("top_p", top_p, 0)
        self.entropy_coef = self.check_number("entropy_coef", entropy_coef)
        self.min_k = min(self.check_int("min_k", min_k, 0), self.top_k)
        uniform = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64, device="cpu")
        h_max = self.check_number("h_max", h_max, 0)
        self.h_max = h_max * float(losses.tsallis_entropy(uniform, q))

    def route(self, x: Tensor, context: Context) -> Routed:
        z = self.score(x)
        entropy = losses.tsallis_entropy(z.softmax(1), self.q)
        top_p = torch.where(entropy.detach() > self.h_max, torch.inf, self.top_p).float()
        routing = gate(
            z, self.top_k, top_p=top_p, min_k=self.min_k, normalize=True, stats=self.stats
        )
        found = {}
        if self.training and self.entropy_coef != 0:
            found["entropy"] = self.entropy_coef * entropy.sum() / max(x.shape[0], 1)
        return self.routed(routing, context, losses=found, extra={"entropy": entropy})
