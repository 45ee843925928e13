"""How expert weights lie in transformers and its checkpoints, and in this package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmoe_route._arguments import check_choice, check_shape, check_tensor, fail
from fastmoe_route.moe_mlp import ACTIVATIONS, GATED_ACTIVATIONS

# The names of gate, up and down projection of a single expert.
PER_EXPERT = {"gate_proj": ("gate_proj", "up_proj", "down_proj"), "w1": ("w1", "w3", "w2")}


class Weights(NamedTuple):
    """The weights of `E` experts as `fastmoe_route.nn.Experts` holds them.

    Attributes:
        w_up: `[E, 2I, H]` with the gate half first, or `[E, I, H]`.
        w_down: `[E, H, I]`.
        activation: one of those of `moe_mlp`.
        bias_up: `[E, 2I]` or `[E, I]`, or None.
        bias_down: `[E, H]` or None.
    """

    w_up: Tensor
    w_down: Tensor
    activation: str
    bias_up: Tensor | None = None
    bias_down: Tensor | None = None


def read_weights(
    source: nn.Module | Mapping[str, Tensor],
    activation: str | None,
    is_transposed: bool,
    is_concatenated: bool,
) -> Weights:
    """Weights from a transformers module, or from tensors by name; see `MoE.from_experts`."""
    if isinstance(source, Mapping):
        activation = "swiglu" if activation is None else activation
        check_choice("from_experts", "activation", activation, ACTIVATIONS)
        for name, value in source.items():
            check_tensor("from_experts", f"source[{name!r}]", value)
        if any(re.fullmatch(r"\d+\..*", name) for name in source):
            return _checked(_read_per_expert(source, activation))
        return _checked(_read_stacked(source, activation, is_transposed, is_concatenated))
    if not hasattr(source, "down_proj") or not hasattr(source, "is_transposed"):
        rule = "be an experts module of transformers 5 or a mapping of tensors"
        fail(TypeError, "from_experts", "source", rule, type(source).__name__)
    from fastmoe_route.integrations.transformers.experts import activation_of

    own, interleaved = activation_of(source)
    if own == "":
        rule = "compute an activation of moe_mlp"
        fail(ValueError, "from_experts", "source", rule, f"{type(source).__name__}'s own")
    tensors = {name: value.detach() for name, value in source.named_parameters()}
    return _read_stacked(tensors, own, bool(source.is_transposed), not interleaved)


def _checked(weights: Weights) -> Weights:
    """Weights whose shapes fit together: the down projection says what the others have to be."""
    num_experts, hidden, width = weights.w_down.shape
    up = width * (2 if weights.activation in GATED_ACTIVATIONS else 1)
    check_shape("from_experts", "up projection", weights.w_up, (num_experts, up, hidden))
    if weights.bias_up is not None:
        check_shape("from_experts", "bias of the up projection", weights.bias_up, (num_experts, up))
    if weights.bias_down is not None:
        bias = weights.bias_down
        check_shape("from_experts", "bias of the down projection", bias, (num_experts, hidden))
    return weights


def _read_stacked(
    tensors: Mapping[str, Tensor], activation: str, is_transposed: bool, is_concatenated: bool
) -> Weights:
    up_name = "gate_up_proj" if activation in GATED_ACTIVATIONS else "up_proj"
    for name in (up_name, "down_proj"):
        if name not in tensors:
            rule = f"hold {name} for {activation}"
            fail(ValueError, "from_experts", "source", rule, ", ".join(sorted(tensors)[:8]))
    w_up, w_down = tensors[up_name], tensors["down_proj"]
    check_tensor("from_experts", up_name, w_up, 3)
    check_tensor("from_experts", "down_proj", w_down, 3)
    if is_transposed:
        w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)
    bias_up, bias_down = tensors.get(f"{up_name}_bias"), tensors.get("down_proj_bias")
    if not is_concatenated:
        w_up = _halves(w_up)
        bias_up = None if bias_up is None else _halves(bias_up)
    return Weights(w_up, w_down, activation, bias_up, bias_down)


def _halves(rows: Tensor) -> Tensor:
    """Even and odd entries of dimension 1, one after the other."""
    return torch.cat([rows[:, ::2], rows[:, 1::2]], dim=1)


def _pairs(rows: Tensor) -> Tensor:
    """The inverse of `_halves`."""
    gate, up = rows.chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def _read_per_expert(tensors: Mapping[str, Tensor], activation: str) -> Weights:
    num_experts = 1 + max(int(name.split(".")[0]) for name in tensors if name[0].isdigit())
    for gate, up, down in PER_EXPERT.values():
        names = (gate, up) if activation in GATED_ACTIVATIONS else (up,)
        if f"0.{down}.weight" not in tensors or f"0.{up}.weight" not in tensors:
            continue
        stacks = []
        for name in (*names, down):
            keys = [f"{e}.{name}.weight" for e in range(num_experts)]
            missing = next((key for key in keys if key not in tensors), None)
            if missing is not None:
                fail(ValueError, "from_experts", "source", f"hold {missing}", "none")
            for key in keys:
                check_tensor("from_experts", key, tensors[key], 2)
                check_shape("from_experts", key, tensors[key], tensors[keys[0]].shape)
            stacks.append(torch.stack([tensors[key] for key in keys]))
        *ups, w_down = stacks
        check_shape("from_experts", f"0.{up}.weight", ups[-1][0], ups[0][0].shape)
        return Weights(torch.cat(ups, dim=1), w_down, activation)
    known = ", ".join(f"{{e}}.{names[2]}.weight" for names in PER_EXPERT.values())
    fail(ValueError, "from_experts", "source", f"hold one of {known}", sorted(tensors)[:4])


def write_weights(
    weights: Weights, layout: str, is_transposed: bool, is_concatenated: bool
) -> dict[str, Tensor]:
    """The inverse of `read_weights` for tensors by name; see `MoE.to_experts`."""
    check_choice("to_experts", "layout", layout, ("stacked", *PER_EXPERT))
    gated = weights.activation in GATED_ACTIVATIONS
    if layout != "stacked":
        return _write_per_expert(weights, PER_EXPERT[layout], gated)
    w_up, w_down, bias_up = weights.w_up, weights.w_down, weights.bias_up
    if not is_concatenated:
        w_up = _pairs(w_up)
        bias_up = None if bias_up is None else _pairs(bias_up)
    if is_transposed:
        w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)
    name = "gate_up_proj" if gated else "up_proj"
    found = {name: w_up, "down_proj": w_down}
    if bias_up is not None and weights.bias_down is not None:
        found |= {f"{name}_bias": bias_up, "down_proj_bias": weights.bias_down}
    return found


def _write_per_expert(
    weights: Weights, names: tuple[str, str, str], gated: bool
) -> dict[str, Tensor]:
    if weights.bias_up is not None:
        fail(ValueError, "to_experts", "layout", "be stacked for experts with biases", names[0])
    gate, up, down = names
    found = {}
    for e, (w_up, w_down) in enumerate(zip(weights.w_up, weights.w_down, strict=True)):
        parts = w_up.chunk(2) if gated else (w_up,)
        for name, part in zip((gate, up) if gated else (up,), parts, strict=True):
            found[f"{e}.{name}.weight"] = part
        found[f"{e}.{down}.weight"] = w_down
    return found
