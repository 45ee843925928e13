"""`kernelize` of Hugging Face kernels finds the package's layers, and gives equal results.

transformers gives its layers their names only beside the release of kernels that it asks for; where
another is installed, the tests give them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from fastmoe_route.integrations.kernels import LayerRepository, mapping

from clients.models import causal_model, tokens

kernels = pytest.importorskip("kernels")


@pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE"])
def test_gpt_oss_layers_are_replaced(mode):
    plain = causal_model("gpt_oss")
    block = type(plain.model.layers[0].mlp)
    if not hasattr(block, "kernel_layer_name"):
        kernels.replace_kernel_forward_from_hub(block, "MegaBlocksMoeMLP")
    model = copy.deepcopy(plain)
    only = {"MegaBlocksMoeMLP": mapping()["MegaBlocksMoeMLP"]}
    modes = getattr(kernels.Mode, mode) | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(only, inherit_mapping=False):
        model = kernels.kernelize(model, mode=modes, device="cpu", use_fallback=True)
    layer = LayerRepository("MegaBlocksMoeMLP").load()
    assert model.model.layers[0].mlp.forward.__func__ is layer.forward
    with torch.no_grad():
        expected, got = plain(tokens()).logits, model(tokens()).logits
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-5
    results = []
    for each in (plain, model):
        each(tokens(), labels=tokens()).loss.backward()
        results.append(each.model.layers[0].mlp.experts.gate_up_proj.grad)
    assert ((results[1] - results[0]).norm() / results[0].norm()).item() <= 1e-4


def test_any_experts_class_can_take_part():
    model = causal_model("olmoe")
    experts = type(model.model.layers[0].mlp.experts)
    with torch.no_grad():
        expected = model(tokens()).logits
    kernels.replace_kernel_forward_from_hub(experts, "FastMoeRouteExperts")
    try:
        with kernels.use_kernel_mapping(mapping(), inherit_mapping=False):
            model = kernels.kernelize(
                model, mode=kernels.Mode.INFERENCE, device="cpu", use_fallback=True
            )
        forward = model.model.layers[0].mlp.experts.forward
        assert forward.__func__ is LayerRepository("FastMoeRouteExperts").load().forward
        with torch.no_grad():
            got = model(tokens()).logits
        assert ((got - expected).norm() / expected.norm()).item() <= 1e-5
    finally:
        del experts.kernel_layer_name, experts.kernel_condition


def test_repositories_are_known_by_name():
    assert LayerRepository("MegaBlocksMoeMLP") == LayerRepository("MegaBlocksMoeMLP")
    assert LayerRepository("MegaBlocksMoeMLP") != LayerRepository("FastMoeRouteExperts")
    assert len({LayerRepository(name) for name in (*mapping(), *mapping())}) == 2
    with pytest.raises(ValueError, match="layer_name must be one of FastMoeRouteExperts"):
        LayerRepository("MoE")
