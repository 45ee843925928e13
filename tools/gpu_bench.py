"""Every op on a GPU beside plain PyTorch and Triton peers.

    python tools/gpu_bench.py [--shape NAME...] [--op NAME...] [--json FILE]

For each shape (T, H, I, E, K) in bfloat16, forward and forward + backward, the median time of

  eager   a call from Python, the launches' latency included, as a user sees it
  graph   the same call replayed from a CUDA graph: what the kernels need

and the share of the limit: the bytes that must move over the copy bandwidth, or the operations over
the rate of a large square product, both measured in the same process. Peers are compared only after
their result agreed with ours. A peer that cannot be captured (it waits for the GPU) has no graph
time. `moe_mlp` starts from ids and weights, so its time holds the plan; triton_kernels starts from
logits, because it sorts while it chooses. LIGER_FUSED_MOE_AUTOTUNE=0 saves minutes of Triton's
tuning, and the report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pages
import torch
from torch import Tensor

SHAPES = {
    "qwen3": (16384, 2048, 768, 128, 8),
    "qwen3-2048": (2048, 2048, 768, 128, 8),
    "qwen3-decode": (64, 2048, 768, 128, 8),
    "mixtral": (8192, 4096, 14336, 8, 2),
    "dsv3-quarter": (4096, 7168, 2048, 64, 8),
}
COLUMNS = 128256  # of the wide softmax rows, which are the same at every shape
VLLM = "vllm (Triton)"  # forward only
TURN = 5  # timed calls in a row
Call = Callable[[Tensor], Any]


def given(
    device: str, tokens: int, hidden: int, inter: int, experts: int, top_k: int
) -> SimpleNamespace:
    """Inputs of every op at one shape, in bfloat16, that stay where they are."""
    import fastmoe_route as fr

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x, logits = random(tokens, hidden), random(tokens, experts)
    routing = fr.gate(logits, top_k, normalize=True)
    plan = fr.plan_dispatch(routing.experts, experts)
    return SimpleNamespace(
        num_experts=experts,
        top_k=top_k,
        x=x,
        logits=logits,
        # Both in the layout of nn.Linear, [E, out, in], and seen as [E, in, out].
        w_up=(random(experts, 2 * inter, hidden) / hidden**0.5).transpose(1, 2),
        w_down=(random(experts, hidden, inter) / inter**0.5).transpose(1, 2),
        routing=routing,
        plan=plan,
        rows=fr.permute(x, plan),
        asked=fr.gate(logits, min(experts, 2 * top_k), normalize=True),
        capacity=-(-tokens * top_k // experts),
        wide=random(1024 if device == "cuda" else 2, COLUMNS),
        bias=random(experts, dtype=torch.float32),
        scopes=torch.arange(tokens, device=device, dtype=torch.int32) % 4,
    )


def ops(g: SimpleNamespace) -> dict[str, tuple[Call, Tensor, float, int]]:
    """`name -> (function, its input, bytes, operations)` of every op at one shape."""
    import fastmoe_route as fr

    tokens, hidden = g.x.shape
    experts, top_k, inter = g.num_experts, g.top_k, g.w_down.shape[1]
    num_rows = tokens * top_k
    moved = 2 * hidden * (tokens + num_rows)
    pair = (g.routing.experts, g.routing.weights)
    return {
        "gate": (lambda z: fr.gate(z, top_k, normalize=True).weights, g.logits,
                 tokens * (2 * experts + 8 * top_k), 0),
        "expert_choice": (lambda z: fr.expert_choice(z, max(1, num_rows // experts)).weights,
                          g.logits, tokens * experts * 10, 0),
        "plan_dispatch": (lambda e: fr.plan_dispatch(e, experts).row_to_slot, g.routing.experts,
                          num_rows * 16, 0),
        "reroute": (lambda e: fr.reroute((e, g.asked.weights), experts, top_k, g.capacity).experts,
                    g.asked.experts, g.asked.experts.numel() * 12, 0),
        "permute": (lambda v: fr.permute(v, g.plan), g.x, moved, 0),
        "unpermute": (lambda v: fr.unpermute(v, g.plan, g.routing.weights), g.rows, moved, 0),
        "grouped_mm": (lambda v: fr.grouped_mm(v, g.w_up, g.plan.offsets), g.rows,
                       2 * (num_rows * (hidden + 2 * inter) + g.w_up.numel()),
                       4 * num_rows * hidden * inter),
        "moe_mlp": (lambda v: fr.moe_mlp(v, pair, g.w_up, g.w_down), g.x,
                    2 * (2 * tokens * hidden + g.w_up.numel() + g.w_down.numel()),
                    6 * num_rows * hidden * inter),
        "moe_mlp, clamped": (
            lambda v: fr.moe_mlp(v, pair, g.w_up, g.w_down, activation="swiglu_clamped",
                                 interleaved=True), g.x,
            2 * (2 * tokens * hidden + g.w_up.numel() + g.w_down.numel()),
            6 * num_rows * hidden * inter),
        "softmax": (lambda v: fr.softmax(v), g.wide, 4 * g.wide.numel(), 0),
        "softmax_topk": (lambda v: fr.softmax_topk(v, 8)[0], g.wide, 2 * g.wide.numel(), 0),
    }  # fmt: skip


def training_ops(g: SimpleNamespace) -> dict[str, tuple[Call, Tensor, float, int]]:
    """Forward and backward of the ops that training calls, the experts' with their weights."""
    import fastmoe_route as fr

    w_up, w_down = (w.detach().requires_grad_() for w in (g.w_up, g.w_down))
    pair = (g.routing.experts, g.routing.weights)
    steps = {
        "gate": gradient(lambda z: fr.gate(z, g.top_k, normalize=True).weights),
        "permute": gradient(lambda v: fr.permute(v, g.plan)),
        "unpermute": gradient(lambda v: fr.unpermute(v, g.plan, g.routing.weights)),
        "grouped_mm": gradient(lambda v: fr.grouped_mm(v, w_up, g.plan.offsets), w_up),
        "moe_mlp": gradient(lambda v: fr.moe_mlp(v, pair, w_up, w_down), w_up, w_down),
        "softmax": gradient(lambda v: fr.softmax(v)),
    }
    # What moves, in multiples of the forward pass: its own, then the backward's reads and writes.
    moved = {"permute": 2.0, "unpermute": 2.0, "softmax": 2.5}
    forward = ops(g)
    return {
        name: (step, forward[name][1], moved.get(name, 3) * forward[name][2], 3 * forward[name][3])
        for name, step in steps.items()
    }


def gradient(function: Call, *weights: Tensor) -> Call:
    """Forward, then backward in the input and the weights; the result is its own gradient."""

    def run(value: Tensor) -> Tensor:
        leaf = value.detach().requires_grad_()
        y = function(leaf)
        return torch.autograd.grad(y, (leaf, *weights), y.detach())[0]

    return run


def peers(g: SimpleNamespace) -> dict[str, dict[str, Call]]:
    """`op -> peer -> function of the op's input`: plain PyTorch, and Triton where installed."""
    experts, top_k, tokens = g.num_experts, g.top_k, len(g.x)
    ids, weights = g.routing.experts, g.routing.weights
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    token_of_row, flat_weights = order // top_k, weights.flatten()[order, None].to(g.x.dtype)
    ends = flat.bincount(minlength=experts).cumsum(0).to(torch.int32)

    def gate(z: Tensor) -> Tensor:
        values = z.float().softmax(-1).topk(top_k).values
        return values / values.sum(-1, keepdim=True)

    def combine(rows: Tensor, scale: Tensor = flat_weights, at: Tensor = token_of_row) -> Tensor:
        y = torch.zeros(tokens, rows.shape[1], device=rows.device, dtype=rows.dtype)
        return y.index_add_(0, at, rows * scale)

    def layer(x: Tensor, w_up: Tensor = g.w_up, w_down: Tensor = g.w_down) -> Tensor:
        slots = ids.flatten()
        by_expert = slots.argsort(stable=True)
        offs = torch.histc(slots.float(), experts, 0, experts - 1).cumsum(0).to(torch.int32)
        at = by_expert // top_k
        gate_, up = torch._grouped_mm(x[at], w_up, offs=offs).chunk(2, -1)
        rows = torch._grouped_mm(torch.nn.functional.silu(gate_) * up, w_down, offs=offs)
        return combine(rows, weights.flatten()[by_expert, None].to(x.dtype), at)

    found: dict[str, dict[str, Call]] = {
        "gate": {"torch softmax + topk": gate},
        "plan_dispatch": {"torch argsort + bincount": lambda e: (
            e.flatten().argsort(stable=True), e.flatten().bincount(minlength=experts))[0]},
        "permute": {"torch index_select": lambda v: v.index_select(0, token_of_row)},
        "unpermute": {"torch index_add": combine},
        "softmax": {"torch softmax": lambda v: v.softmax(-1)},
        "softmax_topk": {"torch softmax + topk": lambda v: v.softmax(-1).topk(8).values},
        "grouped_mm": {"torch._grouped_mm": lambda v: torch._grouped_mm(v, g.w_up, offs=ends)},
        "moe_mlp": {"torch._grouped_mm layer": layer},
    }  # fmt: skip
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        def liger(x: Tensor, w_up: Tensor = g.w_up, w_down: Tensor = g.w_down) -> Tensor:
            y: Tensor = LigerFusedMoEFunction.apply(
                x, w_up.transpose(1, 2), w_down.transpose(1, 2), ids, weights
            )
            return y

        tuned = "" if os.environ.get("LIGER_FUSED_MOE_AUTOTUNE", "1") == "1" else ", not tuned"
        found["moe_mlp"][f"liger_kernel (Triton{tuned})"] = liger
    if importlib.util.find_spec("vllm") is not None:
        from vllm.model_executor.layers.fused_moe import fused_experts

        up, down = g.w_up.transpose(1, 2), g.w_down.transpose(1, 2)
        found["moe_mlp"][VLLM] = lambda x: fused_experts(x, up, down, weights, ids)
    if importlib.util.find_spec("triton_kernels") is not None:
        found["moe_mlp, clamped"] = {"triton_kernels": triton_kernels_layer(g)}
    return found


def triton_kernels_layer(g: SimpleNamespace) -> Call:
    """OpenAI's kernels, their choice of experts included: they sort with it."""
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs
    from triton_kernels.routing import routing
    from triton_kernels.swiglu import swiglu_fn

    swiglu = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.702, 7.0), 2)

    def layer(x: Tensor) -> Tensor:
        data, gather, scatter = routing(g.logits, g.top_k)
        rows = matmul_ogs(x, g.w_up, None, data, gather_indx=gather, fused_activation=swiglu)
        y: Tensor = matmul_ogs(
            rows, g.w_down, None, data, scatter_indx=scatter, gammas=data.gate_scal
        )
        return y

    return layer


def training_peers(g: SimpleNamespace) -> dict[str, dict[str, Call]]:
    """Those of `peers` that have a gradient."""
    forward = peers(g)
    found: dict[str, dict[str, Call]] = {
        name: {peer: gradient(f) for peer, f in forward[name].items()}
        for name in ("gate", "permute", "unpermute", "softmax")
    }
    w_up, w_down = (w.detach().requires_grad_() for w in (g.w_up, g.w_down))
    found["moe_mlp"] = {
        peer: gradient(partial(function, w_up=w_up, w_down=w_down), w_up, w_down)
        for peer, function in forward["moe_mlp"].items()
        if peer != VLLM
    }
    ends = g.plan.offsets[1:]
    found["grouped_mm"] = {"torch._grouped_mm": gradient(
        lambda v: torch._grouped_mm(v, w_up, offs=ends), w_up)}  # fmt: skip
    return found


# ---- time ---------------------------------------------------------------------------------------


def seconds_of(calls: list[Callable[[], object]], device: str, repeats: int) -> list[float]:
    """Median time of each call, in turns of five: the clock that the power limit allows drifts."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(-(-repeats // TURN)):
        for call, seen in zip(calls, times, strict=True):
            call()  # the caches are as a call of this kind leaves them
            seen += turn_on_gpu(call) if device == "cuda" else turn_on_cpu(call)
    return [statistics.median(seen) for seen in times]


def turn_on_gpu(call: Callable[[], object]) -> list[float]:
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TURN)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def turn_on_cpu(call: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(TURN):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def captured(function: Callable[[], object]) -> Callable[[], object] | None:
    """A replay of the call from a CUDA graph, or None if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = function()
    except Exception:
        torch.cuda.synchronize()
        return None

    def replay(_alive: object = kept) -> None:
        graph.replay()

    return replay


def limits(device: str, size: int, repeats: int) -> tuple[float, float]:
    """Bytes copied a second, and bfloat16 operations a second of a square product."""
    source = torch.empty(4 * size * size, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 2 / seconds_of([lambda: target.copy_(source)], device, repeats)[0]
    square = source[: size * size].view(size, size)
    return copied, 2 * size**3 / seconds_of([lambda: square @ square], device, repeats)[0]


def distance(own: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to the norm of the other."""
    return float((own.float() - other.float()).norm() / other.float().norm())


def run_shape(
    device: str, shape: tuple[int, ...], is_training: bool, with_peers: bool, only: list[str],
    skip: tuple[str, ...], rates: tuple[float, float], repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one shape; prints each as it is measured."""
    g = given(device, *shape)
    bandwidth, peak = rates
    own, others = (training_ops, training_peers) if is_training else (ops, peers)
    contenders = others(g) if with_peers else {}
    rows = []
    for name, (function, value, num_bytes, flops) in own(g).items():
        if (only and name not in only) or name in skip:
            continue
        failed, calls = {}, {"ours": partial(function, value)}
        for peer, call in contenders.get(name, {}).items():
            failed[peer] = why_unlike(name, call, function, value)
            if not failed[peer]:
                calls[peer] = partial(call, value)
        times = time_calls(calls, device, repeats)
        row: dict[str, Any] = {"op": name, "backward": is_training, **times.pop("ours")}
        row["others"] = times | {peer: {"failed": why} for peer, why in failed.items() if why}
        limit = max(num_bytes / bandwidth, flops / peak)
        best = row.get("graph") or row["eager"]
        row |= {"limit": limit, "share_of_limit": limit / best}
        text = (
            f"  {name:<16}{row['eager'] * 1e6:9.1f} us, graph {best * 1e6:9.1f}, "
            f"{limit / best:4.0%} of the limit"
        )
        for peer, seen in row["others"].items():
            text += f" | {peer} " + (seen["failed"][:70] if "failed" in seen else
                f"{seen['eager'] / row['eager']:.2f}x, graph "
                f"{seen['graph'] / best if seen.get('graph') else math.nan:.2f}x")  # fmt: skip
        print(text, flush=True)
        rows.append(row)
    return rows


def why_unlike(name: str, call: Call, own: Call, value: Tensor) -> str:
    """Why a peer is not timed: its error, or how far its result is from ours; "" if it is."""
    try:
        theirs, ours = call(value), own(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(theirs, Tensor) and theirs.shape == ours.shape and name != "plan_dispatch":
        off = distance(ours, theirs)
        return "" if off < 3e-2 else f"off by {off:.1e}"
    return ""


def time_calls(
    calls: dict[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, dict[str, float | None]]:
    """`name -> {eager, graph}`: calls in turns, then, on a GPU, their replays in turns."""
    eager = zip(calls, seconds_of([*calls.values()], device, repeats), strict=True)
    found: dict[str, dict[str, float | None]] = {name: {"eager": time} for name, time in eager}
    if device == "cuda":
        replays = {name: replay for name, call in calls.items() if (replay := captured(call))}
        times = seconds_of([*replays.values()], device, repeats)
        graphs = dict(zip(replays, times, strict=True))
        for name, entry in found.items():
            entry["graph"] = graphs.get(name)
    return found


def run_bench(
    device: str,
    shapes: dict[str, tuple[int, ...]],
    *,
    with_peers: bool = True,
    only: list[str] | None = None,
    repeats: int = 30,
    size: int = 8192,
    modes: tuple[bool, ...] = (False, True),
    save: Callable[[dict[str, Any]], object] = lambda report: None,
) -> dict[str, Any]:
    """The report: limits of this GPU, then rows of every shape, saved as it grows."""
    bandwidth, peak = limits(device, size, repeats)
    print(f"  measured: {bandwidth / 1e9:.0f} GB/s copied, {peak / 1e12:.1f} TFLOP/s in bfloat16")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "gemm": os.environ.get("FASTMOE_ROUTE_CUDA_GEMM", "default"),
        "bandwidth": bandwidth,
        "peak": peak,
        "shapes": {},
    }
    for label, shape in shapes.items():
        report["shapes"][label] = entry = {"T, H, I, E, K": shape, "rows": []}
        for is_training in modes:
            print(f"  {label}, T, H, I, E, K = {shape}{', with backward' if is_training else ''}")
            skip = () if len(report["shapes"]) == 1 else ("softmax", "softmax_topk")
            entry["rows"] += run_shape(device, shape, is_training, with_peers, only or [],
                                       skip, (bandwidth, peak), repeats)  # fmt: skip
        save(report)
    return report


# ---- what is made of a report --------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"{report['device']}, torch {report['torch']}, bfloat16: {report['bandwidth'] / 1e12:.2f} "
        f"TB/s copied, {report['peak'] / 1e12:.0f} TFLOP/s in a square product.",
    ]
    for label, entry in report["shapes"].items():
        sizes = dict(zip("THIEK", entry["T, H, I, E, K"], strict=True))
        lines += [
            "",
            f"**{label}**: " + ", ".join(f"{name} = {size}" for name, size in sizes.items()),
            "",
            "| op | called | replayed | of limit | times faster than: called, replayed |",
            "|---|---|---|---|---|",
        ]
        for row in entry["rows"]:
            peers = [
                f"{peer} {seen['eager'] / row['eager']:.2f}, "
                + (f"{seen['graph'] / row['graph']:.2f}" if seen.get("graph") else "-")
                for peer, seen in row["others"].items()
                if "eager" in seen
            ]
            name = f"`{row['op']}`{' and backward' if row['backward'] else ''}"
            graph = f"{row['graph'] * 1e6:,.0f} us" if row.get("graph") else "-"
            lines.append(
                f"| {name} | {row['eager'] * 1e6:,.0f} us | {graph} | "
                f"{row['share_of_limit']:.0%} | {'; '.join(peers)} |"
            )
    return "\n".join(lines)


def write(report: dict[str, Any], path: Path | None) -> None:
    """The report as JSON, if it goes anywhere."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


def plot(report: dict[str, Any], path: Path) -> None:
    """Left the share of the limit of every op, right how much faster it is than each peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {shape: f"C{i}" for i, shape in enumerate(report["shapes"])}
    shares, ratios = [], []
    for shape, entry in report["shapes"].items():
        for row in entry["rows"]:
            label = f"{row['op']}{', backward' if row['backward'] else ''}  ({shape})"
            shares.append((label, row["share_of_limit"], colours[shape]))
            ratios += [
                (f"{label} : {peer}", seen["eager"] / row["eager"], colours[shape])
                for peer, seen in row["others"].items()
                if "eager" in seen
            ]
    height = 0.19 * max(len(shares), len(ratios)) + 1.5
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, height), layout="constrained")
    for axis, bars in ((left, shares), (right, ratios)):
        labels, values, shades = zip(*bars, strict=True)
        axis.barh(labels, values, color=shades)
        axis.invert_yaxis()
        axis.margins(y=0.01)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.tick_params(labelsize=7)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("share of the limit: copy bandwidth, or rate of a square product")
    right.set_xlabel("times faster than the peer, called from Python")
    figure.suptitle(f"{report['device']}, bfloat16, torch {report['torch']}")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a figure of it (matplotlib)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page that has a place for it")
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="take this report instead of measuring"
    )
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--op", nargs="*", help="only these ops")
    parser.add_argument("--no-peers", action="store_true", help="our own times only")
    parser.add_argument("--mode", nargs="*", choices=("forward", "backward"),
                        default=["forward", "backward"])  # fmt: skip
    options = parser.parse_args()
    if options.report:
        report = json.loads(options.report.read_text())
    elif torch.cuda.is_available():
        shapes = {name: SHAPES[name] for name in options.shape}
        modes = tuple(mode == "backward" for mode in options.mode)
        report = run_bench(
            "cuda", shapes, with_peers=not options.no_peers, only=options.op, modes=modes,
            save=lambda report: write(report, options.json),
        )  # fmt: skip
    else:
        print(f"gpu_bench needs a CUDA GPU, and torch {torch.__version__} sees none here.",
              file=sys.stderr)  # fmt: skip
        return 2
    if options.plot:
        plot(report, options.plot)
    if options.page:
        text = options.page.read_text()
        options.page.write_text(pages.fill(text, "numbers", table(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
