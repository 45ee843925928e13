"""Bugs that other libraries shipped in products and whole layers, one test each; none may happen.

Small whole numbers make most of them exact: every sum below is a number that each dtype holds.
"""

from __future__ import annotations

from collections.abc import Callable

import fastmoe_route as fr
import pytest
import torch
from tolerance import assert_exact
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def whole(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of -1, 0 and 1."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    keys = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(1))
    return keys.argsort(1)[:, :top_k].int()


def make(
    num_tokens: int, hidden: int, width: int, dtype: torch.dtype = torch.float32, top_k: int = 2
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """`x`, routing, `w_up` and `w_down` of a layer of six experts."""
    return (
        whole(num_tokens, hidden, dtype=dtype),
        (ids(num_tokens, top_k, 6), torch.ones(num_tokens, top_k)),
        whole(6, hidden, width, dtype=dtype, seed=2),
        whole(6, width, hidden, dtype=dtype, seed=3),
    )


def layer(x: Tensor, routing: tuple[Tensor, Tensor], w_up: Tensor, w_down: Tensor) -> Tensor:
    return fr.moe_mlp(x, routing, w_up, w_down, activation="relu")


def loop(x: Tensor, routing: tuple[Tensor, Tensor], w_up: Tensor, w_down: Tensor) -> Tensor:
    """The layer, token by token, in float64, rounded once."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, (experts, weights) in enumerate(zip(*routing, strict=True)):
        for e, weight in zip(experts.tolist(), weights.double(), strict=True):
            y[t] += weight * ((x[t].double() @ w_up[e].double()).relu() @ w_down[e].double())
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "width"), [(33, 17), (1, 1), (7, 65), (40, 31)])
def test_sizes_that_are_no_multiple_of_32(
    backend: str, dtype: torch.dtype, hidden: int, width: int
) -> None:
    """vLLM, SGLang and kt-kernel refuse them on CPU."""
    for num_tokens in (1, 9, 70):
        case = make(num_tokens, hidden, width, dtype)
        assert_exact(layer(*case), loop(*case))


def test_no_tokens(backend: str) -> None:
    """SGLang divides by zero (SIGFPE) and kt-kernel crashes (SIGSEGV) on CPU."""
    x, (experts, weights), w_up, w_down = make(0, 24, 16)
    leaves = [t.requires_grad_() for t in (x, weights, w_up, w_down)]
    y = layer(x, (experts, weights), w_up, w_down)
    assert y.shape == (0, 24)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert not any(g.any() for g in grads)


def test_one_expert_takes_all(backend: str) -> None:
    """zentorch raises an error."""
    x, (experts, weights), w_up, w_down = make(70, 24, 16)
    case = (x, (torch.full_like(experts[:, :1], 4), weights[:, :1]), w_up, w_down)
    assert_exact(layer(*case), loop(*case))


def test_hidden_states_that_are_not_contiguous(backend: str) -> None:
    """zentorch computes a silently wrong result."""
    x, routing, w_up, w_down = make(30, 24, 16)
    wanted = loop(x, routing, w_up, w_down)
    for strided in (
        x.t().contiguous().t(),
        torch.cat([x, x], 1)[:, 24:],
        x.repeat_interleave(2, 0)[::2],
    ):
        assert_exact(layer(strided, routing, w_up, w_down), wanted)
    one = x[:1].expand(30, 24)
    assert_exact(layer(one, routing, w_up, w_down), loop(one, routing, w_up, w_down))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_change_in_place(backend: str, dtype: torch.dtype) -> None:
    """zentorch packs weights once and goes on with the old ones after an optimizer step."""
    for num_tokens in (1, 70):
        case = make(num_tokens, 24, 16, dtype)
        for seed, weight in enumerate(case[2:]):
            layer(*case)
            weight.copy_(whole(*weight.shape, seed=10 + seed))
            assert_exact(layer(*case), loop(*case))
        case[3].data = whole(6, 16, 24, dtype=dtype, seed=12)
        assert_exact(layer(*case), loop(*case))


@pytest.mark.cpu_only
@pytest.mark.parametrize("stray", [-2, 6, 10**6, -(10**6), 2**31 - 1])
def test_stray_ids_are_an_error(backend: str, stray: int) -> None:
    """An id of 10^6 crashes vLLM's CPU kernels, id E reads stale memory in transformers."""
    x, (experts, weights), w_up, w_down = make(30, 24, 16)
    experts[17, 1] = stray
    with pytest.raises(RuntimeError, match=rf"experts must .*, got {stray} at token 17, slot 1"):
        layer(x, (experts, weights), w_up, w_down)


def test_a_slot_of_no_expert_changes_no_other_token(backend: str) -> None:
    """In transformers' grouped_mm one id of -1 shifts the rows of other tokens."""
    x, (experts, weights), w_up, w_down = make(30, 24, 16)
    wanted = layer(x, (experts, weights), w_up, w_down)
    experts[11] = -1
    got = layer(x, (experts, weights), w_up, w_down)
    others = torch.arange(30) != 11
    assert_exact(got[others], wanted[others])
    assert not got[11].any()


@pytest.mark.parametrize(
    "cut",
    [
        lambda x, r, u, d: (x[:, :23], r, u, d),
        lambda x, r, u, d: (x[:29], r, u, d),
        lambda x, r, u, d: (x, (r[0][:29], r[1]), u, d),
        lambda x, r, u, d: (x, (r[0], r[1][:, :1]), u, d),
        lambda x, r, u, d: (x, r, u[:, :23], d),
        lambda x, r, u, d: (x, r, u[..., :15], d),
        lambda x, r, u, d: (x, r, u, d[:5]),
        lambda x, r, u, d: (x, r, u, d[..., :23]),
    ],
    ids=range(8),
)
def test_shapes_that_do_not_fit_are_an_error(backend: str, cut: Callable[..., tuple]) -> None:
    """In vLLM's CPU kernels a mismatch corrupts the heap."""
    with pytest.raises(ValueError, match=r"must .*, got "):
        layer(*cut(*make(30, 24, 16)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_without_rows_have_zero_gradients(backend: str, dtype: torch.dtype) -> None:
    """torch's grouped_mm, and transformers on it, leave them unwritten."""
    x, (experts, weights), w_up, w_down = make(30, 24, 16, dtype)
    experts = torch.where(experts == 3, 5, experts)
    leaves = [t.requires_grad_() for t in (w_up, w_down)]
    for grad in torch.autograd.grad(layer(x, (experts, weights), *leaves).sum(), leaves):
        assert not grad[3].any()
        assert all(grad[e].any() for e in (0, 1, 2, 4, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_past_the_last_group_are_zero(backend: str, dtype: torch.dtype) -> None:
    """torch's grouped_mm leaves them unwritten, forward and backward."""
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    x = whole(20, 24, dtype=dtype).requires_grad_()
    w = whole(3, 24, 16, dtype=dtype, seed=1).requires_grad_()
    y = fr.grouped_mm(x, w, offsets)
    assert not y[9:].any()
    grad_x, grad_w = torch.autograd.grad(
        y, (x, w), torch.full_like(y, torch.nan).index_fill_(0, torch.arange(9), 1)
    )
    assert not grad_x[9:].any()
    assert grad_w.isfinite().all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("stops", [(4, 2, 6), (4, -1, 6), (2, 4, 7), (2**31 - 1, 4, 6)])
def test_offsets_that_fall_or_leave_the_rows_are_an_error(backend: str, stops: tuple) -> None:
    """torch's grouped_mm takes decreasing and negative offsets."""
    offsets = torch.tensor([0, *stops], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"grouped_mm: offsets must .*, got "):
        fr.grouped_mm(whole(6, 8), whole(3, 8, 4), offsets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_97_has_the_bits_it_has_alone(backend: str, threads, dtype: torch.dtype) -> None:
    """Eager and grouped_mm in torch on CPU: 97 of 97 tokens change; vLLM's sums follow atomics."""
    x, routing, w_up, w_down = (
        torch.randn(97, 48, generator=torch.Generator().manual_seed(5)).to(dtype),
        (ids(97, 2, 6), torch.rand(97, 2, generator=torch.Generator().manual_seed(6))),
        torch.randn(6, 48, 80, generator=torch.Generator().manual_seed(7)).to(dtype),
        torch.randn(6, 40, 48, generator=torch.Generator().manual_seed(8)).to(dtype),
    )
    y = fr.moe_mlp(x, routing, w_up, w_down)
    for count in (1, 2, 4):
        threads(count)
        assert_exact(fr.moe_mlp(x, routing, w_up, w_down), y)
    alone = [
        fr.moe_mlp(x[t : t + 1], tuple(r[t : t + 1] for r in routing), w_up, w_down)
        for t in range(97)
    ]
    assert_exact(torch.cat(alone), y)
