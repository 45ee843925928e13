"""Any call of the CUDA runtime that fails is an error of the op that made it, with its name.

No result comes back, and the next call of the op, on a device that works again, is right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from engine_fixture import ROOT, engine

sys.path.insert(0, str(ROOT / "tests"))

import fastmoe_route as fr
import torch
import vm_backend
from mutant_cases import CASES
from mutant_checks import few_blocks

CALLS = {
    name: CASES[name]
    for name in (
        "plan",
        "plan, by score",
        "plan, many experts, max_rows",
        "permute 8",
        "softmax 200",
        "softmax 1500",
        "softmax_topk 9000",
        "gate 64",
        "gate 300",
        "expert_choice, scopes",
        "reroute, local, filled",
        "experts, bfloat16",
    )
} | {
    "softmax, no gradient": lambda: fr.softmax(torch.ones(9, 200)),
    "softmax, no gradient, out": lambda: fr.softmax(torch.ones(9, 200), out=torch.empty(9, 200)),
}
OPS = (
    "plan_dispatch|reroute|permute|unpermute|softmax|softmax_topk|gate|expert_choice|moe_mlp"
    "|grouped_mm|aoti_torch_empty"
)
ERRORS = {
    2: "out of memory",
    100: "no CUDA-capable device is detected",
    209: "no kernel image is available for execution on the device",
    719: "unspecified launch failure",
}


@pytest.fixture(autouse=True)
def works_again() -> Iterator[None]:
    vm_backend.load()
    vm_backend.start(1)
    yield
    engine().set_options(failing_call=0, num_failing_calls=1)


def number_of_calls(name: str) -> int:
    CALLS[name]()  # what is asked of the device once only
    engine().set_options(failing_call=0)
    CALLS[name]()
    return int(engine().runtime_calls())


@pytest.mark.parametrize("name", CALLS)
def test_each_call_that_fails_is_an_error_and_the_next_run_is_right(name: str) -> None:
    count = number_of_calls(name)
    assert count > 0
    for call in range(1, count + 1):
        code = list(ERRORS)[call % len(ERRORS)]
        engine().set_options(failing_call=call, failing_code=code)
        with pytest.raises(RuntimeError, match=OPS) as raised:
            CALLS[name]()
        text = str(raised.value)
        assert f"{ERRORS[code]} (CUDA error" in text or "aoti_torch_empty" in text, text
        engine().set_options(failing_call=0)
        CALLS[name]()
    assert vm_backend.reports() == []


@pytest.mark.parametrize("code", sorted(ERRORS))
@pytest.mark.parametrize("name", CALLS)
def test_a_device_that_fails_throughout_is_an_error(name: str, code: int) -> None:
    engine().set_options(failing_call=1, num_failing_calls=2**62, failing_code=code)
    with pytest.raises(RuntimeError, match=OPS):
        CALLS[name]()


def test_a_result_that_is_not_written_whole_is_an_error() -> None:
    logits = torch.randn(9, 100)
    with few_blocks(1, "sum_tiles_kernel"), pytest.raises(RuntimeError, match="unwritten result"):
        fr.gate(logits, 2, stats=True)
    assert "never written" in vm_backend.reports()[0]
