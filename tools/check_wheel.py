"""Checks a wheel against what the package promises of it, and prints what it holds.

python tools/check_wheel.py dist/fastmoe_route-0.1.0-py3-none-linux_x86_64.whl
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 5_000_000
MAX_BYTES_WITH_CUDA = 40_000_000
CUDA_LIBRARY = "fastmoe_route/fastmoe_route_cuda.so"
SYSTEM_LIBRARIES = {
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}


def dynamic_section(library: Path) -> str:
    command = ["readelf", "--dynamic", "--wide", str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_library(library: Path) -> list[str]:
    """What is wrong with a library: where it looks, what it needs."""
    text = dynamic_section(library)
    faults = [f"{library.name} has an {kind}" for kind in re.findall(r"RPATH|RUNPATH", text)]
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
    if "libtorch_cpu.so" not in needed:
        faults.append(f"{library.name} does not need libtorch_cpu.so")
    strangers = needed - SYSTEM_LIBRARIES - {"libtorch_cpu.so"}
    faults += [f"{library.name} needs {stranger}" for stranger in sorted(strangers)]
    return faults


def check_wheel(wheel: Path) -> list[str]:
    """What is wrong with a wheel."""
    faults = []
    if not re.fullmatch(r"fastmoe_route-[\d.]+-py3-none-[\w.]+\.whl", wheel.name):
        faults.append(f"{wheel.name} is not tagged py3-none-<platform>")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        most = MAX_BYTES_WITH_CUDA if CUDA_LIBRARY in names else MAX_BYTES
        if wheel.stat().st_size > most:
            faults.append(f"{wheel.stat().st_size} bytes are more than {most}")
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        requires = re.findall(r"^Requires-Dist: (.+)$", archive.read(metadata).decode(), re.M)
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                if name.endswith(".so"):
                    faults += check_library(Path(archive.extract(name, folder)))
    for name in ("fastmoe_route/fastmoe_route_cpu.so", "fastmoe_route/py.typed"):
        if name not in names:
            faults.append(f"{name} is missing")
    if not any(name.endswith("/LICENSE") for name in names):
        faults.append("LICENSE is missing")
    if CUDA_LIBRARY in names and not any(name.endswith("/LICENSE-CUTLASS") for name in names):
        faults.append("LICENSE-CUTLASS is missing: the CUDA library holds parts of CUTLASS")
    faults += [f"{name} does not belong" for name in names if re.search(r"\.(cpp|cu|h|pyc)$", name)]
    always = [line for line in requires if "extra ==" not in line]
    if always != ["torch>=2.10"]:
        faults.append(f"the wheel must require torch>=2.10 and nothing else, got {always}")
    return faults


def main() -> None:
    wheel = Path(sys.argv[1])
    faults = check_wheel(wheel)
    if faults:
        sys.exit("\n".join([f"{wheel.name}:", *faults]))
    with zipfile.ZipFile(wheel) as archive:
        count = len(archive.namelist())
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {count} files, as promised")


if __name__ == "__main__":
    main()
