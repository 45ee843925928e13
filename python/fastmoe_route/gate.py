"""gate: scores, exact top-k choice, combine weights and statistics, in one read of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    arithmetic_dtype,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_int,
    check_shape,
    check_tensor,
    check_vector,
    describe,
    fail,
    kept,
    needs_grad,
)
from fastmoe_route._autograd import differentiable, direct, register_autograd
from fastmoe_route.results import Routing

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "relu", "identity")
MAX_EXPERTS = 8192
_SCORE_CODES = {score: code for code, score in enumerate(SCORES)}
# Defaults, told by identity: True and 1.0 are no ints, an array is no name, and have their errors.
_ZERO, _ONE, _ALL, _MAX = 0, 1, "all", "max"
SOFTMAX_OVER = (_ALL, "group")
GROUP_SCORES = (_MAX, "top2_sum")

_ops = torch.ops.fastmoe_route
_gate = _ops.gate.default
_gate_forward = _ops.gate_forward.default
_gate_stats_forward = _ops.gate_stats_forward.default
_gate_backward = _ops.gate_backward.default
_gate_forward_direct = direct(_gate_forward)
_gate_plain_direct = direct(_ops.gate_plain_forward.default)
_gate_plain_stats_direct = direct(_ops.gate_plain_stats_forward.default)
_gate_stats_direct = direct(_gate_stats_forward)


def gate(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    softmax_over: str = _ALL,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    num_groups: int = _ONE,
    topk_groups: int | None = None,
    group_score: str = _MAX,
    max_per_group: int | None = None,
    top_p: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    min_k: int = _ONE,
    k_per_token: Tensor | None = None,
    num_null: int = _ZERO,
    normalize: bool = False,
    scale: float = 1.0,
    stats: bool = False,
    keep_scores: bool = False,
) -> Routing:
    """Chooses up to `top_k` experts per token and weighs them.

    A token's *scores* are a function of its logits. Its *keys*, used for choosing only, are the
    scores of `logits + noise`, plus `bias`. Experts are taken by falling key, ties to the lower
    expert; a chosen expert's *weight* is its clean score, never recovered as key minus bias. Where
    the score is monotone and there is no bias, the logits themselves are compared, so every device
    takes the same experts. Softmax gating is Shazeer et al. (arXiv:1701.06538), sigmoid gating with
    a selection bias and limited groups DeepSeek-V3 (arXiv:2412.19437).

    Args:
        logits: `[T, E]`, or `[T, E + num_null]` with the null columns last; float32, bfloat16,
            float16 or float64, any strides. Arithmetic is float32 (float64 for float64). A `-inf`
            logit is never chosen; NaN ranks below every number and makes the row's weights NaN.
        top_k: slots per token, 1 to E; E is at most 8192.
        score: `softmax`, `sigmoid`, `sqrtsoftplus` = sqrt(log(1 + e^z)), `relu` or `identity`.
        softmax_over: `all` columns, or the columns of each `group` separately.
        bias: float32 `[E]` or `[T, E]`, added to the scores for choosing; like `mask` and `noise`
            it spans the null columns too. For float64 logits, `bias` and `noise` may be float64.
        mask: bool `[E]` or `[T, E]`, True where an expert may be chosen.
        noise: float32 `[T, E]`, added to the logits for choosing.
        num_groups: number of equal groups of neighbouring experts; divides E.
        topk_groups: only experts of this many best groups may be chosen; None for all groups. Ties
            go to the lower group.
        group_score: a group's rank is its best key (`max`) or the sum of its two best (`top2_sum`).
        max_per_group: at most this many experts are taken from one group.
        top_p: stop after the choice that lifts the sum of chosen scores above this; a float, or
            float32 `[T]`. `torch.compile` makes a new graph for each float, as for those of
            torch's operators.
        threshold: stop at the first key not above this; a float, or float32 `[T]`.
        min_k: real experts that `top_p` and `threshold` leave untouched.
        k_per_token: int32 `[T]`, slots to fill per token instead of `top_k`, clamped to
            `[0, top_k]`; wins over `min_k`.
        num_null: null columns, at most 8192: they compete, use up a choice and give no slot.
        normalize: divide the weights by their sum over the token's experts, floored at 1e-20.
        scale: factor on the weights, applied last.
        stats: also return `score_sum` and `logsumexp`, from the same read of the logits.
        keep_scores: also return `scores`.

    Returns:
        `Routing`. Rows without an allowed expert hold -1 and weight 0, have `logsumexp` -inf and
        add nothing to `score_sum`.

    Raises:
        TypeError, ValueError: an argument that breaks a rule above, by name.
        RuntimeError: `T * top_k` reaches 2^31.

    Differentiable in `logits` through `weights`, `score_sum`, `logsumexp` and `scores`; the choice
    is a constant, and the gradient at a `-inf` logit is 0.

    Example:
        >>> routing = gate(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), 2, normalize=True)
        >>> routing.experts, routing.weights
        (tensor([[1, 2]], dtype=torch.int32), tensor([[0.5000, 0.5000]]))
    """
    is_limited = (
        (num_null is not _ZERO or softmax_over is not _ALL or min_k is not _ONE)
        or (mask is not None or noise is not None or k_per_token is not None)
        or (top_p is not None or threshold is not None or max_per_group is not None)
    )
    is_grouped = num_groups is not _ONE or topk_groups is not None
    has_options = is_limited or is_grouped or bias is not None or group_score is not _MAX
    failed = None
    if (
        not (has_options or keep_scores is not False or is_dynamo_compiling())
        and (normalize is True or normalize is False)
        and type(top_k) is int
        and type(scale) is float
        and scale == scale
    ):
        # The operator checks in less time than what follows, which says more.
        try:
            arguments = (logits, top_k, _SCORE_CODES[score], normalize, scale)
            if stats is False:
                choose = _gate_plain_autograd if needs_grad(logits) else _gate_plain_direct
                weights, experts, demand = choose(*arguments)
                return tuple.__new__(Routing, (experts, weights, demand, None, None, None))
            if stats is True:
                op = _gate_plain_stats_autograd if needs_grad(logits) else _gate_plain_stats_direct
                weights, score_sum, logsumexp, experts, demand = op(*arguments)
                results = experts, weights, demand, score_sum, logsumexp, None
                return tuple.__new__(Routing, results)
        except RuntimeError as error:
            failed = kept(error)  # unless an argument is wrong
        except (TypeError, KeyError, AttributeError):
            pass  # said below
    num_experts, num_null = _num_experts(logits, num_null)
    top_k = check_int("gate", "top_k", top_k, 1, num_experts)
    score_code = check_choice("gate", "score", score, SCORES)
    check_flag("gate", "normalize", normalize)
    if type(scale) is not float or scale != 1.0:
        check_float("gate", "scale", scale)
    if stats is not False or keep_scores is not False:
        check_flag("gate", "stats", stats)
        check_flag("gate", "keep_scores", keep_scores)
    # Every argument that is passed on costs a tenth of a microsecond: trailing defaults are not.
    options: tuple[Any, ...] = ()
    if has_options:
        group_code = check_choice("gate", "group_score", group_score, GROUP_SCORES)
        counts = (1, 0, 0)
        if is_grouped or max_per_group is not None:
            counts = _check_groups(num_experts, num_groups, topk_groups, max_per_group, num_null)
        options = (_per_column("bias", bias, logits), *counts[:2], group_code)
    if is_limited:
        over_group = check_choice("gate", "softmax_over", softmax_over, SOFTMAX_OVER) == 1
        min_k = check_int("gate", "min_k", min_k, 0, top_k)
        if noise is not None:
            check_tensor("gate", "noise", noise, 2)
        if k_per_token is not None:
            size = logits.shape[0]
            check_vector("gate", "k_per_token", k_per_token, size, (torch.int32,), logits)
        options += (
            *(_per_column("mask", mask, logits, torch.bool), _per_column("noise", noise, logits)),
            *(over_group, min(counts[2], num_experts)),
            *_stop_rule("top_p", top_p, logits),
            *_stop_rule("threshold", threshold, logits),
            *(min_k, k_per_token, num_null),
        )
    if failed is not None:
        raise failed.pop()
    given = (logits, top_k, score_code, normalize, scale)
    if stats or keep_scores:
        return _with_statistics(given, stats, keep_scores, options)
    if needs_grad(logits):
        choose = _gate_forward_autograd
    else:
        choose = _gate_forward if is_dynamo_compiling() else _gate_forward_direct
    weights, experts, demand = choose(*given, *options)
    return Routing(experts, weights, demand)


def _with_statistics(
    given: tuple[Any, ...], stats: bool, keep_scores: bool, options: tuple[Any, ...]
) -> Routing:
    """A checked call with `stats` or `keep_scores`."""
    if needs_grad(given[0]):
        op = _gate_autograd
    else:
        op = _gate_stats_forward if is_dynamo_compiling() else _gate_stats_direct
    weights, score_sum, logsumexp, scores, experts, demand = op(
        *given, stats, keep_scores, *options
    )
    return Routing(
        *(experts, weights, demand),
        score_sum if stats else None,
        logsumexp if stats else None,
        scores if keep_scores else None,
    )


def _num_experts(logits: Tensor, num_null: int) -> tuple[int, int]:
    if (
        not isinstance(logits, Tensor)
        or logits.layout is not torch.strided
        or logits.is_nested
        or logits.dim() != 2
    ):
        check_tensor("gate", "logits", logits, 2)
    if logits.dtype not in FLOAT_DTYPES:
        check_dtype("gate", "logits", logits, FLOAT_DTYPES)
    num_columns = logits.shape[1]
    if type(num_null) is not int or num_null != 0:
        most = min(num_columns - 1, MAX_EXPERTS)
        num_null = check_int("gate", "num_null", num_null, 0, most)
    num_experts = num_columns - num_null
    if num_experts < 1 or num_experts > MAX_EXPERTS:
        fail(ValueError, "gate", "logits", f"have 1 to {MAX_EXPERTS} experts", describe(logits))
    return num_experts, num_null


def _check_groups(
    num_experts: int,
    num_groups: int,
    topk_groups: int | None,
    max_per_group: int | None,
    num_null: int,
) -> tuple[int, int, int]:
    """`num_groups`, `topk_groups` and `max_per_group` as the op takes them, 0 for None."""
    num_groups = check_int("gate", "num_groups", num_groups, 1)
    if num_experts % num_groups != 0:
        rule = f"divide the number of experts {num_experts}"
        fail(ValueError, "gate", "num_groups", rule, num_groups)
    if num_null > 0 and (num_groups > 1 or max_per_group is not None):
        fail(ValueError, "gate", "num_null", "be 0 with groups", num_null)
    if topk_groups is not None:
        topk_groups = check_int("gate", "topk_groups", topk_groups, 1, num_groups)
    if max_per_group is not None:
        max_per_group = check_int("gate", "max_per_group", max_per_group, 1)
    return num_groups, topk_groups or 0, max_per_group or 0


def _per_column(
    name: str, value: Tensor | None, logits: Tensor, dtype: torch.dtype | None = None
) -> Tensor | None:
    """A row or a matrix of all columns, in the arithmetic dtype if none is given."""
    if value is None:
        return None
    dtype = dtype or arithmetic_dtype(logits)
    if isinstance(value, Tensor) and value.dtype == torch.float32 and dtype == torch.float64:
        value = value.double()
    if not _fits_columns(value, logits, dtype):
        check_tensor("gate", name, value, 1, 2)
        check_shape("gate", name, value, logits.shape[-value.dim() :])
        check_dtype("gate", name, value, (dtype,))
        check_device("gate", name, value, logits)
    # The weights must not ask for a gradient on its account.
    return value.detach() if value.requires_grad else value


def _fits_columns(value: Any, logits: Tensor, dtype: torch.dtype) -> bool:
    """Whether nothing is wrong. One by one, the checks that can say what is take 3 us more."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.dtype == dtype
        # One rank first: tuples of unequal length are compared item by item, T with E, and a trace
        # would keep that as a condition.
        and value.shape == logits.shape[-value.dim() :]
        and value.device == logits.device
        and value.layout is torch.strided
    )


def _stop_rule(
    name: str, value: float | Tensor | None, logits: Tensor
) -> tuple[float | None, Tensor | None]:
    """The float and the per-token form of a stop rule; the one that is not given is None."""
    if value is None:
        return None, None
    if isinstance(value, Tensor):
        check_vector("gate", name, value, logits.shape[0], (torch.float32,), logits)
        return None, value.detach() if value.requires_grad else value
    check_float("gate", name, value, kind="a float or a float32 [T] tensor")
    return float(value), None


@torch.library.register_fake("fastmoe_route::gate")
@torch.library.register_fake("fastmoe_route::gate_stats_forward")
def _gate_fake(
    logits: Tensor,
    top_k: int,
    score: int = 0,
    normalize: bool = False,
    scale: float = 1.0,
    stats: bool = False,
    keep_scores: bool = False,
    *options: Any,
) -> tuple[Tensor, ...]:
    num_experts, _ = _num_experts(logits, options[14] if len(options) > 14 else 0)
    check_int("gate", "top_k", top_k, 1, num_experts)
    num_tokens = logits.shape[0]
    arithmetic = arithmetic_dtype(logits)
    return (
        logits.new_empty((num_tokens, top_k), dtype=arithmetic),
        logits.new_empty((num_experts if stats else 0,), dtype=arithmetic),
        logits.new_empty((num_tokens if stats else 0,), dtype=arithmetic),
        logits.new_empty((num_tokens if keep_scores else 0, num_experts), dtype=arithmetic),
        logits.new_empty((num_tokens, top_k), dtype=torch.int32),
        logits.new_empty((num_experts,), dtype=torch.int32),
    )


@torch.library.register_fake("fastmoe_route::gate_forward")
@torch.library.register_fake("fastmoe_route::gate_plain_forward")
def _gate_forward_fake(logits: Tensor, top_k: int, *options: Any) -> tuple[Tensor, ...]:
    flags = (False, False) if len(options) >= 3 else ()
    weights, *_, experts, demand = _gate_fake(logits, top_k, *options[:3], *flags, *options[3:])
    return weights, experts, demand


@torch.library.register_fake("fastmoe_route::gate_plain_stats_forward")
def _gate_plain_stats_fake(
    logits: Tensor, top_k: int, score: int = 0, normalize: bool = False, scale: float = 1.0
) -> tuple[Tensor, ...]:
    weights, score_sum, logsumexp, _, experts, demand = _gate_fake(
        logits, top_k, score, normalize, scale, True
    )
    return weights, score_sum, logsumexp, experts, demand


@torch.library.register_fake("fastmoe_route::gate_backward")
def _gate_backward_fake(
    grad_weights: Tensor | None,
    grad_score_sum: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_scores: Tensor | None,
    logits: Tensor,
    *options: Any,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stats, keep_scores, options = inputs[5], inputs[6], inputs[7:]
    ctx.kept = (True, stats, stats, keep_scores)
    _save(ctx, inputs, options, output[4], output[2] if stats else None)


def _setup_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, inputs[5:], output[1])


def _setup_plain_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, (), output[3], output[2])


def _save(
    ctx: Any, inputs: tuple[Any, ...], options: tuple[Any, ...], experts: Tensor, *others: Any
) -> None:
    """What backward needs; `options` are the inputs from `bias` on, if there are any."""
    logits, _, score, normalize, scale = inputs[:5]
    ctx.save_for_backward(logits, experts, *others)
    groups = (options[6], options[1], options[14]) if options else (False, 1, 0)
    ctx.options = (score, *groups, normalize, scale)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = [grad if kept else None for grad, kept in zip(grads, ctx.kept, strict=True)]
    if all(grad is None for grad in wanted):
        return _NO_GRADIENTS
    grad_logits = _gate_backward(*wanted, *ctx.saved_tensors, *ctx.options)
    return grad_logits, *_NO_GRADIENTS


def _backward_choice(ctx: Any, weights: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, experts = ctx.saved_tensors
    grad_logits = _gate_backward(weights, None, None, None, logits, experts, None, *ctx.options)
    return grad_logits, *_NO_GRADIENTS


def _backward_plain_stats(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return _NO_GRADIENTS
    grad_logits = _gate_backward(*grads, None, *ctx.saved_tensors, *ctx.options)
    return grad_logits, *_NO_GRADIENTS


def _traced_choice(logits: Tensor, top_k: int, *options: Any) -> tuple[Tensor, ...]:
    weights, *_, experts, demand = _gate(logits, top_k, *options[:3], False, False, *options[3:])
    return weights, experts, demand


def _traced_plain_stats(*arguments: Any) -> tuple[Tensor, ...]:
    weights, score_sum, logsumexp, _, experts, demand = _gate(*arguments, True, False)
    return weights, score_sum, logsumexp, experts, demand


_NO_GRADIENTS = (None,) * 22
register_autograd("gate", _backward, setup_context=_setup_context, num_differentiable=4)
_gate_autograd = differentiable(
    "gate",
    "gate_stats_forward",
    _backward,
    setup_context=_setup_context,
    num_differentiable=4,
    traced=_gate,
)
_gate_forward_autograd, _gate_plain_autograd = (
    differentiable(
        "gate",
        bare,
        _backward_choice,
        setup_context=_setup_choice,
        num_differentiable=1,
        traced=_traced_choice,
    )
    for bare in ("gate_forward", "gate_plain_forward")
)
_gate_plain_stats_autograd = differentiable(
    "gate",
    "gate_plain_stats_forward",
    _backward_plain_stats,
    setup_context=_setup_plain_stats,
    num_differentiable=3,
    traced=_traced_plain_stats,
)
