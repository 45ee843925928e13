"""The tolerance classes of the project, the limits they use, and where the limits come from.

- exact: every bit, plus dtype, shape and stride. Ids, plans, `permute`, two runs of one op.
- bound: every element within its own limit of the float64 reference.
- ratio: the error of every row at most twice that of plain torch in the same dtype.
- near tie: an id may differ only where its key is within the limit; the differences are counted.

Comparisons read `not (error <= limit)`, so a NaN fails. Whoever uses a class other than exact also
calls `assert_has_power`: the check must reject zeros, two swapped rows and a single NaN.

Limits count roundings: `u` is the unit roundoff of the arithmetic (2^-24 for float32), a function
like exp is taken to be good to 4 u, and a sum of n terms in any order to (n - 1) u sum|terms|.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastmoe_route import reference
from torch import Tensor

# ---- classes -----------------------------------------------------------------------------------


def assert_exact(actual: Tensor, expected: Tensor, *, stride: bool = True) -> None:
    """The same dtype, shape, strides (of dimensions longer than 1) and bits."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {[*actual.shape]}, expected {[*expected.shape]}"
    if stride and actual.numel():
        long_dims = [d for d, size in enumerate(actual.shape) if size > 1]
        got, wanted = ([t.stride(d) for d in long_dims] for t in (actual, expected))
        assert got == wanted, f"strides {actual.stride()}, expected {expected.stride()}"
    differs = _bits(actual) != _bits(expected.to(actual.device))
    assert not differs.any(), _worst("exact", differs, differs.double(), actual, expected)


def assert_bound(actual: Tensor, expected: Tensor, limit: Tensor | float) -> None:
    """Every element of `actual` within `limit` of the float64 `expected`.

    Where `expected` is NaN or infinite, `actual` must be the same.

    Args:
        actual: what the op gave, any float dtype.
        expected: the reference, same shape.
        limit: a number or a tensor that broadcasts to that shape.
    """
    assert actual.shape == expected.shape, f"shape {[*actual.shape]}, expected {[*expected.shape]}"
    got, wanted = actual.detach().double().cpu(), expected.detach().double().cpu()
    limit = torch.as_tensor(limit, dtype=torch.float64).cpu().expand(got.shape)
    error = (got - wanted).abs()
    is_same = (got == wanted) | (got.isnan() & wanted.isnan())
    fails = ~(is_same | (wanted.isfinite() & (error <= limit)))
    assert not fails.any(), _worst("bound", fails, error / limit, got, wanted, limit)


def close(actual: Tensor | float, expected: Tensor | float | list, limit: float = 1e-6) -> None:
    """`assert_bound` of numbers as in a paper: tensors, lists, or one float for every element."""
    got = torch.as_tensor(actual)
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    assert_bound(got, wanted.expand_as(got) if wanted.dim() == 0 else wanted, limit)


def assert_literal(actual: Tensor, expected: list) -> None:
    """The numbers of an answer worked by hand: integers exactly (as int32), floats within 1e-6."""
    if actual.is_floating_point():
        assert_bound(actual, torch.tensor(expected, dtype=torch.float64), 1e-6)
    else:
        assert_exact(actual, torch.tensor(expected, dtype=torch.int32))


def assert_ratio(actual: Tensor, plain: Tensor, expected: Tensor, factor: float = 2.0) -> float:
    """The error of every row at most `factor` times that of plain torch in the same dtype.

    Errors are root mean squares over the last dimension, so rows want some 64 elements for two good
    implementations to differ by less than the factor; shorter rows call for `assert_bound`. A row
    of plain torch that is lucky counts with the typical relative error of the tensor instead, and
    never with less than the rounding of the result. A row that must be 0 must be 0.

    Args:
        actual: what the op gave, `[..., N]`.
        plain: what plain torch gave in the same dtype.
        expected: the float64 reference.
        factor: how many times the error of plain torch is accepted.

    Returns:
        The largest ratio of the errors.
    """
    assert actual.shape == plain.shape == expected.shape
    assert actual.dtype == plain.dtype, f"dtype {actual.dtype}, plain torch has {plain.dtype}"
    got, base, wanted = (t.detach().double().cpu() for t in (actual, plain, expected))
    size = wanted.square().mean(-1).sqrt()
    error, plain_error = ((t - wanted).square().mean(-1).sqrt() for t in (got, base))
    relative = (plain_error / size).nan_to_num(0.0, posinf=0.0).square().mean().sqrt()
    allowed = plain_error.maximum(size * relative.clamp(min=unit_roundoff(actual.dtype)))
    fails = ~(error <= factor * allowed)
    assert not fails.any(), _worst("ratio", fails, error / allowed, error, plain_error, allowed)
    ratio = (error / allowed).nan_to_num(0.0)
    return ratio.max().item() if ratio.numel() else 0.0


def assert_near_tie(
    actual: Tensor,
    expected: Tensor,
    keys: Tensor,
    limit: Tensor | float,
    undecided: Tensor | None = None,
) -> int:
    """Chosen ids equal, but for slots whose two candidates have keys within the limit.

    Sorting by keys that are each off by at most d moves no position of the sorted list by more than
    d, and the key of the id found there is off by d once more: hence the sum of both limits. Keys
    that are NaN or infinite excuse nothing. A row of chosen ids never holds one twice.

    Args:
        actual: `[T, K]` ids, -1 for none.
        expected: `[T, K]` ids of the reference.
        keys: `[T, C]` float64 keys of the reference.
        limit: a number or `[T, C]`: by how much a computed key may be off.
        undecided: bool `[T]`, rows where something else than the order of keys is within its limit
            (`reference.gate_margin`); their ids need only be valid and distinct.

    Returns:
        The number of slots that differ.
    """
    assert actual.shape == expected.shape
    got, wanted = actual.detach().long().cpu(), expected.detach().long().cpu()
    keys = keys.detach().double().cpu()
    limit = torch.as_tensor(limit, dtype=torch.float64).cpu().expand(keys.shape)
    is_id = (got >= -1) & (got < keys.shape[1])
    assert is_id.all(), f"ids outside [-1, {keys.shape[1]}): {got[~is_id].tolist()[:5]}"
    for t, row in enumerate(got.tolist()):
        ids = [e for e in row if e >= 0]
        assert len(set(ids)) == len(ids), f"row {t} holds an id twice: {row}"
    differs = got != wanted
    gap = _at(keys, got) - _at(keys, wanted)
    is_tie = gap.abs() <= _at(limit, got) + _at(limit, wanted)
    fails = differs & ~(is_tie & (got >= 0) & (wanted >= 0))
    if undecided is not None:
        fails &= ~undecided.cpu()[:, None]
    assert not fails.any(), _worst("near tie", fails, gap.abs(), got, wanted)
    return int(differs.sum())


def assert_has_power(check: Callable[[Tensor], object], good: Tensor) -> None:
    """Proves that `check` can fail: it accepts `good` and rejects three corruptions of it.

    The corruptions are all zeros, the first row swapped with the one least like it, and one NaN
    (integers: one element off by one).

    Args:
        check: raises AssertionError on a tensor it does not accept.
        good: a tensor it accepts; neither all zero nor all rows alike, or the case shows nothing.
    """
    check(good)
    good = good.detach()
    rows = good.double().nan_to_num(0.0).reshape(good.shape[0], -1)
    other = int((rows - rows[:1]).abs().sum(1).argmax())
    assert other > 0, "this case shows nothing: all rows are alike"
    assert good.nan_to_num(1.0).any(), "this case shows nothing: all is zero"
    order = torch.arange(good.shape[0], device=good.device)
    order[[0, other]] = order[[other, 0]]
    spoiled = good.clone(memory_format=torch.contiguous_format)
    finite = int(good.flatten().isfinite().nonzero()[-1])
    if good.is_floating_point():
        spoiled.view(-1)[finite] = torch.nan
    else:
        spoiled.view(-1)[finite] += 1
    corruptions = {
        "zeros": torch.zeros_like(good),
        f"rows 0 and {other} swapped": good[order],
        "one element spoiled": spoiled,
    }
    for name, corrupted in corruptions.items():
        try:
            check(corrupted)
        except AssertionError:
            continue
        raise AssertionError(f"the check has no power: it accepts {name}")


# ---- limits ------------------------------------------------------------------------------------


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The error of rounding `expected` to `dtype` once, gradual underflow included."""
    info = torch.finfo(dtype)
    return unit_roundoff(dtype) * expected.double().abs() + info.smallest_normal * info.eps


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_limit(x: Tensor, probabilities: Tensor) -> Tensor:
    """`(|x - max| + C + 8) u p`, and the rounding to the dtype of `x`, along the last dimension.

    `x - max` is rounded once, which exp turns into |x - max| u; exp adds 4 u; the sum of C terms
    (C - 1) u and the mean of its terms' own errors; the division u. The rest is slack.
    """
    arithmetic = _arithmetic(x.dtype)
    wide = x.detach().double()
    spread = (wide - wide.amax(-1, keepdim=True)).abs().nan_to_num(0.0, posinf=0.0)
    relative = (spread + x.shape[-1] + 8) * unit_roundoff(arithmetic)
    limit = relative * probabilities.double() + rounding(probabilities * 0.0, arithmetic) * 4
    return limit if x.dtype == arithmetic else limit + rounding(probabilities, x.dtype)


def score_limit(
    logits: Tensor, score: str = "softmax", softmax_over: str = "all", num_groups: int = 1
) -> Tensor:
    """By how much a gate score `[T, C]` may be off.

    softmax as `softmax_limit` (in the arithmetic dtype); sigmoid is one exp, one addition, one
    division: 8 u; sqrtsoftplus one exp, one log1p, one root: 12 u; relu and identity round nothing.
    """
    logits = logits.detach()
    arithmetic = _arithmetic(logits.dtype)
    scores = reference.gate_scores(logits, score, softmax_over, num_groups, dtype=torch.float64)
    if score == "softmax":
        num_parts = num_groups if softmax_over == "group" else 1
        x, p = (
            t.reshape(t.shape[0], num_parts, -1 if t.numel() else t.shape[1] // num_parts)
            for t in (logits.to(arithmetic), scores)
        )
        return softmax_limit(x, p).reshape(scores.shape)
    factor = {"sigmoid": 8, "sqrtsoftplus": 12}.get(score, 0)
    limit = factor * unit_roundoff(arithmetic) * scores.abs()
    return limit + (rounding(scores * 0.0, arithmetic) * 4 if factor else 0.0)


def key_limit(
    logits: Tensor,
    *,
    score: str = "softmax",
    softmax_over: str = "all",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    num_groups: int = 1,
) -> Tensor:
    """By how much a key `[T, C]` may be off: its score's limit, and the addition of the bias."""
    noisy = logits.detach().to(_arithmetic(logits.dtype))
    noisy = noisy if noise is None else noisy + noise
    noisy = noisy.masked_fill(noisy.isnan(), -torch.inf)
    limit = score_limit(noisy, score, softmax_over, num_groups)
    if bias is None:
        return limit
    keys = reference.gate_keys(
        logits,
        score=score,
        softmax_over=softmax_over,
        bias=bias,
        mask=mask,
        noise=noise,
        num_groups=num_groups,
        dtype=torch.float64,
    )
    return limit + rounding(keys.key.nan_to_num(0.0), noisy.dtype)


def gate_weight_limit(
    logits: Tensor,
    experts: Tensor,
    *,
    score: str = "softmax",
    softmax_over: str = "all",
    num_groups: int = 1,
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """By how much the weights `[T, K]` of a given choice may be off.

    Plain: the score's limit d times the scale, and one rounding. Normalised, s / S with S off by
    D = sum d + K u sum|s|: `(d + |s / S| D) / (S - D)`, and three roundings, of which the scale
    multiplies two: that of a subnormal s / S is no small part of it.
    """
    arithmetic = _arithmetic(logits.dtype)
    u = unit_roundoff(arithmetic)
    scores = reference.gate_scores(logits, score, softmax_over, num_groups, dtype=torch.float64)
    limit = score_limit(logits, score, softmax_over, num_groups)
    is_used = experts >= 0
    s, d = (
        torch.where(is_used, t.gather(1, experts.long().clamp(min=0)), 0.0)
        for t in (scores.detach(), limit)
    )
    if normalize:
        total = s.sum(1, keepdim=True).clamp(min=1e-20)
        total_off = d.sum(1, keepdim=True) + s.shape[1] * u * s.abs().sum(1, keepdim=True)
        s = s / total
        least = total - total_off
        d = (d + s.abs() * total_off) / torch.where(least > 0, least, 0.0)
        d = d.nan_to_num(0.0, posinf=torch.inf)
    return abs(scale) * (d + 2 * rounding(s, arithmetic)) + rounding(scale * s, arithmetic)


def score_sum_limit(logits: Tensor, num_experts: int, **options: object) -> Tensor:
    """By how much `score_sum` `[E]` may be off: `sum over t of d + T u |s|`, in any order."""
    scores = reference.gate_scores(logits, dtype=torch.float64, **options).detach()
    u = unit_roundoff(_arithmetic(logits.dtype))
    limit = score_limit(logits, **options) + logits.shape[0] * u * scores.abs()
    return limit.nan_to_num(0.0)[:, :num_experts].sum(0)


def logsumexp_limit(logits: Tensor) -> Tensor:
    """By how much `logsumexp` `[T]` may be off: `(sum p |x - max| + 2 C + 16 + |max| + |lse|) u`.

    The sum of exps is off by a relative (sum p |x - max| + C + 8) u, which log makes absolute; log
    adds 4 u log(C), the addition of the maximum one rounding.
    """
    wide = logits.detach().double()
    top = wide.amax(-1, keepdim=True).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    p = reference.softmax(wide).nan_to_num(0.0)
    spread = (wide - top).abs().nan_to_num(0.0, posinf=0.0)
    lse = wide.logsumexp(-1).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    terms = (p * spread).sum(-1) + 2 * logits.shape[1] + 16 + top[:, 0].abs() + lse.abs()
    return terms * unit_roundoff(_arithmetic(logits.dtype))


def combine_limit(rows: Tensor, plan: tuple, weights: Tensor | None, expected: Tensor) -> Tensor:
    """By how much `unpermute` may be off: `(K + 1) u sum|w x| + u_out |ref|`, K slots a token.

    One rounding for each product and each of the K - 1 additions, and that of the result.
    """
    sizes = reference.unpermute(
        rows.detach().abs(),
        plan,
        None if weights is None else weights.detach().abs(),
        dtype=torch.float64,
    )
    terms = plan.slot_to_row.shape[1] + 1
    return terms * unit_roundoff(_arithmetic(rows.dtype)) * sizes + rounding(expected, rows.dtype)


# ---- reporting ---------------------------------------------------------------------------------


def _bits(tensor: Tensor) -> Tensor:
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(same_size[tensor.element_size()])


def _at(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(1, ids.clamp(min=0))


def _worst(kind: str, fails: Tensor, badness: Tensor, *values: Tensor) -> str:
    """One line: how many elements fail, and the worst of them (a NaN is the worst there is)."""
    ranked = torch.where(fails, badness.double().nan_to_num(torch.inf), -1.0).cpu()
    index = tuple(int(i) for i in torch.unravel_index(ranked.argmax(), ranked.shape))
    shown = ", ".join(
        f"{name} {value[index].item()!r}"
        for name, value in zip(("got", "expected", "limit"), values, strict=False)
    )
    return f"{kind}: {int(fails.sum())} of {fails.numel()} fail; worst at {[*index]}: {shown}"
