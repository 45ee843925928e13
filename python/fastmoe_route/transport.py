"""transport: balanced assignment by a fixed number of iterations, without a host synchronisation.

The operators are written in plain torch and serve every device; what is worth a kernel here, the
selection per row, is the gate's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    ID_DTYPES,
    INT32_LIMIT,
    arithmetic_dtype,
    check_choice,
    check_dtype,
    check_float,
    check_int,
    check_tensor,
    check_vector,
    describe,
    fail,
    needs_grad,
)
from fastmoe_route._autograd import register_autograd
from fastmoe_route.gate import gate

METHODS = ("sinkhorn", "bip", "ksparse")

_ops = torch.ops.fastmoe_route
_library = torch.library.Library("fastmoe_route", "FRAGMENT")
_library.define(
    "transport(Tensor scores, int method, int iters, float temperature, Tensor? marginal, "
    "int top_k, float gamma, float learning_rate, Tensor? scope_ids, SymInt num_scopes) -> Tensor"
)
_library.define(
    "transport_backward(Tensor grad_plan, Tensor scores, int iters, float temperature, "
    "Tensor? marginal, Tensor? scope_ids, SymInt num_scopes) -> Tensor"
)


def transport(
    scores: Tensor,
    method: str,
    *,
    iters: int,
    temperature: float = 0.05,
    marginal: Tensor | None = None,
    top_k: int = 1,
    k: int = 1,
    gamma: float = 1.0,
    learning_rate: float = 0.01,
    scope_ids: Tensor | None = None,
    num_scopes: int | None = None,
) -> Tensor:
    """Spreads tokens evenly over experts: a plan, or a bias that makes the gate do it.

    - `sinkhorn`: the plan `P` that maximises `<P, scores> + temperature * entropy(P)` with row
      sums 1 and column sums `T / E`, by `iters` rounds of scaling columns and then rows
      (Cuturi, arXiv:1306.0895). Rows sum to 1 whatever `iters`; columns as it converges.
    - `bip`: the bias `-q` of the dual of `max sum score` with `top_k` experts per token and
      `n = T * top_k / E` tokens per expert: `iters` times `p_t = max(0, the (top_k + 1)-th largest
      of the row's score - q)`, then `q_e = max(0, the (floor(n) + 1)-th largest of the column's
      score - p)` (arXiv:2502.15451). Pass it as `bias` of `gate`.
    - `ksparse`: a plan with at most `k` non-zeros per row, the maximum of
      `<P, scores> - gamma / 2 * |P|^2` with the column sums as prices, found by `iters` steps of
      Adam on the prices; a row is the projection of `(scores - prices) / gamma` on the simplex,
      restricted to its `k` largest (arXiv:2209.15466). Column sums are met only as it converges.

    Args:
        scores: float `[T, E]`, any strides; arithmetic is float32 (float64 for float64). A row of
            `-inf` gives a row of zeros under `sinkhorn`; NaN spoils all it is balanced with.
        method: `sinkhorn`, `bip` or `ksparse`.
        iters: the number of iterations, at least 1.
        temperature: of `sinkhorn`, positive.
        marginal: of `sinkhorn`, `[E]`: the column sums, scaled so that they add up to the number of
            tokens; None for even ones. No sum may be negative, and a 0 gives its expert nothing.
        top_k: of `bip`, experts per token.
        k: of `ksparse`, experts per token at most.
        gamma: of `ksparse`, positive; the larger, the more even a row.
        learning_rate: of `ksparse`, Adam's.
        scope_ids: int32 `[T]`: every scope is balanced on its own, so what one request gets never
            depends on another.
        num_scopes: ids are then in `[0, num_scopes)`, and the memory follows it; None lets them be
            any numbers.

    Returns:
        float32 (float64 for float64 scores): the plan `[T, E]`; for `bip` the bias `[E]`, not
        positive, or `[T, E]` with scopes. `sinkhorn` is differentiable in `scores`, through all its
        iterations; the others are constants.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or is out of range.
        RuntimeError: `marginal` or `scope_ids` holds what it may not (checked on CPU).

    >>> scores = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    >>> transport(scores, "sinkhorn", iters=50, temperature=0.25).round(decimals=2)
    tensor([[0.7300, 0.2700],
            [0.2700, 0.7300]])
    """
    check_tensor("transport", "scores", scores, 2)
    check_dtype("transport", "scores", scores, FLOAT_DTYPES)
    code = check_choice("transport", "method", method, METHODS)
    iters = check_int("transport", "iters", iters, 1, 2**31 - 1)
    num_tokens, num_experts = scores.shape
    if num_experts < 1:
        fail(ValueError, "transport", "scores", "have at least 1 expert", num_experts)
    floats = {"temperature": temperature, "gamma": gamma, "learning_rate": learning_rate}
    for argument, value in floats.items():
        check_float("transport", argument, value, "be positive")
        if not value > 0:
            fail(ValueError, "transport", argument, "be positive", value)
    top_k = check_int("transport", "top_k", top_k, 1, num_experts)
    k = check_int("transport", "k", k, 1, num_experts)
    if marginal is not None:
        if method != "sinkhorn":
            fail(ValueError, "transport", "marginal", f"be None for {method}", describe(marginal))
        check_vector("transport", "marginal", marginal, num_experts, FLOAT_DTYPES, scores)
    if scope_ids is not None:
        check_vector("transport", "scope_ids", scope_ids, num_tokens, ID_DTYPES, scores)
    if num_scopes is not None:
        num_scopes = check_int("transport", "num_scopes", num_scopes, 1, INT32_LIMIT - 1)
        if scope_ids is None and num_scopes != 1:
            fail(ValueError, "transport", "scope_ids", "be given with num_scopes", None)
    if not (method == "sinkhorn" and needs_grad(scores)):
        scores = scores.detach()
    return _ops.transport(  # type: ignore[no-any-return]
        scores,
        code,
        iters,
        float(temperature),
        marginal,
        k if method == "ksparse" else top_k,
        float(gamma),
        float(learning_rate),
        scope_ids,
        0 if num_scopes is None else num_scopes,
    )


# ---- tokens by scope ---------------------------------------------------------------------------


class _Scopes(NamedTuple):
    """Tokens sorted by scope. `S` scopes; where their number is not given, `S = T`."""

    order: Tensor  # int64 [T], the token of every sorted row
    ids: Tensor  # int64 [T], the scope of every sorted row, counted from 0
    offsets: Tensor  # int64 [S + 1], the first row of every scope

    @property
    def sizes(self) -> Tensor:
        return self.offsets.diff()


def _by_scope(scope_ids: Tensor | None, num_scopes: int) -> _Scopes | None:
    if scope_ids is None:
        return None
    sorted_ids, order = scope_ids.long().sort(stable=True)
    if num_scopes == 0:
        num_scopes = scope_ids.shape[0]
        sorted_ids = (torch.diff(sorted_ids, prepend=sorted_ids[:1]) != 0).cumsum(0)
    bounds = torch.arange(num_scopes + 1, device=scope_ids.device)
    return _Scopes(order, sorted_ids, torch.searchsorted(sorted_ids, bounds))


def _sorted(x: Tensor, scopes: _Scopes | None) -> Tensor:
    return x if scopes is None else x[scopes.order]


def _unsorted(x: Tensor, scopes: _Scopes | None) -> Tensor:
    if scopes is None:
        return x
    return torch.empty_like(x).index_copy_(0, scopes.order, x)


def _of_rows(per_scope: Tensor, scopes: _Scopes | None) -> Tensor:
    """`[S, E]` or `[1, E]` spread over rows."""
    return per_scope if scopes is None else per_scope[scopes.ids]


def _column_reduce(x: Tensor, scopes: _Scopes | None, kind: str) -> Tensor:
    """The sum or maximum of every column, `[1, E]`, or per scope `[S, E]`; no atomics."""
    if scopes is None:
        return x.sum(0, keepdim=True) if kind == "sum" else x.amax(0, keepdim=True)
    initial = 0.0 if kind == "sum" else -torch.inf
    return torch.segment_reduce(
        x, kind, offsets=scopes.offsets, axis=0, unsafe=True, initial=initial
    )


def _column_logsumexp(x: Tensor, scopes: _Scopes | None) -> Tensor:
    top = _column_reduce(x, scopes, "max")
    top = torch.where(top == -torch.inf, 0.0, top)
    return _column_reduce((x - _of_rows(top, scopes)).exp(), scopes, "sum").log() + top


# ---- the three methods -------------------------------------------------------------------------


def _log_marginal(scores: Tensor, marginal: Tensor | None, scopes: _Scopes | None) -> Tensor:
    """`[1, E]` or `[S, E]`, the logarithms of the wanted column sums, -inf for 0."""
    num_tokens, num_experts = scores.shape
    if marginal is None:
        share = scores.new_full((num_experts,), 1.0 / num_experts)
    else:
        share = marginal.to(scores.dtype) / marginal.to(scores.dtype).sum()
    if scopes is None:
        return (share * num_tokens).log()[None]
    return (scopes.sizes.to(scores.dtype)[:, None] * share).log()


def _sinkhorn_scalings(
    x: Tensor, log_marginal: Tensor, iters: int, scopes: _Scopes | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The logarithms of the row scalings `[T, 1]` (from 0 on) and of the column scalings."""
    rows, columns = [x.new_zeros(x.shape[0], 1)], []
    for _ in range(iters):
        column = log_marginal - _column_logsumexp(x + rows[-1], scopes)
        column = torch.where(column == torch.inf, 0.0, column)  # one that is -inf throughout
        columns.append(torch.where(log_marginal == -torch.inf, -torch.inf, column))
        row = -(x + _of_rows(columns[-1], scopes)).logsumexp(1, keepdim=True)
        rows.append(torch.where(row == torch.inf, 0.0, row))
    return rows, columns


def _sinkhorn(
    scores: Tensor, iters: int, temperature: float, marginal: Tensor | None, scopes: _Scopes | None
) -> Tensor:
    x = scores / temperature
    log_marginal = _log_marginal(scores, marginal, scopes)
    _, columns = _sinkhorn_scalings(x, log_marginal, iters, scopes)
    last = x + _of_rows(columns[-1], scopes)
    is_empty = last.amax(1, keepdim=True) == -torch.inf
    return last.softmax(1).masked_fill(is_empty, 0.0)


def _bip(scores: Tensor, iters: int, top_k: int, scopes: _Scopes | None) -> Tensor:
    num_experts = scores.shape[1]
    q = scores.new_zeros(1 if scopes is None else scopes.offsets.shape[0] - 1, num_experts)
    if top_k == num_experts:
        return q
    for _ in range(iters):
        lowered = scores - _of_rows(q, scopes)
        p = lowered.topk(top_k + 1, dim=1).values[:, top_k:].clamp(min=0)
        q = _column_kth(scores - p, top_k, scopes).clamp(min=0)
    return q


def _column_kth(x: Tensor, top_k: int, scopes: _Scopes | None) -> Tensor:
    """The `(floor(n * top_k / E) + 1)`-th largest of every column with `n` rows, per scope."""
    num_tokens, num_experts = x.shape
    if scopes is None:
        rank = num_tokens - num_tokens * top_k // num_experts
        return x.t().contiguous().kthvalue(rank, dim=1).values[None]
    order = x.argsort(dim=0, descending=True, stable=True)
    by_scope = scopes.ids[order].argsort(dim=0, stable=True)
    ordered = x.gather(0, order.gather(0, by_scope))
    place = scopes.offsets[:-1] + scopes.sizes * top_k // num_experts
    found = ordered[place.clamp(max=num_tokens - 1)]
    return torch.where(scopes.sizes[:, None] > 0, found, 0.0)


class Prices(NamedTuple):
    """What Adam (arXiv:1412.6980) knows of the prices that it descends on."""

    value: Tensor
    mean: Tensor
    square: Tensor

    def moved(self, gradient: Tensor, step: int, learning_rate: float) -> Prices:
        """The prices after step number `step`, counted from 1."""
        mean = 0.9 * self.mean + 0.1 * gradient
        square = 0.999 * self.square + 0.001 * gradient.square()
        spread = (square / (1 - 0.999**step)).sqrt() + 1e-8
        return Prices(self.value - learning_rate * mean / (1 - 0.9**step) / spread, mean, square)


def _ksparse(
    scores: Tensor, iters: int, k: int, gamma: float, learning_rate: float, scopes: _Scopes | None
) -> Tensor:
    target = _log_marginal(scores, None, scopes).exp()
    prices = Prices(*(torch.zeros_like(target) for _ in range(3)))
    for step in range(1, iters + 1):
        plan = _sparse_rows(scores - _of_rows(prices.value, scopes), k, gamma)
        gradient = target - _column_reduce(plan, scopes, "sum")
        prices = prices.moved(gradient, step, learning_rate)
    return _sparse_rows(scores - _of_rows(prices.value, scopes), k, gamma)


def _sparse_rows(x: Tensor, k: int, gamma: float) -> Tensor:
    """Every row of `x / gamma` projected on the simplex, restricted to its `k` largest."""
    experts = gate(x, k, score="identity").experts.long()
    values = x.gather(1, experts.clamp(min=0)) / gamma
    counts = torch.arange(1, k + 1, device=x.device)
    excess = (values.cumsum(1) - 1) / counts
    inside = (values > excess).sum(1, keepdim=True)
    shift = excess.gather(1, inside.clamp(min=1) - 1)
    projected = (values - shift).clamp(min=0).masked_fill(experts < 0, 0.0)
    num_experts = x.shape[1]
    wider = x.new_zeros(x.shape[0], num_experts + 1)  # the last column takes what names no expert
    return wider.scatter(1, torch.where(experts < 0, num_experts, experts), projected)[
        :, :num_experts
    ].contiguous()


# ---- operators ---------------------------------------------------------------------------------


def _check_values(marginal: Tensor | None, scope_ids: Tensor | None, num_scopes: int) -> None:
    """What only a host can look at without waiting."""
    if marginal is not None and marginal.is_cpu:
        is_sum = marginal.isfinite().all() and (marginal >= 0).all() and (marginal > 0).any()
        if not is_sum:
            rule = "be finite and at least 0, and not 0 throughout"
            fail(RuntimeError, "transport", "marginal", rule, marginal.tolist())
    if num_scopes and scope_ids is not None and scope_ids.is_cpu:
        outside = scope_ids[(scope_ids < 0) | (scope_ids >= num_scopes)]
        if outside.numel():
            rule = f"be in [0, {num_scopes})"
            fail(RuntimeError, "transport", "scope_ids", rule, int(outside[0]))


def _is_bias(method: int, scope_ids: Tensor | None) -> bool:
    """Whether the result is one bias `[E]` for all tokens."""
    return METHODS[method] == "bip" and scope_ids is None


def _transport(
    scores: Tensor,
    method: int,
    iters: int,
    temperature: float,
    marginal: Tensor | None,
    top_k: int,
    gamma: float,
    learning_rate: float,
    scope_ids: Tensor | None,
    num_scopes: int,
) -> Tensor:
    _check_values(marginal, scope_ids, num_scopes)
    scopes = _by_scope(scope_ids, num_scopes)
    wide = scores.to(arithmetic_dtype(scores))
    wide = _sorted(wide, scopes).contiguous()
    if scores.shape[0] == 0:
        return wide.new_zeros(wide.shape[1:]) if _is_bias(method, scope_ids) else wide.clone()
    if METHODS[method] == "sinkhorn":
        return _unsorted(_sinkhorn(wide, iters, temperature, marginal, scopes), scopes)
    if METHODS[method] == "ksparse":
        return _unsorted(_ksparse(wide, iters, top_k, gamma, learning_rate, scopes), scopes)
    bias = 0.0 - _bip(wide, iters, top_k, scopes)  # no negative zeros
    return bias[0] if scopes is None else _unsorted(_of_rows(bias, scopes), scopes)


def _transport_backward(
    grad_plan: Tensor,
    scores: Tensor,
    iters: int,
    temperature: float,
    marginal: Tensor | None,
    scope_ids: Tensor | None,
    num_scopes: int,
) -> Tensor:
    """Backwards through the scalings of `sinkhorn`, computed anew."""
    scopes = _by_scope(scope_ids, num_scopes)
    wide = scores.to(arithmetic_dtype(scores))
    if scores.shape[0] == 0:
        return torch.zeros_like(scores)
    x = _sorted(wide, scopes).contiguous() / temperature
    log_marginal = _log_marginal(x, marginal, scopes)
    rows, columns = _sinkhorn_scalings(x, log_marginal, iters, scopes)
    grad_x = torch.zeros_like(x)
    grad_row = torch.zeros_like(rows[0])
    grad_column = torch.zeros_like(columns[0])
    upper = _sorted(grad_plan, scopes)
    for step in range(iters, 0, -1):
        plan = (x + rows[step] + _of_rows(columns[step - 1], scopes)).exp()
        if step == iters:
            part = upper * plan
            grad_x = grad_x + part
            grad_row = grad_row + part.sum(1, keepdim=True)
            grad_column = grad_column + _column_reduce(part, scopes, "sum")
        part = grad_row * plan  # a row scaling is minus the logsumexp whose softmax is the plan
        grad_x = grad_x - part
        grad_column = grad_column - _column_reduce(part, scopes, "sum")
        log_share = columns[step - 1] - log_marginal
        log_share = torch.where(log_marginal == -torch.inf, -torch.inf, log_share)
        share = (x + rows[step - 1] + _of_rows(log_share, scopes)).exp()
        part = _of_rows(grad_column, scopes) * share
        grad_x = grad_x - part
        grad_row = -part.sum(1, keepdim=True)
        grad_column = torch.zeros_like(grad_column)
    return _unsorted(grad_x / temperature, scopes).to(scores.dtype)


_library.impl("transport", _transport, "CompositeExplicitAutograd")
_library.impl("transport_backward", _transport_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastmoe_route::transport")
def _transport_fake(scores: Tensor, method: int, *others: Any) -> Tensor:
    *_, scope_ids, _ = others
    shape = scores.shape[1:] if _is_bias(method, scope_ids) else scores.shape
    return scores.new_empty(shape, dtype=arithmetic_dtype(scores))


@torch.library.register_fake("fastmoe_route::transport_backward")
def _transport_backward_fake(grad_plan: Tensor, scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, method, iters, temperature, marginal, *_, scope_ids, num_scopes = inputs
    if METHODS[method] != "sinkhorn":
        ctx.mark_non_differentiable(output)
    ctx.save_for_backward(scores, marginal, scope_ids)
    ctx.options = (iters, temperature, num_scopes)


def _backward(ctx: Any, grad_plan: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_plan is None:
        return (None,) * 10
    scores, marginal, scope_ids = ctx.saved_tensors
    iters, temperature, num_scopes = ctx.options
    grad = _ops.transport_backward(
        grad_plan, scores, iters, temperature, marginal, scope_ids, num_scopes
    )
    return (grad, *(None,) * 9)


register_autograd("transport", _backward, setup_context=_setup_context)
