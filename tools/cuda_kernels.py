"""The kernels of a compiled CUDA library: what can be read of them without a GPU.

Registers, stack and shared memory come from the cubins, instructions from their disassembly (the
packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm), blocks a multiprocessor from NVIDIA's
cuda_occupancy.h, compiled for the host. Nothing is executed, so nothing here is a time.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "cuda" / "fastmoe_route_cuda.so"
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
def compiler() -> str:
    """The version of nvcc, as it says it."""
    nvcc = os.environ.get("CUDACXX", "nvcc")
    said = run([nvcc, "--version"]) if shutil.which(nvcc) else ""
    found = re.search(r"release [\d.]+, V[\d.]+", said)
    return f"nvcc {found[0]}" if found else "an unknown nvcc"
