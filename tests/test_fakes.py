"""Fake kernels: shape, dtype and strides of every result and gradient are those of the call.

`torch.library.opcheck` compares no strides of tensors without elements and of sizes 1, and only
operators; a compiled graph relies on what the whole function gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fastmoe_route as fr
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

# T, E, K, H; without tokens there are no rows.
SIZES = [s for s in itertools.product((0, 1, 5), (1, 4), (1, 2), (1, 6)) if s[2] <= s[1]]


# They make no tensors, or change a module.
NO_TENSORS = {"DispatchPlan", "DropCounts", "Routing", "check_servable", "dispatch_invariance"}
NO_TENSORS |= {"expert_capacity", "use_huge_pages"}

# Plain torch, whose own fakes give other strides where there is nothing to step over.
PLAIN = {"transport", "renormalize_after_drop", "pass_through"}


def plan(a: SimpleNamespace, **options: Any) -> fr.DispatchPlan:
    return fr.plan_dispatch(a.experts, a.num_experts, **options)


def layer(a: SimpleNamespace, **options: Any) -> Tensor:
    up, down = a.w_up.transpose(1, 2), a.w_down.transpose(1, 2)
    return fr.moe_mlp(a.x, (a.experts, a.weights), up, down, **options)


def biased_layer(a: SimpleNamespace) -> Tensor:
    up, down = a.w_up.transpose(1, 2).contiguous(), a.w_down.transpose(1, 2).contiguous()
    options = {"bias_up": a.bias_up, "bias_down": a.bias_down, "weights_on": "input"}
    given = plan(a, capacity=2, align=2)
    return fr.moe_mlp(a.x, (a.experts, a.weights), up, down, plan=given, **options)


def rows(a: SimpleNamespace, given: fr.DispatchPlan) -> Tensor:
    return a.row.expand(given.row_to_slot.shape[0], -1) * 2


def grouped(a: SimpleNamespace, w: Tensor, **options: Any) -> Tensor:
    return fr.grouped_mm(a.x, w, a.offsets, **options)


CALLS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "gate": lambda a: fr.gate(a.logits, a.top_k),
    "gate, all results": lambda a: fr.gate(a.logits, a.top_k, stats=True, keep_scores=True),
    "gate, options": lambda a: fr.gate(
        a.logits, a.top_k, score="sigmoid", bias=a.logits.detach().float().sum(0), normalize=True
    ),
    "expert_choice": lambda a: fr.expert_choice(a.logits, 2),
    "softmax": lambda a: fr.softmax(a.logits),
    "softmax, first dimension": lambda a: fr.softmax(a.logits, 0),
    "softmax_topk": lambda a: fr.softmax_topk(a.logits, a.top_k),
    "transport, sinkhorn": lambda a: fr.transport(a.logits, "sinkhorn", iters=2),
    "transport, bip": lambda a: fr.transport(a.logits, "bip", iters=2),
    "transport, ksparse": lambda a: fr.transport(a.logits, "ksparse", iters=2),
    "assign_balanced": lambda a: fr.assign_balanced(a.logits[:, :1]),
    "plan_dispatch": plan,
    "plan_dispatch, options": lambda a: plan(
        a, capacity=1, align=3, drop_policy="score", weights=a.weights
    ),
    "permute": lambda a: fr.permute(a.x, plan(a)),
    "unpermute": lambda a: fr.unpermute(rows(a, plan(a)), plan(a)),
    "unpermute, weighted": lambda a: fr.unpermute(rows(a, plan(a)), plan(a), a.weights),
    "grouped_mm": lambda a: grouped(a, a.w_up.transpose(1, 2)),
    "grouped_mm, row-major": lambda a: grouped(a, a.w_row, bias=a.bias_row),
    "moe_mlp": layer,
    "moe_mlp, relu": lambda a: fr.moe_mlp(
        a.x, (a.experts, a.weights), a.w_row, a.w_row.transpose(1, 2), activation="relu"
    ),
    "moe_mlp, biases": biased_layer,
    "lora_grouped_mm": lambda a: fr.lora_grouped_mm(
        a.x, a.w_row[..., :1], a.w_row[:, :1], (a.experts, a.weights)
    ),
    "reroute": lambda a: fr.reroute((a.experts, a.weights), a.num_experts, 1, 1),
    "reroute, fill": lambda a: fr.reroute(
        (a.experts, a.weights), a.num_experts, a.top_k, 1, fill="any"
    ),
    "renormalize_after_drop": lambda a: fr.renormalize_after_drop(a.weights, plan(a)),
    "pass_through": lambda a: fr.pass_through(a.x * 2, a.x, plan(a), a.weights),
    "batch_priority": lambda a: fr.batch_priority(a.weights),
    "drop_counts": lambda a: fr.drop_counts(a.experts, plan(a)),
}


def arguments(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors of a layer of expert width 3; those that can have a gradient ask for it."""
    width = 3
    shapes = {
        "logits": (num_tokens, num_experts),
        "x": (num_tokens, hidden),
        "row": (1, hidden),
        "weights": (num_tokens, top_k),
        "w_up": (num_experts, 2 * width, hidden),
        "w_down": (num_experts, hidden, width),
        "w_row": (num_experts, hidden, width),
        "bias_up": (num_experts, 2 * width),
        "bias_down": (num_experts, hidden),
        "bias_row": (num_experts, width),
    }
    tensors = {
        name: torch.ones(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()
    }
    slots = torch.arange(num_tokens * top_k, dtype=torch.int32).view(num_tokens, top_k)
    offsets = torch.full((num_experts + 1,), num_tokens, dtype=torch.int32)
    offsets[0] = 0
    return {**tensors, "experts": slots % num_experts, "offsets": offsets}


def results_of(name: str, tensors: dict[str, Tensor], **sizes: int) -> list[Tensor]:
    """What a call gives, then its gradients, of all that it is differentiable in."""
    found = tree_leaves(CALLS[name](SimpleNamespace(**tensors, **sizes)))
    results = [t for t in found if t is not None]
    ends = [t for t in results if t.requires_grad]
    if not ends:
        return results
    leaves = [t for t in tensors.values() if t.requires_grad]
    starts = [torch.ones_like(t) for t in ends]
    grads = torch.autograd.grad(ends, leaves, starts, allow_unused=True)
    return results + [t for t in grads if t is not None]


def form(t: Tensor, all_strides: bool) -> tuple[torch.Size, torch.dtype, list[int]]:
    steps = [
        stride if all_strides or (size > 1 and t.numel() > 0) else -1
        for size, stride in zip(t.shape, t.stride(), strict=True)
    ]
    return t.shape, t.dtype, steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_a_fake_gives_what_the_call_gives(name: str, dtype: torch.dtype) -> None:
    all_strides = name.split(",")[0] not in PLAIN
    for num_tokens, num_experts, top_k, hidden in SIZES:
        tensors = arguments(num_tokens, num_experts, top_k, hidden, dtype)
        sizes = {"num_experts": num_experts, "top_k": top_k}
        wanted = results_of(name, tensors, **sizes)
        with FakeTensorMode() as mode:
            fakes = {key: mode.from_tensor(value) for key, value in tensors.items()}
            got = results_of(name, fakes, **sizes)
        assert [form(t, all_strides) for t in got] == [form(t, all_strides) for t in wanted], (
            f"T, E, K, H = {num_tokens, num_experts, top_k, hidden}"
        )


def test_every_function_is_called() -> None:
    assert {name.split(",")[0] for name in CALLS} == set(fr.__all__) - NO_TENSORS
