"""The oracle of every op: plain torch, written from the definitions and never from the kernels.

Arguments and results are those of the public ops. Two keywords are added where they mean something:

- `dtype`: the arithmetic dtype. Left out, it is the contract's (float32, or float64 for float64
  input) and results come back in the dtype of the op. Given, results come back in it unrounded, so
  `dtype=torch.float64` yields the value an error bound is measured from.
- `rules`: `"cpu"` raises where the CPU op raises, `"cuda"` does what the CUDA op does instead.

Everything differentiable is differentiable by plain autograd; choices are constants. Arguments are
not checked: the oracle is asked only what the op accepts. Speed is not a goal.
"""

from fastmoe_route.reference.dispatch import expert_capacity, permute, plan_dispatch, unpermute
from fastmoe_route.reference.experts import activate, grouped_mm, moe_mlp
from fastmoe_route.reference.gate import (
    Keys,
    expert_choice,
    gate,
    gate_keys,
    gate_margin,
    gate_scores,
    gate_weights,
)
from fastmoe_route.reference.reroute import reroute
from fastmoe_route.reference.softmax import falling_order, softmax, softmax_topk
from fastmoe_route.reference.transport import assign_balanced, project_sparse, transport

__all__ = [
    "Keys",
    "activate",
    "assign_balanced",
    "expert_capacity",
    "expert_choice",
    "falling_order",
    "gate",
    "gate_keys",
    "gate_margin",
    "gate_scores",
    "gate_weights",
    "grouped_mm",
    "moe_mlp",
    "permute",
    "plan_dispatch",
    "project_sparse",
    "reroute",
    "softmax",
    "softmax_topk",
    "transport",
    "unpermute",
]
