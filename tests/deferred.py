"""Modules made without memory, whose weights are drawn later, as FSDP does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def own_tensors(module: nn.Module, recurse: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module, saved or not."""
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def draw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws all weights anew: every part with tensors of its own has to know how."""
    torch.manual_seed(seed)
    return module.apply(lambda part: part.reset_parameters() if [*own_tensors(part)] else None)


def deferred(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What `make` makes, by way of the meta device and memory full of NaN and large numbers."""
    with torch.device("meta"):
        module = make()
    assert all(value.is_meta for _, value in own_tensors(module, True))
    assert all(parameter.dim() > 0 for parameter in module.parameters())  # FSDP refuses scalars
    module.to_empty(device="cpu")
    with torch.no_grad():
        for _, value in own_tensors(module, True):
            value.fill_(torch.nan if value.is_floating_point() else 99)
    return draw(module, seed)


def assert_alike(module: nn.Module, other: nn.Module) -> None:
    """The same tensors with the same bits, all finite, and the same of them learn."""
    others = dict(own_tensors(other, True))
    found = dict(own_tensors(module, True))
    assert found.keys() == others.keys()
    for name, value in found.items():
        assert value.dtype == others[name].dtype
        assert value.requires_grad == others[name].requires_grad, name
        assert torch.equal(value, others[name]), name
        assert bool(value.isfinite().all()), name
