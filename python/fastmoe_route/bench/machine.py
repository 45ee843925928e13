"""What this machine is, and what it can do at best: the limits every time is held against.

- *peak*: multiply-adds on registers in all threads (`torch.ops.fastmoe_route.machine_peak`), for
  float32 and for the best bfloat16 products of the instruction set in use.
- *memory bandwidth*: reading once through a buffer larger than the last-level cache, all threads
  adding up their part (`machine_read`), and `copy_` from one half of it to the other, which counts
  bytes read plus bytes written; the limit is the larger of the two.
- *cache bandwidth*: every thread reading its part of a small buffer over and over, in half of the
  level-1 and of the level-2 caches, the limits of rows whose data stays there, and in 32 MB of the
  level-3 cache, the limit of outputs that later calls write again in the same place.

The best of several probes counts, and probes are repeated through the run: a limit is what the
machine reaches when nobody disturbs it. Rows of products are held against what was read of their
weights, and against multiply-adds on registers, in turns with the contenders instead: on
shared machines the rate of the memory drifts within minutes, and a processor multiplies faster for
milliseconds than for longer. The rates of `torch.mm` are printed beside the peaks: a peak below
them would be wrong.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

# The instruction sets of the kernels; a processor that has one has all before it.
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DTYPE_CODES = {"float32": 0, "bfloat16": 1}  # of machine_peak
_TRIAL_FLOPS = 1e8
_DEFAULT_CACHE = {1: 32 << 10, 2: 1 << 20, 3: 32 << 20}


def library_info() -> dict[str, str]:
    """What the compiled library says: level, best_level, threads, scratch_bytes, kept_bytes."""
    text: str = torch.ops.fastmoe_route.machine_info()
    return dict(part.split("=", 1) for part in text.split(";"))


def cpu_name() -> str:
    """The processor's own name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_bytes(level: int) -> int:
    """Size of one cache of the level, as the system reports it; a usual size if it does not."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (index / "level").read_text().strip() != str(level):
                continue
            if (index / "type").read_text().strip() == "Instruction":
                continue
            text = (index / "size").read_text().strip()
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
        return int(text.rstrip("KMG")) * unit
    return _DEFAULT_CACHE[level]


def available_bytes() -> int:
    """Memory a new process could take without swapping, the limit of a container included."""
    free = 4 << 30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass
    return max(free, 0)


def reuse_memory() -> bool:
    """Makes the allocator hand freed memory out again instead of giving it back to the system.

    Results of 32 MB and more are otherwise fresh pages in every call, and clearing them may take
    longer than the work. Returns whether there is glibc's `mallopt` to ask for it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def _best(count: int, run: Callable[[], object]) -> float:
    """The shortest of `count` runs, in seconds."""
    best = float("inf")
    for _ in range(count):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass
class Limits:
    """The best rates seen so far, with the buffer that probes memory."""

    quick: bool = False
    peak: dict[str, float] = field(default_factory=dict)  # flops/s by dtype
    read: float = 0.0  # bytes/s from memory
    copy: float = 0.0
    level1: float = 0.0  # from the level-1 caches
    level2: float = 0.0
    level3: float = 0.0
    torch_mm: dict[str, float] = field(default_factory=dict)  # flops/s by dtype
    _buffer: Tensor | None = None

    @property
    def memory(self) -> float:
        """Bytes per second the memory moves at best."""
        return max(self.read, self.copy)

    @property
    def cached_set(self) -> int:
        """Largest working set, in bytes, that is taken to stay in the level-2 caches."""
        return self._cached_set(2)

    @property
    def rotation_bytes(self) -> int:
        """How much memory inputs rotate through so that no cache holds them."""
        wanted = max(256 << 20, 2 * cache_bytes(3))
        return min(wanted, 1 << 30, available_bytes() // 8)

    def probe(self, seconds: float) -> None:
        """Measures again, and keeps what is better than before."""
        self.probe_peaks(seconds)
        if self._buffer is None:
            # Twice the last-level cache, so that a pass finds nothing the pass before left.
            self._buffer = torch.zeros(self.rotation_bytes // 4)
        buffer = self._buffer
        half = buffer.numel() // 2
        target, source = buffer[:half], buffer[half : 2 * half]
        count = 1 if self.quick else 2
        took = _best(count, lambda: torch.ops.fastmoe_route.machine_read(buffer, 1))
        self.read = max(self.read, buffer.numel() * 4 / took)
        took = _best(count, lambda: target.copy_(source))
        self.copy = max(self.copy, half * 8 / took)
        self.level1 = max(self.level1, self._cached_read(self._cached_set(1)))
        self.level2 = max(self.level2, self._cached_read(self._cached_set(2)))
        self.level3 = max(self.level3, self._cached_read(min(cache_bytes(3) // 2, 32 << 20)))

    def probe_peaks(self, seconds: float) -> None:
        """Measures the arithmetic alone again, and keeps what is better than before."""
        burn = torch.ops.fastmoe_route.machine_peak
        for name, code in DTYPE_CODES.items():
            flops = _TRIAL_FLOPS
            for _ in range(2):  # the first run says how many operations take `seconds`
                took = _best(1, lambda c=code, n=flops: burn(c, n))  # type: ignore[misc]
                rate, flops = flops / took, seconds * flops / took
            self.peak[name] = max(self.peak.get(name, 0.0), rate)

    @staticmethod
    def _cached_read(num_bytes: int) -> float:
        """Bytes per second of reading `num_bytes` again and again."""
        small = torch.ones(num_bytes // 4)
        passes = max(1, (64 << 20) // num_bytes)
        took = _best(8, lambda: torch.ops.fastmoe_route.machine_read(small, passes))
        return passes * small.numel() * 4 / took

    @staticmethod
    def _cached_set(level: int) -> int:
        return cache_bytes(level) * torch.get_num_threads() // 2

    def probe_torch(self) -> None:
        """The best `torch.mm` does, as evidence that the peaks are not set too low.

        Where it does more, the peaks came out too low, as by half when threads have to share a
        core: they are measured again, a few times.
        """
        size = 1024 if self.quick else 4096
        for name in DTYPE_CODES:
            dtype = getattr(torch, name)
            a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            took = _best(5, lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
            self.torch_mm[name] = max(self.torch_mm.get(name, 0.0), 2.0 * size**3 / took)
        for _ in range(3):
            if all(rate <= self.peak.get(name, 0.0) for name, rate in self.torch_mm.items()):
                break
            self.probe_peaks(0.1)

    def release(self) -> None:
        """Gives the probe's memory back."""
        self._buffer = None

    def floor(
        self,
        num_bytes: int,
        flops: float,
        dtype: str,
        *,
        cached: bool,
        written: int = 0,
        read: float = 0.0,
        multiply: float = 0.0,
    ) -> tuple[float, str]:
        """Seconds below which the work cannot be done, and what sets them.

        `written` of the bytes are an output that the allocator hands out again in the next call:
        up to half of the last-level cache, it may stay there. `read` are the bytes per second that
        were read in turns with the work itself, if they were: better than what a probe read before.
        `multiply` are the operations per second done on registers in turns with it, likewise.
        """
        bandwidth, where = read or self.memory, "memory"
        if cached:
            is_tiny = num_bytes <= self._cached_set(1)
            bandwidth, where = (self.level1, "level 1") if is_tiny else (self.level2, "level 2")
        peak = multiply or self.peak.get(dtype, self.peak["float32"])
        by_memory, by_arithmetic = num_bytes / bandwidth, flops / peak
        if not cached and written <= cache_bytes(3) // 2:
            stays = max(self.level3, bandwidth)
            by_memory = (num_bytes - written) / bandwidth + written / stays
        if by_arithmetic >= by_memory:
            return by_arithmetic, "arithmetic"
        return by_memory, where

    def as_dict(self) -> dict[str, object]:
        """For JSON: rates in operations and bytes per second."""
        return {
            "peak_flops": self.peak,
            "torch_mm_flops": self.torch_mm,
            "read_bytes_per_second": self.read,
            "copy_bytes_per_second": self.copy,
            "level1_read_bytes_per_second": self.level1,
            "level2_read_bytes_per_second": self.level2,
            "level3_read_bytes_per_second": self.level3,
            "cached_set_bytes": self.cached_set,
            "rotation_bytes": self.rotation_bytes,
        }


def describe() -> dict[str, object]:
    """The machine and the library, for JSON and for the head of the report."""
    info = library_info()
    return {
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "available_bytes": available_bytes(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "level": info["level"],
        "best_level": info["best_level"],
    }
