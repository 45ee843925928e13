"""LoRA on the router and the experts of a Hugging Face MoE model, with PEFT, on this package.

A small Mixtral first learns the English of Python's own documentation, bytes in and bytes out. Then
its weights are frozen, and adapters on attention, router and experts learn Python source code. The
same steps are made with transformers' eager experts, from the same adapters and on the same
batches, to show that the losses agree and how much faster the steps are.

    pip install "transformers>=5.8" peft
    python examples/finetune_lora_experts.py --steps 60
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics

import torch
from fastmoe_route.bench.machine import cpu_name
from fastmoe_route.integrations.transformers import explain, register
from torch import Tensor, nn

RUNS = ("eager", "fastmoe_route")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--base-steps", type=int, default=60, help="to train the model itself")
    add("--steps", type=int, default=40, help="to train the adapters")
    add("--hidden", type=int, default=128, help="hidden size")
    add("--experts", type=int, default=16, help="experts per layer")
    add("--rank", type=int, default=8, help="of the adapters")
    add("--batch", type=int, default=8, help="sequences per step")
    add("--context", type=int, default=64, help="bytes per sequence")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add("--json", type=Path, help="write the results here")
    given = parser.parse_args(arguments)
    for name in ("base_steps", "steps", "hidden", "experts", "rank", "batch", "context", "threads"):
        if getattr(given, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(given, name)}")
    return given


def adapted_model(given: argparse.Namespace) -> nn.Module:
    """A Mixtral over bytes that has read some English, with adapters on all that multiplies."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256,
        hidden_size=given.hidden,
        intermediate_size=given.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=given.experts,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("fastmoe_route")
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    english = "".join(topics.values())
    for ids in batches(english, given.base_steps, given):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    print(f"base model: loss {loss.item():.3f} on English after {given.base_steps} steps")
    lora = peft.LoraConfig(
        r=given.rank,
        lora_alpha=given.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
        target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return peft.get_peft_model(model, lora)


def batches(source: str, steps: int, given: argparse.Namespace) -> list[Tensor]:
    """One batch of bytes per step, `[B, S]`."""
    text = torch.frombuffer(bytearray(source.encode()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        starts = torch.randint(len(text) - given.context, (given.batch,), generator=generator)
        found.append(torch.stack([text[s : s + given.context] for s in starts.tolist()]).long())
    return found


def main(arguments: Sequence[str] | None = None) -> dict:
    """Trains both, prints both, and returns the report."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    try:
        register()
        import_module("peft")
    except ImportError as error:
        sys.exit(f"this example needs transformers and peft: {error}")
    first = adapted_model(given)
    models = dict(zip(RUNS, (first, copy.deepcopy(first)), strict=True))
    trained = [name for name, p in first.named_parameters() if p.requires_grad]
    count = sum(p.numel() for p in first.parameters() if p.requires_grad)
    total = sum(p.numel() for p in first.parameters())
    print(f"{count / 1e3:.0f} k of {total / 1e3:.0f} k parameters learn")
    for part in ("gate.", "experts", "q_proj"):
        print(f"  {sum(part in name for name in trained)} adapters on {part.strip('.')}")
    optimisers = {}
    for run, model in models.items():
        model.base_model.model.set_experts_implementation(run)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimisers[run] = torch.optim.AdamW(learned, lr=2e-3)
    print("experts: " + ", ".join(sorted(set(explain(models[RUNS[1]]).values()))))
    losses: dict[str, list[float]] = {run: [] for run in RUNS}
    times: dict[str, list[float]] = {run: [] for run in RUNS}
    code = "".join(inspect.getsource(module) for module in (argparse, inspect, json, statistics))
    for ids in batches(code, given.steps, given):
        for run, model in models.items():
            start = time.perf_counter()
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            optimisers[run].step()
            optimisers[run].zero_grad()
            times[run].append(time.perf_counter() - start)
            losses[run].append(out.loss.item())
    every = max(given.steps // 8, 1)
    print(f"\n{'step':>6}" + "".join(f"{run:>16}" for run in RUNS))
    for step in range(0, given.steps, every):
        print(f"{step:6}" + "".join(f"{losses[run][step]:16.4f}" for run in RUNS))
    report = {
        "machine": cpu_name(),
        "torch": torch.__version__,
        **{key: str(value) for key, value in vars(given).items() if key != "json"},
        "losses": losses,
        "step_ms": {run: 1e3 * statistics.median(times[run]) for run in RUNS},
        "largest_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }
    ours, theirs = report["step_ms"]["fastmoe_route"], report["step_ms"]["eager"]
    print(f"\nlosses differ by at most {report['largest_difference']:.1e}")
    print(f"a step takes {theirs:.0f} ms on eager, {ours:.0f} ms here: {theirs / ours:.1f} times")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
