"""Small calls of the ops, by which mutants of their kernels are judged: each is checked.

`few_blocks` shrinks the launches of the kernels whose names hold its text, which walk on by the
size of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import fastmoe_route as fr
import torch
from engine_fixture import engine
from fastmoe_route import reference

Case = Callable[[], None]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 2%: enough to tell a mutant from the kernel, whatever the dtype rounds."""
    a, e = actual.detach().double(), expected.detach().double()
    is_same = (a == e) | (a.isnan() & e.isnan())
    assert bool((is_same | ((a - e).abs() <= 2e-2 * (1 + e.abs()))).all())


@contextmanager
def few_blocks(count: int, kernels: str = "") -> Iterator[None]:
    engine().set_options(most_blocks=count, few=kernels)
    try:
        yield
    finally:
        engine().set_options(most_blocks=2**32 - 1)


def plan(num_tokens: int, num_experts: int, **options: object) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    experts = torch.randint(-1, num_experts, (num_tokens, 2), generator=generator)
    if options.get("drop_policy") == "score":
        options["weights"] = torch.rand(num_tokens, 2, generator=generator)
    if "num_scopes" in options:
        options["scope_ids"] = (torch.arange(num_tokens) % options["num_scopes"]).int()
    made = fr.plan_dispatch(experts, num_experts, **options)
    if options.get("max_rows"):
        return
    expected = reference.plan_dispatch(experts, num_experts, **options)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def permute(width: int, blocks: int, dtype: torch.dtype = torch.float32) -> None:
    experts = torch.randint(-1, 5, (60, 3), generator=torch.Generator().manual_seed(1))
    made = fr.plan_dispatch(experts, 5, align=4)
    x = random(60, width).to(dtype)
    with few_blocks(blocks):
        rows = fr.permute(x, made)
        assert torch.equal(rows, reference.permute(x, made))
        weights = random(60, 3).to(dtype).requires_grad_()
        close(fr.unpermute(rows, made, weights), reference.unpermute(rows, made, weights))
        rows = rows.requires_grad_()
        expected = torch.autograd.grad(
            reference.unpermute(rows, made, weights).square().sum(), (rows, weights)
        )
        fr.unpermute(rows, made, weights).square().sum().backward()
    close(rows.grad, expected[0])
    close(weights.grad, expected[1])


def softmax(width: int, method: str, blocks: int, dtype: torch.dtype = torch.float32) -> None:
    x = random(9, width).to(dtype).requires_grad_()
    wanted = torch.softmax(x.double(), -1)
    (expected,) = torch.autograd.grad(wanted.square().sum(), x)
    with few_blocks(blocks):
        y = fr.softmax(x, method=method)
        close(y * width, wanted * width)
        y.square().sum().backward()
    close(x.grad * width, expected * width)


def softmax_topk(width: int, k: int, ties: bool, dtype: torch.dtype = torch.float64) -> None:
    x = random(3, width).to(dtype)
    if ties:
        x = (2 * x).round()
    x.requires_grad_()
    with few_blocks(2):
        values, columns = fr.softmax_topk(x, k)
        p, wanted = reference.softmax_topk(x.detach(), k)
        assert torch.equal(columns, wanted)
        close(values * width, p * width)
        values.square().sum().backward()
    (expected,) = torch.autograd.grad(
        torch.softmax(x, -1).gather(-1, wanted).square().sum(), x, allow_unused=True
    )
    close(x.grad * width, expected * width)


def gate(num_tokens: int, num_experts: int, top_k: int, blocks: int, **options: object) -> None:
    num_columns = num_experts + options.get("num_null", 0)
    logits = random(num_tokens, num_columns)
    if options.pop("has_nan", False):
        logits[3::7, num_experts - 1] = torch.nan
    if options.pop("has_empty", False):
        logits[2] = -torch.inf
    if options.pop("all_equal", False):
        logits[:], logits[:, 0] = 1.0, 2.0
    for name, seed in (("bias", 5), ("noise", 6)):
        if name in options:
            options[name] = random(num_tokens, num_columns, seed=seed)
    if "mask" in options:
        options["mask"] = random(num_tokens, num_columns, seed=7) > -0.5
    logits.requires_grad_()

    def loss(routing: fr.Routing) -> torch.Tensor:
        total = (routing.weights.nan_to_num() * torch.arange(1, top_k + 1)).sum()
        for more in (routing.score_sum, routing.logsumexp, routing.scores):
            if more is not None:
                total = total + (more.nan_to_num(neginf=0.0).square()).sum()
        return total

    expected = reference.gate(logits, top_k, **options)
    (wanted,) = torch.autograd.grad(loss(expected), logits)
    with few_blocks(blocks, "gate_"):
        routing = fr.gate(logits, top_k, **options)
        assert torch.equal(routing.experts, expected.experts)
        assert torch.equal(routing.demand, expected.demand)
        close(routing.weights, expected.weights)
        for mine, theirs in (
            (routing.score_sum, expected.score_sum),
            (routing.logsumexp, expected.logsumexp),
            (routing.scores, expected.scores),
        ):
            if theirs is not None:
                close(mine, theirs)
        loss(routing).backward()
    clean = ~logits.detach().isnan().any(-1)
    close(logits.grad[clean], wanted[clean])


def reroute(num_tokens: int, num_candidates: int, capacity: int, **options: object) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    experts = torch.randint(-1, 7, (num_tokens, num_candidates), generator=generator).int()
    routing = experts, torch.rand(experts.shape, generator=generator)
    if "num_scopes" in options:
        options["scope_ids"] = (torch.arange(num_tokens) % options["num_scopes"]).int()
    if options.get("overflow") == "local":
        options["rank_of_expert"] = (torch.arange(7) % 2).int()
        options["rank_of_token"] = (torch.arange(num_tokens) % 2).int()
    made = fr.reroute(routing, 7, 2, capacity, **options)
    expected = reference.reroute(routing, 7, 2, capacity, **options)
    assert torch.equal(made.experts, expected.experts)
    assert torch.equal(made.weights, expected.weights)
    assert torch.equal(made.demand, expected.demand)


def expert_choice(num_scopes: int) -> None:
    scores = random(300, 7).requires_grad_()
    scopes = {"scope_ids": (torch.arange(300) % num_scopes).int(), "num_scopes": num_scopes}
    options = scopes if num_scopes > 1 else {}
    with few_blocks(2, "keys_kernel"):
        routing = fr.expert_choice(scores, 9, **options)
    expected = reference.expert_choice(scores, 9, **options)
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.demand, expected.demand)
    routing.weights.sum().backward()


def experts(
    dtype: torch.dtype,
    has_bias: bool,
    blocks: int,
    width: int = 72,
    allows_tf32: bool = False,
    num_tokens: int = 70,
) -> None:
    ids = torch.randint(-1, 3, (num_tokens, 2), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(num_tokens, 2, generator=torch.Generator().manual_seed(2))
    leaves = [
        (random(num_tokens, width) / 8),
        (random(3, width, 2 * width, seed=1) / 8),
        (random(3, width, width, seed=2) / 8),
    ]
    if has_bias:
        leaves += [random(3, 2 * width, seed=3), random(3, width, seed=4)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    weights.requires_grad_()

    def run(module: object) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        biases = {"bias_up": leaves[3], "bias_down": leaves[4]} if has_bias else {}
        y = module.moe_mlp(leaves[0], (ids.int(), weights), leaves[1], leaves[2], **biases)
        return y, torch.autograd.grad(y.float().square().sum(), [*leaves, weights])

    expected, wanted = run(reference)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allows_tf32 else before)
    try:
        with few_blocks(blocks):
            y, grads = run(fr)
    finally:
        torch.set_float32_matmul_precision(before)
    close(y, expected)
    for mine, theirs in zip(grads, wanted, strict=True):
        close(mine / theirs.abs().max(), theirs / theirs.abs().max())


def many_groups(blocks: int) -> None:
    """More experts than the threads of the kernel that lays out the groups, some without rows."""
    counts = torch.arange(700) % 3
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    x = random(int(counts.sum()) + 5, 8).bfloat16().requires_grad_()
    w = random(700, 8, 8, seed=1).bfloat16().requires_grad_()
    bias = random(700, 8, seed=2).bfloat16().requires_grad_()
    expected = reference.grouped_mm(x, w, offsets, bias=bias)
    wanted = torch.autograd.grad(expected.float().square().sum(), (x, w, bias))
    with few_blocks(blocks):
        y = fr.grouped_mm(x, w, offsets, bias=bias)
        grads = torch.autograd.grad(y.float().square().sum(), (x, w, bias))
    close(y / 8, expected / 8)
    for mine, theirs in zip(grads, wanted, strict=True):
        close(mine / theirs.abs().max(), theirs / theirs.abs().max())


FAR = 2**32 - 1
GROUPED = {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"}
CASES: dict[str, Case] = {
    "plan": partial(plan, 700, 8),
    "plan, aligned": partial(plan, 700, 8, align=4, capacity=30),
    "plan, by score": partial(plan, 700, 8, capacity=30, drop_policy="score"),
    "plan, scopes": partial(plan, 300, 8, capacity=9, num_scopes=3),
    "plan, many experts": partial(plan, 400, 2500, align=4, capacity=1),
    "plan, 600 experts": partial(plan, 700, 600, align=4),
    "plan, max_rows": partial(plan, 700, 8, max_rows=500),
    "plan, many experts, max_rows": partial(plan, 400, 2500, max_rows=500),
    "permute 8": partial(permute, 8, 2),
    "permute 33": partial(permute, 33, FAR),
    "permute 8, float64": partial(permute, 8, 2, torch.float64),
    "softmax 200": partial(softmax, 200, "three_pass", 1),
    "softmax 1500": partial(softmax, 1500, "three_pass", 2),
    "softmax 1499": partial(softmax, 1499, "online", 2),
    "softmax 1500, online": partial(softmax, 1500, "online", 2),
    "softmax 200, float64": partial(softmax, 200, "online", 1, torch.float64),
    "softmax 300, float64": partial(softmax, 300, "online", 2, torch.float64),
    "softmax 300, float64, three_pass": partial(softmax, 300, "three_pass", 2, torch.float64),
    "softmax 400": partial(softmax, 400, "online", FAR),
    "softmax_topk 300": partial(softmax_topk, 300, 4, False),
    "softmax_topk 3000": partial(softmax_topk, 3000, 40, True, torch.float32),
    "softmax_topk 9000": partial(softmax_topk, 9000, 5, False),
    "softmax_topk 9000, ties": partial(softmax_topk, 9000, 64, True),
    "gate 8": partial(gate, 40, 8, 2, 2, stats=True, normalize=True),
    "gate 64": partial(gate, 40, 64, 6, 2, stats=True, normalize=True),
    "gate 100, equal": partial(gate, 9, 100, 4, 1, stats=True, all_equal=True),
    "gate 64, equal": partial(gate, 9, 64, 2, 1, all_equal=True),
    "gate 128, sigmoid": partial(gate, 20, 128, 8, 1, score="sigmoid", stats=True),
    "gate 256, hard rows": partial(gate, 20, 256, 8, 1, has_nan=True, has_empty=True, stats=True),
    "gate 20, hard rows": partial(gate, 40, 20, 4, 1, has_nan=True),
    "gate 64, hard rows": partial(gate, 40, 64, 8, 1, has_nan=True, has_empty=True),
    "gate 256, hard rows, no statistics": partial(gate, 40, 256, 8, 1, has_nan=True),
    "gate, groups": partial(gate, 20, 40, 4, 1, score="sigmoid", bias=True, **GROUPED),
    "gate, softmax over groups": partial(
        gate, 20, 40, 4, 1, softmax_over="group", stats=True, has_nan=True, **GROUPED
    ),
    "gate, noise": partial(gate, 20, 72, 5, 1, noise=True, mask=True, num_null=3, top_p=0.4),
    "gate, noise and scores": partial(
        gate, 20, 72, 5, 1, noise=True, threshold=0.01, keep_scores=True, stats=True
    ),
    "gate, noise over groups": partial(
        gate, 20, 40, 4, 1, softmax_over="group", noise=True, bias=True, **GROUPED
    ),
    "gate, share of the best groups": partial(
        gate, 20, 40, 6, 1, score="sigmoid", bias=True, max_per_group=4, **GROUPED
    ),
    "gate, share of a group": partial(gate, 20, 40, 6, 1, num_groups=4, max_per_group=2),
    "gate 300": partial(gate, 20, 300, 8, 1, stats=True, normalize=True),
    "gate 1500": partial(gate, 12, 1500, 20, 1, score="sigmoid", stats=True, **GROUPED),
    "gate 8000": partial(gate, 5, 8000, 4, 1, score="sigmoid", stats=True, **GROUPED),
    "reroute": partial(reroute, 150, 4, 40),
    "reroute, local, filled": partial(
        reroute, 90, 5, 20, overflow="local", fill="turned_away", drop_policy="score"
    ),
    "reroute, scopes": partial(reroute, 90, 40, 9, fill="any", num_scopes=3),
    "expert_choice": partial(expert_choice, 1),
    "expert_choice, scopes": partial(expert_choice, 3),
    "experts, bfloat16": partial(experts, torch.bfloat16, True, 1),
    "experts, float16": partial(experts, torch.float16, False, FAR),
    "experts, float32": partial(experts, torch.float32, True, 1),
    "experts, many rows": partial(experts, torch.bfloat16, False, 1, num_tokens=260),
    "experts, tf32": partial(experts, torch.float32, True, 1, 72, True),
    "experts, 33 wide": partial(experts, torch.bfloat16, True, 2, 33),
    "many groups": partial(many_groups, 1),
}
