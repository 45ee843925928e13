"""Layers for the Hugging Face `kernels` package, so that `kernelize` finds them.

    from kernels import Mode, kernelize, register_kernel_mapping
    from fastmoe_route.integrations.kernels import mapping

    register_kernel_mapping(mapping())
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")

A layer of a model takes part if its class carries a layer name, by `use_kernel_forward_from_hub`
(as gpt-oss does, under `MegaBlocksMoeMLP`) or by `replace_kernel_forward_from_hub(cls, name)`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmoe_route._arguments import check_choice
from fastmoe_route.integrations.transformers.experts import experts_forward
from fastmoe_route.integrations.transformers.routers import fused_router

DEVICES = ("cpu", "cuda")


class MegaBlocksMoeMLP(nn.Module):
    """The whole feed-forward layer of gpt-oss: router and experts."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, S, H]` to the same shape, and the weights `[T, K]` of the experts chosen."""
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        _, weights, index = fused_router(self.router, x)
        return experts_forward(self.experts, x, index, weights).view(shape), weights


class FastMoeRouteExperts(nn.Module):
    """The experts of any model that transformers decorates with `use_experts_implementation`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[T, H]`, ids `[T, K]` and weights `[T, K]` to `[T, H]`."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


_LAYERS: dict[str, type[nn.Module]] = {
    "FastMoeRouteExperts": FastMoeRouteExperts,
    "MegaBlocksMoeMLP": MegaBlocksMoeMLP,
}


class LayerRepository:
    """A layer that is here already, where `kernels` expects one to be downloaded.

    Args:
        layer_name: `MegaBlocksMoeMLP` or `FastMoeRouteExperts`.
    """

    def __init__(self, layer_name: str) -> None:
        check_choice("LayerRepository", "layer_name", layer_name, tuple(_LAYERS))
        self.layer_name = layer_name

    def load(self) -> type[nn.Module]:
        """The class whose `forward` replaces that of the model's layer."""
        return _LAYERS[self.layer_name]

    def __eq__(self, other: object) -> bool:
        """Equal names are equal layers; `kernels` keeps loaded layers by repository."""
        return isinstance(other, LayerRepository) and other.layer_name == self.layer_name

    def __hash__(self) -> int:
        """Of the name."""
        return hash((LayerRepository, self.layer_name))

    def __str__(self) -> str:
        """For the log of `kernels`."""
        return f"fastmoe_route, layer {self.layer_name}"


def mapping() -> dict[str, dict[str, Any]]:
    """What `kernels.register_kernel_mapping` takes.

    Returns:
        By layer name and device type, where the layer of this package is found.
    """
    return {name: dict.fromkeys(DEVICES, LayerRepository(name)) for name in _LAYERS}
