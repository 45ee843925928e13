"""The layer: what it computes, trains, records, compiles, and how its weights come and go."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import fastmoe_route as fr
import pytest
import torch
import torch.nn.functional as F
from deferred import assert_alike, deferred, draw
from fastmoe_route import reference, routers
from fastmoe_route.integrations.transformers import explain, patch_routers, unpatch_routers
from fastmoe_route.moe_mlp import ACTIVATIONS, GATED_ACTIVATIONS
from functorch.compile import default_partition, nop
from router_cases import ARGUMENTS, EXPERTS, HIDDEN, inputs, names
from tolerance import assert_bound, assert_exact, assert_has_power
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensorMode

H, WIDTH, E, K = 16, 12, 6, 2


def layer_of(**options) -> fr.nn.MoE:
    torch.manual_seed(0)
    return fr.nn.MoE(H, WIDTH, E, K, **options)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(seed))


def plain_layer(layer: fr.nn.MoE, x: torch.Tensor) -> torch.Tensor:
    """The default layer in float64, expert by expert."""
    x = x.double().reshape(-1, H)
    logits = x @ layer.router.score.weight.double().t()
    weights, chosen = logits.softmax(-1).topk(K, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(K):
            e = chosen[t, j]
            up = layer.experts.w_up[e].double() @ x[t]
            if layer.experts.bias_up is not None:
                up = up + layer.experts.bias_up[e].double()
            act = F.silu(up[:WIDTH]) * up[WIDTH:]
            out = layer.experts.w_down[e].double() @ act
            if layer.experts.bias_down is not None:
                out = out + layer.experts.bias_down[e].double()
            y[t] += weights[t, j] * out
    return y


# ---- literals ----------------------------------------------------------------------------------


def test_two_experts_by_hand():
    layer = fr.nn.MoE(2, 2, 2, 1, activation="relu")
    with torch.no_grad():
        layer.router.score.weight.copy_(torch.eye(2) * 50)
        layer.experts.w_up.copy_(torch.eye(2).expand(2, 2, 2))
        layer.experts.w_down.copy_(torch.stack([torch.eye(2), 10 * torch.eye(2)]))
    y = layer(torch.tensor([[[1.0, -2.0], [-1.0, 3.0]]]))
    assert_exact(y, torch.tensor([[[1.0, 0.0], [0.0, 30.0]]]))


# ---- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_default_layer_beside_a_float64_loop(bias):
    layer = layer_of(bias=bias)
    if bias:
        with torch.no_grad():
            layer.experts.bias_up.normal_()
            layer.experts.bias_down.normal_()
    x = tokens(3, 5)
    expected = plain_layer(layer, x).view(3, 5, H)
    limit = 1e-5 * expected.abs().amax()
    assert_bound(layer(x), expected, limit)
    assert_has_power(lambda y: assert_bound(y, expected.view(-1, H), limit), layer(x).view(-1, H))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_goes_through_the_reference(activation):
    layer = layer_of(activation=activation)
    x = tokens(9)
    routed = layer.router(x)
    tensors = layer.experts.tensors()
    expected = reference.moe_mlp(
        x, routed.routing, tensors.w_up, tensors.w_down, activation=activation
    )
    assert_bound(layer(x), expected, 1e-5 * expected.abs().amax())
    assert layer.experts.w_up.shape[1] == WIDTH * (2 if activation in GATED_ACTIVATIONS else 1)


def test_shared_experts_are_one_dense_network():
    layer = layer_of(num_shared_experts=2)
    x = tokens(7)
    routed_only = copy.deepcopy(layer)
    routed_only.shared = None
    up = x @ layer.shared.w_up[0].t()
    dense = (F.silu(up[:, : 2 * WIDTH]) * up[:, 2 * WIDTH :]) @ layer.shared.w_down[0].t()
    assert_bound(layer(x), (routed_only(x) + dense).double(), 1e-5)
    assert layer.shared.w_down.shape == (1, H, 2 * WIDTH)


def test_shared_gate_weighs_them():
    layer = layer_of(num_shared_experts=1, shared_gate=True)
    x = tokens(5)
    with_gate = layer.apply_shared(x)
    weight = torch.sigmoid(x @ layer.shared_gate.weight.t())
    layer.shared_gate = None
    assert_bound(with_gate, (weight * layer.apply_shared(x)).double(), 1e-5)


def test_shared_gate_gives_a_token_the_same_bits_in_any_batch():
    layer = layer_of(num_shared_experts=1, shared_gate=True).eval()
    x = tokens(37)
    y = layer(x)
    for t in range(37):
        assert_exact(layer(x[t : t + 1]), y[t : t + 1])


@pytest.mark.parametrize("name", ["switch", "deepseek_v3", "topk_softmax"])
def test_router_by_name_and_as_a_module(name):
    by_name = layer_of(router=name).eval()
    made = layer_of(router=copy.deepcopy(by_name.router)).eval()
    made.load_state_dict(by_name.state_dict())
    assert by_name.router.name == name
    assert_exact(made(tokens(6)), by_name(tokens(6)))


@pytest.mark.parametrize("name", names())
def test_every_published_router_by_name(name):
    """Trains, with a gradient for the input and finite ones elsewhere, and evaluates."""
    options = dict(ARGUMENTS.get(name, {}))
    top_k = options.pop("top_k", None)
    torch.manual_seed(0)
    layer = fr.nn.MoE(HIDDEN, WIDTH, EXPERTS, top_k, router=name, router_options=options)
    given = inputs()
    x = given.pop("x").requires_grad_()
    del given["experts"]
    y, routed = layer.train()(x, return_routed=True, **given)
    (y.square().mean() + routed.aux_loss).backward()
    grads = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert bool((x.grad != 0).any())
    assert routers.update(layer) == 1
    assert layer.eval()(x.detach(), **given).shape == x.shape


class OwnRouter(torch.nn.Module):
    """A user's module: first choices only, with or without a plan."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.score = torch.nn.Linear(H, E)
        self.form = form

    def forward(self, x):
        routing = fr.gate(self.score(x), 1)
        plan = fr.plan_dispatch(routing.experts, E, capacity=1)
        return {
            "routing": routing,
            "pair": (routing, plan),
            "routed": routers.Routed(routing, {"mine": routing.weights.mean()}, plan),
            "tensor": x,
        }[self.form]


@pytest.mark.parametrize("form", ["routing", "pair", "routed"])
def test_a_router_of_one_s_own(form):
    router = OwnRouter(form)
    layer = layer_of(router=router)
    x = tokens(9)
    routing = fr.gate(router.score(x), 1)
    plan = None if form == "routing" else fr.plan_dispatch(routing.experts, E, capacity=1)
    assert_exact(layer(x), layer.experts(x, routing, plan))
    assert (float(layer.aux_loss.detach()) != 0) == (form == "routed")
    assert (layer.stats.dropped is not None) == (form != "routing")
    layer(x).sum().backward()
    assert router.score.weight.grad.any()
    assert any(p is router.score.weight for p in layer.parameters())


def test_a_router_that_returns_something_else_is_named():
    with pytest.raises(
        TypeError, match=r"MoE: router must return a Routing, a pair .*, got Tensor"
    ):
        layer_of(router=OwnRouter("tensor"))(tokens(3))


def test_top_k_of_a_router_of_one_s_own():
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 6\], got 0"):
        fr.nn.MoE(H, WIDTH, E, 0, router=OwnRouter("routing"))


def test_context_reaches_the_router_flat():
    seen = {}

    class Spy(routers.TopkSoftmax):
        def route(self, x, context):
            seen.update(ids=context.token_ids, experts=context.experts)
            return super().route(x, context)

    layer = layer_of(router=Spy(H, E, K))
    ids = torch.arange(6).view(2, 3)
    layer(tokens(2, 3), token_ids=ids)
    assert_exact(seen["ids"], ids.flatten())
    assert_exact(seen["experts"].w_up, layer.experts.w_up.transpose(1, 2))


# ---- capacity, losses, statistics --------------------------------------------------------------


def test_capacity_drops_in_training_only_and_is_counted():
    layer = layer_of(capacity_factor=0.5)
    x = tokens(12)
    y = layer(x)
    assert int(layer.stats.dropped.sum()) > 0
    assert int(layer.stats.demand.sum()) == 12 * K
    assert not torch.equal(y, layer.eval()(x))
    both = layer_of(capacity_factor=0.5, eval_capacity_factor=0.5)
    both.load_state_dict(layer.state_dict())
    assert_bound(both(x), both.eval()(x).double().detach(), 1e-6)


def test_losses_are_recorded_in_training_with_their_gradient():
    layer = layer_of(router_options={"aux_coef": 0.5, "z_coef": 0.1})
    model = torch.nn.Sequential(layer, torch.nn.Linear(H, H), layer_of())
    assert float(fr.nn.aux_loss(model)) == 0
    model(tokens(10))
    total = fr.nn.aux_loss(model)
    assert_bound(total, (layer.aux_loss + model[2].aux_loss).double().detach(), 1e-7)
    assert set(layer.stats.losses) == {"balance", "z"}
    routing = layer.router(tokens(10)).routing
    assert_bound(layer.stats.losses["balance"], 0.5 * fr.losses.load_balancing(routing), 1e-7)
    layer.aux_loss.backward()
    assert layer.router.score.weight.grad.abs().sum() > 0
    assert layer.experts.w_up.grad is None
    before = layer.aux_loss
    layer.eval()(tokens(4))
    assert layer.aux_loss is before


def test_routed_is_returned_on_request():
    layer = layer_of().eval()
    y, routed = layer(tokens(2, 4), return_routed=True)
    assert y.shape == (2, 4, H)
    assert routed.routing.experts.shape == (8, K)
    assert layer.stats is None


def test_copies_and_pickles_after_a_training_step():
    layer = layer_of()
    y = layer(tokens(5))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.aux_loss is None
        assert_exact(twin(tokens(5)), y)
    assert layer.aux_loss is not None


# ---- gradients ---------------------------------------------------------------------------------


def test_gradcheck_of_the_whole_layer():
    layer = layer_of(num_shared_experts=1, shared_gate=True).double()
    x = tokens(4).double().requires_grad_()
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    values = tuple(p.detach().requires_grad_() for p in parameters.values())
    torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def test_checkpointing_and_autocast_train():
    from torch.utils.checkpoint import checkpoint

    layer, x = layer_of(), tokens(6)
    (layer(x).sum() + fr.nn.aux_loss(layer)).backward()
    expected, of_router = layer.experts.w_up.grad.clone(), layer.router.score.weight.grad.clone()
    layer.zero_grad()
    (checkpoint(layer, x, use_reentrant=False).sum() + fr.nn.aux_loss(layer)).backward()
    assert_exact(layer.experts.w_up.grad, expected)
    assert_exact(layer.router.score.weight.grad, of_router)
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert layer.experts.w_up.grad.dtype == torch.float32
    error = (layer.experts.w_up.grad - expected).norm() / expected.norm()
    assert error < 0.05


def layer_with(name, **options):
    """A layer with this router, by name."""
    arguments = dict(ARGUMENTS.get(name, {}))
    top_k = arguments.pop("top_k", None)
    options = {"router": name, "router_options": arguments, **options}
    return fr.nn.MoE(HIDDEN, WIDTH, EXPERTS, top_k, **options)


def layer_inputs():
    """Hidden states, and what else a layer with any router may be given."""
    given = inputs()
    del given["experts"]
    return given.pop("x"), given


@pytest.mark.parametrize("name", names())
def test_autocast_and_meta_with_every_router(name):
    """The result has autocast's dtype; on the meta device a call tells the shape of its result."""
    layer, (x, given) = layer_with(name), layer_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.eval()(x, **given)
    assert y.dtype == torch.bfloat16
    assert bool(y.isfinite().all())
    given = {key: v.to("meta") if torch.is_tensor(v) else v for key, v in given.items()}
    assert layer.to("meta")(x.to("meta"), **given).shape == x.shape
    # There is no value to wait for there, so a step of training waits for none.
    (layer.train()(x.to("meta"), **given).sum() + fr.nn.aux_loss(layer)).backward()
    assert routers.update(layer) == 1


@pytest.mark.parametrize("name", names())
def test_a_layer_with_any_router_is_made_without_memory(name):
    """On the meta device, then filled from a checkpoint: how large models are loaded."""
    filled, layer = layer_with(name).eval(), layer_with(name, device="meta").eval()
    layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
    x, given = layer_inputs()
    assert_exact(layer(x, **given), filled(x, **given))


@pytest.mark.parametrize("name", names())
def test_weights_are_drawn_later_with_any_router(name):
    """On the meta device first, then by `reset_parameters`, as FSDP makes large models."""

    def make():
        return layer_with(name, bias=True, num_shared_experts=1, shared_gate=True)

    torch.manual_seed(0)
    layer = make()
    if name in ("hyper_router", "vqmoe"):  # their constructors draw in another order
        draw(layer)
    later = deferred(make)
    assert_alike(later, layer)
    x, given = layer_inputs()
    assert_exact(later.eval()(x, **given), layer.eval()(x, **given))
    later.train()(x, **given).sum().backward()
    routers.update(later)
    assert_alike(draw(later), layer)


META = """
import sys, torch, fastmoe_route as fr
from router_cases import ARGUMENTS, names
with torch.device("meta"):
    for name in {*names()} - {"stable_moe"}:  # torch's own embedding imports it
        fr.routers.build(name, 16, 8, **ARGUMENTS.get(name, {}))
    fr.nn.MoE(16, 8, 4, num_shared_experts=1, shared_gate=True, bias=True)
    fr.adapters.QueryableLora(16, 8)
    fr.adapters.MixtureOfShards(16, 8, 2)
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
"""


def test_the_meta_device_needs_no_compiler():
    """Importing it takes longer than making a large model there."""
    subprocess.run([sys.executable, "-c", META], check=True, cwd=Path(__file__).parent)


@pytest.mark.parametrize("name", names())
def test_fake_tensors_pass_every_router(name):
    """A dry run without values, as `torch.compile` and planners of memory make it."""
    layer, (x, given) = layer_with(name).eval(), layer_inputs()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in given.items()}
        assert layer(mode.from_tensor(x), **fake).shape == x.shape


# ---- registration ------------------------------------------------------------------------------


def test_layer_compiles_as_one_graph_without_recompiling():
    from torch._dynamo.testing import CompileCounter

    layer = layer_of(num_shared_experts=1, capacity_factor=1.0, eval_capacity_factor=1.0)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for length in (3, 4, 9, 17, 30):
        y = compiled(tokens(2, length))
        y.sum().backward()
        assert_bound(y, layer(tokens(2, length)).double().detach(), 1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("router", ["deepseek_v3", "tutel"])
def test_a_layer_without_losses_compiles_in_training(router):
    """Dynamo took the empty `values()` of its losses for true and unpacked nothing."""
    layer, x = fr.nn.MoE(16, 8, 4, 2, router=router).train(), torch.randn(2, 6, 16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    assert layer.aux_loss.item() == 0


def test_a_training_step_survives_the_passes_of_inductor():
    """They take away additions of 0 and copies, which may make two results one tensor."""

    def partition(graph, inputs, **options):
        joint_graph_passes(graph)
        return default_partition(graph, inputs, **options)

    grads = []
    backend = aot_autograd(
        fw_compiler=nop, partition_fn=partition, decompositions=select_decomp_table()
    )
    for compiled in (False, True):
        layer, x = layer_of(), tokens(6).requires_grad_()
        torch._dynamo.reset()
        y = (torch.compile(layer, fullgraph=True, backend=backend) if compiled else layer)(x)
        (y.sum() + fr.nn.aux_loss(layer)).backward()
        grads.append((x.grad, layer.router.score.weight.grad, layer.stats.losses["balance"]))
    for plain, traced in zip(*grads, strict=True):
        assert_bound(traced, plain.double(), 1e-6)


def test_layer_exports_in_eval():
    layer = layer_of().eval()
    length = torch.export.Dim("length", min=2, max=64)
    x = tokens(1, 5)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    assert_bound(program.module()(tokens(1, 20)), layer(tokens(1, 20)).double().detach(), 1e-6)


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (2, 3, 4)])
def test_leading_shapes(shape):
    layer = layer_of(num_shared_experts=1)
    y = layer(tokens(*shape))
    assert y.shape == (*shape, H)
    y.sum().backward()
    assert torch.isfinite(layer.experts.w_up.grad).all()


def test_initial_scale_keeps_the_size_of_activations():
    torch.manual_seed(0)
    layer = fr.nn.MoE(256, 512, 8, 2)
    x = torch.randn(64, 256)
    assert 0.1 < layer(x).std() < 1.0
    assert layer.experts.w_up.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert layer.experts.w_down.std().item() == pytest.approx(512**-0.5, rel=0.02)
    small = fr.nn.Experts(64, 64, 4, init_std=0.02, bias=True)
    assert small.w_down.std().item() == pytest.approx(0.02, rel=0.05)
    assert not small.bias_up.any()


def test_meta_device_and_dtype():
    layer = layer_of(device="meta", dtype=torch.bfloat16, num_shared_experts=1)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    real = layer.to_empty(device="cpu")
    assert real.experts.w_up.dtype == torch.bfloat16
    assert real.router.score.weight.dtype == torch.float32
    half = layer_of(dtype=torch.bfloat16)
    assert half(tokens(3).bfloat16()).dtype == torch.bfloat16


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_concatenated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_layouts_round_trip(is_transposed, is_concatenated, bias):
    layer = layer_of(bias=bias)
    layout = {"is_transposed": is_transposed, "is_concatenated": is_concatenated}
    tensors = layer.to_experts(**layout)
    up = (E, H, 2 * WIDTH) if is_transposed else (E, 2 * WIDTH, H)
    assert tensors["gate_up_proj"].shape == up
    assert ("down_proj_bias" in tensors) == bias
    weight = layer.router.score.weight.detach()
    twin = fr.nn.MoE.from_experts(tensors, K, router_weight=weight, **layout)
    assert_exact(twin(tokens(5)), layer(tokens(5)))


def test_interleaved_rows_alternate():
    tensors = layer_of().to_experts(is_concatenated=False)
    halves = layer_of().to_experts()["gate_up_proj"]
    assert_exact(tensors["gate_up_proj"][:, 0], halves[:, 0], stride=False)
    assert_exact(tensors["gate_up_proj"][:, 1], halves[:, WIDTH], stride=False)


@pytest.mark.parametrize("layout", ["gate_proj", "w1"])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_per_expert_layouts_round_trip(layout, activation):
    layer = layer_of(activation=activation)
    tensors = layer.to_experts(layout)
    assert tensors[f"3.{ {'gate_proj': 'down_proj', 'w1': 'w2'}[layout] }.weight"].shape == (
        H,
        WIDTH,
    )
    twin = fr.nn.MoE.from_experts(tensors, K, activation=activation)
    twin.router.load_state_dict(layer.router.state_dict())
    assert_exact(twin(tokens(5)), layer(tokens(5)))


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, "Experts: activation must be one of swiglu"),
        ({"router": "swich"}, r"must be a method of .*switch"),
        ({"router": 3}, "router must be a name, a fastmoe_route.routers.Router, or a function"),
        ({"router": routers.Switch(H, E + 1)}, "router must have num_experts 6, got 7"),
        ({"router": routers.Switch(H, E, 1)}, "top_k must be None or the router's 1, got 2"),
        ({"num_shared_experts": -1}, "num_shared_experts must be at least 0, got -1"),
        ({"shared_gate": True}, "shared_gate must be False without shared experts"),
        ({"capacity_factor": -1.0}, "capacity_factor must be positive"),
        ({"capacity_factor": "1"}, "capacity_factor must be a number or None, got '1'"),
        ({"router_options": {"aux_coef": "1"}}, "aux_coef must be a number, got '1'"),
        ({"router_options": {"jitters": 3}}, "jitters must be an argument of the method, got 3"),
        ({"router_options": 3}, "MoE: router_options must be a mapping of arguments .*, got 3"),
        ({"bias": 3}, "Experts: bias must be a bool, got 3"),
        ({"shared_gate": 1}, "MoE: shared_gate must be a bool, got 1"),
        ({"dtype": torch.int32}, "dtype must be a floating-point dtype or None, got torch.int32"),
        ({"init_std": -1.0}, r"init_std must be finite and at least 0, got -1\.0"),
        (
            {"router": routers.Switch(H, E, K), "capacity_factor": 1.0},
            "router_options must be None",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        layer_of(**options)


def test_functions_of_models_want_a_module():
    for function in (fr.nn.aux_loss, routers.update, patch_routers, unpatch_routers, explain):
        with pytest.raises(
            TypeError, match=f"{function.__name__}: model must be a torch.nn.Module"
        ):
            function(3)


def test_bad_inputs_and_weights():
    with pytest.raises(ValueError, match=r"MoE: x must have shape \[any, 16\], got .* \[3, 15\]"):
        layer_of()(torch.zeros(3, 15))
    stacked = layer_of().to_experts()
    for name, wrong, message in (
        ("down_proj", torch.zeros(H, WIDTH), "down_proj must have 3 dimensions"),
        ("gate_up_proj", torch.zeros(E, 26, H), r"up projection must have shape \[6, 24, 16\]"),
        ("down_proj", torch.zeros(E + 1, H, WIDTH), r"up projection must have shape \[7, 24, 16\]"),
        ("gate_up_proj_bias", torch.zeros(E, WIDTH), "bias of the up projection must have shape"),
        ("down_proj", [1.0], r"source\['down_proj'\] must be a torch.Tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"from_experts: {message}"):
            fr.nn.MoE.from_experts({**stacked, name: wrong}, K)
    with pytest.raises(ValueError, match="from_experts: activation must be one of"):
        fr.nn.MoE.from_experts(stacked, K, activation="swish")
    with pytest.raises(ValueError, match="source must hold gate_up_proj for swiglu"):
        fr.nn.MoE.from_experts({"down_proj": torch.zeros(2, 4, 3)})
    tensors = layer_of().to_experts("w1")
    with pytest.raises(ValueError, match=r"from_experts: 2\.w1\.weight must have shape"):
        fr.nn.MoE.from_experts({**tensors, "2.w1.weight": torch.zeros(WIDTH, H + 1)})
    del tensors["1.w3.weight"]
    with pytest.raises(ValueError, match=r"source must hold 1\.w3\.weight"):
        fr.nn.MoE.from_experts(tensors)
    with pytest.raises(ValueError, match="layout must be one of stacked"):
        layer_of().to_experts("fused")
    with pytest.raises(ValueError, match="layout must be stacked for experts with biases"):
        layer_of(bias=True).to_experts("w1")
    for source in (torch.nn.Linear(2, 2), 3):
        with pytest.raises(TypeError, match="source must be an experts module"):
            fr.nn.MoE.from_experts(source)
