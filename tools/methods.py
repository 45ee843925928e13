"""The table of published methods, docs/methods.md, and what they cost.

    python tools/methods.py            writes docs/methods.md
    python tools/methods.py --check    exit code 1 if it is not what would be written
    python tools/methods.py --measure  times every method, into bench/results/methods.json

A router is timed on one call in evaluation, without experts. Where it hands on the result of one
call of `gate`, it is timed again with its score known already, in turns with that call alone: what
it takes longer is the recipe's own. Losses, softmax variants, adapters and audits are timed on one
call that is made up here. Set OMP_PROC_BIND=true, so that two threads never wait on one core.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import platform
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fastmoe_route as fr
import torch
from fastmoe_route import adapters, audit, losses
from fastmoe_route import softmax_variants as variants
from fastmoe_route.bench.machine import cpu_name
from fastmoe_route.bench.report import duration
from fastmoe_route.bench.timing import interleave
from fastmoe_route.invariance import INVARIANCE
from fastmoe_route.methods import DECODE, VERIFIED, Method, methods

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
COSTS = ROOT / "bench" / "results" / "methods.json"
SIZES = {"tokens": 2048, "hidden_size": 512, "num_experts": 64}
VOCABULARY = 1000
TEST_FILES = (
    "routers_*",
    "losses",
    "softmax*",
    "estimators",
    "adapters",
    "audit",
    "assign_balanced",
)
COLUMNS = (
    *("row", "name", "kind", "what it is", "source", "code", "invariance", "decoding"),
    *("needs", "test", "cost", "own share"),
)


# ---- tests that cover a method -----------------------------------------------------------------


@cache
def test_functions() -> dict[str, str]:
    """`file::function` of every test in the files about methods, with its source."""
    found = {}
    paths = [path for name in TEST_FILES for path in (ROOT / "tests").glob(f"test_{name}.py")]
    for path in sorted(paths):
        text = path.read_text()
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                source = "\n".join(lines[first - 1 : node.end_lineno])
                found[f"{path.name}::{node.name}"] = source
    return found


def covering_test(method: Method) -> str | None:
    """The test named after the method, or the first that names it; the routers' own files first."""
    tests = dict(sorted(test_functions().items(), key=lambda item: "test_routers" not in item[0]))
    own = {method.name, method.target.__name__}
    mention = re.compile(rf"""\b({"|".join(own)})\b["'(]""")
    named = [name for name in tests if f"::test_{method.name}_" in f"{name}_"]
    using = [name for name, source in tests.items() if mention.search(source)]
    return next(iter(named + using), None)


# ---- costs -------------------------------------------------------------------------------------


def arguments_of(method: Method) -> dict[str, Any]:
    """Arguments that a method cannot do without."""
    given = {"vocab_size": VOCABULARY, "num_tasks": 4, "temperature": 1.0}
    parameters = inspect.signature(method.target).parameters.values()
    return {p.name: given[p.name] for p in parameters if p.default is p.empty and p.name in given}


def inputs() -> dict[str, Any]:
    """What a router may ask for: the hidden states, and the arguments that methods need."""
    tokens, hidden, experts = SIZES["tokens"], SIZES["hidden_size"], SIZES["num_experts"]
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(tokens, hidden, generator=generator),
        "token_ids": torch.randint(0, VOCABULARY, (tokens,), generator=generator),
        "attention_mass": torch.rand(tokens, generator=generator),
        "experts": fr.routers.Experts(
            torch.randn(experts, hidden, 32, generator=generator) * 0.05,
            torch.randn(experts, 16, hidden, generator=generator) * 0.05,
        ),
    }


def known_score(router: fr.routers.Router, given: dict[str, Any]) -> torch.Tensor | None:
    """What the one call of the router's score returns; from now on it is known beforehand."""
    attribute = "logits" if hasattr(router, "logits") else "score"
    score = getattr(router, attribute, None)
    outputs: list[torch.Tensor] = []

    def recorded(*args: Any) -> torch.Tensor:
        outputs.append(score(*args))
        return outputs[-1]

    router._modules.pop(attribute, None)
    router.__dict__[attribute] = recorded
    router(**given)
    router.__dict__[attribute] = lambda *_: outputs[0]
    return outputs[0] if len(outputs) == 1 else None


def recipe_of(router: fr.routers.Router, given: dict[str, Any]) -> Any:
    """The one call of `gate` on known logits whose result the router hands on as it is.

    None where there is more to the method: other calls, a plan or another part of the result, or
    arguments that are neither its score's output nor its own state.
    """
    logits = known_score(router, given)
    calls = []

    def recorded(*args: Any, **options: Any) -> fr.Routing:
        calls.append((args, options, fr.gate(*args, **options)))
        return calls[-1][2]

    if logits is None:
        return None
    with ExitStack() as stack:
        for module in {cls.__module__ for cls in type(router).__mro__}:
            if "fastmoe_route" in module and hasattr(importlib.import_module(module), "gate"):
                stack.enter_context(patch(f"{module}.gate", recorded))
        routed = router(**given)
    if len(calls) != 1:
        return None
    args, options, routing = calls[0]
    own = [*router.buffers(), *router.parameters()]
    given_tensors = [value for value in options.values() if isinstance(value, torch.Tensor)]
    is_recipe = (
        args[0] is logits
        and routed.routing.weights is routing.weights
        and routed[2:] == (None,) * 4
        and all(any(value is tensor for tensor in own) for value in given_tensors)
    )
    return (lambda: fr.gate(*args, **options)) if is_recipe else None


def cost(method: Method, given: dict[str, Any], seconds: float) -> dict[str, float]:
    """Seconds of a call; for a score and one `gate`, what the recipe adds to the gate's time."""
    sizes = SIZES["hidden_size"], SIZES["num_experts"]
    router = fr.routers.build(method.name, *sizes, **arguments_of(method)).eval()
    given = {name: given[name] for name in ("x", *method.needs)}
    with torch.no_grad():
        timing = interleave({"router": lambda _: router(**given)}, seconds, min_rounds=3)
        found = {"seconds": timing.seconds["router"].median}
        recipe = recipe_of(router, given)
        if recipe is None:
            return found
        contenders = {"gate": lambda _: recipe(), "recipe": lambda _: router(**given)}
        timing = interleave(contenders, seconds, min_rounds=20)
    found["gate_seconds"] = timing.seconds["gate"].median
    found["own_share"] = timing.ratios["recipe"].median - 1
    return found


def calls(given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """One call of every method that is no router, over `[T, E]` unless its kind wants more."""
    x, experts = given["x"], given["experts"]
    tokens, size, count = SIZES["tokens"], SIZES["hidden_size"], SIZES["num_experts"]
    z = x[:, :count].contiguous()
    p, labels, gates = z.softmax(1), given["token_ids"] % count, z.relu()
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(1))
    query = adapters.QueryableLora(size, size)
    shards = adapters.MixtureOfShards(size, size, count)
    switch = fr.routers.build("switch", size, count).eval()
    return {
        "prior_shaping": lambda: losses.prior_shaping(p),
        "expert_router_coupling": lambda: losses.expert_router_coupling(rows, experts.w_up),
        "activation_locality": lambda: losses.activation_locality(gates),
        "chunk_sparsity": lambda: losses.chunk_sparsity(gates),
        "isolation": lambda: audit.isolation(switch, x[:128], x[128:1024], experts),
        "mixture_of_shards": shards.experts,
        "queryable_lora": lambda: query(x),
        "same_projection": lambda: adapters.project_update(rows.T, rows.T[:, :16]),
        "polytope_step": lambda: variants.polytope_weights(z, 0.5),
        "two_pass_softmax": lambda: variants.two_pass_softmax(z),
        "online_normalizer": lambda: variants.normalizer(z),
        "sparse_softmax": lambda: variants.sparse_softmax(z),
        "sparse_softmax_loss": lambda: variants.sparse_softmax_loss(z, labels),
        "adaptive_temperature_softmax": lambda: variants.adaptive_temperature_softmax(z),
        "softpick": lambda: variants.softpick(z),
        "unified_max_softmax": lambda: variants.unified_max_softmax(z, 0.0),
        "quantization_bias": lambda: variants.quantization_bias(p),
        "pairwise_softmax_loss": lambda: variants.pairwise_softmax_loss(z[:, 0], z[:, 1:]),
        "topk_softmax_loss": lambda: variants.topk_softmax_loss(z[:, 0], z[:, 1:], z[:, 1]),
        "stablemax": lambda: variants.stablemax(z),
        "stablemax_cross_entropy": lambda: variants.stablemax_cross_entropy(z, labels),
        "sample_classes": lambda: variants.sample_classes(labels, count, 0.5),
        "sharded_cross_entropy": lambda: variants.sharded_cross_entropy(z, labels),
        "early_exit": lambda: variants.early_exit([z, 2 * z], [0.5]),
        "noisy_sparse_softmax": lambda: variants.noisy_sparse_softmax(z, 0.5, k=8),
        "entropy_tolerance": lambda: variants.entropy_tolerance(
            p.view(8, tokens // 8, count), z[0, :8], 0.1
        ),
    }


def measure(seconds: float) -> None:
    """Times every method, and writes the file."""
    given = inputs()
    others = calls(given)
    costs = {}
    for method in methods():
        if method.kind == "router":
            costs[method.name] = cost(method, given, seconds)
        else:
            with torch.no_grad():
                once = {"call": lambda _, name=method.name: others[name]()}
                timing = interleave(once, seconds, min_rounds=3)
            costs[method.name] = {"seconds": timing.seconds["call"].median}
        print(method.name, costs[method.name], flush=True)
    report = {
        "sizes": SIZES,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "methods": costs,
    }
    COSTS.write_text(json.dumps(report, indent=1) + "\n")


# ---- the page ----------------------------------------------------------------------------------


def cost_cells(method: Method, costs: dict[str, Any]) -> list[str]:
    found = costs.get(method.name, {})
    if "seconds" not in found:
        return ["-", "-"]
    own = f"{found['own_share']:+.0%}" if "own_share" in found else "-"
    return [duration(found["seconds"]), own]


def line(method: Method, costs: dict[str, Any]) -> str:
    source = method.source
    if source.startswith("arXiv:"):
        number = source.removeprefix("arXiv:")
        source = f"[{source}](https://arxiv.org/abs/{number})"
    module = method.target.__module__
    cells = [
        method.row,
        f"`{method.name}`",
        method.kind,
        method.title.replace("|", "\\|"),
        f"{source}, {method.verified}",
        f"`{module.removeprefix('fastmoe_route.')}.{method.target.__name__}`",
        method.invariance,
        method.decode,
        ", ".join(method.needs) or "-",
        f"`{covering_test(method) or 'none'}`",
        *cost_cells(method, costs),
    ]
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The text of docs/methods.md."""
    report = json.loads(COSTS.read_text()) if COSTS.exists() else {"methods": {}}
    costs = report["methods"]
    known = [f"- `{key}`: {text}" for key, text in INVARIANCE.items()]
    decoding = ", ".join(f"*{key}* {text}" for key, text in DECODE.items())
    verified = ", ".join(f"*{key}* {text}" for key, text in VERIFIED.items())
    sizes = report.get("sizes", SIZES)
    measured = (
        f"one call in evaluation, T={sizes['tokens']}, H={sizes['hidden_size']}, "
        f"E={sizes['num_experts']}, float32, {report.get('threads', '?')} threads of "
        f"{report.get('cpu', 'an unknown processor')}, `bench/results/methods.json`"
    )
    head = f"""\
# Published methods

Written by `python tools/methods.py` from the registry; do not edit. Formula, defaults and arguments
of a method are printed by `python -m fastmoe_route routers --describe NAME`; the same text is the
docstring of the class or function in the column *code*. Every router is also put through
`tests/test_routers.py`, and all but `da_moe` and `ftp`, which need a model's attention matrix, are
trained once in a small language model: [gallery.md](gallery.md).

Row: a number that files and messages use. `R` is routing, its losses and adapters, `L` neighbouring
ideas, `X` softmax; methods that belong together share one.

Invariance, what a token's result depends on:

{chr(10).join(known)}

Decoding: {decoding}.

Source: how the formula was checked. {verified[0].upper() + verified[1:]}.

Cost: {measured}; experts are not part of it. What is no router is timed on `[T, E]` scores without
gradients (`calls` of the tool). *Own share*: for methods that hand on the result of
one `gate` call, what they take longer than that call alone, in turns, the score being known.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""
    return head + "\n".join(line(method, costs) for method in methods()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    parser.add_argument("--measure", action="store_true", help="time every method first")
    parser.add_argument("--seconds", type=float, default=0.15, help="per method (default 0.15)")
    options = parser.parse_args()
    if options.measure:
        measure(options.seconds)
    text = page()
    if options.check:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
