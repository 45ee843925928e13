"""What the user sees: a progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

import fastmoe_route as fr
from fastmoe_route.bench import machine
from fastmoe_route.bench.machine import Limits
from fastmoe_route.bench.shapes import Row
from fastmoe_route.bench.timing import Summary

if TYPE_CHECKING:
    from fastmoe_route.bench.runner import Result

_HEADINGS = (
    f"{'op':<13} {'shape':<10} {'T':>5} {'dtype':<9} {'pass':<8}"
    f"{'time':>10} {'theirs':>10}   {'ratio  p10 - p90':<18} {'of limit':>8}  {'':<10} beside"
)


def duration(seconds: float) -> str:
    """Three digits and a unit.

    >>> duration(0.00123), duration(2.5)
    ('1.23 ms', '2.50 s')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 0.9995 or unit == "us":
            value = seconds * factor
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError


def ratio(summary: Summary) -> str:
    """Median and spread of a ratio."""
    return f"{summary.median:5.2f}  {summary.p10:.2f} - {summary.p90:.2f}"


def _behind(result: Result) -> str:
    """A row and every contender that was faster."""
    assert result.timing is not None
    ratios = result.timing.ratios
    faster = sorted((r.median, name) for name, r in ratios.items() if r.median < 1.0)
    names = ", ".join(f"{name} takes {ratio:.2f} of our time" for ratio, name in faster)
    return f"{result.row}: {names}"


def row_line(result: Result) -> str:
    """One line of the table."""
    row = result.row
    passes = "fwd+bwd" if row.training else "fwd"
    head = f"{row.op:<13} {row.shape.name:<10} {row.tokens:>5} {row.dtype:<9} {passes:<8}"
    if result.skipped:
        return f"{head} skipped: {result.skipped}"
    if not result.passed or result.timing is None:
        return f"{head} WRONG RESULT, not timed"
    timing = result.timing
    best = timing.best
    return (
        f"{head}{duration(timing.seconds['fastmoe_route'].median):>10} "
        f"{duration(timing.seconds[best].median):>10}   {ratio(timing.ratios[best]):<18} "
        f"{result.share:>7.0%}   {result.bound_by:<10} {best}"
    )


class Reporter:
    """Prints the head, every row as it finishes, and the tail."""

    def __init__(self, total: int) -> None:
        """`total` rows will come."""
        self.done = 0
        self._noted: set[str] = set()
        self._progress: Any = None
        self._task: Any = None
        if sys.stdout.isatty():
            try:
                from rich.progress import (
                    BarColumn,
                    MofNCompleteColumn,
                    Progress,
                    TextColumn,
                    TimeElapsedColumn,
                )
            except ImportError:
                print("(plain lines; `pip install rich` for a progress bar)")
            else:
                self._progress = Progress(
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TextColumn("{task.description}"),
                    transient=True,
                )
                self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Reporter:
        """Shows the progress bar, if there is one."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def head(self) -> None:
        """Who runs on what."""
        info = machine.library_info()
        self._print(
            f"fastmoe_route {fr.__version__}, torch {torch.__version__}, {machine.cpu_name()}, "
            f"{torch.get_num_threads()} threads, level {info['level']}"
        )
        load, cpus = os.getloadavg()[0], os.cpu_count() or 1
        if load > 0.5 * cpus:
            self._print(
                f"NOTE: other programs keep this machine busy (load {load:.1f} on {cpus} CPUs): "
                "limits, times and ratios will say little"
            )

    def limits(self, limits: Limits) -> None:
        """The denominators, with what torch.mm reaches beside the peaks."""
        peaks = ", ".join(
            f"{name} {rate / 1e9:,.0f} (torch.mm {limits.torch_mm.get(name, 0.0) / 1e9:,.0f})"
            for name, rate in limits.peak.items()
        )
        self._print(f"limits, measured: GFLOP/s {peaks};")
        self._print(
            f"  GB/s memory read {limits.read / 1e9:.1f}, copy {limits.copy / 1e9:.1f}, "
            f"caches read: level 1 {limits.level1 / 1e9:.0f}, level 2 {limits.level2 / 1e9:.0f}, "
            f"level 3 {limits.level3 / 1e9:.0f}"
        )
        self._print(
            "ratio = time of the fastest contender beside ours / ours, of the same turns: above 1"
            " we are faster.\n"
            "of limit = least time this machine needs for its bytes (memory, level 1 or 2 cache) or"
            " operations\n(arithmetic) / ours.\n"
        )
        self._print(_HEADINGS)

    def start(self, row: Row) -> None:
        """A row begins."""
        if self._progress is not None:
            self._progress.update(self._task, description=str(row))

    def finish(self, result: Result) -> None:
        """A row is done."""
        self.done += 1
        self._print(row_line(result))
        for note in result.notes:
            if note not in self._noted:
                self._noted.add(note)
                self._print(f"    {note}")
        for finding in result.findings:
            if not finding.passed:
                self._print(f"    {finding}")
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done)

    def tail(
        self,
        results: Sequence[Result],
        seconds: float,
        json_path: Path | None,
        plot_path: Path | None,
    ) -> None:
        """The sum of it all."""
        timed = [result for result in results if result.timing is not None]
        wrong = [result for result in results if not result.passed]
        skipped = sum(1 for result in results if result.skipped)
        slower = [
            result
            for result in timed
            if result.timing is not None and result.timing.ratios[result.timing.best].median < 1.0
        ]
        print(
            f"\n{len(timed)} rows right and timed, {len(wrong)} wrong, {skipped} skipped, "
            f"{len(slower)} slower than the fastest beside; {seconds:.0f} s"
        )
        for result in slower:
            print(f"  behind: {_behind(result)}")
        if timed and any(not result.cached and result.copies > 1 for result in timed):
            print("Data too large for the level-2 caches rotates through memory between calls.")
        for path in (json_path, plot_path):
            if path is not None:
                print(f"written: {path}")
        if wrong:
            names = "; ".join(str(result.row) for result in wrong)
            print(f"\n*** {len(wrong)} WRONG RESULT(S): {names}", file=sys.stderr)
