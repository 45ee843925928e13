"""gate and softmax_topk against a second reading of the contract, one column at a time.

`spec_*` below are plain Python on lists, written from the text of the contract alone and sharing
nothing with the kernels or with `fastmoe_route.reference`. Inputs are chosen so that float32
decides as exact arithmetic does: eighths where scores are numbers as they stand (`identity`,
`relu`), ties included, and random normal numbers where they are not. What the latter leave to
rounding, such as two groups whose scores both sum to 1, is left out and counted.
"""

from __future__ import annotations

import itertools
import math
import random

import fastmoe_route as fr
import pytest
import torch

INF, NAN = math.inf, math.nan


class LeftToRoundingError(Exception):
    """A choice that hangs on less than float32 resolves."""


def decide(values, size_of_terms):
    """Raises where two values are closer than float32 resolves and yet not equal."""
    for a, b in itertools.pairwise(sorted(values)):
        if a < b <= a + 1e-6 * (abs(a) + abs(b) + size_of_terms):
            raise LeftToRoundingError


def spec_scores(z, score, groups):
    """Step 1: the scores of one row of numbers."""
    if score == "softmax":
        size = len(z) // groups
        out = []
        for g in range(groups):
            part = z[g * size : (g + 1) * size]
            top = max(part)
            powers = [0.0 if v == -INF else math.exp(v - top) for v in part]
            out += [p / sum(powers) if sum(powers) else 0.0 for p in powers]
        return out
    one = {
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "sqrtsoftplus": lambda v: math.sqrt(math.log1p(math.exp(v))),
        "relu": lambda v: max(v, 0.0),
        "identity": lambda v: v,
    }[score]
    if score in ("sigmoid", "sqrtsoftplus"):
        return [0.0 if v == -INF else one(v) for v in z]
    return [one(v) for v in z]


def spec_group_score(members, keys, how):
    """Step 3: what a group is ranked by; None if none of it is allowed."""
    best = sorted((keys[c] for c in members), reverse=True)[: 1 if how == "max" else 2]
    return sum(best) if best else None


def spec_row(z, case, t):
    """The choice and the weights of one row without NaN."""
    columns, nulls = len(z), case["num_null"]
    experts, groups = columns - nulls, case["num_groups"]
    size = columns // groups
    parts = groups if case["softmax_over"] == "group" else 1
    clean = spec_scores(z, case["score"], parts)
    noise, bias, mask = [v[t] if v and isinstance(v[0], list) else v for v in case["rows"]][:3]
    noisy = [a + b for a, b in zip(z, noise, strict=True)] if noise else z
    keys = spec_scores(noisy, case["score"], parts) if noise else list(clean)
    if bias:
        keys = [a + b for a, b in zip(keys, bias, strict=True)]
    monotone = case["score"] != "relu" and parts == 1
    rank = noisy if monotone and not bias else keys
    allowed = [c for c in range(columns) if z[c] != -INF and (not mask or mask[c])]
    live = bool(allowed)
    size_of_terms = 1.0 if bias or noise else 0.0  # their sum may be near 0
    if case["topk_groups"] is not None:
        values = rank if case["group_score"] == "max" else keys
        scored = [
            (-s, g)
            for g in range(groups)
            if (
                s := spec_group_score(
                    [c for c in allowed if c // size == g], values, case["group_score"]
                )
            )
            is not None
        ]
        decide([s for s, _ in scored], size_of_terms)
        sizes = [sum(c // size == g for c in allowed) for _, g in scored]
        if case["group_score"] == "top2_sum" and parts > 1:
            for (a, _), n in zip(scored, sizes, strict=True):
                if n > 1 and [s for s, _ in scored].count(a) > 1:  # both are 1 but for rounding
                    raise LeftToRoundingError
        open_groups = {g for _, g in sorted(scored)[: case["topk_groups"]]}
        allowed = [c for c in allowed if c // size in open_groups]
    limit = case["top_k"]
    if case["k_per_token"] is not None:
        limit = min(max(case["k_per_token"][t], 0), limit)
    decide([rank[c] for c in allowed], size_of_terms)
    pick, real, cumulative, stopped, quota = [], 0, 0.0, False, [0] * groups
    for c in sorted(allowed, key=lambda c: (-rank[c], c)):
        if len(pick) == limit:
            break
        if case["max_per_group"] is not None and quota[c // size] >= case["max_per_group"]:
            continue
        if case["threshold"] is not None:
            stopped |= not keys[c] > case["threshold"]
            decide([keys[c], case["threshold"]], size_of_terms)
        if stopped and real >= case["min_k"]:
            break
        pick.append(c)
        real += c < experts
        quota[c // size] += 1
        cumulative += clean[c]
        if case["top_p"] is not None:
            stopped |= cumulative > case["top_p"]
            decide([cumulative, case["top_p"]], 0.0)
    pick = [c for c in pick if c < experts]
    weights = [clean[c] for c in pick]
    if case["normalize"]:
        total = max(sum(weights), 1e-20)
        weights = [w / total for w in weights]
    return pick, [w * case["scale"] for w in weights], clean[:experts], live


def random_case(rng):
    score = rng.choice(("softmax", "sigmoid", "sqrtsoftplus", "relu", "identity"))
    groups = rng.choice((1, 1, 1, 2, 4, 8))
    experts = groups * rng.choice((1, 2, 3, 4, 5, 8, 16, 17, 33))
    case = {"score": score, "num_groups": groups, "top_k": rng.randint(1, min(experts, 20))}
    if rng.random() < 0.1:
        case["top_k"] = experts
    case["num_null"] = rng.randint(1, 3) if groups == 1 and rng.random() < 0.2 else 0
    case["topk_groups"] = rng.randint(1, groups) if rng.random() < 0.7 and groups > 1 else None
    case["group_score"] = rng.choice(("max", "top2_sum"))
    case["max_per_group"] = rng.randint(1, 4) if groups > 1 and rng.random() < 0.2 else None
    case["softmax_over"] = rng.choice(("all", "group")) if score == "softmax" else "all"
    case["top_p"] = rng.uniform(0, 1.5) if rng.random() < 0.2 else None
    case["threshold"] = rng.uniform(-0.5, 0.5) if rng.random() < 0.2 else None
    case["min_k"] = rng.randint(0, case["top_k"]) if rng.random() < 0.4 else min(1, case["top_k"])
    case["normalize"] = rng.random() < 0.5
    case["scale"] = rng.choice((1.0, 2.5))
    tokens, columns = rng.randint(1, 9), experts + case["num_null"]
    exact = score in ("relu", "identity")

    def number():
        return rng.randint(-32, 32) / 8 if exact else rng.gauss(0, 2)

    def matrix(make, chance):
        if rng.random() >= chance:
            return None
        if rng.random() < 0.5:
            return [make() for _ in range(columns)]
        return [[make() for _ in range(columns)] for _ in range(tokens)]

    hole = rng.choice((0.0, 0.0, 0.3, 0.9))
    case["logits"] = [
        [-INF if rng.random() < hole else number() for _ in range(columns)] for _ in range(tokens)
    ]
    bias = matrix(number, 0.3)
    mask = matrix(lambda: rng.random() < 0.6, 0.3)
    noise = [[number() for _ in range(columns)] for _ in range(tokens)]
    case["rows"] = [noise if rng.random() < 0.2 else None, bias, mask]
    limits = [rng.randint(-1, case["top_k"] + 1) for _ in range(tokens)]
    case["k_per_token"] = limits if rng.random() < 0.2 else None
    return case


def run(case):
    noise, bias, mask = case["rows"]
    names = (
        "score", "num_groups", "top_k", "num_null", "topk_groups", "group_score", "max_per_group",
        "softmax_over", "top_p", "threshold", "min_k", "normalize", "scale",
    )  # fmt: skip
    limits = case["k_per_token"]
    return fr.gate(
        torch.tensor(case["logits"]),
        **{name: case[name] for name in names},
        noise=None if noise is None else torch.tensor(noise),
        bias=None if bias is None else torch.tensor(bias),
        mask=None if mask is None else torch.tensor(mask),
        k_per_token=None if limits is None else torch.tensor(limits, dtype=torch.int32),
        stats=True,
        keep_scores=True,
    )


def close(got, wanted):
    return abs(got - wanted) <= 1e-5 * abs(wanted) + 1e-7 or got == wanted


def check(case):
    routing = run(case)
    experts, top_k = len(case["logits"][0]) - case["num_null"], case["top_k"]
    demand, score_sum = [0] * experts, [0.0] * experts
    for t, z in enumerate(case["logits"]):
        pick, weights, scores, live = spec_row(z, case, t)
        pad = top_k - len(pick)
        assert routing.experts[t].tolist() == pick + [-1] * pad
        for got, wanted in zip(routing.weights[t].tolist(), weights + [0.0] * pad, strict=True):
            assert close(got, wanted), (t, got, wanted)
        finite = [v for v in z if v != -INF]
        wanted = math.log(sum(map(math.exp, finite))) if live else -INF
        assert close(routing.logsumexp[t].item(), wanted) or abs(wanted) < 1e-2
        for e in pick:
            demand[e] += 1
        for e in range(experts):
            assert close(routing.scores[t, e].item(), scores[e])
            score_sum[e] += scores[e] if live else 0.0
    assert routing.demand.tolist() == demand
    for got, wanted in zip(routing.score_sum.tolist(), score_sum, strict=True):
        assert close(got, wanted) or wanted == -INF


def campaign(seed, n):
    left_out = 0
    for i in range(n):
        case = random_case(random.Random(f"{seed} {i}"))
        try:
            check(case)
        except LeftToRoundingError:
            left_out += 1
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, case {i}: {case}") from error
    assert left_out <= n // 50, f"{left_out} of {n} cases are left to rounding"


def test_options_by_the_second_reading():
    campaign("contract", 400)


@pytest.mark.large
def test_thousands_of_options_by_the_second_reading():
    campaign("contract campaign", 20_000)


def test_the_second_reading_can_fail():
    case = random_case(random.Random("power"))
    while case["logits"][0].count(-INF) or case["top_k"] < 2:
        case = random_case(random.Random(repr(case)))
    case["threshold"] = case["top_p"] = case["k_per_token"] = None
    check(case)
    right = fr.gate
    for spoil in (
        lambda r: r._replace(experts=r.experts.flip(1)),
        lambda r: r._replace(weights=r.weights * 1.001),
        lambda r: r._replace(demand=r.demand + 1),
        lambda r: r._replace(score_sum=r.score_sum + 0.01),
        lambda r: r._replace(logsumexp=r.logsumexp.nan_to_num() + 0.1),
        lambda r: r._replace(scores=r.scores + 0.01),
    ):
        fr.gate = lambda *a, s=spoil, **k: s(right(*a, **k))
        try:
            with pytest.raises(AssertionError):
                check(case)
        finally:
            fr.gate = right


def test_softmax_topk_by_the_second_reading():
    rng = random.Random("topk")
    for _ in range(60):
        columns = rng.choice((1, 2, 7, 16, 17, 100, 1025, 5000))
        k = rng.randint(1, min(columns, 64))
        quantised = rng.random() < 0.5
        row = [rng.randint(-8, 8) / 4 if quantised else rng.gauss(0, 3) for _ in range(columns)]
        row = [-INF if rng.random() < 0.1 else v for v in row]
        values, indices = fr.softmax_topk(torch.tensor([row]), k)
        row = torch.tensor(row).tolist()
        order = sorted(range(columns), key=lambda c: (-row[c], c))[:k]
        assert indices[0].tolist() == order
        if max(row) == -INF:
            assert values.isnan().all()
            continue
        total = math.fsum(math.exp(v - max(row)) for v in row)
        for got, c in zip(values[0].tolist(), order, strict=True):
            assert close(got, math.exp(row[c] - max(row)) / total)
