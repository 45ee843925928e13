"""Programs compiled against NVIDIA's shared runtime run unchanged against the stand-in."""

from __future__ import annotations

import os
import subprocess

import pytest
from engine_fixture import FOLDER, HERE, ROOT


def run_program(name: str, *further: str) -> str:
    """What a CUDA file of this folder prints; compiled when it is newer than its program."""
    program, source = FOLDER / name, HERE / f"{name}.cu"
    flags = ["-std=c++17", "-cudart", "shared", "--no-compress", "-lineinfo"]
    architecture = ["-gencode", "arch=compute_80,code=compute_80"]
    newest = max(path.stat().st_mtime for path in (source, *(ROOT / "csrc" / "cuda").glob("*.cu*")))
    if not program.exists() or program.stat().st_mtime < newest:
        nvcc = os.environ.get("CUDACXX", "nvcc")
        command = [nvcc, *flags, *architecture, *further, str(source), "-o", str(program)]
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


@pytest.fixture(scope="module")
def output() -> str:
    return run_program("program")


def test_every_part_holds(output: str) -> None:
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("WRONG")] == []
    assert len([line for line in lines if line.startswith("ok")]) == 18


def test_a_report_names_the_line_and_the_freed_memory(output: str) -> None:
    (report,) = [line for line in output.splitlines() if line.startswith("out of bounds")]
    assert "has been freed (use after free)" in report
    assert "program.cu:22" in report
    assert "read_one, block 0, thread 0" in report


def test_ids_out_of_range_stop_a_debug_build() -> None:
    """The op tests run the other kind of build, where they are none."""
    flags = ["-UNDEBUG", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
    printed = dict(
        line.split(": ", 1) for line in run_program("debug_ids", *flags).splitlines() if line
    )
    assert list(printed) == ["in range", "unrouted", "past the last", "below none", "scope"]
    assert printed.pop("in range") == printed.pop("unrouted") == "ok"
    for text in printed.values():
        assert text.startswith("assert: a device-side assert failed"), text
        assert "plan_dispatch.cu:" in text
