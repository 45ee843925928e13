"""grouped_mm and moe_mlp at the ends of what they promise. Classes: exact.

A row alone and among 512, on 1 to 8 threads; arguments between pages nobody may touch; tensors past
2^31 elements (`--large`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import fastmoe_route as fr
import pytest
import torch
from cases import normal
from tolerance import assert_exact
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = 512
Place = Callable[[Tensor], Tensor]


def weights_of(experts: int, k: int, n: int, linear: bool, dtype: torch.dtype, seed: int) -> Tensor:
    """[experts, k, n] with the reduction (linear) or the outputs contiguous."""
    w = normal(experts, n, k, dtype=dtype, seed=seed) / k**0.5
    return w.transpose(1, 2) if linear else w.transpose(1, 2).contiguous()


@pytest.mark.parametrize("hidden", [136, 1100], ids=["short", "long"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "row-major"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_and_among_512_on_every_number_of_threads(
    threads: Callable[[int], None], dtype: torch.dtype, linear: bool, hidden: int
) -> None:
    """Every token has the same expert, so its rows are as many as the tokens.

    Short rows stay in the level-1 cache, long ones are summed in blocks: they take other kernels.
    """
    w_up = weights_of(2, hidden, 2 * 40, linear, dtype, 1)
    w_down = weights_of(2, 40, hidden, linear, dtype, 2)
    x = normal(MOST_ROWS, hidden, dtype=dtype, seed=3)
    experts = torch.ones(MOST_ROWS, 1, dtype=torch.int32)
    weights = torch.rand(MOST_ROWS, 1, generator=torch.Generator().manual_seed(4))
    wanted = None
    for count in range(1, 9):
        threads(count)
        whole = fr.moe_mlp(x, (experts, weights), w_up, w_down)
        wanted = whole if wanted is None else wanted
        assert_exact(whole, wanted)
        rows = [1, *range(2, 14), 31, 200] if count <= 2 else [1]
        for begin, m in zip(range(0, 7 * len(rows), 7), rows, strict=True):
            part = slice(begin, begin + m)
            alone = fr.moe_mlp(x[part], (experts[part], weights[part]), w_up, w_down)
            assert_exact(alone, wanted[part])


@pytest.fixture(params=["after", "before"])
def beside_hole(request: pytest.FixtureRequest, hole_after: Place, hole_before: Place) -> Place:
    """Places a tensor right before, or right behind, a page nobody may touch."""
    return hole_after if request.param == "after" else hole_before


def train(
    num_tokens: int, hidden: int, inter: int, dtype: torch.dtype, linear: bool, place: Place
) -> Sequence[Tensor]:
    """Output and all gradients of a layer with drops; `place` copies every tensor it is given."""
    ids = (torch.arange(num_tokens * 2).view(-1, 2) % 3).int()
    plan = fr.plan_dispatch(ids, 3, capacity=max(1, num_tokens // 2))
    maps = [place(value) for value in (plan.offsets, plan.row_to_slot, plan.slot_to_row)]
    dense = (
        normal(num_tokens, hidden, dtype=dtype, seed=1),
        normal(num_tokens, 2, dtype=torch.float32, seed=2),
        normal(3, 2 * inter, hidden, dtype=dtype, seed=3),
        normal(3, hidden, inter, dtype=dtype, seed=4),
        normal(3, 2 * inter, dtype=dtype, seed=5),
        normal(3, hidden, dtype=dtype, seed=6),
    )
    leaves = [place(value).requires_grad_() for value in dense]
    x, weights, up, down, bias_up, bias_down = leaves
    if linear:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    else:  # the same memory, read the other way round
        up, down = up.view(3, hidden, 2 * inter), down.view(3, inter, hidden)
    y = fr.moe_mlp(
        x,
        (place(ids), weights),
        up,
        down,
        plan=plan._replace(offsets=maps[0], row_to_slot=maps[1], slot_to_row=maps[2]),
        bias_up=bias_up,
        bias_down=bias_down,
    )
    grad = place(normal(num_tokens, hidden, dtype=dtype, seed=7))
    return y, *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "row-major"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_around_any_argument_is_touched(
    beside_hole: Place, dtype: torch.dtype, linear: bool
) -> None:
    for num_tokens, hidden, inter in ((1, 5, 3), (13, 33, 70), (40, 130, 18)):
        got = train(num_tokens, hidden, inter, dtype, linear, beside_hole)
        wanted = train(num_tokens, hidden, inter, dtype, linear, torch.clone)
        for mine, other in zip(got, wanted, strict=True):
            assert_exact(mine, other)


# ---- past 2^31 elements


@pytest.mark.large
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "row-major"])
def test_weights_past_two_to_the_31_elements(linear: bool) -> None:
    """3 x 27000 x 27000: the last expert begins, and its last column lies, past 32 bits."""
    size = 27_000
    stored = torch.zeros(3, size, size, dtype=torch.bfloat16)
    assert stored.numel() > 2**31
    w = stored.transpose(1, 2) if linear else stored
    w[0, :, 0], w[2, 0, -1], w[2, -1, -2] = 1.0, 3.0, 5.0
    x = torch.ones(5, size, dtype=torch.bfloat16)
    x[:, -1] = torch.arange(1.0, 6.0)
    offsets = torch.tensor([0, 1, 1, 5], dtype=torch.int32)
    y = fr.grouped_mm(x, w, offsets)
    assert y[0, 0] == torch.tensor(float(size)).bfloat16()
    assert y[0, 1:].count_nonzero() == 0
    assert y[1:, -1].tolist() == [3.0] * 4
    assert y[1:, -2].tolist() == [10.0, 15.0, 20.0, 25.0]
    assert y[1:, :-2].count_nonzero() == 0
    del w, stored
    grad = torch.zeros(5, size, dtype=torch.bfloat16)
    grad[4, -1] = 2.0
    grad_w, _ = torch.ops.fastmoe_route.grouped_mm_wgrad(x, grad, offsets, linear, True, False)
    assert grad_w.numel() > 2**31
    last = grad_w[2, -1] if linear else grad_w[2, :, -1]
    assert last[:-1].eq(2.0).all()
    assert last[-1] == 10.0
    assert grad_w[:2].count_nonzero() == 0


@pytest.mark.large
def test_rows_past_two_to_the_31_elements() -> None:
    """T = 37,460, K = 8, H = 7168: rows of an expert past what 32 bits can index."""
    num_tokens, top_k, hidden, experts = 37_460, 8, 7168, 16
    assert num_tokens * top_k * hidden > 2**31
    ids = (torch.arange(num_tokens)[:, None] * 5 + torch.arange(top_k)) % experts
    x = torch.zeros(num_tokens, hidden, dtype=torch.bfloat16)
    x[:, 0] = torch.arange(num_tokens).remainder(13).bfloat16()
    up = torch.zeros(experts, 16, hidden, dtype=torch.bfloat16)
    up[:, :, 0] = 1.0
    down = torch.zeros(experts, hidden, 16, dtype=torch.bfloat16)
    down[:, :, 3] = 1.0
    weights = torch.full((num_tokens, top_k), 0.125)
    y = fr.moe_mlp(
        x, (ids.int(), weights), up.transpose(1, 2), down.transpose(1, 2), activation="relu"
    )
    for tokens in (slice(0, 40), slice(num_tokens - 40, None)):
        assert torch.equal(y[tokens], x[tokens, :1].expand(-1, hidden))
