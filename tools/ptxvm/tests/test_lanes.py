"""What lanes do together, against the PTX ISA: fragments, shuffles, votes, atomics, copies."""

from __future__ import annotations

import numpy as np
import pytest
from engine_fixture import Buffer, engine, run_text
from numpy.typing import NDArray
from oracle import BF16, F16, F32, decode, encode


def run(
    body: str, inputs: list[NDArray[np.generic]], out: NDArray[np.generic], **options: object
) -> None:
    """`inputs` are read-only; `out` is overwritten with what the kernel stored."""
    buffers = [Buffer(x, writable=False) for x in inputs]
    result = Buffer(out)
    try:
        assert run_text(body, [*buffers, result], **options) == ""
        out[...] = result.values
    finally:
        for buffer in (*buffers, result):
            buffer.free()


# ---- matrix fragments --------------------------------------------------------------------------
# The tables of the ISA: where element i of lane l of each fragment lies.


def place_a(shape: str, kind: str, lane: int, i: int) -> tuple[int, int]:
    group, part = lane // 4, lane % 4
    if kind == "f64":
        return group, part
    if kind == "tf32":
        return group + (i % 2) * 8, part + (i // 2) * 4
    row = group if i % 4 < 2 else group + 8
    return row, part * 2 + i % 2 + (8 if i >= 4 else 0)


def place_b(shape: str, kind: str, lane: int, i: int) -> tuple[int, int]:
    group, part = lane // 4, lane % 4
    if kind == "f64":
        return part, group
    if kind == "tf32":
        return part + i * 4, group
    return part * 2 + i % 2 + (8 if i >= 2 else 0), group


def place_c(kind: str, lane: int, i: int) -> tuple[int, int]:
    group, part = lane // 4, lane % 4
    if kind == "f64":
        return group, part * 2 + i
    return group + (8 if i >= 2 else 0), part * 2 + i % 2


SHAPES = [
    ("m16n8k16", "bf16", "f32"),
    ("m16n8k16", "f16", "f32"),
    ("m16n8k16", "f16", "f16"),
    ("m16n8k8", "bf16", "f32"),
    ("m16n8k8", "f16", "f32"),
    ("m16n8k8", "f16", "f16"),
    ("m16n8k8", "tf32", "f32"),
    ("m16n8k4", "tf32", "f32"),
    ("m8n8k4", "f64", "f64"),
]


def patterns(values: NDArray[np.float64], kind: str) -> list[int]:
    if kind == "f64":
        return [int(x) for x in values.astype(np.float64).view(np.uint64)]
    form = {"f16": F16, "bf16": BF16, "tf32": F32, "f32": F32}[kind]
    return [encode(float(x), form) for x in values]


def registers(fragment: NDArray[np.float64], kind: str) -> list[int]:
    """The registers of a lane's elements: pairs of halves share one, the first below."""
    bits = patterns(fragment, kind)
    if kind in ("f16", "bf16"):
        return [bits[i] | bits[i + 1] << 16 for i in range(0, len(bits), 2)]
    return bits


@pytest.mark.parametrize(("shape", "kind", "sum_kind"), SHAPES)
def test_mma_layout(shape: str, kind: str, sum_kind: str) -> None:
    m = 8 if shape.startswith("m8") else 16
    k = int(shape.split("k")[1])
    rng = np.random.default_rng(len(shape) + k)
    # Small integers: every product and sum is exact. No row or column is like another.
    a = rng.integers(-7, 8, (m, k)).astype(float)
    b = rng.integers(-7, 8, (k, 8)).astype(float)
    c = rng.integers(-50, 51, (m, 8)).astype(float)
    num = {"a": m * k // 32, "b": k * 8 // 32, "c": m * 8 // 32}

    def lanes(matrix: NDArray[np.float64], which: str, of: str) -> NDArray[np.uint64]:
        rows = []
        for lane in range(32):
            place = {
                "a": lambda i, lane=lane: place_a(shape, kind, lane, i),
                "b": lambda i, lane=lane: place_b(shape, kind, lane, i),
                "c": lambda i, lane=lane: place_c(kind, lane, i),
            }[which]
            rows.append(registers(np.array([matrix[place(i)] for i in range(num[which])]), of))
        return np.array(rows, dtype=np.uint64)

    fragments = [lanes(a, "a", kind), lanes(b, "b", kind), lanes(c, "c", sum_kind)]
    width = 64 if kind == "f64" else 32
    r = "%d" if kind == "f64" else "%r"
    text, names, at = "", [], 0
    for index, fragment in enumerate(fragments):
        count = fragment.shape[1]
        own = [f"{r}{at + i}" for i in range(count)]
        base = f"mad.wide.u32 %a{index}, %t, {8 * count}, %rd{index};"
        text += base + "".join(
            f"ld.global.b{width} {x}, [%a{index}+{8 * i}];" for i, x in enumerate(own)
        )
        names.append("{" + ", ".join(own) + "}")
        at += count
    results = [f"{r}{30 + i}" for i in range(fragments[2].shape[1])]
    types = f"{sum_kind}.{kind}.{kind}.{sum_kind}"
    sums = "{" + ", ".join(results) + "}"
    text += f"mma.sync.aligned.{shape}.row.col.{types} {sums}, {names[0]}, {names[1]}, {names[2]};"
    text += f"mad.wide.u32 %a3, %t, {8 * len(results)}, %rd3;"
    text += "".join(f"st.global.b{width} [%a3+{8 * i}], {x};" for i, x in enumerate(results))
    out = np.zeros((32, len(results)), dtype=np.uint64)
    run(text, fragments, out)
    np.testing.assert_array_equal(out, lanes(a @ b + c, "c", sum_kind))


def test_mma_rounds_once() -> None:
    """1 + 2^-24 + 2^-24 is 1 + 2^-23: small products do not get lost one by one."""
    a, b = np.zeros((32, 4), np.uint64), np.zeros((32, 2), np.uint64)
    small = encode(2.0**-12, BF16)
    a[:] = small | small << 16
    b[:] = small | small << 16
    c = np.full((32, 4), encode(1.0, F32), dtype=np.uint64)
    out = np.zeros((32, 4), np.uint64)
    text = "mad.wide.u32 %a0, %t, 32, %rd0; mad.wide.u32 %a1, %t, 16, %rd1;"
    text += "mad.wide.u32 %a2, %t, 32, %rd2; mad.wide.u32 %a3, %t, 32, %rd3;"
    text += "".join(
        f"ld.global.b32 %r{i}, [%a0+{8 * i}]; ld.global.b32 %r{6 + i}, [%a2+{8 * i}];"
        for i in range(4)
    )
    text += "".join(f"ld.global.b32 %r{4 + i}, [%a1+{8 * i}];" for i in range(2))
    text += "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r10,%r11,%r12,%r13},"
    text += "{%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r7,%r8,%r9};"
    text += "".join(f"st.global.b32 [%a3+{8 * i}], %r{10 + i};" for i in range(4))
    run(text, [a, b, c], out)
    assert set(out.reshape(-1).tolist()) == {encode(1.0 + 16 * 2.0**-24, F32)}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_ldmatrix(count: int, is_transposed: bool) -> None:
    # Row i of matrix m holds 1000 m + 10 i + column; rows lie in shared memory in a mixed order.
    order = np.random.default_rng(count).permutation(8 * count)
    tile = np.zeros((32, 8), dtype=np.uint16)
    for row in range(8 * count):
        tile[order[row]] = 1000 * (row // 8) + 10 * (row % 8) + np.arange(8)
    where = np.zeros(32, dtype=np.uint64)
    where[: 8 * count] = order * 16
    names = ", ".join(f"%r{10 + i}" for i in range(count))
    transposed = ".trans" if is_transposed else ""
    text = f"""
      .shared .align 16 .b8 tile[512];
      mov.u32 %r0, tile; mad.lo.u32 %r1, %t, 16, %r0; mad.wide.u32 %a0, %t, 16, %rd0;
      ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%a0];
      st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
      bar.warp.sync -1;
      ld.global.b32 %r6, [%a1]; add.u32 %r6, %r6, %r0;
      ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{{names}}}, [%r6];
      mad.wide.u32 %a2, %t, 32, %rd2;
    """
    text += "".join(f"st.global.b32 [%a2+{8 * i}], %r{10 + i};" for i in range(count))
    out = np.zeros((32, 4), dtype=np.uint64)
    run(text, [tile, where], out)
    for lane in range(32):
        for m in range(count):
            pair = []
            for i in range(2):
                row, column = lane // 4, lane % 4 * 2 + i
                if is_transposed:
                    row, column = column, row
                pair.append(1000 * m + 10 * row + column)
            assert out[lane, m] == pair[0] | pair[1] << 16


# ---- shuffles, votes, matches, reductions --------------------------------------------------------


def shuffle_source(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The ISA's rule: the lane read from, and whether it lay in range."""
    segment, bound = c >> 8 & 31, c & 31
    last = lane & segment | bound & ~segment
    if mode == "up":
        source, ok = lane - b, lane - b >= last
    elif mode == "down":
        source, ok = lane + b, lane + b <= last
    elif mode == "bfly":
        source, ok = lane ^ b, (lane ^ b) <= last
    else:
        source = lane & segment | b & ~segment
        ok = source <= last
    return (source if ok else lane), ok


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffle(mode: str, width: int) -> None:
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    values = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint64)
    for distance in (0, 1, 2, 3, 7, 15, 31):
        out = np.zeros(32, np.uint64)
        text = f"""ld.global.b32 %r0, [%a0];
          shfl.sync.{mode}.b32 %r1|%p0, %r0, {distance}, {clamp}, -1;
          selp.b32 %r2, 1, 0, %p0; mov.b64 %d0, {{%r1, %r2}}; st.global.b64 [%a1], %d0;"""
        run(text, [values], out)
        for lane in range(32):
            source, ok = shuffle_source(mode, lane, distance, clamp)
            assert out[lane] == int(values[source]) | ok << 32, (lane, distance)


def test_shuffle_by_each_lane() -> None:
    rng = np.random.default_rng(2)
    values, by = (
        rng.integers(0, 2**32, 32, dtype=np.uint64),
        rng.integers(0, 32, 32, dtype=np.uint64),
    )
    out = np.zeros(32, np.uint64)
    run(
        "ld.global.b32 %r0, [%a0]; ld.global.b32 %r1, [%a1];"
        "shfl.sync.idx.b32 %r2, %r0, %r1, 31, -1; st.global.b32 [%a2], %r2;",
        [values, by],
        out,
    )
    np.testing.assert_array_equal(out, values[by.astype(int)])


def test_votes() -> None:
    rng = np.random.default_rng(3)
    for chance in (0.0, 0.5, 1.0):
        holds = rng.random(32) < chance
        out = np.zeros(32, np.uint64)
        text = """ld.global.b32 %r0, [%a0]; setp.ne.s32 %p0, %r0, 0;
          vote.sync.ballot.b32 %r1, %p0, -1; vote.sync.all.pred %p1, %p0, -1;
          vote.sync.any.pred %p2, %p0, -1; vote.sync.uni.pred %p3, %p0, -1;
          vote.sync.any.pred %p4, !%p0, -1;
          selp.b32 %r2, 1, 0, %p1; @%p2 add.u32 %r2, %r2, 2;
          @%p3 add.u32 %r2, %r2, 4; @%p4 add.u32 %r2, %r2, 8;
          mov.b64 %d0, {%r1, %r2}; st.global.b64 [%a1], %d0;"""
        run(text, [holds.astype(np.uint64)], out)
        ballot = sum(1 << i for i in range(32) if holds[i])
        flags = (
            holds.all()
            + 2 * holds.any()
            + 4 * (holds.all() or not holds.any())
            + 8 * (not holds.all())
        )
        assert set(out.tolist()) == {ballot | int(flags) << 32}


def test_match_and_reductions() -> None:
    rng = np.random.default_rng(4)
    values = rng.integers(-4, 4, 32)
    words = values.astype(np.int64).astype(np.uint64) & np.uint64(0xFFFFFFFF)
    out = np.zeros(32, np.uint64)
    run(
        "ld.global.b32 %r0, [%a0]; match.any.sync.b32 %r1, %r0, -1;"
        "match.all.sync.b32 %r2|%p0, %r0, -1; selp.b32 %r3, 5, 0, %p0; or.b32 %r3, %r3, %r2;"
        "mov.b64 %d0, {%r1, %r3}; st.global.b64 [%a1], %d0;",
        [words],
        out,
    )
    for lane in range(32):
        assert out[lane] == sum(1 << i for i in range(32) if values[i] == values[lane])
    for op, kind, function in (
        ("add", "s32", lambda x: x.sum()),
        ("min", "s32", lambda x: x.min()),
        ("max", "s32", lambda x: x.max()),
        ("min", "u32", lambda x: words.min()),
        ("max", "u32", lambda x: words.max()),
        ("and", "b32", lambda x: np.bitwise_and.reduce(words)),
        ("or", "b32", lambda x: np.bitwise_or.reduce(words)),
        ("xor", "b32", lambda x: np.bitwise_xor.reduce(words)),
    ):
        run(
            f"ld.global.b32 %r0, [%a0]; redux.sync.{op}.{kind} %r1, %r0, -1;"
            "st.global.b32 [%a1], %r1;",
            [words],
            out,
        )
        assert set(out.tolist()) == {int(function(values)) & 0xFFFFFFFF}, (op, kind)
    # Two halves with masks of their own meet at one instruction.
    run(
        "ld.global.b32 %r0, [%a0]; setp.lt.u32 %p0, %t, 16;"
        "selp.b32 %r3, 0x0000ffff, 0xffff0000, %p0;"
        "redux.sync.add.s32 %r1, %r0, %r3; st.global.b32 [%a1], %r1;",
        [words],
        out,
    )
    for half in (slice(0, 16), slice(16, 32)):
        assert set(out[half].tolist()) == {int(values[half].sum()) & 0xFFFFFFFF}


# ---- atomics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    ("op", "bits", "start", "function"),
    [
        ("add.u32", 32, 5, lambda old, x: old + x),
        ("add.u64", 64, 5, lambda old, x: old + x),
        ("min.u32", 32, 40, min),
        ("max.u32", 32, 3, max),
        ("and.b32", 32, 0xFF, lambda old, x: old & x),
        ("or.b32", 32, 0, lambda old, x: old | x),
        ("xor.b32", 32, 1, lambda old, x: old ^ x),
        ("exch.b32", 32, 9, lambda old, x: x),
        ("inc.u32", 32, 2, lambda old, x: 0 if old >= x else old + 1),
        ("dec.u32", 32, 2, lambda old, x: x if old == 0 or old > x else old - 1),
    ],
)
def test_atomics(space: str, op: str, bits: int, start: int, function: object) -> None:
    values = np.random.default_rng(5).integers(1, 60, 32, dtype=np.uint64)
    r = "%r" if bits == 32 else "%d"
    target = "[%rd1]" if space == "global" else "[cell]"
    first = ""
    if space == "shared":
        first = ".shared .align 8 .b8 cell[8]; setp.eq.u32 %p0, %t, 0;"
        first += f"@%p0 st.shared.b{bits} [cell], {start}; bar.warp.sync -1;"
    result = Buffer(np.full(33, start, np.uint64))
    source = Buffer(values, writable=False)
    text = f"""{first} ld.global.b{bits} {r}0, [%a0]; atom.{space}.{op} {r}1, {target}, {r}0;
      st.global.b{bits} [%a1+8], {r}1;"""
    if bits == 32:
        result.values[1:] = 0
    assert run_text(text, [source, result]) == ""
    old = start
    # Lanes go one after another: every old value is the one before, in some order.
    for lane in range(32):
        assert result.values[1 + lane] == old
        old = function(old, int(values[lane]))
    if space == "global":
        assert result.values[0] == old
    source.free()
    result.free()


def test_compare_and_swap_and_float_addition() -> None:
    result = Buffer(np.array([7] + [0] * 32, dtype=np.uint64))
    text = "add.u32 %r0, %t, 7; add.u32 %r1, %r0, 1;"
    text += "atom.global.cas.b32 %r2, [%rd0], %r0, %r1; st.global.b32 [%a0+8], %r2;"
    assert run_text(text, [result]) == ""
    assert result.values.tolist() == [39, *range(7, 39)]
    result.free()
    result = Buffer(np.array([encode(0.5, F32)], dtype=np.uint64))
    assert run_text("mov.f32 %f0, 0f3F800000; red.global.add.f32 [%rd0], %f0;", [result]) == ""
    assert decode(int(result.values[0]), F32) == 32.5
    result.free()


# ---- asynchronous copies and counters ----------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_async_copy(size: int, seed: int) -> None:
    engine().set_options(seed=seed)  # bytes move early on some seeds, late on others
    source = np.arange(32 * size, dtype=np.uint8).reshape(32, size)
    taken = (np.arange(32, dtype=np.uint64) * 3) % (size + 1)
    words = size // 4
    text = f"""
      .shared .align 16 .b8 buffer[{32 * size}];
      mov.u32 %r0, buffer; mad.lo.u32 %r0, %t, {size}, %r0; mad.wide.u32 %a0, %t, {size}, %rd0;
      ld.global.b32 %r1, [%a1];
      cp.async.ca.shared.global [%r0], [%a0], {size}, %r1;
      cp.async.commit_group; cp.async.wait_group 0;
      mad.wide.u32 %a2, %t, {size}, %rd2;
    """
    text += "".join(
        f"ld.shared.b32 %r2, [%r0+{4 * i}]; st.global.b32 [%a2+{4 * i}], %r2;" for i in range(words)
    )
    out = np.zeros((32, size), dtype=np.uint8)
    run(text, [source, taken], out)
    for lane in range(32):
        kept = int(taken[lane])
        assert out[lane].tolist() == source[lane, :kept].tolist() + [0] * (size - kept)


@pytest.mark.parametrize(
    ("stride", "bytes_", "sectors"),
    [(4, 4, 4), (8, 4, 8), (32, 4, 32), (64, 4, 32), (8, 8, 8), (16, 16, 16), (0, 4, 1)],
)
def test_sectors_are_counted(stride: int, bytes_: int, sectors: int) -> None:
    source = Buffer(np.zeros(4096, np.uint8), writable=False)
    engine().set_options(seed=1, counts=True)
    engine().clear_counters()
    kind = {4: "b32 %r0", 8: "b64 %d0", 16: "v4.b32 {%r0, %r1, %r2, %r3}"}[bytes_]
    assert (
        run_text(f"mad.wide.u32 %a0, %t, {stride}, %rd0; ld.global.{kind}, [%a0];", [source]) == ""
    )
    counters = engine().counters()
    engine().set_options(counts=False)
    assert counters["global_load_requests"] == 1
    assert counters["global_load_sectors"] == sectors
    assert counters["global_load_bytes"] == 32 * bytes_
    source.free()


@pytest.mark.parametrize(
    ("stride", "bytes_", "conflicts"),
    [
        (4, 4, 0),
        (8, 4, 1),
        (16, 4, 3),
        (128, 4, 31),
        (132, 4, 0),
        (0, 4, 0),
        (8, 8, 0),
        (16, 16, 0),
        (128, 16, 28),
        (144, 16, 0),
    ],
)
def test_bank_conflicts_are_counted(stride: int, bytes_: int, conflicts: int) -> None:
    engine().set_options(seed=1, counts=True)
    engine().clear_counters()
    kind = {4: "b32 [%r1], %r0", 8: "b64 [%r1], %d0", 16: "v4.b32 [%r1], {%r0, %r0, %r0, %r0}"}[
        bytes_
    ]
    size = 32 * max(stride, bytes_) + 16
    text = f".shared .align 16 .b8 buffer[{size}]; mov.u32 %r0, buffer; mov.u64 %d0, 1;"
    text += f"mad.lo.u32 %r1, %t, {stride}, %r0;"
    guard = "setp.eq.u32 %p0, %t, 0; @%p0 " if stride == 0 else ""
    assert run_text(f"{text} {guard}st.shared.{kind};", []) == ""
    counters = engine().counters()
    engine().set_options(counts=False)
    assert counters["shared_requests"] == 1
    assert counters["shared_conflicts"] == conflicts


def test_matrix_products_are_counted() -> None:
    engine().set_options(seed=1, counts=True)
    engine().clear_counters()
    zero = "".join(f"mov.u32 %r{i}, 0;" for i in range(10))
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r6,%r7,%r8,%r9},"
    product += "{%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r7,%r8,%r9};"
    assert run_text(zero + 3 * product, []) == ""
    counters = engine().counters()
    engine().set_options(counts=False)
    assert counters["mma"] == 3
    assert counters["instructions_matrix"] == 3


def test_instructions_are_counted_by_class() -> None:
    out = Buffer(np.zeros(32, np.uint64))
    engine().set_options(seed=1, counts=True)
    text = """
    .shared .align 8 .b8 buffer[256];
    add.s32 %r0, %t, 1; mul.lo.s32 %r1, %r0, 3; cvt.rn.f32.s32 %f0, %r1;
    fma.rn.f32 %f1, %f0, %f0, %f0;
    ex2.approx.f32 %f2, %f1; mov.f64 %fd0, 0d3FF0000000000000; add.f64 %fd1, %fd0, %fd0;
    mov.u32 %r2, buffer; mad.lo.u32 %r2, %t, 8, %r2; st.shared.u64 [%r2], 7;
    bar.sync 0; ld.shared.u64 %d0, [%r2]; st.global.u64 [%a0], %d0;
    atom.global.add.u64 %d1, [%a0], 1; shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;
    """
    engine().clear_counters()
    assert run_text("", [out]) == ""
    before = engine().counters()
    engine().clear_counters()
    assert run_text(text, [out]) == ""
    counted = {name: count - before[name] for name, count in engine().counters().items()}
    engine().set_options(counts=False)
    expected = {"integer": 3, "double": 1, "special": 1, "store_shared": 1, "load_shared": 1}
    expected |= {"store_global": 1, "atomic": 1, "barrier": 1, "collective": 1}
    assert {name: counted[f"instructions_{name}"] for name in expected} == expected
    assert counted["global_store_requests"] == 2  # of the atomic as well
    assert counted["global_store_sectors"] == 16
    out.free()
