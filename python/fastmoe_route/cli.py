"""The command line: `python -m fastmoe_route bench | info | routers`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

import fastmoe_route as fr
from fastmoe_route.bench.machine import cpu_name, library_info
from fastmoe_route.bench.shapes import (
    DTYPES,
    OPS,
    QUICK_ROW_SECONDS,
    ROW_SECONDS,
    SHAPES,
    parse_shape,
    parse_tokens,
)

T = TypeVar("T")

_BENCH_HELP = """\
Times every op and whole layers beside plain PyTorch on this machine's CPU. Each answer is checked
first; a wrong one is reported and makes the exit code 1. Then all contenders of a row run in turns
in this process, and the ratio is taken turn by turn. Every time is also held against the least time
this machine could need, from its own measured arithmetic peak and bandwidth.
"""
_BENCH_EXAMPLES = f"""\
examples:
  python -m fastmoe_route bench --quick
  python -m fastmoe_route bench --op moe_mlp --shape qwen3 --tokens 1,16,512 --dtype bfloat16
  python -m fastmoe_route bench --op layer --shape 512,1024,16,2 --pass training
  python -m fastmoe_route bench --quick --json report.json --plot report.png

shapes (hidden, expert width, experts, slots per token):
{chr(10).join(f"  {shape}" for shape in SHAPES.values())}
"""


def _argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """An argparse type whose ValueError text reaches the user."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ValueError(f"must be a positive number, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m fastmoe_route", description="Fast Mixture-of-Experts dispatch for PyTorch."
    )
    top.add_argument("--version", action="version", version=f"fastmoe_route {fr.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="bench | info | routers")

    bench = commands.add_parser(
        "bench",
        help="time every op beside plain PyTorch and this machine's limits",
        description=_BENCH_HELP,
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = bench.add_argument
    add("--quick", action="store_true", help="a selection of rows, about a minute")
    add("--op", dest="ops", action="append", choices=OPS, default=[],
        help="only this op; repeatable")  # fmt: skip
    add("--shape", dest="shapes", action="append", type=_argument(parse_shape), default=[],
        metavar="NAME|H,I,E,K", help="a shape listed below, or sizes; repeatable")  # fmt: skip
    add("--tokens", type=_argument(parse_tokens), action="extend", default=[], metavar="T[,T...]",
        help="numbers of tokens")  # fmt: skip
    add("--dtype", dest="dtypes", action="append", choices=DTYPES, default=[],
        help="element type; repeatable; float32 and bfloat16 if left out")  # fmt: skip
    add("--pass", dest="passes", choices=("forward", "training", "both"), default="both",
        help="forward, forward and backward, or both (default)")  # fmt: skip
    add("--peers", action="store_true",
        help="moe_mlp forward, also beside vLLM, SGLang, zentorch and ONNX Runtime where they are"
        " installed (make bench-peers)")  # fmt: skip
    add("--reuse-memory", action="store_true",
        help="keep freed memory: results lie in warm buffers, not in fresh pages")  # fmt: skip
    add("--threads", type=_argument(_positive_int), metavar="N", help="threads of torch")
    add("--seconds", type=_argument(_positive_float), metavar="S",
        help=f"time per row (default {ROW_SECONDS}, quick {QUICK_ROW_SECONDS})")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="seed of all data (default 0)")
    add("--json", dest="json_path", type=Path, metavar="FILE", help="write the full report there")
    add("--plot", dest="plot_path", type=Path, metavar="FILE",
        help="draw ratio and share of limit (matplotlib)")  # fmt: skip

    info = commands.add_parser("info", help="versions, instruction set, CUDA library, threads")
    info.add_argument("--json", action="store_true", help="as JSON")

    routers = commands.add_parser("routers", help="list every published method, or describe one")
    routers.add_argument(
        "--describe", metavar="NAME", help="formula, defaults and arguments of one"
    )
    routers.add_argument("--kind", help="only methods of this kind, such as router or loss")
    return top


def info_report() -> dict[str, object]:
    """Versions, what the library chose, what the machine offers."""
    from fastmoe_route import _load

    library = library_info()
    cuda = _load.find_library("fastmoe_route_cuda")
    architectures, policy = ([], []) if cuda is None else _load.cuda_policy(cuda)
    return {
        "fastmoe_route": fr.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "instruction_set": library["level"],
        "instruction_set_offered": library["best_level"],
        "threads": int(library["threads"]),
        "scratch_bytes": int(library["scratch_bytes"]),
        "kept_bytes": int(library["kept_bytes"]),
        "cpu_library": str(_load.find_library("fastmoe_route_cpu")),
        "cuda_library": None if cuda is None else str(cuda),
        "cuda_architectures": architectures,
        "cuda_gemm_policy": policy,
    }


def _print_info(as_json: bool) -> int:
    report = info_report()
    if as_json:
        print(json.dumps(report, indent=1))
        return 0
    for key, value in report.items():
        label = key if key == "fastmoe_route" else key.replace("_", " ")
        if isinstance(value, list):
            for line in value:
                text = line if isinstance(line, str) else " | ".join(line)
                print(f"{label:<24} {text}")
            continue
        if value is None:
            value = "none (CPU build)" if key == "torch_cuda" else "none"
        print(f"{label:<24} {value}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = parser().parse_args(arguments)
    if options.command == "info":
        return _print_info(options.json)
    if options.command == "routers":
        from fastmoe_route.routers.listing import print_methods

        return print_methods(options.describe, options.kind)
    from fastmoe_route.bench.runner import Options, run

    del options.command
    try:
        return run(Options(**vars(options)))
    except (ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
