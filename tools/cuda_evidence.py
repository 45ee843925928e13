"""What the compiled CUDA library shows without a GPU, and the page that says so.

    python tools/cuda_evidence.py [build/cuda/fastmoe_route_cuda.so] > docs/cuda-evidence.md

Registers, stack and shared memory come from the cubins, instructions from their disassembly (the
packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm), blocks a multiprocessor from NVIDIA's
cuda_occupancy.h, compiled for the host. Nothing is executed, so nothing here is a time.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "cuda" / "fastmoe_route_cuda.so"
EXECUTED = ROOT / "build" / "vm" / "executed.json"  # launches of every kernel, of make test-cuda-vm
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")

# Dynamic shared memory of kernels that ask for a fixed amount, in bytes: what their launches pass.
DYNAMIC_SHARED = {
    **{
        f"{name}_product_kernel<{element}": 49152
        for name in ("rows", "groups", "up")
        for element in ("cutlass::bfloat16_t, 8", "cutlass::half_t, 8", "float, 4")
    },
    "up_product_kernel<float, 1": 18432,
    "sm90_up_kernel": 216064,
}

# Instructions worth counting: a column of the page, and the opcodes that make it.
COLUMNS = {
    "16-byte loads": r"LDG\.E\.(?:\w+\.)*128",
    "16-byte stores": r"STG\.E\.(?:\w+\.)*128",
    "async copies": r"LDGSTS|UTMALDG|UBLKCP",
    "matrix loads": r"LDSM",
    "matrix products": r"HMMA|HGMMA|UTC\w*MMA",
    "redux": r"C?REDUX",
    "votes": r"VOTE|MATCH",
    "shuffles": r"SHFL",
    "barriers": r"BAR\.SYNC",
    "local memory": r"LDL|STL",
}

OCCUPANCY_PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include <cstddef>
#include <climits>
#include <cuda_occupancy.h>
int main() {
  int arch, threads, registers, fixed, dynamic;
  while (std::scanf("%d %d %d %d %d", &arch, &threads, &registers, &fixed, &dynamic) == 5) {
    cudaOccDeviceProp device;
    std::memset(&device, 0, sizeof device);
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = arch == 120 ? 1536 : 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    const size_t kilobytes = arch == 80 ? 164 : arch == 120 ? 100 : 228;
    device.sharedMemPerMultiprocessor = kilobytes * 1024;
    device.sharedMemPerBlockOptin = (kilobytes - 1) * 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = arch == 80 ? 108 : arch == 90 ? 132 : arch == 100 ? 148 : 170;
    cudaOccFuncAttributes kernel;
    std::memset(&kernel, 0, sizeof kernel);
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = fixed;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = dynamic;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_NONE;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    std::memset(&result, 0, sizeof result);
    const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                              threads, dynamic);
    std::printf("%d\n", error ? -error : result.activeBlocksPerMultiprocessor);
  }
}
"""


@dataclass
class Kernel:
    """One kernel on one architecture."""

    architecture: str
    symbol: str
    name: str  # demangled and shortened
    usage: dict[str, int]  # of cuobjdump: REG, STACK, SHARED, LOCAL, ...
    threads: int = 0  # at most, of its launch bounds
    instructions: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    opcodes: set[str] = field(default_factory=set)
    blocks: int = 0  # resident on a multiprocessor

    @property
    def dynamic_shared(self) -> int:
        return next((n for key, n in DYNAMIC_SHARED.items() if self.name.startswith(key)), 0)


def tool(name: str) -> str | None:
    """A program of NVIDIA's binary utilities: on PATH, or of its Python package."""
    found = shutil.which(name)
    if found:
        return found
    packages = Path(sysconfig.get_paths()["platlib"]) / "nvidia"
    return next((str(path) for path in packages.glob(f"*/bin/{name}")), None)


def run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, **options)
    return str(done.stdout)


def short_name(demangled: str) -> str:
    """`kernel<arguments>` without namespaces; of a CUTLASS collective only what tells it apart."""
    text = demangled.replace("(anonymous namespace)::", "").replace("fastmoe_route::", "")
    text = text.replace("cuda::", "")
    product = re.search(
        r"((?:rows|groups)_product_kernel)<([\w:]+), Collective<.*?, (cutlass::layout::\w+), (\d+)",
        text,
    )
    if product is None:
        product = re.search(
            r"(up_product_kernel)<\w+, UpCollective<([\w:]+), (cutlass::layout::\w+), (\d+)", text
        )
    if product:
        kernel, element, layout, width = product.groups()
        return f"{kernel}<{element}, {width}, {layout.rsplit('::', 1)[1]}>"
    if "device_kernel" in text and "cutlass" in text:
        schedule = (
            "pingpong" if "Pingpong" in text else "cooperative" if "Cooperative" in text else ""
        )
        element = "bfloat16" if "bfloat16_t" in text else "float16"
        family = "sm100" if "Sm100" in text else "sm90"
        return f"cutlass::device_kernel<{family} {schedule} {element}>".replace("  ", " ")
    text = re.sub(r"^void ", "", text)
    depth = 0
    for at, letter in enumerate(text):  # up to the parameter list
        depth += letter == "<"
        depth -= letter == ">"
        if letter == "(" and depth == 0:
            return text[:at]
    return text


def max_threads(cubin: bytes) -> dict[str, int]:
    """EIATTR_MAX_THREADS of every kernel of a cubin, from its .nv.info sections."""
    (section_offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", cubin, section_offset + i * size) for i in range(count)
    ]
    names = headers[names_at][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        start = names + name
        label = cubin[start : cubin.index(b"\0", start)].decode()
        if not label.startswith(".nv.info."):
            continue
        at = offset
        while at < offset + length:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:  # the value is the size of what follows
                if attribute == 5:
                    x, y, z = struct.unpack_from("<III", cubin, at)
                    found[label.removeprefix(".nv.info.")] = x * y * z
                at += value
    return found


def occupancy(kernels: list[Kernel]) -> None:
    """Fills in `blocks`."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    roots = [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parent.parent] if nvcc else [])]
    roots += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    include = next(
        (r / "include" for r in roots if (r / "include/cuda_occupancy.h").exists()), None
    )
    if include is None:
        raise FileNotFoundError("cuda_occupancy.h was not found beside nvcc")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "occupancy.cpp"
        source.write_text(OCCUPANCY_PROGRAM)
        program = str(Path(folder) / "occupancy")
        run([compiler, "-O1", f"-I{include}", "-o", program, str(source)])
        lines = "".join(
            f"{re.sub(r'[^0-9]', '', k.architecture)} {k.threads or 1024} {k.usage['REG']}"
            f" {k.usage['SHARED']} {k.dynamic_shared}\n"
            for k in kernels
        )
        for kernel, blocks in zip(kernels, run([program], input=lines).split(), strict=True):
            kernel.blocks = int(blocks)


@cache
def read(library: Path = LIBRARY) -> tuple[Kernel, ...]:
    """Every kernel of the package in a library, for every architecture; CUB's are left out."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise FileNotFoundError(
            "pip install nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51"
        )
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture = symbol = ""
    for line in run([cuobjdump, "-res-usage", str(library)]).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            symbol = match[1]
        elif "REG:" in line and ("fastmoe_route" in symbol or "cutlass" in symbol):
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            if "3cub" not in symbol:
                kernels[architecture, symbol] = Kernel(architecture, symbol, symbol, usage)
    symbols = sorted({symbol for _, symbol in kernels})
    demangled = run(["c++filt"], input="\n".join(symbols)).splitlines()
    names = {s: short_name(d) for s, d in zip(symbols, demangled, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        run([cuobjdump, "-xelf", "all", str(library)], cwd=folder)
        for path in sorted(Path(folder).glob("*.cubin")):
            architecture = re.findall(r"sm_\w+", path.name)[-1]
            for symbol, threads in max_threads(path.read_bytes()).items():
                if (architecture, symbol) in kernels:
                    kernels[architecture, symbol].threads = threads
            disassemble(nvdisasm, path, architecture, kernels)
    for kernel in kernels.values():
        kernel.name = names[kernel.symbol]
    found = sorted(kernels.values(), key=lambda k: (k.name, ARCHITECTURES.index(k.architecture)))
    occupancy(found)
    return tuple(found)


def disassemble(
    nvdisasm: str, path: Path, architecture: str, kernels: dict[tuple[str, str], Kernel]
) -> None:
    """Counts the instructions of every kernel of a cubin."""
    kernel = None
    for line in run([nvdisasm, "-c", str(path)]).splitlines():
        if match := re.match(r"\.text\.(\S+):", line.strip()):
            kernel = kernels.get((architecture, match[1]))
            continue
        match = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if kernel is None or match is None:
            continue
        kernel.instructions += 1
        kernel.opcodes.add(match[1])
        for column, pattern in COLUMNS.items():
            if re.match(pattern, match[1]):
                kernel.counts[column] += 1


@cache
def launched() -> dict[str, int]:
    """Launches of every kernel in the ops' tests in the PTX virtual machine, by `short_name`."""
    if not EXECUTED.exists():
        raise FileNotFoundError(f"{EXECUTED}: make test-cuda-vm writes which kernels it executed")
    counts: dict[str, int] = {}
    for name, count in json.loads(EXECUTED.read_text()).items():
        counts[short_name(name)] = counts.get(short_name(name), 0) + count
    return counts


def how_tested(kernel: Kernel) -> str:
    """`PTX VM` for executed in the PTX virtual machine, `H200`, or `compiled only`."""
    if launched().get(kernel.name, 0) > 0:
        return "PTX VM"
    return "H200" if kernel.architecture == "sm_90a" else "compiled only"


def table(kernels: list[Kernel]) -> list[str]:
    head = ("kernel", "executed", "registers", "threads", "blocks / SM", "instructions", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for k in kernels:
        cells = (f"`{k.name}`", how_tested(k), k.usage["REG"], k.threads, k.blocks, k.instructions)
        counts = (k.counts[column] or "" for column in COLUMNS)
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, *counts)) + " |")
    return lines


HEAD = """\
# What the compiled CUDA library shows

Written by `make cuda-evidence` from a library that `make cuda` built. **Nothing on this page was
measured on a GPU**; `docs/gpu.md` holds what was. Registers, shared memory and instruction counts
are read from the compiled code; blocks per multiprocessor follow from them by NVIDIA's
`cuda_occupancy.h` (without dynamic shared memory where a launch sizes it by the call). Bytes,
operations and times of the first table are *modelled*: what has to move and be computed at least,
over limits of an H100 that published work reaches (3.0 TB/s copied, 798 TFLOP/s in bfloat16).

The column *executed* says which kernels the ops' tests launched in the PTX virtual machine (*PTX
VM*: nvcc's code for compute_80, instruction by instruction, `make test-cuda-vm`), which only the
tests on a GPU did (*H200*), and which were *compiled only*.

`tests/test_cuda_build.py` holds every kernel to no spills, a register budget, wide loads, the
instructions of its matrix products and an occupancy floor."""

# H100 (SXM): copy bandwidth and dense bfloat16 peak that published work reaches, and its clock.
BANDWIDTH, TENSOR_FLOPS = 3.0e12, 798e12


class Modelled(NamedTuple):
    """What an op has to move and compute at least, or as its launches do, at one size."""

    op: str
    kernels: str  # those it launches, CUB's left out
    shape: str
    num_bytes: float
    flops: float = 0.0


PASS = 24  # bytes a slot that one pass of a sort over 8 bits of key reads and writes


def modelled_scores() -> list[Modelled]:
    """Gate, expert choice and softmax."""
    t, e, k, vocabulary, rows = 8192, 256, 8, 128256, 256
    gate = t * (2 * e + 8 * k)
    scores = f"T={t}, E={e}, bfloat16"
    words = f"{rows} x {vocabulary}, bfloat16"
    size = 2.0 * rows * vocabulary
    return [
        Modelled("gate", "gate_kernel", f"T={t}, E={e}, K={k}, bfloat16", gate),
        Modelled("gate, statistics", "gate_kernel, sum_tiles_kernel",
                 f"T={t}, E={e}, K={k}, bfloat16", gate + 4 * t + 8 * e * t / 8),
        Modelled("gate, backward", "gate_backward_fast_kernel", f"T={t}, E={e}, K={k}, bfloat16",
                 t * (4 * e + 8 * k)),
        Modelled("gate, backward, more than 256 experts", "gate_backward_kernel",
                 f"T={t}, E=512, K={k}, bfloat16", t * (4 * 512 + 8 * k)),
        Modelled("expert_choice, as launched",
                 "score_keys_kernel, group_keys_kernel, mark_surplus_kernel, write_choice_kernel",
                 f"T={t}, E={e}, float32", t * e * (16 + 4 * PASS + 12 + 2 * PASS + 13 + 13)),
        Modelled("softmax", "softmax_warp_kernel", scores, 4 * t * e),
        Modelled("softmax, backward", "softmax_backward_warp_kernel", scores, 6 * t * e),
        Modelled("softmax, long rows", "softmax_kept_kernel", words, 2 * size),
        Modelled("softmax, rows of twice that, online", "softmax_block_kernel",
                 f"{rows} x {2 * vocabulary}, bfloat16", 6 * size),
        Modelled("softmax, long rows, backward", "softmax_backward_block_kernel", words, 3 * size),
        Modelled("softmax_topk", "chunk_kernel, merge_kernel", f"{words}, k={k}", size),
        Modelled("softmax_topk, backward", "softmax_topk_backward_kernel", f"{words}, k={k}",
                 2 * size),
    ]  # fmt: skip


def modelled_rows() -> list[Modelled]:
    """Plans and the movement of rows."""
    t, e, k = 8192, 256, 8
    slots, m = t * k, 2 * k
    plan = "count_kernel, place_kernel"
    rows = [
        Modelled("plan_dispatch", plan, f"T={t}, E={e}, K={k}", slots * 16),
        Modelled("plan_dispatch, more than 512 experts", "walk_kernel, scan_kernel",
                 f"T={t}, E=1024, K={k}", slots * 16 + 16 * 1024 * slots / 1024),
        Modelled("plan_dispatch, capacity by score, as launched",
                 f"walk_kernel, scan_kernel, {plan}, fill_score_keys_kernel, "
                 "fill_group_keys_kernel, mark_surplus_kernel", f"T={t}, E={e}, K={k}",
                 slots * (4 + 16 + 4 * PASS + 20 + 2 * PASS + 13 + 18)),
        Modelled("plan_dispatch, max_rows", f"walk_kernel, scan_kernel, {plan}, count_used_kernel, "
                 "find_cut_kernel", f"T={t}, E={e}, K={k}", slots * 24),
        Modelled("reroute, as launched", "prepare_kernel, list_kernel, key_kernel, group_kernel, "
                 "grant_kernel, finish_kernel", f"T={t}, E={e}, K={k} of {m}",
                 t * m * (5 + 4 + 16 + 2 * PASS + 20 + 12 + PASS + 21 + 5)),
    ]  # fmt: skip
    t, h = 32768, 2048
    moved = 2 * t * h * (1 + k)
    shape = f"T={t}, H={h}, K={k}, bfloat16"
    return [
        *rows,
        Modelled("permute", "permute_kernel", shape, moved),
        Modelled("unpermute", "unpermute_kernel", shape, moved),
        Modelled(
            "unpermute, backward", "unpermute_backward_kernel", shape, 2 * t * h * (1 + 2 * k)
        ),
    ]


def modelled_experts() -> list[Modelled]:
    """Products and the expert layer."""
    t, h, i, e, k = 32768, 2048, 768, 128, 8
    r = t * k
    weights = 2 * 3 * e * h * i
    rows_product = "group_rows_kernel, rows_product_kernel"
    groups_product = "group_rows_kernel, groups_product_kernel"
    native = "native_arrays_kernel and CUTLASS's"
    up = 2 * r * (h + 2 * i) + 2 * e * h * 2 * i
    shape = f"R={r}, {h} x {2 * i}, E={e}, bfloat16"
    layer = f"T={t}, H={h}, I={i}, E={e}, K={k}, bfloat16"
    # x by index, activated rows written and read, the experts' outputs written and read.
    own = weights + 2 * t * h + 2 * r * (h + 2 * i + 2 * h) + 2 * t * h
    # Rows [R, H] written three times and read four times, u and a' once each, pre read and its
    # gradient written and read twice; g, x and dx by token.
    back = 2 * weights + 2 * r * (7 * h + 4 * i + 4 * 2 * i) + 2 * 3 * t * h
    return [
        Modelled("grouped_mm, up", rows_product, shape, up, 4 * r * h * i),
        Modelled("grouped_mm, weights", groups_product, shape, up, 4 * r * h * i),
        Modelled("grouped_mm, bias", "group_rows_kernel, column_sums_kernel", shape, 4 * r * i),
        Modelled("grouped_mm, up, native", f"{native}, zero_rest_kernel", shape, up, 4 * r * h * i),
        Modelled("grouped_mm, weights, native", f"{native}, zero_empty_kernel", shape, up,
                 4 * r * h * i),
        Modelled("activation", "activate_kernel", f"R={r}, I={i}, bfloat16", 2 * r * 3 * i),
        Modelled("weights on input", "scale_rows_kernel", f"R={r}, H={h}, bfloat16", 2 * r * 2 * h),
        Modelled("moe_mlp, as launched",
                 "group_rows_kernel, up_product_kernel, rows_product_kernel, unpermute_kernel",
                 layer, own, 6 * r * h * i),
        Modelled("moe_mlp, as launched on sm_90",
                 f"group_rows_kernel, sm90_up_kernel, {native}, zero_rest_kernel, unpermute_kernel",
                 layer, own, 6 * r * h * i),
        Modelled("moe_mlp, least", "", layer, weights + 4 * t * h, 6 * r * h * i),
        Modelled("moe_mlp, backward, as launched",
                 f"{groups_product}, rows_product_kernel, permute_kernel, "
                 "activate_backward_kernel, unpermute_kernel", layer, back, 12 * r * h * i),
    ]  # fmt: skip


def modelled() -> list[Modelled]:
    return [*modelled_scores(), *modelled_rows(), *modelled_experts()]


def models() -> list[str]:
    """The rows of `modelled`, and what an H100 needs for them at least."""
    rows = []
    for one in modelled():
        memory, arithmetic = one.num_bytes / BANDWIDTH, one.flops / TENSOR_FLOPS
        bound = "arithmetic" if arithmetic > memory else "memory"
        work = f"{one.flops / 1e12:.2f}" if one.flops else ""
        least = max(memory, arithmetic) * 1e6
        rows.append(
            f"| `{one.op}` | {one.kernels} | {one.shape} | {one.num_bytes / 1e6:.2f} | {work}"
            f" | {least:.1f} | {bound} |"
        )
    head = "| op | kernels | shape | MB | TFLOP | least us | bound by |"
    return [head, "|---|---|---|---|---|---|---|", *rows]


@cache
def compiler() -> str:
    """The version of nvcc, as it says it."""
    nvcc = os.environ.get("CUDACXX", "nvcc")
    said = run([nvcc, "--version"]) if shutil.which(nvcc) else ""
    found = re.search(r"release [\d.]+, V[\d.]+", said)
    return f"nvcc {found[0]}" if found else "an unknown nvcc"


def page(library: Path) -> str:
    kernels = read(library)
    lines = [
        *HEAD.splitlines(),
        "",
        f"Compiled by {compiler()}.",
        "",
        "## Modelled: bytes and operations at common sizes",
        "",
        *models(),
        "",
    ]
    for architecture in ARCHITECTURES:
        own = [k for k in kernels if k.architecture == architecture]
        spilling = sum(k.usage["STACK"] > 0 or k.usage["LOCAL"] > 0 for k in own)
        lines += [
            f"## Compiled: {architecture}",
            "",
            f"{len(own)} kernels, {spilling} with spills or a stack. Counts are of instructions in"
            " the code, not of executed ones.",
            "",
            *table(own),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY), end="")
