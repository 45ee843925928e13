"""What is done with probabilities: rounding, leaving early, holding an entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    check_float,
    check_int,
    check_number,
    check_rows,
    check_shape,
    describe,
    fail,
)
from fastmoe_route.methods import register


def quantize_probabilities(p: Tensor, bits: int = 8, bias: Tensor | float = 0.0) -> Tensor:
    """`round(p (2^bits - 1)) / (2^bits - 1) + bias`: what an unsigned integer softmax puts out.

    The quantiser whose bias arXiv:2309.01729 measures.

    Args:
        p: probabilities, any shape of at least one dimension.
        bits: 1 to 23.
        bias: from `quantization_bias`; in hardware it goes into the zero point.

    Returns:
        The shape of `p`; gradient 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("quantize_probabilities", "p", p)
    bits = check_int("quantize_probabilities", "bits", bits, 1, 23)
    levels = 2**bits - 1
    quantized: Tensor = (p * levels).round() / levels + bias
    return quantized


@register("quantization_bias", row="X7", source="arXiv:2309.01729", verified="mem")
def quantization_bias(p: Tensor, bits: int = 8, dims: tuple[int, ...] | None = None) -> Tensor:
    """`E[p - q(p)]`: what a low-precision softmax loses on average (arXiv:2309.01729).

    In long rows most probabilities round to 0, so the bias is positive and rows of the quantised
    softmax sum to less than 1; adding it back restores the sum on the calibration data.

    Args:
        p: softmax outputs of calibration data.
        bits: of the quantiser.
        dims: dimensions to average over: None for one bias per tensor; leave out the head or the
            time step for one each.

    Returns:
        The bias, with `dims` kept as size 1; its gradient is that of a mean, as rounding has none.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("quantization_bias", "p", p)
    bits = check_int("quantization_bias", "bits", bits, 1, 23)
    error = p - quantize_probabilities(p, bits)
    return error.mean(tuple(range(p.dim())) if dims is None else dims, keepdim=True)


@register("early_exit", row="X12", source="arXiv:1805.10982", verified="mem")
def early_exit(stage_logits: list[Tensor], thresholds: list[float]) -> Tensor:
    """The first stage of a cascade that is sure enough: `max softmax(logits) >= threshold`.

    Args:
        stage_logits: `[N, C]` per stage, earliest first.
        thresholds: one per stage but the last, which takes what is left. 0 leaves at the first
            stage, above 1 never. They come from the accepted loss of accuracy on held-out data.

    Returns:
        int64 `[N]`, the stage each row leaves at. (Abstract only: unverified.)

    Raises:
        ValueError: the lists do not fit together.
    """
    for argument, value in (("stage_logits", stage_logits), ("thresholds", thresholds)):
        if not isinstance(value, (list, tuple)):
            fail(TypeError, "early_exit", argument, "be a list", describe(value))
    for logits in stage_logits:
        check_rows("early_exit", "stage_logits", logits)
        check_shape("early_exit", "stage_logits", logits, (*stage_logits[0].shape[:-1], -1))
    if not stage_logits or len(thresholds) != len(stage_logits) - 1:
        rule = f"have {max(len(stage_logits) - 1, 0)} entries, one less than stages"
        fail(ValueError, "early_exit", "thresholds", rule, len(thresholds))
    for threshold in thresholds:
        check_float("early_exit", "thresholds", threshold)
    sure = [
        logits.softmax(-1).amax(-1) >= threshold
        for logits, threshold in zip(stage_logits, thresholds, strict=False)
    ]
    sure.append(
        torch.ones(stage_logits[-1].shape[:-1], dtype=torch.bool, device=stage_logits[-1].device)
    )
    return torch.stack(sure).to(torch.uint8).argmax(0)


@register("entropy_tolerance", row="X14", source="arXiv:2410.13060", verified="mem")
def entropy_tolerance(p: Tensor, threshold: Tensor, tolerance: float) -> Tensor:
    """Keeps the entropy of attention heads near learned levels (AERO, arXiv:2410.13060).

    With `H` the mean entropy of a head's rows over `log N` and `d = H - threshold`, the sum over
    heads of `d^2` where `|d| > tolerance`, else 0.

    Args:
        p: `[heads, ..., N]` attention probabilities.
        threshold: `[heads]`, learnable, in units of the largest entropy.
        tolerance: the deviation that costs nothing.

    Returns:
        A scalar, differentiable in `p` and `threshold`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("entropy_tolerance", "p", p)
    check_shape("entropy_tolerance", "threshold", threshold, p.shape[:1])
    check_number("entropy_tolerance", "tolerance", tolerance, 0)
    h = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)
    h = h.reshape(p.shape[0], -1).mean(1)
    off = h / math.log(max(p.shape[-1], 2)) - threshold
    return torch.where(off.abs() > tolerance, off.square(), torch.zeros_like(off)).sum()
