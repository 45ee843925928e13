"""The experts: grouped matrix product, and the whole expert MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe_route.reference.dispatch import permute, plan_dispatch, rows_or_zero, unpermute
from fastmoe_route.reference.softmax import arithmetic_dtype
from fastmoe_route.results import DispatchPlan, Routing


def grouped_mm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`out[r] = x[r] @ w[e] + bias[e]` for the rows `offsets[e] : offsets[e + 1]` of expert `e`.

    Rows past `offsets[E]` are zero.
    """
    wide = arithmetic_dtype(x, dtype)
    ends = offsets.tolist()
    parts = []
    for expert, weight in enumerate(w.to(wide).unbind(0)):
        part = x[ends[expert] : ends[expert + 1]].to(wide) @ weight
        parts.append(part if bias is None else part + bias[expert].to(wide))
    parts.append(x.new_zeros(x.shape[0] - ends[-1], w.shape[2], dtype=wide))
    return torch.cat(parts).to(dtype or x.dtype)


_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,  # the exact (erf) form
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}
_GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def activate(up: Tensor, activation: str, interleaved: bool = False) -> Tensor:
    """The activation between the two products: `[R, 2I] -> [R, I]` gated, `[R, I] -> [R, I]` not.

    - `silu, gelu, relu`: pointwise; `relu2`: `relu(z)^2`.
    - `swiglu, geglu, reglu`: `f(gate) * up`.
    - `swiglu_clamped` (gpt-oss): `(clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g)`,
      `g = min(gate, 7)`.

    `gate, up` are the first and second half, or the even and odd columns with `interleaved`.
    """
    if activation in _POINTWISE:
        return _POINTWISE[activation](up)
    gate_half, up_half = (up[:, 0::2], up[:, 1::2]) if interleaved else up.chunk(2, dim=1)
    if activation == "swiglu_clamped":
        g = gate_half.clamp(max=7.0)
        return (up_half.clamp(-7.0, 7.0) + 1.0) * g * torch.sigmoid(1.702 * g)
    return _POINTWISE[_GATED[activation]](gate_half) * up_half


def moe_mlp(
    x: Tensor,
    routing: Routing | tuple[Tensor, Tensor],
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "swiglu",
    interleaved: bool = False,
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    weights_on: str = "output",
    plan: DispatchPlan | None = None,
    allow_unrouted: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`out[t] = sum over j of weights[t, j] * expert_{experts[t, j]}(x[t])`, kept slots only.

    `expert_e(x) = act(x @ w_up[e] + bias_up[e]) @ w_down[e] + bias_down[e]`. With
    `weights_on="input"` it is the sum of `expert_e(weights[t, j] * x[t])` (Llama 4). Nothing is
    rounded between the steps: the one rounding is that of the result.
    """
    wide = arithmetic_dtype(x, dtype)
    experts, weights = routing[0], routing[1].to(wide)
    if plan is None:
        plan = plan_dispatch(experts, w_up.shape[0], allow_unrouted=allow_unrouted)
    rows = permute(x.to(wide), plan)
    on_input = weights_on == "input"
    if on_input:
        rows = rows * rows_or_zero(weights.flatten(), plan.row_to_slot)[:, None]
    up = grouped_mm(rows, w_up, plan.offsets, bias=bias_up, dtype=wide)
    hidden = activate(up, activation, interleaved)
    down = grouped_mm(hidden, w_down, plan.offsets, bias=bias_down, dtype=wide)
    return unpermute(down, plan, None if on_input else weights).to(dtype or x.dtype)
