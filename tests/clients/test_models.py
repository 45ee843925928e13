"""Whole models on the backend: switched live, generating, compiled, exported, trained, adapted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from fastmoe_route.integrations.transformers import explain, register
from torch._dynamo.testing import CompileCounter

from clients.models import MODELS, assert_near, causal_model, experts_modules, tokens

NAME = "fastmoe_route"


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def switched(kind: str, **options):
    """A model of that kind on eager, and the same on this package."""
    eager = causal_model(kind, **options)
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation(NAME)
    return eager, ours


# ---- forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_live_model_gives_equal_logits(kind):
    model, ids = causal_model(kind), tokens()
    expected = logits(model, ids)
    model.set_experts_implementation(NAME)
    assert model.config._experts_implementation == NAME
    assert all(how.startswith("fused") for how in explain(model).values())
    assert explain(model)
    got = logits(model, ids)
    assert not torch.equal(got, torch.zeros_like(got))
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-5
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_name_is_taken_at_construction(kind):
    config = causal_model(kind).config
    options = {"experts_implementation": NAME, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    assert model.config._experts_implementation == NAME


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_generate_gives_the_same_tokens(kind):
    eager, ours = switched(kind)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = eager.generate(tokens(2, 7), **options)
    assert torch.equal(ours.generate(tokens(2, 7), **options), expected)
    assert expected.shape == (2, 19)
    beams = {**options, "num_beams": 3, "max_new_tokens": 6}
    assert torch.equal(ours.generate(tokens(2, 7), **beams), eager.generate(tokens(2, 7), **beams))


def test_left_padded_batch_generates_the_same():
    eager, ours = switched("olmoe")
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


def test_output_router_logits_and_the_auxiliary_loss_stay():
    eager, ours = switched("mixtral")
    options = {"labels": tokens(), "output_router_logits": True}
    expected, got = eager(tokens(), **options), ours(tokens(), **options)
    assert len(got.router_logits) == 2
    assert_near(got.aux_loss, expected.aux_loss)
    assert_near(got.loss, expected.loss)


# ---- compiled and exported ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_compiles_as_one_graph(kind):
    _, model = switched(kind)
    expected = logits(model, tokens())
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    got = logits(compiled, tokens())
    assert counter.frame_count == 1
    assert_near(got, expected)


def test_ten_lengths_do_not_recompile_the_layer():
    _, model = switched("olmoe")
    layer = model.model.layers[0].mlp
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in (5, 6, 7, 11, 17, 23, 31, 40, 64, 100):
            x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(length))
            assert_near(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_own_activation_compiles_too():
    eager = causal_model("mixtral")
    for _, module in experts_modules(eager):
        module.act_fn = torch.nn.Softsign()
    eager.set_experts_implementation(NAME)
    assert set(explain(eager).values()) == {"own activation"}
    expected = logits(eager, tokens())
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, backend="eager")
    assert_near(logits(compiled, tokens()), expected)
    eager.set_experts_implementation("eager")
    assert_near(logits(eager, tokens()), expected, 1e-4, 1e-5)


def test_training_step_compiles_with_inductor():
    _, model = switched("mixtral")
    ids = tokens(2, 8)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True)
    model.model.layers[0].mlp.forward = compiled
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert_near(p.grad, expected[name], 1e-4, 1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_layer_exports_with_a_dynamic_length(strict):
    _, model = switched("mixtral")
    layer = model.model.layers[0].mlp
    length = torch.export.Dim("length", min=2, max=128)
    x = torch.randn(1, 9, 32)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},), strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("fastmoe_route.moe_mlp" in name for name in names)
    other = torch.randn(1, 33, 32)
    assert_near(program.module()(other), layer(other))


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_exported_without_gradients_sets_no_mode(strict):
    """AOTInductor traces a graph that turns them on as if it were to be trained, and fails."""
    _, model = switched("mixtral")
    layer, x = model.model.layers[0].mlp, torch.randn(1, 9, 32)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict)
        assert_near(program.module()(x), layer(x))
    assert not [node for node in program.graph.nodes if "set_grad" in node.name]


def test_whole_model_exports():
    _, model = switched("mixtral")
    options = {"use_cache": False}
    program = torch.export.export(model, (tokens(1, 12),), options, strict=False)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("fastmoe_route.moe_mlp" in name for name in names) == 2
    got = program.module()(tokens(1, 12, seed=4), **options).logits
    assert_near(got, logits(model, tokens(1, 12, seed=4)))


def test_ten_lengths_do_not_recompile_a_whole_model():
    _, model = switched("olmoe")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in (5, 6, 7, 11, 17, 23, 31, 40, 64, 100):
            got = compiled(tokens(2, length), use_cache=False).logits
            expected = model(tokens(2, length), use_cache=False).logits
            assert_near(got, expected)
    assert counter.frame_count == 1


# ---- training ----------------------------------------------------------------------------------


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_gradients_of_a_whole_model(kind):
    eager, ours = switched(kind)
    ids = tokens()
    (loss, expected), (got_loss, got) = gradients(eager, ids), gradients(ours, ids)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for name, value in expected.items():
        error = ((got[name] - value).norm() / value.norm().clamp(min=1e-6)).item()
        assert error <= 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(use_reentrant):
    _, model = switched("mixtral")
    ids = tokens()
    _, expected = gradients(model, ids)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    _, got = gradients(model, ids)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_first_call_may_be_checkpointed(use_reentrant):
    """Experts find out their activation then, which is no part of what is computed again."""
    _, model = switched("mixtral")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert len(gradients(model, tokens())[1]) > 5


def test_autocast_trains():
    """Beside eager under autocast; a flipped expert may change single gradients, not the loss."""
    eager, ours = switched("mixtral")
    losses = []
    for model in (eager, ours):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    for name, p in ours.named_parameters():
        assert p.grad.dtype == torch.float32, name
        assert torch.isfinite(p.grad).all(), name
    layer = ours.model.layers[0].mlp.experts
    assert layer.gate_up_proj.grad.any()


def test_switched_model_pickles():
    _, model = switched("mixtral")
    expected = logits(model, tokens())
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(copied, tokens()), expected)


# ---- adapters ----------------------------------------------------------------------------------


def test_lora_on_router_and_experts_trains_as_on_eager():
    peft = pytest.importorskip("peft")
    eager, ours = switched("mixtral")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    results = []
    for model in (eager, ours):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=[], target_parameters=targets)
        adapted = peft.get_peft_model(model, config)
        names = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert any("experts" in name for name in names)
        assert any("gate" in name and "experts" not in name for name in names)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        results.append(gradients(adapted, tokens()))
    (loss, expected), (got_loss, got) = results
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for name, value in expected.items():
        error = ((got[name] - value).norm() / value.norm().clamp(min=1e-6)).item()
        assert error <= 1e-4, f"{name}: {error}"


# ---- errors ------------------------------------------------------------------------------------


def test_wrong_names_are_refused_by_transformers_with_ours_listed():
    model = causal_model("mixtral")
    with pytest.raises(ValueError, match=NAME):
        model.set_experts_implementation("fastmoe_rout")
    assert model.config._experts_implementation == "eager"


def test_register_registers_all_or_nothing(monkeypatch):
    from fastmoe_route.integrations.transformers import registration
    from transformers.integrations.moe import ExpertsInterface

    assert register() == register() == NAME
    mapping = dict(ExpertsInterface._global_mapping)
    monkeypatch.setattr(ExpertsInterface, "_global_mapping", {})

    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(registration, "import_module", missing)
    with pytest.raises(ImportError, match=r"needs transformers 5\.8 or newer, got 5\.\d+"):
        register()
    assert ExpertsInterface._global_mapping == {}
    assert NAME in mapping
