"""docs/methods.md: current, complete, every method in it covered by a test, recipes at no cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route.methods import methods
from scripts import script
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    with script("tools", "methods") as module:
        yield module


def test_page_is_current(tool: ModuleType) -> None:
    assert tool.PAGE.read_text() == tool.page(), "run: python tools/methods.py"


def test_every_method_is_covered_by_a_test_of_its_own(tool: ModuleType) -> None:
    assert [m.name for m in methods() if tool.covering_test(m) is None] == []


# ---- what a recipe costs -----------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def recorded_recipes(tool: ModuleType) -> dict[str, float]:
    costs = json.loads(tool.COSTS.read_text())["methods"]
    return {name: cost["own_share"] for name, cost in costs.items() if "own_share" in cost}


def test_every_method_was_measured(tool: ModuleType) -> None:
    costs = json.loads(tool.COSTS.read_text())["methods"]
    assert [m.name for m in methods() if not costs.get(m.name, {}).get("seconds", 0) > 0] == []
    assert "| - | - |" not in tool.page()


def test_a_recipe_adds_at_most_a_quarter_to_the_time_of_its_gate(tool: ModuleType) -> None:
    shares = recorded_recipes(tool)
    assert len(shares) >= 20
    assert {name: share for name, share in shares.items() if not share <= 0.25} == {}


def test_a_recipe_computes_nothing_besides_its_gate(tool: ModuleType) -> None:
    given = tool.inputs()
    by_name = {method.name: method for method in methods("router")}
    for name in recorded_recipes(tool):
        method = by_name[name]
        router = fr.routers.build(name, 512, 64, **tool.arguments_of(method)).eval()
        asked = {argument: given[argument] for argument in ("x", *method.needs)}
        with torch.no_grad():
            assert tool.recipe_of(router, asked) is not None, name
            with Operators() as seen:
                router(**asked)
        others = [x for x in seen.names if x != "aten.detach.default"]
        assert len(others) == 1, (name, others)
        assert others[0].split("_forward")[0].startswith("fastmoe_route.gate"), (name, others)
