"""Published routing methods, each a few lines on the ops of the package.

`build("switch", 512, 64, 1)` makes a router; `methods("router")` lists them. A router maps hidden
states `[T, H]` to a `Routed`; a layer then calls `router.mix(x, routed, experts)`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastmoe_route._arguments import check_int, check_module, fail
from fastmoe_route.methods import Method, find, methods
from fastmoe_route.routers.adjacent import Cigt, Drmc, Magnet
from fastmoe_route.routers.assignment import (
    Base,
    ExpertChoice,
    PMoE,
    Rectify,
    SBase,
    StableMoE,
    UoE,
    VMoE,
)
from fastmoe_route.routers.balance import Bip, DeepSeekV3, LossFree, SparseOt, Ssr
from fastmoe_route.routers.base import Common, Context, Routed, Router
from fastmoe_route.routers.centroids import AdaptDHM, KMeans
from fastmoe_route.routers.competition import (
    CompeteSMoEv1,
    CompeteSMoEv2,
    LoRAMixer,
    MixtureOfRouters,
    S2MoE,
)
from fastmoe_route.routers.dense import BlockFFN, Finedeep, SoftMoE
from fastmoe_route.routers.dynamic import (
    AdaMoE,
    DaMoE,
    DynamicTopP,
    DynaMoE,
    DynMoLE,
    expert_schedule,
)
from fastmoe_route.routers.experts import Experts
from fastmoe_route.routers.groups import M6T, LocMoE, Sam, Smile, angle_capacity
from fastmoe_route.routers.logits import HyperRouter, RMoE, XMoE, YuanAttention
from fastmoe_route.routers.merging import CondConv, Mhr, Smear, SupernetMixture
from fastmoe_route.routers.pool import UniPool, pool_partition
from fastmoe_route.routers.prefix import Flextron, Ride, slice_experts
from fastmoe_route.routers.prototypes import Glider, Phatgoose, ProMoE, VQMoE
from fastmoe_route.routers.sampled import BinaryGate, Grin, ReMix, SiRA
from fastmoe_route.routers.sequence import Accord, GraphOfTokens, MiLoRA
from fastmoe_route.routers.skipping import DrLLM, DuoLLM, DynamicTokenRouting, Ftp, MindSkip
from fastmoe_route.routers.steering import (
    R2T2,
    MultilingualSteer,
    Rewiring,
    rerouted,
    rewire,
    task_experts,
)
from fastmoe_route.routers.stochastic import Hash, RlR, Thor
from fastmoe_route.routers.token_choice import (
    MaskMoE,
    OpenMoE,
    ReadMe,
    SMoEDropout,
    Switch,
    TopkSoftmax,
    Tutel,
)

__all__ = [
    "M6T",
    "R2T2",
    "Accord",
    "AdaMoE",
    "AdaptDHM",
    "Base",
    "BinaryGate",
    "Bip",
    "BlockFFN",
    "Cigt",
    "Common",
    "CompeteSMoEv1",
    "CompeteSMoEv2",
    "CondConv",
    "Context",
    "DaMoE",
    "DeepSeekV3",
    "DrLLM",
    "Drmc",
    "DuoLLM",
    "DynMoLE",
    "DynaMoE",
    "DynamicTokenRouting",
    "DynamicTopP",
    "ExpertChoice",
    "Experts",
    "Finedeep",
    "Flextron",
    "Ftp",
    "Glider",
    "GraphOfTokens",
    "Grin",
    "Hash",
    "HyperRouter",
    "KMeans",
    "LoRAMixer",
    "LocMoE",
    "LossFree",
    "Magnet",
    "MaskMoE",
    "Method",
    "Mhr",
    "MiLoRA",
    "MindSkip",
    "MixtureOfRouters",
    "MultilingualSteer",
    "OpenMoE",
    "PMoE",
    "Phatgoose",
    "ProMoE",
    "RMoE",
    "ReMix",
    "ReadMe",
    "Rectify",
    "Rewiring",
    "Ride",
    "RlR",
    "Routed",
    "Router",
    "S2MoE",
    "SBase",
    "SMoEDropout",
    "Sam",
    "SiRA",
    "Smear",
    "Smile",
    "SoftMoE",
    "SparseOt",
    "Ssr",
    "StableMoE",
    "SupernetMixture",
    "Switch",
    "Thor",
    "TopkSoftmax",
    "Tutel",
    "UniPool",
    "UoE",
    "VMoE",
    "VQMoE",
    "XMoE",
    "YuanAttention",
    "angle_capacity",
    "build",
    "expert_schedule",
    "methods",
    "pool_partition",
    "rerouted",
    "rewire",
    "slice_experts",
    "task_experts",
    "update",
]


def build(
    name: str, hidden_size: int, num_experts: int, top_k: int | None = None, **arguments: Any
) -> Router:
    """Makes a router by its registered name.

    Args:
        name: such as `switch` or `deepseek_v3`; `python -m fastmoe_route routers` lists them.
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token; None for the method's own default.
        arguments: further arguments of the method.

    Returns:
        The router.

    Raises:
        ValueError: no router has that name, or an argument breaks a rule of the method.

    >>> build("switch", 16, 4)
    Switch(
      hidden_size=16, num_experts=4, top_k=1
      (score): Linear()
    )
    """
    method = find(name)
    if method.kind != "router":
        fail(ValueError, "routers", "name", "be a router", f"{name!r}, a {method.kind}")
    hidden_size = check_int(name, "hidden_size", hidden_size, 1)
    num_experts = check_int(name, "num_experts", num_experts, 1)
    if top_k is not None:
        arguments["top_k"] = check_int(name, "top_k", top_k, 1, num_experts)
    router: Router = method.target(hidden_size, num_experts, **arguments)
    return router


def update(model: nn.Module) -> int:
    """Calls `update()` of every router in a model: once after each optimizer step.

    It moves what learns from counts instead of gradients: the biases of `loss_free` and
    `deepseek_v3`, the centroids of `kmeans` and `adapt_dhm`. Counts are summed over the ranks of
    `torch.distributed` first.

    Args:
        model: any module.

    Returns:
        The number of routers in it.

    Raises:
        TypeError: `model` is no module.

    >>> update(build("loss_free", 16, 4))
    1
    """
    check_module("update", "model", model)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.update()
    return len(routers)
