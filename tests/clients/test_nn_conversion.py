"""`fr.nn.MoE` takes over the experts of transformers modules, and gives them back."""

from __future__ import annotations

import fastmoe_route as fr
import pytest
import torch

from clients.models import K, experts_classes, make_experts, routing

NATIVE = ["AriaExperts", "GptOssExperts", "MixtralExperts", "NemotronHExperts",
          "OpenAIPrivacyFilterExperts", "Qwen3MoeExperts"]  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_from_a_module_and_back(name):
    module = make_experts(name)
    x, index, weights = routing(15)
    layer = fr.nn.MoE.from_experts(module, K)
    y = layer.experts(x, (index, weights))
    expected = type(module).forward(module, x, index, weights)
    assert ((y - expected).norm() / expected.norm()).item() <= 1e-6
    tensors = layer.to_experts(
        is_transposed=module.is_transposed, is_concatenated=module.is_concatenated
    )
    other = make_experts(name)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    other.load_state_dict(tensors)
    for key, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_an_activation_of_its_own_is_refused():
    assert "DeepseekV4Experts" in experts_classes()
    with pytest.raises(ValueError, match="source must compute an activation of moe_mlp, got Deep"):
        fr.nn.MoE.from_experts(make_experts("DeepseekV4Experts"), K)
