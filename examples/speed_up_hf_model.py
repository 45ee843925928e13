"""How much faster a Hugging Face MoE model runs with fastmoe_route: tokens per second.

A random model of a known architecture (or one from a local folder) reads a prompt and decodes, with
each implementation of its experts in turn: transformers' eager loop, its grouped_mm, and this
package, with and without the fused gate. All runs share one set of weights. In float32 the logits
must be equal, up to rounding, before anything is timed.

    pip install "transformers>=5.8"
    python examples/speed_up_hf_model.py --model olmoe --layers 4 --hidden 1024
    python examples/speed_up_hf_model.py --path /models/OLMoE-1B-7B --dtype bfloat16 --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from fastmoe_route.bench.machine import cpu_name
from fastmoe_route.integrations.transformers import (
    explain,
    patch_routers,
    register,
    unpatch_routers,
)
from torch import Tensor, nn

EAGER, GROUPED, OURS, OURS_GATE = "eager", "grouped_mm", "fastmoe_route", "fastmoe_route + gate"
RUNS = (EAGER, GROUPED, OURS, OURS_GATE)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Logits may differ by rounding: relative to their size, after all layers.
LOGITS_LIMIT = 2e-5

SIZES = {
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 1024},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 3584},
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "head_dim": 64,
    },
    "gpt_oss": {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 1024},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=sorted(SIZES), default="olmoe", help="architecture")
    add("--path", type=Path, help="a local model instead of a random one")
    add("--layers", type=int, default=2, help="layers of the random model")
    add("--hidden", type=int, default=512, help="its hidden size")
    add("--experts", type=int, help="instead of the architecture's usual number")
    add("--width", type=int, help="expert width, instead of the usual one")
    add("--prompt", type=int, default=512, help="tokens read")
    add("--decode", type=int, default=32, help="tokens written")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="element type of the model")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    add("--repeats", type=int, default=5, help="turns of every implementation")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add("--json", type=Path, help="write the results here")
    given = parser.parse_args(arguments)
    for name in ("layers", "hidden", "prompt", "decode", "repeats", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    if given.hidden % 64:
        parser.error(f"--hidden must be a multiple of 64, got {given.hidden}")
    top_k = SIZES[given.model]["num_experts_per_tok"]
    if given.experts is not None and given.experts < top_k:
        parser.error(f"--experts must be at least {top_k} for {given.model}, got {given.experts}")
    if given.width is not None and given.width < 1:
        parser.error(f"--width must be at least 1, got {given.width}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    if given.path is not None and not (given.path / "config.json").is_file():
        parser.error(f"--path must be a folder with a config.json, got {given.path}")
    return given


def load(given: argparse.Namespace) -> nn.Module:
    """The model in eval mode; random weights keep activations at a useful size."""
    import transformers

    dtype = DTYPES[given.dtype]
    if given.path:
        found = transformers.AutoModelForCausalLM.from_pretrained(given.path, dtype=dtype)
        return found.eval().to(given.device)
    sizes = dict(SIZES[given.model])
    for key in sizes:
        if given.experts and key in ("num_experts", "num_local_experts"):
            sizes[key] = given.experts
        if given.width and key.endswith("intermediate_size"):
            sizes[key] = given.width
    heads = given.hidden // 64
    config = transformers.AutoConfig.for_model(
        given.model,
        vocab_size=4096,
        hidden_size=given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **sizes,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.to(dtype).to_empty(device=given.device)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.fill_(1.0)
            else:
                value.normal_(std=value.shape[-1] ** -0.5)
        for module in model.modules():  # buffers computed at construction
            if hasattr(module, "compute_default_rope_parameters"):
                module.__init__(model.config)
            module.to(given.device)
    return model.eval()


def use(model: nn.Module, run: str) -> None:
    """Switches the model to one of `RUNS`."""
    unpatch_routers(model)
    model.set_experts_implementation(OURS if run in (OURS, OURS_GATE) else run)
    if run == OURS_GATE:
        patch_routers(model)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def read_and_write(model: nn.Module, ids: Tensor, decode: int) -> tuple[float, float, Tensor]:
    """Seconds to read the prompt, seconds to write `decode` tokens greedily, prompt logits."""
    start = now(ids.device)
    out = model(ids, use_cache=True)
    middle = now(ids.device)
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    for _ in range(decode):
        step = model(last, past_key_values=cache, use_cache=True)
        cache, last = step.past_key_values, step.logits[:, -1:].argmax(-1)
    return middle - start, now(ids.device) - middle, out.logits


class ExpertsClock:
    """Seconds in a model's experts modules: of the prompt, and of tokens decoded one by one.

    On a GPU it is the time of their launches.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hooks on every experts module; a call costs about a microsecond more."""
        self.seconds, self._started = [0.0, 0.0], 0.0
        for module in model.modules():
            if hasattr(module, "is_transposed"):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _end(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        self.seconds[inputs[0].shape[0] == 1] += time.perf_counter() - self._started

    def read(self) -> list[float]:
        """What came together since the last reading."""
        found, self.seconds = self.seconds, [0.0, 0.0]
        return found


def memory_rate(buffer: Tensor) -> float:
    """GB/s of reading a buffer that no cache holds: what bounds the decoding of one token."""
    seconds = []
    for _ in range(3):
        start = now(buffer.device)
        buffer.sum()
        seconds.append(now(buffer.device) - start)
    return buffer.numel() * buffer.element_size() / min(seconds) / 1e9


def check_logits(model: nn.Module, ids: Tensor, dtype: str) -> dict[str, float]:
    """The relative difference of every run's logits from eager's; an error in float32."""
    found: dict[str, float] = {}
    expected = None
    for run in RUNS:
        use(model, run)
        logits = read_and_write(model, ids, 1)[2].float()
        expected = logits if expected is None else expected
        found[run] = ((logits - expected).norm() / expected.norm()).item()
        if dtype == "float32" and not found[run] <= LOGITS_LIMIT:
            sys.exit(f"{run}: logits differ from eager's by {found[run]:.1e}, relative")
    return found


def main(arguments: Sequence[str] | None = None) -> dict:
    """Checks, times and prints; returns the report."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    try:
        register()
    except ImportError as error:
        sys.exit(str(error))
    model = load(given)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (1, given.prompt), generator=generator)
    ids = ids.to(given.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {parameters / 1e6:.0f} M parameters, {given.dtype}")
    for how in sorted(set(explain(model).values())):
        print(f"experts: {how}")
    differences = check_logits(model, ids, given.dtype)
    times: dict[str, list[tuple[float, float]]] = {run: [] for run in RUNS}
    inside: dict[str, list[list[float]]] = {run: [] for run in RUNS}
    clock, buffer = ExpertsClock(model), torch.ones(64 << 20, device=given.device)
    rates = []
    for _ in range(given.repeats):  # in turns, so that a slow minute hits all of them
        rates.append(memory_rate(buffer))
        for run in RUNS:
            use(model, run)
            read, write, _ = read_and_write(model, ids, given.decode)
            times[run].append((read, write))
            inside[run].append(clock.read())
    report = {
        "machine": cpu_name() if given.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": type(model).__name__,
        "parameters": parameters,
        "memory_gb_per_s": statistics.median(rates),
        **{key: str(value) for key, value in vars(given).items() if key != "json"},
        "runs": {
            run: summarise(run, times, given, differences[run]) | in_experts(inside[run])
            for run in RUNS
        },
    }
    print(f"\n{'experts':22}{'prompt tok/s':>14}{'decode tok/s':>14}{'total s':>9}", end="")
    print(f"{'in experts':>12}", end="")
    print(f"{'x eager':>9}{'x grouped_mm':>14}{'logits':>10}")
    for run, row in report["runs"].items():
        print(
            f"{run:22}{row['prompt_tokens_per_s']:14.0f}{row['decode_tokens_per_s']:14.1f}", end=""
        )
        experts = row["experts_prompt_s"] + row["experts_decode_s"]
        print(f"{row['total_s']:9.2f}{experts:12.2f}", end="")
        print(f"{row['over_eager']:9.2f}{row['over_grouped_mm']:14.2f}", end="")
        print(f"{row['logits_difference']:10.0e}")
    print(f"memory was read at {report['memory_gb_per_s']:.0f} GB/s between the turns")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def summarise(run: str, times: dict, given: argparse.Namespace, difference: float) -> dict:
    """Medians of one run, and of its ratios to the others, turn by turn."""

    def ratio(other: str) -> float:
        pairs = zip(times[other], times[run], strict=True)
        return statistics.median(sum(theirs) / sum(ours) for theirs, ours in pairs)

    read, write = (statistics.median(column) for column in zip(*times[run], strict=True))
    return {
        "prompt_s": read,
        "decode_s": write,
        "total_s": statistics.median(sum(pair) for pair in times[run]),
        "prompt_tokens_per_s": given.prompt / read,
        "decode_tokens_per_s": given.decode / write,
        "over_eager": ratio(EAGER),
        "over_grouped_mm": ratio(GROUPED),
        "logits_difference": difference,
    }


def in_experts(turns: list[list[float]]) -> dict[str, float]:
    """Medians of the seconds in experts modules."""
    read, write = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"experts_prompt_s": read, "experts_decode_s": write}


if __name__ == "__main__":
    main()
