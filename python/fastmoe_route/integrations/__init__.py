"""Bridges to other libraries. None of them is imported before a bridge is used.

- `fastmoe_route.integrations.transformers`: experts and routers of Hugging Face transformers 5.
- `fastmoe_route.integrations.kernels`: layers for `kernelize` of Hugging Face `kernels`.
"""

import importlib
from types import ModuleType

_SUBMODULES = ("kernels", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"fastmoe_route.integrations.{name}")
    raise AttributeError(f"module 'fastmoe_route.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
