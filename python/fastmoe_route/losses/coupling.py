"""The loss that ties router rows to expert weights; it sees no token."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe_route._arguments import check_number, check_shape, check_tensor
from fastmoe_route.methods import register


@register("expert_router_coupling", row="R33", source="arXiv:2512.23447", verified="2nd")
def expert_router_coupling(
    router: Tensor,
    w_up: Tensor,
    *,
    alpha: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Each expert should answer loudest to its own router row, and be the loudest at it.

    Router row `R_i`, multiplied elementwise by noise in `1 +- eps_i` with
    `eps_i = min over j of |R_i - R_j| / (2 |R_i|)`, is a proxy for the tokens of expert `i`, and
    `M_ij = |R~_i W_j|` the response of expert `j` to it. The loss is the mean over `i != j` of
    `relu(M_ij - alpha M_ii) + relu(M_ji - alpha M_ii)` (arXiv:2512.23447, as third parties quote
    it). Its cost, `E^2` rows through the up projection, does not grow with the batch.

    Args:
        router: `[E, H]`, one row per expert.
        w_up: `[E, H, I]`, the experts' (gate) projection.
        alpha: 1; the paper uses 0.5 for 256 experts.
        noise: `[E, H]` in [-1, 1], the noise in units of `eps_i`; None draws it uniformly.
        generator: draws the noise.

    Returns:
        A scalar, differentiable in `router` and `w_up`; the bounds `eps_i` are constants. 0 for
        one expert, and where the diagonal dominates by the margin.

    Raises:
        ValueError: a shape does not fit, or `alpha` is not positive.
    """
    check_tensor("expert_router_coupling", "router", router, 2)
    num_experts, hidden = router.shape
    check_tensor("expert_router_coupling", "w_up", w_up, 3)
    check_shape("expert_router_coupling", "w_up", w_up, (num_experts, hidden, -1))
    check_number("expert_router_coupling", "alpha", alpha, above=0)
    if num_experts == 1:
        return (router * 0.0).sum()
    if noise is not None:
        check_shape("expert_router_coupling", "noise", noise, router.shape)
    else:
        noise = torch.rand(router.shape, generator=generator, dtype=router.dtype)
        noise = noise.to(router.device) * 2 - 1
    rows = router.detach()
    apart = (rows[:, None] - rows[None]).norm(dim=2).fill_diagonal_(torch.inf).amin(1)
    reach = apart / (2 * rows.norm(dim=1)).clamp(min=torch.finfo(rows.dtype).tiny)
    proxies = router * (1 + noise * reach[:, None])
    response = torch.einsum("ih,jhd->ijd", proxies, w_up).norm(dim=2)
    own = alpha * response.diagonal()[:, None]
    excess = (response - own).relu() + (response.T - own).relu()
    off_diagonal = 1 - torch.eye(num_experts, dtype=excess.dtype, device=excess.device)
    loss: Tensor = (excess * off_diagonal).sum() / (num_experts * (num_experts - 1))
    return loss
