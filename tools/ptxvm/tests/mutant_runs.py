"""Which calls come to a place of the kernels, and which is red where it has no protection."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from functools import cache

import torch
import vm_backend
from engine_fixture import engine
from mutant_cases import CASES

KINDS = ("order", "mask", "guard")
SEEDS = (1, 2, 3)
MOST_INSTRUCTIONS = 3_000_000  # of a mutant's launch: one that waits for ever is red soon
MOST_SECONDS = 120  # of the processor, for all calls of a mutant
WHOLE = 2**32


@cache
def places(kind: str) -> tuple[str, ...]:
    """The places of a kind in this package's sources, CUTLASS inlined there included."""
    vm_backend.load()
    return tuple(place for place in engine().places(kind) if "csrc/" in place)


def reach(name: str) -> tuple[int, dict[str, list[str]]]:
    """Of a call on whole kernels: its instructions, and by kind the places that it executes."""
    known = {kind: set(places(kind)) for kind in KINDS}  # also has the engine take note of them
    vm_backend.start(1)
    engine().set_options(counts=True, most_instructions=MOST_INSTRUCTIONS)
    engine().forget_executed()
    before = engine().instructions()
    try:
        CASES[name]()
    finally:
        engine().set_options(counts=False, most_instructions=WHOLE)
    assert vm_backend.reports() == [], name
    reached = {kind: [p for p in engine().executed(kind) if p in known[kind]] for kind in KINDS}
    return engine().instructions() - before, reached


def is_red(name: str) -> bool:
    """Whether the engine reports, or the call finds something wrong, on one of the seeds."""
    for seed in SEEDS:
        vm_backend.start(seed)
        try:
            CASES[name]()
        except (AssertionError, RuntimeError):
            return True
        if vm_backend.reports():
            return True
    return False


class Mutant:
    """A place without its protection, and calls of it, in a process of their own."""

    def __init__(self, kind: str, place: str, names: Iterable[str]) -> None:
        self.kind, self.place = kind, place
        torch.set_num_threads(1)  # threads do not come along
        self._answer, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._run(names, write_end)
                code = 0
            finally:
                os._exit(code)
        os.close(write_end)

    def _run(self, names: Iterable[str], write_end: int) -> None:
        """Writes the name of each call before it runs, and `red` behind the one that is."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
        engine().set_options(most_instructions=MOST_INSTRUCTIONS)
        engine().mutate(self.kind, self.place)
        for name in names:
            os.write(write_end, f"{name}\n".encode())
            if is_red(name):
                os.write(write_end, b"red\n")
                return

    def witness(self, status: int) -> str | None:
        """The call that was red, of a process that has ended so; None if none was.

        Raises:
            ChildProcessError: the process died, which is a fault of the engine.
        """
        with os.fdopen(self._answer) as answer:
            lines = answer.read().splitlines()
        if status != 0:
            raise ChildProcessError(f"died with status {status} in {lines[-1:]}")
        return lines[-2] if lines[-1:] == ["red"] else None
