"""One user's tokens push out another's: the buffer overflow of arXiv:2402.05526, and what stops it.

A server puts the requests of several users into one batch and runs a Mixture-of-Experts layer whose
experts have a capacity. A victim sends one request. An attacker sends requests of its own, placed
in front, made of tokens that choose the victim's experts: it searches a pool of random tokens by
the experts they are sent to, which the paper calls a search guided by expert assignments. The
weights of the layer are not touched, and the victim's tokens are the same in every run.

For each serving rule the script says how many expert slots of the victim are left, how far its
output moves, and whether its bits are those it gets when it is alone.

    python examples/buffer_overflow.py --out buffer_overflow.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fastmoe_route as fr
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How a server fits requests into its experts."""

    name: str
    shared: bool = True  # one capacity for the batch, or one per request
    capacity: bool = True
    drop_policy: str = "position"
    overflow: str = "drop"

    @property
    def tag(self) -> str:
        """What a token's result depends on."""
        return fr.dispatch_invariance(
            "I",
            capacity=1 if self.capacity else None,
            scoped=not self.shared,
            drop_policy=self.drop_policy,
            overflow=self.overflow,
        )


RULES = (
    Rule("shared capacity"),
    Rule("shared, best scores first", drop_policy="score"),
    Rule("shared, next best expert", overflow="next"),
    Rule("capacity per request", shared=False),
    Rule("no capacity", capacity=False),
)


@dataclass
class Outcome:
    """One rule against a growing number of attacking requests."""

    rule: Rule
    attackers: list[int] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)  # share of the victim's slots with their expert
    change: list[float] = field(default_factory=list)  # |y - y alone| / |y alone|
    same_bits: list[bool] = field(default_factory=list)


class Layer:
    """A router and experts with random weights, served under a rule."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Draws the weights from the seed."""
        torch.manual_seed(args.seed)
        self.num_experts, self.top_k, self.factor = args.experts, args.top_k, args.capacity_factor
        self.length, hidden, width = args.length, args.hidden, args.hidden
        self.router = 3.0 * torch.randn(hidden, args.experts) / hidden**0.5
        self.w_up = torch.randn(args.experts, hidden, 2 * width) / hidden**0.5
        self.w_down = torch.randn(args.experts, width, hidden) / width**0.5

    def gate(self, x: Tensor) -> fr.Routing:
        """Every token's experts, best first, and their softmax weights."""
        return fr.gate(x @ self.router, self.num_experts)

    def serve(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """The outputs of a batch of requests of equal length, and which slots got their expert."""
        num_requests = x.shape[0] // self.length
        routing = self.gate(x)
        wanted = routing.experts[:, : self.top_k]
        pair = (routing.experts, routing.weights)
        options = {}
        if rule.capacity:
            tokens = x.shape[0] if rule.shared else self.length
            capacity = fr.expert_capacity(tokens, self.num_experts, self.top_k, self.factor)
            if not rule.shared:
                scopes = torch.arange(num_requests).repeat_interleave(self.length)
                options = {"scope_ids": scopes.int(), "num_scopes": num_requests}
            routed = fr.reroute(
                pair,
                self.num_experts,
                self.top_k,
                capacity,
                overflow=rule.overflow,
                drop_policy=rule.drop_policy,
                **options,
            )
            pair = (routed.experts, routed.weights)
        else:
            pair = (wanted, routing.weights[:, : self.top_k])
        got = (wanted[:, :, None] == pair[0][:, None, :]).any(2)
        return fr.moe_mlp(x, pair, self.w_up, self.w_down), got


def attacking_tokens(layer: Layer, victim: Tensor, count: int) -> Tensor:
    """Tokens of a random pool whose first choices are the experts the victim asks most for.

    Full experts are what harms: the attack aims at fewer than its first choices could fill, so that
    these overflow, and takes the tokens of the pool that want them most.
    """
    num_targets = max(1, int(layer.num_experts / (layer.top_k * layer.factor)) - 1)
    first_choices = layer.gate(victim).experts[:, 0].long()
    wanted = torch.bincount(first_choices, minlength=layer.num_experts)
    targets = wanted.argsort(descending=True, stable=True)[:num_targets]
    pool = rms_norm(torch.randn(32 * max(count, 128), victim.shape[1]))
    experts, weights = layer.gate(pool)[:2]
    per_target = -(-count // num_targets)
    picks = [
        torch.where(experts[:, 0] == target, weights[:, 0], -1.0).topk(per_target).indices
        for target in targets
    ]
    return pool[torch.stack(picks, 1).flatten()[:count]]


def rms_norm(x: Tensor) -> Tensor:
    """Tokens as a transformer hands them to its router."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:])


def run(args: argparse.Namespace) -> list[Outcome]:
    """Every rule against every number of attacking requests."""
    layer = Layer(args)
    topic = torch.randn(1, args.hidden)
    victim = rms_norm(topic + args.spread * torch.randn(args.length, args.hidden))
    attack = attacking_tokens(layer, victim, max(args.attackers) * args.length)
    outcomes = []
    for rule in RULES:
        outcome = Outcome(rule)
        alone, _ = layer.serve(victim, rule)
        for count in args.attackers:
            batch = torch.cat([attack[: count * args.length], victim])
            y, got = layer.serve(batch, rule)
            y, got = y[-args.length :], got[-args.length :]
            outcome.attackers.append(count)
            outcome.kept.append(got.float().mean().item())
            outcome.change.append(((y - alone).norm() / alone.norm()).item())
            outcome.same_bits.append(torch.equal(y, alone))
        outcomes.append(outcome)
    return outcomes


def report(outcomes: Sequence[Outcome]) -> None:
    """A table on standard output."""
    print(f"{'rule':27s} tag  attacking requests: victim's slots kept, change of its output")
    for outcome in outcomes:
        cells = [
            f"{n}: {kept:4.0%} {'same bits' if same else f'{change:.2f}'}"
            for n, kept, change, same in zip(
                outcome.attackers, outcome.kept, outcome.change, outcome.same_bits, strict=True
            )
        ]
        print(f"{outcome.rule.name:27s} {outcome.rule.tag:3s}  " + "   ".join(cells))


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Slots kept and change of the output over the number of attacking requests."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = ("o-", "s-", "^-", "v--", "D:")
    for outcome, style in zip(outcomes, styles, strict=True):
        look = {"label": f"{outcome.rule.name} ({outcome.rule.tag})", "alpha": 0.8}
        if style == "o-":  # seen around the curve that lies on it
            look |= {"markersize": 11, "markerfacecolor": "none", "linewidth": 4}
        places = range(len(outcome.attackers))
        left.plot(places, [100 * kept for kept in outcome.kept], style, **look)
        right.plot(places, outcome.change, style, **look)
    for axes in (left, right):
        axes.set_xticks(range(len(outcomes[0].attackers)), [str(n) for n in outcomes[0].attackers])
        axes.set_xlabel("attacking requests in the batch")
        axes.grid(alpha=0.3)
    left.set_ylabel("victim's slots that get their expert, %")
    left.set_ylim(0, 105)
    right.set_ylabel("change of the victim's output\n|y - y alone| / |y alone|")
    right.legend(loc="center right", fontsize=8)
    figure.suptitle("One user's tokens against another's experts (arXiv:2402.05526)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--experts", type=int, default=16, help="experts of the layer")
    add("--top-k", type=int, default=2, help="experts per token")
    add("--hidden", type=int, default=64, help="hidden size")
    add("--length", type=int, default=32, help="tokens of a request")
    add("--capacity-factor", type=float, default=2.0, help="capacity over the even share")
    add("--spread", type=float, default=2.5, help="how unlike the victim's tokens")
    add("--attackers", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16, 32], help="their requests")
    add("--seed", type=int, default=0, help="seed of weights and requests")
    add("--out", type=Path, help="where the figure goes; none without it")
    args = parser.parse_args(argv)
    for name in ("experts", "top_k", "hidden", "length"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(args, name)}")
    if args.top_k > args.experts:
        parser.error(f"--top-k must be in [1, {args.experts}], got {args.top_k}")
    if min(args.attackers) < 0:
        parser.error(f"--attackers must be at least 0, got {min(args.attackers)}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Runs, reports, and draws if asked to."""
    args = parse(argv)
    outcomes = run(args)
    report(outcomes)
    if args.out:
        plot(outcomes, args.out)
        print(f"written: {args.out}")
    return outcomes


if __name__ == "__main__":
    main()
