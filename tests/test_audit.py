"""Survey row R58: what an adversary in the batch can do to a request, and where it cannot."""

from __future__ import annotations

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route.audit import isolation
from fastmoe_route.methods import find
from router_cases import experts, inputs, make, names

QUIET = [n for n in names() if not set(find(n).needs) - {"token_ids", "experts", "sequence_ids"}]
INDEPENDENT = [n for n in QUIET if find(n).invariance == "I" and "token_ids" not in find(n).needs]


def one_favourite(num_experts=4):
    """Switch with capacity factor 1, whose tokens of ones all prefer expert 0."""
    router = fr.routers.build("switch", 16, num_experts, eval_capacity_factor=1.0).eval()
    with torch.no_grad():
        router.score.weight.copy_(torch.arange(num_experts, 0, -1)[:, None].expand(-1, 16))
    return router


def small_experts(num_experts=4):
    w = experts()
    return fr.routers.Experts(w.w_up[:num_experts], w.w_down[:num_experts])


def test_shared_capacity_lets_an_attacker_evict_the_victim():
    """E = 4, K = 1, factor 1: alone 2 of 8 rows are served, behind 24 attackers (C = 8) none."""
    victim, attackers = torch.ones(8, 16), torch.ones(24, 16)
    attacked = isolation(one_favourite(), victim, attackers, small_experts())
    assert attacked == (False, 2, 0)
    scoped = isolation(one_favourite(), victim, attackers, small_experts(), scoped=True)
    assert scoped == (True, 2, 2)


def test_serve_mode_refuses_the_attack():
    router = one_favourite().serve()
    with pytest.raises(ValueError, match="switch: scope_ids must be given in serve mode"):
        isolation(router, torch.ones(8, 16), torch.ones(24, 16), small_experts())
    assert isolation(
        router, torch.ones(8, 16), torch.ones(24, 16), small_experts(), scoped=True
    ).isolated


def test_dropped_tokens_are_counted():
    """Drops equal the sum over experts of max(0, n_e - C)."""
    router = one_favourite()
    x = inputs(32)["x"]
    routed = router(x)
    demand = torch.bincount(routed.routing.experts[:, 0].long(), minlength=4)
    assert int(routed.plan.dropped.sum()) == int((demand - 8).clamp(min=0).sum())


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_methods_are_isolated(name):
    """Against random tokens, and against copies of the victim's own."""
    router = make(name).eval()
    x = inputs()["x"]
    victim = x[:9]
    for attackers in (x[9:], victim.repeat(3, 1)):
        seen = isolation(router, victim, attackers, experts())
        assert seen.isolated
        assert seen.served_alone == seen.served_attacked
