"""Fast Mixture-of-Experts dispatch for PyTorch."""

import importlib
from types import ModuleType

from fastmoe_route._environment import read_environment
from fastmoe_route._load import load_libraries

read_environment()
load_libraries()

from fastmoe_route.assign_balanced import assign_balanced  # noqa: E402
from fastmoe_route.dispatch import (  # noqa: E402
    expert_capacity,
    permute,
    plan_dispatch,
    unpermute,
)
from fastmoe_route.expert_choice import expert_choice  # noqa: E402
from fastmoe_route.gate import gate  # noqa: E402
from fastmoe_route.grouped_mm import grouped_mm  # noqa: E402
from fastmoe_route.huge_pages import use_huge_pages  # noqa: E402
from fastmoe_route.invariance import check_servable, dispatch_invariance  # noqa: E402
from fastmoe_route.lora_grouped_mm import lora_grouped_mm  # noqa: E402
from fastmoe_route.moe_mlp import moe_mlp  # noqa: E402
from fastmoe_route.overflow import (  # noqa: E402
    DropCounts,
    batch_priority,
    drop_counts,
    pass_through,
    renormalize_after_drop,
)
from fastmoe_route.reroute import reroute  # noqa: E402
from fastmoe_route.results import DispatchPlan, Routing  # noqa: E402
from fastmoe_route.softmax import softmax, softmax_topk  # noqa: E402
from fastmoe_route.transport import transport  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "DispatchPlan",
    "DropCounts",
    "Routing",
    "assign_balanced",
    "batch_priority",
    "check_servable",
    "dispatch_invariance",
    "drop_counts",
    "expert_capacity",
    "expert_choice",
    "gate",
    "grouped_mm",
    "lora_grouped_mm",
    "moe_mlp",
    "pass_through",
    "permute",
    "plan_dispatch",
    "renormalize_after_drop",
    "reroute",
    "softmax",
    "softmax_topk",
    "transport",
    "unpermute",
    "use_huge_pages",
]

# Imported at first use, so that importing the package stays quick.
_SUBMODULES = (
    "adapters",
    "audit",
    "distributed",
    "integrations",
    "losses",
    "methods",
    "nn",
    "reference",
    "routers",
    "softmax_variants",
)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"fastmoe_route.{name}")
    raise AttributeError(f"module 'fastmoe_route' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
