"""Cases of the expert layer, the layer in plain torch, and how their results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastmoe_route as fr
import products
import torch
import vm_backend
from cases import GATED_ACTIVATIONS, describe, expert_cases, normal
from fastmoe_route import reference
from tolerance import assert_ratio
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("x", "weights", "w_up", "w_down", "bias_up", "bias_down")


def make(
    num_tokens: int,
    hidden: int,
    width: int,
    num_experts: int,
    top_k: int,
    *,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    biases: bool = False,
    linear: bool = True,
    **options: object,
) -> dict[str, Any]:
    """Arguments of moe_mlp; `linear` stores weights as nn.Linear does."""
    up = width * (2 if activation in GATED_ACTIVATIONS else 1)

    def weight(rows: int, cols: int, seed: int) -> Tensor:
        values = (normal(num_experts, cols, rows, seed=seed) / rows**0.5).to(dtype)
        return values.transpose(1, 2) if linear else values.transpose(1, 2).contiguous()

    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(9))
    weights, experts = scores.topk(top_k, 1)
    if dtype == torch.float64:
        weights = weights.double()
    case = {
        "x": normal(num_tokens, hidden, dtype=dtype, seed=1),
        "routing": (experts.int(), weights),
        "w_up": weight(hidden, up, 2),
        "w_down": weight(width, hidden, 3),
        "activation": activation,
        **options,
    }
    if biases:
        case["bias_up"] = normal(num_experts, up, dtype=dtype, seed=4)
        case["bias_down"] = normal(num_experts, hidden, dtype=dtype, seed=5)
    return case


def plain(x: Tensor, routing: tuple[Tensor, Tensor], w_up: Tensor, w_down: Tensor, **o) -> Tensor:
    """The layer as plain torch writes it, every step rounded to the dtype of `x`."""
    experts, weights = routing
    y = torch.zeros_like(x)
    for e in range(w_up.shape[0]):
        tokens, slots = torch.where(experts == e)
        w = weights[tokens, slots].to(x.dtype)[:, None]
        on_input = o.get("weights_on") == "input"
        rows = x[tokens] * w if on_input else x[tokens]
        up = products.matmul(rows, w_up[e])
        if o.get("bias_up") is not None:
            up = up + o["bias_up"][e]
        hidden = reference.activate(up, o["activation"], o.get("interleaved", False))
        out = products.matmul(hidden, w_down[e])
        if o.get("bias_down") is not None:
            out = out + o["bias_down"][e]
        y = y.index_add(0, tokens, out if on_input else out * w)
    return y


def results(
    layer: Callable[..., Tensor], case: dict[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The output and the gradients of one case, computed in `dtype` if given."""
    options = dict(case)
    experts, weights = options.pop("routing")
    leaves = {"weights": weights, **{n: options.pop(n) for n in TENSORS if n in options}}
    for name, value in leaves.items():
        leaves[name] = value.detach().to(dtype or value.dtype).requires_grad_()
    tensors = {name: leaf for name, leaf in leaves.items() if name != "weights"}
    y = layer(routing=(experts, leaves["weights"]), **tensors, **options)
    grad_y = normal(*y.shape, dtype=case["x"].dtype, seed=7).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def check_case(case: dict[str, Any]) -> None:
    """Output and gradients of one case: float64 to rounding, small dtypes no worse than torch."""
    dtype = case["x"].dtype
    got, exact = results(fr.moe_mlp, case), results(reference.moe_mlp, case, torch.float64)
    base = results(plain, case)
    for name, value in got.items():
        wanted = exact[name]
        assert value.shape == wanted.shape
        assert value.dtype == base[name].dtype
        size = wanted.abs().max().item() if wanted.numel() else 0.0
        error = (value.double() - wanted).abs().max().item() if wanted.numel() else 0.0
        if dtype in (torch.float32, torch.float64):
            assert error <= 64 * torch.finfo(dtype).eps * max(size, 1e-3), (name, error, size)
        elif wanted.numel() >= 256:
            assert_ratio(value.reshape(1, -1), base[name].reshape(1, -1), wanted.reshape(1, -1))
        else:  # too few elements for an error to be typical
            assert error <= 0.2 * size + 0.02, (name, error, size)


def check_cases(seed: int, count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    for i, case in enumerate(expert_cases(seed, count, dtypes=vm_backend.expert_dtypes(dtypes))):
        try:
            check_case(case)
        except Exception as error:
            raise AssertionError(f"case {i} of seed {seed}: {describe(case)}") from error
