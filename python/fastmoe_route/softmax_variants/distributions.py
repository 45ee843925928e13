"""Other distributions than softmax, the normaliser as a value, low precision and early exit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    check_choice,
    check_dtype,
    check_float,
    check_ids,
    check_int,
    check_number,
    check_rows,
    check_shape,
    check_tensor,
    describe,
    fail,
)
from fastmoe_route.methods import register
from fastmoe_route.softmax import softmax, softmax_topk

_FUSED_K = 64


# ---- the exact softmax -------------------------------------------------------------------------


@register("two_pass_softmax", row="X1", source="arXiv:2001.04438", verified="code")
def two_pass_softmax(x: Tensor) -> Tensor:
    """Softmax without a pass for the maximum: sums of mantissas and exponents (XNNPACK).

    `softmax(x, method="two_pass")` by the name of the survey. The exponent is kept as a float and
    never put into a number, so no input of finite size overflows; -inf, which makes the bare
    algorithm NaN, gives 0 here.

    Args:
        x: any shape.

    Returns:
        The shape of `x`, rows (last dimension) sum to 1; differentiable.
    """
    check_rows("two_pass_softmax", "x", x)
    return softmax(x, method="two_pass")


# ---- the normaliser as a value -----------------------------------------------------------------


@register("online_normalizer", row="X2", source="arXiv:1805.02867", verified="code")
def normalizer(x: Tensor) -> tuple[Tensor, Tensor]:
    """The pair `(m, d)`, `m = max(x)` and `d = sum of exp(x - m)`, of each row (arXiv:1805.02867).

    `softmax(x) = exp(x - m) / d`. A row that is empty or all -inf gives `(-inf, 0)`, the neutral
    element of `merge_normalizers`.

    Args:
        x: `[..., N]`, floating point.

    Returns:
        `m` and `d`, both `[...]`.
    """
    check_rows("normalizer", "x", x)
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -torch.inf), x.new_zeros(x.shape[:-1])
    m = x.amax(-1)
    return m, (x - _finite(m)[..., None]).exp().sum(-1)


def merge_normalizers(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The normaliser of two parts of a row, from those of the parts: associative, commutative.

    `m = max(m1, m2)`, `d = d1 exp(m1 - m) + d2 exp(m2 - m)`. Two neutral elements merge to the
    neutral element, where the bare formula gives NaN.

    Args:
        one: `(m, d)` of one part, any shape.
        other: `(m, d)` of the other.

    Returns:
        `(m, d)` of both.
    """
    for argument, value in (("one", one), ("other", other)):
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            fail(TypeError, "merge_normalizers", argument, "be a pair (m, d)", describe(value))
    (m1, d1), (m2, d2) = one, other
    m = torch.maximum(m1, m2)
    at = _finite(m)
    return m, d1 * (m1 - at).exp() + d2 * (m2 - at).exp()


def _finite(m: Tensor) -> Tensor:
    """A maximum of -inf replaced by 0, so that it can be subtracted."""
    return m.masked_fill(m == -torch.inf, 0.0)


# ---- other distributions -----------------------------------------------------------------------


def _top_columns(x: Tensor, k: int) -> Tensor:
    """The columns of the `k` largest entries of each row, ties to the lower column."""
    with torch.no_grad():
        if k <= _FUSED_K:
            return softmax_topk(x, k)[1]
        return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@register("sparse_softmax", row="X3", source="arXiv:2112.12433", verified="mem")
def sparse_softmax(x: Tensor, k: int = 10) -> Tensor:
    """Softmax over the `k` largest logits of each row, exactly 0 elsewhere (arXiv:2112.12433).

    Ties go to the lower column.

    Args:
        x: `[..., N]`.
        k: how many, 1 to N; N is the plain softmax, 1 is one-hot.

    Returns:
        The shape of `x`; differentiable, with gradient 0 outside the `k`.

    Raises:
        ValueError: `k` is out of range.

    >>> sparse_softmax(torch.tensor([0.0, 1.0, 1.0]), 2)
    tensor([0.0000, 0.5000, 0.5000])
    """
    check_rows("sparse_softmax", "x", x)
    k = check_int("sparse_softmax", "k", k, 1, x.shape[-1])
    columns = _top_columns(x, k)
    return torch.zeros_like(x).scatter(-1, columns, x.gather(-1, columns).softmax(-1))


@register("sparse_softmax_loss", row="X3", source="arXiv:2112.12433", verified="mem")
def sparse_softmax_loss(
    x: Tensor, target: Tensor, k: int = 10, *, include_target: bool = False
) -> Tensor:
    """`log(sum over the top k of exp(x)) - x_target`, mean over rows (arXiv:2112.12433).

    As it is commonly written, the target does not join the top `k`: for a target outside them
    `exp(-loss)` is its weight beside theirs, not a probability among them. The loss is never
    negative either way, since the largest logit is in the sum.

    Args:
        x: `[N, C]`.
        target: integers `[N]`.
        k: how many logits the sum takes.
        include_target: let the target take the place of the smallest of the `k` where it is not
            among them; `exp(-loss)` is then always a probability.

    Returns:
        A scalar, differentiable; the gradient is 0 outside the sum and the target.
    """
    check_rows("sparse_softmax_loss", "x", x, 2)
    check_shape("sparse_softmax_loss", "target", target, x.shape[:1])
    check_ids("sparse_softmax_loss", "target", target, 0, x.shape[1] - 1)
    k = check_int("sparse_softmax_loss", "k", k, 1, x.shape[1])
    columns, own = _top_columns(x, k), target.long()[:, None]
    if include_target:
        missing = (columns != own).all(1)
        columns = torch.cat(
            [columns[:, :-1], torch.where(missing[:, None], own, columns[:, -1:])], 1
        )
    return (x.gather(1, columns).logsumexp(1) - x.gather(1, own)[:, 0]).mean()


@register("adaptive_temperature_softmax", row="X4", source="arXiv:2410.01104", verified="2nd")
def adaptive_temperature_softmax(x: Tensor) -> Tensor:
    """Softmax sharpened where its entropy is high, to keep attention sharp on long inputs.

    `beta = 1` where `H = -sum p log(p + 1e-9)` is at most 0.5, else
    `max(-0.037 H^4 + 0.481 H^3 - 2.3 H^2 + 4.917 H - 1.791, 1)`; the result is
    `softmax(beta x)` (arXiv:2410.01104, as ports quote it; a port that reverses the coefficients
    gets negative temperatures). Meant for attention heads of a trained model at inference.

    Args:
        x: `[..., N]`.

    Returns:
        The shape of `x`, differentiable (through `beta` too).
    """
    check_rows("adaptive_temperature_softmax", "x", x)
    p = x.softmax(-1)
    spread = -(p * (p + 1e-9).log()).sum(-1, keepdim=True)
    beta = torch.full_like(spread, -0.037)
    for coefficient in (0.481, -2.3, 4.917, -1.791):
        beta = beta * spread + coefficient
    beta = torch.where(spread > 0.5, beta.clamp(min=1.0), torch.ones_like(beta))
    masked = x == -torch.inf  # in the product it would make the gradient of beta NaN
    return softmax((beta * x.masked_fill(masked, 0.0)).masked_fill(masked, -torch.inf))


@register("softpick", row="X5", source="arXiv:2504.20966", verified="code")
def softpick(x: Tensor, *, mask: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`relu(e^x - 1) / (sum |e^x - 1| + eps)`: no sink, exact zeros, rows sum to at most 1.

    Computed with `m = max(x, 0)` taken out, and `eps` scaled by `e^-m` with it, so that large and
    very negative rows neither overflow nor change (arXiv:2504.20966; the released code adds the
    bare `eps`, and counts masked entries in the denominator, which this does not).

    Args:
        x: `[..., N]`; -inf is masked.
        mask: bool, True where an entry counts; broadcasts to `x`.
        eps: keeps rows of zeros at 0.

    Returns:
        The shape of `x`, differentiable. Rows without a positive entry are exactly 0.
    """
    check_rows("softpick", "x", x)
    check_number("softpick", "eps", eps, 0)
    if mask is not None:
        check_tensor("softpick", "mask", mask)
        check_dtype("softpick", "mask", mask, (torch.bool,))
    allowed = x > -torch.inf if mask is None else mask & (x > -torch.inf)
    safe = x.masked_fill(~allowed & ~x.isnan(), 0.0)  # gives the exact value 0 below
    m = safe.detach().amax(-1, keepdim=True).clamp(min=0.0) if x.shape[-1] else 0.0
    floor = torch.exp(-torch.as_tensor(m, dtype=x.dtype, device=x.device))
    small = floor * safe.clamp(max=1.0).expm1()
    value = torch.where(safe < 1.0, small, (safe - m).exp() - floor)
    return value.relu() / (value.abs().sum(-1, keepdim=True) + eps * floor)


@register("unified_max_softmax", row="X6", source="arXiv:2311.01282", verified="2nd")
def unified_max_softmax(
    x: Tensor, phi: float, low: float = -60.0, high: float = 60.0
) -> tuple[Tensor, Tensor]:
    """Softmax with one constant in place of each row's maximum, so partial sums need no rescaling.

    Rows with an entry whose `x - phi` is not inside `(low, high)` take their own maximum instead
    (FlashDecoding++, arXiv:2311.01282; `phi` and the range come from a model's statistics).

    Args:
        x: `[..., N]`; -inf is masked and does not count for the range.
        phi: the constant.
        low: lower end of the range.
        high: upper end; exp(high) times N must be finite.

    Returns:
        The probabilities, differentiable, and bool `[...]`, True for rows that fell back.

    Raises:
        ValueError: the range is empty.
    """
    check_rows("unified_max_softmax", "x", x)
    for name, value in (("phi", phi), ("low", low), ("high", high)):
        check_number("unified_max_softmax", name, value)
    if not low < high:
        fail(ValueError, "unified_max_softmax", "low", f"be below high, {high}", low)
    offset = x.detach() - phi
    outside = ~((offset > low) & (offset < high)) & (x.detach() != -torch.inf)
    is_redone = outside.any(-1)
    center = torch.where(is_redone, x.detach().amax(-1), phi)[..., None]
    e = (x - center).exp()
    return e / e.sum(-1, keepdim=True), is_redone


@register("stablemax", row="X10", source="arXiv:2501.04697", verified="code")
def stablemax(x: Tensor, dim: int = -1) -> Tensor:
    """`s(x) / sum s(x)` with `s(x) = x + 1` above 0 and `1 / (1 - x)` below (arXiv:2501.04697).

    No exponential: probabilities do not collapse to 0 and 1, which the paper ties to grokking.

    Args:
        x: any shape; -inf gives 0.
        dim: the dimension that sums to 1.

    Returns:
        The shape of `x`, differentiable once everywhere (`s` is continuous with its derivative).
    """
    check_rows("stablemax", "x", x)
    dim = check_int("stablemax", "dim", dim, -x.dim(), x.dim() - 1)
    s = _stable_scale(x)
    s = s / s.detach().amax(dim, keepdim=True)  # so that the sum of huge values is finite
    return s / s.sum(dim, keepdim=True)


def _stable_scale(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x.clamp(min=0) + 1, 1 / (1 - x.clamp(max=0)))


@register("stablemax_cross_entropy", row="X10", source="arXiv:2501.04697", verified="code")
def stablemax_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """`-log stablemax(logits)[target]`, mean over rows, computed in float64 as the authors do.

    Args:
        logits: `[N, C]`.
        target: integers `[N]`.

    Returns:
        A scalar in the dtype of `logits`, differentiable (arXiv:2501.04697).
    """
    check_rows("stablemax_cross_entropy", "logits", logits, 2)
    check_shape("stablemax_cross_entropy", "target", target, logits.shape[:1])
    check_ids("stablemax_cross_entropy", "target", target, 0, logits.shape[1] - 1)
    p = stablemax(logits.double(), 1).gather(1, target.long()[:, None])
    return -p.log().mean().to(logits.dtype)


@register("noisy_sparse_softmax", row="X13", source="arXiv:2306.06855", verified="mem")
def noisy_sparse_softmax(
    x: Tensor, temperature: float, *, noise: Tensor | None = None, k: int | None = None
) -> Tensor:
    """`softmax((x + noise) / temperature)` over the `k` largest noisy entries.

    Architecture search with a small, decaying temperature (arXiv:2306.06855).
    `temperature_schedule` decays it by the step, `entropy_temperature` by the entropy that the
    weights should have.

    Args:
        x: `[..., N]` architecture weights.
        temperature: above 0; towards 0 the result is one-hot.
        noise: added before, or None.
        k: entries kept; None for all.

    Returns:
        The shape of `x`, differentiable, exactly 0 outside the `k`.
    """
    check_rows("noisy_sparse_softmax", "x", x)
    check_number("noisy_sparse_softmax", "temperature", temperature, above=0)
    if k is not None:
        k = check_int("noisy_sparse_softmax", "k", k, 1, x.shape[-1])
    z = (x if noise is None else x + noise) / temperature
    return softmax(z) if k is None else sparse_softmax(z, k)


def temperature_schedule(
    step: int, num_steps: int, start: float, end: float, *, shape: str = "exponential"
) -> float:
    """Decay from `start` at step 0 to `end` at `num_steps`, constant from there.

    Args:
        step: 0 or more.
        num_steps: at least 1.
        start: above 0.
        end: above 0; a cosine may end at 0.
        shape: `exponential` (small temperatures for architecture search) or `cosine` (the step of
            `polytope_weights`).

    Returns:
        `start * (end / start)^s`, or `end + (start - end) * (1 + cos(pi s)) / 2`, with
        `s = step / num_steps`.

    >>> temperature_schedule(5, 10, 4.0, 1.0), temperature_schedule(5, 10, 4.0, 0.0, shape="cosine")
    (2.0, 2.0)
    """
    is_cosine = check_choice("temperature_schedule", "shape", shape, ("exponential", "cosine")) == 1
    step = check_int("temperature_schedule", "step", step, 0)
    num_steps = check_int("temperature_schedule", "num_steps", num_steps, 1)
    for name, value in (("start", start), ("end", end)):
        may_end = is_cosine and name == "end"
        check_number("temperature_schedule", name, value, 0, above=-1 if may_end else 0)
    done = min(step / num_steps, 1.0)
    if is_cosine:
        return float(end + (start - end) * (1 + math.cos(math.pi * done)) / 2)
    return float(start * (end / start) ** done)


def entropy_temperature(x: Tensor, share: float, iters: int = 60) -> Tensor:
    """The temperature at which `softmax(x / temperature)` has a share of the largest entropy.

    An entropy-based schedule lowers `share` from 1 to 0 as a search goes on: rows that differ in
    scale then sharpen alike (arXiv:2306.06855; how the paper chooses it is unverified).

    Args:
        x: `[..., N]`, `N` at least 2.
        share: of `log N`, in (0, 1).
        iters: halvings of the temperature's logarithm, between `e^-20` and `e^20` times the range
            of the row.

    Returns:
        `[..., 1]`, without gradient. A row whose entries are all equal has no such temperature and
        gets a large one.
    """
    check_rows("entropy_temperature", "x", x)
    check_int("entropy_temperature", "N", x.shape[-1], 2)
    check_number("entropy_temperature", "share", share, above=0, below=1)
    iters = check_int("entropy_temperature", "iters", iters, 1)
    x = x.detach()
    span = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).clamp(min=1e-30)
    low, high = torch.full_like(span, -20.0), torch.full_like(span, 20.0)
    for _ in range(iters):
        middle = (low + high) / 2
        p = softmax(x / (span * middle.exp()))
        entropy = -torch.xlogy(p, p).sum(-1, keepdim=True)
        is_sharp = entropy < share * math.log(x.shape[-1])
        low, high = torch.where(is_sharp, middle, low), torch.where(is_sharp, high, middle)
    return span * ((low + high) / 2).exp()


@register("polytope_step", row="L7", source="arXiv:2605.01928", verified="code")
def polytope_weights(losses: Tensor, epsilon: float) -> Tensor:
    """`softmax(-losses / epsilon)`: how a gradient-free step weighs the vertices it tried.

    The step moves to the weighted mean of the vertices of a polytope around the parameters;
    `epsilon` falls along a cosine (`temperature_schedule`), towards the best vertex alone.

    Args:
        losses: `[..., V]`, the loss at each vertex.
        epsilon: above 0; 0 gives the vertex of least loss, ties to the lower one.

    Returns:
        `[..., V]`, rows sum to 1.
    """
    check_rows("polytope_weights", "losses", losses)
    check_number("polytope_weights", "epsilon", epsilon, 0)
    if epsilon == 0:
        best = torch.zeros_like(losses)
        return best.scatter(-1, _top_columns(-losses, 1), 1.0)
    return softmax(-losses / epsilon)


# ---- low precision, early exit, entropy --------------------------------------------------------


def quantize_probabilities(p: Tensor, bits: int = 8, bias: Tensor | float = 0.0) -> Tensor:
    """`round(p (2^bits - 1)) / (2^bits - 1) + bias`: what an unsigned integer softmax puts out.

    Args:
        p: probabilities, any shape.
        bits: 1 to 23.
        bias: from `quantization_bias`; in hardware it goes into the zero point.

    Returns:
        The shape of `p`; gradient 0.
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
        The bias, with `dims` kept as size 1.
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
    """
    check_rows("entropy_tolerance", "p", p)
    check_shape("entropy_tolerance", "threshold", threshold, p.shape[:1])
    check_number("entropy_tolerance", "tolerance", tolerance, 0)
    h = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)
    h = h.reshape(p.shape[0], -1).mean(1)
    off = h / math.log(max(p.shape[-1], 2)) - threshold
    return torch.where(off.abs() > tolerance, off.square(), torch.zeros_like(off)).sum()
