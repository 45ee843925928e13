"""Trains the small language model of train_moe_lm.py once with every router, and compares them.

All runs start from the same weights and see the same batches of real English; only the router
differs, each as published with its own losses, but for a fixed number of experts per token above
`--top-k`, which is cut to that. Written to the folder `--out`: `results.json`, `table.md` and
`compare_routers.png` with loss, load balance over time, experts per token and tokens per second. A
run that was cut off goes on where it stopped, router by router.

    python examples/compare_routers.py                       # every router that suits: 6 minutes
    python examples/compare_routers.py switch deepseek_v3    # some of them
    python examples/compare_routers.py --steps 2000 --hidden 128 --experts 32

Losses of routers that see later tokens or other sequences (marked *) are optimistic: no decoder
could reach them. They run with `--all`.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fastmoe_route as fr
import torch
import train_moe_lm as lm
from fastmoe_route.bench.machine import cpu_name
from fastmoe_route.methods import Method, find, methods
from torch import Tensor, nn

BASE = "topk_softmax"
GIVEN = {"token_ids", "sequence_ids", "scope_ids", "positions", "experts"}


@dataclass
class Wire:
    """What the layers of one forward pass have in common."""

    tokens: Tensor | None = None
    state: Tensor | None = None
    named: dict[str, Any] = field(default_factory=dict)

    def start(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward hook of the model: the ids of the batch; no state before the first layer."""
        del model
        tokens = inputs[0]
        batch, context = tokens.shape
        sequences = torch.arange(batch).repeat_interleave(context)
        self.state = None
        self.named = {
            "token_ids": tokens.flatten(),
            "sequence_ids": sequences,
            "num_sequences": batch,
            "scope_ids": sequences.int(),
            "num_scopes": batch,
            "positions": torch.arange(context).repeat(batch),
        }


class RoutedExperts(nn.Module):
    """The experts of a layer of train_moe_lm.py, with a router of the package."""

    def __init__(self, experts: lm.Experts, router: fr.routers.Router, wire: Wire) -> None:
        """Takes the weights of `experts`; their own router goes."""
        super().__init__()
        self.router, self.wire = router, wire
        self.w_up, self.w_down = experts.w_up, experts.w_down
        self.register_buffer("demand", torch.zeros(router.num_experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output of `x` [T, H] and the router's losses."""
        experts = fr.routers.Experts(self.w_up.transpose(1, 2), self.w_down.transpose(1, 2))
        routed = self.router(x, state=self.wire.state, experts=experts, **self.wire.named)
        self.wire.state = routed.state
        self.demand = routed.routing.demand.float()
        return self.router.mix(x, routed, experts), routed.aux_loss


def suits(method: Method, everything: bool) -> bool:
    """Whether the model can give the router what it needs, and a decoder could use it."""
    given = set(method.needs) <= GIVEN
    return given and (everything or (method.decode == "ok" and method.invariance != "B"))


def build(method: Method, config: lm.Config) -> fr.routers.Router:
    """The router with its own defaults; a residual connection is in the model already."""
    parameters = inspect.signature(method.target.__init__).parameters
    arguments: dict[str, Any] = {}
    if "identity" in parameters:
        arguments["identity"] = False
    if "vocab_size" in parameters:
        arguments["vocab_size"] = config.vocabulary
    default = parameters["top_k"].default if "top_k" in parameters else None
    if isinstance(default, int) and default > config.top_k:
        arguments["top_k"] = config.top_k
    return fr.routers.build(method.name, config.hidden, config.experts, **arguments)


def route(model: lm.Model, method: Method, config: lm.Config, seed: int) -> lm.Model:
    """A copy of the model whose layers take this router."""
    model, wire = copy.deepcopy(model), Wire()
    torch.manual_seed(seed)
    for block in model.blocks:
        block.experts = RoutedExperts(block.experts, build(method, config), wire)
    model.register_forward_pre_hook(wire.start)
    return model


def violation(load: Tensor) -> float:
    """`(largest - mean) / mean` of the experts' slots, mean over layers: 0 is perfect balance."""
    return float((load.amax(1) - 1).clamp(min=0).mean())


def train(
    model: lm.Model, name: str, config: lm.Config, options: argparse.Namespace, bar: lm.Progress
) -> dict[str, Any]:
    """One training: what happened at every step, and the loss on unseen text."""
    steps, rate = options.steps, options.rate
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    run = lm.Run(name, model, optimizer)
    source, held_out = (
        lm.batches(text, config, options.seed + i) for i, text in enumerate(lm.read_text())
    )
    windows = [next(held_out) for _ in range(4)]
    balance, per_token = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        # The model returns the mean of the layers' losses; their sum is what a router asks for.
        run.step(next(source), float(config.layers))
        for block in model.blocks:
            if hasattr(block.experts.router, "update"):  # biases and centres move between batches
                block.experts.router.update()
        demand = torch.stack([block.experts.demand for block in model.blocks])
        mean = demand.mean(1, keepdim=True).clamp(min=1e-9)
        balance.append(violation(demand / mean))
        per_token.append(float(demand.sum()) / (len(demand) * config.batch * config.context))
        bar.advance()
    run.validate(windows, steps)
    return {
        "train_loss": run.train_loss,
        "valid_loss": run.valid_loss[steps],
        "violation": balance,
        "experts_per_token": per_token,
        "tokens_per_second": run.tokens_per_second(config),
    }


def compare(
    chosen: list[Method], config: lm.Config, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Trains with every router that has no result of this setting yet."""
    path = options.out / "results.json"
    setting = {**asdict(config), "steps": options.steps, "rate": options.rate, "seed": options.seed}
    stored = json.loads(path.read_text()) if path.exists() else {}
    results = stored["results"] if stored.get("setting") == setting else {}
    todo = [method for method in chosen if method.name not in results]
    print(f"{len(chosen)} routers, {len(chosen) - len(todo)} of them done before")
    torch.manual_seed(options.seed)
    model = lm.Model(config)
    bar = lm.Progress(len(todo) * options.steps)
    try:
        for method in todo:
            start = time.perf_counter()
            try:
                routed = route(model, method, config, options.seed)
                found = train(routed, method.name, config, options, bar)
                line = f"loss {found['valid_loss']:.4f}, {time.perf_counter() - start:.0f} s"
            except (ValueError, RuntimeError) as error:
                found = {"error": str(error).splitlines()[0]}
                line = f"left out: {found['error']}"
            results[method.name] = found
            bar.print(f"{method.row:>4} {method.name:<24} {line}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"setting": setting, "results": results}) + "\n")
    finally:
        bar.close()
    return {method.name: results[method.name] for method in chosen}


def summary(found: dict[str, Any]) -> tuple[float, float, float, float]:
    """Loss on unseen text, violation and experts per token of the last quarter, tokens/s."""
    last = slice(-max(1, len(found["violation"]) // 4), None)
    return (
        found["valid_loss"],
        statistics.fmean(found["violation"][last]),
        statistics.fmean(found["experts_per_token"][last]),
        found["tokens_per_second"],
    )


def optimistic(method: Method) -> bool:
    """Whether the router sees what a decoder could not."""
    return not suits(method, everything=False)


def described(config: lm.Config, options: argparse.Namespace) -> str:
    """What was run, in one line."""
    return (
        f"{options.steps} steps of {config.batch * config.context} bytes; {config.layers} layers, "
        f"hidden size {config.hidden}, {config.experts} experts of width {config.expert_width}, at "
        f"most {config.top_k} per token where the number is fixed; learning rate {options.rate}, "
        f"seed {options.seed}, {options.threads} threads, torch {torch.__version__}, {cpu_name()}."
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results by loss, best first, in Markdown."""
    done = {name: summary(found) for name, found in results.items() if "error" not in found}
    lines = [
        "| router | row | loss | MaxVio | experts per token | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, (loss, vio, k, speed) in sorted(done.items(), key=lambda item: item[1][0]):
        method = find(name)
        star = "*" if optimistic(method) else ""
        lines.append(
            f"| `{name}`{star} | {method.row} | {loss:.4f} | {vio:.2f} | {k:.2f} | {speed:,.0f} |"
        )
    for name, found in results.items():
        if "error" in found:
            lines.append(f"| `{name}` | {find(name).row} | left out: {found['error']} | | | |")
    return "\n".join(lines) + "\n"


def smooth(values: list[float], width: int) -> list[float]:
    """Means over a sliding window."""
    sums = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    width = min(width, len(values))
    return ((sums[width:] - sums[:-width]) / width).tolist()


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Curves of loss and balance above, one line for every router below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = {name: found for name, found in results.items() if "error" not in found}
    order = sorted(done, key=lambda name: done[name]["valid_loss"])
    marked = list(dict.fromkeys([name for name in (BASE, *order[:3], order[-1]) if name in done]))
    palette = ("#222255", "#228833", "#ee8866", "#aa3377", "#999933")
    colors = dict(zip(marked, palette, strict=False))
    figure = plt.figure(figsize=(12, 4.2 + 0.19 * len(order)), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(3.6, max(2.0, 0.19 * len(order))))
    loss, balance = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    loss.set_title("training loss, nats per byte")
    draw_curves(loss, {name: done[name]["train_loss"] for name in order}, colors)
    skipped = len(done[order[0]]["train_loss"]) // 5
    settled = [value for name in order for value in done[name]["train_loss"][skipped:]]
    loss.set_ylim(min(settled) - 0.05, max(settled) + 0.05)  # the fall of the first steps is off it
    loss.legend(frameon=False, fontsize=8)
    balance.set_title("load: (largest - mean) / mean")
    draw_curves(balance, {name: done[name]["violation"] for name in order}, colors)
    balance.set_yscale("symlog", linthresh=0.1)
    name_violations(balance.yaxis)
    draw_summaries(figure, grid, done, order, colors)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def name_violations(axis: Any) -> None:
    """Plain numbers on the axis, a few to each power of ten."""
    from matplotlib.ticker import FixedLocator

    axis.set_major_locator(FixedLocator([0, 0.1, 0.3, 1, 3, 10]))
    axis.set_major_formatter("{x:g}")


def draw_curves(axes: Any, curves: dict[str, list[float]], colors: dict[str, str]) -> None:
    """One line per router by the step, smoothed; those with a colour on top."""
    for name in sorted(curves, key=lambda name: name in colors):
        values = smooth(curves[name], max(1, len(curves[name]) // 20))
        if name in colors:
            axes.plot(values, color=colors[name], linewidth=1.8, zorder=3, label=name)
        else:
            axes.plot(values, color="#cccccc", linewidth=0.7, zorder=2)
    axes.set_xlabel("step")
    axes.grid(color="#eeeeee", linewidth=0.6)


def draw_summaries(
    figure: Any, grid: Any, done: dict[str, Any], order: list[str], colors: dict[str, str]
) -> None:
    """The four numbers of `summary`, a line per router."""
    titles = ("loss on unseen text", "MaxVio, last quarter", "experts per token", "tokens/s")
    columns = list(zip(*(summary(done[name]) for name in order), strict=True))
    spans = (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6))
    names = [name + ("*" if optimistic(find(name)) else "") for name in order]
    paint = [colors.get(name, "#88aacc") for name in order]
    for column, (title, span) in enumerate(zip(titles, spans, strict=True)):
        axes = figure.add_subplot(grid[1, span])
        if column == 0:  # differences of hundredths: a bar would have to start from 0
            axes.scatter(columns[0], range(len(order)), color=paint, s=22, zorder=2)
            axes.grid(color="#eeeeee", linewidth=0.6)
        else:
            axes.barh(range(len(order)), columns[column], color=paint, height=0.7)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_yticks(range(len(order)), names if column == 0 else [], fontsize=7)
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        if column == 1:
            axes.set_xscale("symlog", linthresh=0.1)
            name_violations(axes.xaxis)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Parses the arguments, trains, writes table and plot."""
    small = lm.Config(
        hidden=64, layers=2, heads=4, experts=8, top_k=2, expert_width=64, context=64, batch=8
    )
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("routers", nargs="*", help="names of `python -m fastmoe_route routers`; none: what suits")
    add("--all", action="store_true", help="also routers that no decoder could use")
    add("--steps", type=int, default=300, help="training steps of each run")
    add("--out", type=Path, default=Path("demo/compare_routers"), help="folder for the results")
    for name in sorted(asdict(small).keys() - {"vocabulary"}):
        flag = "--" + name.replace("_", "-")
        what = f"{name.replace('_', ' ')} of the model"
        add(flag, type=int, default=getattr(small, name), help=what)
    add("--rate", type=float, default=3e-3, help="learning rate")
    add("--seed", type=int, default=0, help="seed of weights and batches")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add("--no-plot", action="store_true", help="write no plot")
    options = parser.parse_args(arguments)
    for name in ("steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    try:
        chosen = [find(name) for name in options.routers]
    except ValueError as error:
        parser.error(str(error))
    chosen = chosen or [m for m in methods("router") if suits(m, options.all)]
    config = lm.Config(
        **{key: getattr(options, key, value) for key, value in asdict(small).items()}
    )
    results = compare(chosen, config, options)
    text = described(config, options) + "\n\n" + table(results)
    (options.out / "table.md").write_text(text)
    print("\n" + text)
    if not options.no_plot and any("error" not in found for found in results.values()):
        plot(results, options.out / "compare_routers.png")
    print(f"written: {options.out}")
    return results


if __name__ == "__main__":
    main()
