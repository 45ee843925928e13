"""Trains a small Mixture-of-Experts language model twice, and holds the two runs side by side.

The model is a byte-level transformer whose feed-forward layers are experts. The text is real
English that every Python carries: the language reference in `pydoc_data.topics`. One copy of the
model runs its experts with fastmoe_route (`gate` and `moe_mlp`, the load-balancing loss from the
gate's statistics), the other with the usual PyTorch loop over experts. Both start from the same
weights and see the same batches, in turns, so their losses should be hard to tell apart and their
speeds may be compared.

    python examples/train_moe_lm.py --steps 200 --out train_moe_lm.png
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fastmoe_route as fr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAST, PLAIN = "fastmoe_route", "plain PyTorch"


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of a batch."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    experts: int = 32
    top_k: int = 4
    expert_width: int = 128
    context: int = 128
    batch: int = 16
    vocabulary: int = 256


class Experts(nn.Module):
    """Router and SwiGLU experts; `backend` says who computes them."""

    def __init__(self, config: Config) -> None:
        """Draws the initial weights."""
        super().__init__()
        self.top_k, self.backend = config.top_k, FAST
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        up = torch.randn(config.experts, 2 * config.expert_width, config.hidden)
        down = torch.randn(config.experts, config.hidden, config.expert_width)
        self.w_up = nn.Parameter(up * config.hidden**-0.5)
        self.w_down = nn.Parameter(down * config.expert_width**-0.5)
        self.register_buffer("demand", torch.zeros(config.experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output of `x` [T, H], and Switch's balance loss: E * sum(share of slots * mean score)."""
        logits = self.router(x)
        num_tokens, num_experts = logits.shape
        run = self.fast if self.backend == FAST else self.plain
        out, demand, score_sum = run(x, logits)
        self.demand = demand.detach().float()
        shares = self.demand / (num_tokens * self.top_k)
        return out, num_experts * (shares * score_sum / num_tokens).sum()

    def fast(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With fastmoe_route: two calls."""
        routing = fr.gate(logits, self.top_k, normalize=True, stats=True)
        out = fr.moe_mlp(x, routing, self.w_up.transpose(1, 2), self.w_down.transpose(1, 2))
        return out, routing.demand, routing.score_sum

    def plain(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With plain PyTorch: softmax, top-k, and a loop over the experts that got tokens."""
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        demand = torch.bincount(chosen.flatten(), minlength=logits.shape[1])
        ups, downs = self.w_up.unbind(0), self.w_down.unbind(0)
        for expert in demand.nonzero().flatten().tolist():
            tokens, choice = torch.where(chosen == expert)
            gate_half, up_half = F.linear(x[tokens], ups[expert]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate_half) * up_half, downs[expert])
            out.index_add_(0, tokens, result * weights[tokens, choice, None])
        return out, demand, scores.sum(0)


class Block(nn.Module):
    """Causal attention, then experts, each behind a norm and beside a residual path."""

    def __init__(self, config: Config) -> None:
        """Draws the initial weights."""
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.project = nn.Linear(config.hidden, config.hidden, bias=False)
        self.experts_norm = nn.RMSNorm(config.hidden)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` is [B, S, H]."""
        batch, context, hidden = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, context, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, context, hidden))
        out, balance = self.experts(self.experts_norm(x).view(-1, hidden))
        return x + out.view_as(x), balance


class Model(nn.Module):
    """A byte-level language model."""

    def __init__(self, config: Config) -> None:
        """Draws the initial weights."""
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.hidden)
        self.position = nn.Parameter(0.02 * torch.randn(config.context, config.hidden))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=config.hidden**-0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S, V] and the mean balance loss of the layers."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        balance = x.new_zeros(())
        for block in self.blocks:
            x, loss = block(x)
            balance = balance + loss / len(self.blocks)
        return self.head(self.norm(x)), balance

    def use(self, backend: str) -> Model:
        """Chooses who computes the experts."""
        for block in self.blocks:
            block.experts.backend = backend
        return self

    def load(self) -> Tensor:
        """Slots of each expert in the last forward pass, [layers, E], 1 where all are equal."""
        demand = torch.stack([block.experts.demand for block in self.blocks])
        return demand / demand.mean(1, keepdim=True)


def read_text() -> tuple[Tensor, Tensor]:
    """The bytes of the language reference: nine tenths of its topics to train, one to validate."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set(names[5::10])

    def join(wanted: list[str]) -> Tensor:
        text = "\n\n".join(topics[name] for name in wanted)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()

    return join([n for n in names if n not in held_out]), join([n for n in names if n in held_out])


def batches(data: Tensor, config: Config, seed: int) -> Iterator[Tensor]:
    """Random windows, [B, S + 1], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(config.context + 1)
    while True:
        starts = torch.randint(
            data.numel() - config.context - 1, (config.batch, 1), generator=generator
        )
        yield data[starts + offsets]


def cross_entropy(logits: Tensor, window: Tensor) -> Tensor:
    """Mean loss in nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@dataclass
class Run:
    """One of the two trainings: model, optimizer, and what happened."""

    name: str
    model: Model
    optimizer: torch.optim.Optimizer
    train_loss: list[float] = field(default_factory=list)
    valid_loss: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    load: Tensor | None = None

    def step(self, window: Tensor, balance_weight: float) -> None:
        """One timed training step."""
        start = time.perf_counter()
        logits, balance = self.model(window[:, :-1])
        loss = cross_entropy(logits, window)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + balance_weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.train_loss.append(float(loss.detach()))

    @torch.no_grad()
    def validate(self, windows: list[Tensor], step: int) -> None:
        """Mean loss over fixed windows of unseen text; keeps the expert load of all of them."""
        self.model.eval()
        losses, loads = [], []
        for window in windows:
            losses.append(float(cross_entropy(self.model(window[:, :-1])[0], window)))
            loads.append(self.model.load())
        self.model.train()
        self.valid_loss[step] = statistics.fmean(losses)
        self.load = torch.stack(loads).mean(0)

    def tokens_per_second(self, config: Config) -> float:
        """From the median step, the first few left out."""
        timed = self.seconds[min(3, len(self.seconds) - 1) :]
        return config.batch * config.context / statistics.median(timed)


class Progress:
    """A bar on a terminal that has rich; nothing otherwise."""

    def __init__(self, steps: int) -> None:
        """Starts the bar."""
        self.bar = None
        if sys.stdout.isatty():
            try:
                from rich.progress import Progress as Bar
            except ImportError:
                return
            self.bar = Bar(transient=True)
            self.task = self.bar.add_task("training", total=steps)
            self.bar.start()

    def advance(self) -> None:
        """One step more."""
        if self.bar is not None:
            self.bar.advance(self.task)

    def print(self, line: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()


def train(config: Config, steps: int, rate: float, balance: float, seed: int) -> list[Run]:
    """Trains both copies in turns and prints their losses side by side."""
    torch.manual_seed(seed)
    model = Model(config)
    runs = []
    for name in (FAST, PLAIN):
        twin = copy.deepcopy(model).use(name)
        optimizer = torch.optim.AdamW(
            twin.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        runs.append(Run(name, twin, optimizer))
    train_text, valid_text = read_text()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{size / 1e6:.1f} million parameters, {config.layers} layers of {config.experts} experts, "
        f"{config.top_k} per token; text: {train_text.numel():,} bytes to train, "
        f"{valid_text.numel():,} to validate"
    )
    source = batches(train_text, config, seed)
    held_out = batches(valid_text, config, seed + 1)
    windows = [next(held_out) for _ in range(4)]
    every = max(1, steps // 10)
    print(f"\n{'':>6} {FAST:^21} {PLAIN:^21}")
    print(f"{'step':>6} {'train':>10} {'valid':>10} {'train':>10} {'valid':>10}")
    progress = Progress(steps)
    try:
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                for run in runs:
                    run.validate(windows, step)
                cells = [
                    (f"{run.train_loss[-1]:10.4f} " if run.train_loss else f"{'-':>10} ")
                    + f"{run.valid_loss[step]:10.4f}"
                    for run in runs
                ]
                progress.print(f"{step:>6} " + " ".join(cells))
            if step == steps:
                break
            warmth = min(1.0, (step + 1) / 20)  # warm up, then a cosine down to a tenth
            decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
            window = next(source)
            for run in runs if step % 2 == 0 else runs[::-1]:
                for group in run.optimizer.param_groups:
                    group["lr"] = rate * warmth * decay
                run.step(window, balance)
            progress.advance()
    finally:
        progress.close()
    return runs


def report(runs: list[Run], config: Config) -> None:
    """Speeds, distance of the curves, expert load."""
    fast, plain = runs
    gap = max(abs(a - b) for a, b in zip(fast.train_loss, plain.train_loss, strict=True))
    first, last = min(fast.valid_loss), max(fast.valid_loss)
    final = abs(fast.valid_loss[last] - plain.valid_loss[last])
    speeds = [run.tokens_per_second(config) for run in runs]
    print(
        f"\nvalidation loss {fast.valid_loss[first]:.3f} -> {fast.valid_loss[last]:.3f} nats per "
        f"byte; the two runs end {final:.4f} apart, train losses never more than {gap:.4f}"
    )
    print(
        f"training speed: {FAST} {speeds[0]:,.0f} tokens/s, {PLAIN} loop {speeds[1]:,.0f} "
        f"tokens/s: {speeds[0] / speeds[1]:.2f} times"
    )
    for run in runs:
        assert run.load is not None
        loads = ", ".join(f"{row.min():.2f} to {row.max():.2f}" for row in run.load)
        print(f"expert load by layer, 1 = equal share, {run.name}: {loads}")


def plot(runs: list[Run], config: Config, path: Path) -> None:
    """Loss curves, speed, and the expert load of every layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    fast, plain = runs
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1), height_ratios=(3, 1.4))
    losses, speed = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    load = figure.add_subplot(grid[1, :])
    styles = (
        (plain, {"color": "#ee8866", "linewidth": 4.0, "alpha": 0.6}, "s"),
        (fast, {"color": "#222255", "linewidth": 1.1}, "."),
    )
    for run, style, marker in styles:
        losses.plot(range(1, len(run.train_loss) + 1), run.train_loss, **style)
        losses.plot(
            list(run.valid_loss), list(run.valid_loss.values()), linestyle="none", marker=marker,
            markersize=9, color=style["color"],
        )  # fmt: skip
        losses.plot([], [], marker=marker, label=f"{run.name} (points: unseen text)", **style)
    losses.set(xlabel="step", ylabel="loss, nats per byte", title="Same weights, same batches")
    losses.legend(frameon=False)
    losses.grid(color="#dddddd", linewidth=0.6)
    speeds = [run.tokens_per_second(config) for run in runs]
    bars = speed.bar([FAST, PLAIN], speeds, color=["#222255", "#ee8866"], width=0.6)
    speed.bar_label(bars, [f"{value:,.0f}" for value in speeds], padding=2)
    speed.set(title="Training, tokens per second", ylim=(0, 1.15 * max(speeds)))
    assert fast.load is not None
    high = max(2.0, float(fast.load.max()))
    image = load.imshow(fast.load.numpy(), aspect="auto", cmap="RdBu_r", vmin=2 - high, vmax=high)
    load.set(xlabel="expert", ylabel="layer", title=f"Expert load on unseen text ({FAST})")
    load.xaxis.set_major_locator(MaxNLocator(integer=True))
    load.set_yticks(range(config.layers), [str(i + 1) for i in range(config.layers)])
    figure.colorbar(image, ax=load, label="1 = equal share", pad=0.01).ax.set_ylim(0, high)
    for axes in (losses, speed):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"written: {path}")


def main(arguments: list[str] | None = None) -> list[Run]:
    """Parses the arguments, trains, reports."""
    default = Config()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=50, help="training steps of each run")
    add("--out", type=Path, help="file for the plot (needs matplotlib)")
    add("--experts", type=int, default=default.experts, help="experts per layer")
    add("--top-k", type=int, default=default.top_k, help="experts per token")
    add("--hidden", type=int, default=default.hidden, help="hidden size")
    add("--expert-width", type=int, default=default.expert_width, help="width of an expert")
    add("--layers", type=int, default=default.layers, help="transformer layers")
    add("--heads", type=int, default=default.heads, help="attention heads")
    add("--context", type=int, default=default.context, help="bytes per window")
    add("--batch", type=int, default=default.batch, help="windows per step")
    add("--rate", type=float, default=3e-3, help="highest learning rate")
    add("--balance", type=float, default=0.1, help="weight of the load-balancing loss")
    add("--seed", type=int, default=0, help="seed of weights and batches")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args(arguments)
    for name in ("steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 1 <= options.top_k <= options.experts:
        parser.error(f"--top-k must be in [1, {options.experts}], got {options.top_k}")
    if options.heads < 1 or options.hidden % options.heads:
        parser.error(f"--hidden must be a multiple of --heads, got {options.hidden}")
    if options.out is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--out needs matplotlib: pip install 'fastmoe-route[bench]'")
    torch.set_num_threads(options.threads)
    config = Config(
        hidden=options.hidden, layers=options.layers, heads=options.heads,
        experts=options.experts, top_k=options.top_k, expert_width=options.expert_width,
        context=options.context, batch=options.batch,
    )  # fmt: skip
    runs = train(config, options.steps, options.rate, options.balance, options.seed)
    report(runs, config)
    if options.out is not None:
        plot(runs, config, options.out)
    return runs


if __name__ == "__main__":
    main()
