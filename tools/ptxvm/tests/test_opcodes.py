"""Integer, bit, selecting and branching opcodes against the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
from engine_fixture import Buffer, engine, run_text
from one_warp import REGISTER, check_integers, execute
from oracle import MASK, signed

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
    with pytest.raises(ValueError, match=r"unknown opcode frobnicate\.s32"):
        execute("frobnicate.s32 %r9, %r0;", [[0] * 32], [32], 32)
    with pytest.raises(ValueError, match="cannot decode"):
        execute("wgmma.fence.sync.aligned;", [[0] * 32], [32], 32)


# One of every class, with operands that it decodes with.
DECODED = (
    "add.s32 %r9, %r0, %r1", "mad.lo.s32 %r9, %r0, %r1, %r2", "add.rn.f32 %f0, %f1, %f2",
    "fma.rn.f32 %f0, %f1, %f2, %f3", "ex2.approx.ftz.f32 %f0, %f1", "add.rn.f16 %h0, %h1, %h2",
    "shl.b32 %r9, %r0, %r1", "lop3.b32 %r9, %r0, %r1, %r2, 0xE8",
    "shf.l.wrap.b32 %r9, %r0, %r1, %r2", "mov.u32 %r9, %r0",
    "selp.b32 %r9, %r0, %r1, %p0", "setp.lt.s32 %p0, %r0, %r1",
    "cvt.rn.f32.s32 %f0, %r0", "cvta.to.global.u64 %rd0, %rd1", "ld.global.nc.b32 %r9, [%a0]",
    "st.global.b32 [%a0], %r9", "membar.gl", "atom.global.add.u32 %r9, [%a0], %r0",
    "cp.async.ca.shared.global [%r0], [%a0], 4", "cp.async.wait_group 0",
    "shfl.sync.idx.b32 %r9, %r0, 0, 31, -1", "vote.sync.ballot.b32 %r9, %p0, -1",
    "match.any.sync.b32 %r9, %r0, -1", "redux.sync.add.s32 %r9, %r0, -1", "bar.sync 0",
    "bar.warp.sync -1", "bra.uni $L_end",
)  # fmt: skip


@pytest.mark.parametrize("text", DECODED)
def test_unknown_modifiers_are_errors(text: str) -> None:
    """A modifier that is not known may change the result: no place of an opcode takes one."""

    def decode(line: str) -> None:
        registers = ".reg .pred %p<2>; .reg .b16 %h<4>; .reg .b32 %r<10>; .reg .f32 %f<4>;"
        module = engine().Module(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry kernel()\n{"
            f"{registers} .reg .b64 %rd<2>; .reg .b64 %a<1>; {line}; $L_end: ret; }}"
        )
        module.texts("kernel")

    decode(text)
    opcode, operands = [*text.split(" ", 1), ""][:2]
    parts = opcode.split(".")
    for at in range(1, len(parts) + 1):
        for strange in ("frobnicate", "cluster"):
            spelling = ".".join([*parts[:at], strange, *parts[at:]])
            with pytest.raises(ValueError, match=r"cannot decode|unknown"):
                decode(f"{spelling} {operands}")


@pytest.mark.parametrize(
    "text",
    [
        "atom.global.cta.add.u32 %r9, [%a0], %r0",  # orders less than the device
        "ld.acquire.cta.global.b32 %r9, [%a0]",
        "min.relu.s32 %r9, %r0, %r1",
        "setp.lt.ftz.f16 %p0, %h0, %h1",
        "cvt.rn.satfinite.tf32.f32 %r9, %f0",
        "mad.lo.sat.s32 %r9, %r0, %r1, %r2",
    ],
)
def test_modifiers_without_an_implementation_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="cannot decode"):
        execute(text + ";", [[0] * 32], [32], 32)


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
