"""Audits of a router in service: does a request depend on who else shares the batch?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmoe_route._arguments import check_shape, check_tensor, fail
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Routed, Router
from fastmoe_route.routers.experts import Experts


class Isolation(NamedTuple):
    """What `isolation` saw.

    Attributes:
        isolated: whether the victim's output has the same bits with and without the attackers.
        served_alone: how many of the victim's tokens reach an expert without them.
        served_attacked: how many with them.
    """

    isolated: bool
    served_alone: int
    served_attacked: int


@register(
    "isolation",
    row="R58",
    source="arXiv:2402.05526",
    verified="paper",
    invariance="B",
    decode="n/a",
)
@torch.no_grad()
def isolation(
    router: Router,
    victim: Tensor,
    attackers: Tensor,
    experts: Experts,
    *,
    scoped: bool = False,
    seed: int = 0,
) -> Isolation:
    """Buffer overflow in MoE: puts an adversary's tokens before a victim's and compares bits.

    With a capacity that requests share, an adversary whose tokens stand earlier and ask for the
    victim's experts fills them: the victim's tokens are dropped or rerouted. A router of invariance
    I passes for any tokens; one with a capacity, or that decides over the batch, passes only with
    scopes. Copies of the victim's own tokens make the strongest attackers.

    Args:
        router: in the mode to be audited, usually after `serve()`.
        victim: `[V, H]`, one request.
        attackers: `[A, H]`, another request, placed before it.
        experts: of the layer.
        scoped: give each request its own scope (they have their own sequences in any case).
        seed: for methods that draw; positions count inside each request.

    Returns:
        `Isolation`.

    Raises:
        ValueError: the shapes do not fit, or serve mode refuses the call.
    """
    if not isinstance(router, Router):
        fail(TypeError, "isolation", "router", "be a Router", repr(router))
    check_tensor("isolation", "victim", victim, 2)
    check_shape("isolation", "attackers", attackers, (-1, victim.shape[1]))

    def run(x: Tensor, lengths: tuple[int, int]) -> tuple[Tensor, Routed]:
        owners = torch.arange(2, device=x.device).repeat_interleave(torch.tensor(lengths))
        routed = router(
            x,
            sequence_ids=owners,
            num_sequences=2,
            scope_ids=owners.int() if scoped else None,
            num_scopes=2 if scoped else 1,
            positions=torch.cat([torch.arange(n, device=x.device) for n in lengths]),
            seed=seed,
            experts=experts,
        )
        return router.mix(x, routed, experts), routed

    outputs, served = [], []
    for before in (victim[:0], attackers):
        y, routed = run(torch.cat([before, victim]), (before.shape[0], victim.shape[0]))
        plan = routed.plan
        slots = routed.routing.experts if plan is None else plan.slot_to_row
        outputs.append(y[before.shape[0] :])
        served.append(int((slots[before.shape[0] :] >= 0).any(1).sum()))
    return Isolation(torch.equal(*outputs), *served)
