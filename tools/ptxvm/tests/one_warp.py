"""Runs an opcode on the 32 lanes of a warp, each with its values, beside an oracle."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from engine_fixture import Buffer, run_text
from oracle import MASK

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
