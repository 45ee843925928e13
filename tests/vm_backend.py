"""The backend `vm`: the CUDA path of the ops, run by the PTX virtual machine on CPU tensors.

`make test-cuda-vm` builds what is loaded here. The library takes the place of the CPU kernels of
every op that has CUDA kernels, so a process runs the tests of one backend only.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# What belongs to torch and Python around an op, and is the same for every kernel.
NOT_KERNELS = ("compile", "export", "opcheck", "fullgraph", "registration", "example")
# float64 is for gradient checks on the CPU there, by contract.
FLOAT64_STEMS = ("gate", "grouped_mm", "moe_mlp")
# Test files that are not named after an op.
MORE_FILES = (
    *("device_rules", "up_projection", "native_products", "gate_contract", "gate_selection"),
    *("dispatch_regressions", "expert_regressions", "expert_extremes", "overflow"),
)
# What the kernels of the processor have besides.
OF_THE_CPU = ("threads", "instruction_set", "level", "streamed", "scratch")


def folder() -> Path:
    """Where the library and the engine were built."""
    return Path(os.environ.get("PTXVM_DIR", ROOT / "build" / "vm"))


@cache
def engine() -> ModuleType:
    """The engine's Python module."""
    if not (folder() / "ptxvm.so").exists():
        raise pytest.UsageError(f"no {folder() / 'ptxvm.so'}: run make test-cuda-vm, it builds it")
    sys.path.insert(0, str(folder()))
    import ptxvm

    return ptxvm


_kernels = {"cuda": False}  # what the ops run on in this process


def use_cuda_kernels() -> None:
    """Says that the ops run on CUDA kernels from here on."""
    _kernels["cuda"] = True


def runs_cuda() -> bool:
    """Whether the ops run on CUDA kernels here, on a GPU or in the vm."""
    return _kernels["cuda"]


def load() -> None:
    """Puts the CUDA path in the place of the CPU kernels."""
    import fastmoe_route  # noqa: F401  the schemas, and the kernels of ops without a CUDA path

    engine()
    use_cuda_kernels()
    # sm_100 too. Changes nothing on the 8.0 that the vm says it is, unless a test has it say other.
    os.environ["FASTMOE_ROUTE_CUDA_GEMM"] = "native"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verrid.*")
        torch.ops.load_library(str(folder() / "fastmoe_route_vm.so"))


@cache
def stems() -> frozenset[str]:
    """The ops that have a CUDA path: the host files of CUDA_SOURCES."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (sources,) = re.findall(r"set\(CUDA_SOURCES\s(.*?)\)", text, re.S)
    return frozenset(re.findall(r"csrc/ops/(\w+)\.cpp", sources))


def expert_dtypes(dtypes: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """Without float64 where the expert ops run on CUDA kernels: it is of the CPU, by contract."""
    return tuple(d for d in dtypes if d != torch.float64) if runs_cuda() else dtypes


def repeats(count: int, *, vm: int) -> int:
    """How often a test repeats itself: the vm takes a thousand times as long as the processor."""
    return vm if engine.cache_info().currsize else count


def _is_of_float64(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    is_wide = parameters is not None and torch.float64 in parameters.params.values()
    stem = item.path.stem.removeprefix("test_")
    return stem.startswith(FLOAT64_STEMS) and (
        is_wide or "gradcheck" in item.name or "float64" in item.name
    )


def takes(item: pytest.Item) -> bool:
    """Whether a test is one of the ops' tests that the vm runs."""
    name = item.name.lower()
    return not _is_of_float64(item) and (
        item.path.stem.removeprefix("test_") in {*stems(), *MORE_FILES}
        and "cpu_only" not in item.keywords
        and "large" not in item.keywords
        and not any(word in name for word in (*NOT_KERNELS, *OF_THE_CPU))
    )


def start(seed: int) -> None:
    """Before a test: its schedules follow from the seed and its own launches only."""
    engine().clear_reports()
    engine().set_options(seed=seed, num_sms=1 + seed % 4, capability=80)


def reports() -> list[str]:
    """What the engine found wrong since `start`."""
    return engine().reports()


def record() -> dict[str, object]:
    """What was launched since the library was loaded, of what it holds."""
    vm = engine()
    launches = {vm.readable(name): count for name, count in vm.launches().items()}
    known = [vm.readable(name) for name in vm.known_kernels()]
    for name in [name for name in known if "stand_in" in name]:  # tools/ptxvm's own
        known.remove(name)
        launches.pop(name, None)
    return {"launches": launches, "known": known, "instructions": vm.instructions()}
