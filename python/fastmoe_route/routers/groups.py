"""Groups of experts: one per group, all of one group, a choice of two levels, locality of nodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._arguments import check_divides, check_int, check_number, check_shape
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed, Router, with_defaults
from fastmoe_route.routers.linear import LinearRouter
from fastmoe_route.routers.routings import assemble
from fastmoe_route.routers.scores import Linear, wide


@register("m6_t", row="R2", source="arXiv:2105.15082", verified="mem", invariance="C")
class M6T(LinearRouter):
    """M6-T expert prototyping: `K` groups of `E / K` experts, the best of each by its own softmax.

    `p^(k) = softmax over group k`, one expert per group, weights as they are: each is at most 1,
    so their sum may exceed 1. With one group it is Switch.

    Defaults: two groups, capacity factor 1.25, no auxiliary loss (the paper: balance is not what
    matters).

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: `K`, the number of groups and of experts per token; divides `E`.
        common: see `Common`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, **common: Unpack[Common]
    ) -> None:
        common = with_defaults(common, capacity_factor=1.25)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.check_divisor("top_k", top_k)

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(
            self.score(x),
            self.top_k,
            softmax_over="group",
            num_groups=self.top_k,
            max_per_group=1,
            stats=self.stats,
        )
        return self.routed(routing, context)


@register("sam", row="R11", source="arXiv:2110.07431", verified="mem", invariance="C")
class Sam(LinearRouter):
    """SAM: a switch over groups of experts, then a mixture inside the chosen group.

    `q = softmax(x W_group)`, the best group `g`; inside it the `top_k` best of
    `p = softmax over the group (x W)`; `w_i = p_i q_g`. All experts of a token lie on one device.

    Args:
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token, at most `E / num_groups`.
        num_groups: groups of neighbouring experts; divides `E`.
        common: see `Common`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_groups: int = 2,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, aux_coef=0.01)
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.num_groups = self.check_divisor("num_groups", num_groups)
        self.check_int("top_k", top_k, 1, num_experts // self.num_groups)
        self.group_score = Linear(hidden_size, self.num_groups)

    def route(self, x: Tensor, context: Context) -> Routed:
        group = gate(self.group_score(x), 1)
        group_of_expert = torch.arange(self.num_experts, device=x.device)
        group_of_expert = group_of_expert // (self.num_experts // self.num_groups)
        routing = gate(
            self.score(x),
            self.top_k,
            softmax_over="group",
            num_groups=self.num_groups,
            mask=group_of_expert == group.experts,
            stats=self.stats,
        )
        return self.routed(routing._replace(weights=routing.weights * group.weights), context)


@register("smile", row="R12", source="arXiv:2212.05191", verified="mem", invariance="C")
class Smile(Router):
    """SMILE: first the node, then the device in it, each by its own small softmax.

    `p = softmax(x W_node)`, `q = softmax(x W_device)`, the best of each; the expert is
    `node * devices + device`, `w = p q`. Losses `node_balance` and `device_balance`, Switch's loss
    on either level. With one node it is Switch.

    Args:
        hidden_size: `H`.
        num_experts: `E`, nodes times devices.
        top_k: 1.
        num_nodes: divides `E`.
        node_coef: coefficient of `node_balance`.
        device_coef: coefficient of `device_balance`.
        common: see `Common`; `node_coef` and `device_coef` take the place of `aux_coef`.
    """

    unused = ("aux_coef", "z_coef")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        num_nodes: int = 2,
        node_coef: float = 0.01,
        device_coef: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.check_int("top_k", top_k, 1, 1)
        num_nodes = self.check_divisor("num_nodes", num_nodes)
        self.node_coef = self.check_number("node_coef", node_coef)
        self.device_coef = self.check_number("device_coef", device_coef)
        self.node_score = Linear(hidden_size, num_nodes)
        self.device_score = Linear(hidden_size, num_experts // num_nodes)

    def route(self, x: Tensor, context: Context) -> Routed:
        node = gate(self.node_score(x), 1, stats=self.training)
        device = gate(self.device_score(x), 1, stats=self.training)
        num_devices = self.device_score.weight.shape[0]
        experts = node.experts * num_devices + device.experts
        routing = assemble(experts, node.weights * device.weights, self.num_experts)
        found = {}
        if self.training:
            found["node_balance"] = self.node_coef * losses.load_balancing(node)
            found["device_balance"] = self.device_coef * losses.load_balancing(device)
        extra = {"node": node.experts[:, 0], "device": device.experts[:, 0]}
        return self.routed(routing, context, losses=found, extra=extra)


@register("loc_moe", row="R13", source="arXiv:2401.13920", verified="mem", invariance="C")
class LocMoE(Router):
    """LocMoE: scores by grouped average pooling, and a loss that keeps tokens on their node.

    `z_e` is the mean of the `e`-th of `E` equal chunks of `x`: gate rows that are orthogonal and
    need no parameters. Softmax, the best one, its weight as it is. Losses `balance` and
    `locality`, the divergence of the nodes' load from `target`. The paper's least capacity follows
    from the angles between tokens and their gate rows: `least_capacity`, to be set as
    `min_capacity`.

    Defaults: one expert, capacity factor 1.25, coefficients 0.01 (the paper's are unknown).

    Args:
        hidden_size: `H`, a multiple of `E`.
        num_experts: `E`.
        top_k: experts per token.
        num_nodes: nodes of `E / num_nodes` neighbouring experts.
        target: the wanted share of each node, positive, sum 1; None for even ones.
        locality_coef: coefficient of `locality`.
        common: see `Common`.
    """

    node_of_expert: Tensor
    target: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        num_nodes: int = 2,
        target: list[float] | None = None,
        locality_coef: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        common = with_defaults(common, capacity_factor=1.25, aux_coef=0.01)
        super().__init__(hidden_size, num_experts, top_k, **common)
        check_divides(self.name, "num_experts", num_experts, hidden_size, "hidden size")
        num_nodes = self.check_divisor("num_nodes", num_nodes)
        self.locality_coef = self.check_number("locality_coef", locality_coef)
        even = [1 / num_nodes] * num_nodes
        self.shares = self.check_numbers(
            "target", even if target is None else target, num_nodes, above=0
        )
        self.register_buffer("node_of_expert", torch.empty(num_experts, dtype=torch.int64))
        self.register_buffer("target", torch.empty(num_nodes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the nodes of experts and their wanted shares; nothing is drawn."""
        size = self.num_experts // len(self.shares)
        self.node_of_expert.copy_(torch.tensor([e // size for e in range(self.num_experts)]))
        self.target.copy_(torch.tensor(self.shares))

    @property
    def stats(self) -> bool:
        """Statistics are for the loss of locality, too."""
        return self.training

    def logits(self, x: Tensor) -> Tensor:
        """The means of the chunks, `[T, E]`."""
        size = self.hidden_size // self.num_experts
        return wide(x).reshape(x.shape[0], self.num_experts, size).mean(2)

    def least_capacity(self, x: Tensor) -> int:
        """`angle_capacity` of the widest angle between a token of `x` `[T, H]` and its gate row.

        Waits for the device; at most the number of tokens.
        """
        check_shape(self.name, "x", x, (-1, self.hidden_size))
        if x.shape[0] == 0:
            return 1
        length = wide(x).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        size = self.hidden_size // self.num_experts
        cosine = float((self.logits(x).amax(1) * size**0.5 / length).min())
        least = angle_capacity(min(max(cosine, 0.0), 1.0), self.hidden_size, self.num_experts)
        return int(min(least, x.shape[0]))

    def route(self, x: Tensor, context: Context) -> Routed:
        routing = gate(self.logits(x), self.top_k, stats=self.stats)
        found = {}
        if self.training:
            distance = losses.locality(routing, self.node_of_expert, self.target)
            found["locality"] = self.locality_coef * distance
        return self.routed(routing, context, losses=found)


def angle_capacity(cosine: float, hidden_size: int, num_experts: int) -> float:
    """LocMoE's least capacity of an expert, from an angle between gate rows and tokens.

    `exp(H c^2 / (2 - c^2)) / E` with `c` the cosine: a direction that is uniform in `H` dimensions
    lies within the angle of a given one with a probability below `exp(-H c^2 / (2 - c^2))`, so that
    many tokens per expert are needed to expect one that does. It is above `exp(H c^2 / 2) / E`, the
    same for normal coordinates, and falls as the angle widens (arXiv:2401.13920; from memory:
    unverified).

    Args:
        cosine: of the widest angle between a gate row and the tokens assigned to it, in [0, 1].
        hidden_size: `H`.
        num_experts: `E`.

    Returns:
        Tokens, at least 1, rounded up; inf where a float cannot hold them.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    >>> angle_capacity(0.1, 512, 8), angle_capacity(0.05, 512, 8)
    (2.0, 1.0)
    """
    check_number("angle_capacity", "cosine", cosine, 0, 1)
    hidden_size = check_int("angle_capacity", "hidden_size", hidden_size, 1)
    num_experts = check_int("angle_capacity", "num_experts", num_experts, 1)
    power = hidden_size * cosine**2 / (2 - cosine**2) - math.log(num_experts)
    return float(max(math.ceil(math.exp(power)), 1)) if power < 700 else math.inf
