"""Without its barriers, fences, waits and member masks, a kernel turns something red: of a few.

run_mutants.py does so for all kernels, and for their guards.
"""

from __future__ import annotations

import os
import sys

import pytest
from engine_fixture import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from mutant_runs import Mutant, reach

CALLS = ("plan", "plan, scopes", "plan, max_rows", "softmax 300, float64", "softmax_topk 100")


@pytest.mark.parametrize("kind", ["order", "mask"])
def test_places_of_a_few_kernels_are_needed(kind: str) -> None:
    calls_of: dict[str, list[str]] = {}
    for name in CALLS:
        for place in reach(name)[1][kind]:
            calls_of.setdefault(place, []).append(name)
    assert len(calls_of) >= 15
    idle = []
    for place, names in calls_of.items():
        mutant = Mutant(kind, place, names)
        if mutant.witness(os.waitpid(mutant.pid, 0)[1]) is None:
            idle.append(place)
    assert not idle, "\n".join(idle)
