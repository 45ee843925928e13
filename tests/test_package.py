"""The installed package: what importing it costs and needs, levels, the library beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import fastmoe_route
import pytest
from fastmoe_route import _load
from fastmoe_route.bench.machine import library_info
from levels import LEVELS

MAX_IMPORT_SECONDS = 0.050


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in a fresh interpreter, with variables of the environment changed."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- import ------------------------------------------------------------------------------------


def test_import_is_quick(tmp_path: Path) -> None:
    """CPU time, the best of three runs: the wall clock of a busy machine says nothing.

    From bytecode, which pip writes as it installs; here the first run does.
    """
    program = f"""
        import sys, time
        import torch
        sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}
        start = time.process_time()
        import fastmoe_route
        print(time.process_time() - start)
    """
    times = (float(run(program, OMP_NUM_THREADS="1").stdout) for _ in range(3))
    assert any(seconds < MAX_IMPORT_SECONDS for seconds in times)


def test_import_needs_no_compiler_network_or_gpu(tmp_path: Path) -> None:
    """No process is started, no socket opened and no CUDA library touched by import or use."""
    program = """
        import sys
        import torch

        def forbid(event, arguments):
            if event.startswith(("subprocess.", "os.system", "os.exec", "os.posix", "socket.")):
                raise RuntimeError(f"{event} {arguments}")

        sys.addaudithook(forbid)
        import fastmoe_route as fr
        routing = fr.gate(torch.randn(5, 4), 2)
        fr.moe_mlp(torch.randn(5, 8), routing, torch.randn(4, 8, 6), torch.randn(4, 3, 8))
        assert not torch.cuda.is_initialized()
        assert "fastmoe_route_cuda" not in open("/proc/self/maps").read()
        print("fine")
    """
    done = run(program, PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="", CC="false", CXX="false")
    assert done.stdout == "fine\n", done.stderr


def test_import_leaves_torch_as_it_was() -> None:
    program = """
        import torch
        before = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()
        modes = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        state = torch.get_rng_state()
        import fastmoe_route
        assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())
        assert modes == (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
        assert torch.equal(state, torch.get_rng_state())
    """
    assert run(program).returncode == 0


def test_package_is_typed_and_lists_its_names() -> None:
    assert any((Path(folder) / "py.typed").exists() for folder in fastmoe_route.__path__)
    assert sorted(fastmoe_route.__all__) == list(fastmoe_route.__all__)
    assert all(hasattr(fastmoe_route, name) for name in fastmoe_route.__all__)


# ---- levels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_forced_or_refused(level: str) -> None:
    best = library_info()["best_level"]
    program = "import fastmoe_route, torch; print(torch.ops.fastmoe_route.machine_info())"
    done = run(program, FASTMOE_ROUTE_ISA=level)
    if LEVELS.index(level) <= LEVELS.index(best):
        assert done.returncode == 0, done.stderr
        assert f"level={level};" in done.stdout
    else:
        assert done.returncode != 0
        rule = f"fastmoe_route: FASTMOE_ROUTE_ISA must be at most {best} on this processor"
        assert f"{rule}, got {level}" in done.stderr


def test_unknown_level_is_an_error_that_lists_the_levels() -> None:
    program = """
        import torch
        import fastmoe_route as fr
        try:
            fr.gate(torch.zeros(1, 2), 1)
        except RuntimeError as error:
            print(error)
    """
    done = run(program, FASTMOE_ROUTE_ISA="sse9")
    rule = "fastmoe_route: FASTMOE_ROUTE_ISA must be one of " + ", ".join(LEVELS)
    assert f"{rule}, got sse9" in done.stdout + done.stderr


def test_empty_level_means_the_fastest() -> None:
    program = "import fastmoe_route, torch; print(torch.ops.fastmoe_route.machine_info())"
    best = library_info()["best_level"]
    # Intel's bfloat16 products without AMX are slower than float32.
    fastest = "avx512" if best == "avx512_bf16" and is_intel() else best
    done = run(program, FASTMOE_ROUTE_ISA="")
    assert f"level={fastest};" in done.stdout


def is_intel() -> bool:
    return "GenuineIntel" in Path("/proc/cpuinfo").read_text()


# ---- the library -------------------------------------------------------------------------------


def library() -> Path:
    path = _load.find_library("fastmoe_route_cpu")
    assert path is not None
    return path


def test_missing_library_says_what_to_do(tmp_path: Path) -> None:
    for folder in fastmoe_route.__path__:
        if (Path(folder) / "__init__.py").exists():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(folder, tmp_path / "fastmoe_route", ignore=ignore)
            break
    program = """
        import os, sys
        os.environ.pop("FASTMOE_ROUTE_LIBRARY_DIR", None)
        sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
        sys.path.insert(0, FOLDER)
        try:
            import fastmoe_route
        except ImportError as error:
            print(error)
    """.replace("FOLDER", repr(str(tmp_path)))
    lines = run(program).stdout.splitlines()
    assert lines == [
        "fastmoe_route: the compiled library fastmoe_route_cpu.so is missing.",
        "Install the wheel, or build in place with: pip install --no-build-isolation -e .",
    ]


def test_library_needs_libtorch_cpu_and_no_search_path() -> None:
    if not shutil.which("readelf"):
        pytest.skip("no readelf: binutils is not installed")
    command = ["readelf", "--dynamic", "--wide", str(library())]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name or "c10" in name]
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_library_holds_no_python_symbols() -> None:
    if not shutil.which("nm"):
        pytest.skip("no nm: binutils is not installed")
    command = ["nm", "--dynamic", "--undefined-only", str(library())]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert not re.findall(r"\bPy[A-Z_]\w+", text)
