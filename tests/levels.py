"""The instruction sets of the kernels, each tried in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastmoe_route.bench.machine import LEVELS, library_info


def run_python(level: str, *arguments: str) -> None:
    """Python with these arguments must end well on a level; skips what this processor has not."""
    best = library_info()["best_level"]
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this processor stops at {best}")
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "FASTMOE_ROUTE_ISA": level, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
