"""Taking away any one barrier, fence, wait, member mask or guard of a kernel turns something red.

In the decoded kernels, one place of the CUDA sources at a time loses its protection
(engine/mutants.h says how), and those calls of mutant_cases.py that reach the place are run, the
cheapest first, until the engine reports or a result is wrong. What may go without harm is listed in
harmless_mutants.py, each with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache

import pytest
from engine_fixture import ROOT, engine

sys.path.insert(0, str(ROOT / "tests"))

import vm_backend
from harmless_mutants import HARMLESS, covers
from mutant_cases import CASES

KINDS = ("order", "mask", "guard")
SEEDS = (1, 2, 3)
MOST_INSTRUCTIONS = 3_000_000  # of a mutant's launch: one that waits for ever is red soon
QUICK = ("plan", "plan, scopes", "plan, max_rows", "softmax 300, float64", "softmax_topk 100")


@cache
def reached(cases: tuple[str, ...] = tuple(CASES)) -> dict[str, dict[str, list[str]]]:
    """By kind and place, the calls that execute it, cheapest first."""
    vm_backend.load()
    table: dict[str, dict[str, list[str]]] = {
        kind: {place: [] for place in engine().places(kind) if "csrc/" in place} for kind in KINDS
    }
    cost = {}
    for name in cases:
        vm_backend.start(1)
        engine().set_options(counts=True, most_instructions=MOST_INSTRUCTIONS)
        engine().forget_executed()
        before = engine().instructions()
        CASES[name]()
        assert vm_backend.reports() == [], name
        cost[name] = engine().instructions() - before
        for kind, places in table.items():
            for place in engine().executed(kind):
                places.get(place, []).append(name)
    engine().set_options(counts=False, most_instructions=2**32)
    for places in table.values():
        for names in places.values():
            names.sort(key=cost.__getitem__)
    return table


@pytest.fixture(autouse=True)
def whole_again() -> Iterator[None]:
    yield
    engine().mutate("order", "")
    engine().set_options(counts=False, most_instructions=2**32)


def is_red(kind: str, place: str, names: list[str]) -> bool:
    engine().set_options(most_instructions=MOST_INSTRUCTIONS)
    engine().mutate(kind, place)
    try:
        for name in names:
            for seed in SEEDS:
                vm_backend.start(seed)
                try:
                    CASES[name]()
                except (AssertionError, RuntimeError):
                    return True
                if vm_backend.reports():
                    return True
        return False
    finally:
        engine().mutate(kind, "")


@pytest.mark.mutants
@pytest.mark.parametrize("kind", KINDS)
def test_every_place_is_needed(kind: str) -> None:
    places = reached()[kind]
    used: set[str] = set()
    wrong = []
    for place, names in places.items():
        if names and is_red(kind, place, names):
            continue
        covered = [near for entry in HARMLESS for near in covers(entry, kind, place)]
        used.update(covered)
        if not covered:
            wrong.append(f"{'nothing is red' if names else 'no call comes'} here: {place}")
    listed = [near for entry in HARMLESS if entry.kind == kind for near in entry.near]
    wrong += [f"listed in vain: {near}" for near in listed if near not in used]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(places)} places of `{kind}`:", *wrong])


@pytest.mark.parametrize("kind", ["order", "mask"])
def test_places_of_a_few_kernels_are_needed(kind: str) -> None:
    places = {place: names for place, names in reached(QUICK)[kind].items() if names}
    assert len(places) >= 15
    idle = [place for place, names in places.items() if not is_red(kind, place, names)]
    assert not idle, "\n".join(idle)
