"""Layers: `MoE`, a drop-in feed-forward layer, and `Experts`, the weights in it.

>>> import torch, fastmoe_route as fr
>>> class Block(torch.nn.Module):
...     def __init__(self, hidden_size, num_heads):
...         super().__init__()
...         self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden_size) for _ in range(2))
...         self.attention = torch.nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
...         self.feed_forward = fr.nn.MoE(hidden_size, 4 * hidden_size, num_experts=8, top_k=2)
...
...     def forward(self, x):
...         n = self.norms[0](x)
...         x = x + self.attention(n, n, n, need_weights=False)[0]
...         return x + self.feed_forward(self.norms[1](x))
>>> model = torch.nn.Sequential(Block(32, 4), Block(32, 4))
>>> y = model(torch.randn(2, 10, 32))
>>> loss = y.square().mean() + fr.nn.aux_loss(model)
>>> loss.backward()
>>> model[0].feed_forward.stats.demand.sum()
tensor(40)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmoe_route import routers
from fastmoe_route._arguments import (
    autocast_dtype,
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_module,
    check_shape,
    check_tensor,
    fail,
)
from fastmoe_route._initial import draw_normal
from fastmoe_route._layouts import Weights, read_weights, write_weights
from fastmoe_route.moe_mlp import ACTIVATIONS, GATED_ACTIVATIONS
from fastmoe_route.results import DispatchPlan, Routing
from fastmoe_route.routers import Routed, Router
from fastmoe_route.routers.own import router_of_layer
from fastmoe_route.routers.scores import linear, sigmoid

__all__ = ["Experts", "MoE", "MoEStats", "aux_loss"]


class Experts(nn.Module):
    """`E` feed-forward networks of one shape, their weights stacked as in `nn.Linear`.

    Args:
        hidden_size: `H`.
        intermediate_size: `I`, the width of one expert.
        num_experts: `E`.
        activation: one of those of `moe_mlp`.
        bias: learn biases, which start at 0.
        init_std: standard deviation of the initial weights; None for `1 / sqrt(inputs)`, which
            keeps the size of activations.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        w_up: `[E, 2I, H]` for gated activations (gate half first), else `[E, I, H]`.
        w_down: `[E, H, I]`.
        bias_up: `[E, 2I]` or `[E, I]`, or None.
        bias_down: `[E, H]`, or None.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size = check_int("Experts", "hidden_size", hidden_size, 1)
        intermediate_size = check_int("Experts", "intermediate_size", intermediate_size, 1)
        num_experts = check_int("Experts", "num_experts", num_experts, 1)
        check_choice("Experts", "activation", activation, ACTIVATIONS)
        if init_std is not None:
            check_float("Experts", "init_std", init_std, kind="a number or None")
            if not 0 <= init_std < float("inf"):
                fail(ValueError, "Experts", "init_std", "be finite and at least 0", init_std)
        check_flag("Experts", "bias", bias)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            fail(TypeError, "Experts", "dtype", "be a floating-point dtype or None", repr(dtype))
        self.activation = activation
        self.init_std = init_std
        up = intermediate_size * (2 if activation in GATED_ACTIVATIONS else 1)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.w_up = make(up, hidden_size)
        self.w_down = make(hidden_size, intermediate_size)
        self.bias_up = make(up) if bias else None
        self.bias_down = make(hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, and sets biases to 0; what the constructor calls."""
        for w in (self.w_up, self.w_down):
            draw_normal(w, w.shape[2] ** -0.5 if self.init_std is None else self.init_std)
        for bias in (self.bias_up, self.bias_down):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def num_experts(self) -> int:
        """`E`."""
        return self.w_up.shape[0]

    def tensors(self) -> routers.Experts:
        """The weights as routers and `moe_mlp` take them; views, not copies."""
        return routers.Experts(
            self.w_up.transpose(1, 2),
            self.w_down.transpose(1, 2),
            self.activation,
            self.bias_up,
            self.bias_down,
        )

    def forward(
        self,
        x: Tensor,
        routing: Routing | tuple[Tensor, Tensor],
        plan: DispatchPlan | None = None,
    ) -> Tensor:
        """`[T, H] -> [T, H]`, the weighted sum of every token's experts; see `moe_mlp`."""
        return self.tensors()(x, routing, plan)

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        num_experts, hidden, width = self.w_down.shape
        return (
            f"hidden_size={hidden}, intermediate_size={width}, num_experts={num_experts}, "
            f"activation={self.activation!r}, bias={self.bias_up is not None}"
        )


class MoEStats(NamedTuple):
    """What the last training call of a layer did. Nothing here carries a gradient.

    Attributes:
        demand: int32 `[E]`, slots that asked for each expert.
        dropped: int32 `[E]`, slots turned away by a capacity; None without one.
        losses: the auxiliary losses by name, each times its coefficient.
    """

    demand: Tensor
    dropped: Tensor | None
    losses: dict[str, Tensor]


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer: router, experts, and shared experts if any.

    `y = sum over the token's experts of weight * expert(x) + shared(x)`. The router may be any
    method of `fastmoe_route.routers`, by name or as a module. All parts can be made on the meta
    device and given memory by `to_empty`, before `reset_parameters` of each that has parameters or
    buffers draws its weights, as FSDP does.

    Args:
        hidden_size: `H`.
        intermediate_size: `I`, the width of one expert.
        num_experts: `E`.
        top_k: experts per token; None for the router's own default.
        router: a name of `python -m fastmoe_route routers`; a `Router`; or any module or function
            that maps `[T, H]` to a `Routing`, a pair of it and a `DispatchPlan`, or a `Routed`. The
            default is softmax over the `top_k` largest logits, with the load-balancing loss times
            0.01.
        router_options: further arguments for a router given by name.
        activation: one of those of `moe_mlp`: `swiglu`, `geglu`, `reglu`, `swiglu_clamped`,
            `silu`, `gelu`, `relu`, `relu2`.
        num_shared_experts: experts that see every token, with weight 1; they form one network of
            `num_shared_experts` times the width.
        shared_gate: weigh the shared experts by `sigmoid(x @ w)`, as Qwen2-MoE does.
        capacity_factor: in training, an expert keeps at most its even share of slots times this;
            None leaves it to the router, and most drop nothing. Which slots go is the router's
            `drop_policy`.
        eval_capacity_factor: the same in evaluation.
        bias: experts have biases.
        init_std: standard deviation of the experts' initial weights, None for `1 / sqrt(inputs)`.
        device: where parameters are made.
        dtype: dtype of the experts; the router stays float32.

    Attributes:
        router: the `Router`.
        experts: the `Experts`.
        shared: the shared `Experts`, as one, or None.
        aux_loss: the sum of the auxiliary losses of the last training call, with its gradient, 0
            if the router has none; None before. `fastmoe_route.nn.aux_loss(model)` adds them up.
            Checkpoints with `use_reentrant=True` run the call without gradients, so that this loss
            has none either; those with `False` keep it.
        stats: the `MoEStats` of that call, or None.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Example:
        >>> layer = MoE(16, 32, num_experts=4, top_k=2, num_shared_experts=1)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
        >>> MoE(16, 32, 8, 2, router="deepseek_v3", router_options={"num_groups": 2}).router.name
        'deepseek_v3'
    """

    aux_loss: Tensor | None
    stats: MoEStats | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        router: str | Router | Callable[[Tensor], Any] = "topk_softmax",
        router_options: Mapping[str, Any] | None = None,
        activation: str = "swiglu",
        num_shared_experts: int = 0,
        shared_gate: bool = False,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        bias: bool = False,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_shared_experts = check_int("MoE", "num_shared_experts", num_shared_experts, 0)
        check_flag("MoE", "shared_gate", shared_gate)
        if shared_gate and num_shared_experts == 0:
            fail(ValueError, "MoE", "shared_gate", "be False without shared experts", shared_gate)
        common: dict[str, Any] = {
            "activation": activation,
            "bias": bias,
            "init_std": init_std,
            "device": device,
            "dtype": dtype,
        }
        self.experts = Experts(hidden_size, intermediate_size, num_experts, **common)
        if router_options is not None and not isinstance(router_options, Mapping):
            rule = "be a mapping of arguments of the router"
            fail(TypeError, "MoE", "router_options", rule, repr(router_options))
        options = dict(router_options or {})
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if factor is not None:
                options[name] = factor
        self.router = router_of_layer(router, hidden_size, num_experts, top_k, options, device)
        self.shared: Experts | None = None
        self.shared_gate: nn.Linear | None = None
        if num_shared_experts:
            width = num_shared_experts * self.experts.w_down.shape[2]
            self.shared = Experts(hidden_size, width, 1, **common)
            if shared_gate:
                self.shared_gate = _SharedGate(
                    hidden_size, 1, bias=False, device=device, dtype=dtype
                )
        self.aux_loss = None
        self.stats = None

    def forward(self, x: Tensor, *, return_routed: bool = False, **context: Any) -> Any:
        """Sends every token through its experts.

        Args:
            x: float `[..., H]`.
            return_routed: also return what the router decided, for all modes.
            context: what the router's `forward` takes beside `x`: `token_ids`, `sequence_ids`,
                `scope_ids`, `num_scopes`, `state`, `seed` and so on. Tensors with one value per
                token may have the leading shape of `x`.

        Returns:
            `[..., H]` in the dtype of `x` (of autocast, under autocast), or a pair of it and a
            `Routed`. Differentiable in `x` and all parameters.
        """
        check_tensor("MoE", "x", x)
        experts = self.experts.tensors()
        hidden, dims = experts.w_up.shape[1], x.dim()
        if dims == 0 or x.shape[-1] != hidden:
            check_shape("MoE", "x", x, (-1,) * max(dims - 1, 0) + (hidden,))
        flat = x if dims == 2 else x.reshape(-1, hidden)
        routed = self.router(flat, experts=experts, **self.flat_context(x, context))
        y = self.router.mix(flat, routed, experts)
        if self.shared is not None:
            y = y + self.apply_shared(flat)
        if self.training:
            self.record(routed)
        y = y.to(autocast_dtype(x) or x.dtype)
        if dims != 2:
            y = y.view(*x.shape[:-1], hidden)
        return (y, routed) if return_routed else y

    @staticmethod
    def flat_context(x: Tensor, context: Mapping[str, Any]) -> dict[str, Any]:
        """`context` with tensors of the leading shape of `x` flattened, one value per token."""
        return {name: _per_token(value, x) for name, value in context.items()}

    def apply_shared(self, x: Tensor) -> Tensor:
        """What the shared experts add, `[T, H] -> [T, H]`."""
        assert self.shared is not None
        experts = torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device)
        if self.shared_gate is None:
            weights = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device)
        else:
            weights = sigmoid(self.shared_gate(x))
        y: Tensor = self.shared(x, (experts, weights))
        return y

    def record(self, routed: Routed) -> None:
        """Keeps the losses and statistics of a training call."""
        self.aux_loss = routed.aux_loss
        self.stats = MoEStats(
            routed.routing.demand,
            None if routed.plan is None else routed.plan.dropped,
            {name: loss.detach().clone() for name, loss in routed.losses.items()},
        )

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and deepcopy, without what the last call left."""
        return {**self.__dict__, "aux_loss": None, "stats": None}

    # ---- weights of other libraries ------------------------------------------------------------

    @classmethod
    def from_experts(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        top_k: int | None = None,
        *,
        activation: str | None = None,
        is_transposed: bool = False,
        is_concatenated: bool = True,
        router_weight: Tensor | None = None,
        **options: Any,
    ) -> MoE:
        """Makes a layer with the experts of a transformers module or checkpoint, copied.

        Args:
            source: an experts module of transformers, which says itself how its weights lie; or a
                mapping of tensors: `gate_up_proj` (or `up_proj`) and `down_proj` with all experts
                stacked, and their `_bias`; or, by expert, `{e}.gate_proj.weight`,
                `{e}.up_proj.weight`, `{e}.down_proj.weight` (or `w1`, `w3`, `w2`).
            top_k: experts per token.
            activation: of a mapping, `swiglu` if None; a module's own is recognised.
            is_transposed: of a mapping, stacked weights are `[E, in, out]`.
            is_concatenated: of a mapping, gate and up are halves; else even and odd rows.
            router_weight: `[E, H]`, the weight of a linear router, copied.
            options: further arguments of `MoE`.

        Returns:
            The layer, with the dtype and device of the source.

        Raises:
            ValueError: weights that fit no layout, or a module with an activation of its own.

        >>> layer = MoE(8, 6, num_experts=2, top_k=1)
        >>> same = MoE.from_experts(layer.to_experts("w1"), 1)
        >>> torch.equal(same.experts.w_up, layer.experts.w_up)
        True
        """
        weights = read_weights(source, activation, is_transposed, is_concatenated)
        num_experts, hidden, width = weights.w_down.shape
        options = {
            "bias": weights.bias_up is not None,
            "device": weights.w_down.device,
            "dtype": weights.w_down.dtype,
            **options,
        }
        layer = cls(hidden, width, num_experts, top_k, activation=weights.activation, **options)
        with torch.no_grad():
            for name in ("w_up", "w_down", "bias_up", "bias_down"):
                value = getattr(weights, name)
                if value is not None:
                    getattr(layer.experts, name).copy_(value)
            if router_weight is not None:
                score = getattr(layer.router, "score", None)
                if not isinstance(getattr(score, "weight", None), Tensor):
                    rule = f"be None for {layer.router.name}, which has no linear score"
                    fail(ValueError, "from_experts", "router_weight", rule, "a tensor")
                check_shape("from_experts", "router_weight", router_weight, (num_experts, hidden))
                score.weight.copy_(router_weight)  # type: ignore[union-attr]
        return layer

    def to_experts(
        self,
        layout: str = "stacked",
        *,
        is_transposed: bool = False,
        is_concatenated: bool = True,
    ) -> dict[str, Tensor]:
        """The experts' weights in a layout of transformers, for `load_state_dict` or a checkpoint.

        Args:
            layout: `stacked`: `gate_up_proj` (`up_proj` without gate) and `down_proj`, as
                transformers 5 holds them; `gate_proj` or `w1`: one matrix per expert and
                projection, under the names that checkpoints of Qwen and DeepSeek, or of Mixtral,
                use.
            is_transposed: stacked weights are `[E, in, out]`.
            is_concatenated: gate and up are halves of `gate_up_proj`; else even and odd rows.

        Returns:
            Tensors by name, without gradient; views where the layout is ours.
        """
        experts = self.experts
        weights = Weights(
            experts.w_up.detach(),
            experts.w_down.detach(),
            experts.activation,
            None if experts.bias_up is None else experts.bias_up.detach(),
            None if experts.bias_down is None else experts.bias_down.detach(),
        )
        return write_weights(weights, layout, is_transposed, is_concatenated)


def aux_loss(model: nn.Module) -> Tensor:
    """The auxiliary losses of a model's last training call, over all its MoE layers.

    Args:
        model: any module.

    Returns:
        A float32 scalar to add to the loss; 0 if no layer has one. Differentiable.

    Raises:
        TypeError: `model` is no module.
    """
    check_module("aux_loss", "model", model)
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, MoE) and module.aux_loss is not None:
            total = total.to(module.aux_loss.device) + module.aux_loss
    return total


class _SharedGate(nn.Linear):
    """A linear map in float32 that gives a token the same bits in any batch, as routers' do."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def _per_token(value: Any, x: Tensor) -> Any:
    """A tensor with the leading shape of `x`, flat; anything else as it is."""
    is_alike = isinstance(value, Tensor) and x.dim() > 2 and value.dim() == x.dim() - 1
    if is_alike and value.shape == x.shape[:-1]:
        return value.reshape(-1)
    return value
