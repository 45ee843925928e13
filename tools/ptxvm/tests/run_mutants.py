"""Taking away any one barrier, fence, wait, member mask or guard of a kernel turns something red.

In the decoded kernels, one place of the CUDA sources at a time loses its protection
(engine/mutants.h says how), and those calls of mutant_cases.py that reach the place are run,
the cheapest first, until the engine reports or a result is wrong. What may go without harm is
listed in harmless_mutants.py, each with the reason.

What was red is kept in build/vm/mutants.json, so that a run that was interrupted goes on, and one
with a new call judges what is open: an entry holds while library, engine and call are what they
were.

python tools/ptxvm/tests/run_mutants.py --kinds order mask --only softmax_topk.cu
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

from engine_fixture import FOLDER, HERE, ROOT

sys.path.insert(0, str(ROOT / "tests"))

from harmless_mutants import HARMLESS, covers
from mutant_cases import CASES
from mutant_runs import KINDS, Mutant, places, reach

IDLE, UNREACHED = "nothing is red", "no call comes"


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def digest_of_call(name: str) -> str:
    """Of the call's function and arguments."""
    case = CASES[name]
    if not isinstance(case, partial):
        return digest(inspect.getsource(case).encode())
    return digest(
        inspect.getsource(case.func).encode(),
        repr((case.args, sorted(case.keywords.items()))).encode(),
    )


class Record:
    """What is known of this library: what each call reaches, and which call is red at a place."""

    def __init__(self, path: Path, *, is_fresh: bool) -> None:
        self._path = path
        libraries = ("fastmoe_route_vm.so", "ptxvm.so", "libcudart.so.13")
        files = [FOLDER / name for name in libraries]
        files += [HERE / name for name in ("mutant_checks.py", "mutant_runs.py")]
        self._library = digest(*(file.read_bytes() for file in files))
        known = json.loads(path.read_text()) if path.exists() and not is_fresh else {}
        if known.get("library") != self._library:
            known = {}
        self._calls = {name: digest_of_call(name) for name in CASES}
        holds = {n for n, made in known.get("calls", {}).items() if self._calls.get(n) == made}
        self._reached = {n: r for n, r in known.get("reached", {}).items() if n in holds}
        self.red = {
            kind: {p: n for p, n in known.get("red", {}).get(kind, {}).items() if n in holds}
            for kind in KINDS
        }

    def calls_at(self) -> dict[str, dict[str, list[str]]]:
        """By kind and place, the calls that execute it, cheapest first."""
        for name in CASES:
            if name not in self._reached:
                self._reached[name] = reach(name)
        self.write()
        table: dict[str, dict[str, list[str]]] = {
            kind: {place: [] for place in places(kind)} for kind in KINDS
        }
        for name in sorted(CASES, key=lambda name: self._reached[name][0]):
            for kind, reached in self._reached[name][1].items():
                for place in reached:
                    table[kind][place].append(name)
        return table

    def write(self) -> None:
        content = {
            "library": self._library,
            "calls": self._calls,
            "reached": self._reached,
            "red": self.red,
        }
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(content))
        beside.replace(self._path)


class OutOfTime(Exception):
    pass


def judge(
    record: Record, kind: str, calls_at: dict[str, list[str]], until: float
) -> dict[str, str]:
    """Runs what is not known to be red; returns what the mutants do that are not."""
    red = record.red[kind]
    others = {place: UNREACHED for place, names in calls_at.items() if not names}
    todo = [place for place, names in calls_at.items() if names and place not in red]
    print(f"{kind}: {len(calls_at)} places, {len(todo)} to judge, {len(red)} known to be red")
    running: dict[int, Mutant] = {}
    shown = time.monotonic()

    def finish_one() -> None:
        pid, status = os.wait()
        mutant = running.pop(pid)
        try:
            witness = mutant.witness(status)
        except ChildProcessError as error:
            others[mutant.place] = str(error)
            return
        if witness is None:
            others[mutant.place] = IDLE
        else:
            red[mutant.place] = witness

    for done, place in enumerate(todo):
        if time.monotonic() > shown + 10:
            shown = time.monotonic()
            print(f"{kind}: {done} of {len(todo)}, {len(others)} not red", flush=True)
            record.write()
        if len(running) == (os.cpu_count() or 1):
            finish_one()
        if time.monotonic() > until:
            break
        mutant = Mutant(kind, place, calls_at[place])
        running[mutant.pid] = mutant
    while running:
        finish_one()
    record.write()
    if time.monotonic() > until:
        raise OutOfTime
    return others


def faults(kind: str, places: Collection[str], others: dict[str, str], is_whole: bool) -> list[str]:
    """What is neither red nor listed, and what is listed in vain. Prints the counts."""
    used: set[str] = set()
    open_ = []
    for place, did in others.items():
        covered = [near for entry in HARMLESS for near in covers(entry, kind, place)]
        used.update(covered)
        if not covered or did not in (IDLE, UNREACHED):
            open_.append(f"{did}: {place}")
    print(
        f"{kind}: of {len(places)} places {len(places) - len(others)} are red,"
        f" {len(others) - len(open_)} are listed, {len(open_)} are neither"
    )
    listed = [near for entry in HARMLESS if entry.kind == kind for near in entry.near]
    return open_ + [f"listed in vain: {near}" for near in listed if is_whole and near not in used]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--only", default="", help="places whose lines hold this text")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--fresh", action="store_true", help="trust no earlier run")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    record = Record(FOLDER / "mutants.json", is_fresh=options.fresh)
    table = record.calls_at()
    wrong = []
    for kind in options.kinds:
        calls_at = {p: names for p, names in table[kind].items() if options.only in p}
        try:
            others = judge(record, kind, calls_at, until)
        except OutOfTime:
            print("Out of time: the same command goes on from here.")
            return 3
        wrong += faults(kind, calls_at, others, not options.only)
    for fault in wrong:
        print(fault)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
