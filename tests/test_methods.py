"""docs/methods.md: current, complete, and every method in it covered by a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from fastmoe_route.methods import methods

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_tool", ROOT / "tools" / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_current(tool: ModuleType) -> None:
    assert tool.PAGE.read_text() == tool.page(), "run: python tools/methods.py"


def test_every_method_is_covered_by_a_test_of_its_own(tool: ModuleType) -> None:
    assert [m.name for m in methods() if tool.covering_test(m) is None] == []
