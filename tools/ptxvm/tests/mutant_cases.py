"""Small calls of the ops, by which mutants of their kernels are judged: each is checked.

Sizes end inside tiles, warps and packs; ids and scopes out of range stand for none.
"""

from __future__ import annotations

from functools import partial

import fastmoe_route as fr
import torch
from fastmoe_route import reference
from mutant_checks import Case, close, few_blocks, random
from mutant_expert_cases import (
    biased_product,
    experts,
    many_groups,
    native,
    permute,
    preactivations_of_padding,
    rows_of_no_expert,
    rows_of_stray_slots,
)

FAR = 2**32 - 1


def scopes_of(num_tokens: int, num_scopes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scopes of tokens, and which of them are out of range."""
    scopes = (torch.arange(num_tokens) % num_scopes).int()
    scopes[4::16] = -1
    scopes[5], scopes[-1] = num_scopes, 2**31 - 1
    return scopes, (scopes < 0) | (scopes >= num_scopes)


def apart_in_float64(values: torch.Tensor) -> torch.Tensor:
    """Of float64 few values, of which the later are larger by less than a float sees."""
    if values.dtype != torch.float64:
        return values
    return (4 * values).round() + 1e-12 * torch.arange(len(values))[:, None]


def plan(
    num_tokens: int,
    num_experts: int,
    *,
    ids: torch.dtype = torch.int64,
    has_strays: bool = True,
    has_none: bool = False,
    is_even: bool = True,
    blocks: int = FAR,
    weights: torch.dtype = torch.float32,
    **options: object,
) -> None:
    """The ids of all slots have one stride, or those of a token another than tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    experts = torch.randint(-1 if has_strays else 0, num_experts, (num_tokens, 2),
                            generator=generator).to(ids)  # fmt: skip
    if has_strays:
        experts[3, 1], experts[-2, 0], experts[7, 0] = num_experts, -2, 2**31 - 1
        experts[8:12, 0] = 4 * num_experts  # as 0 in the bits that a sort looks at
        experts[5] = torch.tensor([0, 1])
    if has_none:
        experts[:] = -1
    clean = experts.clone()
    clean[(experts < 0) | (experts >= num_experts)] = -1
    if options.get("drop_policy") == "score":
        chosen_by = torch.rand(num_tokens, 2, generator=generator).to(weights)
        options["weights"] = apart_in_float64(chosen_by)
        options["weights"][9::40] = torch.nan  # goes last
    made_with = dict(options)
    if "num_scopes" in options:
        made_with["scope_ids"], is_stray = scopes_of(num_tokens, options["num_scopes"])
        options["scope_ids"] = made_with["scope_ids"].masked_fill(is_stray, 0)
        clean[is_stray] = -1
    if not is_even:
        experts = experts.t().contiguous().t()
    with few_blocks(blocks, "walk_kernel"):
        made = fr.plan_dispatch(experts, num_experts, **made_with)
    max_rows = options.pop("max_rows", None)
    expected = reference.plan_dispatch(clean, num_experts, **options)
    if max_rows is not None:
        demand = expected.kept + expected.dropped
        is_used = expected.slot_to_row >= 0
        is_used &= is_used.flatten().cumsum(0).view(clean.shape) <= max_rows
        expected = reference.plan_dispatch(clean.masked_fill(~is_used, -1), num_experts)
        expected = expected._replace(
            row_to_slot=expected.row_to_slot[:max_rows], dropped=demand - expected.kept
        )
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def softmax(
    width: int, method: str, blocks: int, dtype: torch.dtype = torch.float32, first_row: int = 0
) -> None:
    x = random(9, width).to(dtype)
    x[4] *= 400  # exponentials of most are zero
    x[5, -1] = x[5].max() + 800
    x[6, -2:] = -torch.inf
    x[7, -1] = x[7].max() - 720
    x = x[first_row:].requires_grad_()
    wanted = torch.softmax(x.double(), -1)
    (expected,) = torch.autograd.grad(wanted.square().sum(), x)
    with few_blocks(blocks):
        y = fr.softmax(x, method=method)
        close(y * width, wanted * width)
        y.square().sum().backward()
    close(x.grad * width, expected * width)


def softmax_topk(
    width: int,
    k: int,
    ties: bool,
    dtype: torch.dtype = torch.float64,
    num_rows: int = 3,
    blocks: int = 2,
    numbers: int | None = None,
    is_sparse: bool = False,
    has_few_values: bool = False,
) -> None:
    x = random(num_rows, width).to(dtype)
    x[0] *= 100 if num_rows > 1 else 1
    if ties:
        x = (2 * x).round()
    if numbers is not None:
        x[:, : width - numbers] = -torch.inf
    if has_few_values:
        x = (x > 0).to(dtype) + (x > 2.3)
    if is_sparse:
        x[:, ::3], x[:, 1::3] = -torch.inf, torch.nan
    x.requires_grad_()
    with few_blocks(blocks):
        values, columns = fr.softmax_topk(x, k)
        p, wanted = reference.softmax_topk(x.detach(), k)
        assert torch.equal(columns, wanted)
        close(values * width, p * width)
        values.square().sum().backward()
    (expected,) = torch.autograd.grad(
        torch.softmax(x, -1).gather(-1, wanted).square().sum(), x, allow_unused=True
    )
    close(x.grad * width, expected * width)


def softmax_topk_stray_columns() -> None:
    """Columns that do not exist have no gradient and touch nothing."""
    x, grad = random(2, 40), random(2, 3, seed=1)
    columns = torch.tensor([[4, 9, 39], [0, 7, 8]])
    max, sum = (
        x.double().max(-1).values,
        (x - x.max(-1, keepdim=True).values).double().exp().sum(-1),
    )
    statistics = torch.stack([max, sum], -1)
    backward = torch.ops.fastmoe_route.softmax_topk_backward
    expected = backward(grad.index_fill(1, torch.tensor([1]), 0.0), x, statistics, columns)
    for stray in (-1, 40, 2**40):
        spoiled = columns.index_fill(1, torch.tensor([1]), stray)
        close(backward(grad, x, statistics, spoiled), expected)


def gate(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    blocks: int,
    dtype: torch.dtype = torch.float32,
    *,
    uses_weights: bool = True,
    **options: object,
) -> None:
    num_columns = num_experts + options.get("num_null", 0)
    logits = random(num_tokens, num_columns).to(dtype)
    if options.pop("has_empty", False):
        logits[2] = -torch.inf
    if options.pop("all_equal", False):
        logits[:], logits[:, 0] = 1.0, 2.0
    if options.pop("many_best", False):
        logits[:], logits[:, 0:80:4] = -1.0, 1.0
    if options.pop("has_nan", False):
        logits[3::7, num_experts - 1] = torch.nan
    if options.pop("few_finite", False):
        logits[1::3, 1:] = -torch.inf
    for name, seed in (("bias", 5), ("noise", 6)):
        if name in options:
            options[name] = random(num_tokens, num_columns, seed=seed)
    if "mask" in options:
        options["mask"] = random(num_tokens, num_columns, seed=7) > -0.5
        options["mask"][1, num_columns // 4 :] = False
    logits.requires_grad_()

    def loss(routing: fr.Routing) -> torch.Tensor:
        total = torch.zeros(())
        if uses_weights:
            total = total + (routing.weights.nan_to_num() * torch.arange(1, top_k + 1)).sum()
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


def reroute(
    num_tokens: int,
    num_candidates: int,
    capacity: int,
    *,
    ids: torch.dtype = torch.int32,
    weights: torch.dtype = torch.float32,
    **options: object,
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    experts = torch.randint(-1, 7, (num_tokens, num_candidates), generator=generator).to(ids)
    experts[2, 0], experts[-1, -1] = 7, -2
    experts[6:12, 1] = 32  # as 0 in the bits that a sort looks at
    if ids == torch.int64:
        experts[4, :3] = torch.tensor([2**32 + 3, 1, 3])
    clean = experts.clone()
    clean[(experts < 0) | (experts >= 7)] = -1
    asked = torch.rand(experts.shape, generator=generator).to(weights)
    made_with = dict(options)
    if "num_scopes" in options:
        made_with["scope_ids"], is_stray = scopes_of(num_tokens, options["num_scopes"])
        options["scope_ids"] = made_with["scope_ids"].masked_fill(is_stray, 0)
        clean[is_stray] = -1
    if options.get("overflow") == "local":
        ranks = (torch.arange(7) % 2).int(), (torch.arange(num_tokens) % 2).int()
        for chosen in (options, made_with):
            chosen["rank_of_expert"], chosen["rank_of_token"] = ranks
    made = fr.reroute((experts, asked), 7, 2, capacity, **made_with)
    expected = reference.reroute((clean, asked), 7, 2, capacity, **options)
    assert torch.equal(made.experts, expected.experts)
    assert torch.equal(made.weights, expected.weights)
    assert torch.equal(made.demand, expected.demand)


def expert_choice(num_scopes: int, dtype: torch.dtype = torch.float32) -> None:
    scores = apart_in_float64(random(300, 7).to(dtype))
    scores[9::40] = torch.nan  # goes last
    scores.requires_grad_()
    options, made_with = {}, {}
    if num_scopes > 1:
        scopes, is_stray = scopes_of(300, num_scopes)
        made_with = {"scope_ids": scopes, "num_scopes": num_scopes}
        options = made_with | {"scope_ids": scopes.masked_fill(is_stray, num_scopes)}
        options["num_scopes"] = num_scopes + 1  # one of those that are in none
    with few_blocks(2, "keys_kernel"):
        routing = fr.expert_choice(scores, 9, **made_with)
    expected = reference.expert_choice(scores, 9, **options)
    if num_scopes > 1:
        expected.experts[is_stray] = -1
        assert torch.equal(routing.experts, expected.experts)
    else:
        assert torch.equal(routing.experts, expected.experts)
        assert torch.equal(routing.demand, expected.demand)
    taken = routing.experts >= 0
    close(routing.weights[taken], scores[taken])
    assert torch.equal(routing.demand, taken.sum(0).int())
    routing.weights.sum().backward()


GROUPED = {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"}
CASES: dict[str, Case] = {
    "plan": partial(plan, 700, 8),
    "plan, aligned": partial(plan, 700, 8, align=4, capacity=30),
    "plan, by score": partial(plan, 700, 8, capacity=30, drop_policy="score"),
    "plan, scopes": partial(plan, 300, 8, capacity=9, num_scopes=3),
    "plan, many experts": partial(plan, 400, 2500, align=4, capacity=1),
    "plan, 600 experts": partial(plan, 700, 600, align=4),
    "plan, 300 experts": partial(plan, 700, 300),
    "plan, many rows": partial(plan, 2400, 8, align=2),
    "plan, several chunks": partial(plan, 66_000, 512, ids=torch.int32),
    "plan, nobody": partial(plan, 1000, 8, has_none=True),
    "plan, more padding than tiles": partial(plan, 700, 300, align=32),
    "plan, by score, int32": partial(
        plan, 300, 8, capacity=20, drop_policy="score", ids=torch.int32
    ),
    "plan, by score in float64": partial(
        plan, 300, 8, capacity=20, drop_policy="score", weights=torch.float64
    ),
    "plan, by score in bfloat16": partial(
        plan, 300, 8, capacity=20, drop_policy="score", weights=torch.bfloat16
    ),
    "plan, by score in float16": partial(
        plan, 300, 8, capacity=20, drop_policy="score", weights=torch.float16
    ),
    "plan, max_rows": partial(plan, 700, 8, max_rows=500),
    "plan, max_rows, int32": partial(plan, 700, 8, max_rows=500, ids=torch.int32),
    "plan, max_rows suffices": partial(plan, 700, 8, max_rows=1350),
    "plan, max_rows cuts the last": partial(plan, 700, 8, max_rows=1399, has_strays=False),
    "plan, max_rows cuts at a step": partial(plan, 700, 8, max_rows=544, has_strays=False),
    **{
        f"plan, max_rows {rows}, {name}": partial(plan, 700, 8, max_rows=rows, **options)
        for rows in range(500, 507)
        for name, options in (("capacity", {"capacity": 90}), ("scopes", {"num_scopes": 3}))
    },
    "plan, max_rows, uneven ids": partial(plan, 700, 8, max_rows=519, is_even=False),
    "plan, no slots": partial(plan, 0, 8, has_strays=False),
    "plan, padding of few blocks": partial(plan, 400, 2500, align=4, capacity=1, blocks=5),
    "plan, many experts, max_rows": partial(plan, 400, 2500, max_rows=500),
    "permute 8": partial(permute, 8, 2),
    "permute 33": partial(permute, 33, FAR),
    "permute 8, float64": partial(permute, 8, 2, torch.float64),
    "permute 9, float64, 9 choices": partial(permute, 9, 2, torch.float64, top_k=9),
    "permute 8, no weights": partial(permute, 8, 2, of="rows", has_weights=False),
    "permute 8, gradient of the rows": partial(permute, 8, 2, of="rows"),
    "permute 8, gradient of the weights": partial(permute, 8, 2, of="weights"),
    "softmax 200": partial(softmax, 200, "three_pass", 1),
    "softmax 200, every block": partial(softmax, 200, "online", FAR),
    "softmax 1500": partial(softmax, 1500, "three_pass", 2),
    "softmax 1499": partial(softmax, 1499, "online", 2),
    "softmax 1500, online": partial(softmax, 1500, "online", 2),
    "softmax 1501, float16": partial(softmax, 1501, "online", 2, torch.float16),
    "softmax 20000": partial(softmax, 20000, "online", 2),
    "softmax 11001": partial(softmax, 11_001, "online", 1, first_row=7),
    "softmax 28000": partial(softmax, 28_000, "online", 1, first_row=7),
    "softmax 66001": partial(softmax, 66_001, "online", 1, first_row=7),
    "softmax 66000, online": partial(softmax, 66_000, "online", 1, first_row=7),
    "softmax 66000, three_pass": partial(softmax, 66_000, "three_pass", 1, first_row=7),
    "softmax 200, float64": partial(softmax, 200, "online", 1, torch.float64),
    "softmax 300, float64": partial(softmax, 300, "online", 2, torch.float64),
    "softmax 300, float64, three_pass": partial(softmax, 300, "three_pass", 2, torch.float64),
    "softmax 301, float64": partial(softmax, 301, "online", 2, torch.float64),
    "softmax 301, float64, three_pass": partial(softmax, 301, "three_pass", 2, torch.float64),
    "softmax 400": partial(softmax, 400, "online", FAR),
    "softmax_topk 300": partial(softmax_topk, 300, 4, False),
    "softmax_topk 3000": partial(softmax_topk, 3000, 40, True, torch.float32),
    "softmax_topk 9000": partial(softmax_topk, 9000, 5, False),
    "softmax_topk 9000, ties": partial(softmax_topk, 9000, 64, True),
    "softmax_topk 300, masked": partial(softmax_topk, 300, 40, False, numbers=30),
    "softmax_topk 45, all of few numbers": partial(softmax_topk, 45, 45, False, is_sparse=True),
    "softmax_topk 4000, few values": partial(
        softmax_topk, 4000, 64, False, num_rows=1, has_few_values=True
    ),
    "softmax_topk 32768, few values": partial(
        softmax_topk, 32_768, 64, False, num_rows=1, has_few_values=True
    ),
    "softmax_topk 100": partial(softmax_topk, 100, 64, False),
    "softmax_topk 301": partial(softmax_topk, 301, 4, False),
    "softmax_topk 3001, one row": partial(softmax_topk, 3001, 4, False, torch.float32, 1),
    "softmax_topk 8200": partial(softmax_topk, 8200, 40, False, blocks=FAR),
    "softmax_topk 8201, float32": partial(softmax_topk, 8201, 40, False, torch.float32),
    "softmax_topk, merged twice": partial(softmax_topk, 262_154, 64, False, num_rows=1, blocks=FAR),
    "softmax_topk, stray columns": softmax_topk_stray_columns,
    "gate 8": partial(gate, 40, 8, 2, 2, stats=True, normalize=True),
    "gate 64": partial(gate, 40, 64, 6, 2, stats=True, normalize=True),
    "gate 99, not in packs": partial(gate, 20, 99, 4, 1, stats=True),
    "gate 5, with scores": partial(gate, 40, 5, 2, 1, stats=True, keep_scores=True),
    "gate 64, with scores": partial(gate, 20, 64, 6, 1, keep_scores=True),
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
    "gate 128, many best": partial(gate, 9, 128, 2, 1, many_best=True),
    "gate 128, many best and NaN": partial(gate, 40, 128, 2, 1, many_best=True, has_nan=True),
    "gate 64, few finite": partial(gate, 9, 64, 4, 1, few_finite=True, stats=True),
    "gate 20, groups": partial(gate, 20, 20, 4, 1, score="sigmoid", bias=True, **GROUPED),
    "gate 20, everything": partial(gate, 20, 20, 4, 1, noise=True, mask=True, bias=True),
    "gate, masked groups": partial(gate, 20, 40, 4, 1, mask=True, **GROUPED),
    "gate, bias and NaN": partial(gate, 20, 40, 30, 1, bias=True, has_nan=True),
    "gate, sigmoid and NaN": partial(
        gate, 20, 40, 4, 1, score="sigmoid", has_nan=True, keep_scores=True
    ),
    "gate 20, two rows a warp": partial(gate, 8200, 20, 1, 64, stats=True, has_nan=True),
    "gate 12, hard rows": partial(gate, 40, 12, 2, 1, has_nan=True, has_empty=True, stats=True),
    "gate, threshold, normalized": partial(gate, 20, 40, 6, 1, threshold=0.03, normalize=True),
    "gate 400, share of a group": partial(
        gate, 40, 400, 6, 1, num_groups=4, max_per_group=2, stats=True
    ),
    "gate 64, K = 17": partial(gate, 20, 64, 17, 1, normalize=True, stats=True),
    "gate 256, K = 41": partial(gate, 12, 256, 41, 1, score="sigmoid", normalize=True),
    "gate 100, equal, K = 20": partial(gate, 9, 100, 20, 1, all_equal=True),
    "gate 40, few finite, K = 17": partial(gate, 9, 40, 17, 1, few_finite=True, has_empty=True),
    "gate 300, K = 70": partial(gate, 12, 300, 70, 1, stats=True),
    "gate 300, equal, K = 35": partial(gate, 9, 300, 35, 1, all_equal=True),
    "gate 70, masked, K = 33": partial(gate, 12, 70, 33, 1, mask=True, has_nan=True, stats=True),
    "gate 520, softmax over wide groups": partial(
        gate, 9, 520, 4, 1, softmax_over="group", stats=True, **GROUPED
    ),
    "gate 20, sigmoid, statistics": partial(gate, 20, 20, 4, 1, score="sigmoid", stats=True),
    "gate 64, float16": partial(gate, 20, 64, 6, 1, torch.float16, stats=True),
    "gate 256, float16": partial(gate, 20, 256, 6, 1, torch.float16, stats=True),
    "gate 64, gradient of the statistics": partial(
        gate, 20, 64, 6, 1, stats=True, uses_weights=False
    ),
    "gate 300, threshold, normalized": partial(gate, 20, 300, 6, 1, threshold=0.02, normalize=True),
    "gate 300": partial(gate, 20, 300, 8, 1, stats=True, normalize=True),
    "gate 1500": partial(gate, 12, 1500, 20, 1, score="sigmoid", stats=True, **GROUPED),
    "gate 8000": partial(gate, 5, 8000, 4, 1, score="sigmoid", stats=True, **GROUPED),
    "reroute": partial(reroute, 150, 4, 40),
    "reroute, local, filled": partial(
        reroute, 90, 5, 20, overflow="local", fill="turned_away", drop_policy="score"
    ),
    "reroute, scopes": partial(reroute, 90, 40, 9, fill="any", num_scopes=3),
    "reroute, int64": partial(
        reroute, 90, 5, 20, ids=torch.int64, weights=torch.bfloat16, drop_policy="score"
    ),
    "reroute, int64, scopes": partial(reroute, 90, 5, 9, ids=torch.int64, num_scopes=3),
    "expert_choice": partial(expert_choice, 1),
    "expert_choice, scopes": partial(expert_choice, 3),
    "expert_choice, float64": partial(expert_choice, 1, torch.float64),
    "expert_choice, bfloat16": partial(expert_choice, 1, torch.bfloat16),
    "expert_choice, float16": partial(expert_choice, 1, torch.float16),
    "experts, bfloat16": partial(experts, torch.bfloat16, True, 1),
    "experts, float16": partial(experts, torch.float16, False, FAR),
    "experts, float32": partial(experts, torch.float32, True, 1),
    "experts, many rows": partial(experts, torch.bfloat16, False, 1, num_tokens=260),
    "experts, tf32": partial(experts, torch.float32, True, 1, 72, True),
    "experts, 33 wide": partial(experts, torch.bfloat16, True, 2, 33),
    "experts, bfloat16, inference": partial(experts, torch.bfloat16, False, FAR, trains=False),
    "experts, 33 wide, inference": partial(experts, torch.bfloat16, True, 2, 33, trains=False),
    "experts, float32, 33 wide": partial(experts, torch.float32, True, 1, 33),
    "experts, float32, 33 wide, ungated": partial(
        experts, torch.float32, False, FAR, 33, activation="silu", weights_on="input"
    ),
    "experts, float32, 33 wide, interleaved": partial(
        experts, torch.float32, False, FAR, 33, interleaved=True, trains=False
    ),
    "experts, float32, 33 wide, interleaved, biased": partial(
        experts, torch.float32, True, FAR, 33, interleaved=True
    ),
    "experts, float32, 33 wide, unbiased": partial(experts, torch.float32, False, FAR, 33),
    "experts, float32, 5 wide": partial(experts, torch.float32, False, FAR, 5),
    "experts, float32, weights on input": partial(
        experts, torch.float32, False, FAR, 24, weights_on="input"
    ),
    "experts, interleaved, unbiased": partial(
        experts, torch.bfloat16, False, FAR, interleaved=True
    ),
    "experts, ungated, no holes": partial(
        experts, torch.bfloat16, False, FAR, activation="silu", has_holes=False
    ),
    "experts, 33 wide, ungated, no holes": partial(
        experts, torch.bfloat16, False, FAR, 33, activation="silu", has_holes=False
    ),
    "experts, interleaved": partial(experts, torch.bfloat16, True, FAR, interleaved=True),
    "experts, ungated": partial(experts, torch.bfloat16, False, FAR, activation="gelu"),
    "experts, ungated, biased": partial(experts, torch.bfloat16, True, FAR, activation="relu"),
    "experts, 33 wide, ungated": partial(
        experts, torch.float16, True, 2, 33, activation="relu", weights_on="input"
    ),
    "experts, weights on input": partial(experts, torch.bfloat16, True, FAR, weights_on="input"),
    "experts, aligned": partial(experts, torch.bfloat16, True, FAR, align=128),
    "experts, 33 wide, aligned": partial(experts, torch.bfloat16, True, 2, 33, align=4),
    "experts, float32, 33 wide, aligned": partial(experts, torch.float32, True, 1, 33, align=4),
    "experts, rows of no expert": rows_of_no_expert,
    "experts, rows of stray slots": rows_of_stray_slots,
    "experts, preactivations of padding": preactivations_of_padding,
    "product, biased": biased_product,
    "many groups": partial(many_groups, 1),
    "native": partial(native, FAR, 7),
    "native, few blocks": partial(native, 1, 300),
}
