"""Fills the places for numbers in README.md from recorded reports.

    python tools/readme_numbers.py

The headline: what the first page says about speed, least to most of each op, on every processor
that has reports and on GPUs. The table: a line for every whole layer of one report, and the median
over its rows of each op. Nothing else in README.md is touched; a report with a wrong row is
refused.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pages
from fastmoe_route.bench.peers import MODULES
from fastmoe_route.bench.report import duration

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
CPUS = {"epyc-2t-*.json": "AMD EPYC, 2 threads", "xeon-2t-*.json": "Intel Xeon, 2 threads"}
QUICK = "epyc-2t-quick.json"
GPUS = ("h100-bfloat16.json", "h200-bfloat16.json")
FIRST_PAGE = ("gate", "plan_dispatch", "permute", "unpermute", "grouped_mm", "moe_mlp")


def layer_line(row: dict[str, Any]) -> str:
    best = row["fastest_baseline"]
    ratio, seconds = row["ratios"][best], row["seconds"]
    cells = (
        row["shape"]["name"],
        str(row["tokens"]),
        row["dtype"],
        "forward + backward" if row["pass"] == "training" else "forward",
        duration(seconds["fastmoe_route"]["median"]),
        f"{duration(seconds[best]['median'])} ({best})",
        f"{ratio['median']:.2f} ({ratio['p10']:.2f} - {ratio['p90']:.2f})",
        f"{row['limit']['share']:.0%}",
    )
    return "| " + " | ".join(cells) + " |"


def op_line(op: str, rows: list[dict[str, Any]]) -> str:
    ratios = sorted(row["ratios"][row["fastest_baseline"]]["median"] for row in rows)
    shares = sorted(row["limit"]["share"] for row in rows)
    return (
        f"| `{op}` | {len(rows)} | {statistics.median(ratios):.2f} | "
        f"{ratios[0]:.2f} - {ratios[-1]:.2f} | {statistics.median(shares):.0%} |"
    )


def read(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return report


def cpu_ratios(files: str) -> dict[str, list[float]]:
    """`op -> ratios` of every row of those files, beside the fastest of plain PyTorch."""
    found: dict[str, list[float]] = {}
    for row in (row for path in sorted(RESULTS.glob(files)) for row in read(path.name)["rows"]):
        plain = [
            ratio["median"]
            for other, ratio in row.get("ratios", {}).items()
            if not other.startswith(("fastmoe_route", *MODULES))
        ]
        if plain:
            found.setdefault(row["op"], []).append(min(plain))
    return found


def gpu_ratios(report: dict[str, Any]) -> dict[str, list[float]]:
    """`op -> ratios`, called from Python, beside plain PyTorch."""
    found: dict[str, list[float]] = {}
    for row in (row for shape in report["shapes"].values() for row in shape["rows"]):
        for other, times in row["others"].items():
            if other.startswith("torch"):
                found.setdefault(row["op"], []).append(times["eager"] / row["eager"])
    return found


def spread(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2g} ({min(ratios):.2g} to {max(ratios):.2g})"


def headline() -> str:
    """The table of the first page; a processor without reports has no line."""
    machines = {f"CPU: {name}": cpu_ratios(files) for files, name in CPUS.items()}
    for report in map(read, GPUS):
        machines[f"GPU: {report['device']}, bfloat16"] = gpu_ratios(report)
    files = [*(files for files, name in CPUS.items() if machines[f"CPU: {name}"]), *GPUS]
    lines = [
        "Times as fast as plain PyTorch, its fastest way: median (least to most) over every shape",
        "recorded, forward and with backward; files of `bench/results`:",
        ", ".join(f"`{name}`" for name in files) + ".",
        "",
        "| | " + " | ".join(f"`{op}`" for op in FIRST_PAGE) + " |",
        "|---|" + "---|" * len(FIRST_PAGE),
    ]
    for machine, ratios in machines.items():
        if ratios:
            cells = (spread(ratios.get(op, [])) for op in FIRST_PAGE)
            lines.append(f"| {machine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table() -> str:
    report = read(QUICK)
    rows = [row for row in report["rows"] if not row["skipped"]]
    untimed = [row for row in rows if not row.get("seconds")]
    if untimed:
        sys.exit(f"{QUICK}: {len(untimed)} rows were not timed, because a result was wrong")
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"From `bench/results/{QUICK}`: {machine['cpu']}, {machine['threads']} threads, level "
        f"{machine['level']}, torch {versions['torch']}, {report['created'][:10]}.",
        "Ratio: time of the fastest plain PyTorch over ours, median (p10 - p90); above 1 we are",
        "faster. Of limit: the least time this machine needs over our time.",
        "",
        "| layer | tokens | dtype | pass | fastmoe_route | plain PyTorch | ratio | of limit |",
        "|---|---|---|---|---|---|---|---|",
        *(layer_line(row) for row in rows if row["op"] == "layer"),
        "",
        "| op | rows | ratio, median | lowest - highest | of limit, median |",
        "|---|---|---|---|---|",
    ]
    by_op: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_op.setdefault(row["op"], []).append(row)
    lines += [op_line(op, found) for op, found in by_op.items() if op != "layer"]
    return "\n".join(lines)


def filled(text: str) -> str:
    """README.md with the numbers of the reports."""
    return pages.fill(pages.fill(text, "headline", headline()), "numbers", table())


def main() -> None:
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()
