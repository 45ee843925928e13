"""Losses of routers: thin functions of what `gate` already returned, and of router weights.

The first group reads only the statistics of a `Routing` (`stats=True`, or `keep_scores=True` where
single scores are needed), so no loss reads the logits a second time. Every function returns a
scalar, differentiable as its docstring says; coefficients are the caller's unless a paper fixes
one. Empty batches give 0.
"""

from fastmoe_route.losses.agreement import (
    budget,
    commitment,
    consistency,
    contrastive,
    diversity,
    focal,
    imitation,
    kl_diversity,
    response_matching,
)
from fastmoe_route.losses.balance import (
    assigned_balance,
    cv_squared,
    importance,
    load_balancing,
    locality,
    null_balancing,
    pool_balance,
    smooth_load,
    z_loss,
)
from fastmoe_route.losses.coupling import expert_router_coupling
from fastmoe_route.losses.spread import (
    activation_locality,
    chunk_sparsity,
    entropy,
    entropy_target,
    information_gain,
    prior_shaping,
    tsallis_entropy,
    usage_entropy,
)

__all__ = [
    "activation_locality",
    "assigned_balance",
    "budget",
    "chunk_sparsity",
    "commitment",
    "consistency",
    "contrastive",
    "cv_squared",
    "diversity",
    "entropy",
    "entropy_target",
    "expert_router_coupling",
    "focal",
    "imitation",
    "importance",
    "information_gain",
    "kl_diversity",
    "load_balancing",
    "locality",
    "null_balancing",
    "pool_balance",
    "prior_shaping",
    "response_matching",
    "smooth_load",
    "tsallis_entropy",
    "usage_entropy",
    "z_loss",
]
