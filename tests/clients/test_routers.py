"""Router modules on the fused gate: the same experts, weights and losses as transformers' own."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from fastmoe_route.integrations.transformers import patch_routers, unpatch_routers
from fastmoe_route.integrations.transformers.routers import (
    _FORWARDS,
    _answers_alike,
    _minimax_m2,
    _sigmoid_with_bias,
)
from torch import nn

from clients.models import MODELS, Config, assert_near, causal_model, tokens

E, H, K = 8, 24, 3


def find(key: str) -> type[nn.Module] | None:
    module, name = key.rsplit(".", 1)
    return getattr(importlib.import_module(module), name, None)


PLACES = sorted(key for key in _FORWARDS if find(key) is not None)
PATCHED = {**dict.fromkeys(MODELS, 2), "deepseek_v3": 1, "phimoe": 0}


def make_router(key: str) -> nn.Module:
    counts = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
    config = Config(
        **dict.fromkeys(counts, E), num_experts_per_tok=K, moe_topk=K, hidden_size=H,
        norm_topk_prob=True, routed_scaling_factor=2.5, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", router_scaling_factor=1.5,
    )  # fmt: skip
    return find(key)(config)


def test_most_families_are_known():
    assert len(PLACES) >= 45


@pytest.mark.parametrize("key", PLACES, ids=lambda key: key.rsplit(".", 1)[1])
def test_router_class_answers_alike(key):
    router, forward = make_router(key), _FORWARDS[key]
    assert _answers_alike(router, forward)
    if not hasattr(router, "norm_topk_prob"):
        return
    router.norm_topk_prob = False
    assert _answers_alike(router, forward)


def test_the_check_rejects_another_gate():
    router = make_router("transformers.models.olmoe.modeling_olmoe.OlmoeTopKRouter")
    other = _FORWARDS["transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter"]
    router.topk_method, router.routed_scaling_factor = "greedy", 1.0
    assert not _answers_alike(router, other)


@pytest.mark.parametrize("kind", MODELS)
def test_patched_model_is_equal(kind):
    plain = causal_model(kind, "fastmoe_route")
    patched = copy.deepcopy(plain)
    names = patch_routers(patched)
    assert len(names) == PATCHED[kind]
    with torch.no_grad():
        expected, got = plain(tokens()).logits, patched(tokens()).logits
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-5
    assert unpatch_routers(patched) == names
    with torch.no_grad():
        assert torch.equal(patched(tokens()).logits, expected)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_auxiliary_loss_and_gradients_stay(kind):
    plain = causal_model(kind, "fastmoe_route")
    patched = copy.deepcopy(plain)
    patch_routers(patched)
    results = []
    for model in (plain, patched):
        out = model(tokens(), labels=tokens(), output_router_logits=True)
        (out.loss + out.aux_loss).backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (expected, grads), (got, got_grads) = results
    assert all(
        torch.equal(a, b)
        for a, b in zip(got.router_logits[:1], expected.router_logits[:1], strict=True)
    )
    assert_near(got.aux_loss, expected.aux_loss)
    for name, value in grads.items():
        error = ((got_grads[name] - value).norm() / value.norm().clamp(min=1e-6)).item()
        assert error <= 1e-4, name


def test_patched_model_compiles_generates_and_pickles():
    model = causal_model("mixtral", "fastmoe_route")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(), **options)
    patch_routers(model)
    assert torch.equal(model.generate(tokens(), **options), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model)).generate(tokens(), **options), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(compiled(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", ["deepseek_v3", "minimax_m2", "qwen3_moe"])
def test_patched_model_exports_with_a_dynamic_length(kind):
    model = causal_model(kind, "fastmoe_route")
    patch_routers(model)
    length = torch.export.Dim("length", min=2, max=60)
    shapes = {"input_ids": {1: length}, "use_cache": None}
    options = {"use_cache": False}
    program = torch.export.export(
        model, (tokens(1, 12),), options, dynamic_shapes=shapes, strict=False
    )
    for count in (6, 8, 23):
        ids = tokens(1, count, seed=2)
        with torch.no_grad():
            assert_near(program.module()(ids, **options).logits, model(ids, **options).logits)


def test_a_subclass_with_its_own_forward_is_left_alone():
    model = causal_model("mixtral")
    for layer in model.model.layers:
        router = layer.mlp.gate

        class Custom(type(router)):
            def forward(self, hidden_states):
                return super().forward(hidden_states * 2)

        router.__class__ = Custom
    assert patch_routers(model) == []


@pytest.mark.parametrize("order", ["offloaded first", "patched first"])
def test_hooks_of_accelerate_stay(order):
    """They replace `forward` by one that loads weights: without them a router reads garbage."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = causal_model("mixtral", "fastmoe_route")
    gates = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    with torch.no_grad():
        expected = model(tokens()).logits
        if order == "patched first":
            assert patch_routers(model) == gates
        for name in gates:
            hook = hooks.AlignDevicesHook("cpu", offload=True)
            hooks.add_hook_to_module(model.get_submodule(name), hook)
        assert model.get_submodule(gates[0]).weight.is_meta
        assert patch_routers(model) == gates
        assert_near(model(tokens()).logits, expected)
        assert unpatch_routers(model) == gates
        assert unpatch_routers(model) == []
        assert torch.equal(model(tokens()).logits, expected)
    hooks.remove_hook_from_module(model, recurse=True)
    assert patch_routers(model) == gates


def test_a_forward_that_something_else_has_set_is_left_alone():
    model = causal_model("mixtral")
    router = model.model.layers[0].mlp.gate
    own = router.forward
    router.forward = lambda hidden_states: own(hidden_states * 2)
    with torch.no_grad():
        expected = model(tokens()).logits
        assert patch_routers(model) == ["model.layers.1.mlp.gate"]
        assert_near(model(tokens()).logits, expected)
    assert unpatch_routers(model) == ["model.layers.1.mlp.gate"]


def test_models_made_later_are_patched_by_class():
    from transformers.monkey_patching import clear_patch_mapping

    names = patch_routers()
    try:
        assert "MixtralTopKRouter" in names
        model = causal_model("mixtral")
        router = model.model.layers[0].mlp.gate
        assert type(router).forward in set(_FORWARDS.values())
        assert not any(f in (_minimax_m2, _sigmoid_with_bias) for f in [type(router).forward])
        out = model(tokens(), labels=tokens(), output_router_logits=True)
        assert len(out.router_logits) == 2
    finally:
        clear_patch_mapping()
    plain = causal_model("mixtral")
    expected = plain(tokens(), labels=tokens(), output_router_logits=True)
    assert_near(out.aux_loss, expected.aux_loss)
    assert_near(out.logits, expected.logits, 1e-4, 1e-5)
