"""What checking every expert id costs plan_dispatch: its counting beside itself without the checks.

    python tools/validation_cost.py [--json bench/results/NAME.json]

Compiles `csrc/cpu/count_bins.cpp` twice by the command of the last `make`, once with the checks
taken out of its text, and times both, and a call of the operator, in turns. Only the counting holds
checks; the rest of the kernel is left out, as it takes three quarters of the time and varies by
more than the checks cost. At these sizes all of it is on one thread. The bar is 2% of a call.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastmoe_route as fr
import torch
from fastmoe_route.bench.machine import cpu_name, library_info
from fastmoe_route.bench.report import duration
from fastmoe_route.bench.timing import interleave
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ROOT / "build" / "Release" / "compile_commands.json"
COUNTING = "csrc/cpu/count_bins.cpp"
CHECKS = (
    "if (__builtin_expect(!are_ids_within(ids + i, last), 0)) return false;",
    "if (ids[i] < -1 || ids[i] > last) return false;",
)
TOKENS, TOP_K, NUM_EXPERTS = 2048, 8, 128
NUM_SETS = 8  # of ids
REPEATS = 4  # of a turn's counting

DRIVER = """
#include <cstring>

#include "cpu/count_bins.h"

namespace fastmoe_route {{ namespace {level} {{ void count_bins(const CountBinsArgs& args); }} }}

// Counts every set of ids `repeats` times, the last into `counts` [E + 1]; how many were refused.
extern "C" __attribute__((visibility("default")))
int count(const void* const* sets, int num_sets, int repeats, int is_int64, int64_t num_ids,
          int64_t num_experts, int32_t* counts) {{
  int refused = 0;
  for (int i = 0; i < num_sets * repeats; ++i) {{
    bool are_valid = true;
    std::memset(counts, 0, (num_experts + 1) * sizeof(int32_t));
    fastmoe_route::{level}::count_bins(
        {{sets[i % num_sets], is_int64 != 0, num_ids, num_experts - 1, counts, &are_valid}});
    refused += !are_valid;
  }}
  return refused;
}}
"""


def without_checks(text: str) -> str:
    """The counting, taking every id for valid."""
    for check in CHECKS:
        if text.count(check) != 1:
            sys.exit(f"{COUNTING}: must hold this once, got {text.count(check)} times: {check}")
        text = text.replace(check, "")
    return text


def compile_command(source: str, level: str) -> list[str]:
    """How the last build compiled a source, at `level` if it is compiled at several."""
    if not COMMANDS.exists():
        sys.exit(f"{COMMANDS} must be there: run make")
    for entry in json.loads(COMMANDS.read_text()):
        words = shlex.split(entry["command"])
        levels = [word for word in words if word.startswith("-DFASTMOE_ROUTE_ISA=")]
        if Path(entry["file"]) == ROOT / source and levels in (
            [],
            [f"-DFASTMOE_ROUTE_ISA={level}"],
        ):
            return words[: words.index("-o")]
    sys.exit(f"{COMMANDS} must name {source}: run make")


def build(folder: Path, level: str, edit: Callable[[str], str]) -> ctypes.CDLL:
    """The counting with its text edited, as a library of its own."""
    folder.mkdir()
    counting, driver = folder / "count_bins.cpp", folder / "driver.cpp"
    counting.write_text(edit((ROOT / COUNTING).read_text()))
    driver.write_text(DRIVER.format(level=level))
    command = compile_command(COUNTING, level)
    library = folder / "count.so"
    files = [str(driver), str(counting)]
    subprocess.run(
        [*command, "-w", "-shared", "-Wl,-z,defs", *files, "-o", str(library)], check=True
    )
    return ctypes.CDLL(str(library))


def count(library: ctypes.CDLL, sets: Sequence[Tensor], counts: Tensor, repeats: int = 1) -> int:
    """Counts each set of ids `repeats` times; how often one was refused."""
    ids = (ctypes.c_void_p * len(sets))(*(t.data_ptr() for t in sets))
    is_int64 = int(sets[0].dtype == torch.int64)
    sizes = [ctypes.c_int64(n) for n in (sets[0].numel(), NUM_EXPERTS)]
    counter = ctypes.c_void_p(counts.data_ptr())
    return int(library.count(ids, len(sets), repeats, is_int64, *sizes, counter))


def call(sets: Sequence[Tensor]) -> None:
    """A plan of each set by the operator."""
    for ids in sets:
        fr.plan_dispatch(ids, NUM_EXPERTS)


def measure_ids(
    checked: ctypes.CDLL, bare: ctypes.CDLL, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """One row: the counting with and without its checks, on ids of one type."""
    generator = torch.Generator().manual_seed(0)
    shape = (TOKENS, TOP_K)
    sets = [
        torch.randint(0, NUM_EXPERTS, shape, generator=generator).to(dtype) for _ in range(NUM_SETS)
    ]
    counts, other = (torch.empty(NUM_EXPERTS + 1, dtype=torch.int32) for _ in range(2))
    stray = sets[0].clone()
    stray[-1, -1] = NUM_EXPERTS
    refused = count(checked, sets, counts) + count(bare, sets, other)
    if refused or not torch.equal(counts, other) or not count(checked, [stray], other):
        sys.exit("both must count the same, and the one with checks refuse a stray id")
    timing = interleave(
        {
            "with checks": lambda _: count(checked, sets, counts, REPEATS),
            "without": lambda _: count(bare, sets, counts, REPEATS),
            "call": lambda _: call(sets),
        },
        seconds,
        max_rounds=100_000,
    )
    calls = {"with checks": REPEATS, "without": REPEATS, "call": 1}
    seconds_of = {n: s.median / (NUM_SETS * calls[n]) for n, s in timing.seconds.items()}
    ratio = timing.ratios["without"]
    part = seconds_of["with checks"] / seconds_of["call"]
    return {
        "ids": str(dtype).removeprefix("torch."),
        "seconds": seconds_of,
        "share_of_call": {
            "median": (1 - ratio.median) * part,
            "p10": (1 - ratio.p90) * part,
            "p90": (1 - ratio.p10) * part,
        },
        "turns": ratio.samples,
    }


def measure(seconds: float) -> dict[str, Any]:
    """The report: a row for either type of ids, `seconds` long."""
    level = str(library_info()["level"])
    level = level if level in ("portable", "avx2") else "avx512"
    with tempfile.TemporaryDirectory() as folder:
        checked = build(Path(folder) / "checked", level, lambda text: text)
        bare = build(Path(folder) / "bare", level, without_checks)
        rows = [measure_ids(checked, bare, t, seconds) for t in (torch.int32, torch.int64)]
    return {
        "what": "share of a call of plan_dispatch that checking the ids takes",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sizes": {"tokens": TOKENS, "top_k": TOP_K, "num_experts": NUM_EXPERTS},
        "cpu": cpu_name(),
        "level": level,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each type of ids")
    parser.add_argument("--json", type=Path, help="write the report there")
    options = parser.parse_args()
    report = measure(options.seconds)
    for row in report["rows"]:
        share, seconds = row["share_of_call"], row["seconds"]
        print(
            f"{row['ids']}: counting {duration(seconds['with checks'])}, without checks"
            f" {duration(seconds['without'])}, a call {duration(seconds['call'])}:"
            f" {share['median']:.1%} ({share['p10']:.1%} - {share['p90']:.1%}) of a call,"
            f" {row['turns']} turns"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
