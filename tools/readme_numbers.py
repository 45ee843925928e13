"""Fills the place for numbers in README.md from recorded reports of the bench.

    python tools/readme_numbers.py bench/results/NAME.json ...

One table per report: a line for every whole layer that was timed, and the median over the rows of
each op. Nothing else in README.md is touched; a report with a wrong row is refused.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from fastmoe_route.bench.report import duration

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- numbers:begin -->\n", "<!-- numbers:end -->"


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


def section(path: Path) -> str:
    report = json.loads(path.read_text())
    rows = [row for row in report["rows"] if not row["skipped"]]
    untimed = [row for row in rows if not row.get("seconds")]
    if untimed:
        sys.exit(f"{path}: {len(untimed)} rows were not timed, because a result was wrong")
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"From `{path.as_posix()}`: {machine['cpu']}, {machine['threads']} threads, level "
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


def main() -> None:
    sections = [section(Path(name)) for name in sys.argv[1:]]
    if not sections:
        sys.exit(__doc__)
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + "\n" + "\n".join(sections) + "\n" + END + after)


if __name__ == "__main__":
    main()
