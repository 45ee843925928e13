"""docs/methods.md: current, complete, and every method in it covered by a test."""

from __future__ import annotations

import importlib.util
import json
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


def test_no_row_of_the_survey_is_missing(tool: ModuleType) -> None:
    rows = {method.row for method in methods()} | set(tool.ELSEWHERE)
    assert [row for row in tool.SURVEY if row not in rows] == []


def test_every_method_is_covered_by_a_test_of_its_own(tool: ModuleType) -> None:
    assert [m.name for m in methods() if tool.covering_test(m) is None] == []


def test_recorded_recipes_add_at_most_a_quarter_to_the_gate(tool: ModuleType) -> None:
    """Methods that hand on the result of one call of `gate`, in evaluation."""
    costs = json.loads(tool.COSTS.read_text())["routers"]
    shares = {name: found["own_share"] for name, found in costs.items() if "own_share" in found}
    assert len(shares) >= 5
    assert {name: share for name, share in shares.items() if not share <= 0.25} == {}
