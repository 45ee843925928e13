"""The figure of a bench report: how much faster than plain PyTorch, and how close to the limit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

# One colour per op family; hatching marks training.
_COLOURS = {
    "softmax": "#4477aa",
    "softmax_topk": "#66ccee",
    "gate": "#228833",
    "plan_dispatch": "#aaaa33",
    "permute": "#ccbb44",
    "unpermute": "#ee8866",
    "grouped_mm": "#ee6677",
    "moe_mlp": "#aa3377",
    "layer": "#553388",
}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def require_matplotlib() -> None:
    """Raises a friendly error when the figure could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("bench: --plot needs matplotlib: pip install 'fastmoe-route[bench]'")


def formats() -> list[str]:
    """The endings of file names that matplotlib writes."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(f".{ending}" for ending in FigureCanvasBase.get_supported_filetypes())


def _label(row: dict[str, Any]) -> str:
    passes = " train" if row["pass"] == "training" else ""
    name = row["shape"]["name"]
    return f"{row['op']}  {name}  T={row['tokens']}  {_DTYPES[row['dtype']]}{passes}"


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Draws every timed row of a report into an image file; the suffix picks the format."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if "ratios" in row]
    if not rows:
        raise ValueError("plot: the report must have timed rows, got none")
    height = max(3.0, 0.27 * len(rows) + 1.7)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, height), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    bars: dict[str, Any] = {
        "color": [_COLOURS[row["op"]] for row in rows],
        "hatch": ["////" if row["pass"] == "training" else "" for row in rows],
        "edgecolor": "white",
        "linewidth": 0.5,
        "height": 0.78,
    }
    _draw_speed(left, rows, bars)
    _draw_shares(right, rows, bars)
    left.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    for axes in (left, right):
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(_title(report), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_speed(axes: Any, rows: list[dict[str, Any]], bars: dict[str, Any]) -> None:
    """How much faster than the fastest baseline, with the spread of the turns."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positions = range(len(rows))
    ratios = [row["ratios"][row["fastest_baseline"]] for row in rows]
    medians = [ratio["median"] for ratio in ratios]
    spread = [
        [ratio["median"] - ratio["p10"] for ratio in ratios],
        [ratio["p90"] - ratio["median"] for ratio in ratios],
    ]
    axes.barh(positions, [median - 1 for median in medians], left=1, **bars)
    axes.errorbar(
        medians, positions, xerr=spread, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2
    )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    low, high = min([1.0, *(r["p10"] for r in ratios)]), max([2.0, *(r["p90"] for r in ratios)])
    axes.set_xlim(low / 1.15, high * 1.9)
    between = (1.0, 1.25, 1.5, 1.75) if high < 4 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=between))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 3):,g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for position, ratio in enumerate(ratios):
        _note(axes, f"{ratio['median']:,.2f}x", max(ratio["p90"], 1.0), position)
    axes.set_yticks(positions, [_label(row) for row in rows], fontsize=8)
    axes.set_title("Speed beside the fastest other contender (median, p10 to p90)", fontsize=10)


def _draw_shares(axes: Any, rows: list[dict[str, Any]], bars: dict[str, Any]) -> None:
    """How close to the limit that binds."""
    from matplotlib.ticker import PercentFormatter

    shares = [row["limit"]["share"] for row in rows]
    axes.barh(range(len(rows)), shares, **bars)
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    for position, (row, share) in enumerate(zip(rows, shares, strict=True)):
        _note(axes, f"{share:.0%} {row['limit']['bound_by']}", share, position)
    axes.set_xlim(0, 1.3 * max(1.0, *shares))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Share of this machine's measured limit", fontsize=10)


def _note(axes: Any, text: str, end: float, position: int) -> None:
    """A bar's number, just past its end."""
    axes.annotate(
        text,
        (end, position),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def _title(report: dict[str, Any]) -> str:
    """What ran where, and the limits."""
    machine, limits, versions = report["machine"], report["limits"], report["versions"]
    memory = max(limits["read_bytes_per_second"], limits["copy_bytes_per_second"])
    return (
        f"fastmoe_route {versions['fastmoe_route']} and torch {versions['torch']} on "
        f"{machine['cpu']}, {machine['threads']} threads, {machine['level']}\n"
        f"limits: fp32 {limits['peak_flops']['float32'] / 1e9:,.0f} and bf16 "
        f"{limits['peak_flops']['bfloat16'] / 1e9:,.0f} GFLOP/s, memory {memory / 1e9:.0f} GB/s; "
        f"hatched: forward and backward"
    )
