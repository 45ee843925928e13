"""moe_mlp. Classes: ratio (against plain torch of the same dtype), exact (invariances)."""

from __future__ import annotations

import math
from typing import Any

import fastmoe_route as fr
import pytest
import torch
import vm_backend
from cases import ACTIVATIONS, GATED_ACTIVATIONS, normal
from expert_checks import DTYPES, TENSORS, check_case, check_cases, make, plain, results
from fastmoe_route import reference
from levels import LEVELS, run_python
from tolerance import assert_exact, assert_has_power, assert_ratio
from torch import Tensor

OPS = torch.ops.fastmoe_route


# ---- literals ----------------------------------------------------------------------------------


def test_each_expert_scales(backend: str) -> None:
    """Identity experts times 1, 10 and 100: the weighted sum is read off."""
    x = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    w_up = torch.eye(2).repeat(3, 1, 1)
    w_down = torch.eye(2) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    routing = (torch.tensor([[2, 0], [1, -1]]), torch.tensor([[0.5, 2.0], [0.25, 0.0]]))
    y = fr.moe_mlp(x, routing, w_up, w_down, activation="relu")
    assert y.tolist() == [[52.0, 104.0], [7.5, 0.0]]
    y = fr.moe_mlp(x, routing, w_up, w_down, activation="relu2", weights_on="input")
    assert y.tolist() == [[29.0, 116.0], [5.625, 0.0]]


def test_gate_comes_first_and_pairs_alternate(backend: str) -> None:
    x = torch.tensor([[1.0]])
    routing = (torch.tensor([[0]]), torch.tensor([[1.0]]))
    w_up = torch.tensor([[[2.0, -3.0, 5.0, 7.0]]])  # halves: gate 2, -3, up 5, 7
    w_down = torch.tensor([[[1.0], [100.0]]])
    halves = fr.moe_mlp(x, routing, w_up, w_down, activation="reglu")
    pairs = fr.moe_mlp(x, routing, w_up, w_down, activation="reglu", interleaved=True)
    assert halves.item() == 10.0  # relu(2) 5 + 100 relu(-3) 7
    assert pairs.item() == 3494.0  # relu(2) (-3) + 100 relu(5) 7


def test_biases_join_before_and_after(backend: str) -> None:
    x = torch.tensor([[2.0]])
    one = torch.ones(1, 1, 1)
    routing = (torch.tensor([[0]]), torch.tensor([[3.0]]))
    biases = {"bias_up": torch.tensor([[5.0]]), "bias_down": torch.tensor([[11.0]])}
    y = fr.moe_mlp(x, routing, one, one, activation="relu", **biases)
    assert y.item() == 54.0  # 3 ((2 + 5) + 11)
    y = fr.moe_mlp(x, routing, one, one, activation="relu", weights_on="input", **biases)
    assert y.item() == 22.0  # (3 * 2 + 5) + 11


# ---- reference ---------------------------------------------------------------------------------


def test_random_cases_equal_reference(backend: str) -> None:
    check_cases(11, vm_backend.repeats(60, vm=12), (*DTYPES, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("linear", [True, False])
def test_error_is_that_of_torch(backend: str, dtype: torch.dtype, linear: bool) -> None:
    """Row by row, at sizes past every tile and block."""
    case = make(96, 320, 200, 3, 2, dtype=dtype, linear=linear)
    got, base = results(fr.moe_mlp, case), results(plain, case)
    exact = results(reference.moe_mlp, case, torch.float64)
    for name in ("y", "x", "w_up", "w_down"):
        assert_ratio(got[name], base[name], exact[name])
    assert_has_power(lambda y: assert_ratio(y, base["y"], exact["y"]), got["y"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(backend: str, activation: str) -> None:
    """One-wide identity experts show the activation itself, tails and clamps included."""
    gate = torch.linspace(-20, 20, 4001)
    ones = torch.ones(1, 1, 1)
    routing = (torch.zeros(4001, 1, dtype=torch.int32), torch.ones(4001, 1))
    w_up = ones
    if activation in GATED_ACTIVATIONS:
        w_up = torch.tensor([[[1.0, 0.5]]])
    x = gate[:, None].clone().requires_grad_()
    wide = gate[:, None].double().requires_grad_()
    y = fr.moe_mlp(x, routing, w_up, ones, activation=activation)
    wanted = reference.moe_mlp(
        wide, routing, w_up.double(), ones.double(), activation=activation, dtype=torch.float64
    )
    error = (y.double() - wanted).abs()
    # Relative, far into the tails; below 1e-15 torch's own float64 gelu cancels.
    assert not (error > 1e-5 * wanted.abs() + 1e-15).any()
    (got,), (exact,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), wide)
    error = (got.double() - exact).abs()
    assert not (error > 1e-6 * exact.abs().clamp(min=1.0)).any()


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    program = (
        "import torch, expert_checks as t\n"
        "t.check_cases(5, 12, (torch.float32, torch.bfloat16, torch.float16, torch.float64))\n"
        "t.check_case(t.make(40, 200, 130, 3, 2, dtype=torch.bfloat16, biases=True))"
    )
    run_python(level, "-c", program)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weights_on", ["output", "input"])
def test_gradcheck(backend: str, activation: str, weights_on: str) -> None:
    case = make(
        4, 3, 2, 3, 2, activation=activation, dtype=torch.float64, biases=True, linear=False
    )
    experts, weights = case.pop("routing")
    case["weights_on"] = weights_on
    case["interleaved"] = activation in ("geglu", "swiglu_clamped")
    tensors = [case.pop(n) if n != "weights" else weights for n in TENSORS]

    def layer(x, weights, w_up, w_down, bias_up, bias_down):
        return fr.moe_mlp(
            x, (experts, weights), w_up, w_down, bias_up=bias_up, bias_down=bias_down, **case
        )

    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(layer, leaves)


def test_gradient_of_every_subset_is_the_same(backend: str) -> None:
    for weights_on in ("output", "input"):
        case = make(9, 20, 70, 4, 2, biases=True, weights_on=weights_on)
        whole = results(fr.moe_mlp, case)
        for wanted in TENSORS:
            options = dict(case)
            experts, weights = options.pop("routing")
            options["weights"] = weights
            leaf = options[wanted] = options[wanted].detach().requires_grad_()
            y = fr.moe_mlp(routing=(experts, options.pop("weights")), **options)
            (grad,) = torch.autograd.grad(y, leaf, normal(9, 20, seed=7))
            assert_exact(grad, whole[wanted])


def test_experts_without_rows_get_zero_gradients(backend: str) -> None:
    for dtype in DTYPES:
        case = make(5, 40, 24, 6, 1, dtype=dtype, biases=True)
        case["routing"] = (torch.full((5, 1), 4, dtype=torch.int32), torch.ones(5, 1))
        got = results(fr.moe_mlp, case)
        for name in ("w_up", "w_down", "bias_up", "bias_down"):
            assert got[name][4].any()
            assert not got[name][[0, 1, 2, 3, 5]].any()


# ---- registration ------------------------------------------------------------------------------


def op_arguments(**options: object) -> tuple[Any, ...]:
    case = make(6, 5, 4, 3, 2, biases=True, **options)
    plan = fr.plan_dispatch(case["routing"][0], 3, align=2)
    maps = (plan.offsets, plan.row_to_slot, plan.slot_to_row)
    biases = (case["bias_up"], case["bias_down"])
    return (case["x"], case["routing"][1], case["w_up"], case["w_down"], *biases, *maps)


@pytest.mark.parametrize("linear", [True, False])
def test_opcheck(backend: str, linear: bool) -> None:
    args = op_arguments(linear=linear)
    leaves = [a.requires_grad_() if a.is_floating_point() else a for a in op_arguments()]
    torch.library.opcheck(OPS.moe_mlp.default, (*leaves, 0, False, False))
    torch.library.opcheck(OPS.moe_mlp_forward.default, (*args, 3, True, True))
    experts = make(6, 5, 4, 3, 2)["routing"][0]
    routed = (args[0], experts, *args[1:6], 3, True, True)
    torch.library.opcheck(OPS.moe_mlp_routed_forward.default, routed)
    x, weights, w_up, w_down, _, bias_down, *maps = args
    y, pre = OPS.moe_mlp(*args, 0, False, False)
    for wanted in (63, 21):
        torch.library.opcheck(
            OPS.moe_mlp_backward.default,
            (y, x, weights, w_up, w_down, bias_down, *maps, pre, 0, False, False, wanted),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(fr.moe_mlp, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (6, 11):
        case = make(num_tokens, 8, 5, 3, 2, biases=True)
        got, wanted = results(compiled, case), results(fr.moe_mlp, case)
        for name in wanted:
            assert_exact(got[name], wanted[name])


def test_export(backend: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(normal(3, 10, 8))
            self.down = torch.nn.Parameter(normal(3, 8, 5))

        def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            up, down = self.up.transpose(1, 2), self.down.transpose(1, 2)
            return fr.moe_mlp(x, (experts, weights), up, down)

    def arguments(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        case = make(num_tokens, 8, 5, 3, 2)
        return case["x"], *case["routing"]

    tokens = {0: torch.export.Dim("tokens", min=2)}
    layer = Layer()
    with torch.no_grad():
        program = torch.export.export(
            layer,
            arguments(6),
            dynamic_shapes={"x": tokens, "experts": tokens, "weights": tokens},
        )
        other = arguments(13)
        assert_exact(program.module()(*other), layer(*other))


def test_a_call_without_a_plan_is_the_same_and_says_what_is_wrong(backend: str) -> None:
    for dtype in DTYPES:
        for weights_on in ("output", "input"):
            case = make(9, 48, 33, 5, 2, dtype=dtype, biases=True, weights_on=weights_on)
            plan = fr.plan_dispatch(case["routing"][0], 5)
            assert_exact(fr.moe_mlp(**case), fr.moe_mlp(**case, plan=plan))
    case = make(9, 48, 33, 5, 2, biases=True)
    experts, weights = case["routing"]
    low = fr.moe_mlp(**{**case, "routing": (experts, weights.bfloat16())})
    assert_exact(low, fr.moe_mlp(**{**case, "routing": (experts, weights.bfloat16().float())}))
    assert_exact(fr.moe_mlp(**{**case, "routing": [experts.long(), weights]}), fr.moe_mlp(**case))
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "moe_mlp: weights", {"routing": (experts, weights[:, :1])}),
        (TypeError, "moe_mlp: routing", {"routing": torch.stack([experts, experts])}),
        (ValueError, "moe_mlp: w_up", {"w_up": case["w_up"][:, 1:]}),
        (TypeError, "moe_mlp: w_up", {"w_up": case["w_up"].double()}),
        (ValueError, "moe_mlp: w_up", {"w_up": case["w_up"].to("meta")}),
        (ValueError, "moe_mlp: bias_up", {"bias_up": case["bias_up"][1:]}),
        (ValueError, "moe_mlp: activation", {"activation": "tanh"}),
        (TypeError, "moe_mlp: interleaved", {"interleaved": 1}),
        (TypeError, "moe_mlp: allow_unrouted", {"allow_unrouted": 1}),
    ]
    for kind, message, options in wrong:
        with pytest.raises(kind, match=message):
            fr.moe_mlp(**{**case, **options})


def test_the_id_past_the_experts_means_none_where_allowed(backend: str) -> None:
    case = make(9, 48, 33, 5, 2, biases=True)
    experts, weights = case["routing"]
    is_off = torch.arange(18).reshape(9, 2) % 5 == 1
    wanted = results(fr.moe_mlp, {**case, "routing": (experts.masked_fill(is_off, -1), weights)})
    unrouted = {**case, "routing": (experts.masked_fill(is_off, 5), weights)}
    got = results(lambda **given: fr.moe_mlp(**given, allow_unrouted=True), unrouted)
    for name, value in wanted.items():
        assert_exact(got[name], value)
    with torch.no_grad():  # one operator, which makes the plan as well
        assert_exact(fr.moe_mlp(**unrouted, allow_unrouted=True), wanted["y"])


@pytest.mark.cpu_only  # elsewhere no host looks at ids: they are none
def test_a_call_without_a_plan_names_stray_experts(backend: str) -> None:
    case = make(9, 48, 33, 5, 2)
    experts, weights = case["routing"]
    with pytest.raises(RuntimeError, match="plan_dispatch: experts"):
        fr.moe_mlp(**{**case, "routing": (experts + 5, weights)})
    with pytest.raises(RuntimeError, match="plan_dispatch: experts"):
        fr.moe_mlp(**{**case, "routing": (experts + 6, weights)}, allow_unrouted=True)


def test_autocast(backend: str) -> None:
    case = make(7, 32, 16, 3, 2, biases=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(fr.moe_mlp, case)
    low = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in case.items()}
    assert_exact(got["y"], results(fr.moe_mlp, low)["y"])
    assert got["w_up"].dtype == got["x"].dtype == torch.float32


def test_without_gradients_no_graph_and_the_same_bits(backend: str) -> None:
    for dtype in DTYPES:
        case = make(9, 48, 33, 3, 2, dtype=dtype, biases=True)
        y = fr.moe_mlp(**case)
        assert y.grad_fn is None
        assert_exact(y, results(fr.moe_mlp, case)["y"])


# ---- invariance --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("linear", [True, False])
def test_a_token_alone_has_the_bits_it_has_in_a_batch(
    backend: str, dtype: torch.dtype, linear: bool
) -> None:
    """K past one summation block, sizes off every tile, loads from 1 row to some hundred."""
    case = make(512, 1100, 72, 5, 2, dtype=dtype, linear=linear, biases=True)
    experts, weights = case.pop("routing")
    experts[:200] = torch.tensor([1, 3])
    x = case.pop("x")
    whole = fr.moe_mlp(x, (experts, weights), **case)
    for tokens in (slice(0, 1), slice(511, 512), slice(100, 107), slice(180, 230)):
        part = fr.moe_mlp(x[tokens], (experts[tokens], weights[tokens]), **case)
        assert_exact(part, whole[tokens])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_show(backend: str, threads, dtype: torch.dtype) -> None:
    for weights_on in ("output", "input"):
        case = make(70, 130, 200, 5, 3, dtype=dtype, biases=True, weights_on=weights_on)
        threads(1)
        wanted = results(fr.moe_mlp, case)
        for count in (2, 4):
            threads(count)
            for _ in range(2):
                for name, value in results(fr.moe_mlp, case).items():
                    assert_exact(value, wanted[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_token_stays_alone(backend: str, dtype: torch.dtype, poison: float) -> None:
    case = make(40, 64, 48, 3, 2, dtype=dtype, biases=True)
    clean = results(fr.moe_mlp, case)
    case["x"] = case["x"].clone()
    case["x"][17] = poison
    got = results(fr.moe_mlp, case)
    others = torch.arange(40) != 17
    for name in ("y", "x", "weights"):
        assert_exact(got[name][others], clean[name][others])
    assert not got["y"][17].isfinite().all()


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (3, 3), (65, 2)])
@pytest.mark.parametrize("hidden", [1, 16, 65])
def test_sizes(backend: str, num_tokens: int, top_k: int, hidden: int) -> None:
    for activation in ("swiglu", "gelu"):
        check_case(make(num_tokens, hidden, 33, 3, top_k, activation=activation, biases=True))


def test_no_slot_gives_zero(backend: str) -> None:
    case = make(6, 16, 8, 3, 2, biases=True)
    case["routing"][0][2] = -1
    case["routing"] = (
        case["routing"][0],
        case["routing"][1].masked_fill(case["routing"][0] < 0, math.nan),
    )
    got = results(fr.moe_mlp, case)
    assert not got["y"][2].any()
    assert not got["x"][2].any()
    assert not got["weights"][2].any()
    assert got["y"].isfinite().all()
    case["routing"][0].fill_(-1)
    assert not any(value.any() for value in results(fr.moe_mlp, case).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"align": 8}, {"capacity": 7}, {"align": 16, "capacity": 9}])
def test_plans_with_padding_and_drops(
    backend: str, dtype: torch.dtype, options: dict[str, int]
) -> None:
    for weights_on in ("output", "input"):
        case = make(30, 40, 24, 4, 2, dtype=dtype, biases=True, weights_on=weights_on)
        plan = fr.plan_dispatch(case["routing"][0], 4, **options)
        kept = plan.slot_to_row >= 0
        got = results(fr.moe_mlp, {**case, "plan": plan})
        # The same as slots that were never there.
        experts = torch.where(kept, case["routing"][0], -1)
        wanted = results(fr.moe_mlp, {**case, "routing": (experts, case["routing"][1])})
        for name in wanted:
            assert_exact(got[name], wanted[name])
        assert not got["weights"][~kept].any()
        args = (*(case[n] for n in ("x",)), case["routing"][1], case["w_up"], case["w_down"])
        maps = (plan.offsets, plan.row_to_slot, plan.slot_to_row)
        biases = (case["bias_up"], case["bias_down"])
        _, pre = OPS.moe_mlp(*args, *biases, *maps, 0, False, weights_on == "input")
        assert not pre[plan.row_to_slot < 0].any()


def test_a_plan_may_have_holes(backend: str) -> None:
    """A row without a slot in the middle of an expert: legal, though plan_dispatch makes none."""
    case = make(3, 24, 16, 2, 1, biases=True)
    case["routing"] = (torch.tensor([[0], [0], [1]], dtype=torch.int32), case["routing"][1])
    wanted = results(fr.moe_mlp, case)
    plan = fr.plan_dispatch(case["routing"][0], 2)
    holes = plan._replace(
        offsets=torch.tensor([0, 4, 6], dtype=torch.int32),
        row_to_slot=torch.tensor([0, -1, -1, 1, -1, 2, -1], dtype=torch.int32),
        slot_to_row=torch.tensor([[0], [3], [5]], dtype=torch.int32),
    )
    for name, value in results(fr.moe_mlp, {**case, "plan": holes}).items():
        assert_exact(value, wanted[name])


def test_an_expert_twice_counts_twice(backend: str) -> None:
    case = make(8, 16, 8, 3, 1)
    experts, weights = case["routing"]
    once = fr.moe_mlp(**case)
    case["routing"] = (experts.repeat(1, 2), weights.repeat(1, 2))
    assert_exact(fr.moe_mlp(**case), once * 2)


def test_one_expert_takes_all(backend: str) -> None:
    case = make(700, 24, 20, 3, 1)
    case["routing"] = (torch.full((700, 1), 1, dtype=torch.int64), case["routing"][1])
    check_case(case)


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, guarded, dtype: torch.dtype) -> None:
    case = make(20, 70, 37, 3, 2, dtype=dtype, biases=True)
    for linear in (True, False):
        order = make(20, 70, 37, 3, 2, dtype=dtype, biases=True, linear=linear)
        wanted = results(fr.moe_mlp, order)
        assert wanted["w_up"].stride() == order["w_up"].stride()
        assert wanted["w_down"].stride() == order["w_down"].stride()

        def within(w: Tensor) -> Tensor:
            """The same matrix inside a larger one, off every alignment, by rows or columns."""
            big = torch.full(
                (w.shape[0] + 1, w.shape[1] + 3, w.shape[2] + 5), math.nan, dtype=w.dtype
            )
            if w.stride(1) == 1:
                big = big.transpose(1, 2).contiguous().transpose(1, 2)
            view = big[1:, 3:, 3 : 3 + w.shape[2]]
            view.copy_(w)
            return view

        moved = {**order, "w_up": within(order["w_up"]), "w_down": within(order["w_down"])}
        apart = torch.cat([case["x"], torch.full_like(case["x"], math.nan)], 1)[:, :70]
        for x in (case["x"], guarded(case["x"]), apart, case["x"].t().contiguous().t()):
            with torch.no_grad():
                assert_exact(fr.moe_mlp(**{**moved, "x": x}), wanted["y"])
    rows = make(20, 70, 37, 3, 2, dtype=dtype, linear=False)
    neither = torch.full((3, 140, 148), math.nan, dtype=dtype)[:, ::2, ::2]
    neither.copy_(rows["w_up"])
    assert_exact(fr.moe_mlp(**{**rows, "w_up": neither}), fr.moe_mlp(**rows))


def test_backward_takes_expanded_gradients(backend: str) -> None:
    case = make(6, 8, 4, 2, 1)
    case["x"].requires_grad_()
    (got,) = torch.autograd.grad(fr.moe_mlp(**case).sum(), case["x"])
    (wanted,) = torch.autograd.grad(fr.moe_mlp(**case), case["x"], torch.ones(6, 8))
    assert_exact(got, wanted)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"activation": "swish"}, ValueError, "moe_mlp: activation must be one of"),
        ({"weights_on": "both"}, ValueError, "moe_mlp: weights_on must be one of output, input"),
        ({"x": torch.ones(4)}, ValueError, "moe_mlp: x must have 2 dimensions"),
        ({"x": [1.0]}, TypeError, "moe_mlp: x must be a torch.Tensor"),
        ({"x": torch.ones(4, 8).int()}, TypeError, "moe_mlp: x must be float32"),
        ({"x": torch.ones(4, 8).half()}, TypeError, "moe_mlp: w_up must be float16"),
        ({"x": torch.ones(4, 9)}, ValueError, r"moe_mlp: w_up must have shape \[any, 9, any\]"),
        ({"w_up": torch.ones(0, 8, 10)}, ValueError, "moe_mlp: w_up must hold at least 1 expert"),
        ({"w_up": torch.ones(3, 8, 9)}, ValueError, r"w_up must have shape \[3, 8, 10\]"),
        ({"w_down": torch.ones(2, 5, 8)}, ValueError, r"w_down must have shape \[3, any, 8\]"),
        ({"w_down": torch.ones(3, 0, 8)}, ValueError, "w_down must have an expert width"),
        ({"bias_up": torch.ones(3, 5)}, ValueError, r"bias_up must have shape \[3, 10\]"),
        ({"bias_down": torch.ones(8)}, ValueError, "bias_down must have 2 dimensions"),
        ({"routing": None}, TypeError, "routing must be a Routing or a pair"),
        (
            {"routing": [torch.zeros(4, 2).int()]},
            TypeError,
            r"moe_mlp: routing must be a Routing or a pair \(experts, weights\), got list of 1$",
        ),
        (
            {"routing": (torch.zeros(5, 2).int(), torch.ones(5, 2))},
            ValueError,
            r"experts must have shape \[4, any\]",
        ),
        (
            {"routing": (torch.zeros(4, 2).int(), torch.ones(4, 1))},
            ValueError,
            r"weights must have shape \[4, 2\]",
        ),
        pytest.param(
            {"routing": (torch.full((4, 2), 3).int(), torch.ones(4, 2))},
            (RuntimeError, ValueError),
            r"plan_dispatch: experts must be in \[-1, 3\), got 3",
            marks=pytest.mark.cpu_only,
        ),
        ({"w_up": torch.ones(3, 8, 10, device="meta")}, ValueError, "w_up must be on cpu"),
    ],
)
def test_errors_name_the_argument(
    backend: str, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        fr.moe_mlp(**{**make(4, 8, 5, 3, 2), **change})


@pytest.mark.cpu_only
def test_plans_of_other_sizes_are_refused(backend: str) -> None:
    case = make(4, 8, 5, 3, 2)
    plan = fr.plan_dispatch(case["routing"][0], 3)

    def bad(**fields: Tensor) -> dict[str, Any]:
        return {**case, "plan": plan._replace(**fields)}

    with pytest.raises(ValueError, match=r"plan.offsets must have shape \[4\]"):
        fr.moe_mlp(**bad(offsets=plan.offsets[:-1]))
    with pytest.raises(ValueError, match=r"plan\.offsets must be on cpu, got meta"):
        fr.moe_mlp(**bad(offsets=plan.offsets.to("meta")))
    with pytest.raises(RuntimeError, match="offsets that start at 0, never fall"):
        fr.moe_mlp(**bad(offsets=plan.offsets.flip(0)))
    with pytest.raises(RuntimeError, match="slot_to_row in"):
        fr.moe_mlp(**bad(slot_to_row=plan.slot_to_row + 100))
    unnamed = plan.slot_to_row.clone()
    unnamed[0, 0] = -1
    for maps in (
        {"row_to_slot": plan.row_to_slot + 100},
        {"slot_to_row": plan.slot_to_row.roll(1, 0)},
        {"slot_to_row": unnamed},
    ):
        with pytest.raises(RuntimeError, match="inverse to each other"):
            fr.moe_mlp(**bad(**maps))
