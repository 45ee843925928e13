"""Experts spread over processes: trains a small model, then places its experts by what it learned.

Every process reads its own text (data parallel) and holds its own share of the experts (expert
parallel); tokens travel to the experts they choose and back. The text is the English of Python's
own documentation, byte by byte. After training, the routing of held-out text is recorded, and
`plan_placement` moves experts that are chosen together onto one rank, by integer programming. The
same text then runs under both placements: equal results, fewer rows on the way.

    torchrun --standalone --nproc-per-node 2 examples/expert_parallel.py
    torchrun --standalone --nproc-per-node 4 examples/expert_parallel.py --steps 200
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import fastmoe_route as fr
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fastmoe_route.bench.machine import cpu_name
from fastmoe_route.distributed import ExpertParallel, plan_placement
from torch import Tensor, nn

HEADS = 4


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=120, help="training steps")
    add("--hidden", type=int, default=64, help="hidden size")
    add("--experts", type=int, default=32, help="experts of the layer, of all processes")
    add("--top-k", type=int, default=4, help="experts per token")
    add("--batch", type=int, default=8, help="sequences per process")
    add("--context", type=int, default=64, help="bytes per sequence")
    add("--planning", type=float, default=20.0, help="seconds for the solver")
    add("--json", type=Path, help="write the results here")
    given = parser.parse_args(arguments)
    for name in ("steps", "hidden", "experts", "top_k", "batch", "context"):
        if getattr(given, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(given, name)}")
    if given.hidden % HEADS:
        parser.error(f"--hidden must be a multiple of {HEADS}, got {given.hidden}")
    if given.top_k > given.experts:
        parser.error(f"--top-k must be at most {given.experts}, got {given.top_k}")
    if not given.planning > 0:
        parser.error(f"--planning must be positive, got {given.planning}")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if given.experts % size:
        parser.error(f"--experts must be a multiple of the {size} processes, got {given.experts}")
    return given


class Model(nn.Module):
    """Bytes in, bytes out: embedding, causal attention, an expert layer, a head."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Draws the weights, the same on every process for the same seed."""
        super().__init__()
        torch.manual_seed(0)
        hidden = given.hidden
        self.embed = nn.Embedding(256, hidden)
        self.place = nn.Parameter(torch.randn(given.context, hidden) * 0.1)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(3))
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.experts: nn.Module = fr.nn.MoE(
            hidden, hidden, given.experts, given.top_k, num_shared_experts=1
        )
        self.head = nn.Linear(hidden, 256)

    def hidden(self, ids: Tensor) -> Tensor:
        """What the expert layer reads, `[B, S, H]`, and the residual path beside it."""
        x = self.embed(ids) + self.place
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        heads = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return x + mixed.transpose(1, 2).flatten(2)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[B, S, 256]`."""
        x = self.hidden(ids)
        x = x + self.experts(self.norms[1](x))
        return self.head(self.norms[2](x))


def batch(text: Tensor, given: argparse.Namespace, seed: int) -> Tensor:
    """`[B, S + 1]` bytes."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - given.context - 1, (given.batch,), generator=generator)
    return torch.stack([text[s : s + given.context + 1] for s in starts.tolist()]).long()


def average_gradients(model: Model) -> None:
    """Data parallelism: the expert layer knows its own part, the rest is averaged here."""
    model.experts.reduce_gradients()
    inside = {id(p) for p in model.experts.parameters()}
    for p in model.parameters():
        if id(p) not in inside:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def train(model: Model, text: Tensor, given: argparse.Namespace) -> list[float]:
    """Losses averaged over processes; each process sees its own batches."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(given.steps):
        ids = batch(text, given, seed=step * dist.get_world_size() + dist.get_rank())
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        (loss + fr.nn.aux_loss(model)).backward()
        average_gradients(model)
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


@torch.no_grad()
def run_held_out(model: Model, ids: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Outputs of the expert layer, the routing, and what moved, over all processes."""
    outputs, routing = [], []
    totals = torch.zeros(5, dtype=torch.float64)
    start = time.perf_counter()
    for each in ids:
        x = model.norms[1](model.hidden(each[:, :-1]))
        outputs.append(model.experts(x))
        routing.append(model.experts.layer.router(x.flatten(0, 1)).routing.experts)
        volume = model.experts.volume
        totals += torch.tensor(
            [volume.rows_sent, volume.bytes_sent, volume.slots, volume.rows_dropped, 0.0]
        )
    totals[4] = time.perf_counter() - start
    dist.all_reduce(totals)
    rows, sent, slots, dropped, seconds = totals.tolist()
    share = 1 - 1 / dist.get_world_size()
    return torch.cat(outputs), torch.cat(routing), {
        "rows_sent": rows,
        "megabytes_sent": sent / 1e6,
        "rows_one_by_one": slots * share,
        "rows_dropped": dropped,
        "seconds": seconds / dist.get_world_size(),
    }  # fmt: skip


def gather(routing: Tensor) -> Tensor:
    """The routing of all processes, on every process."""
    parts = [torch.empty_like(routing) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, routing)
    return torch.cat(parts)


def place_again(model: Model, given: argparse.Namespace, placement: object) -> Model:
    """The same model with its experts on other ranks."""
    moved = copy.copy(model)
    moved._modules = dict(model._modules)
    layer = fr.nn.MoE(given.hidden, given.hidden, given.experts, given.top_k, num_shared_experts=1)
    state = {f"experts.{name}": value for name, value in model.experts.gather_experts().items()}
    for name, value in model.experts.layer.state_dict().items():
        state.setdefault(name, value)
    layer.load_state_dict(state)
    moved.experts = ExpertParallel(layer, placement=placement)
    return moved


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, plans, compares, and prints on the first process."""
    given = parse(arguments)
    if find_spec("scipy") is None:
        sys.exit("this example needs SciPy, which plans: pip install 'fastmoe-route[routers]'")
    if "RANK" not in os.environ:
        sys.exit(
            "run me with: torchrun --standalone --nproc-per-node 2 examples/expert_parallel.py"
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8)
    learn, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = Model(given)
    model.experts = ExpertParallel(model.experts)
    say(f"{size} processes, {given.experts} experts, {given.experts // size} on each")
    losses = train(model, learn, given)
    shown = {*range(0, given.steps, max(given.steps // 6, 1)), given.steps - 1}
    for step in sorted(shown):
        say(f"step {step:4}  loss {losses[step]:.3f}")

    ids = [batch(held_out, given, seed=10**6 + 100 * rank + i) for i in range(16)]
    before_y, routing, before = run_held_out(model, ids)
    trace = gather(routing)
    choice: list = [None]
    if rank == 0:  # once for all: a time limit may stop two solvers at different places
        choice = [
            plan_placement(
                trace, given.experts, size, traffic_weight=0.8, time_limit=given.planning
            )
        ]
    dist.broadcast_object_list(choice)
    plan = choice[0]
    moved = place_again(model, given, plan)
    after_y, _, after = run_held_out(moved, ids)
    difference = ((after_y - before_y).norm() / before_y.norm()).item()

    say(f"\nrouting of {trace.shape[0]} held-out tokens recorded; placement planned from it")
    table = {
        "rows between processes": (before["rows_sent"], after["rows_sent"]),
        "MB between processes": (before["megabytes_sent"], after["megabytes_sent"]),
        "fullest rank / even share": (plan.max_load_before, plan.max_load),
    }
    say(f"{'':28}{'neighbours':>12}{'planned':>12}")
    for what, numbers in table.items():
        say(f"{what:28}" + "".join(f"{number:12.6g}" for number in numbers))
    say(f"one row per (token, expert) pair would be {before['rows_one_by_one']:.0f} rows")
    say(f"outputs differ by {difference:.0e}, relative")
    if rank == 0 and given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "machine": cpu_name(),
            "torch": torch.__version__,
            **{key: str(value) for key, value in vars(given).items() if key != "json"},
            "processes": size,
            "losses": losses,
            "neighbours": before,
            "planned": after,
            "placement": plan._asdict(),
            "difference": difference,
        }
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    if not difference <= 1e-5:
        sys.exit("the placement changed the result")
    dist.barrier()  # nobody leaves while another still needs the store
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
