"""Opcodes against the PTX ISA, by an oracle in exact arithmetic."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from engine_fixture import Buffer, engine, run_text
from oracle import BF16, F16, F32, F64, MASK, Format, decode, encode, is_nan, on_reals, signed

REGISTER = {16: "%h", 32: "%r", 64: "%d"}


def edge_values(bits: int, seed: int) -> list[int]:
    """32 patterns: the edges, then random ones of every size."""
    rng = random.Random(seed)
    edges = [0, 1, 2, 3, MASK[bits], MASK[bits] - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 31, 32]
    return edges + [rng.getrandbits(rng.randint(1, bits)) for _ in range(22)]


def shuffled(values: list[int], seed: int) -> list[int]:
    values = list(values)
    random.Random(seed).shuffle(values)
    return values


def execute(text: str, inputs: list[list[int]], widths: list[int], out_bits: int) -> list[int]:
    """Runs `text` on 32 lanes; inputs in registers 0, 1, ..., the result in register 9."""
    buffers = [Buffer(np.array(column, dtype=np.uint64), writable=False) for column in inputs]
    out = Buffer(np.zeros(32, dtype=np.uint64))
    buffers.append(out)
    loads = "".join(
        f"ld.global.b{bits} {REGISTER[bits]}{i}, [%a{i}];" for i, bits in enumerate(widths)
    )
    store = f"st.global.b{out_bits} [%a{len(inputs)}], {REGISTER[out_bits]}9;"
    try:
        assert run_text(loads + text + store, buffers) == ""
        return [int(x) for x in out.values]
    finally:
        for buffer in buffers:
            buffer.free()


def check_integers(
    text: str, widths: list[int], out_bits: int, oracle: Callable[..., int], rounds: int = 3
) -> None:
    for seed in range(rounds):
        inputs = [
            shuffled(edge_values(bits, seed + i), 10 * seed + i) for i, bits in enumerate(widths)
        ]
        got = execute(text, inputs, widths, out_bits)
        wanted = [oracle(*lane) & MASK[out_bits] for lane in zip(*inputs, strict=True)]
        assert got == wanted, text


# ---- integers ----------------------------------------------------------------------------------


def clamp_shift(x: int, by: int, bits: int, kind: str) -> int:
    by &= MASK[32]
    if kind == "shl":
        return x << by if by < bits else 0
    if kind == "u":
        return x >> by if by < bits else 0
    return signed(x, bits) >> min(by, bits - 1)


def truncated(a: int, b: int) -> tuple[int, int]:
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return quotient, a - b * quotient


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("kind", ["u", "s"])
def test_integer_arithmetic(bits: int, kind: str) -> None:
    r, t = REGISTER[bits], f"{kind}{bits}"
    v = (lambda x: signed(x, bits)) if kind == "s" else (lambda x: x)
    two = [bits, bits]
    check_integers(f"add.{t} {r}9, {r}0, {r}1;", two, bits, lambda a, b: a + b)
    check_integers(f"sub.{t} {r}9, {r}0, {r}1;", two, bits, lambda a, b: a - b)
    check_integers(f"mul.lo.{t} {r}9, {r}0, {r}1;", two, bits, lambda a, b: a * b)
    check_integers(f"mul.hi.{t} {r}9, {r}0, {r}1;", two, bits, lambda a, b: v(a) * v(b) >> bits)
    check_integers(
        f"mad.lo.{t} {r}9, {r}0, {r}1, {r}2;", [bits] * 3, bits, lambda a, b, c: a * b + c
    )
    check_integers(
        f"mad.hi.{t} {r}9, {r}0, {r}1, {r}2;",
        [bits] * 3,
        bits,
        lambda a, b, c: (v(a) * v(b) >> bits) + c,
    )
    check_integers(f"min.{t} {r}9, {r}0, {r}1;", two, bits, lambda a, b: min(v(a), v(b)))
    check_integers(f"max.{t} {r}9, {r}0, {r}1;", two, bits, lambda a, b: max(v(a), v(b)))
    check_integers(
        f"or.b{bits} {r}1, {r}1, 1; div.{t} {r}9, {r}0, {r}1;",
        two,
        bits,
        lambda a, b: truncated(v(a), v(b | 1))[0],
    )
    check_integers(
        f"or.b{bits} {r}1, {r}1, 1; rem.{t} {r}9, {r}0, {r}1;",
        two,
        bits,
        lambda a, b: truncated(v(a), v(b | 1))[1],
    )
    if kind == "s":
        check_integers(f"abs.{t} {r}9, {r}0;", [bits], bits, lambda a: abs(v(a)))
        check_integers(f"neg.{t} {r}9, {r}0;", [bits], bits, lambda a: -v(a))
    check_integers(
        f"shl.b{bits} {r}9, {r}0, %r1;",
        [bits, 32],
        bits,
        lambda a, b: clamp_shift(a, b, bits, "shl"),
    )
    check_integers(
        f"shr.{t} {r}9, {r}0, %r1;", [bits, 32], bits, lambda a, b: clamp_shift(a, b, bits, kind)
    )
    for name, holds in (
        ("eq", lambda a, b: a == b),
        ("ne", lambda a, b: a != b),
        ("lt", lambda a, b: a < b),
        ("le", lambda a, b: a <= b),
        ("gt", lambda a, b: a > b),
        ("ge", lambda a, b: a >= b),
    ):
        check_integers(
            f"setp.{name}.{t} %p0, {r}0, {r}1; selp.b32 %r9, 7, 9, %p0;",
            two,
            32,
            lambda a, b, holds=holds: 7 if holds(v(a), v(b)) else 9,
        )


@pytest.mark.parametrize("kind", ["u", "s"])
def test_widening_products(kind: str) -> None:
    def v(x: int, bits: int) -> int:
        return signed(x, bits) if kind == "s" else x

    check_integers(
        f"mul.wide.{kind}32 %d9, %r0, %r1;", [32, 32], 64, lambda a, b: v(a, 32) * v(b, 32)
    )
    check_integers(
        f"mul.wide.{kind}16 %r9, %h0, %h1;", [16, 16], 32, lambda a, b: v(a, 16) * v(b, 16)
    )
    check_integers(
        f"mad.wide.{kind}32 %d9, %r0, %r1, %d2;",
        [32, 32, 64],
        64,
        lambda a, b, c: v(a, 32) * v(b, 32) + c,
    )


def test_saturating_and_carrying() -> None:
    def clamped(x: int) -> int:
        return max(-(1 << 31), min((1 << 31) - 1, x))

    def s(x: int) -> int:
        return signed(x, 32)

    check_integers("add.sat.s32 %r9, %r0, %r1;", [32] * 2, 32, lambda a, b: clamped(s(a) + s(b)))
    check_integers("sub.sat.s32 %r9, %r0, %r1;", [32] * 2, 32, lambda a, b: clamped(s(a) - s(b)))
    check_integers(
        "add.cc.u32 %r5, %r0, %r1; addc.u32 %r9, %r2, 0;",
        [32] * 3,
        32,
        lambda a, b, c: c + (a + b >> 32),
    )
    check_integers(
        "sub.cc.u32 %r5, %r0, %r1; subc.u32 %r9, %r2, 0;",
        [32] * 3,
        32,
        lambda a, b, c: c - (a < b),
    )
    check_integers(
        "mad.lo.cc.u32 %r5, %r0, %r1, %r2; madc.hi.u32 %r9, %r0, %r1, 5;",
        [32] * 3,
        32,
        lambda a, b, c: (a * b >> 32) + 5 + ((a * b & MASK[32]) + c >> 32),
    )
    check_integers("sad.u32 %r9, %r0, %r1, %r2;", [32] * 3, 32, lambda a, b, c: abs(a - b) + c)


# ---- bits --------------------------------------------------------------------------------------


def prmt(a: int, b: int, selector: int) -> int:
    table = [(b << 32 | a) >> (8 * i) & 255 for i in range(8)]
    result = 0
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = table[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << (8 * i)
    return result


def bfe(x: int, position: int, length: int, bits: int, kind: str) -> int:
    position, length = position & 255, length & 255
    if length == 0:
        return 0
    sign = x >> min(position + length - 1, bits - 1) & 1 if kind == "s" else 0
    result = 0
    for i in range(bits):
        bit = x >> (position + i) & 1 if i < length and position + i < bits else sign
        result |= bit << i
    return result


def bfi(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


@pytest.mark.parametrize("bits", [32, 64])
def test_bits(bits: int) -> None:
    r = REGISTER[bits]
    two = [bits, bits]
    check_integers(f"and.b{bits} {r}9, {r}0, {r}1;", two, bits, lambda a, b: a & b)
    check_integers(f"or.b{bits} {r}9, {r}0, {r}1;", two, bits, lambda a, b: a | b)
    check_integers(f"xor.b{bits} {r}9, {r}0, {r}1;", two, bits, lambda a, b: a ^ b)
    check_integers(f"not.b{bits} {r}9, {r}0;", [bits], bits, lambda a: ~a)
    check_integers(f"cnot.b{bits} {r}9, {r}0;", [bits], bits, lambda a: a == 0)
    check_integers(f"popc.b{bits} %r9, {r}0;", [bits], 32, lambda a: a.bit_count())
    check_integers(f"clz.b{bits} %r9, {r}0;", [bits], 32, lambda a: bits - a.bit_length())
    check_integers(
        f"brev.b{bits} {r}9, {r}0;", [bits], bits, lambda a: int(f"{a:0{bits}b}"[::-1], 2)
    )
    check_integers(f"bfind.u{bits} %r9, {r}0;", [bits], 32, lambda a: a.bit_length() - 1)
    check_integers(
        f"bfind.shiftamt.u{bits} %r9, {r}0;",
        [bits],
        32,
        lambda a: bits - a.bit_length() if a else -1,
    )
    check_integers(
        f"bfind.s{bits} %r9, {r}0;",
        [bits],
        32,
        lambda a: (a if signed(a, bits) >= 0 else ~a & MASK[bits]).bit_length() - 1,
    )
    for kind in "us":
        check_integers(
            f"bfe.{kind}{bits} {r}9, {r}0, %r1, %r2;",
            [bits, 32, 32],
            bits,
            lambda a, p, n, kind=kind: bfe(a, p, n, bits, kind),
        )
    check_integers(
        f"bfi.b{bits} {r}9, {r}0, {r}1, %r2, %r3;",
        [bits, bits, 32, 32],
        bits,
        lambda a, b, p, n: bfi(a, b, p, n, bits),
    )


def test_three_operand_bits() -> None:
    three = [32] * 3
    check_integers("prmt.b32 %r9, %r0, %r1, %r2;", three, 32, prmt)
    for table in (0xE8, 0x96, 0xC0, 0x01):

        def lop3(a: int, b: int, c: int, table: int = table) -> int:
            bits = (
                table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1
                for i in range(32)
            )
            return sum(bit << i for i, bit in enumerate(bits))

        check_integers(f"lop3.b32 %r9, %r0, %r1, %r2, {table:#x};", three, 32, lop3)
    pair = lambda a, b: b << 32 | a  # noqa: E731
    check_integers(
        "shf.l.wrap.b32 %r9, %r0, %r1, %r2;",
        three,
        32,
        lambda a, b, c: pair(a, b) << (c & 31) >> 32,
    )
    check_integers(
        "shf.r.wrap.b32 %r9, %r0, %r1, %r2;", three, 32, lambda a, b, c: pair(a, b) >> (c & 31)
    )
    check_integers(
        "shf.l.clamp.b32 %r9, %r0, %r1, %r2;",
        three,
        32,
        lambda a, b, c: pair(a, b) << min(c, 32) >> 32,
    )
    check_integers(
        "shf.r.clamp.b32 %r9, %r0, %r1, %r2;", three, 32, lambda a, b, c: pair(a, b) >> min(c, 32)
    )
    check_integers(
        "bmsk.clamp.b32 %r9, %r0, %r1;",
        [32, 32],
        32,
        lambda a, b: ((1 << min(b, 32)) - 1) << min(a, 32),
    )
    check_integers("mov.b64 %d9, {%r0, %r1};", [32, 32], 64, lambda a, b: b << 32 | a)
    check_integers("mov.b64 {%r5, %r9}, %d0;", [64], 32, lambda a: a >> 32)
    check_integers("mov.b32 {%h5, %h9}, %r0;", [32], 16, lambda a: a >> 16)


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
            text = f"setp.{name}.{kind} %p0|%p1, {r}0, {r}1; selp.b32 %r9, 1, 0, %p0; @%p1 add.s32 %r9, %r9, 2;"
            got = execute(text, inputs, [form.bits] * 2, 32)
            for a, b, result in zip(*inputs, got, strict=True):
                holds_here = holds(float(decode(a, form)), float(decode(b, form)))
                assert result == (1 if holds_here else 2), name


def test_joined_predicates() -> None:
    for join, function in (
        ("and", lambda a, b: a and b),
        ("or", lambda a, b: a or b),
        ("xor", lambda a, b: a != b),
    ):
        for negated in ("", "!"):
            check_integers(
                f"setp.gt.u32 %p1, %r1, 100; setp.lt.{join}.s32 %p0|%p2, %r0, 5, {negated}%p1;"
                "selp.b32 %r9, 1, 0, %p0; @%p2 add.s32 %r9, %r9, 2;",
                [32, 32],
                32,
                lambda a, b, f=function, n=negated: (
                    f(signed(a, 32) < 5, (b > 100) != (n == "!"))
                    + 2 * f(not signed(a, 32) < 5, (b > 100) != (n == "!"))
                ),
            )


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


def test_integer_conversions() -> None:
    for to_kind in "us":
        for to in (8, 16, 32, 64):
            for kind in "us":
                for bits in (8, 16, 32, 64):
                    register, out = max(bits, 16), max(to, 16)

                    def wanted(x: int, kind=kind, bits=bits, to=to, to_kind=to_kind) -> int:
                        value = signed(x, bits) if kind == "s" else x & MASK[bits]
                        return signed(value, to) if to_kind == "s" else value & MASK[to]

                    def clamped(x: int, kind=kind, bits=bits, to=to, to_kind=to_kind) -> int:
                        value = signed(x, bits) if kind == "s" else x & MASK[bits]
                        low = -(1 << (to - 1)) if to_kind == "s" else 0
                        return max(low, min(value, (1 << (to - (to_kind == "s"))) - 1))

                    text = f"{to_kind}{to}.{kind}{bits} {REGISTER[out]}9, {REGISTER[register]}0;"
                    check_integers("cvt." + text, [register], out, wanted, rounds=1)
                    check_integers("cvt.sat." + text, [register], out, clamped, rounds=1)


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


# ---- selection ---------------------------------------------------------------------------------


def test_selection() -> None:
    check_integers(
        "setp.ne.s32 %p0, %r2, 0; selp.b32 %r9, %r0, %r1, %p0;",
        [32] * 3,
        32,
        lambda a, b, c: a if c else b,
    )
    check_integers(
        "slct.b32.s32 %r9, %r0, %r1, %r2;",
        [32] * 3,
        32,
        lambda a, b, c: a if signed(c, 32) >= 0 else b,
    )
    check_integers(
        "setp.lt.s32 %p0, %r0, 0; mov.u32 %r9, %r1; @%p0 mov.u32 %r9, %r2;",
        [32] * 3,
        32,
        lambda a, b, c: c if signed(a, 32) < 0 else b,
    )


def test_branches_by_lane_and_table() -> None:
    check_integers(
        """
        and.b32 %r0, %r0, 3;
        $L_table: .branchtargets $L_0, $L_1, $L_2, $L_3;
        brx.idx %r0, $L_table;
        $L_0: mov.u32 %r9, 10; bra $L_end;
        $L_1: mov.u32 %r9, 11; bra.uni $L_end;
        $L_2: mov.u32 %r9, 12; bra $L_end;
        $L_3: mov.u32 %r9, 13;
        $L_end: add.s32 %r9, %r9, 1;
        """,
        [32],
        32,
        lambda a: 11 + (a & 3),
    )
    # Every lane goes around the loop its own number of times.
    check_integers(
        """
        and.b32 %r0, %r0, 15; mov.u32 %r9, 0;
        $L_loop: setp.eq.s32 %p0, %r0, 0;
        @%p0 bra $L_done;
        add.s32 %r9, %r9, %r0; sub.s32 %r0, %r0, 1;
        bra $L_loop;
        $L_done:
        """,
        [32],
        32,
        lambda a: (a & 15) * ((a & 15) + 1) // 2,
    )


def test_unknown_opcodes_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown opcode frobnicate.s32"):
        execute("frobnicate.s32 %r9, %r0;", [[0] * 32], [32], 32)
    with pytest.raises(ValueError, match="cannot decode"):
        execute("wgmma.fence.sync.aligned;", [[0] * 32], [32], 32)


def test_undefined_values_are_tracked_to_their_use() -> None:
    for text, is_used in (
        ("add.s32 %r9, %r0, %r20;", True),
        ("setp.eq.s32 %p0, %r0, %r0; selp.b32 %r9, %r0, %r20, %p0;", False),
        ("setp.ne.s32 %p0, %r0, %r0; selp.b32 %r9, %r0, %r20, %p0;", True),
        ("and.b32 %r9, %r20, 0;", False),
        ("or.b32 %r9, %r20, -1;", False),
        ("xor.b32 %r9, %r20, 0;", True),
        ("mov.u32 %r9, %r0; add.s32 %r21, %r20, 1;", False),
        ("mov.u32 %r9, %r0; setp.eq.s32 %p0, %r20, 1; @%p0 mov.u32 %r9, 1;", True),
    ):
        source, out = Buffer(np.zeros(32, np.uint64)), Buffer(np.zeros(32, np.uint64))
        body = f"ld.global.b32 %r0, [%a0]; {text} st.global.b32 [%a1], %r9;"
        report = run_text(body, [source, out])
        source.free()
        out.free()
        assert report.startswith("undefined value") == is_used, (text, report)
        engine().clear_reports()
