"""Other distributions than softmax: sparse, sharpened, without exponentials or maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    check_dtype,
    check_ids,
    check_int,
    check_number,
    check_rows,
    check_shape,
    check_tensor,
    fail,
)
from fastmoe_route.methods import register
from fastmoe_route.softmax import MAX_K, softmax, softmax_topk


@register("two_pass_softmax", row="X1", source="arXiv:2001.04438", verified="code")
def two_pass_softmax(x: Tensor) -> Tensor:
    """Softmax without a pass for the maximum: sums of mantissas and exponents (XNNPACK).

    `softmax(x, method="two_pass")` by a name of its own. The exponent is kept as a float and never
    put into a number, so no input of finite size overflows; -inf, which makes the bare algorithm
    NaN, gives 0 here.

    Args:
        x: any shape.

    Returns:
        The shape of `x`, rows (last dimension) sum to 1; differentiable.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("two_pass_softmax", "x", x)
    return softmax(x, method="two_pass")


def top_columns(x: Tensor, k: int) -> Tensor:
    """The columns of the `k` largest entries of each row, ties to the lower column."""
    with torch.no_grad():
        if k <= MAX_K:
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
    columns = top_columns(x, k)
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

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("sparse_softmax_loss", "x", x, 2)
    check_shape("sparse_softmax_loss", "target", target, x.shape[:1])
    check_ids("sparse_softmax_loss", "target", target, 0, x.shape[1] - 1)
    k = check_int("sparse_softmax_loss", "k", k, 1, x.shape[1])
    columns, own = top_columns(x, k), target.long()[:, None]
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

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
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

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
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

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
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

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
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
        noise: added before, broadcasts to `x`; None for none.
        k: entries kept; None for all.

    Returns:
        The shape of `x`, differentiable, exactly 0 outside the `k`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_rows("noisy_sparse_softmax", "x", x)
    check_number("noisy_sparse_softmax", "temperature", temperature, above=0)
    if k is not None:
        k = check_int("noisy_sparse_softmax", "k", k, 1, x.shape[-1])
    if noise is not None:
        check_tensor("noisy_sparse_softmax", "noise", noise)
    z = (x if noise is None else x + noise) / temperature
    return softmax(z) if k is None else sparse_softmax(z, k)
