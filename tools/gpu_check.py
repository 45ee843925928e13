"""Everything a machine with a GPU can tell about the package, in one call: `make gpu-check`.

    python tools/gpu_check.py [--quick] [--json FILE] [--rehearse]

In this order, each part even if one before it failed:

  dispatcher  the CUDA library is loaded and every op has a CUDA kernel
  suite       the tests of the ops, whose CPU tensors take a trip to the GPU (tests/cuda_backend.py)
  sanitizer   a part of them under compute-sanitizer (memcheck, racecheck), where it is installed
  graphs      every op, its other kernels and its gradients, captured in a CUDA graph and replayed
              on new inputs
  products    kernels for this GPU alone (FASTMOE_ROUTE_CUDA_GEMM=native) against the portable ones
  bench       every op beside plain PyTorch and installed peers, with the share of the copy
              bandwidth and of the matmul peak measured in the same process

The exit code is 0 if all passed, 1 if something failed, 2 if there is no GPU to ask. `--rehearse`
runs what can run on the CPU, to test this file; it shows nothing about CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SUITE = [
    f"tests/test_{name}.py"
    for name in ("gate", "plan_dispatch", "permute", "grouped_mm", "moe_mlp", "up_projection",
                 "softmax", "softmax_topk", "expert_choice", "reroute", "device_rules",
                 "gate_contract", "gate_regressions", "dispatch_regressions", "expert_regressions",
                 "expert_extremes", "overflow")
]  # fmt: skip
# Wrong ids and offsets, sizes off every tile, padding.
SANITIZED = ["tests/test_device_rules.py", "tests/test_moe_mlp.py", "tests/test_permute.py",
             "-k", "device_rules or sizes or holes or padding"]  # fmt: skip
HOST_OPS = {"assign_balanced", "machine_read"}  # without a CUDA kernel
NO_GPU = """\
gpu-check needs a CUDA GPU, and torch sees none here (torch {torch}, CUDA {cuda}).
Run it where there is an NVIDIA GPU of compute capability 8.0 or later, its driver, and a CUDA build
of torch.
Nothing was checked."""


def find_no_gpu() -> str | None:
    """What is missing, or None."""
    if torch.cuda.is_available():
        return None
    return NO_GPU.format(torch=torch.__version__, cuda=torch.version.cuda or "none")


# ---- the ops, as functions of one input ----------------------------------------------------------


def given(
    device: str, tokens: int, hidden: int, inter: int, experts: int, top_k: int
) -> SimpleNamespace:
    """Inputs of every op at one shape, in bfloat16, that stay where they are."""
    import fastmoe_route as fr

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    x, logits = random(tokens, hidden), random(tokens, experts)
    routing = fr.gate(logits, top_k, normalize=True)
    plan = fr.plan_dispatch(routing.experts, experts)
    return SimpleNamespace(
        x=x,
        logits=logits,
        w_up=random(experts, hidden, 2 * inter) / 32,
        w_down=random(experts, inter, hidden) / 32,
        routing=routing,
        plan=plan,
        rows=fr.permute(x, plan),
        asked=fr.gate(logits, 2 * top_k, normalize=True),
        capacity=-(-tokens * top_k // experts),
        wide=random(8, 128256),
        bias=random(experts, dtype=torch.float32),
        scopes=torch.arange(tokens, device=device, dtype=torch.int32) % 4,
    )


def ops(
    device: str, tokens: int, hidden: int, inter: int, experts: int, top_k: int
) -> dict[str, Any]:
    """`name -> (function, its input, bytes, flops)` of every op at one shape."""
    import fastmoe_route as fr

    g = given(device, tokens, hidden, inter, experts, top_k)
    num_rows = tokens * top_k
    moved = 2 * hidden * (tokens + num_rows)
    return {
        "gate": (lambda z: fr.gate(z, top_k, normalize=True).weights, g.logits,
                 tokens * (2 * experts + 8 * top_k), 0),
        "expert_choice": (lambda z: fr.expert_choice(z, max(1, num_rows // experts)).weights,
                          g.logits, tokens * experts * 10, 0),
        "plan_dispatch": (lambda e: fr.plan_dispatch(e, experts).row_to_slot, g.routing.experts,
                          num_rows * 16, 0),
        "reroute": (lambda e: fr.reroute((e, g.asked.weights), experts, top_k, g.capacity).experts,
                    g.asked.experts, tokens * 2 * top_k * 12, 0),
        "permute": (lambda v: fr.permute(v, g.plan), g.x, moved, 0),
        "unpermute": (lambda v: fr.unpermute(v, g.plan, g.routing.weights), g.rows, moved, 0),
        "grouped_mm": (lambda v: fr.grouped_mm(v, g.w_up, g.plan.offsets), g.rows,
                       2 * (num_rows * (hidden + 2 * inter) + g.w_up.numel()),
                       4 * num_rows * hidden * inter),
        "moe_mlp": (lambda v: fr.moe_mlp(v, g.routing, g.w_up, g.w_down, plan=g.plan), g.x,
                    2 * (2 * tokens * hidden + g.w_up.numel() + g.w_down.numel()),
                    6 * num_rows * hidden * inter),
        "softmax": (lambda v: fr.softmax(v), g.wide, 4 * g.wide.numel(), 0),
        "softmax_topk": (lambda v: fr.softmax_topk(v, 8)[0], g.wide, 2 * g.wide.numel(), 0),
    }  # fmt: skip


def further(
    device: str, tokens: int, hidden: int, inter: int, experts: int, top_k: int
) -> dict[str, Any]:
    """`name -> (function, its input)`: other kernels of the ops, and gradients of other inputs."""
    import fastmoe_route as fr

    g = given(device, tokens, hidden, inter, experts, top_k)
    grouped = {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"}

    def statistics(z: Tensor) -> Tensor:
        routing = fr.gate(z, top_k, stats=True, keep_scores=True)
        parts = (routing.weights, routing.score_sum, routing.logsumexp, routing.scores)
        return torch.cat([part.flatten() for part in parts])

    def planned(**options: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        limited = {"capacity": max(1, g.capacity // 2), **options}
        return lambda e: fr.plan_dispatch(e, experts, **limited).row_to_slot, g.routing.experts

    return {
        "gate, statistics": (statistics, g.logits),
        "gate, bias and groups": (
            lambda z: fr.gate(z, 2, score="sigmoid", bias=g.bias, **grouped).weights, g.logits),
        "plan_dispatch, by position": planned(),
        "plan_dispatch, by score": planned(drop_policy="score", weights=g.routing.weights),
        "plan_dispatch, scopes": planned(scope_ids=g.scopes, num_scopes=4),
        "plan_dispatch, max_rows": planned(max_rows=tokens),
        "unpermute, weights": (lambda w: fr.unpermute(g.rows, g.plan, w), g.routing.weights),
        "grouped_mm, weights": (lambda w: fr.grouped_mm(g.rows, w, g.plan.offsets), g.w_up),
        "moe_mlp, w_up": (
            lambda w: fr.moe_mlp(g.x, g.routing, w, g.w_down, plan=g.plan), g.w_up),
        "moe_mlp, w_down": (
            lambda w: fr.moe_mlp(g.x, g.routing, g.w_up, w, plan=g.plan), g.w_down),
        "moe_mlp, weights": (
            lambda w: fr.moe_mlp(g.x, (g.routing.experts, w), g.w_up, g.w_down, plan=g.plan),
            g.routing.weights),
        "softmax, short rows": (lambda v: fr.softmax(v), g.logits),
        "softmax, three_pass": (lambda v: fr.softmax(v, method="three_pass"), g.wide),
        "transport": (lambda z: fr.transport(z, "sinkhorn", iters=3), g.logits.float()),
    }  # fmt: skip


def baselines(
    device: str, tokens: int, hidden: int, inter: int, experts: int, top_k: int
) -> dict[str, Any]:
    """`(op, contender) -> function of the op's input`: plain PyTorch and installed peers."""
    generator = torch.Generator(device).manual_seed(1)
    w_up = (
        torch.randn(experts, hidden, 2 * inter, generator=generator, device=device).bfloat16() / 32
    )
    w_down = torch.randn(experts, inter, hidden, generator=generator, device=device).bfloat16() / 32
    chosen = torch.rand(tokens, experts, generator=generator, device=device).topk(top_k).indices
    weights = torch.full((tokens, top_k), 1.0 / top_k, device=device)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    token_of_row = order // top_k
    ends = flat.bincount(minlength=experts).cumsum(0).to(torch.int32)

    def gate(z: Tensor) -> Tensor:
        values = z.float().softmax(-1).topk(top_k).values
        return values / values.sum(-1, keepdim=True)

    def combine(rows: Tensor) -> Tensor:
        scaled = rows * weights.flatten()[order, None].to(rows.dtype)
        return torch.zeros(tokens, hidden, device=device, dtype=rows.dtype).index_add_(
            0, token_of_row, scaled
        )

    found: dict[str, Any] = {
        ("gate", "torch softmax + topk"): gate,
        ("plan_dispatch", "torch argsort + bincount"): lambda e: (
            e.flatten().argsort(stable=True), e.flatten().bincount(minlength=experts))[0],
        ("permute", "torch index_select"): lambda v: v.index_select(0, token_of_row),
        ("unpermute", "torch index_add"): combine,
        ("softmax", "torch softmax"): lambda v: v.softmax(-1),
        ("softmax_topk", "torch softmax + topk"): lambda v: v.softmax(-1).topk(8).values,
    }  # fmt: skip
    if hasattr(torch, "_grouped_mm"):

        def layer(x: Tensor) -> Tensor:
            rows = x.index_select(0, token_of_row)
            gate_, up = torch._grouped_mm(rows, w_up, offs=ends).chunk(2, -1)
            return combine(
                torch._grouped_mm(torch.nn.functional.silu(gate_) * up, w_down, offs=ends)
            )

        found["grouped_mm", "torch._grouped_mm"] = lambda v: torch._grouped_mm(v, w_up, offs=ends)
        found["moe_mlp", "torch._grouped_mm layer"] = layer
    if importlib.util.find_spec("vllm") is not None:
        try:
            from vllm.model_executor.layers.fused_moe import fused_experts

            up, down = w_up.transpose(1, 2).contiguous(), w_down.transpose(1, 2).contiguous()
            ids = chosen.to(torch.int32)
            found["moe_mlp", "vllm fused_experts (Triton)"] = lambda v: fused_experts(
                v, up, down, weights, ids
            )
        except ImportError as error:
            print(f"  vllm is installed, its fused_experts is not there: {error}")
    return found


# ---- the parts ----------------------------------------------------------------------------------


def pytest_run(arguments: list[str], prefix: list[str] | None = None, **variables: str) -> bool:
    command = [
        *(prefix or []),
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--backend",
        "cuda",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode == 0


def check_dispatcher(device: str) -> bool:
    import fastmoe_route

    assert fastmoe_route.__version__
    key = "CUDA" if device == "cuda" else "CPU"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    registered = [n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names()
                  if n.startswith("fastmoe_route::") and has(n, "CPU")]  # fmt: skip
    names = sorted({*registered} - HOST_OPS)
    missing = [name for name in names if not has(f"fastmoe_route::{name}", key)]
    print(f"  {len(names) - len(missing)} of {len(names)} ops have a {key} kernel", *missing)
    return bool(names) and not missing


def gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of the sum of the op's squared result in its input, by the op's own backward."""

    def run(value: Tensor) -> Tensor:
        leaf = value.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).float().square().sum(), leaf)[0]

    return run


def with_gradients(
    device: str, shape: tuple[int, ...]
) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """`name -> (function, its input)` of all that can be captured, backward passes included."""
    pairs = {
        name: (function, value) for name, (function, value, _, _) in ops(device, *shape).items()
    }
    pairs |= further(device, *shape)
    return pairs | {
        f"{name}, backward": (gradient(function), value)
        for name, (function, value) in pairs.items()
        if value.is_floating_point()
    }


def check_graphs(shape: tuple[int, ...]) -> bool:
    """Captures every op, changes its input in place, replays, and compares with an eager call."""
    good = True
    for name, (function, value) in with_gradients("cuda", shape).items():
        fixed = value.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(fixed)  # warmed outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = function(fixed)
        fixed.copy_(value.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        same = torch.equal(captured, function(fixed))
        print(f"  {name:<36} {'same bits' if same else 'DIFFERENT'}")
        good &= same
    return good


PRODUCTS = """
import sys, torch
sys.path.insert(0, 'tools')
from gpu_check import ops
torch.save({n: f(x).cpu() for n, (f, x, _, _) in ops('cuda', 512, 2048, 768, 32, 4).items()
            if n in ('grouped_mm', 'moe_mlp')}, sys.argv[1])
"""


def check_products(folder: Path) -> bool:
    """Kernels for this architecture alone against portable ones: close, and the same bits again."""
    results = []
    for number, kind in enumerate(("sm80", "native", "native")):
        path = folder / f"gpu-check-{number}.pt"
        done = subprocess.run([sys.executable, "-c", PRODUCTS, str(path)], cwd=ROOT,
                              env={**os.environ, "FASTMOE_ROUTE_CUDA_GEMM": kind})  # fmt: skip
        if done.returncode != 0:
            return False
        results.append(torch.load(path))
        path.unlink()
    good = True
    for name, portable in results[0].items():
        native, again = results[1][name], results[2][name]
        off = (native.float() - portable.float()).abs().max() / portable.float().abs().max()
        repeats = torch.equal(native, again)
        print(f"  {name:<16} largest difference {off:.1e} of the largest value, "
              f"{'the same' if repeats else 'OTHER'} bits again")  # fmt: skip
        good &= bool(off <= 2**-7) and repeats
    return good


def seconds_of(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call; the caches are left as the call before left them."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def limits(device: str, size: int, repeats: int) -> tuple[float, float]:
    """Bytes copied a second, and bfloat16 operations a second of a square product."""
    source = torch.empty(size * size, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 2 / seconds_of(lambda: target.copy_(source), device, repeats)
    square = source.view(size, size)
    return copied, 2 * size**3 / seconds_of(lambda: square @ square, device, repeats)


def run_bench(device: str, shape: tuple[int, ...], repeats: int, size: int) -> dict[str, Any]:
    bandwidth, peak = limits(device, size, repeats)
    print(f"  measured: {bandwidth / 1e9:.0f} GB/s copied, {peak / 1e12:.1f} TFLOP/s in bfloat16")
    print(f"  shape: T, H, I, E, K = {shape}")
    report: dict[str, Any] = {"bandwidth": bandwidth, "peak": peak, "shape": shape, "rows": []}
    others = baselines(device, *shape)
    for name, (function, value, num_bytes, flops) in ops(device, *shape).items():
        own = seconds_of(partial(function, value), device, repeats)
        limit = max(num_bytes / bandwidth, flops / peak)
        row = {"op": name, "seconds": own, "share_of_limit": limit / own, "others": {}}
        text = f"  {name:<16} {own * 1e6:9.1f} us  {limit / own:5.0%} of the limit"
        for (op, contender), other in others.items():
            if op == name:
                taken = seconds_of(partial(other, value), device, repeats)
                row["others"][contender] = taken
                text += f"  {taken / own:5.2f}x {contender}"
        print(text)
        report["rows"].append(row)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, no sanitizer")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, to test this file only"
    )
    options = parser.parse_args()
    missing = None if options.rehearse else find_no_gpu()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    large = (16384, 2048, 768, 128, 8)
    shape = (
        (64, 64, 32, 8, 2)
        if options.rehearse
        else (2048, 2048, 768, 64, 8)
        if options.quick
        else large
    )
    repeats, size = (2, 256) if options.rehearse else (30, 8192)
    report: dict[str, Any] = {"device": "cpu" if options.rehearse else torch.cuda.get_device_name()}
    parts: dict[str, Callable[[], bool]] = {"dispatcher": lambda: check_dispatcher(device)}
    if options.rehearse:
        parts["gradients"] = lambda: all(
            bool(function(value).isfinite().all())
            for function, value in with_gradients(device, shape).values()
        )
    else:
        parts["suite"] = lambda: pytest_run(SUITE)
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer and not options.quick:
            for kind in ("memcheck", "racecheck"):
                prefix = [
                    sanitizer,
                    "--tool",
                    kind,
                    "--error-exitcode",
                    "9",
                    "--target-processes",
                    "all",
                ]
                parts[f"sanitizer, {kind}"] = lambda prefix=prefix: pytest_run(
                    SANITIZED, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # fmt: skip
        else:
            print("compute-sanitizer is left out:", "quick" if options.quick else "not installed")
        parts["graphs"] = lambda: check_graphs((512, 1024, 256, 16, 4))
        parts["products"] = lambda: check_products(Path(ROOT / "build"))

    def bench() -> bool:
        report["bench"] = run_bench(device, shape, repeats, size)
        return True

    parts["bench"] = bench
    results = {}
    for name, part in parts.items():
        print(f"== {name}", flush=True)
        try:
            results[name] = part()
        except Exception as error:
            print(f"  {type(error).__name__}: {error}")
            results[name] = False
    report["passed"] = results
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    for name, good in results.items():
        print(f"{'passed' if good else 'FAILED'}  {name}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
