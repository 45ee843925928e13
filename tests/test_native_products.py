"""The way to the products of one architecture alone: arrays in device memory, zeros, other kernels.

In the PTX virtual machine, which says it is that architecture; plain products that read the same
arrays stand in for CUTLASS's kernels, whose instructions it has not. Classes: bound, ratio, exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import fastmoe_route as fr
import pytest
import torch
import vm_backend
from fastmoe_route import reference
from test_grouped_mm import check_product, normal, offsets_of, weights
from test_moe_mlp import check_case, make
from tolerance import assert_exact

DTYPES = (torch.bfloat16, torch.float16)
STAND_INS = "stand_in_product_kernel"


@pytest.fixture(params=[90, 100])
def native(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.config.getoption("--backend") != "vm":
        pytest.skip("runs in the PTX virtual machine: make test-cuda-vm")
    vm_backend.engine().set_options(capability=request.param)
    before = launches()
    yield request.param
    assert launches() > before, "another kernel was taken"


def launches() -> int:
    vm = vm_backend.engine()
    return sum(count for name, count in vm.launches().items() if STAND_INS in name)


@pytest.mark.parametrize("layout", ["row_major", "column_major"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_native_arrays(native: int, dtype: torch.dtype, layout: str) -> None:
    """Groups without rows, rows behind the last, rows that lie apart, more groups than threads."""
    for counts, padding, a, b in (
        ((3, 0, 5, 0), 7, 16, 24),
        ((0, 0), 3, 8, 8),
        ((40, 1), 0, 1032, 16),
        ((1, 0) * 150, 5, 8, 8),
    ):
        offsets = offsets_of(counts)
        apart = normal(sum(counts) + padding, a + 8, dtype=dtype)[:, :a]
        w = weights(len(counts), a, b, dtype, layout)
        check_product(apart, w, offsets, None)
        leaves = [apart.detach().requires_grad_(), w.detach().requires_grad_()]
        grad = normal(sum(counts) + padding, b, dtype=dtype, seed=3)
        got = torch.autograd.grad(fr.grouped_mm(*leaves, offsets), leaves, grad)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        wanted = torch.autograd.grad(reference.grouped_mm(*exact, offsets), exact, grad.double())
        for mine, theirs in zip(got, wanted, strict=True):
            size = max(theirs.abs().max().item(), 1e-3)
            assert (mine.double() - theirs).abs().max().item() <= 8 * torch.finfo(dtype).eps * size
        empty = [e for e, count in enumerate(counts) if count == 0]
        assert not got[1][empty].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("weights_on", ["output", "input"])
def test_layers_around_native_products(
    native: int, dtype: torch.dtype, linear: bool, weights_on: str
) -> None:
    """The up projection in launches of its own: permute, scaling, product, activation."""
    for activation, interleaved in (("swiglu", False), ("geglu", True), ("relu2", False)):
        case = make(
            *(37, 40, 136, 4, 2),
            dtype=dtype,
            linear=linear,
            activation=activation,
            interleaved=interleaved,
            weights_on=weights_on,
        )
        case["routing"][0][5:9] = -1
        case["routing"][0][case["routing"][0] == 2] = -1  # nobody asks for expert 2
        check_case(case)
        plan = fr.plan_dispatch(case["routing"][0], 4, align=16)
        assert_exact(fr.moe_mlp(**case, plan=plan), fr.moe_mlp(**case))


def test_what_native_kernels_do_not_take_goes_the_portable_way(
    request: pytest.FixtureRequest,
) -> None:
    if request.config.getoption("--backend") != "vm":
        pytest.skip("runs in the PTX virtual machine: make test-cuda-vm")
    before = launches()
    for capability, dtype, a, has_bias in (
        (80, torch.bfloat16, 16, False),
        (90, torch.float32, 16, False),
        (90, torch.bfloat16, 15, False),
        (90, torch.bfloat16, 16, True),  # as where the weights cannot be mapped
        (100, torch.float16, 16, True),
        (103, torch.float16, 16, False),
        (120, torch.bfloat16, 16, False),
    ):
        vm_backend.engine().set_options(capability=capability)
        w = weights(2, a, 16, dtype, "row_major")
        bias = normal(2, 16, dtype=dtype) if has_bias else None
        check_product(normal(9, a, dtype=dtype), w, offsets_of((4, 5)), bias)
    assert launches() == before
