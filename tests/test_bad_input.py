"""Bad input to every published method: an error that names the method and the argument."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import adapters, audit, losses, softmax_variants
from fastmoe_route.methods import Method, methods
from fastmoe_route.routers import estimators
from router_cases import EXPERTS, HIDDEN, SEQUENCES, TOKENS, VOCABULARY, inputs, make

Call = Callable[[], Any]

ROUTERS, OTHERS = [], []
for _method in methods():
    (ROUTERS if _method.kind == "router" else OTHERS).append(_method)
by_name = {"ids": lambda method: method.name}

# What a router reads as `state`, by its shape; the others ignore it.
STATES = {
    "rmoe": (TOKENS, 256),
    "glider": (SEQUENCES, EXPERTS),
    "r2t2": (TOKENS, EXPERTS),
    "mindskip": (SEQUENCES,),
    "dr_llm": (SEQUENCES,),
    "read_me": (TOKENS, EXPERTS),
    "drmc": (TOKENS, HIDDEN),
    "milora": (SEQUENCES, EXPERTS),
    "accord": (SEQUENCES, EXPERTS),
    "supernet_mixture": (SEQUENCES, 16),
    "mhr": (SEQUENCES,),
}


def refuses(method: Method, argument: str, call: Call, rule: str = "") -> None:
    who = f"({method.name}|{method.target.__name__})"
    with pytest.raises(
        (ValueError, TypeError, RuntimeError), match=f"^{who}: {argument} must{rule}"
    ):
        call()


# ---- routers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ROUTERS, **by_name)
def test_more_choices_than_experts(method: Method) -> None:
    for top_k in (EXPERTS + 1, 0, -1):
        refuses(method, "top_k", lambda k=top_k: make(method.name, top_k=k), r" be in \[1, 8\]")
    refuses(method, "top_k", lambda: make(method.name, top_k=1.5), " be an int")
    for argument, size in (("hidden_size", (0, EXPERTS)), ("num_experts", (HIDDEN, 0))):
        needed = {"vocab_size": 9} if method.name in ("mask_moe", "stable_moe") else {}
        refuses(method, argument, lambda s=size, n=needed: method.target(*s, 1, **n))


@pytest.mark.parametrize("method", ROUTERS, **by_name)
def test_missing_or_misfitting_context(method: Method) -> None:
    router, given = make(method.name), inputs()
    for need in method.needs:
        refuses(method, need, lambda n=need: router(**{**given, n: None}), " be given, got None")
    refuses(method, "x", lambda: router(**{**given, "x": given["x"][:, 1:]}), " have shape")
    refuses(method, "x", lambda: router(**{**given, "x": given["x"].int()}))
    for argument in ("token_ids", "sequence_ids", "scope_ids", "attention_mass", "positions"):
        short = {**given, argument: given[argument][1:]}
        refuses(method, argument, lambda s=short: router(**s), rf" have shape \[{TOKENS}\]")
    for argument in ("token_ids", "sequence_ids", "scope_ids"):
        floats = {**given, argument: given[argument].float()}
        refuses(method, argument, lambda f=floats: router(**f))
    for argument in ("sequence_ids", "scope_ids"):
        over = {**given, argument: given[argument] + 1}
        refuses(method, argument, lambda o=over: router(**o), r" be in \[0, 2\], got 3")


@pytest.mark.parametrize("method", ROUTERS, **by_name)
def test_state_that_is_not_finite(method: Method) -> None:
    router, given = make(method.name), inputs()
    spoiled = given["attention_mass"].clone()
    spoiled[3] = torch.nan
    refuses(
        method,
        "attention_mass",
        lambda: router(**{**given, "attention_mass": spoiled}),
        " be finite",
    )
    shape = STATES.get(method.name, (TOKENS, 3))
    refuses(
        method,
        "state",
        lambda: router(**{**given, "state": torch.full(shape, torch.inf)}),
        " be finite",
    )
    if method.name in STATES:
        long = torch.zeros(shape[0] + 1, *shape[1:], dtype=torch.int64)
        state = long if method.name == "mhr" else long.float()
        refuses(method, "state", lambda: router(**{**given, "state": state}), " have shape")
    for key, value in router.state_dict().items():
        if value.is_floating_point() and value.numel():
            bad = make(method.name)
            bad.state_dict()[key].view(-1)[0] = torch.nan
            refuses(method, key, bad.serve, " be finite")
            refuses(method, key, lambda b=bad: make(method.name).load_state_dict(b.state_dict()))


@pytest.mark.parametrize("method", ROUTERS, **by_name)
def test_calls_with_arguments_of_other_types(method: Method) -> None:
    router, given = make(method.name), inputs()
    for argument, value in (("seed", "a"), ("seed", 1.5), ("state", "a"), ("experts", 3)):
        refuses(method, argument, lambda a=argument, v=value: router(**{**given, a: v}), " be a")
    for argument in ("num_sequences", "num_scopes"):
        refuses(method, argument, lambda a=argument: router(**{**given, a: 1.5}), " be an int")
        refuses(method, argument, lambda a=argument: router(**{**given, a: 0}), " be at least 1")


@pytest.mark.parametrize("method", ROUTERS, **by_name)
def test_options_of_other_types(method: Method) -> None:
    """No option of a method takes a value of another kind, or NaN, and fails at the first call."""
    for option in inspect.signature(method.target).parameters.values():
        if option.kind is option.KEYWORD_ONLY:
            for value in ("no such choice", math.nan, object()):
                refuses(
                    method, option.name, lambda o=option, v=value: make(method.name, **{o.name: v})
                )
    for option in ("aux_coef", "z_coef", "capacity_factor", "min_capacity", "rounding"):
        refuses(method, option, lambda o=option: make(method.name, **{o: math.nan}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deepseek_v3", {"num_groups": 3}),
        ("deepseek_v3", {"num_groups": 2, "topk_groups": 3}),
        ("base", {"assignment": "greedy"}),
        ("switch", {"jitter": -0.1}),
        ("sira", {"expert_dropout": 1.0}),
        ("cigt", {"temperature": 0.0}),
        ("ride", {"threshold": 1.1}),
        ("duo_llm", {"costs": [1.0]}),
        ("loc_moe", {"target": [1.0, 0.0]}),
        ("dr_llm", {"width": 0}),
        ("supernet_mixture", {"encoding_size": 0}),
        ("mixture_of_routers", {"num_routers": 0}),
        ("sparse_ot", {"gamma": 0.0}),
        ("adapt_dhm", {"momentum": 1.5}),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    method = next(method for method in ROUTERS if method.name == name)
    refuses(method, list(options)[-1], lambda: fr.routers.build(name, HIDDEN, EXPERTS, **options))


def test_tokens_that_do_not_divide() -> None:
    base = next(method for method in ROUTERS if method.name == "base")
    for num_tokens in (7, 9):
        router = make("base").train()
        refuses(
            base, "x", lambda r=router, n=num_tokens: r(torch.zeros(n, HIDDEN)), " have a multiple"
        )
    with pytest.raises(
        ValueError, match="assign_balanced: scores must have a multiple of 8 tokens"
    ):
        fr.assign_balanced(torch.zeros(9, EXPERTS))


@pytest.mark.parametrize("name", ["mask_moe", "stable_moe"])
def test_ids_outside_the_vocabulary(name: str) -> None:
    method = next(method for method in ROUTERS if method.name == name)
    ids = inputs()["token_ids"]
    for bad in (VOCABULARY, -1):
        wrong = ids.clone()
        wrong[5] = bad
        call = {**inputs(), "token_ids": wrong}
        refuses(
            method, "token_ids", lambda c=call: make(name)(**c), rf" be in \[0, 49\], got {bad}"
        )


def test_decisions_and_tasks_out_of_range() -> None:
    for name, bad in (("dr_llm", 3), ("mhr", 4)):
        method = next(method for method in ROUTERS if method.name == name)
        router = make(name, num_tasks=4) if name == "mhr" else make(name)
        state = torch.tensor([0, bad, 1])
        refuses(method, "state", lambda r=router, s=state: r(**{**inputs(), "state": s}))


Z = torch.zeros(3, 4)
LATER: dict[str, Call] = {
    "slice_experts: activation": lambda: fr.routers.slice_experts(Z, Z, 1, "swish"),
    "slice_experts: w_up": lambda: fr.routers.slice_experts(Z, torch.zeros(3, 4), 3, "swiglu"),
    "slice_experts: num_slices": lambda: fr.routers.slice_experts(Z.T, Z, 2, "relu"),
    "task_experts: task_frequency": lambda: fr.routers.task_experts(3, Z[0]),
    "task_experts: tau": lambda: fr.routers.task_experts(Z[0], Z[0], "a"),
    "rewire: routers": lambda: fr.routers.rewire([make("switch")], lambda: Z.sum()),
    "angle_capacity: cosine": lambda: fr.routers.angle_capacity("a", 4, 4),
    "smoe_dropout: progress": lambda: make("smoe_dropout").set_progress("a"),
    "uni_pool: progress": lambda: make("uni_pool").lock(torch.ones(EXPERTS, dtype=bool), math.nan),
    "sparsemixer: epsilon": lambda: estimators.sparsemixer(Z, -1.0),
    "sparsemixer: uniform": lambda: estimators.sparsemixer(Z, gumbel=Z),
    "sparsemixer: gumbel": lambda: estimators.sparsemixer(Z, gumbel=Z[:1], uniform=Z[:, 0]),
    "ordered_log_prob: experts": lambda: estimators.ordered_log_prob(Z, torch.full((3, 1), 4)),
    "isolation: router": lambda: audit.isolation(Z, Z, Z, inputs()["experts"]),
}


@pytest.mark.parametrize("start", LATER)
def test_functions_around_routers(start: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{start} must"):
        LATER[start]()


# ---- losses, softmax, adapters, audits ---------------------------------------------------------

X = torch.zeros(3, 4)
LABELS = torch.zeros(3, dtype=torch.int64)
BAD: dict[str, dict[str, Call]] = {
    "prior_shaping": {
        "source": lambda: losses.prior_shaping(torch.ones(3, 1)),
        "concentration": lambda: losses.prior_shaping(X, -1.0),
    },
    "expert_router_coupling": {
        "router": lambda: losses.expert_router_coupling(torch.zeros(4), torch.zeros(4, 3, 2)),
        "w_up": lambda: losses.expert_router_coupling(X, torch.zeros(2, 4, 2)),
        "alpha": lambda: losses.expert_router_coupling(X, torch.zeros(3, 4, 2), alpha=0.0),
        "noise": lambda: losses.expert_router_coupling(X, torch.zeros(3, 4, 2), noise=X[1:]),
    },
    "activation_locality": {
        "activations": lambda: losses.activation_locality(X[0]),
        "sharpness": lambda: losses.activation_locality(X, "steep"),
    },
    "chunk_sparsity": {
        "activations": lambda: losses.chunk_sparsity(X[0]),
        "chunk": lambda: losses.chunk_sparsity(X, 0),
    },
    "two_pass_softmax": {"x": lambda: softmax_variants.two_pass_softmax(LABELS)},
    "online_normalizer": {"x": lambda: softmax_variants.normalizer([1.0])},
    "sparse_softmax": {
        "k": lambda: softmax_variants.sparse_softmax(X, 5),
        "x": lambda: softmax_variants.sparse_softmax([1.0]),
    },
    "sparse_softmax_loss": {
        "k": lambda: softmax_variants.sparse_softmax_loss(X, LABELS, 5),
        "target": lambda: softmax_variants.sparse_softmax_loss(X, LABELS[1:], 2),
    },
    "adaptive_temperature_softmax": {
        "x": lambda: softmax_variants.adaptive_temperature_softmax([1.0])
    },
    "softpick": {
        "x": lambda: softmax_variants.softpick([1.0]),
        "mask": lambda: softmax_variants.softpick(X, mask=X),
        "eps": lambda: softmax_variants.softpick(X, eps=-1.0),
    },
    "unified_max_softmax": {"low": lambda: softmax_variants.unified_max_softmax(X, 0.0, 2.0, 1.0)},
    "quantization_bias": {
        "bits": lambda: softmax_variants.quantization_bias(X, 0.5),
        "p": lambda: softmax_variants.quantization_bias([1.0]),
    },
    "pairwise_softmax_loss": {
        "positive": lambda: softmax_variants.pairwise_softmax_loss(X[0], X),
        "surrogate": lambda: softmax_variants.pairwise_softmax_loss(X[:, 0], X, 0.1, "log"),
        "tau": lambda: softmax_variants.pairwise_softmax_loss(X[:, 0], X, 0.0),
    },
    "topk_softmax_loss": {
        "positive": lambda: softmax_variants.topk_softmax_loss(X[0], X, X[:, 0]),
        "quantile": lambda: softmax_variants.topk_softmax_loss(X[:, 0], X, X[0]),
        "tau": lambda: softmax_variants.topk_softmax_loss(X[:, 0], X, X[:, 0], tau=-1.0),
        "tau_weight": lambda: softmax_variants.topk_softmax_loss(
            X[:, 0], X, X[:, 0], tau_weight=0.0
        ),
    },
    "stablemax": {
        "x": lambda: softmax_variants.stablemax([1.0]),
        "dim": lambda: softmax_variants.stablemax(X, 2),
    },
    "stablemax_cross_entropy": {
        "logits": lambda: softmax_variants.stablemax_cross_entropy(LABELS[None], LABELS),
        "target": lambda: softmax_variants.stablemax_cross_entropy(X, LABELS[1:]),
    },
    "sample_classes": {
        "rate": lambda: softmax_variants.sample_classes(LABELS, 10, 0.0),
        "labels": lambda: softmax_variants.sample_classes([0, 1], 10, 0.5),
        "num_classes": lambda: softmax_variants.sample_classes(LABELS, 0, 0.5),
    },
    "sharded_cross_entropy": {
        "labels": lambda: softmax_variants.sharded_cross_entropy(X, LABELS[1:]),
        "logits": lambda: softmax_variants.sharded_cross_entropy(X[:, :0], LABELS),
    },
    "early_exit": {
        "thresholds": lambda: softmax_variants.early_exit([X, X], [0.5, 0.5]),
        "stage_logits": lambda: softmax_variants.early_exit([X, X[1:]], [0.5]),
    },
    "noisy_sparse_softmax": {
        "temperature": lambda: softmax_variants.noisy_sparse_softmax(X, 0.0),
        "k": lambda: softmax_variants.noisy_sparse_softmax(X, 1.0, k=5),
    },
    "entropy_tolerance": {
        "threshold": lambda: softmax_variants.entropy_tolerance(X, X[0], 0.1),
        "tolerance": lambda: softmax_variants.entropy_tolerance(X, X[:, 0], -0.1),
    },
    "polytope_step": {"epsilon": lambda: softmax_variants.polytope_weights(X, -1.0)},
    "isolation": {
        "victim": lambda: audit.isolation(make("switch"), X[0], X, inputs()["experts"]),
        "attackers": lambda: audit.isolation(make("switch"), X, X[:, 1:], inputs()["experts"]),
    },
    "mixture_of_shards": {
        "hidden_size": lambda: adapters.MixtureOfShards(10, 8, 2, num_shards=4),
        "out_size": lambda: adapters.MixtureOfShards(8, 10, 2, num_shards=4),
        "num_private": lambda: adapters.MixtureOfShards(8, 8, 2, 4, num_private=5),
        "num_shards": lambda: adapters.MixtureOfShards(8, 8, 2, num_shards=0),
        "pool_size": lambda: adapters.MixtureOfShards(8, 8, 2, pool_size=0),
    },
    "queryable_lora": {
        "num_atoms": lambda: adapters.QueryableLora(8, 8, num_atoms=0),
        "x": lambda: adapters.QueryableLora(8, 8)(X),
        "summary": lambda: adapters.QueryableLora(4, 8, 2)(X, X),
        "prior": lambda: adapters.QueryableLora(4, 8, 2)(X, None, torch.zeros(3)),
    },
    "same_projection": {
        "update": lambda: adapters.project_update(X[0], X),
        "kept": lambda: adapters.project_update(X, X.T),
    },
}


@pytest.mark.parametrize("method", OTHERS, **by_name)
def test_functions_and_adapters(method: Method) -> None:
    for argument, call in BAD[method.name].items():
        refuses(method, argument, call)
