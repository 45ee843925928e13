"""The experts backend beside eager: every experts class of transformers, frozen routing."""

from __future__ import annotations

import pytest
import torch
from fastmoe_route.integrations.transformers import experts_forward, explain
from fastmoe_route.integrations.transformers.experts import activation_of

from clients.models import E, K, experts_classes, make_experts, routing

CLASSES = sorted(experts_classes())
OWN = {"DeepseekV4Experts", "Glm5NextTextExperts", "HYV4Experts", "Inkling2Experts",
       "MuseSparkExperts"}  # fmt: skip
CLAMPED = {"GptOssExperts", "MiniMaxM3VLExperts", "OpenAIPrivacyFilterExperts"}
LIMIT = 1e-6


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return ((got - want).norm() / want.norm()).item()


def run(module, function, x, index, weights):
    """Output, and gradients of the input, the weights and every parameter."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    module.zero_grad()
    y = function(x, index, weights)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view_as(y))
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, "weights": weights.grad, **grads}


def test_all_the_classes_are_here():
    assert len(CLASSES) >= 65


@pytest.mark.parametrize("name", CLASSES)
def test_equal_to_eager(name):
    module = make_experts(name)
    x, index, weights = routing(37)
    expected = run(module, type(module).forward.__get__(module), x, index, weights)
    module.config._experts_implementation = "fastmoe_route"
    got = run(module, module, x, index, weights)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        error = relative(got[key], value)
        assert error <= LIMIT, f"{key}: {error}"


@pytest.mark.parametrize("name", CLASSES)
def test_activation_is_recognised(name):
    kind = explain(make_experts(name))[""]
    if name in OWN:
        assert kind == "own activation"
    elif name in CLAMPED:
        assert kind == "fused swiglu_clamped" + (", interleaved" if name == "GptOssExperts" else "")
    else:
        assert kind == ("fused relu2" if name == "NemotronHExperts" else "fused swiglu")


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        ("silu", "fused swiglu"),
        ("gelu", "fused geglu"),
        ("relu", "fused reglu"),
        ("gelu_pytorch_tanh", "own activation"),
        ("quick_gelu", "own activation"),
        ("sigmoid", "own activation"),
        ("relu2", "own activation"),
    ],
)
def test_config_activations(act, kind):
    module = make_experts("MixtralExperts", hidden_act=act)
    assert explain(module)[""] == kind
    x, index, weights = routing(20)
    eager = run(module, type(module).forward.__get__(module), x, index, weights)
    module.config._experts_implementation = "fastmoe_route"
    ours = run(module, module, x, index, weights)
    assert all(relative(ours[key], value) <= LIMIT for key, value in eager.items())


def test_other_limits_run_the_module_s_own_gate():
    module = make_experts("GptOssExperts", swiglu_limit=5.0)
    assert explain(module)[""] == "own activation"
    module.limit = 7.0
    assert explain(module)[""] == "fused swiglu_clamped, interleaved"
    x, index, weights = routing(20)
    before = experts_forward(module, x, index, weights)
    module.limit = 0.1
    changed = experts_forward(module, x, index, weights)
    assert relative(changed, before) > 0.1
    assert relative(changed, type(module).forward(module, x, index, weights)) <= LIMIT


def test_a_gate_of_another_gradient_is_not_replaced():
    module = make_experts("MixtralExperts")

    class StraightThrough(torch.nn.SiLU):
        def forward(self, x):
            return x + (torch.nn.functional.silu(x) - x).detach()

    assert activation_of(module) == ("swiglu", False)
    module.act_fn = StraightThrough()
    assert activation_of(module) == ("", False)


class Swish(torch.nn.Module):
    """SiLU as long as its `beta` is 1, a number or a parameter."""

    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


def test_an_activation_that_learns_is_not_replaced():
    module = make_experts("MixtralExperts")
    module.act_fn = Swish(torch.nn.Parameter(torch.ones(())))
    assert explain(module)[""] == "own activation"
    x, index, weights = routing(20)
    eager = run(module, type(module).forward.__get__(module), x, index, weights)
    module.config._experts_implementation = "fastmoe_route"
    ours = run(module, module, x, index, weights)
    assert "act_fn.beta" in eager
    assert all(relative(ours[key], value) <= LIMIT for key, value in eager.items())


def test_a_number_of_the_activation_may_change():
    module = make_experts("MixtralExperts")
    module.act_fn = Swish(1.0)
    assert activation_of(module) == ("swiglu", False)
    module.act_fn.beta = 3.0
    assert activation_of(module) == ("", False)


def test_the_activation_is_found_out_apart_from_what_goes_on():
    x, index, weights = routing(5)
    with torch.device("meta"):
        assert activation_of(make_experts("MixtralExperts").to("meta")) == ("swiglu", False)
    module = make_experts("MixtralExperts")
    both = torch.func.vmap(lambda x: experts_forward(module, x, index, weights))(x[None])
    assert relative(both[0], own_eager(module, x, index, weights)) <= LIMIT
    module = make_experts("MixtralExperts")
    with pytest.raises(NotImplementedError, match=r"moe_mlp: derivatives must be taken by torch"):
        torch.func.grad(lambda x: experts_forward(module, x, index, weights).sum())(x)
    assert activation_of(module) == ("swiglu", False)


@pytest.fixture
def compiled_alone():
    """No graphs of other tests are kept, which would count as recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def own_eager(module, x, index, weights):
    """What eager gives now, also where the module is switched to another backend."""
    implementation = module.config._experts_implementation
    module.config._experts_implementation = "eager"
    y = module(x, index, weights)
    module.config._experts_implementation = implementation
    return y


def gated_by(read):
    """A module, of a class whose eager form asks its gate, that scales gates by `read(module)`."""
    module = make_experts("GptOssExperts")

    class OwnGate(type(module)):
        def _apply_gate(self, rows):
            gate, up = rows.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate * read(self)) * up

    module.__class__ = OwnGate
    return module


def test_a_number_of_the_config_may_change():
    module = gated_by(lambda own: own.config.beta)
    module.config.beta = 1.0
    assert explain(module)[""] == "fused swiglu"
    module.config.beta = 3.0
    assert explain(module)[""] == "own activation"
    x, index, weights = routing(20)
    ours = experts_forward(module, x, index, weights)
    assert relative(ours, own_eager(module, x, index, weights)) <= LIMIT
    module.config.beta = 1.0
    assert explain(module)[""] == "fused swiglu"


def test_a_gate_may_differ_in_training():
    module = gated_by(lambda own: 0.5 if own.training else 1.0)
    x, index, weights = routing(20)
    for mode, kind in ((False, "fused swiglu"), (True, "own activation"), (False, "fused swiglu")):
        module.train(mode)
        assert explain(module)[""] == kind
        ours = experts_forward(module, x, index, weights)
        assert relative(ours, own_eager(module, x, index, weights)) <= LIMIT


def test_a_compiled_module_notices_changes(compiled_alone):
    """Of a limit on the module, a number of its activation, and one of its config."""
    limited = make_experts("GptOssExperts")
    swish = make_experts("MixtralExperts")
    swish.act_fn = Swish(1.0)
    configured = gated_by(lambda own: own.config.beta)
    configured.config.beta = 1.0
    x, index, weights = routing(20)
    for module, owner, name in (
        (limited, limited, "limit"),
        (swish, swish.act_fn, "beta"),
        (configured, configured.config, "beta"),
    ):
        module.config._experts_implementation = "fastmoe_route"
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        before = compiled(x, index, weights)
        assert explain(module)[""].startswith("fused")
        assert relative(before, own_eager(module, x, index, weights)) <= LIMIT
        setattr(owner, name, 0.1)
        after = compiled(x, index, weights)
        assert relative(after, before) > 0.1
        assert relative(after, own_eager(module, x, index, weights)) <= LIMIT


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_compiles_whole(name, compiled_alone):
    module = make_experts(name)
    x, index, weights = routing(11)
    expected = own_eager(module, x, index, weights)
    module.config._experts_implementation = "fastmoe_route"
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert relative(compiled(x, index, weights), expected) <= LIMIT


def eager_on_used_slots(module):
    """Eager, slot by slot without the sentinels, which three of the classes refuse."""

    def function(x, index, weights):
        y = torch.zeros_like(x)
        for j in range(K):
            (used,) = torch.where(index[:, j] < E)
            slot = (x[used], index[used, j : j + 1], weights[used, j : j + 1])
            y = y.index_add(0, used, type(module).forward(module, *slot))
        return y

    return function


@pytest.mark.parametrize("name", CLASSES)
def test_sentinels_of_expert_parallelism_mean_none(name):
    module = make_experts(name)
    x, index, weights = routing(30)
    off = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    index = index.masked_fill(off, E)
    expected = run(module, eager_on_used_slots(module), x, index, weights)
    module.config._experts_implementation = "fastmoe_route"
    got = run(module, module, x, index, weights)
    assert all(relative(got[key], value) <= LIMIT for key, value in expected.items())
    minus = index.masked_fill(off, -1)
    assert torch.equal(experts_forward(module, x, minus, weights), got["output"])


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    module = make_experts("OlmoeExperts")
    x, index, weights = routing(num_tokens)
    y = experts_forward(module, x, index, weights)
    assert y.shape == x.shape
    if num_tokens:
        assert relative(y, type(module).forward(module, x, index, weights)) <= LIMIT


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "MuseSparkExperts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_at_least_as_exact_as_eager(name, dtype):
    module = make_experts(name)
    x, index, weights = routing(50)
    exact = type(module).forward(module.double(), x.double(), index, weights.double())
    module.to(dtype)
    x = x.to(dtype)
    exact = type(module).forward(module.double(), x.double(), index, weights.double())
    module.to(dtype)
    eager = type(module).forward(module, x, index, weights)
    ours = experts_forward(module, x, index, weights)
    assert ours.dtype == dtype
    errors = [(y.double() - exact).norm().item() for y in (ours, eager)]
    assert errors[0] <= 1.1 * errors[1]


def test_autocast_computes_in_its_dtype():
    module = make_experts("MixtralExperts")
    x, index, weights = routing(40)
    with torch.autocast("cpu", torch.bfloat16):
        ours = experts_forward(module, x, index, weights)
        eager = type(module).forward(module, x, index, weights)
    assert ours.dtype == x.dtype
    assert 1e-4 < relative(ours, type(module).forward(module, x, index, weights)) < 2e-2
    assert relative(ours, eager) < 2e-2


def test_wider_hidden_states_are_cast_to_the_weights():
    module = make_experts("MixtralExperts").to(torch.bfloat16)
    x, index, weights = routing(8)
    y = experts_forward(module, x, index, weights)
    assert y.dtype == torch.float32
    expected = experts_forward(module, x.to(torch.bfloat16), index, weights)
    assert torch.equal(y, expected.float())


def test_quantised_weights_are_refused_with_a_way_out():
    module = make_experts("MixtralExperts")
    module.gate_up_proj = torch.nn.Parameter(
        module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False
    )
    x, index, weights = routing(4)
    with pytest.raises(TypeError, match=r"weights of MixtralExperts must share one of float32"):
        experts_forward(module, x, index, weights)
    assert explain(module)[""].startswith("refused: fastmoe_route: the weights of Mixtral")


def test_ids_out_of_range_are_an_error():
    module = make_experts("MixtralExperts")
    x, index, weights = routing(4)
    with pytest.raises(RuntimeError, match=r"plan_dispatch: experts must be in \[-1, 6\], got 7"):
        experts_forward(module, x, index.masked_fill(index == 0, E + 1), weights)
    assert K == 3
