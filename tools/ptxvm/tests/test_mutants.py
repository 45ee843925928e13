"""Taking away any one barrier, fence, wait, member mask or guard of a kernel turns something red.

In the decoded kernels, one place of the CUDA sources at a time loses its protection
(engine/mutants.h says how), and those calls of mutant_cases.py that reach the place are run, the
cheapest first, until the engine reports or a result is wrong. What may go without harm is listed
below, each with the reason.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
from engine_fixture import ROOT, engine

sys.path.insert(0, str(ROOT / "tests"))

import vm_backend
from mutant_cases import CASES

SEEDS = (1, 2, 3)
MOST_INSTRUCTIONS = 3_000_000  # of a mutant's launch: one that waits for ever is red soon


class Harmless(NamedTuple):
    """A place that protects nothing that can be seen, and why."""

    kind: str
    file: str
    near: str  # text of the source within two lines of the place
    reason: str


HARMLESS = (
    Harmless(
        "order",
        "gemm/groups.cu",
        "last = ends[kThreads];",
        "CUB asks for a barrier before its storage is used again; the scan it takes needs none",
    ),
    Harmless(
        "order",
        "gemm/sm80.cuh",
        "mma((size.k()",
        "CUTLASS ends a main loop with a wait for copies that its last iterations issue switched"
        " off, and with a barrier; the epilogue begins with one as well",
    ),
    Harmless(
        "order",
        "gemm/up.cuh",
        "mma((inner + C::Mma::Shape",
        "the same; a barrier comes before the accumulators are staged",
    ),
    Harmless(
        "order",
        "gemm/sm80.cuh",
        "C::run_tile(\n        call.params",
        "the epilogue's barriers around a bias, in the kernel that never has one: not reached",
    ),
)
MOST_IDLE_GUARDS = 132  # of 446 that no call needs; not told apart one by one
QUICK = ("plan", "plan, scopes", "plan, max_rows", "softmax 1500", "softmax_topk 300")


@cache
def lines_of(file: str) -> list[str]:
    return (ROOT / file).read_text().splitlines()


def is_of(entry: Harmless, kind: str, place: str) -> bool:
    found = [
        "\n".join(lines_of(file)[max(int(line) - 3, 0) : int(line) + 2])
        for file, line in re.findall(r"(csrc/cuda/[\w/.]+):(\d+)", place)
        if file.endswith(entry.file)
    ]
    return kind == entry.kind and any(entry.near in text for text in found)


@cache
def reached(cases: tuple[str, ...] = tuple(CASES)) -> dict[str, dict[str, list[str]]]:
    """By kind and place, the calls that execute it, cheapest first."""
    vm_backend.load()
    table: dict[str, dict[str, list[str]]] = {
        kind: {place: [] for place in engine().places(kind) if "csrc/" in place}
        for kind in ("order", "mask", "guard")
    }
    cost = {}
    for name in cases:
        vm_backend.start(1)
        engine().set_options(counts=True)
        engine().forget_executed()
        before = engine().instructions()
        CASES[name]()
        assert vm_backend.reports() == [], name
        cost[name] = engine().instructions() - before
        for kind, places in table.items():
            for place in engine().executed(kind):
                places.get(place, []).append(name)
    engine().set_options(counts=False)
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
@pytest.mark.parametrize("kind", ["order", "mask"])
def test_every_place_is_needed(kind: str) -> None:
    places = reached()[kind]
    used: set[Harmless] = set()
    wrong = []
    for place, names in places.items():
        entries = {entry for entry in HARMLESS if is_of(entry, kind, place)}
        if names and is_red(kind, place, names):
            continue
        used |= entries
        if not entries:
            wrong.append(f"{'nothing is red' if names else 'no call comes'} here: {place}")
    wrong += [f"listed in vain: {e}" for e in HARMLESS if e.kind == kind and e not in used]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(places)} places of `{kind}`:", *wrong])


@pytest.mark.mutants
def test_most_guards_are_needed() -> None:
    places = reached()["guard"]
    idle = [place for place, names in places.items() if not is_red("guard", place, names)]
    assert len(idle) <= MOST_IDLE_GUARDS, "\n".join([f"{len(idle)} of {len(places)}:", *idle])


@pytest.mark.parametrize("kind", ["order", "mask"])
def test_places_of_a_few_kernels_are_needed(kind: str) -> None:
    places = {place: names for place, names in reached(QUICK)[kind].items() if names}
    assert len(places) >= 15
    idle = [place for place, names in places.items() if not is_red(kind, place, names)]
    assert not idle, "\n".join(idle)
