"""Token choice: every token takes its best experts by one linear score, or by chance."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route import overflow
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, with_defaults
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.scores import wide


@register("switch", row="R1", source="arXiv:2101.03961", verified="code", invariance="C")
class Switch(LinearRouter):
    """Switch Transformer: softmax over all experts, the best one, its weight not renormalised.

    `z = (x * xi) W` with `xi ~ U(1 - jitter, 1 + jitter)` in training, `w = softmax(z)[e*]`.
    Loss `aux_coef * E * sum_e f_e P_e`. A token over capacity gets nothing, so that only the
    residual connection around the layer carries it.

    Defaults: one expert, capacity factor 1.25 in training and none in evaluation (the paper has 1
    to 2), `aux_coef` 0.01.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        jitter: half the width of the multiplicative noise on the input, in training.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        jitter: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, capacity_factor=1.25, aux_coef=0.01)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.jitter = self.check_number("jitter", jitter, 0)

    def route(self, x: Tensor, context: Context) -> Routed:
        if self.training and self.jitter > 0:
            x = wide(x)  # a factor of 1.01 in bfloat16 would be one of three numbers
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.routed(gate(self.score(x), self.top_k, stats=self.stats), context)


@register("open_moe", row="R15", source="arXiv:2402.01739", verified="code", invariance="C")
class OpenMoE(LinearRouter):
    """OpenMoE: softmax top-2 under a capacity that drops the end of the batch first.

    `w = softmax(z)` of the chosen, as it is. Losses `balance` and `z`. Slots are kept in order of
    position, first choices first, so the drop rate rises towards the end of a sequence: the
    paper's own finding about this rule. Evaluation drops with another factor, so decoding sees
    other drop statistics than training.

    Defaults: two experts, capacity factor 1.25 in training and 2 in evaluation, at least 4 slots,
    `aux_coef` 0.01, `z_coef` 1e-4.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        common = with_defaults(
            common,
            capacity_factor=1.25,
            eval_capacity_factor=2.0,
            min_capacity=4,
            aux_coef=0.01,
            z_coef=1e-4,
        )
        super().__init__(hidden_size, num_experts, top_k, **common)

    def route(self, x: Tensor, context: Context) -> Routed:
        return self.routed(gate(self.score(x), self.top_k, stats=self.stats), context)


@register("tutel", row="R8", source="arXiv:2206.03382", verified="code", invariance="C")
class Tutel(LinearRouter):
    """Tutel: softmax top-k renormalised, capacity in whole slots per choice, priority by score.

    `w_i = p_i / (sum of the chosen p)`; `capacity = K * floor(factor * ceil(T / E))`; slots of the
    k-th choice come after all of the (k - 1)-th. With `batch_prioritized`, tokens with a larger
    best probability come first (arXiv:2106.05974), which makes the result depend on later tokens.
    A capacity factor of None is Tutel's 0: nothing is dropped. Tutel's negative factors only spare
    it padding, which this library never computes. `is_postscore=False` there, weights before the
    experts, is `weights_on="input"` of `moe_mlp`; the two agree for linear experts only.

    Defaults: two experts, capacity factor 1, no noise.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        gate_noise: standard deviation of the noise on logits in training, over `E`.
        batch_prioritized: keep slots by score instead of position.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        gate_noise: float = 0.0,
        batch_prioritized: bool = False,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, capacity_factor=1.0, rounding="per_choice")
        if self.check_flag("batch_prioritized", batch_prioritized):
            common = {**common, "drop_policy": "score"}
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.gate_noise = self.check_number("gate_noise", gate_noise, 0)

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x)
        if self.training and self.gate_noise > 0:
            logits = logits + torch.randn_like(logits) * (self.gate_noise / self.num_experts)
        if self.drop_policy != "score":
            routing = gate(logits, self.top_k, normalize=True, stats=self.stats)
            return self.routed(routing, context)
        routing = gate(logits, self.top_k, stats=self.stats)
        ranked = routing._replace(weights=overflow.batch_priority(routing.weights))
        total = routing.weights.sum(1, keepdim=True).clamp(min=1e-20)
        routing = routing._replace(weights=routing.weights / total)
        return self.routed(routing, context, plan=self.plan(ranked, context))


@register("topk_softmax", row="R21", source="arXiv:1701.06538", verified="mem")
class TopkSoftmax(LinearRouter):
    """Softmax over the largest logits: the plain modern router, as in Mixtral and Qwen.

    `w_i = exp(z_i) / sum_{j in TopK} exp(z_j)`: masking the others before the softmax,
    renormalising after it, and softmax over the chosen are the same. Ties go to the lower expert.
    The identity is algebra, whatever the paper says.

    Defaults: two experts, `aux_coef` 0.01.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **with_defaults(common, aux_coef=0.01))

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(self.score(x), self.top_k, normalize=True, stats=self.stats)
        return self.routed(routing, context)


@register("smoe_dropout", row="R16", source="arXiv:2303.01610", verified="code")
class SMoEDropout(LinearRouter):
    """SMoE-Dropout: a random router that never learns, with more experts as training goes on.

    `W` is drawn once and frozen; `w` is the softmax over the chosen, a constant. `set_progress`
    raises the number of experts linearly from `top_k` to `E`; evaluation may set any `top_k`
    (self-slimmable).

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token at the start of training; the paper starts at 1 or 2.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.start_k = top_k
        self.score.requires_grad_(False)

    def set_progress(self, progress: float) -> int:
        """Sets `top_k` for a share of training done, in [0, 1], and returns it."""
        self.check_number("progress", progress, 0, 1)
        self.top_k = self.start_k + int(progress * (self.num_experts - self.start_k))
        return self.top_k

    def route(self, x: Tensor, context: Context) -> Routed:
        logits = self.score(x.detach())
        return self.routed(gate(logits, self.top_k, normalize=True, stats=self.stats), context)


@register("mask_moe", row="R31", source="arXiv:2407.09816", verified="2nd", needs=("token_ids",))
class MaskMoE(LinearRouter):
    """MaskMoE: every vocabulary id sees a fixed random set of experts, a rare id only one.

    `p = softmax(z + m[id])` with `m` 0 for the visible experts and `-inf` for the others; the best
    of them with weight `p`, so a rare id always goes to its one expert with weight 1. The table is
    drawn from `table_seed` and saved with the router.

    Defaults: frequent ids see 8 experts (from memory), `aux_coef` 0.01.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token.
        vocab_size: `V`, the number of ids.
        num_frequent: ids below this are frequent.
        visible: experts that a frequent id sees, at most `E`.
        table_seed: draws the table.
        common: see `Common`.
    """

    visible: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        vocab_size: int,
        num_frequent: int = 0,
        visible: int = 8,
        table_seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **with_defaults(common, aux_coef=0.01))
        vocab_size = self.check_int("vocab_size", vocab_size, 1)
        self.num_frequent = self.check_int("num_frequent", num_frequent, 0, vocab_size)
        self.num_visible = self.check_int("visible", visible, 1)
        self.table_seed = self.check_int("table_seed", table_seed, -(2**63), 2**63 - 1)
        self.register_buffer("visible", torch.empty(vocab_size, num_experts, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table from `table_seed` again."""
        if self.visible.is_meta:
            return
        generator = torch.Generator().manual_seed(self.table_seed)
        draws = torch.rand(self.visible.shape, generator=generator, device="cpu")
        place = draws.argsort(1).argsort(1)
        self.visible.copy_(place < 1)
        self.visible[: self.num_frequent].copy_(place[: self.num_frequent] < self.num_visible)

    def route(self, x: Tensor, context: Context) -> Routed:
        assert context.token_ids is not None
        self.check_ids("token_ids", context.token_ids, self.visible.shape[0])
        hidden = ~self.visible[context.token_ids.long()]
        logits = self.score(x).masked_fill(hidden, -torch.inf)
        return self.routed(gate(logits, self.top_k, stats=self.stats), context)


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
        self.check_state(z, x.shape[0], self.num_experts)
        routing = gate(z, self.top_k, normalize=True, stats=self.stats)
        return self.routed(routing, context, state=z)
