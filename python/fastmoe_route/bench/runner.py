"""Runs the rows: data, check, time, limit, result; one shape in memory at a time."""

from __future__ import annotations

import gc
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import fastmoe_route as fr
from fastmoe_route.bench import machine, peers
from fastmoe_route.bench.case import MULTIPLY, READ
from fastmoe_route.bench.cases import build_case
from fastmoe_route.bench.check import Finding
from fastmoe_route.bench.machine import Limits
from fastmoe_route.bench.report import Reporter
from fastmoe_route.bench.shapes import (
    QUICK_ROW_SECONDS,
    ROW_SECONDS,
    WEIGHT_OPS,
    Row,
    Shape,
    quick_rows,
    select_rows,
)
from fastmoe_route.bench.timing import Summary, Timing, interleave
from fastmoe_route.bench.workload import OutOfMemory, Weights, make_weights

SCHEMA_VERSION = 1


@dataclass
class Options:
    """What the command line asked for; empty sequences mean the default rows."""

    ops: Sequence[str] = ()
    shapes: Sequence[Shape] = ()
    tokens: Sequence[int] = ()
    dtypes: Sequence[str] = ()
    passes: str = "both"
    quick: bool = False
    threads: int | None = None
    seconds: float | None = None
    seed: int = 0
    json_path: Path | None = None
    plot_path: Path | None = None
    peers: bool = False
    reuse_memory: bool = False

    def rows(self) -> list[Row]:
        """The rows to run."""
        if self.peers:  # they are forward only, and compared on the whole layer of experts
            return select_rows(("moe_mlp",), self.shapes, self.tokens, self.dtypes, "forward")
        if self.quick:
            rows = quick_rows(self.ops, self.shapes, self.tokens, self.dtypes)
            rows = [row for row in rows if self.passes in ("both", _pass_name(row))]
            if rows:
                return rows
        return select_rows(self.ops, self.shapes, self.tokens, self.dtypes, self.passes)


def _pass_name(row: Row) -> str:
    return "training" if row.training else "forward"


@dataclass
class Result:
    """One finished row: timed, wrong or skipped."""

    row: Row
    findings: list[Finding] = field(default_factory=list)
    timing: Timing | None = None
    yardsticks: dict[str, Summary] = field(default_factory=dict)
    num_bytes: int = 0
    flops: float = 0.0
    copies: int = 1
    cached: bool = False
    floor_seconds: float = 0.0
    read: float = 0.0  # bytes per second of weights, in turns with the contenders
    multiply: float = 0.0  # operations per second on registers, likewise
    bound_by: str = ""
    skipped: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every comparison held. A skipped row is not wrong."""
        return all(finding.passed for finding in self.findings)

    @property
    def share(self) -> float:
        """Share of the machine's limit that our time reaches."""
        assert self.timing is not None
        return self.floor_seconds / self.timing.seconds["fastmoe_route"].median

    def as_dict(self) -> dict[str, object]:
        """For JSON; the format is described in bench/README.md."""
        shape = self.row.shape
        result: dict[str, object] = {
            "op": self.row.op,
            "shape": {
                "name": shape.name,
                "hidden": shape.hidden,
                "intermediate": shape.intermediate,
                "num_experts": shape.num_experts,
                "top_k": shape.top_k,
                "gate": shape.gate,
            },
            "tokens": self.row.tokens,
            "dtype": self.row.dtype,
            "pass": _pass_name(self.row),
            "check": {
                "passed": self.passed,
                "findings": [asdict(finding) for finding in self.findings],
            },
            "skipped": self.skipped or None,
            "notes": self.notes,
        }
        if self.timing is None:
            return result
        timing = self.timing
        return result | {
            "declared": {"bytes": self.num_bytes, "flops": self.flops},
            "data": {"copies": self.copies, "in_cache": self.cached},
            "limit": {
                "seconds": self.floor_seconds,
                "bound_by": self.bound_by,
                "share": self.share,
                "read_bytes_per_second": self.read or None,
                "multiply_flops": self.multiply or None,
            },
            "seconds": {name: asdict(summary) for name, summary in timing.seconds.items()},
            "ratios": {name: asdict(summary) for name, summary in timing.ratios.items()},
            "yardsticks": {name: asdict(summary) for name, summary in self.yardsticks.items()},
            "calls_per_sample": timing.calls_per_sample,
            "fastest_baseline": timing.best,
        }


def run_row(
    row: Row,
    limits: Limits,
    weights: Weights | None,
    *,
    seconds: float,
    min_rounds: int,
    seed: int,
) -> Result:
    """Checks a row and, if it is right, times it."""
    torch.manual_seed(seed)
    try:
        case = build_case(row, limits, seed, weights)
    except OutOfMemory as error:
        return Result(row, skipped=str(error))
    result = Result(
        row,
        num_bytes=case.num_bytes,
        flops=case.flops,
        copies=case.copies,
        cached=case.cached,
        notes=case.notes,
    )
    result.findings = case.check()
    if not result.passed:
        return result
    with torch.set_grad_enabled(row.training):
        timed = {**case.contenders, **case.yardsticks}
        result.timing = interleave(timed, seconds, min_rounds=min_rounds)
    result.yardsticks = {name: result.timing.ratios.pop(name) for name in case.yardsticks}
    if case.read_bytes > 0:
        result.read = case.read_bytes / result.timing.seconds[READ].median
    if case.multiply_flops > 0:
        result.multiply = case.multiply_flops / result.timing.seconds[MULTIPLY].median
    result.floor_seconds, result.bound_by = limits.floor(
        case.num_bytes,
        case.flops,
        row.dtype,
        cached=case.cached,
        written=case.written,
        read=result.read,
        multiply=result.multiply,
    )
    return result


def _weights_for(row: Row, limits: Limits, options: Options) -> Weights | str:
    """The weights of the row's shape, or why there are none."""
    dtype = getattr(torch, row.dtype)
    try:
        weights = make_weights(
            row.shape, dtype, options.seed, limits.cached_set, limits.rotation_bytes
        )
    except OutOfMemory as error:
        return str(error)
    for name in peers.installed() if options.peers else []:
        try:
            packed = peers.pack(name, weights.ups, weights.downs)
        except Exception as error:  # whatever another library raises
            weights.notes.append(f"{name} is left out: {type(error).__name__}: {error}")
        else:
            if packed is not None:
                weights.peers[name] = packed
    return weights


def run_rows(
    rows: Sequence[Row], limits: Limits, options: Options, reporter: Reporter
) -> list[Result]:
    """Every row in order. Weights live as long as rows of their shape and dtype follow.

    An interrupt ends the run early; what was measured until then is kept.
    """
    seconds = options.seconds or (QUICK_ROW_SECONDS if options.quick else ROW_SECONDS)
    min_rounds = 3 if options.quick else 5
    results: list[Result] = []
    weights: Weights | str | None = None
    group: tuple[bool, str, str] | None = None
    for row in rows:
        heavy = row.op in WEIGHT_OPS
        wanted = (heavy, row.shape.name, row.dtype)
        if wanted != group:
            weights = None
            gc.collect()
            if heavy:
                if not options.quick:
                    limits.probe(0.02)
                weights = _weights_for(row, limits, options)
            group = wanted
        reporter.start(row)
        try:
            if isinstance(weights, str):
                result = Result(row, skipped=weights)
            else:
                result = run_row(
                    row,
                    limits,
                    weights,
                    seconds=seconds,
                    min_rounds=min_rounds,
                    seed=options.seed,
                )
        except KeyboardInterrupt:
            print(f"\nstopped after {len(results)} of {len(rows)} rows: reporting those")
            break
        results.append(result)
        reporter.finish(result)
    return results


def as_report(
    results: Sequence[Result], limits: Limits, options: Options, took: float
) -> dict[str, object]:
    """The JSON document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds_taken": took,
        "versions": {
            "fastmoe_route": fr.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": machine.describe(),
        "limits": limits.as_dict(),
        "seed": options.seed,
        "quick": options.quick,
        "reuse_memory": options.reuse_memory,
        "rows": [result.as_dict() for result in results],
    }


def _require_writable(path: Path) -> None:
    """Raises OSError now rather than after minutes of measuring; leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def _refusal(options: Options) -> str | None:
    """What keeps the run from starting, said before minutes of measuring."""
    if options.plot_path is not None:
        from fastmoe_route.bench.plot import formats

        if options.plot_path.suffix.lower() not in formats():
            return f"--plot must end in one of {', '.join(formats())}, got {options.plot_path}"
    for path in (options.json_path, options.plot_path):
        if path is not None:
            _require_writable(path)
    if options.reuse_memory and not machine.reuse_memory():
        return "--reuse-memory needs the allocator of glibc"
    if options.peers and not peers.installed():
        return f"--peers needs at least one of {', '.join(peers.MODULES)}: make bench-peers"
    if not options.rows():
        return "nothing to run: no op asked for applies to a shape asked for"
    return None


def run(options: Options) -> int:
    """Runs the bench. Returns the exit code: 0, 1 if an answer was wrong, 2 if nothing ran."""
    started = time.perf_counter()
    refusal = _refusal(options)
    if refusal is not None:
        print(f"bench: {refusal}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = options.rows()
    reporter = Reporter(len(rows))
    reporter.head()
    limits = Limits(quick=options.quick)
    limits.probe(0.1)
    limits.probe_torch()
    reporter.limits(limits)
    with reporter:
        results = run_rows(rows, limits, options, reporter)
    limits.release()
    report = as_report(results, limits, options, time.perf_counter() - started)
    if options.json_path is not None:
        options.json_path.write_text(json.dumps(report, indent=1) + "\n")
    plot_path = options.plot_path
    if plot_path is not None:
        from fastmoe_route.bench.plot import plot_report

        if any(result.timing is not None for result in results):
            plot_report(report, plot_path)
        else:
            plot_path = None
    reporter.tail(results, time.perf_counter() - started, options.json_path, plot_path)
    return 0 if all(result.passed for result in results) else 1
