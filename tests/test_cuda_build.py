"""The CUDA library as a file: what it registers and links, what its kernels take of the device.

It is compiled only. Nothing here executes a kernel: this needs no GPU and shows no result of one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from fastmoe_route import _load

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(
    os.environ.get("FASTMOE_ROUTE_CUDA_LIBRARY", ROOT / "build" / "cuda" / "fastmoe_route_cuda.so")
)
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
REGISTER_BUDGET = 128  # two blocks of 256 threads a multiprocessor
WIDE_REGISTERS = {"softmax_backward_warp_kernel": 168}  # keeps a row; three blocks of 128 threads

ON_CUDA = (
    "gate",
    "gate_forward",
    "gate_backward",
    "softmax",
    "softmax_forward",
    "softmax_out",
    "softmax_backward",
    "softmax_topk",
    "softmax_topk_forward",
    "softmax_topk_backward",
    "expert_choice",
    "expert_choice_forward",
    "plan_dispatch",
    "permute",
    "permute_forward",
    "unpermute",
    "unpermute_forward",
    "unpermute_backward",
    "grouped_mm",
    "grouped_mm_forward",
    "grouped_mm_wgrad",
    "moe_mlp",
    "moe_mlp_forward",
    "moe_mlp_backward",
)
NOT_ON_CUDA = ("machine_read",)
KERNELS = (
    "gate_kernel",
    "gate_backward_kernel",
    "sum_tiles_kernel",
    "softmax_warp_kernel",
    "softmax_block_kernel",
    "walk_kernel",
    "scan_kernel",
    "permute_kernel",
    "unpermute_kernel",
    "unpermute_backward_kernel",
)

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the CUDA library was not built: make cuda"
)


def run_python(code: str) -> str:
    """The output of a fresh interpreter that has loaded both libraries."""
    cpu = _load._find("fastmoe_route_cpu")
    head = f"import torch\nfor path in {[str(cpu), str(LIBRARY)]}: torch.ops.load_library(path)\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_without_a_gpu_and_registers_its_ops() -> None:
    code = (
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"for name in {ON_CUDA + NOT_ON_CUDA}:\n"
        "    print(name, has('fastmoe_route::' + name, 'CUDA'))\n"
    )
    printed = dict(line.split() for line in run_python(code).splitlines())
    assert printed == {**dict.fromkeys(ON_CUDA, "True"), **dict.fromkeys(NOT_ON_CUDA, "False")}


def test_cpu_results_are_untouched_by_loading_it() -> None:
    code = (
        "x = torch.tensor([[0.0, 0.0]])\n"
        "print(torch.ops.fastmoe_route.softmax_forward(x, 0).tolist())\n"
    )
    assert run_python(code) == "[[0.5, 0.5]]\n"


def test_links_torch_for_the_cpu_only() -> None:
    if not shutil.which("readelf"):
        pytest.skip("no readelf: binutils is not installed")
    command = ["readelf", "-d", str(LIBRARY)]
    dynamic = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


# ---- what ptxas made of the kernels -------------------------------------------------------------


def cuobjdump() -> str | None:
    """cuobjdump on PATH, or of the package nvidia-cuda-cuobjdump."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    packages = Path(sysconfig.get_paths()["platlib"]) / "nvidia"
    return next((str(path) for path in packages.glob("*/bin/cuobjdump")), None)


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """What every kernel takes, by architecture and mangled name."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump==13.2.51")
    command = [tool, "-res-usage", str(LIBRARY)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    architecture = ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found[architecture, name] = usage
    return found


def own(name: str) -> bool:
    """Whether a kernel is ours and not one of CUB."""
    return "fastmoe_route" in name and "3cub" not in name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_there_for_every_architecture(architecture: str) -> None:
    names = [name for arch, name in resources() if arch == architecture and own(name)]
    missing = [k for k in KERNELS if not any(f"{len(k)}{k}" in name for name in names)]
    assert missing == []


def test_no_kernel_spills_or_has_a_stack() -> None:
    spills = {
        key: usage
        for key, usage in resources().items()
        if own(key[1]) and (usage["STACK"] > 0 or usage["LOCAL"] > 0)
    }
    assert spills == {}


def test_kernels_keep_their_register_budget() -> None:
    def budget(name: str) -> int:
        return next((n for k, n in WIDE_REGISTERS.items() if k in name), REGISTER_BUDGET)

    over = {
        key: usage["REG"]
        for key, usage in resources().items()
        if own(key[1]) and usage["REG"] > budget(key[1])
    }
    assert over == {}
