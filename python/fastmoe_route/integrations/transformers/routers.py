"""Router modules of transformers on the fused gate: same logits, same experts, same weights.

A router keeps its class, its parameters and its hooks; only `forward` is replaced, so that
checkpoints, auxiliary losses and `output_router_logits` work as before. The logits are computed
exactly as the class does, then one `gate` takes the place of softmax or sigmoid, top-k, gather and
normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe_route._arguments import check_module
from fastmoe_route._environment import logger
from fastmoe_route.gate import gate

Outputs = tuple[Tensor, Tensor, Tensor]


def _wide_logits(router: Any, hidden_states: Tensor) -> Tensor:
    x = hidden_states.reshape(-1, router.hidden_dim)
    return F.linear(x.float(), router.weight.float())


def _chosen(logits: Tensor, dtype: torch.dtype, top_k: int, **options: Any) -> Outputs:
    routing = gate(logits, top_k, **options)
    return logits, routing.weights.to(dtype), routing.experts.long()


# ---- one forward per family --------------------------------------------------------------------


def _softmax(router: Any, hidden_states: Tensor) -> Outputs:
    logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
    normalize = getattr(router, "norm_topk_prob", True)
    return _chosen(logits, logits.dtype, router.top_k, normalize=normalize)


def _softmax_wide_weights(router: Any, hidden_states: Tensor) -> Outputs:
    logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
    return _chosen(logits, torch.float32, router.top_k, normalize=True)


def _softmax_of_chosen(router: Any, hidden_states: Tensor) -> Outputs:
    logits = F.linear(hidden_states, router.weight, getattr(router, "bias", None))
    return _chosen(logits, logits.dtype, router.top_k, normalize=True)


def _granite(router: Any, hidden_states: Tensor) -> Outputs:
    logits = F.linear(hidden_states, router.weight).float()
    return _chosen(logits, hidden_states.dtype, router.top_k, normalize=True)


def _deepseek_v2(router: Any, hidden_states: Tensor) -> Outputs:
    logits = _wide_logits(router, hidden_states)
    groups: dict[str, Any] = {}
    if router.topk_method == "group_limited_greedy":
        groups = {"num_groups": router.num_group, "topk_groups": router.topk_group}
    scale = router.routed_scaling_factor
    return _chosen(logits, torch.float32, router.top_k, scale=scale, **groups)


def _deepseek_v3(router: Any, hidden_states: Tensor) -> Outputs:
    return _chosen(
        _wide_logits(router, hidden_states),
        torch.float32,
        router.top_k,
        score="sigmoid",
        bias=router.e_score_correction_bias.float(),
        num_groups=router.num_group,
        topk_groups=router.topk_group,
        group_score="top2_sum",
        normalize=router.norm_topk_prob,
        scale=getattr(router, "routed_scaling_factor", 1.0),
    )


def _mistral_large(router: Any, hidden_states: Tensor) -> Outputs:
    return _chosen(
        _wide_logits(router, hidden_states),
        torch.float32,
        router.top_k,
        num_groups=router.num_group,
        topk_groups=router.topk_group,
        group_score="top2_sum",
        normalize=True,
        scale=router.routed_scaling_factor,
    )


def _sigmoid_with_bias(router: Any, hidden_states: Tensor, bias: Tensor) -> Outputs:
    return _chosen(
        _wide_logits(router, hidden_states),
        torch.float32,
        router.top_k,
        score="sigmoid",
        bias=bias.float(),
        normalize=True,
        scale=router.router_scaling_factor,
    )


def _minimax_m2(router: Any, hidden_states: Tensor, e_score_correction_bias: Tensor) -> Outputs:
    x = hidden_states.reshape(-1, router.hidden_dim)
    logits = F.linear(x.to(router.weight.dtype), router.weight)
    bias = e_score_correction_bias.float()
    options = {"score": "sigmoid", "bias": bias, "normalize": True}
    return _chosen(logits, torch.float32, router.top_k, **options)


def _minimax_m3(router: Any, hidden_states: Tensor) -> Outputs:
    return _minimax_m2(router, hidden_states, router.e_score_correction_bias)


Forward = Callable[..., Outputs]
_FAMILIES: dict[Forward, tuple[str, ...]] = {
    _softmax: (
        *("flex_olmo.FlexOlmo", "mellum.Mellum", "olmoe.Olmoe", "qwen2_moe.Qwen2Moe"),
        *("qwen3_moe.Qwen3Moe", "qwen3_next.Qwen3Next", "qwen4_exp.Qwen4ExpText"),
        *("qwen3_omni_moe.Qwen3OmniMoeThinkerText", "qwen3_omni_moe.Qwen3OmniMoeTalkerText"),
        *("qwen3_vl_moe.Qwen3VLMoeText", "qwen3_5_moe.Qwen3_5Moe"),
    ),
    _softmax_wide_weights: ("mixtral.Mixtral", "minimax.MiniMax"),
    _softmax_of_chosen: ("gpt_oss.GptOss", "aria.AriaText"),
    _granite: (
        *("granitemoe.GraniteMoe", "granitemoe_swa.GraniteMoeSWA"),
        *("granitemoehybrid.GraniteMoeHybrid", "granitemoeshared.GraniteMoeShared"),
    ),
    _deepseek_v2: (
        *("deepseek_v2.DeepseekV2", "deepseek_ocr2.DeepseekOcr2Text"),
        "unlimited_ocr.UnlimitedOcrText",
    ),
    _deepseek_v3: (
        *("axk1.AXK1", "bailing_hybrid.BailingHybrid", "deepseek_v3.DeepseekV3", "dots1.Dots1"),
        *("glm5_next.Glm5NextText", "kimi_linear.KimiLinear", "mimo_v2_flash.MiMoV2Flash"),
        *("nemotron_h.NemotronH", "deepseek_v32.DeepseekV32", "dots3_note.Dots3NoteText"),
        *("glm4_moe.Glm4Moe", "glm4_moe_lite.Glm4MoeLite", "glm4v_moe.Glm4vMoeText"),
        *("glm_moe_dsa.GlmMoeDsa", "hy_v4.HYV4", "solar_open.SolarOpen", "beam.Beam"),
        "exaone_moe.ExaoneMoe",
    ),
    _mistral_large: ("mistral_large4.MistralLarge4Text",),
    _sigmoid_with_bias: ("hy_v3.HYV3", "dots3_note.Dots3NoteVision"),
    _minimax_m2: ("minimax_m2.MiniMaxM2",),
    _minimax_m3: ("minimax_m3_vl.MiniMaxM3VL", "step3p7.Step3p7"),
}


def _forward_by_class() -> dict[str, Forward]:
    found = {}
    for forward, places in _FAMILIES.items():
        for place in places:
            folder, stem = place.split(".")
            for suffix in ("TopKRouter", "TopkRouter"):
                key = f"transformers.models.{folder}.modeling_{folder}.{stem}{suffix}"
                found[key] = forward
    return found


_FORWARDS = _forward_by_class()


def _fused_forward(module: nn.Module) -> Forward | None:
    for base in type(module).__mro__:
        forward = _FORWARDS.get(f"{base.__module__}.{base.__qualname__}")
        if forward is not None:
            # A subclass with a forward of its own computes something else.
            same: bool = getattr(type(module), "forward", None) is getattr(base, "forward", None)
            return forward if same else None
    return None


def fused_router(router: Any, hidden_states: Tensor) -> Outputs:
    """What a router module returns, by the fused gate if its class is known, else by itself."""
    forward = _fused_forward(router)
    found: Outputs = router(hidden_states) if forward is None else forward(router, hidden_states)
    return found


# ---- patching ----------------------------------------------------------------------------------


def patch_routers(model: nn.Module | None = None) -> list[str]:
    """Gives router modules the fused gate.

    The experts chosen are those of `torch.topk`, but for exact ties, which go to the lower expert
    (and are common among bfloat16 logits; `torch.topk` breaks them arbitrarily). Slots come best
    first. Softmax and sigmoid are taken in float32. Each router of a model is tried on random
    hidden states before it is patched, and left alone, with a warning in the log, if it answers
    otherwise than the fused form, or if something else than its class has set its `forward`; what
    accelerate sets stays, and calls the fused form.

    Args:
        model: a model, patched in place; None for models that are made from now on by
            `from_pretrained` or `from_config`, through transformers' patch mapping.

    Returns:
        The names of the modules patched, or of the classes.

    Raises:
        ImportError: without a model, if transformers is missing or has no patch mapping.
    """
    if model is None:
        return _patch_classes()
    check_module("patch_routers", "model", model)
    patched = []
    for name, module in model.named_modules():
        forward = _fused_forward(module)
        if forward is None:
            continue
        place = _place_of_forward(module)
        if place is not None and _answers_alike(module, forward):
            setattr(module, place, partial(forward, module))
            patched.append(name)
        else:
            logger.warning("%s (%s) keeps its own gate", name, type(module).__name__)
    return patched


def unpatch_routers(model: nn.Module) -> list[str]:
    """Takes back `patch_routers(model)`.

    Args:
        model: any module.

    Returns:
        The names of the modules it was taken from.

    Raises:
        TypeError: `model` is no module.
    """
    check_module("unpatch_routers", "model", model)
    unpatched = []
    for name, module in model.named_modules():
        place = _place_of_forward(module)
        own = None if place is None else module.__dict__.get(place)
        if not isinstance(own, partial):
            continue
        if place == "forward":
            del module.forward
        else:
            module._old_forward = MethodType(type(module).forward, module)
        unpatched.append(name)
    return unpatched


def _place_of_forward(module: nn.Module) -> str | None:
    """The attribute that calls the forward of the module's class, or ours in its place.

    None where there is another, a compiled one, say. accelerate sets one that loads weights and
    moves tensors, and calls the former under another name.
    """
    place = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    own = getattr(module, place)
    function = own.func if isinstance(own, partial) else getattr(own, "__func__", None)
    return place if function is type(module).forward or function in _FAMILIES else None


class _Lookalike(type):
    """A class of which the instances of its base count as instances.

    transformers keeps the replacement in its records of what to capture even after the patch
    mapping is cleared; routers of the original class have to be found by it, too.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.__mro__[1])


def _patch_classes() -> list[str]:
    patching = import_module("transformers.monkey_patching")
    mapping = {}
    for key, forward in _FORWARDS.items():
        module_name, class_name = key.rsplit(".", 1)
        try:
            original = getattr(import_module(module_name), class_name, None)
        except ImportError:
            continue
        if original is not None:
            members = {"forward": forward, "__module__": original.__module__}
            mapping[class_name] = _Lookalike(class_name, (original,), members)
    patching.register_patch_mapping(mapping, overwrite=True)
    return sorted(mapping)


def _answers_alike(router: Any, forward: Forward) -> bool:
    """Whether both forms choose the same experts of random tokens, with the same weights."""
    weight = router.weight
    if weight.device.type == "meta":
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, weight.shape[1], generator=generator).to(weight.device)
    # In float32, where ties are rare, whatever the dtype of the model.
    wide = _float32_copy(router)
    extra: tuple[Tensor, ...] = ()
    if forward in (_sigmoid_with_bias, _minimax_m2):
        extra = (torch.randn(weight.shape[0], generator=generator).to(weight.device),)
    with torch.no_grad():
        logits, weights, experts = type(router).forward(wide, x, *extra)
        fused_logits, fused_weights, fused_experts = forward(wide, x, *extra)
    dense = torch.zeros_like(logits, dtype=torch.float32)
    expected = dense.scatter(1, experts, weights.float())
    got = dense.scatter(1, fused_experts, fused_weights.float())
    is_alike = torch.equal(logits, fused_logits) and bool(
        ((expected - got).abs() <= 1e-5 * expected.abs() + 1e-7).all()
    )
    return is_alike


def _float32_copy(router: nn.Module) -> Any:
    """A module of the same class whose weights are random float32 numbers of a useful size."""
    from copy import deepcopy

    wide: Any = deepcopy(router).float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in (*wide.parameters(), *wide.buffers()):
            size = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.3
            value.copy_(torch.randn(value.shape, generator=generator) * size)
    return wide
