"""Fills the places for numbers in README.md from recorded reports.

    python tools/readme_numbers.py

The headline: what the first page says about speed, least to most of each op, on the CPU and on a
GPU. The table: a line for every whole layer that was timed on the CPU, and the median over the rows
of each op. Nothing else in README.md is touched; a report with a wrong row is refused.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from fastmoe_route.bench.report import duration

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CPU = "bench/results/epyc-2t-quick.json"
GPU = "bench/results/h200-bfloat16.json"
PEERS = ("vLLM", "SGLang", "zentorch", "ONNX Runtime")
FIRST_PAGE = ("gate", "plan_dispatch", "permute", "unpermute", "grouped_mm", "moe_mlp")


def layer_line(row: dict[str, Any]) -> str:
    best = row["fastest_baseline"]
    ratio, seconds = row["ratios"][best], row["seconds"]
    cells = (
        row["shape"]["name"] if isinstance(row["shape"], dict) else row["shape"],
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
    report: dict[str, Any] = json.loads((ROOT / name).read_text())
    return report


def cpu_ratios(op: str) -> list[float]:
    """Of every recorded row, beside the fastest of plain PyTorch."""
    reports = [read(str(path)) for path in sorted((ROOT / CPU).parent.glob("epyc-2t-*.json"))]
    found = []
    for row in (row for report in reports for row in report["rows"] if row["op"] == op):
        plain = [
            ratio["median"]
            for other, ratio in row.get("ratios", {}).items()
            if not other.startswith(("fastmoe_route", *PEERS))
        ]
        found += [min(plain)] if plain else []
    return found


def gpu_ratios(op: str) -> list[float]:
    """Called from Python, beside plain PyTorch."""
    rows = [row for shape in read(GPU)["shapes"].values() for row in shape["rows"]]
    return [
        times["eager"] / row["eager"]
        for row in rows
        if row["op"] == op
        for other, times in row["others"].items()
        if other.startswith("torch")
    ]


def headline() -> str:
    """The table of the first page."""
    cpu, gpu = read(CPU), read(GPU)
    machine = f"{cpu['machine']['cpu']}, {cpu['machine']['threads']} threads"
    lines = [
        "Times as fast as plain PyTorch, its fastest way: median (least to most) over every shape",
        f"recorded, forward and with backward; `bench/results/epyc-2t-*.json`, `{GPU}`.",
        "",
        "| | " + " | ".join(f"`{op}`" for op in FIRST_PAGE) + " |",
        "|---|" + "---|" * len(FIRST_PAGE),
    ]
    for where, ratios in (
        (f"CPU: {machine}", cpu_ratios),
        (f"GPU: {gpu['device']}, bfloat16", gpu_ratios),
    ):
        cells = []
        for found in map(ratios, FIRST_PAGE):
            low, middle, high = (
                f"{value:.2g}" for value in (min(found), statistics.median(found), max(found))
            )
            cells.append(f"{middle} ({low} to {high})")
        lines.append(f"| {where} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table() -> str:
    report = read(CPU)
    rows = [row for row in report["rows"] if not row["skipped"]]
    untimed = [row for row in rows if not row.get("seconds")]
    if untimed:
        sys.exit(f"{CPU}: {len(untimed)} rows were not timed, because a result was wrong")
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"From `{CPU}`: {machine['cpu']}, {machine['threads']} threads, level "
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
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """README.md with the numbers of the reports."""
    for name, content in (("headline", headline()), ("numbers", table())):
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + "\n" + content + "\n" + end + after
    return text


def main() -> None:
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()
