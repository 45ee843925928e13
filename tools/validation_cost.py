"""What checking every expert id costs plan_dispatch: its kernel beside itself without the checks.

    python tools/validation_cost.py [--json bench/results/NAME.json]

Compiles the kernel twice by the commands of the last `make`, once with the checks of
`csrc/cpu/count_bins.cpp` taken out of its text, and times both, and a call of the operator, in
turns. At these sizes all of it is on one thread. The bar is 2% of a call.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import shutil
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
    "if (__builtin_expect(largest > last_bin, 0)) return false;",
    "if (bin > last_bin) return false;",
)
SOURCES = ("csrc/cpu/plan_dispatch.cpp", "csrc/common/parallel.cpp", "csrc/common/workspace.cpp")
TOKENS, TOP_K, NUM_EXPERTS = 2048, 8, 128
NUM_SETS = 8  # of ids, each with a result of its own
COPIES = 6  # of either library: where code and data happen to lie is worth more than the checks

DRIVER = """
#include "cpu/count_bins.h"
#include "ops/plan_dispatch.h"

namespace fastmoe_route {{
namespace {level} {{ void count_bins(const CountBinsArgs& args); }}
namespace cpu {{ void count_bins(const CountBinsArgs& args) {{ {level}::count_bins(args); }} }}
}}

// Plans every set of ids in turn, each into its own block of `out`; nonzero if one is refused.
extern "C" __attribute__((visibility("default")))
int plan(const void* const* sets, int num_sets, int is_int64, int64_t num_tokens, int64_t top_k,
         int64_t num_experts, int32_t* const* out) {{
  fastmoe_route::PlanStatus status;
  fastmoe_route::PlanArgs args{{}};
  args.num_tokens = num_tokens;
  args.top_k = top_k;
  args.num_experts = num_experts;
  args.num_rows = args.max_slots = num_tokens * top_k;
  args.experts_are_int64 = is_int64 != 0;
  args.experts_stride_token = top_k;
  args.experts_stride_slot = 1;
  args.num_scopes = args.align = 1;
  args.status = &status;
  int refused = 0;
  for (int i = 0; i < num_sets; ++i) {{
    args.experts = sets[i];
    args.offsets = out[i];
    args.kept = args.offsets + num_experts + 1;
    args.dropped = args.kept + num_experts;
    args.row_to_slot = args.dropped + num_experts;
    args.slot_to_row = args.row_to_slot + args.num_rows;
    fastmoe_route::cpu::plan_dispatch(args);
    refused |= status.kind;
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


def build(folder: Path, level: str, edit: Callable[[str], str]) -> list[ctypes.CDLL]:
    """The kernel with its counting edited, as a library of its own, loaded several times."""
    folder.mkdir()
    counting, driver = folder / "count_bins.cpp", folder / "driver.cpp"
    counting.write_text(edit((ROOT / COUNTING).read_text()))
    driver.write_text(DRIVER.format(level=level))
    # The edited file last, or the code behind it would be moved as well.
    sources = {driver: SOURCES[0], **{ROOT / s: s for s in SOURCES}, counting: COUNTING}
    objects = []
    for source, like in sources.items():
        objects.append(str(folder / f"{source.stem}.o"))
        command = compile_command(like, level)
        subprocess.run([*command, "-w", "-o", objects[-1], "-c", str(source)], check=True)
    linker = [compile_command(SOURCES[0], level)[0], "-shared", "-Wl,-z,defs"]
    files = [folder / f"plan{i}.so" for i in range(COPIES)]
    subprocess.run([*linker, "-o", str(files[0]), *objects], check=True)
    for file in files[1:]:
        shutil.copyfile(files[0], file)
    return [ctypes.CDLL(str(file)) for file in files]


def plan(libraries: Sequence[ctypes.CDLL], sets: Sequence[Tensor], out: Sequence[Tensor]) -> bool:
    """Plans each set of ids by each library; whether none was refused."""
    pointers = ctypes.c_void_p * len(sets)
    is_int64 = int(sets[0].dtype == torch.int64)
    sizes = [ctypes.c_int64(n) for n in (TOKENS, TOP_K, NUM_EXPERTS)]
    ids = pointers(*(t.data_ptr() for t in sets))
    blocks = pointers(*(t.data_ptr() for t in out))
    return not any(library.plan(ids, len(sets), is_int64, *sizes, blocks) for library in libraries)


def call(sets: Sequence[Tensor]) -> None:
    """As many plans by the operator."""
    for ids in (*sets,) * COPIES:
        fr.plan_dispatch(ids, NUM_EXPERTS)


def measure_ids(
    checked: list[ctypes.CDLL], bare: list[ctypes.CDLL], dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """One row: the kernel with and without its checks, on ids of one type."""
    generator = torch.Generator().manual_seed(0)
    shape, num_results = (TOKENS, TOP_K), 1 + 3 * NUM_EXPERTS + 2 * TOKENS * TOP_K
    sets, out, other = [], [], []
    for i in range(NUM_SETS):
        sets.append(torch.randint(0, NUM_EXPERTS, shape, generator=generator).to(dtype))
        for blocks in (out, other):
            blocks.append(torch.empty(num_results + 16 * i, dtype=torch.int32)[16 * i :])
    agree = plan(checked, sets, out) and plan(bare, sets, other)
    agree = agree and all(map(torch.equal, out, other))
    stray = sets[0].clone()
    stray[-1, -1] = NUM_EXPERTS
    if not agree or plan(checked, [stray], out[:1]):
        sys.exit("both kernels must agree, and the one with checks refuse a stray id")
    timing = interleave(
        {
            "with checks": lambda _: plan(checked, sets, out),
            "without": lambda _: plan(bare, sets, out),
            "call": lambda _: call(sets),
        },
        seconds,
        max_rounds=100_000,
    )
    ratio = timing.ratios["without"]
    seconds_of = {n: s.median / (NUM_SETS * COPIES) for n, s in timing.seconds.items()}
    share = {"median": 1 - ratio.median, "p10": 1 - ratio.p90, "p90": 1 - ratio.p10}
    return {
        "ids": str(dtype).removeprefix("torch."),
        "seconds": seconds_of,
        "share_of_kernel": share,
        "share_of_call": share["median"] * seconds_of["with checks"] / seconds_of["call"],
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
        "what": "share of plan_dispatch that checking the ids takes",
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
        share, seconds = row["share_of_kernel"], row["seconds"]
        print(
            f"{row['ids']}: kernel {duration(seconds['with checks'])}, without checks"
            f" {duration(seconds['without'])}, a call {duration(seconds['call'])}:"
            f" {share['median']:.1%} ({share['p10']:.1%} - {share['p90']:.1%}) of the kernel,"
            f" {row['share_of_call']:.1%} of a call, {row['turns']} turns"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
