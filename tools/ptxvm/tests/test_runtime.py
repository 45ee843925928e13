"""A program compiled against NVIDIA's shared runtime runs unchanged against the stand-in."""

from __future__ import annotations

import os
import subprocess

import pytest
from engine_fixture import FOLDER, HERE


@pytest.fixture(scope="module")
def output() -> str:
    program = FOLDER / "program"
    source = HERE / "program.cu"
    flags = ["-std=c++17", "-cudart", "shared", "--no-compress", "-lineinfo"]
    architecture = ["-gencode", "arch=compute_80,code=compute_80"]
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        nvcc = os.environ.get("CUDACXX", "nvcc")
        command = [nvcc, *flags, *architecture, str(source), "-o", str(program)]
        subprocess.run(command, check=True)
    done = subprocess.run(
        [str(program)],
        env={**os.environ, "LD_LIBRARY_PATH": str(FOLDER)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_part_holds(output: str) -> None:
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("WRONG")] == []
    assert len([line for line in lines if line.startswith("ok")]) == 17


def test_a_report_names_the_line_and_the_freed_memory(output: str) -> None:
    (report,) = [line for line in output.splitlines() if line.startswith("out of bounds")]
    assert "has been freed (use after free)" in report
    assert "program.cu:22" in report
    assert "read_one, block 0, thread 0" in report
