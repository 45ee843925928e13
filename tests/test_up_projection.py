"""The first half of the expert layer, which a GPU takes in one launch. Classes: ratio, exact."""

from __future__ import annotations

from collections.abc import Callable

import fastmoe_route as fr
import products
import pytest
import torch
import vm_backend
from cases import normal
from expert_checks import DTYPES, check_case, make, results
from tolerance import assert_exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("linear", [True, False])
def test_up_projection_with_its_activation(backend: str, dtype: torch.dtype, linear: bool) -> None:
    """Sizes in multiples of 16 bytes, which a GPU takes in one launch, off every tile."""
    for activation, interleaved in (("swiglu", False), ("swiglu_clamped", True), ("relu2", False)):
        for weights_on in ("output", "input"):
            case = make(
                *(37, 40, 136, 3, 2),
                dtype=dtype,
                linear=linear,
                biases=weights_on == "input",
                activation=activation,
                interleaved=interleaved,
                weights_on=weights_on,
            )
            case["routing"][0][5:9] = -1
            check_case(case)
            assert_exact(fr.moe_mlp(**case), results(fr.moe_mlp, case)["y"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("linear", [True, False])
def test_biases_of_zero_change_no_bit(backend: str, dtype: torch.dtype, linear: bool) -> None:
    """On sm_90 other kernels multiply where there is a bias; several tiles of rows and columns."""
    for activation, interleaved, width in (
        ("swiglu", False, 136),
        ("swiglu_clamped", True, 136),
        ("gelu", False, 264),
    ):
        case = make(
            *(150, 72, width, 2, 2),
            dtype=dtype,
            linear=linear,
            activation=activation,
            interleaved=interleaved,
        )
        case["routing"][0][::7] = -1
        check_case(case)
        up, down = case["w_up"].shape[2], case["w_down"].shape[2]
        zeros = {"bias_up": torch.zeros(2, up, dtype=dtype)}
        zeros["bias_down"] = torch.zeros(2, down, dtype=dtype)
        assert_exact(fr.moe_mlp(**case, **zeros), fr.moe_mlp(**case))


@pytest.mark.parametrize("linear", [True, False])
def test_tf32_where_torch_allows_it(
    backend: str, allow_tf32: Callable[[], None], linear: bool
) -> None:
    """One-hot inputs and identity down projections show the rounding of the up projection."""
    x = torch.eye(64)[:20]
    w_up = products.off_halves(normal(2, 64, 64, seed=3))
    w_up = w_up.transpose(1, 2).contiguous().transpose(1, 2) if linear else w_up
    w_down = torch.eye(64).repeat(2, 1, 1)
    experts = torch.arange(20, dtype=torch.int32)[:, None] % 2
    routing = (experts, torch.ones(20, 1))
    wanted = w_up[experts[:, 0].long(), torch.arange(20)].relu()
    assert_exact(fr.moe_mlp(x, routing, w_up, w_down, activation="relu"), wanted)
    allow_tf32()
    rounded = products.tf32(wanted) if vm_backend.runs_cuda() else wanted
    assert_exact(fr.moe_mlp(x, routing, w_up, w_down, activation="relu"), rounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_on_input_at_odd_sizes(backend: str, dtype: torch.dtype) -> None:
    check_case(make(7, 13, 5, 3, 2, dtype=dtype, weights_on="input"))
