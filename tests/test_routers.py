"""What all routers have in common, over the whole registry."""

from __future__ import annotations

import inspect
import re
from typing import Any

import fastmoe_route as fr
import pytest
import torch
from cases import normal
from fastmoe_route.invariance import INVARIANCE
from fastmoe_route.methods import DECODE, methods
from router_cases import EXPERTS, HIDDEN, SEQUENCES, TOKENS, inputs, layer, make, names, rows
from tolerance import assert_bound, unit_roundoff
from torch import Tensor

BY_NAME = {method.name: method for method in methods("router")}


# Their weights are constants by definition: frozen routers, and what REINFORCE learns.
CONSTANT_WEIGHTS = {"rl_r", "smoe_dropout"}


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got, wanted)


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("training", [False, True])
def test_result_keeps_the_contract(name: str, training: bool) -> None:
    given = inputs()
    router = make(name).train(training)
    routed = router(**given)
    routing = routed.routing
    assert routing.experts.dtype == routing.demand.dtype == torch.int32
    assert routing.weights.dtype == torch.float32
    assert routing.experts.shape == routing.weights.shape
    assert bool(((routing.experts >= -1) & (routing.experts < EXPERTS)).all())
    assert bool((routing.weights[routing.experts < 0] == 0).all())
    used = routing.experts[routing.experts >= 0].long()
    assert torch.equal(torch.bincount(used, minlength=EXPERTS), routing.demand.long())
    assert all(loss.dim() == 0 and bool(loss.isfinite()) for loss in routed.losses.values())
    assert training or not routed.losses
    assert routed.aux_loss.dim() == 0
    y = router.mix(given["x"], routed, given["experts"])
    assert y.shape == given["x"].shape
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("name", names())
def test_no_token_is_legal(name: str) -> None:
    given = inputs(0)
    for training in (False, True):
        router = make(name).train(training)
        routed = router(**given)
        assert bool(routed.aux_loss.isfinite())
        assert router.mix(given["x"], routed, given["experts"]).shape == (0, HIDDEN)


@pytest.mark.parametrize("name", names())
def test_scores_are_float32_whatever_comes(name: str) -> None:
    """Bfloat16 inputs, and autocast: experts may run in it, routers do not."""
    given = inputs()
    router = make(name).eval()
    plain = router(**given).routing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(**given).routing
    assert same_bits(cast.experts, plain.experts)
    if "experts" not in BY_NAME[name].needs:
        assert same_bits(cast.weights, plain.weights)
    narrow = [w.bfloat16() for w in given["experts"][:2]]
    narrow = {**given, "x": given["x"].bfloat16(), "experts": fr.routers.Experts(*narrow)}
    routed = router(**narrow)
    assert routed.routing.weights.dtype == torch.float32
    assert router.mix(narrow["x"], routed, narrow["experts"]).dtype == torch.bfloat16


# ---- invariance --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in names() if BY_NAME[n].invariance in ("I", "C", "B*")])
def test_a_token_alone_has_the_same_bits(name: str) -> None:
    """In evaluation without a capacity, a token's output is its own, wherever it stands."""
    given = inputs()
    router = make(name).eval()
    wanted = layer(router, given)
    for index in ([5], [7, 3], list(range(23, -1, -1)), list(range(4, 21))):
        index = torch.tensor(index)
        assert same_bits(layer(router, rows(given, index)), wanted[index])


@pytest.mark.parametrize("name", [n for n in names() if BY_NAME[n].invariance in ("S", "B", "C")])
def test_a_scope_alone_has_the_same_bits(name: str) -> None:
    """What a request gets in serve mode is a function of its own tokens."""
    given = inputs()
    arguments = {"eval_capacity_factor": 1.0} if BY_NAME[name].invariance == "C" else {}
    router = make(name, **arguments).serve()
    wanted = layer(router, given)
    for scope in range(SEQUENCES):
        index = (given["sequence_ids"] == scope).nonzero()[:, 0]
        assert same_bits(layer(router, rows(given, index)), wanted[index])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", names())
def test_a_broken_token_spoils_no_other_request(name: str, value: float) -> None:
    given = inputs()
    arguments = {"eval_capacity_factor": 1.0} if BY_NAME[name].invariance == "C" else {}
    router = make(name, **arguments).serve()
    others = given["sequence_ids"] != given["sequence_ids"][3]
    if BY_NAME[name].invariance in ("I", "B*"):
        others = torch.arange(TOKENS) != 3
    wanted = layer(router, given)
    given["x"][3] = value
    assert same_bits(layer(router, given)[others], wanted[others])


@pytest.mark.parametrize("name", names())
def test_serve_mode_refuses_what_mixes_requests(name: str) -> None:
    arguments = {"eval_capacity_factor": 1.0} if BY_NAME[name].invariance == "C" else {}
    router = make(name, **arguments).serve()
    missing = {"B": "scope_ids", "C": "scope_ids", "S": "sequence_ids"}.get(router.invariance)
    router(**inputs())
    if missing is None:
        router(**{**inputs(), "scope_ids": None, "num_scopes": 1})
        return
    rule = f"{router.name}: {missing} must be given in serve mode, because the invariance is"
    with pytest.raises(ValueError, match=rule):
        router(**{**inputs(), missing: None})
    router.eval()(**{**inputs(), "scope_ids": None, "num_scopes": 1})


def prompt_of(given: dict) -> Tensor:
    """The first five tokens of every sequence, of eight."""
    return (given["positions"] < 5).nonzero()[:, 0]


@pytest.mark.parametrize("name", [n for n in names() if BY_NAME[n].decode == "ok"])
def test_a_prompt_keeps_its_bits_as_the_text_goes_on(name: str) -> None:
    """What is said to decode causally sees no later token, in evaluation."""
    given, router = inputs(), make(name).eval()
    prompt = prompt_of(given)
    assert same_bits(layer(router, rows(given, prompt)), layer(router, given)[prompt])


@pytest.mark.parametrize(
    "name", [n for n in names() if BY_NAME[n].decode == "leak" and BY_NAME[n].invariance != "B*"]
)
def test_what_is_said_to_leak_does(name: str) -> None:
    tight = {"scope_capacity": 2} if name == "rectify" else {}  # room for all leaks nothing
    given, router = inputs(), make(name, **tight).eval()
    prompt = prompt_of(given)
    assert not torch.equal(layer(router, rows(given, prompt)), layer(router, given)[prompt])


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*names()} - CONSTANT_WEIGHTS))
def test_gradient_of_the_layer(name: str) -> None:
    """The choice is a constant, all else is differentiated: checked in float64."""
    router = make(name, torch.float64).eval()
    given = inputs(6, torch.float64)

    def output(x: Tensor) -> Tensor:
        return layer(router, {**given, "x": x})

    assert torch.autograd.gradcheck(output, given["x"].requires_grad_(), fast_mode=True)


# ---- registration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.large] * (i % 4 != 0)) for i, n in enumerate(names())],
)
def test_fullgraph(name: str) -> None:
    """A quarter of the routers by default: tracing one takes as long as all its other tests."""
    given = inputs()
    router = make(name).eval()
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    wanted, got = router(**given), compiled(**given)
    assert same_bits(got.routing.experts, wanted.routing.experts)
    assert same_bits(got.routing.weights, wanted.routing.weights)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ssr", {"plan_share": 0.5, "iters": 5, "temperature": 0.5}),
        ("compete_smoe_v1", {"rate": 0.5}),
        ("compete_smoe_v2", {"rate": 0.5}),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "aux_coef", "autocast"),
    [(torch.float32, 0.0, False), (torch.bfloat16, 0.1, False), (torch.float32, 0.1, True)],
    ids=["float32", "bfloat16, balanced", "autocast"],
)
def test_steps_of_two_kinds_train_in_one_graph(
    name: str, options: dict[str, Any], dtype: torch.dtype, aux_coef: float, autocast: bool
) -> None:
    """A draw decides how a step routes: the graph holds both ways.

    It draws as eager does with this backend; inductor draws numbers of its own.
    """
    given, router = inputs(dtype=dtype), make(name, dtype, aux_coef=aux_coef, **options).train()
    if dtype == torch.float32:
        factors = normal(EXPERTS, HIDDEN, 3, seed=1), normal(EXPERTS, 3, HIDDEN, seed=2)
        given["experts"] = fr.adapters.LoraExperts(*factors, 0.7)
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    learned = (given["x"], given["experts"][0], router.score.weight)
    kinds = set()
    for seed in range(6):
        results = []
        for call in (router, compiled):
            for tensor in learned:
                tensor.requires_grad_().grad = torch.zeros_like(tensor)
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                routed = call(**given)
            (routed.aux_loss + routed.routing.weights[:, 0].sum()).backward()
            results.append((routed, [tensor.grad for tensor in learned]))
        (eager, gradients), (one_graph, others) = results
        for wanted, got in zip(eager.routing[:3], one_graph.routing[:3], strict=True):
            assert same_bits(got, wanted)
        u = unit_roundoff(torch.bfloat16 if autocast else dtype)
        compared = [(one_graph.aux_loss, eager.aux_loss), *zip(others, gradients, strict=True)]
        for got, wanted in compared:
            assert_bound(got.detach(), wanted.detach(), 4 * u * wanted.detach().abs().max())
        ((key, extra),) = one_graph.extra.items()
        assert torch.equal(extra, (eager.extra or {}).get(key, torch.zeros_like(extra)))
        assert all(loss == 0 for key, loss in one_graph.losses.items() if key not in eager.losses)
        kinds.add(eager.extra is not None)
    assert kinds == {False, True}


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_registry_entry_is_complete(method: fr.methods.Method) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", method.name)
    assert re.fullmatch(r"[RLX]\d+", method.row)
    assert method.invariance in INVARIANCE
    assert method.decode in DECODE
    text = inspect.getdoc(method.target) or ""
    assert method.verified != "mem" or "unverified" in text, "the docstring must say unverified"
    assert not method.title.endswith(".")
    if method.kind == "router":
        assert set(method.needs) <= set(fr.routers.Context._fields)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_bad_arguments_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: top_k must be in \[1, 8\], got 9"):
        make(name, top_k=9)
    with pytest.raises(TypeError, match="capacity"):
        make(name, capacity=3)
    router = make(name)
    with pytest.raises(ValueError, match=rf"{name}: x must have shape \[any, 16\], got"):
        router(**{**inputs(), "x": torch.zeros(TOKENS, 5)})
    for need in BY_NAME[name].needs:
        with pytest.raises(ValueError, match=f"{name}: {need} must be given, got None"):
            router(**{**inputs(), need: None})


@pytest.mark.parametrize(("argument", "loss"), [("aux_coef", "balance"), ("z_coef", "z")])
@pytest.mark.parametrize("name", names())
def test_a_common_loss_is_computed_or_refused(name: str, argument: str, loss: str) -> None:
    """No coefficient is silently without effect."""
    if argument in BY_NAME[name].target.unused:
        with pytest.raises(ValueError, match=rf"{name}: {argument} must be 0: .*, got 0\.5"):
            make(name, **{argument: 0.5})
        assert loss not in make(name).train()(**inputs()).losses
        return
    once, twice = (make(name, **{argument: c}).train() for c in (0.5, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = once(**inputs()).losses[loss].detach()
        torch.manual_seed(0)
        large = twice(**inputs()).losses[loss].detach()
    assert float(small) > 0
    assert float(large / small) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("name", names())
def test_state_is_saved_and_must_be_finite(name: str) -> None:
    router = make(name)
    saved = router.state_dict()
    other = fr.routers.build(name, HIDDEN, EXPERTS, **_arguments(name))
    other.load_state_dict(saved)
    assert all(same_bits(value, saved[key]) for key, value in other.state_dict().items())
    floats = [key for key, value in saved.items() if value.is_floating_point() and value.numel()]
    if floats:
        saved[floats[0]] = torch.full_like(saved[floats[0]], torch.nan)
        with pytest.raises(ValueError, match=f"{name}: {floats[0]} must be finite, got"):
            other.load_state_dict(saved)


def _arguments(name: str) -> dict[str, object]:
    from router_cases import ARGUMENTS

    return ARGUMENTS.get(name, {})


@pytest.mark.parametrize("name", names())
def test_a_model_in_16_bits_keeps_its_statistics(name: str) -> None:
    given = inputs()
    x = given.pop("x").bfloat16()
    given["experts"] = fr.routers.Experts(*(w.bfloat16() for w in given["experts"][:2]))
    router = make(name).train().bfloat16()
    routed = router(x, **given)
    router.update()
    assert routed.routing.weights.dtype == torch.float32
    assert router.mix(x, routed, given["experts"]).dtype == torch.bfloat16
    for key, buffer in router.named_buffers(recurse=False):
        assert buffer.dtype not in (torch.bfloat16, torch.float16), key


def test_a_class_of_ones_own_needs_no_registration() -> None:
    class Mine(fr.routers.Router):
        def route(self, x: Tensor, context: fr.routers.Context) -> fr.routers.Routed:
            return self.routed(fr.gate(x[:, : self.num_experts], self.top_k), context)

    router = Mine(HIDDEN, EXPERTS, 2, capacity_factor=1.0).train()
    assert router.invariance == "C"
    assert router(inputs()["x"]).plan is not None
    with pytest.raises(ValueError, match="Mine: x must have 2 dimensions"):
        router(torch.zeros(3))


def test_unknown_name_lists_what_is_close() -> None:
    with pytest.raises(ValueError, match=r"name must be a method of .* \(switch.*\), got 'swich'"):
        fr.routers.build("swich", 8, 4)


def test_aux_loss_is_the_sum_of_the_losses() -> None:
    routed = make("switch", z_coef=0.1)(**inputs())
    assert set(routed.losses) == {"balance", "z"}
    assert same_bits(routed.aux_loss, routed.losses["balance"] + routed.losses["z"])
