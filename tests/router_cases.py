"""A small router of every registered method, and inputs that suit them all."""

from __future__ import annotations

from typing import Any

import fastmoe_route as fr
import torch
import torch.nn.functional as F
from cases import normal
from torch import Tensor

HIDDEN, EXPERTS, TOKENS, VOCABULARY, SEQUENCES = 16, 8, 24, 50, 3
WIDTH = 12

# Arguments that a method cannot do without, or that make a small case interesting.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"top_k": 3, "num_groups": 4, "topk_groups": 2},
    "mask_moe": {"vocab_size": VOCABULARY, "num_frequent": 20, "visible": 4},
    "stable_moe": {"vocab_size": VOCABULARY},
}


def names() -> list[str]:
    """Every router of the registry."""
    return [method.name for method in fr.methods.methods("router")]


def make(name: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> fr.routers.Router:
    """A router whose parameters depend on nothing but its name."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        arguments = {**ARGUMENTS.get(name, {}), **arguments}
        return fr.routers.build(name, HIDDEN, EXPERTS, **arguments).to(dtype)


def experts(dtype: torch.dtype = torch.float32, seed: int = 3) -> fr.routers.Experts:
    """SwiGLU experts, not differentiable."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (EXPERTS, HIDDEN, 2 * WIDTH), (EXPERTS, WIDTH, HIDDEN)
    w_up, w_down = (torch.randn(s, generator=generator, dtype=dtype) * 0.3 for s in shapes)
    return fr.routers.Experts(w_up, w_down)


def inputs(
    num_tokens: int = TOKENS, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """`x` and everything a router may ask for; sequence `i` is scope `i`, its tokens together."""
    generator = torch.Generator().manual_seed(seed)
    sequence_ids = torch.arange(num_tokens) * SEQUENCES // max(num_tokens, 1)
    lengths = torch.bincount(sequence_ids, minlength=SEQUENCES)
    starts = lengths.cumsum(0) - lengths
    return {
        "x": torch.randn(num_tokens, HIDDEN, generator=generator, dtype=dtype),
        "token_ids": torch.randint(0, VOCABULARY, (num_tokens,), generator=generator),
        "sequence_ids": sequence_ids,
        "num_sequences": SEQUENCES,
        "scope_ids": sequence_ids.int(),
        "num_scopes": SEQUENCES,
        "attention_mass": torch.rand(num_tokens, generator=generator),
        "positions": torch.arange(num_tokens) - starts[sequence_ids],
        "seed": 7,
        "experts": experts(dtype),
    }


def rows(given: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The inputs of some tokens only."""
    return {
        key: value[index] if isinstance(value, Tensor) else value for key, value in given.items()
    }


def layer(router: fr.routers.Router, given: dict[str, Any]) -> Tensor:
    """The output `[T, H]` of a layer with this router."""
    routed = router(**given)
    return router.mix(given["x"], routed, given["experts"])


def tokens(num_tokens: int, seed: int = 0, size: int = HIDDEN) -> Tensor:
    """Hidden states alone."""
    return normal(num_tokens, size, seed=seed)


def set_logits(router: fr.routers.Router, logits: Tensor) -> Tensor:
    """Makes a linear router's logits these; returns the `x` that gives them."""
    num_columns = logits.shape[1]
    weight = torch.zeros_like(router.score.weight)
    weight[:, :num_columns] = torch.eye(num_columns)
    router.score.weight.data.copy_(weight)
    return F.pad(logits, (0, router.hidden_size - num_columns))
