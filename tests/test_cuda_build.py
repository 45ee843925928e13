"""The CUDA library as a file: what it registers and links, what its kernels take of the device.

It is compiled only. Nothing here executes a kernel: this needs no GPU and shows no result of one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from fastmoe_route import _load, cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_evidence  # noqa: E402
import cuda_kernels  # noqa: E402

LIBRARY = Path(
    os.environ.get("FASTMOE_ROUTE_CUDA_LIBRARY", ROOT / "build" / "cuda" / "fastmoe_route_cuda.so")
)
ARCHITECTURES = cuda_kernels.ARCHITECTURES
REGISTER_BUDGET = 128  # two blocks of 256 threads a multiprocessor
WIDE_REGISTERS = {
    "softmax_backward_warp_kernel": 168,  # keeps a row; three blocks of 128 threads
    "rows_product_kernel": 255,  # 128 accumulators a thread; two blocks of 128 threads
    "groups_product_kernel": 255,
    "up_product_kernel": 255,
    "cutlass::device_kernel": 168,  # 384 threads, which move registers between groups of warps
    "sm90_up_kernel": 168,
}
# Warps a multiprocessor has to hold at least; products hide their latency by stages, not by warps.
WARP_FLOOR = 16
FEW_WARPS = {
    "rows_product_kernel": 8,
    "groups_product_kernel": 8,
    "up_product_kernel": 8,
    "cutlass::device_kernel": 6,
    "sm90_up_kernel": 12,
    "softmax_backward_warp_kernel": 12,
    "sum_tiles_kernel": 32,
}

# The assignment's auction runs on the host by contract; the others ask about the processor.
NOT_ON_CUDA = ("assign_balanced", "machine_read")
ON_EVERY_DEVICE = ("machine_peak", "machine_info")


@cache
def on_cuda() -> tuple[str, ...]:
    """Every other op of csrc/library.cpp."""
    names = re.findall(r'm\.def\("(\w+)', (ROOT / "csrc" / "library.cpp").read_text())
    assert {*NOT_ON_CUDA, *ON_EVERY_DEVICE} < set(names)
    return tuple(n for n in names if n not in (*NOT_ON_CUDA, *ON_EVERY_DEVICE))


@cache
def kernel_names() -> tuple[str, ...]:
    """Every kernel that csrc/cuda defines."""
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").rglob("*.cu*")))
    found = re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)
    assert len(found) == text.count("__global__") > 0
    return tuple(found)


def architectures_of(kernel: str) -> set[str]:
    """Those that a kernel of csrc/cuda is compiled for."""
    return {"sm_90a"} if kernel.startswith("sm90_") else set(ARCHITECTURES)


pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the CUDA library was not built: make cuda"
)


def run_python(code: str) -> str:
    """The output of a fresh interpreter that has loaded both libraries."""
    cpu = _load.find_library("fastmoe_route_cpu")
    head = f"import torch\nfor path in {[str(cpu), str(LIBRARY)]}: torch.ops.load_library(path)\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_without_a_gpu_and_registers_its_ops() -> None:
    code = (
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"for name in {on_cuda() + NOT_ON_CUDA}:\n"
        "    print(name, has('fastmoe_route::' + name, 'CUDA'))\n"
    )
    printed = dict(line.split() for line in run_python(code).splitlines())
    assert printed == {**dict.fromkeys(on_cuda(), "True"), **dict.fromkeys(NOT_ON_CUDA, "False")}


def test_cpu_results_are_untouched_by_loading_it() -> None:
    code = (
        "x = torch.tensor([[0.0, 0.0]])\n"
        "print(torch.ops.fastmoe_route.softmax_forward(x, 0).tolist())\n"
    )
    assert run_python(code) == "[[0.5, 0.5]]\n"


def test_the_package_loads_it_where_torch_has_cuda_and_there_is_no_driver() -> None:
    """A torch that only says it has CUDA: the library finds neither torch's nor the driver's."""
    code = (
        "import torch\ntorch.version.cuda = '13.0'\nimport fastmoe_route as fr\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"print(all(has('fastmoe_route::' + name, 'CUDA') for name in {on_cuda()}))\n"
        "print(fr.gate(torch.tensor([[1.0, 2.0]]), 1).experts.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTMOE_ROUTE_LIBRARY_DIR": str(LIBRARY.parent)},
    )
    assert (done.returncode, done.stdout) == (0, "True\n[[1]]\n"), done.stderr


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


def test_policy_names_a_kernel_for_every_device_dtype_and_product() -> None:
    architectures, rows = _load.cuda_policy(LIBRARY)
    assert architectures == ["80", "90a", "100a", "120"]
    for dtype in ("float32", "bfloat16", "float16"):
        for product in ("forward, dgrad", "wgrad"):
            kernels = {row[4] for row in rows if row[1:3] == [dtype, product]}
            wanted = {"simt", "tf32"} if dtype == "float32" else {"mma.sync", "wgmma", "tcgen05"}
            assert all(any(word in kernel for kernel in kernels) for word in wanted)
    fused = {row[4].split(",")[0] for row in rows if "one launch" in row[4]}
    assert fused == {
        "cutlass 2.x simt float32",
        "cutlass 2.x mma.sync tf32",
        "cutlass 2.x mma.sync",
        "own wgmma",
    }
    pingpong = [row for row in rows if "ping-pong" in row[4]]
    assert [row[:3] for row in pingpong] == [
        ["sm_90", "bfloat16", "forward, dgrad"],
        ["sm_90", "bfloat16", "wgrad"],
    ]


def test_info_prints_the_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTMOE_ROUTE_LIBRARY_DIR", str(LIBRARY.parent))
    empty = {"level": "", "best_level": "", "threads": 1, "scratch_bytes": 0, "kept_bytes": 0}
    monkeypatch.setattr(cli, "library_info", lambda: empty)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "cuda gemm policy         sm_100, if native is asked for | bfloat16 | wgrad |" in printed
    assert "cuda architectures       90a" in printed


# ---- what ptxas made of the kernels -------------------------------------------------------------


@cache
def kernels() -> tuple[cuda_kernels.Kernel, ...]:
    try:
        return cuda_kernels.read(LIBRARY)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def limit_of(kernel: cuda_kernels.Kernel, limits: dict[str, int], default: int) -> int:
    return next((n for name, n in limits.items() if kernel.name.startswith(name)), default)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_there_for_every_architecture(architecture: str) -> None:
    names = [k.name for k in kernels() if k.architecture == architecture]
    wanted = [k for k in kernel_names() if architecture in architectures_of(k)]
    assert [k for k in wanted if not any(re.match(rf"{k}\b", n) for n in names)] == []


def test_no_kernel_spills_or_has_a_stack() -> None:
    spilling = [
        (k.architecture, k.name)
        for k in kernels()
        if k.usage["STACK"] > 0 or k.usage["LOCAL"] > 0 or k.counts["local memory"] > 0
    ]
    assert spilling == []


def test_kernels_keep_their_register_budget() -> None:
    over = [
        (k.architecture, k.name, k.usage["REG"])
        for k in kernels()
        if k.usage["REG"] > limit_of(k, WIDE_REGISTERS, REGISTER_BUDGET)
    ]
    assert over == []


def test_kernels_keep_their_occupancy_floor() -> None:
    """Without the dynamic shared memory of kernels that size it by the call (gate, plan)."""
    low = [
        (k.architecture, k.name, k.blocks, k.threads)
        for k in kernels()
        if k.blocks * k.threads < 32 * limit_of(k, FEW_WARPS, WARP_FLOOR)
    ]
    assert low == []


# Kernels that promise accesses of 16 bytes, by the start of their names.
WIDE_LOADS = (
    *("permute_kernel<uint4", "softmax_block_kernel<float, true", "chunk_kernel<"),
    *(f"softmax_kept_kernel<{t}, true" for t in ("float", "BFloat16", "Float16")),
    *(f"{name}<{t}" for name in ("unpermute_kernel", "unpermute_backward_kernel",
      "activate_backward_kernel") for t in ("float, 4", "BFloat16, 8", "Float16, 8")),
    *("activate_kernel<BFloat16, 8", "activate_kernel<Float16, 8"),
    *("gate_kernel<float, 4", "gate_kernel<float, 8", "gate_kernel<BFloat16, 8"),
    *("gate_backward_fast_kernel<float, 4", "gate_backward_fast_kernel<BFloat16, 8"),
)  # fmt: skip


@pytest.mark.parametrize("name", WIDE_LOADS)
def test_loads_are_16_bytes_wide(name: str) -> None:
    found = [k for k in kernels() if k.name.startswith(name)]
    assert {k.architecture for k in found} == set(ARCHITECTURES)
    assert [k.name for k in found if k.counts["16-byte loads"] == 0] == []


def test_wide_stores_follow_wide_loads() -> None:
    names = (
        *("permute_kernel<uint4", "unpermute_kernel<BFloat16, 8", "activate_kernel<BFloat16, 8"),
        *("unpermute_backward_kernel<BFloat16, 8", "activate_backward_kernel<BFloat16, 8"),
        *("softmax_block_kernel<BFloat16, true", "softmax_backward_block_kernel<BFloat16, true"),
        "softmax_kept_kernel<BFloat16, true",
        *("softmax_topk_backward_kernel<BFloat16", "softmax_topk_backward_kernel<float"),
    )
    for name in names:
        found = [k for k in kernels() if k.name.startswith(name)]
        assert {k.architecture for k in found} == set(ARCHITECTURES), name
        assert [k.name for k in found if k.counts["16-byte stores"] == 0] == []


def test_portable_products_copy_asynchronously_and_use_tensor_cores() -> None:
    for element in ("cutlass::bfloat16_t, 8", "cutlass::half_t, 8"):
        for name in ("rows_product_kernel", "groups_product_kernel", "up_product_kernel"):
            found = [k for k in kernels() if k.name.startswith(f"{name}<{element}")]
            assert {k.architecture for k in found} == set(ARCHITECTURES)
            for k in found:
                # 64 x 64 a warp and 32 inner: 64 products of 16 x 8 x 16; the loop may be unrolled.
                assert k.counts["matrix products"] >= 64, (k.architecture, k.name)
                assert k.counts["async copies"] >= 8, (k.architecture, k.name)
                assert k.counts["matrix loads"] >= 8, (k.architecture, k.name)
                assert any(op.startswith("HMMA.16816.F32") for op in k.opcodes)
                assert any("LDGSTS.E" in op and "128" in op for op in k.opcodes)


def test_float32_products_are_float32() -> None:
    found = [k for k in kernels() if "product_kernel<float, 1" in k.name]
    assert {k.architecture for k in found} == set(ARCHITECTURES)
    for k in found:
        assert k.counts["matrix products"] == 0, k.name
        assert any(op.startswith("FFMA") for op in k.opcodes)


def test_tf32_products_use_tensor_cores_and_wide_copies() -> None:
    for name in ("rows_product_kernel", "groups_product_kernel", "up_product_kernel"):
        found = [k for k in kernels() if k.name.startswith(f"{name}<float, 4")]
        assert {k.architecture for k in found} == set(ARCHITECTURES)
        for k in found:
            assert any(op.startswith("HMMA.1688.F32.TF32") for op in k.opcodes), k.name
            assert any("LDGSTS.E" in op and "128" in op for op in k.opcodes), k.name


@pytest.mark.parametrize(("architecture", "product"), [("sm_90a", "HGMMA"), ("sm_100a", "UTCHMMA")])
def test_native_products_use_their_own_instructions(architecture: str, product: str) -> None:
    found = [k for k in kernels() if k.name.startswith("cutlass::device_kernel")]
    own = [k for k in found if k.architecture == architecture]
    assert {k.architecture for k in found} == {"sm_90a", "sm_100a"}
    for k in own:
        assert any(op.startswith(product) for op in k.opcodes), k.name
        assert any(op.startswith("UTMALDG") for op in k.opcodes), k.name
    if architecture == "sm_90a":
        schedules = {
            word for k in own for word in k.name.split() if word in ("cooperative", "pingpong")
        }
        assert schedules == {"cooperative", "pingpong"}


def test_products_by_index_of_sm90_use_what_it_alone_has() -> None:
    """wgmma of 64 x 256, columns by the copy engine, rows by asynchronous copies of 16 bytes."""
    found = [k for k in kernels() if k.name.startswith("sm90_up_kernel")]
    assert {k.architecture for k in found} == {"sm_90a"}
    assert len(found) == 4  # two dtypes, two layouts of the weights
    for k in found:
        element = "BF16" if "bfloat16" in k.name else "F32"
        products = [op for op in k.opcodes if op.startswith("HGMMA.64x256x16")]
        assert any(element in op for op in products), (k.name, products)
        assert any(op.startswith("UTMALDG.4D") for op in k.opcodes), k.name
        assert any(op.startswith("LDGSTS.E.BYPASS") and "128" in op for op in k.opcodes), k.name
        assert k.counts["16-byte stores"] > 0, k.name
        assert k.counts["async copies"] >= 16 + (2 if "true" in k.name else 4), k.name


def counts_some(column: str) -> Callable[[cuda_kernels.Kernel], bool]:
    return lambda k: k.counts[column] > 0


def test_selection_uses_redux_and_ballots() -> None:
    gates = [k for k in kernels() if k.name.startswith("gate_kernel")]
    assert gates
    assert all(map(counts_some("redux"), gates))
    assert all(map(counts_some("votes"), gates))


def test_evidence_page_says_what_the_library_shows() -> None:
    """docs/cuda-evidence.md is what the tool writes, wherever it was written for this code."""
    page = (ROOT / "docs" / "cuda-evidence.md").read_text()
    assert "Nothing on this page was\nmeasured on a GPU" in page
    if cuda_kernels.compiler() not in page:
        pytest.skip("docs/cuda-evidence.md is of another compiler")
    for architecture in ARCHITECTURES:
        _, _, part = page.partition(f"## Compiled: {architecture}\n")
        part, _, _ = part.partition("\n## ")
        stated = [[cell.strip() for cell in line.split("|")] for line in part.splitlines()]
        stated = [row[1:3] + row[3:7] for row in stated if len(row) > 7 and row[1].startswith("`")]
        found = [k for k in kernels() if k.architecture == architecture]
        built = [
            [f"`{k.name}`", str(k.usage["REG"]), str(k.threads), str(k.blocks), str(k.instructions)]
            for k in found
        ]
        assert [row[:1] + row[2:] for row in stated] == built, "make cuda-evidence"
        for name, how, *_ in stated:
            is_native = name.startswith(("`cutlass::device_kernel", "`sm90_up_kernel"))
            alone = "H200" if architecture == "sm_90a" else "compiled only"
            assert how == (alone if is_native else "PTX VM"), name


def test_every_kernel_is_in_the_model() -> None:
    named = {k for row in cuda_evidence.modelled() for k in re.findall(r"\w+_kernel", row.kernels)}
    assert named == set(kernel_names())
    assert all(row.num_bytes > 0 for row in cuda_evidence.modelled())
