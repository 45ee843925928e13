"""Random and adversarial arguments for the ops: seeded generators of keyword dictionaries.

A case is what the public function takes: `fr.gate(**case)`, `fr.plan_dispatch(**case)`,
`fr.moe_mlp(**case)`. All cases are legal on every backend. Case `i` of a seed does not depend on
how many are asked for, so a failure is rerun by its seed and number; `describe` prints one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "relu", "identity")
GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu", "swiglu_clamped")
ACTIVATIONS = (*GATED_ACTIVATIONS, "silu", "gelu", "relu", "relu2")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One below, at and one above vector widths and tiles, the usual sizes of models, and odd ones.
EXPERT_COUNTS = (1, 2, 3, 4, 6, 8, 12, 15, 16, 17, 31, 32, 33, 60, 64, 65, 100, 127, 128, 129, 160)
WIDE_EXPERT_COUNTS = (255, 256, 257, 384, 512, 1000)
TOKEN_COUNTS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33)
TILE_EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65)


def describe(case: Case) -> str:
    """One line that names a case: tensors as dtype, shape and strides."""

    def show(value: object) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype)[6:]}{[*value.shape]}/{[*value.stride()]}"
        if isinstance(value, tuple):
            return f"({', '.join(map(show, value))})"
        return repr(value)

    return ", ".join(f"{name}={show(value)}" for name, value in case.items())


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers that follow from the seed, drawn in float32 (float64 for float64)."""
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)


class Source:
    """The randomness of one case."""

    def __init__(self, *seed: object) -> None:
        """Everything drawn follows from `seed`."""
        self.rng = random.Random(repr(seed))
        self.torch = torch.Generator().manual_seed(self.rng.getrandbits(62))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(list(options))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.torch)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in `[low, high)`."""
        return torch.randint(low, high, shape, generator=self.torch)

    def coins(self, probability: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < probability

    def strided(self, x: Tensor) -> Tensor:
        """The values of `x` in a random layout, surrounded by values that would win or crash."""
        layout = self.pick(("plain", "plain", "offset", "padded", "every other", "transposed"))
        if layout == "plain" or not x.numel():
            return x.contiguous()
        if layout == "offset":  # starts at no multiple of a vector
            store = _poison(x, x.numel() + 3)
            return _filled(store[3:].view(x.shape), x)
        if layout == "every other":
            return _filled(_poison(x, *x.shape[:-1], x.shape[-1] * 2)[..., ::2], x)
        if layout == "transposed" and x.dim() > 1:
            return _filled(_poison(x, *x.shape[:-2], x.shape[-1], x.shape[-2]).transpose(-1, -2), x)
        return _filled(_poison(x, *x.shape[:-1], x.shape[-1] + 5)[..., 2 : 2 + x.shape[-1]], x)


def _poison(like: Tensor, *shape: int) -> Tensor:
    if like.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    info = torch.finfo if like.is_floating_point() else torch.iinfo
    return torch.full(shape, info(like.dtype).max, dtype=like.dtype)


def _filled(view: Tensor, x: Tensor) -> Tensor:
    view.copy_(x)
    return view


# ---- gate --------------------------------------------------------------------------------------


def gate_cases(
    seed: int, n: int, *, max_experts: int = 1000, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> Iterator[Case]:
    """`n` legal argument dictionaries of `gate`, from the product of all its options.

    Args:
        seed: the cases follow from it.
        n: how many.
        max_experts: the largest `E`; small for a slow backend.
        dtypes: of the logits; add float64 for gradient checks.
    """
    for i in range(n):
        yield _gate_case(Source("gate", seed, i), max_experts, dtypes)


def _gate_case(source: Source, max_experts: int, dtypes: Sequence[torch.dtype]) -> Case:
    counts = WIDE_EXPERT_COUNTS if source.chance(0.1) else EXPERT_COUNTS
    num_experts = source.pick([e for e in counts if e <= max_experts] or [max_experts])
    num_tokens = source.pick(TOKEN_COUNTS)
    top_k = source.rng.randint(1, min(num_experts, source.pick((1, 2, 8, 16, 64))))
    if num_experts <= 33 and source.chance(0.1):
        top_k = num_experts
    case: Case = {"logits": None, "top_k": top_k, "score": source.pick(SCORES)}
    if source.chance(0.4):
        _add_groups(case, source, num_experts)
    elif source.chance(0.2):
        case["num_null"] = source.rng.randint(1, 4)
    shape = (num_tokens, num_experts + case.get("num_null", 0))
    case["logits"] = source.strided(_logits(source, *shape).to(source.pick(dtypes)))
    _add_key_options(case, source, shape)
    _add_stops(case, source, num_tokens)
    if source.chance(0.5):
        case["normalize"] = True
    if source.chance(0.3):
        case["scale"] = source.pick((2.5, 0.125, 16.0))
    if source.chance(0.5):
        case["stats"] = True
    if source.chance(0.3):
        case["keep_scores"] = True
    return case


def _logits(source: Source, num_tokens: int, num_columns: int) -> Tensor:
    kind = source.pick(
        ("normal", "normal", "quantised", "quantised", "negative", "extreme", "equal", "close")
    )
    z = source.normal(num_tokens, num_columns) * source.pick((1.0, 4.0))
    if kind == "quantised":  # ties within and across tiles; negative zeros among the zeros
        z = (z * 2).round() / 2
    elif kind == "negative":
        z = -z.abs() - 0.1
    elif kind == "extreme":
        z = z.sign() * (60 + 60 * source.uniform(num_tokens, num_columns))
    elif kind == "equal":
        z = z[:, :1].expand(num_tokens, num_columns).clone()
    elif kind == "close":  # a few roundings apart
        z = 1 + source.integers(0, 4, num_tokens, num_columns) * 2.0**-23
    if source.chance(0.25):
        z = z.masked_fill(source.coins(0.3, num_tokens, num_columns), -torch.inf)
    for value in (torch.nan, torch.inf, -torch.inf):
        if source.chance(0.1):
            rows = source.coins(0.3, num_tokens, 1)
            z = z.masked_fill(rows & source.coins(0.2, num_tokens, num_columns), value)
    if source.chance(0.1):
        z = z.masked_fill(source.coins(0.2, num_tokens, 1), source.pick((-torch.inf, torch.nan)))
    return z


def _add_groups(case: Case, source: Source, num_experts: int) -> None:
    sizes = [g for g in range(1, num_experts + 1) if num_experts % g == 0 and g <= 64]
    num_groups = case["num_groups"] = source.pick(sizes)
    if source.chance(0.75):
        case["topk_groups"] = source.rng.randint(1, num_groups)
        case["group_score"] = source.pick(("max", "top2_sum"))
    if source.chance(0.3):
        case["max_per_group"] = source.rng.randint(1, num_experts // num_groups)
    if case["score"] == "softmax" and source.chance(0.5):
        case["softmax_over"] = "group"


def _add_key_options(case: Case, source: Source, shape: tuple[int, int]) -> None:
    def one_or_all_rows() -> tuple[int, ...]:
        return shape if source.chance(0.5) else shape[1:]

    if source.chance(0.4):
        size = one_or_all_rows()
        bias = source.normal(*size)
        kind = source.pick(("small", "quantised", "negative", "huge", "absorbing", "zero"))
        bias = {
            "small": bias * 0.1,
            "quantised": (bias * 2).round() / 4,
            "negative": -bias.abs() - 1,
            "huge": bias * 1e4,
            "absorbing": bias.sign() * 1e30,  # scores vanish in the sum: ties by the thousand
            "zero": bias * 0,
        }[kind]
        case["bias"] = source.strided(bias)
    if source.chance(0.3):
        mask = source.coins(source.pick((0.1, 0.5, 0.9)), *one_or_all_rows())
        if mask.dim() == 2:
            mask = mask & ~source.coins(0.1, shape[0], 1)
        case["mask"] = source.strided(mask)
    if source.chance(0.2):
        case["noise"] = source.strided(source.normal(*shape))


def _add_stops(case: Case, source: Source, num_tokens: int) -> None:
    def float_or_per_token(low: float, high: float) -> float | Tensor:
        if source.chance(0.5):
            return round(source.rng.uniform(low, high), 3)
        return source.strided(low + (high - low) * source.uniform(num_tokens))

    if source.chance(0.2):
        case["top_p"] = float_or_per_token(0.0, 1.0 if case["score"] == "softmax" else 3.0)
    if source.chance(0.2):
        case["threshold"] = float_or_per_token(*source.pick(((0.0, 0.2), (-1.0, 1.0))))
    if source.chance(0.4):
        case["min_k"] = source.rng.randint(0, case["top_k"])
    if source.chance(0.2):
        limits = source.integers(-1, case["top_k"] + 2, num_tokens)
        case["k_per_token"] = source.strided(limits.int())


# ---- dispatch plan -----------------------------------------------------------------------------


def plan_cases(seed: int, n: int) -> Iterator[Case]:
    """`n` legal argument dictionaries of `plan_dispatch`: skew, holes, duplicates, all options.

    Args:
        seed: the cases follow from it.
        n: how many.
    """
    for i in range(n):
        yield _plan_case(Source("plan", seed, i))


def _expert_ids(source: Source, num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    """`[T, K]` ids: even, skewed to the first few, all to one expert, or none at all."""
    kind = source.pick(("even", "even", "skewed", "one", "few", "none"))
    shape = (num_tokens, top_k)
    ids = source.integers(0, num_experts, *shape)
    if kind == "skewed":
        ids = (source.uniform(*shape) ** 4 * num_experts).long().clamp(max=num_experts - 1)
    elif kind == "one":
        ids = torch.full(shape, source.rng.randrange(num_experts))
    elif kind == "few":
        ids = ids % max(1, num_experts // 4)
    elif kind == "none":
        ids = torch.full(shape, -1)
    if source.chance(0.5):
        ids = ids.masked_fill(source.coins(source.pick((0.1, 0.6)), *shape), -1)
    return ids


def _plan_case(source: Source) -> Case:
    num_tokens = source.pick((*TOKEN_COUNTS, 64, 65, 129, 200))
    num_experts = source.pick((*EXPERT_COUNTS, 256, 257, 300))
    top_k = source.pick((1, 1, 2, 3, 4, 8))
    ids = _expert_ids(source, num_tokens, top_k, num_experts)
    num_used = int((ids >= 0).sum())
    case: Case = {"experts": None, "num_experts": num_experts}
    if source.chance(0.2):
        case["allow_unrouted"] = True
        ids = ids.masked_fill((ids < 0) & source.coins(0.5, *ids.shape), num_experts)
    case["experts"] = source.strided(ids.to(source.pick((torch.int32, torch.int64))))
    if source.chance(0.6):
        even_share = max(1, num_tokens * top_k // num_experts)
        case["capacity"] = source.pick((1, 2, even_share, even_share + 1, 10**6))
        if source.chance(0.5):
            case["drop_policy"] = "score"
            case["weights"] = source.strided(_slot_weights(source, num_tokens, top_k))
        if source.chance(0.5):
            case["num_scopes"] = source.rng.randint(1, 5)
            scopes = source.integers(0, case["num_scopes"], num_tokens)
            case["scope_ids"] = source.strided(scopes.int())
    if source.chance(0.4):
        case["align"] = source.pick((2, 3, 8, 16, 128))
    if source.chance(0.3):
        case["max_rows"] = num_used + source.pick((0, 1, 7, 10**6))
    return case


def _slot_weights(source: Source, num_tokens: int, top_k: int) -> Tensor:
    weights = source.uniform(num_tokens, top_k)
    if source.chance(0.5):
        weights = (weights * 4).round() / 4
    if source.chance(0.3):
        weights = weights * source.coins(0.5, num_tokens, top_k).float().mul(2).sub(1)
    if source.chance(0.3):
        weights = weights.masked_fill(source.coins(0.2, num_tokens, top_k), torch.nan)
    return weights


# ---- overflow ----------------------------------------------------------------------------------


def reroute_cases(seed: int, n: int) -> Iterator[Case]:
    """`n` legal argument dictionaries of `reroute`: tight and wide capacities, every rule.

    Args:
        seed: the cases follow from it.
        n: how many.
    """
    for i in range(n):
        yield _reroute_case(Source("reroute", seed, i))


def _reroute_case(source: Source) -> Case:
    num_tokens = source.pick((*TOKEN_COUNTS, 64, 65))
    num_experts = source.pick((1, 2, 3, 4, 8, 16, 33))
    num_candidates = source.rng.randint(1, num_experts + 2)
    if source.chance(0.6):  # as from a gate: distinct, then none
        ids = source.uniform(num_tokens, num_experts).argsort(1)[:, :num_candidates]
        num_candidates = ids.shape[1]
        length = source.integers(0, num_candidates + 1, num_tokens, 1)
        ids = torch.where(torch.arange(num_candidates) < length, ids, -1)
        if source.chance(0.5):
            ids = ids.clamp(max=max(0, num_experts // 3))
    else:
        ids = _expert_ids(source, num_tokens, num_candidates, num_experts)
    top_k = source.rng.randint(0, num_candidates)
    weights = _slot_weights(source, num_tokens, num_candidates)
    weights = weights.to(source.pick((*FLOAT_DTYPES, torch.float64)))
    even_share = max(1, num_tokens * top_k // num_experts)
    case: Case = {
        "routing": (source.strided(ids.to(source.pick((torch.int32, torch.int64)))), weights),
        "num_experts": num_experts,
        "top_k": top_k,
        "capacity": source.pick((1, 2, even_share, even_share + 1, 10**12)),
        "overflow": source.pick(("drop", "next", "local")),
        "fill": source.pick((None, "turned_away", "any")),
        "drop_policy": source.pick(("position", "score")),
    }
    if source.chance(0.5):
        case["num_scopes"] = source.rng.randint(1, 5)
        scopes = source.integers(0, case["num_scopes"], num_tokens)
        case["scope_ids"] = source.strided(scopes.int())
    if case["overflow"] == "local":
        ranks = source.rng.randint(1, 3)
        case["rank_of_expert"] = source.strided(source.integers(0, ranks, num_experts).int())
        case["rank_of_token"] = source.strided(source.integers(0, ranks, num_tokens).int())
    return case


# ---- experts -----------------------------------------------------------------------------------


def expert_cases(
    seed: int,
    n: int,
    *,
    max_size: int = 65,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> Iterator[Case]:
    """`n` legal argument dictionaries of `moe_mlp`: sizes around tile edges, uneven loads.

    Args:
        seed: the cases follow from it.
        n: how many.
        max_size: the largest `H`, `I` and `T`.
        dtypes: of `x` and the expert weights; add float64 for gradient checks.
    """
    for i in range(n):
        yield _expert_case(Source("experts", seed, i), max_size, dtypes)


def _expert_case(source: Source, max_size: int, dtypes: Sequence[torch.dtype]) -> Case:
    edges = [size for size in TILE_EDGES if size <= max_size]
    hidden, width = source.pick(edges), source.pick(edges)
    num_tokens = source.pick((0, *edges))
    num_experts = source.pick((1, 2, 3, 5, 8))
    top_k = source.rng.randint(1, min(num_experts, 4))
    dtype = source.pick(dtypes)
    activation = source.pick(ACTIVATIONS)
    up_width = 2 * width if activation in GATED_ACTIVATIONS else width

    def weight(rows: int, columns: int) -> Tensor:
        """`[E, rows, columns]`, stored by rows or by columns."""
        values = (source.normal(num_experts, columns, rows) / rows**0.5).to(dtype).transpose(1, 2)
        return values if source.chance(0.7) else values.contiguous()

    experts = _expert_ids(source, num_tokens, top_k, num_experts).int()
    weights = source.uniform(num_tokens, top_k).masked_fill(experts < 0, 0.0)
    if dtype == torch.float64 or source.chance(0.3):
        weights = weights.to(dtype)
    case: Case = {
        "x": source.strided(source.normal(num_tokens, hidden).to(dtype)),
        "routing": (experts, weights),
        "w_up": weight(hidden, up_width),
        "w_down": weight(width, hidden),
        "activation": activation,
    }
    if activation in GATED_ACTIVATIONS and source.chance(0.4):
        case["interleaved"] = True
    if source.chance(0.4):
        case["bias_up"] = source.normal(num_experts, up_width).to(dtype)
    if source.chance(0.4):
        case["bias_down"] = source.normal(num_experts, hidden).to(dtype)
    if source.chance(0.3):
        case["weights_on"] = "input"
    return case
