"""What the engine's own tests share: PTX from CUDA, buffers with exact bounds, launches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
FOLDER = Path(os.environ.get("PTXVM_DIR", ROOT / "build" / "vm"))
SEEDS = (1, 2, 3, 4, 5)


@cache
def engine() -> ModuleType:
    """The Python module of the engine, built by `make test-cuda-vm`."""
    sys.path.insert(0, str(FOLDER))
    import ptxvm

    return ptxvm


@cache
def compiled(name: str) -> Any:
    """A CUDA file of this folder as a module; compiled when it is newer than its PTX."""
    source, ptx = HERE / name, FOLDER / Path(name).with_suffix(".ptx")
    newest = max(path.stat().st_mtime for path in (source, *HERE.glob("*.cuh")))
    if not ptx.exists() or ptx.stat().st_mtime < newest:
        nvcc = os.environ.get("CUDACXX", "nvcc")
        assert shutil.which(nvcc), "the tests of the engine need nvcc"
        command = [nvcc, "-std=c++17", "-lineinfo", "-arch=compute_80", "-ptx", str(source)]
        command.append(f"-I{HERE.parent}")  # headers of tests
        subprocess.run([*command, "-o", str(ptx)], check=True)
    return engine().Module(ptx.read_text())


class Buffer:
    """Memory of the device with exact bounds; the bytes around it belong to nobody."""

    def __init__(
        self, values: NDArray[Any], *, writable: bool = True, defined: bool = True
    ) -> None:
        bytes_ = values.nbytes
        self.store = np.full(bytes_ + 512, 0x7F, dtype=np.uint8)
        start = (-self.store.ctypes.data) % 256
        self.values = self.store[start : start + bytes_].view(values.dtype).reshape(values.shape)
        self.address = self.values.ctypes.data
        self.bytes = bytes_
        if defined:
            self.values[...] = values
        engine().add_memory(self.address, bytes_, writable, defined, "buffer")

    def free(self) -> None:
        engine().remove_memory(self.address, self.bytes)


def launch(
    module: Any,
    kernel: str,
    arguments: list[Any],
    *,
    grid: int = 1,
    block: int = 32,
    **options: Any,
) -> str:
    """Runs a kernel; returns the engine's report, empty if there is none."""
    values = [a.address if isinstance(a, Buffer) else a for a in arguments]
    report: str = module.launch(kernel, [grid, 1, 1], [block, 1, 1], values, **options)
    return report


def run_text(ptx_body: str, buffers: list[Buffer], *, block: int = 32, registers: str = "") -> str:
    """Runs PTX instructions as the body of a kernel whose parameters p0, p1, ... are buffers.

    %rd0, %rd1, ... hold the addresses of the buffers, moved on by 8 bytes a lane in %a0, %a1, ...
    """
    params = ", ".join(f".param .u64 p{i}" for i in range(len(buffers)))
    loads = "".join(
        f"ld.param.u64 %rd{i}, [p{i}]; mad.wide.u32 %a{i}, %t, 8, %rd{i};"
        for i in range(len(buffers))
    )
    text = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel({params})
{{
  .reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<60>; .reg .f32 %f<40>;
  .reg .b64 %d<40>; .reg .f64 %fd<20>; .reg .b64 %rd<8>; .reg .b64 %a<8>; .reg .b32 %t;
  {registers}
  mov.u32 %t, %tid.x;
  {loads}
  {ptx_body}
  ret;
}}
"""
    return launch(engine().Module(text), "kernel", list(buffers), block=block)
