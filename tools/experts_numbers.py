"""Fills the places for numbers in docs/experts.md from recorded reports of the bench.

    python tools/experts_numbers.py [bench/results/NAME.json ...]

Rows of `moe_mlp` that were timed beside the kernels of others (`bench --peers`) go to the first
table, the other ones to the second, one part for each processor. Without names, from the reports
that the page names already.
Nothing else in the page is touched; a report with a wrong row is refused.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pages
from fastmoe_route.bench.peers import MODULES
from fastmoe_route.bench.report import duration

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "experts.md"
PEERS = tuple(MODULES)
Row = dict[str, Any]


def key(row: Row) -> tuple[int, int, str, int, str]:
    """Forward first, then layers by the sizes of their experts, dtypes, tokens."""
    shape = row["shape"]
    training = int(row["pass"] == "training")
    return training, shape["num_experts"], shape["name"], -int(row["dtype"][-2:]), row["tokens"]


def ratio(row: Row, name: str) -> str:
    return f"{row['ratios'][name]['median']:.2f}" if name in row["ratios"] else "-"


def peer_line(row: Row) -> str:
    time = duration(row["seconds"]["fastmoe_route"]["median"])
    limit = f"{row['limit']['share']:.0%} {row['limit']['bound_by']}"
    names = ("torch grouped_mm", *PEERS)
    cells = (row["shape"]["name"], str(row["tokens"]), row["dtype"], time)
    return "| " + " | ".join((*cells, *(ratio(row, name) for name in names), limit)) + " |"


def standing(rows: list[Row]) -> str:
    """In how many cells a peer is faster, and by how much."""
    fastest = []
    for row in rows:
        name = min((row["ratios"][name]["median"], name) for name in PEERS if name in row["ratios"])
        fastest.append((*name, row))
    lost = [(1 - value, name, row) for value, name, row in fastest if value < 1]
    if not lost:
        return f"Ours is the fastest in all {len(rows)} cells."
    middle = statistics.median(share for share, _, _ in lost)
    share, name, row = max(lost, key=lambda entry: entry[0])
    where = f"{row['shape']['name']}, T = {row['tokens']}, {row['dtype']}"
    if len(lost) == 1:
        return f"Of {len(rows)} cells, one is lost: {name} takes {share:.0%} less time ({where})."
    return (
        f"Of {len(rows)} cells, {len(lost)} are lost to a peer: it takes {middle:.0%} less time in "
        f"the median,\nand {share:.0%} at most ({name}: {where})."
    )


def peer_table(rows: list[Row]) -> str:
    heads = ("layer", "T", "dtype", "time", "torch `grouped_mm`", *PEERS, "of limit")
    table = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*table, *(peer_line(row) for row in rows), "", standing(rows)])


def layer_table(rows: list[Row]) -> str:
    """One line per layer, tokens and pass; float32 and bfloat16 beside each other."""
    lines: dict[tuple[int, str, int, str], dict[str, Row]] = {}
    for row in rows:
        passes = "forward and backward" if row["pass"] == "training" else "forward"
        place = (key(row)[0], row["shape"]["name"], row["tokens"], passes)
        lines.setdefault(place, {})[row["dtype"]] = row
    heads = ("layer", "T", "pass", "float32", "of limit", "bfloat16", "of limit")
    table = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (_, name, tokens, passes), by_dtype in lines.items():
        cells = [name, str(tokens), passes]
        for dtype in ("float32", "bfloat16"):
            row = by_dtype.get(dtype)
            cells.append(ratio(row, row["fastest_baseline"]) if row else "-")
            cells.append(f"{row['limit']['share']:.0%}" if row else "-")
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table)


def source(paths: list[Path], reports: list[Row]) -> str:
    """Where and when the numbers come from."""
    machine, versions = reports[0]["machine"], reports[0]["versions"]
    days = sorted({report["created"][:10] for report in reports})
    files = ",\n".join(f"`bench/results/{path.name}`" for path in paths)
    return (
        f"From\n{files}:\n{machine['cpu']}, {machine['threads']} threads, "
        f"level {machine['level']}, torch {versions['torch']}, {' and '.join(days)}."
    )


def filled(text: str, paths: list[Path] | None = None) -> str:
    """The page with the numbers of these reports, or of those it names already."""
    tables = {"peers": peer_table, "layers": layer_table}
    # Of each table, a part for every processor.
    parts: dict[str, dict[str, tuple[list[Path], list[Row], list[Row]]]] = {
        name: {} for name in tables
    }
    for path in paths or named(text):
        report = json.loads(path.read_text())
        for row in report["rows"]:
            if row["op"] != "moe_mlp" or row["skipped"]:
                continue
            if not row.get("seconds"):
                sys.exit(f"{path}: a row was not timed, because its result was wrong")
            name = "peers" if set(PEERS) & set(row["ratios"]) else "layers"
            files, reports, rows = parts[name].setdefault(report["machine"]["cpu"], ([], [], []))
            if path not in files:
                files.append(path)
                reports.append(report)
            rows.append(row)
    for name, table in tables.items():
        content = [
            f"{source(files, reports)}\n\n{table(sorted(rows, key=key))}"
            for files, reports, rows in parts[name].values()
        ]
        if content:
            text = pages.fill(text, name, "\n\n".join(content))
    return text


def named(text: str) -> list[Path]:
    """The reports in the places that are filled here, each once."""
    places = re.findall(r"<!-- (\w+):begin -->(.*?)<!-- \1:end -->", text, re.S)
    names = re.findall(r"`(bench/results/[^`]+)`", "".join(content for _, content in places))
    return [ROOT / name for name in dict.fromkeys(names)]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), [Path(name) for name in sys.argv[1:]]))
