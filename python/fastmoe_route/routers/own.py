"""The router of a layer, in any form that a user may give: a name, a `Router`, a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmoe_route._arguments import fail
from fastmoe_route.methods import Method
from fastmoe_route.results import Routing
from fastmoe_route.routers import Context, Routed, Router, build


class OwnRouter(Router):
    """A router of the user's, of any form that maps hidden states to a routing."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None,
        function: Callable[[Tensor], Any],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.function = function

    def route(self, x: Tensor, context: Context) -> Routed:
        found = self.function(x)
        if isinstance(found, Routed):
            return found
        routing, plan = found, None
        if isinstance(found, tuple) and len(found) == 2:
            routing, plan = found
        if not isinstance(routing, Routing):
            rule = "return a Routing, a pair of it and a DispatchPlan, or a Routed"
            fail(TypeError, "MoE", "router", rule, type(found).__name__)
        return Routed(routing, {}, plan)


# Nothing is known of it, so the most careful assumption is made.
OwnRouter.method = Method("own", "-", "", "mem", "B", "n/a", (), OwnRouter)


def router_of_layer(
    router: str | Router | Callable[[Tensor], Any],
    hidden_size: int,
    num_experts: int,
    top_k: int | None,
    options: dict[str, Any],
    device: torch.device | str | None,
) -> Router:
    """A router by name, as it was given, or around a function; errors in the name of `MoE`.

    Args:
        router: as `fastmoe_route.nn.MoE` takes it.
        hidden_size: `H`.
        num_experts: `E`.
        top_k: experts per token; None for the router's own default.
        options: further arguments for a router given by name; empty for the others.
        device: where a router given by name is made.

    Returns:
        The router, of the layer's sizes.
    """
    if isinstance(router, str):
        if device is None:
            return build(router, hidden_size, num_experts, top_k, **options)
        with torch.device(device):
            return build(router, hidden_size, num_experts, top_k, **options)
    if not callable(router):
        rule = "be a name, a fastmoe_route.routers.Router, or a function of hidden states"
        fail(TypeError, "MoE", "router", rule, type(router).__name__)
    if not isinstance(router, Router):
        router = OwnRouter(hidden_size, num_experts, top_k, router)
    if options:
        rule = f"be None beside a router that is made already; give it {min(options)} there"
        fail(ValueError, "MoE", "router_options", rule, options)
    for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts)):
        if getattr(router, name) != value:
            fail(ValueError, "MoE", "router", f"have {name} {value}", getattr(router, name))
    if top_k not in (None, router.top_k):
        fail(ValueError, "MoE", "top_k", f"be None or the router's {router.top_k}", top_k)
    return router
