"""transport and assign_balanced from their definitions, scope by scope."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from fastmoe_route.reference.softmax import arithmetic_dtype


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A plan `[T, E]`, or a bias `[E]` (`[T, E]` with scopes) for `bip`."""
    x = scores.to(arithmetic_dtype(scores, dtype))
    if scope_ids is not None:
        parts = torch.zeros_like(x)
        for scope in scope_ids.unique():
            rows = (scope_ids == scope).nonzero()[:, 0]
            part = transport(
                x[rows],
                method,
                iters=iters,
                temperature=temperature,
                marginal=marginal,
                top_k=top_k,
                k=k,
                gamma=gamma,
                learning_rate=learning_rate,
            )
            parts = parts.index_copy(0, rows, part.expand(len(rows), -1))
        return parts
    if method == "sinkhorn":
        return _sinkhorn(x, iters, temperature, marginal)
    if method == "bip":
        return _bip(x, iters, top_k)
    return _ksparse(x, iters, k, gamma, learning_rate)


def _sinkhorn(x: Tensor, iters: int, temperature: float, marginal: Tensor | None) -> Tensor:
    """Scales the columns, then the rows, of `exp(x / temperature)`."""
    num_tokens, num_experts = x.shape
    if num_tokens == 0:
        return x
    wanted = x.new_full((num_experts,), 1.0) if marginal is None else marginal.to(x.dtype)
    wanted = wanted * (num_tokens / wanted.sum())
    kernel = ((x - x.max()) / temperature).exp()
    rows = x.new_ones(num_tokens)
    columns = x.new_ones(num_experts)
    for _ in range(iters):
        columns = wanted / (rows[:, None] * kernel).sum(0)
        rows = 1 / (kernel * columns).sum(1)
    return rows[:, None] * kernel * columns


def _bip(x: Tensor, iters: int, top_k: int) -> Tensor:
    num_tokens, num_experts = x.shape
    room = num_tokens * top_k // num_experts
    q = x.new_zeros(num_experts)
    for _ in range(iters):
        rows = (x - q).sort(1, descending=True).values
        p = rows[:, top_k].clamp(min=0) if top_k < num_experts else x.new_zeros(num_tokens)
        columns = (x - p[:, None]).sort(0, descending=True).values
        q = columns[room].clamp(min=0) if room < num_tokens else x.new_zeros(num_experts)
    return 0.0 - q


def project_sparse(row: Tensor, k: int) -> Tensor:
    """The closest point of the simplex with at most `k` non-zeros, by trying every support size."""
    order = row.sort(descending=True, stable=True).indices[:k]
    best = torch.zeros_like(row)
    for size in range(1, k + 1):
        support = order[:size]
        shift = (row[support].sum() - 1) / size
        if bool((row[support] > shift).all()):
            best = torch.zeros_like(row)
            best[support] = row[support] - shift
    return best


def _ksparse(x: Tensor, iters: int, k: int, gamma: float, learning_rate: float) -> Tensor:
    """Adam on the prices of the column sums, by torch.optim."""
    num_tokens, num_experts = x.shape
    prices = x.new_zeros(num_experts).requires_grad_()
    optimizer = torch.optim.Adam([prices], lr=learning_rate)

    def plan() -> Tensor:
        rows = [project_sparse((row - prices.detach()) / gamma, k) for row in x]
        return torch.stack(rows) if rows else x

    for _ in range(iters):
        prices.grad = num_tokens / num_experts - plan().sum(0)
        optimizer.step()
    return plan()


def assign_balanced(scores: Tensor, *, method: str = "exact") -> Tensor:
    """The best assignment of `T / E` tokens to each expert, by trying them all; small `T` only."""
    num_tokens, num_experts = scores.shape
    seats = [e for e in range(num_experts) for _ in range(num_tokens // num_experts)]
    best = max(
        sorted(set(permutations(seats))),
        key=lambda experts: sum(float(scores[t, e]) for t, e in enumerate(experts)),
    )
    return torch.tensor(best, dtype=torch.int32, device=scores.device)
