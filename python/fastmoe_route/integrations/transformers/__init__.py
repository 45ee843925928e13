"""Hugging Face transformers 5.8 and newer: experts, routers and expert parallelism on our ops.

    from fastmoe_route.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="fastmoe_route")

A model that is already there is switched with `model.set_experts_implementation("fastmoe_route")`,
and `patch_routers(model)` gives it the fused gate. Importing this module does not import
transformers; `register` and `patch_routers` do.
"""

from fastmoe_route.integrations.transformers.experts import experts_forward, explain
from fastmoe_route.integrations.transformers.registration import NAME, register
from fastmoe_route.integrations.transformers.routers import patch_routers, unpatch_routers

__all__ = [
    "NAME",
    "experts_forward",
    "explain",
    "patch_routers",
    "register",
    "unpatch_routers",
]
