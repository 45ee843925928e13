"""Tiny random models, and every experts class of transformers on its own."""

from __future__ import annotations

import ast
import functools
import importlib
import types
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tolerance import assert_bound, assert_has_power
from torch import Tensor, nn

E, H, WIDTH, K = 6, 32, 24, 3


def assert_near(
    got: Tensor, expected: Tensor, relative: float = 1e-5, absolute: float = 1e-6
) -> None:
    """Every element of a whole model's answer within `absolute + relative * |expected|`."""
    assert got.shape == expected.shape
    if got.dim() > 1:
        got, expected = (t.detach().reshape(-1, t.shape[-1]) for t in (got, expected))
    wanted = expected.detach().double()

    def check(value: Tensor) -> None:
        assert_bound(value, wanted, absolute + relative * wanted.abs())

    check(got)
    if got.dim() > 1 and wanted.any():
        assert_has_power(check, got)


@functools.cache
def experts_classes() -> dict[str, str]:
    """Every class decorated with `use_experts_implementation`, with its module's name."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if "@use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any(
                "use_experts_implementation" in ast.unparse(each) for each in node.decorator_list
            ):
                found[node.name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


class Config(types.SimpleNamespace):
    """Whatever an experts class asks of its configuration."""

    _experts_implementation = "eager"


def experts_config(**changes: object) -> Config:
    values: dict[str, object] = {
        **dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts"), E),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), H),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), WIDTH),
        **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
        "n_routed_experts": E,
        "mlp_hidden_act": "relu2",
        "moe_latent_size": None,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "swiglu_beta": 1.0,
        "post_norm_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
    }
    return Config(**{**values, **changes})


def make_experts(name: str, **changes: object) -> nn.Module:
    """A module of that class with random weights; numbers its config lacks are taken as 1.5."""
    cls = getattr(importlib.import_module(experts_classes()[name]), name)
    config = experts_config(**changes)
    for _ in range(8):
        try:
            module = cls(config)
            break
        except AttributeError as error:
            setattr(config, error.name, 1.5)
    else:
        raise AssertionError(f"{name} cannot be made")
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def routing(num_tokens: int, seed: int = 0, experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights; expert 1 gets nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, H, generator=generator)
    keys = torch.rand(num_tokens, experts, generator=generator)
    keys[:, 1] = -1
    index = keys.topk(K, dim=1).indices
    weights = torch.rand(num_tokens, K, generator=generator) + 0.1
    return x, index, weights / weights.sum(1, keepdim=True)


_TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_CONFIGS = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 8,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_shared_experts": 1,
    },
    "deepseek_v2": {
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_shared_experts": 1,
    },
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "minimax_m2": {
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "glm4_moe": {
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "head_dim": 8,
    },
}
MODELS = tuple(_CONFIGS)


def causal_model(kind: str, implementation: str | None = "eager", seed: int = 0) -> nn.Module:
    """A tiny random causal language model in eval mode, the same weights for the same seed."""
    config = transformers.AutoConfig.for_model(
        kind, **_TEXT, **_CONFIGS[kind], num_key_value_heads=4, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    attention = "eager" if kind == "gpt_oss" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name:
                value.normal_(std=0.15)
    model.set_experts_implementation(implementation)
    return model.eval()


def tokens(batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed"):
            yield name, module
