"""Exact arithmetic for the opcode tests, from the definitions: fractions, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

MASK = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}


def signed(x: int, bits: int) -> int:
    """The value of `bits` bits in two's complement."""
    x &= MASK[bits]
    return x - (1 << bits) if x >> (bits - 1) else x


class Format(NamedTuple):
    """A binary floating-point format."""

    bits: int
    mantissa: int  # bits stored
    bias: int


F16, BF16 = Format(16, 10, 15), Format(16, 7, 127)
F32, F64 = Format(32, 23, 127), Format(64, 52, 1023)


def decode(x: int, form: Format) -> float | Fraction:
    """The exact value of a pattern; inf and nan as floats. Of the zeros, -0.0 as a float."""
    exponent_bits = form.bits - 1 - form.mantissa
    sign = -1 if x >> (form.bits - 1) & 1 else 1
    exponent = x >> form.mantissa & ((1 << exponent_bits) - 1)
    mantissa = x & ((1 << form.mantissa) - 1)
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        if mantissa == 0:
            return -0.0 if sign < 0 else Fraction(0)
        return sign * Fraction(mantissa, 1) * Fraction(2) ** (1 - form.bias - form.mantissa)
    return (
        sign
        * Fraction(mantissa + (1 << form.mantissa))
        * Fraction(2) ** (exponent - form.bias - form.mantissa)
    )


def encode(value: float | Fraction, form: Format, mode: str = "rn") -> int:
    """The pattern of a value, rounded to nearest even, to zero, down or up."""
    sign_bit = 1 << (form.bits - 1)
    exponent_bits = form.bits - 1 - form.mantissa
    infinite = ((1 << exponent_bits) - 1) << form.mantissa
    if isinstance(value, float):
        if math.isnan(value):
            return infinite | (1 << (form.mantissa - 1))
        if math.isinf(value):
            return infinite | (sign_bit if value < 0 else 0)
        if value == 0:
            return sign_bit if math.copysign(1, value) < 0 else 0
        value = Fraction(value)
    if value == 0:
        return 0
    negative = value < 0
    magnitude = -value if negative else value
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    exponent = max(exponent, 1 - form.bias)
    steps = magnitude / Fraction(2) ** (exponent - form.mantissa)
    whole, rest = divmod(steps, 1)
    whole = int(whole)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    whole += up
    # A carry moves on into the exponent by itself.
    pattern = whole + ((exponent + form.bias - 1) << form.mantissa)
    if pattern >= infinite:
        to_zero = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        pattern = infinite - 1 if to_zero else infinite
    return pattern | (sign_bit if negative else 0)


def is_nan(x: int, form: Format) -> bool:
    value = decode(x, form)
    return isinstance(value, float) and math.isnan(value)


Real = float | Fraction


def on_reals(function: Callable[..., Real], *values: Real) -> Real:
    """`function` on exact values, or on floats where one is not finite. Zeros lose their sign."""
    if all(isinstance(v, Fraction) or v == 0 for v in values):
        return function(*(Fraction(v) for v in values))
    return function(*(float(v) for v in values))
