"""Rules that hold for every operator alike: kinds of arguments, and derivatives of higher kinds."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import fastmoe_route as fr
import numpy as np
import pytest
import torch
from fastmoe_route.routers import estimators
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EXPERTS = torch.tensor([[0, 2], [1, 0], [2, 1]], dtype=torch.int32)
PLAN = fr.plan_dispatch(EXPERTS, 3)
W_UP, W_DOWN = torch.ones(3, 4, 6), torch.ones(3, 3, 4)


def mlp(x: Tensor) -> Tensor:
    return fr.moe_mlp(x, (EXPERTS, torch.ones(3, 2)), W_UP, W_DOWN)


FLOAT_OPS: dict[str, Callable[[Tensor], Any]] = {
    "gate": lambda x: fr.gate(x, 2).weights,
    "expert_choice": lambda x: fr.expert_choice(x, 2).weights,
    "softmax": fr.softmax,
    "softmax_topk": lambda x: fr.softmax_topk(x, 2)[0],
    "transport": lambda x: fr.transport(x, "sinkhorn", iters=3),
    "permute": lambda x: fr.permute(x, PLAN),
    "unpermute": lambda x: fr.unpermute(x.repeat(2, 1), PLAN),
    "grouped_mm": lambda x: fr.grouped_mm(x.repeat(2, 1), W_UP, PLAN.offsets),
    "moe_mlp": mlp,
}
TWICE = ("permute", "expert_choice", "grouped_mm")


# ---- derivatives -------------------------------------------------------------------------------


def penalty(op: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """A loss on a gradient, as in gradient penalties: needs the second derivative of `op`."""
    x = torch.arange(12.0).reshape(3, 4).sin().requires_grad_()
    (grad,) = torch.autograd.grad(op(x * scale).square().sum(), x, create_graph=True)
    return grad.square().sum()


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_second_derivative_is_right_or_an_error(name: str) -> None:
    scale = torch.full((), 0.7, requires_grad=True)
    loss = penalty(FLOAT_OPS[name], scale)
    if name not in TWICE:
        with pytest.raises(RuntimeError, match=f"{name}: gradients must be differentiated once"):
            loss.backward()
        return
    loss.backward()
    step = 1e-2
    ends = [penalty(FLOAT_OPS[name], scale.detach() + sign * step) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert abs(scale.grad - slope) <= 1e-2 * abs(slope)


@pytest.mark.parametrize("name", [name for name in FLOAT_OPS if name not in TWICE])
def test_second_derivative_is_an_error_beside_another_way_to_x(name: str) -> None:
    """Asked for the gradient by x alone, the engine visits only what leads there."""
    x = torch.arange(12.0).reshape(3, 4).sin().requires_grad_()
    loss = FLOAT_OPS[name](x).square().sum() + (x**3).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: gradients must be differentiated once"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_a_checkpointed_gradient_may_have_a_graph(name: str) -> None:
    grads = []
    for call in (FLOAT_OPS[name], lambda x: checkpoint(FLOAT_OPS[name], x, use_reentrant=False)):
        x = torch.arange(12.0).reshape(3, 4).sin().requires_grad_()
        grads += torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_a_graph_of_the_gradient_leaves_the_gradient_as_it_is(name: str) -> None:
    grads = []
    for create_graph in (False, True):
        x = torch.arange(12.0).reshape(3, 4).sin().requires_grad_()
        loss = FLOAT_OPS[name](x).square().sum()
        grads += torch.autograd.grad(loss, x, create_graph=create_graph)
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_gradient_through_a_tensor_that_outlived_a_transform(name: str) -> None:
    """torch.func leaves a dead wrapper behind; the gradient must reach what is in it."""
    x = torch.arange(12.0).reshape(3, 4).sin()
    scale = torch.tensor(2.0, requires_grad=True)
    kept = []

    def outer(t: Tensor) -> Tensor:
        kept.append(t * scale)
        return t.sum()

    torch.func.grad(outer)(x)
    grads = [
        torch.autograd.grad(FLOAT_OPS[name](t).square().sum(), scale)[0]
        for t in (kept[0], x * scale)
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_forward_mode_is_an_error_and_never_zero(name: str) -> None:
    x = torch.arange(12.0).reshape(3, 4).sin()
    with (
        pytest.raises(RuntimeError, match="forward mode AD"),
        torch.autograd.forward_ad.dual_level(),
    ):
        FLOAT_OPS[name](torch.autograd.forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match=f"{name}: derivatives must be taken by torch.autograd"):
        torch.func.jvp(FLOAT_OPS[name], (x,), (x,))


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_transforms_of_torch_func_are_refused_by_name(name: str) -> None:
    """`vmap` loops over the operator; derivatives by transforms are an error that says so."""
    x = torch.arange(12.0).view(3, 4).sin()
    with pytest.raises(NotImplementedError, match=f"{name}: derivatives must be taken by"):
        torch.func.grad(lambda t: FLOAT_OPS[name](t).square().sum())(x)


# ---- symbolic sizes ----------------------------------------------------------------------------


def test_capacity_that_follows_the_tokens_compiles_once() -> None:
    def chosen(scores: Tensor) -> Tensor:
        return fr.expert_choice(scores, max(1, scores.shape[0] // 4)).experts

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in range(8, 64, 5):
        scores = torch.arange(4.0 * num_tokens).sin().reshape(num_tokens, 4)
        assert torch.equal(compiled(scores), chosen(scores))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_number_of_tokens_that_only_the_data_tells_compiles() -> None:
    def layer(x: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        x = x[kept]
        routing = fr.gate(x, 2, normalize=True)
        capacity = fr.expert_capacity(x.shape[0], 4, 2, 1.1)
        plan = fr.plan_dispatch(routing.experts, 4, capacity=capacity)
        y = fr.unpermute(fr.permute(x, plan), plan, routing.weights)
        return y, fr.softmax(x, 0), fr.softmax(x.view(-1, 2, 2), 1), fr.softmax_topk(x, 2)[0]

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.arange(48.0).sin().reshape(12, 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for kept in (x[:, 0] > 0, x[:, 0] > 2):  # the second keeps none
            for a, b in zip(compiled(x, kept), layer(x, kept), strict=True):
                assert torch.equal(a, b)


def test_exported_capacity_is_saved_and_loaded() -> None:
    class Dispatch(torch.nn.Module):
        def forward(self, experts: Tensor) -> Tensor:
            capacity = fr.expert_capacity(experts.shape[0], 3, 2, 1.1)
            return fr.plan_dispatch(experts, 3, capacity=capacity).slot_to_row

    num_tokens = torch.export.Dim("num_tokens", min=2, max=100)
    program = torch.export.export(Dispatch(), (EXPERTS,), dynamic_shapes=({0: num_tokens},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for tokens in range(2, 40):
        experts = torch.zeros(tokens, 2, dtype=torch.int32)
        assert torch.equal(loaded(experts), Dispatch()(experts))


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch._mkldnn])
@pytest.mark.parametrize("name", FLOAT_OPS)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_only_dense_tensors(name: str, layout: torch.layout) -> None:
    ops = {
        "unpermute": lambda x: fr.unpermute(x, PLAN),
        "grouped_mm": lambda x: fr.grouped_mm(x, W_UP, PLAN.offsets),
    }
    x = torch.eye(3, 4)
    x = x.to_mkldnn() if layout == torch._mkldnn else x.to_sparse(layout=layout)
    with pytest.raises(
        TypeError, match=rf"{name}: \w+ must be a dense tensor, got layout {layout}"
    ):
        ops.get(name, FLOAT_OPS[name])(x)


LOGITS = torch.arange(12.0).reshape(3, 4)
TRAINED = LOGITS.clone().requires_grad_()
# Strided, as dense tensors are, with 3 and with 2 dimensions.
NESTED = torch.nested.nested_tensor([LOGITS, LOGITS])
NESTED_ROWS = torch.nested.nested_tensor([LOGITS[0], LOGITS[1], LOGITS[2]])
PAIR = (EXPERTS, torch.ones(3, 2))
STRINGS = np.array(["softmax", "auto"])
BAD_CALLS: dict[str, Callable[[], Any]] = {
    "gate: logits must be a dense tensor, got a nested tensor of 2": lambda: fr.gate(NESTED, 2),
    "gate: logits must be a dense tensor, got a nested tensor of 3": (
        lambda: fr.gate(NESTED_ROWS, 2)
    ),
    "gate: bias must be a dense tensor, got a nested tensor of 3": (
        lambda: fr.gate(LOGITS, 2, bias=NESTED_ROWS)
    ),
    "gate: score must be one of softmax, ": lambda: fr.gate(LOGITS, 2, score=STRINGS),
    "gate: softmax_over must be one of all, group, got array(": (
        lambda: fr.gate(LOGITS, 2, softmax_over=STRINGS)
    ),
    "gate: group_score must be one of max, top2_sum, got array(": (
        lambda: fr.gate(LOGITS, 2, group_score=STRINGS)
    ),
    "plan_dispatch: drop_policy must be one of position, score, got array(": (
        lambda: fr.plan_dispatch(EXPERTS, 3, drop_policy=STRINGS)
    ),
    "softmax: method must be one of auto, three_pass, online, two_pass, got array(": (
        lambda: fr.softmax(LOGITS, method=STRINGS)
    ),
    "reroute: fill must be None, 'turned_away' or 'any', got array(": (
        lambda: fr.reroute(PAIR, 3, 1, 1, fill=STRINGS)
    ),
    "softmax: x must be a dense tensor, got a nested tensor of 2": lambda: fr.softmax(NESTED),
    "softmax: x must be float32 or bfloat16 or float16 or float64, got int32": (
        lambda: fr.softmax(torch.zeros(3, 4, dtype=torch.int32, device="meta"))
    ),
    "permute: x must be a dense tensor, got a nested tensor of 2": lambda: fr.permute(NESTED, PLAN),
    "moe_mlp: x must be a dense tensor, got a nested tensor of 2": lambda: mlp(NESTED),
    "moe_mlp: weights must be a dense tensor, got a nested tensor of 3": (
        lambda: fr.moe_mlp(LOGITS, (EXPERTS, NESTED_ROWS), W_UP, W_DOWN)
    ),
    "moe_mlp: w_up must be a dense tensor, got layout torch.sparse_coo": (
        lambda: fr.moe_mlp(LOGITS, PAIR, W_UP.to_sparse(), W_DOWN)
    ),
    # With gradients, where no operator comes first that would refuse them.
    "moe_mlp: weights must be a dense tensor, got a nested": (
        lambda: fr.moe_mlp(TRAINED, (EXPERTS, NESTED_ROWS), W_UP, W_DOWN)
    ),
    "moe_mlp: w_up must be a dense tensor, got layout": (
        lambda: fr.moe_mlp(TRAINED, PAIR, W_UP.to_sparse(), W_DOWN)
    ),
    "moe_mlp: plan.row_to_slot must be a dense tensor, got layout torch.sparse_coo": (
        lambda: fr.moe_mlp(
            *(TRAINED, PAIR, W_UP, W_DOWN),
            plan=PLAN._replace(row_to_slot=PLAN.row_to_slot.to_sparse()),
        )
    ),
    "gate: scale must be a number, got 'a'": lambda: fr.gate(LOGITS, 2, scale="a"),
    "gate: scale must be a number that a float can hold, got nan": (
        lambda: fr.gate(LOGITS, 2, scale=float("nan"))
    ),
    "gate: top_p must be a number that a float can hold, got nan": (
        lambda: fr.gate(LOGITS, 2, top_p=float("nan"))
    ),
    "gate: threshold must be a number that a float can hold, got 1000": (
        lambda: fr.gate(LOGITS, 2, threshold=10**400)
    ),
    "gate: normalize must be a bool, got 'x'": lambda: fr.gate(LOGITS, 2, normalize="x"),
    "gate: stats must be a bool, got 1": lambda: fr.gate(LOGITS, 2, stats=1),
    "gate: noise must have 2 dimensions": lambda: fr.gate(LOGITS, 2, noise=torch.ones(4)),
    "gate: k_per_token must have 1 dimension, got": (
        lambda: fr.gate(LOGITS, 2, k_per_token=EXPERTS)
    ),
    "expert_capacity: factor must be a number that a float can hold, got 1000": (
        lambda: fr.expert_capacity(4, 2, 1, 10**400)
    ),
    "transport: iters must be in [1, 2147483647], got 9223372036854775808": (
        lambda: fr.transport(LOGITS, "bip", iters=2**63)
    ),
    "transport: temperature must be a number, got 'a'": (
        lambda: fr.transport(LOGITS, "sinkhorn", iters=1, temperature="a")
    ),
    "transport: learning_rate must be positive, got 0": (
        lambda: fr.transport(LOGITS, "ksparse", iters=1, learning_rate=0)
    ),
    "moe_mlp: interleaved must be a bool, got 'x'": (
        lambda: fr.moe_mlp(LOGITS, (EXPERTS, torch.ones(3, 2)), W_UP, W_DOWN, interleaved="x")
    ),
    "lora_grouped_mm: scaling must be a number, got 'a'": lambda: fr.lora_grouped_mm(
        LOGITS, W_UP[..., :1], W_UP[:, :1], (EXPERTS, torch.ones(3, 2)), scaling="a"
    ),
    "renormalize_after_drop: weights must be a torch.Tensor, got Routing(int32 tensor of shape": (
        lambda: fr.renormalize_after_drop(fr.gate(LOGITS, 2), PLAN)
    ),
    "plan_placement: experts must be int32 or int64, got float32": (
        lambda: fr.distributed.plan_placement(LOGITS, 4, 2)
    ),
    "routers: name must be a str, got 3": lambda: fr.routers.build(3, 4, 2),
    "renormalize_after_drop: scale must be a number, got 'a'": (
        lambda: fr.renormalize_after_drop(torch.ones(3, 2), PLAN, "a")
    ),
    "renormalize_after_drop: plan.slot_to_row must be a torch.Tensor, got None": (
        lambda: fr.renormalize_after_drop(torch.ones(3, 2), PLAN._replace(slot_to_row=None))
    ),
    "drop_counts: plan.kept must be a torch.Tensor, got None": (
        lambda: fr.drop_counts(EXPERTS, PLAN._replace(kept=None))
    ),
    "dispatch_invariance: scoped must be a bool, got 'no'": (
        lambda: fr.dispatch_invariance(capacity=1, scoped="no")
    ),
    "moe_mlp: plan.row_to_slot must be a torch.Tensor, got [0]": lambda: fr.moe_mlp(
        LOGITS, (EXPERTS, torch.ones(3, 2)), W_UP, W_DOWN, plan=PLAN._replace(row_to_slot=[0])
    ),
    "expert_schedule: total must be an int, got 9.5": (
        lambda: fr.routers.expert_schedule("wave", 4, 9.5)
    ),
    "score_function: reward must have shape ": (
        lambda: estimators.score_function(torch.ones(3), torch.zeros(2))
    ),
    "dense_mixing: scores must have shape ": (
        lambda: estimators.dense_mixing(LOGITS, EXPERTS[:1], torch.ones(1, 2, 4))
    ),
    "rerouted: query must have shape ": (
        lambda: fr.routers.rerouted(torch.ones(2), None, torch.ones(3), torch.ones(5, 2))
    ),
    "LoraExperts.merged_blockwise: weights must have shape ": (
        lambda: fr.adapters.LoraExperts(W_UP, W_UP).merged_blockwise(torch.ones(2, 2))
    ),
    "noisy_sparse_softmax: noise must be a torch.Tensor, got array(": (
        lambda: fr.softmax_variants.noisy_sparse_softmax(LOGITS, 1.0, noise=STRINGS)
    ),
}


# A tensor compares with a number to a tensor, which has no truth value, or is silently equal.
TENSORS = (torch.zeros(()), torch.ones(()), torch.zeros(1, 1), torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["num_groups", "num_null", "min_k", "scale"])
@pytest.mark.parametrize("value", TENSORS, ids=str)
def test_tensors_are_no_numbers(name: str, value: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=rf"^gate: {name} must be an? \w+, got float32 tensor of"):
        fr.gate(LOGITS, 2, **{name: value})
    if name == "scale":
        pair = (EXPERTS, torch.ones(3, 2))
        with pytest.raises(TypeError, match=r"^lora_grouped_mm: scaling must be a number"):
            fr.lora_grouped_mm(LOGITS, W_UP[..., :1], W_UP[:, :1], pair, scaling=value)


def test_whole_numbers_of_any_size_are_scales() -> None:
    pair = (EXPERTS, torch.ones(3, 2))
    for scale in (2**70, -(2**70)):
        whole, real = (
            (
                fr.lora_grouped_mm(LOGITS, W_UP[..., :1], W_UP[:, :1], pair, scaling=number),
                fr.renormalize_after_drop(pair[1], PLAN, number),
                fr.gate(LOGITS, 2, scale=number).weights,
            )
            for number in (scale, float(scale))
        )
        assert all(torch.equal(a, b) for a, b in zip(whole, real, strict=True))


@pytest.mark.parametrize("message", BAD_CALLS)
def test_message(message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        BAD_CALLS[message]()
    assert str(caught.value).startswith(message)


def test_bounds_beyond_int64_are_no_bound() -> None:
    unbounded = fr.gate(LOGITS, 2, num_groups=2)
    bounded = fr.gate(LOGITS, 2, num_groups=2, max_per_group=2**70)
    assert torch.equal(bounded.experts, unbounded.experts)
    assert torch.equal(fr.expert_choice(LOGITS, 2**70).experts, fr.expert_choice(LOGITS, 3).experts)


class Index:
    """Anything that `operator.index` takes."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("number", [np.int64, np.uint8, Index])
def test_integers_are_what_operator_index_takes(number: Callable[[int], Any]) -> None:
    n = number
    groups = fr.gate(
        LOGITS, n(2), num_groups=n(2), topk_groups=n(1), max_per_group=n(1), min_k=n(1)
    )
    assert torch.equal(
        groups.experts,
        fr.gate(LOGITS, 2, num_groups=2, topk_groups=1, max_per_group=1).experts,
    )
    assert torch.equal(
        fr.gate(LOGITS, n(1), num_null=n(1)).experts, fr.gate(LOGITS, 1, num_null=1).experts
    )
    # 3 * 200 slots do not fit into uint8: the product is taken of ints.
    ids = torch.zeros(200, 3, dtype=torch.int32)
    scopes = torch.zeros(200, dtype=torch.int32)
    plan = fr.plan_dispatch(
        *(ids, n(3)), capacity=n(200), align=n(2), scope_ids=scopes, num_scopes=n(1)
    )
    assert torch.equal(plan.kept, torch.tensor([200, 0, 0], dtype=torch.int32))
    assert fr.expert_capacity(n(200), n(2), n(2), 1.0, min_capacity=n(1), multiple_of=n(4)) == 200
    assert fr.softmax(LOGITS, n(1)).shape == LOGITS.shape
    assert fr.softmax_topk(LOGITS, n(2))[1].shape == (LOGITS.shape[0], 2)
    assert fr.expert_choice(LOGITS, n(2), num_scopes=n(1)).experts.shape == LOGITS.shape
    assert fr.transport(LOGITS, "ksparse", iters=n(2), k=n(2)).shape == LOGITS.shape
    layer = fr.nn.MoE(n(8), n(200), n(4), n(2), num_shared_experts=n(2))
    assert layer(torch.zeros(3, 8)).shape == (3, 8)


@pytest.mark.parametrize("value", [2.0, np.float64(2), True, np.True_, "2", torch.tensor(2)])
def test_other_numbers_are_no_integers(value: Any) -> None:
    with pytest.raises(TypeError, match="gate: top_k must be an int, got"):
        fr.gate(LOGITS, value)


def test_numpy_floats_are_numbers() -> None:
    scaled = fr.gate(LOGITS, 2, scale=np.float32(0.5), top_p=np.float64(0.9))
    assert torch.equal(scaled.weights, fr.gate(LOGITS, 2, scale=0.5, top_p=0.9).weights)


# ---- one entry per token -----------------------------------------------------------------------

TAKE_VECTOR: dict[str, Callable[[Tensor], Any]] = {
    "gate: k_per_token": lambda ids: fr.gate(LOGITS, 2, k_per_token=ids),
    "gate: threshold": lambda ids: fr.gate(LOGITS, 2, threshold=ids.float()),
    "plan_dispatch: scope_ids": lambda ids: fr.plan_dispatch(LOGITS.int(), 9, scope_ids=ids),
    "reroute: scope_ids": lambda ids: fr.reroute((LOGITS.int(), LOGITS), 9, 1, 1, scope_ids=ids),
    "drop_counts: scope_ids": lambda ids: fr.drop_counts(EXPERTS, PLAN, scope_ids=ids),
    "expert_choice: scope_ids": lambda ids: fr.expert_choice(LOGITS, 2, scope_ids=ids),
    "transport: scope_ids": lambda ids: fr.transport(LOGITS, "bip", iters=1, scope_ids=ids),
}


@pytest.mark.parametrize("name", TAKE_VECTOR)
def test_vectors_are_dense_and_on_the_device_of_the_call(name: str) -> None:
    ids = torch.zeros(3 if name.startswith("drop") else LOGITS.shape[0], dtype=torch.int32)
    for value, error, rule in (
        (ids.to("meta"), ValueError, "be on cpu, got meta"),
        (ids.to_sparse(), TypeError, "be a dense tensor"),
        (ids[:, None], ValueError, "have 1 dimension"),
    ):
        with pytest.raises(error, match=f"^{name} must {rule}"):
            TAKE_VECTOR[name](value)


def test_ids_without_data_are_checked_too():
    for experts, kind in (
        (torch.zeros(4, dtype=torch.int32, device="meta"), ValueError),
        (torch.zeros(4, 2, device="meta"), TypeError),
    ):
        with pytest.raises(kind, match=r"^plan_dispatch: experts must"):
            fr.plan_dispatch(experts, 3)
    with pytest.raises(ValueError, match=r"^plan_dispatch: num_experts must"):
        fr.plan_dispatch(torch.zeros(4, 2, dtype=torch.int32, device="meta"), 0)
