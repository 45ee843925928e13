"""Floating-point opcodes against exact arithmetic, rounded once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
from one_warp import REGISTER, edge_values, execute, shuffled
from oracle import BF16, F16, F32, F64, MASK, Format, decode, encode, is_nan, on_reals, signed

# ---- floating point ----------------------------------------------------------------------------


def float_values(form: Format, seed: int) -> list[int]:
    """32 patterns: zeros, infinities, NaN, subnormals, halves and ones near each other."""
    rng = random.Random(seed)
    sign = 1 << (form.bits - 1)
    one = form.bias << form.mantissa
    infinite = ((1 << (form.bits - 1 - form.mantissa)) - 1) << form.mantissa
    edges = [0, sign, one, one | sign, infinite, infinite | sign, infinite + 1, 1, sign + 1]
    edges += [infinite - 1, (1 << form.mantissa) - 1, 1 << form.mantissa, one + 1, one - 1]
    near = [
        one + rng.getrandbits(form.mantissa) - (rng.getrandbits(1) << form.mantissa)
        for _ in range(10)
    ]
    return edges + near + [rng.getrandbits(form.bits) for _ in range(8)]


def check_reals(
    text: str, form: Format, count: int, function: Callable[..., object], mode: str = "rn"
) -> None:
    for seed in range(6):
        inputs = [shuffled(float_values(form, seed + i), 10 * seed + i) for i in range(count)]
        got = execute(text, inputs, [form.bits] * count, form.bits)
        for lane, result in enumerate(got):
            values = [decode(column[lane], form) for column in inputs]
            exact = on_reals(function, *values)
            wanted = encode(exact, form, mode)
            if is_nan(wanted, form):
                assert is_nan(result, form), (text, values)
            elif exact == 0:  # of either sign
                assert result << 1 & MASK[form.bits] == 0, (text, values)
            else:
                assert result == wanted, (text, values, hex(result), hex(wanted))


def test_what_cancels_is_minus_zero_downward_only() -> None:
    one, minus_one = encode(1.0, F32), encode(-1.0, F32)
    for mode, zero in (("rn", 0), ("rz", 0), ("rp", 0), ("rm", 1 << 31)):
        inputs = [[one] * 32, [minus_one] * 32]
        assert set(execute(f"add.{mode}.f32 %r9, %r0, %r1;", inputs, [32, 32], 32)) == {zero}
        assert set(execute(f"fma.{mode}.f32 %r9, %r0, %r0, %r1;", inputs, [32, 32], 32)) == {zero}


def multiply(a, b):
    return a * b


def fused(a, b, c):
    return a * b + c


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("form", "name"), [(F32, "f32"), (F64, "f64")])
def test_float_arithmetic(form: Format, name: str, mode: str) -> None:
    r = REGISTER[form.bits]
    check_reals(f"add.{mode}.{name} {r}9, {r}0, {r}1;", form, 2, lambda a, b: a + b, mode)
    check_reals(f"sub.{mode}.{name} {r}9, {r}0, {r}1;", form, 2, lambda a, b: a - b, mode)
    check_reals(f"mul.{mode}.{name} {r}9, {r}0, {r}1;", form, 2, multiply, mode)
    check_reals(f"fma.{mode}.{name} {r}9, {r}0, {r}1, {r}2;", form, 3, fused, mode)


@pytest.mark.parametrize(("form", "name"), [(F16, "f16"), (BF16, "bf16")])
def test_half_arithmetic(form: Format, name: str) -> None:
    check_reals(f"add.rn.{name} %h9, %h0, %h1;", form, 2, lambda a, b: a + b)
    check_reals(f"sub.rn.{name} %h9, %h0, %h1;", form, 2, lambda a, b: a - b)
    check_reals(f"mul.rn.{name} %h9, %h0, %h1;", form, 2, multiply)
    check_reals(f"fma.rn.{name} %h9, %h0, %h1, %h2;", form, 3, fused)
    # Packed: the same in both halves.
    pack = "mov.b32 %r10, {%h0, %h1}; mov.b32 %r11, {%h1, %h0}; mov.b32 %r12, {%h2, %h2};"
    check_reals(
        f"{pack} fma.rn.{name}x2 %r13, %r10, %r11, %r12; mov.b32 {{%h9, %h10}}, %r13;",
        form,
        3,
        fused,
    )
    check_reals(
        f"{pack} fma.rn.{name}x2 %r13, %r10, %r11, %r12; mov.b32 {{%h10, %h9}}, %r13;",
        form,
        3,
        fused,
    )


@pytest.mark.parametrize(
    ("form", "name"), [(F32, "f32"), (F64, "f64"), (F16, "f16"), (BF16, "bf16")]
)
def test_minimum_and_maximum(form: Format, name: str) -> None:
    r = REGISTER[form.bits]
    for op, pick in (("min", min), ("max", max)):
        for seed in range(3):
            inputs = [shuffled(float_values(form, seed + i), 10 * seed + i) for i in range(2)]
            got = execute(f"{op}.{name} {r}9, {r}0, {r}1;", inputs, [form.bits] * 2, form.bits)
            for a, b, result in zip(*inputs, got, strict=True):
                if is_nan(a, form) and is_nan(b, form):
                    assert is_nan(result, form)
                elif is_nan(a, form) or is_nan(b, form):
                    assert result == (b if is_nan(a, form) else a)
                else:
                    # -0 counts as less than +0.
                    order = [(float(decode(x, form)), -(x >> (form.bits - 1)), x) for x in (a, b)]
                    assert result == pick(order)[2]


def test_comparisons_with_nan() -> None:
    relations = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a < b or a > b,
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
        "equ": lambda a, b: not (a < b or a > b),
        "neu": lambda a, b: a != b,
        "ltu": lambda a, b: not a >= b,
        "leu": lambda a, b: not a > b,
        "gtu": lambda a, b: not a <= b,
        "geu": lambda a, b: not a < b,
        "num": lambda a, b: a == a and b == b,
        "nan": lambda a, b: a != a or b != b,
    }
    for name, holds in relations.items():
        for form, kind in ((F32, "f32"), (F64, "f64")):
            r = REGISTER[form.bits]
            inputs = [shuffled(float_values(form, i), i) for i in range(2)]
            text = f"setp.{name}.{kind} %p0|%p1, {r}0, {r}1; selp.b32 %r9, 1, 0, %p0;"
            text += "@%p1 add.s32 %r9, %r9, 2;"
            got = execute(text, inputs, [form.bits] * 2, 32)
            for a, b, result in zip(*inputs, got, strict=True):
                holds_here = holds(float(decode(a, form)), float(decode(b, form)))
                assert result == (1 if holds_here else 2), name


FORMS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


@pytest.mark.parametrize(
    ("to", "source", "mode"),
    [
        *(("f32", "f64", mode) for mode in ("rn", "rz", "rm", "rp")),
        *((half, "f32", mode) for half in ("f16", "bf16") for mode in ("rn", "rz")),
        *((("f64", "f32", ""), ("f32", "f16", ""), ("f32", "bf16", ""))),
        ("f16", "f64", "rn"),
    ],
)
def test_float_conversions(to: str, source: str, mode: str) -> None:
    target, form = FORMS[to], FORMS[source]
    dot = f".{mode}" if mode else ""
    text = f"cvt{dot}.{to}.{source} {REGISTER[target.bits]}9, {REGISTER[form.bits]}0;"
    for seed in range(8):
        values = float_values(form, seed)
        if target.mantissa < form.mantissa:  # around the middle between two results
            rng = random.Random(seed)
            drop = form.mantissa - target.mantissa
            middles = [x >> drop << drop | 1 << (drop - 1) for x in values[14:26]]
            values[14:26] = [x + rng.choice((-1, 0, 1)) for x in middles]
        got = execute(text, [values], [form.bits], target.bits)
        for x, result in zip(values, got, strict=True):
            wanted = encode(decode(x, form), target, mode or "rn")
            if is_nan(wanted, target):
                assert is_nan(result, target)
            else:
                assert result == wanted, (text, hex(x), hex(result), hex(wanted))


def test_packed_conversions() -> None:
    for half, form in (("f16", F16), ("bf16", BF16)):
        for mode in ("rn", "rz"):
            for seed in range(4):
                a, b = (shuffled(float_values(F32, seed + i), i) for i in range(2))
                text = f"cvt.{mode}.{half}x2.f32 %r9, %r0, %r1;"
                got = execute(text, [a, b], [32, 32], 32)
                for x, y, result in zip(a, b, got, strict=True):
                    for value, part in ((x, result >> 16), (y, result & 0xFFFF)):
                        wanted = encode(decode(value, F32), form, mode)
                        assert part == wanted or (is_nan(wanted, form) and is_nan(part, form))


def test_tf32_rounds_ties_away() -> None:
    for seed in range(4):
        values = [x >> 12 << 12 for x in float_values(F32, seed)]
        got = execute("cvt.rna.tf32.f32 %r9, %r0;", [values], [32], 32)
        for x, result in zip(values, got, strict=True):
            if x >> 23 & 255 != 255:
                assert result == (x + 0x1000) & 0xFFFFE000


@pytest.mark.parametrize("kind", ["u", "s"])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", ["f32", "f64"])
def test_floats_to_integers(kind: str, bits: int, name: str) -> None:
    form = FORMS[name]
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind == "s" else (0, MASK[bits])
    roundings = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for mode, to_integer in roundings.items():
        for seed in range(3):
            rng = random.Random(seed)
            values = [
                encode(Fraction(rng.randint(-(10**6), 10**6), 2 ** rng.choice((0, 1, 2, 10))), form)
                for _ in range(20)
            ]
            values += [x for x in float_values(form, seed)[:12] if not is_nan(x, form)][:11]
            values = (values + values)[:32]
            text = f"cvt.{mode}.{kind}{bits}.{name} {REGISTER[bits]}9, {REGISTER[form.bits]}0;"
            got = execute(text, [values], [form.bits], bits)
            for x, result in zip(values, got, strict=True):
                value = decode(x, form)
                if isinstance(value, float) and math.isinf(value):
                    wanted = high if value > 0 else low
                else:
                    wanted = max(low, min(high, to_integer(Fraction(value))))
                assert result == wanted & MASK[bits], (text, value)


def test_integers_to_floats() -> None:
    for kind in "us":
        for bits in (16, 32, 64):
            for name in ("f32", "f64"):
                for mode in ("rn", "rz", "rm", "rp"):
                    form = FORMS[name]
                    text = (
                        f"cvt.{mode}.{name}.{kind}{bits} {REGISTER[form.bits]}9, {REGISTER[bits]}0;"
                    )
                    for seed in range(2):
                        values = edge_values(bits, seed)
                        got = execute(text, [values], [bits], form.bits)
                        for x, result in zip(values, got, strict=True):
                            value = signed(x, bits) if kind == "s" else x
                            assert result == encode(Fraction(value), form, mode), (text, value)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ex2.approx.ftz.f32", lambda x: 2.0**x),
        ("lg2.approx.f32", math.log2),
        ("sqrt.rn.f32", math.sqrt),
        ("rsqrt.approx.f32", lambda x: 1 / math.sqrt(x)),
        ("rcp.rn.f32", lambda x: 1 / x),
        ("sin.approx.f32", math.sin),
        ("cos.approx.f32", math.cos),
        ("tanh.approx.f32", math.tanh),
    ],
)
def test_special_functions(name: str, function: Callable[[float], float]) -> None:
    rng = random.Random(1)
    inputs = [encode(Fraction(rng.uniform(0.01, 9)), F32) for _ in range(32)]
    got = execute(f"{name} %r9, %r0;", [inputs], [32], 32)
    for x, result in zip(inputs, got, strict=True):
        wanted = encode(Fraction(function(float(decode(x, F32)))), F32)
        assert abs(result - wanted) <= 1, (name, decode(x, F32))


def test_ex2_at_its_ends() -> None:
    ends = [-math.inf, math.inf, math.nan, 0.0, 200.0, -200.0, -126.0, 127.0, 128.0, 1.0, -1.0]
    inputs = [encode(x, F32) for x in (ends * 3)[:32]]
    got = execute("ex2.approx.ftz.f32 %r9, %r0;", [inputs], [32], 32)
    wanted = [0.0, math.inf, math.nan, 1.0, math.inf, 0.0, 2.0**-126, 2.0**127, math.inf, 2.0, 0.5]
    for result, value in zip(got, (wanted * 3)[:32], strict=True):
        if math.isnan(value):
            assert is_nan(result, F32)
        else:
            assert result == encode(value, F32)
