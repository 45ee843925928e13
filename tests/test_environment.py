"""Environment variables: unknown ones warn, the log level is obeyed, profiles name the ops."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import fastmoe_route as fr
import pytest
import torch
from torch.profiler import ProfilerActivity, profile


def import_with(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always:fastmoe_route", "-c", "import fastmoe_route"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def plain_import() -> subprocess.CompletedProcess[str]:
    return import_with(FASTMOE_ROUTE_LOG_LEVEL="")


def test_known_variables_are_silent(plain_import):
    assert plain_import.returncode == 0
    assert "fastmoe_route" not in plain_import.stderr


def test_unknown_variable_warns_and_names_the_nearest():
    done = import_with(FASTMOE_ROUTE_LOGLEVEL="debug")
    assert done.returncode == 0
    text = "nothing reads FASTMOE_ROUTE_LOGLEVEL; did you mean FASTMOE_ROUTE_LOG_LEVEL?"
    assert text in done.stderr


def test_unknown_variable_that_is_near_none_lists_all():
    done = import_with(FASTMOE_ROUTE_FOO="1")
    assert "nothing reads FASTMOE_ROUTE_FOO; known: FASTMOE_ROUTE_CUDA_GEMM, " in done.stderr


def test_log_level_shows_the_loaded_library():
    done = import_with(FASTMOE_ROUTE_LOG_LEVEL="info")
    assert "fastmoe_route INFO: loaded " in done.stderr
    assert "fastmoe_route_cpu.so" in done.stderr


def test_bad_log_level_is_an_error_that_lists_the_levels():
    done = import_with(FASTMOE_ROUTE_LOG_LEVEL="loud")
    assert done.returncode != 0
    rule = "FASTMOE_ROUTE_LOG_LEVEL must be one of debug, info, warning, error, got loud"
    assert rule in done.stderr


def test_profile_names_the_ops():
    x = torch.randn(8, 16, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        routing = fr.gate(x @ torch.randn(16, 4), 2)
        fr.moe_mlp(x, routing, torch.randn(4, 16, 8), torch.randn(4, 4, 16)).sum().backward()
    names = {event.key for event in recorded.key_averages()}
    plain = ("gate_plain_forward", "plan_dispatch_plain_forward")
    wanted = (*plain, "gate_backward", "moe_mlp", "moe_mlp_backward")
    assert {f"fastmoe_route::{name}" for name in wanted} <= names


def test_submodules_are_attributes_and_typos_are_not():
    assert fr.reference.gate is not None
    assert dir(fr).count("reference") == dir(fr).count("losses") == 1
    with pytest.raises(AttributeError, match="has no attribute 'gates'"):
        _ = fr.gates


def test_every_variable_that_is_read_is_known(root):
    """Names in getenv, os.environ and CMake; macros of the C++ sources are no variables."""
    from fastmoe_route._environment import VARIABLES

    read = r'(?:getenv\(|environ(?:\.get)?[\[(])\s*"(FASTMOE_ROUTE_[A-Z_]+)"|ENV\{(FASTMOE_\w+)\}'
    found = set()
    for path in [
        *(root / "csrc").rglob("*"),
        *(root / "python").rglob("*.py"),
        root / "CMakeLists.txt",
    ]:
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py", ".txt"):
            found |= {a or b for a, b in re.findall(read, path.read_text())}
    assert {"FASTMOE_ROUTE_ISA", "FASTMOE_ROUTE_LOG_LEVEL"} <= found
    assert found <= set(VARIABLES)
