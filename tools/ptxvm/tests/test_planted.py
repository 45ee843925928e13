"""Planted bugs are reported on every seed, at their line; clean look-alikes never are."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from engine_fixture import HERE, SEEDS, Buffer, compiled, engine, launch
from numpy.typing import NDArray

N = 256
Ints = NDArray[np.int32]


@cache
def source() -> list[str]:
    return (HERE / "planted.cu").read_text().splitlines()


@cache
def marks() -> dict[str, dict[int, list[str]]]:
    """For every planted kernel, the lines of its marks and the kinds of report they stand for.

    A kernel that is a call of a device function of this file has the marks of that function.
    """
    found: dict[str, dict[int, list[str]]] = {}
    owner = ""
    calls: dict[str, str] = {}
    for number, line in enumerate(source(), 1):
        if match := re.match(r"(?:KERNEL|__device__ void) (\w+)\(", line):
            owner = match[1]
            found[owner] = {}
        if match := re.match(r"  (\w+)<.*>\(in, out", line):
            calls[owner] = match[1]
        if match := re.search(r"// BUG (.*)$", line):
            found[owner][number] = match[1].split("; ")
    for kernel, function in calls.items():
        if function in found:
            found[kernel] = found[function]
    kernels = set(re.findall(r"^KERNEL (\w+)\(", "\n".join(source()), re.M))
    return {kernel: lines for kernel, lines in found.items() if kernel in kernels}


# Grid and block, where they are not one block of 128 threads; bytes of dynamic shared memory.
SHAPES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        (
            *("missing_syncwarp", "missing_second_syncwarp", "shuffle_for_a_barrier"),
            *("syncwarp_of_half", "mask_without_caller", "shuffle_from_outside"),
            *("matrix_address_of_wrong_row", "matrix_past_its_tile", "matrix_product_wrongly"),
        ),
        (1, 32),
    ),
    **dict.fromkeys(
        ("blocks_write_one_place", "block_reads_another", "plain_flag"),
        (6, 32),
    ),
    **dict.fromkeys(
        (
            "last_block_without_writer_fence",
            "last_block_without_reader_fence",
            "last_block_without_barrier",
        ),
        (4, 64),
    ),
    "write_past_end": (3, 128),
}
SHARED = {"past_dynamic_shared": 512}


def inputs() -> tuple[Ints, Ints]:
    values = (np.arange(N, dtype=np.int32) * 7 + 3) % 11
    return values, np.arange(N, dtype=np.int32)[::-1].copy() % 128


def run(kernel: str, file: str, grid: int, block: int, shared: int = 0) -> tuple[str, Ints]:
    values, table = inputs()
    buffers = [
        Buffer(values, writable=False),
        Buffer(table, writable=False),
        Buffer(values, defined=False),
        Buffer(values, defined=False),
    ]
    try:
        report = launch(
            compiled(file), kernel, [*buffers, N], grid=grid, block=block, shared=shared
        )
        return report, buffers[2].values.copy()
    finally:
        for buffer in buffers:
            buffer.free()


# ---- planted bugs ------------------------------------------------------------------------------


def test_there_are_enough_planted_bugs() -> None:
    assert len(marks()) >= 25
    assert all(marks().values())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", sorted(marks()))
def test_planted_bug_is_reported_at_its_line(kernel: str, seed: int) -> None:
    engine().set_options(seed=seed, most_instructions=2_000_000)
    if kernel.startswith("last_block"):
        assert launch(compiled("planted.cu"), "clear_tickets", []) == ""
    grid, block = SHAPES.get(kernel, (1, 128))
    report, out = run(kernel, "planted.cu", grid, block, SHARED.get(kernel, 0))
    if kernel.endswith("_wrongly"):  # breaks no rule: the reference tells
        wanted = np.asarray(CONTROLS[kernel.removesuffix("_wrongly")][3](inputs()[0]))
        assert report == ""
        assert not np.array_equal(out[: len(wanted)], wanted)
        return
    assert report, "nothing was reported"
    expected = [(line, kind) for line, kinds in marks()[kernel].items() for kind in kinds]
    assert any(
        report.startswith(kind + ":") and f"planted.cu:{line}" in report.rsplit("; ", 1)[1]
        for line, kind in expected
    ), report


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_that_was_freed_is_reported_as_such(seed: int) -> None:
    engine().set_options(seed=seed)
    values, table = inputs()
    buffers = [
        Buffer(part, writable=i > 1) for i, part in enumerate((values, table, values, values))
    ]
    buffers[0].free()
    report = launch(compiled("controls.cu"), "reverse", [*buffers, N], block=128)
    assert report.startswith("out of bounds:")
    assert "has been freed (use after free)" in report
    assert "controls.cu:" in report
    for buffer in buffers[1:]:
        buffer.free()


# ---- clean controls ----------------------------------------------------------------------------


def halves(x: Ints, count: int) -> Ints:
    return x.reshape(-1, count)


def grouped(x: Ints) -> Ints:
    out = np.zeros_like(x)
    for warp in range(0, len(x), 32):
        part = x[warp : warp + 32]
        for lane in range(32):
            peers = np.flatnonzero(part % 5 == part[lane] % 5)
            out[warp + lane] = part[peers[0]] * 100 + len(peers)
    return out


def uneven(x: Ints) -> Ints:
    sums = np.array([sum(x[(t + i) % 128] for i in range(x[t] % 7)) for t in range(128)])
    return sums + sums[np.arange(128) ^ 3]


def branches(x: Ints) -> Ints:
    out = np.zeros_like(x)
    for warp in range(0, len(x), 32):
        part = x[warp : warp + 32]
        odd = part % 2 == 1
        out[warp : warp + 32] = np.where(odd, part[odd].max(), -part[~odd].sum())
    return out


def matrix(x: Ints) -> Ints:
    i = np.arange(256)
    a = (x[i % 128] % 9 - i // 100).reshape(16, 16)
    b = (x[:128] % 7 - 3).reshape(8, 16)
    return (a @ b.T).reshape(-1)


def vectors(x: Ints) -> Ints:
    four = x[:128].reshape(32, 4).copy()
    four[:, 0] += four[:, 3]
    return np.concatenate([four.reshape(-1), np.zeros(96, dtype=np.int32)])


def leave(x: Ints) -> Ints:
    lane = np.arange(128) % 32
    sums = np.array([x[t - t % 32 : t - t % 32 + 20].sum() for t in range(128)])
    return np.where(lane < 20, sums, 0)


def consumers(x: Ints) -> Ints:
    t = np.arange(128)
    return np.where(t < 32, 0, 4 * x[t % 32] + 6)


# Grid, block, dynamic shared memory, and what out holds from its start, of the inputs.
T = np.arange(128)
CONTROLS: dict[str, tuple[int, int, int, Callable[[Ints], Any]]] = {
    "reverse": (1, 128, 0, lambda x: x[:128][::-1]),
    "reuse": (1, 128, 0, lambda x: 3 * x[:128][::-1] + 3),
    "double_buffer": (1, 128, 0, lambda x: 5 * x[:128][::-1] + 10),
    "tree": (1, 128, 0, lambda x: np.full(128, x[:128].sum())),
    "tree_of_a_warp": (1, 32, 0, lambda x: np.full(32, x[:32].sum())),
    "block_votes": (1, 128, 0, lambda x: np.full(128, (x[:128] % 3 == 0).sum() * 4 + 1)),
    "producer_and_consumers": (1, 128, 0, consumers),
    "warps_leave_early": (1, 128, 0, lambda x: np.where(T < 64, x[T ^ 1], -1)),
    "lanes_leave_early": (1, 128, 0, leave),
    "warp_sums": (1, 128, 0, lambda x: np.repeat(halves(x[:128], 32).sum(1), 32)),
    "scan_of_half_warps": (1, 128, 0, lambda x: halves(x[:128], 16).cumsum(1).reshape(-1)),
    "branches_with_own_masks": (1, 128, 0, lambda x: branches(x[:128])),
    "groups_by_match": (1, 128, 0, lambda x: grouped(x[:128])),
    "uneven_loops": (1, 128, 0, lambda x: uneven(x)),
    "same_value_by_all_lanes": (1, 32, 0, lambda x: np.full(32, 5)),
    "bytes_of_a_word": (1, 128, 0, lambda x: x[:128][::-1] + 3 * x[T ^ 1]),
    "bytes_of_a_word_in_global": (2, 128, 0, lambda x: x + 1),
    "undefined_but_unused": (1, 128, 0, lambda x: np.where(T < 100, x[:128], 7)),
    "padding_through_shared": (1, 128, 0, lambda x: 3 * x[:128][::-1]),
    "local_array": (
        1,
        128,
        0,
        lambda x: x[(T + x[:128] % 9) % 128] + x[(T + x[T ^ 1] % 9) % 128],
    ),
    "vectors": (1, 128, 0, vectors),
    "dynamic_shared": (1, 128, 512, lambda x: x[(T + 1) % 128]),
    "cached_reads": (1, 128, 0, lambda x: inputs()[1][x[:128]]),
    "shared_histogram": (1, 128, 0, lambda x: np.bincount(x[:128] & 7, minlength=8)[T & 7]),
    "last_block": (4, 64, 0, lambda x: 2 * x[np.arange(N) ^ 1]),
    "last_block_all_fence": (4, 64, 0, lambda x: 2 * x[np.arange(N) ^ 1]),
    "chained_sums": (16, 16, 0, lambda x: np.repeat(np.cumsum(x[:16]) - x[:16], 16)),
    "order_of_atomics": (2, 128, 0, lambda x: (np.arange(256) >= 128).astype(np.int32)),
    "async_copies": (1, 128, 0, lambda x: x[:128][::-1]),
    "async_pipeline": (
        1,
        128,
        0,
        lambda x: np.array([sum(x[(127 - t + i) % 128] for i in range(6)) for t in range(128)]),
    ),
    "async_zero_fill": (1, 128, 0, lambda x: np.where(T < N - 140, x[:128], 0)),
    "matrix_product": (1, 32, 0, matrix),
    "cub_sorted": (1, 64, 0, lambda x: np.sort(x[:128])),
    "cub_scanned": (1, 128, 0, lambda x: np.cumsum(x[:128]) - x[:128]),
}


def test_there_are_enough_controls() -> None:
    kernels = re.findall(r"^KERNEL (\w+)\(", (HERE / "controls.cu").read_text(), re.M)
    assert len(CONTROLS) >= 25
    assert set(kernels) - {"clear_chain"} == set(CONTROLS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", sorted(CONTROLS))
def test_clean_control_is_not_reported(kernel: str, seed: int) -> None:
    engine().set_options(seed=seed, most_instructions=20_000_000)
    if kernel == "chained_sums":
        run("clear_chain", "controls.cu", 1, 64)
    grid, block, shared, expected = CONTROLS[kernel]
    report, out = run(kernel, "controls.cu", grid, block, shared)
    assert report == ""
    wanted = np.asarray(expected(inputs()[0]))
    np.testing.assert_array_equal(out[: len(wanted)], wanted)
