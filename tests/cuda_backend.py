"""The backend `cuda`: the ops' tests, unchanged, on the kernels of a GPU.

Tests make most of their tensors on the CPU. Here the CPU kernels of every op that has a CUDA kernel
make way for a trip: arguments go to the GPU with their strides and their place in memory, the op
runs there, results come back. Autograd, fake kernels and checks in Python stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import vm_backend
from torch import Tensor
from torch.utils._pytree import tree_map

NAMESPACE = "fastmoe_route"
_libraries: list[torch.library.Library] = []  # an override ends with its library


def moved(tensor: Tensor, device: str) -> Tensor:
    """A copy on `device` with the sizes, the strides and the offset of `tensor`."""
    whole = torch.empty(0, dtype=tensor.dtype)
    whole.set_(tensor.untyped_storage())  # type: ignore[call-overload]
    there = torch.empty_like(whole, device=device).copy_(whole)
    return there.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def through(op: Any, device: str) -> Callable[..., Any]:
    """`op` on CPU tensors, run on `device`; what it writes in place is written here too."""

    def to(value: Any) -> Any:
        return moved(value, device) if isinstance(value, Tensor) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        there = tree_map(to, args)
        results = op(*there, **tree_map(to, kwargs))
        for argument, mine, its in zip(op._schema.arguments, args, there, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                mine.copy_(its)
        return tree_map(lambda r: r.cpu() if isinstance(r, Tensor) else r, results)

    return run


def load() -> None:
    """Puts the trip in the place of the CPU kernels."""
    import fastmoe_route  # noqa: F401  the schemas and the CUDA library

    vm_backend.use_cuda_kernels()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{NAMESPACE}::")]
    library = torch.library.Library(NAMESPACE, "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verrid.*")
        for full in names:
            name = full.removeprefix(f"{NAMESPACE}::")
            if has(full, "CUDA") and has(full, "CPU"):
                op = getattr(torch.ops.fastmoe_route, name).default
                library.impl(name, through(op, "cuda"), "CPU", allow_override=True)
