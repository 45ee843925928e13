"""Everything a machine with a GPU can tell about the package, in one call: `make gpu-check`.

    python tools/gpu_check.py [--quick] [--only PART...] [--json FILE] [--rehearse]

In this order, each part even if one before it failed:

  dispatcher  the CUDA library is loaded and every op has a CUDA kernel
  suite       the tests of the ops, whose CPU tensors take a trip to the GPU (tests/cuda_backend.py)
  suite, sm80     those of the products again, with the kernels that run on every GPU
  sanitizer   where compute-sanitizer is installed: tests of wrong ids, sizes, holes and padding
              under memcheck; a small call of every op, and its gradient, under racecheck
  graphs      every op, its other kernels and its gradients, captured in a CUDA graph and replayed
              on new inputs
  routers     a layer of every router, evaluated and trained: results and gradients of the CPU
  compile     fr.nn.MoE under torch.compile(fullgraph=True), forward and backward
  nccl        fr.distributed on NCCL, a process for each GPU: one, if there is one
  products    kernels for this GPU alone (FASTMOE_ROUTE_CUDA_GEMM=native) against the portable ones
  bench       every op beside plain PyTorch and Triton peers (tools/gpu_bench.py)

The exit code is 0 if all passed, 1 if something failed, 2 if there is no GPU to ask. `--rehearse`
runs what can run on the CPU, to test this file; it shows nothing about CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_bench import SHAPES, given, gradient, ops, run_bench
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SUITE = [
    f"tests/test_{name}.py"
    for name in ("gate", "plan_dispatch", "permute", "grouped_mm", "moe_mlp", "up_projection",
                 "softmax", "softmax_topk", "expert_choice", "reroute", "device_rules",
                 "gate_contract", "gate_selection", "dispatch_regressions", "expert_regressions",
                 "expert_extremes", "overflow")
]  # fmt: skip
# Those of the products.
EXPERTS = [
    f"tests/test_{name}.py"
    for name in ("grouped_mm", "moe_mlp", "up_projection", "expert_regressions", "expert_extremes")
]
# Wrong ids and offsets, sizes off every tile, padding.
SANITIZED = ["tests/test_device_rules.py", "tests/test_moe_mlp.py", "tests/test_permute.py",
             "-k", "device_rules or sizes or holes or padding"]  # fmt: skip
HOST_OPS = {"assign_balanced", "machine_read"}  # without a CUDA kernel
ROUTER_LIMIT = 1e-4  # relative, of results and of gradients
# Balance in training by prices that meet scores exactly: the last bit of a score, which devices
# round differently, moves tokens.
PRICED = {"base", "bip"}
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


# ---- the ops beyond those of the bench -----------------------------------------------------------


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


# ---- the parts ----------------------------------------------------------------------------------


def pytest_run(arguments: list[str], prefix: list[str] | None = None, **variables: str) -> bool:
    """Runs tests of ops on the GPU, several at once where pytest-xdist is installed."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--backend", "cuda"]
    command = [*(prefix or []), *pytest, *arguments]
    if not prefix and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
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


def with_gradients(
    device: str, shape: tuple[int, ...]
) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """`name -> (function, its input)` of all that can be captured, backward passes included."""
    pairs = {
        n: (function, value) for n, (function, value, _, _) in ops(given(device, *shape)).items()
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
from gpu_bench import given, ops
import fastmoe_route as fr
g = given('cuda', 512, 2048, 768, 32, 4)
results = {n: f(x).cpu() for n, (f, x, _, _) in ops(g).items() if n in ('grouped_mm', 'moe_mlp')}
zeros = [torch.zeros(32, n, dtype=g.x.dtype, device='cuda') for n in (1536, 2048)]
results['grouped_mm, bias of zero'] = fr.grouped_mm(
    g.rows, g.w_up, g.plan.offsets, bias=zeros[0]).cpu()
results['moe_mlp, biases of zero'] = fr.moe_mlp(
    g.x, g.routing, g.w_up, g.w_down, bias_up=zeros[0], bias_down=zeros[1], plan=g.plan).cpu()
torch.save(results, sys.argv[1])
"""


CALLS = """
import sys, torch
sys.path.insert(0, 'tools')
from gpu_bench import COLUMNS
from gpu_check import with_gradients
for name, (function, value) in with_gradients('cuda', (96, 128, 64, 8, 2)).items():
    function(value[:4] if value.shape[-1] == COLUMNS else value)
    torch.cuda.synchronize()
    print(' ', name, flush=True)
"""


def check_routers(device: str) -> bool:
    """A layer of every router on the device beside the same on the CPU.

    In training PRICED, and those that draw from torch's generators, need only be finite.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import router_cases

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def outcome(name: str, training: bool, where: str) -> list[Tensor]:
        given = router_cases.inputs()
        if where != "cpu":
            given = {key: moved(value) for key, value in given.items()}
            given["experts"] = type(given["experts"])(*map(moved, given["experts"]))
        router = router_cases.make(name).train(training).to(where)
        x = given["x"] = given["x"].requires_grad_()
        y = router_cases.layer(router, given)
        y.square().sum().backward()
        return [y.detach().cpu(), x.grad.cpu()]

    def error(wanted: list[Tensor], got: list[Tensor]) -> float:
        pairs = zip(wanted, got, strict=True)
        return float(
            torch.stack([(b - a).norm() / a.norm().clamp(min=1e-6) for a, b in pairs]).max()
        )

    names, off = router_cases.names(), []
    for name in names:
        for training in (False, True):
            wanted, got = (outcome(name, training, where) for where in ("cpu", device))
            found = error(wanted, got)
            differs = training and (name in PRICED or error(wanted, outcome(name, True, "cpu")) > 0)
            if not (math.isfinite(found) if differs else found <= ROUTER_LIMIT):
                off.append(f"{name}{' in training' if training else ''}: {found:.1e}")
    print(f"  {len(names)} routers, off by more than {ROUTER_LIMIT}: {', '.join(off) or 'none'}")
    return not off


def check_compile(device: str) -> bool:
    """A compiled layer, forward and backward, beside the same in eager mode."""
    import fastmoe_route as fr

    good = True
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = fr.nn.MoE(256, 128, 16, 4, dtype=dtype).to(device)
        compiled = torch.compile(layer, fullgraph=True)
        for tokens in (64, 200, 1000):
            results = []
            for call in (layer, compiled):
                torch.manual_seed(1)
                x = torch.randn(tokens, 256, device=device, dtype=dtype).requires_grad_()
                layer.zero_grad()
                y = call(x)
                y.float().square().sum().backward()
                grads = [p.grad.float() for p in layer.parameters()]
                results.append([y.detach().float(), x.grad.float(), *grads])
            limit = 1e-5 if dtype == torch.float32 else 2e-2
            good &= all((a - b).norm() <= limit * a.norm() for a, b in zip(*results, strict=True))
    print(f"  fr.nn.MoE compiled: {'as in eager mode' if good else 'DIFFERENT'}")
    return bool(good)


def check_nccl() -> bool:
    """A test of processes of their own, which put their tensors on the GPUs themselves."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_distributed.py", "-k", "nccl"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def sanitized(sanitizer: str, tool: str) -> list[str]:
    return [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]


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
        print(f"  {name:<24} largest difference {off:.1e} of the largest value, "
              f"{'the same' if repeats else 'OTHER'} bits again")  # fmt: skip
        good &= bool(off <= 2**-7) and repeats
    for name in ("grouped_mm", "moe_mlp"):  # with a bias another kernel of sm_90 multiplies
        with_zeros = next(n for n in results[1] if n.startswith(f"{name}, "))
        same = torch.equal(results[1][name], results[1][with_zeros])
        print(f"  {with_zeros:<24} {'the same' if same else 'OTHER'} bits as without")
        good &= same
    return good


def check_races(sanitizer: str) -> bool:
    """Every shared access is followed, which is slow: one call of each kernel, not the tests."""
    command = [*sanitized(sanitizer, "racecheck"), sys.executable, "-c", CALLS]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def parts_of(
    options: argparse.Namespace, device: str, report: dict[str, Any]
) -> dict[str, Callable[[], bool]]:
    """What there is to run here; the bench adds to the report."""
    rehearsed = {"rehearsal": (64, 64, 32, 8, 2)}
    shapes = rehearsed if device == "cpu" else SHAPES
    if options.quick:
        shapes = {"qwen3-2048": SHAPES["qwen3-2048"]}

    def bench() -> bool:
        small = {"repeats": 2, "size": 128} if device == "cpu" else {}
        report["bench"] = run_bench(device, shapes, **small)
        return True

    parts = {"dispatcher": lambda: check_dispatcher(device)}
    if device == "cpu":
        parts["gradients"] = lambda: all(
            bool(function(value).isfinite().all())
            for function, value in with_gradients(device, rehearsed["rehearsal"]).values()
        )
        return parts | {"bench": bench}
    parts["suite"] = lambda: pytest_run(SUITE)
    parts["suite, sm80"] = lambda: pytest_run(EXPERTS, FASTMOE_ROUTE_CUDA_GEMM="sm80")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or options.quick:
        print("compute-sanitizer is left out:", "quick" if sanitizer else "not installed")
    else:
        parts["sanitizer, memcheck"] = lambda: pytest_run(
            SANITIZED, sanitized(sanitizer, "memcheck"), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        parts["sanitizer, racecheck"] = lambda: check_races(sanitizer)
    parts["graphs"] = lambda: check_graphs((512, 1024, 256, 16, 4))
    parts["routers"] = lambda: check_routers(device)
    parts["compile"] = lambda: check_compile(device)
    parts["nccl"] = check_nccl
    parts["products"] = lambda: check_products(ROOT / "build")
    return parts | {"bench": bench}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape, no sanitizer")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts of the list above")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, to test this file only"
    )
    options = parser.parse_args()
    missing = None if options.rehearse else find_no_gpu()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    report: dict[str, Any] = {"device": "cpu" if options.rehearse else torch.cuda.get_device_name()}
    parts = parts_of(options, device, report)
    unknown = {*(options.only or [])} - {*parts}
    if unknown:
        parser.error(f"--only must name parts of {', '.join(parts)}; got {', '.join(unknown)}")
    results = {}
    for name in options.only or parts:
        print(f"== {name}", flush=True)
        try:
            results[name] = parts[name]()
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
