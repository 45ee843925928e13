"""The page on what the compiled CUDA library shows.

    python tools/cuda_evidence.py [build/cuda/fastmoe_route_cuda.so] > docs/cuda-evidence.md

A table of every kernel for every architecture (tools/cuda_kernels.py reads them), which of them the
PTX virtual machine executed, and a model of what the ops have to move and compute at least.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cuda_kernels import ARCHITECTURES, COLUMNS, LIBRARY, ROOT, Kernel, compiler, read, short_name

EXECUTED = ROOT / "build" / "vm" / "executed.json"  # launches of every kernel, of make test-cuda-vm


@cache
def launched() -> dict[str, int]:
    """Launches of every kernel in the ops' tests in the PTX virtual machine, by `short_name`."""
    if not EXECUTED.exists():
        raise FileNotFoundError(f"{EXECUTED}: make test-cuda-vm writes which kernels it executed")
    counts: dict[str, int] = {}
    for name, count in json.loads(EXECUTED.read_text()).items():
        counts[short_name(name)] = counts.get(short_name(name), 0) + count
    return counts


def how_tested(kernel: Kernel) -> str:
    """`PTX VM` for executed in the PTX virtual machine, `H200`, or `compiled only`."""
    if launched().get(kernel.name, 0) > 0:
        return "PTX VM"
    return "H200" if kernel.architecture == "sm_90a" else "compiled only"


def table(kernels: list[Kernel]) -> list[str]:
    head = ("kernel", "executed", "registers", "threads", "blocks / SM", "instructions", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for k in kernels:
        cells = (f"`{k.name}`", how_tested(k), k.usage["REG"], k.threads, k.blocks, k.instructions)
        counts = (k.counts[column] or "" for column in COLUMNS)
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, *counts)) + " |")
    return lines


HEAD = """\
# What the compiled CUDA library shows

Written by `make cuda-evidence` from a library that `make cuda` built. **Nothing on this page was
measured on a GPU**; `docs/gpu.md` holds what was. Registers, shared memory and instruction counts
are read from the compiled code; blocks per multiprocessor follow from them by NVIDIA's
`cuda_occupancy.h` (without dynamic shared memory where a launch sizes it by the call). Bytes,
operations and times of the first table are *modelled*: what has to move and be computed at least,
over limits of an H100 that published work reaches (3.0 TB/s copied, 798 TFLOP/s in bfloat16).

The column *executed* says which kernels the ops' tests launched in the PTX virtual machine (*PTX
VM*: nvcc's code for compute_80, instruction by instruction, `make test-cuda-vm`), which only the
tests on a GPU did (*H200*, see `docs/gpu.md`), and which were *compiled only*.

`tests/test_cuda_build.py` holds every kernel to no spills, a register budget, wide loads, the
instructions of its matrix products and an occupancy floor."""

# H100 (SXM): copy bandwidth and dense bfloat16 peak that published work reaches, and its clock.
BANDWIDTH, TENSOR_FLOPS = 3.0e12, 798e12


class Modelled(NamedTuple):
    """What an op has to move and compute at least, or as its launches do, at one size."""

    op: str
    kernels: str  # those it launches, CUB's left out
    shape: str
    num_bytes: float
    flops: float = 0.0


PASS = 24  # bytes a slot that one pass of a sort over 8 bits of key reads and writes


def modelled_scores() -> list[Modelled]:
    """Gate, expert choice and softmax."""
    t, e, k, vocabulary, rows = 8192, 256, 8, 128256, 256
    gate = t * (2 * e + 8 * k)
    scores = f"T={t}, E={e}, bfloat16"
    words = f"{rows} x {vocabulary}, bfloat16"
    size = 2.0 * rows * vocabulary
    return [
        Modelled("gate", "gate_kernel", f"T={t}, E={e}, K={k}, bfloat16", gate),
        Modelled("gate, statistics", "gate_kernel, sum_tiles_kernel",
                 f"T={t}, E={e}, K={k}, bfloat16", gate + 4 * t + 8 * e * t / 8),
        Modelled("gate, backward", "gate_backward_fast_kernel", f"T={t}, E={e}, K={k}, bfloat16",
                 t * (4 * e + 8 * k)),
        Modelled("gate, backward, more than 256 experts", "gate_backward_kernel",
                 f"T={t}, E=512, K={k}, bfloat16", t * (4 * 512 + 8 * k)),
        Modelled("expert_choice, as launched",
                 "score_keys_kernel, group_keys_kernel, mark_surplus_kernel, write_choice_kernel",
                 f"T={t}, E={e}, float32", t * e * (16 + 4 * PASS + 12 + 2 * PASS + 13 + 13)),
        Modelled("softmax", "softmax_warp_kernel", scores, 4 * t * e),
        Modelled("softmax, backward", "softmax_backward_warp_kernel", scores, 6 * t * e),
        Modelled("softmax, long rows", "softmax_kept_kernel", words, 2 * size),
        Modelled("softmax, rows of twice that, online", "softmax_block_kernel",
                 f"{rows} x {2 * vocabulary}, bfloat16", 6 * size),
        Modelled("softmax, long rows, backward", "softmax_backward_block_kernel", words, 3 * size),
        Modelled("softmax_topk", "chunk_kernel, merge_kernel", f"{words}, k={k}", size),
        Modelled("softmax_topk, backward", "softmax_topk_backward_kernel", f"{words}, k={k}",
                 2 * size),
    ]  # fmt: skip


def modelled_rows() -> list[Modelled]:
    """Plans and the movement of rows."""
    t, e, k = 8192, 256, 8
    slots, m = t * k, 2 * k
    plan = "count_kernel, place_kernel"
    rows = [
        Modelled("plan_dispatch", plan, f"T={t}, E={e}, K={k}", slots * 16),
        Modelled("plan_dispatch, more than 512 experts", "walk_kernel, scan_kernel",
                 f"T={t}, E=1024, K={k}", slots * 16 + 16 * 1024 * slots / 1024),
        Modelled("plan_dispatch, capacity by score, as launched",
                 f"walk_kernel, scan_kernel, {plan}, fill_score_keys_kernel, "
                 "fill_group_keys_kernel, mark_surplus_kernel", f"T={t}, E={e}, K={k}",
                 slots * (4 + 16 + 4 * PASS + 20 + 2 * PASS + 13 + 18)),
        Modelled("plan_dispatch, max_rows", f"walk_kernel, scan_kernel, {plan}, count_used_kernel, "
                 "find_cut_kernel", f"T={t}, E={e}, K={k}", slots * 24),
        Modelled("reroute, as launched", "prepare_kernel, list_kernel, key_kernel, group_kernel, "
                 "grant_kernel, finish_kernel", f"T={t}, E={e}, K={k} of {m}",
                 t * m * (5 + 4 + 16 + 2 * PASS + 20 + 12 + PASS + 21 + 5)),
    ]  # fmt: skip
    t, h = 32768, 2048
    moved = 2 * t * h * (1 + k)
    shape = f"T={t}, H={h}, K={k}, bfloat16"
    return [
        *rows,
        Modelled("permute", "permute_kernel", shape, moved),
        Modelled("unpermute", "unpermute_kernel", shape, moved),
        Modelled(
            "unpermute, backward", "unpermute_backward_kernel", shape, 2 * t * h * (1 + 2 * k)
        ),
    ]


def modelled_experts() -> list[Modelled]:
    """Products and the expert layer."""
    t, h, i, e, k = 32768, 2048, 768, 128, 8
    r = t * k
    weights = 2 * 3 * e * h * i
    rows_product = "group_rows_kernel, rows_product_kernel"
    groups_product = "group_rows_kernel, groups_product_kernel"
    native = "native_arrays_kernel and CUTLASS's"
    up = 2 * r * (h + 2 * i) + 2 * e * h * 2 * i
    shape = f"R={r}, {h} x {2 * i}, E={e}, bfloat16"
    layer = f"T={t}, H={h}, I={i}, E={e}, K={k}, bfloat16"
    # x by index, activated rows written and read, the experts' outputs written and read.
    own = weights + 2 * t * h + 2 * r * (h + 2 * i + 2 * h) + 2 * t * h
    # Rows [R, H] written three times and read four times, u and a' once each, pre read and its
    # gradient written and read twice; g, x and dx by token.
    back = 2 * weights + 2 * r * (7 * h + 4 * i + 4 * 2 * i) + 2 * 3 * t * h
    return [
        Modelled("grouped_mm, up", rows_product, shape, up, 4 * r * h * i),
        Modelled("grouped_mm, weights", groups_product, shape, up, 4 * r * h * i),
        Modelled("grouped_mm, bias", "group_rows_kernel, column_sums_kernel", shape, 4 * r * i),
        Modelled("grouped_mm, up, native", f"{native}, zero_rest_kernel", shape, up, 4 * r * h * i),
        Modelled("grouped_mm, weights, native", f"{native}, zero_empty_kernel", shape, up,
                 4 * r * h * i),
        Modelled("activation", "activate_kernel", f"R={r}, I={i}, bfloat16", 2 * r * 3 * i),
        Modelled("weights on input", "scale_rows_kernel", f"R={r}, H={h}, bfloat16", 2 * r * 2 * h),
        Modelled("moe_mlp, as launched",
                 "group_rows_kernel, up_product_kernel, rows_product_kernel, unpermute_kernel",
                 layer, own, 6 * r * h * i),
        Modelled("moe_mlp, as launched on sm_90",
                 f"group_rows_kernel, sm90_up_kernel, {native}, zero_rest_kernel, unpermute_kernel",
                 layer, own, 6 * r * h * i),
        Modelled("moe_mlp, least", "", layer, weights + 4 * t * h, 6 * r * h * i),
        Modelled("moe_mlp, backward, as launched",
                 f"{groups_product}, rows_product_kernel, permute_kernel, "
                 "activate_backward_kernel, unpermute_kernel", layer, back, 12 * r * h * i),
    ]  # fmt: skip


def modelled() -> list[Modelled]:
    return [*modelled_scores(), *modelled_rows(), *modelled_experts()]


def models() -> list[str]:
    """The rows of `modelled`, and what an H100 needs for them at least."""
    rows = []
    for one in modelled():
        memory, arithmetic = one.num_bytes / BANDWIDTH, one.flops / TENSOR_FLOPS
        bound = "arithmetic" if arithmetic > memory else "memory"
        work = f"{one.flops / 1e12:.2f}" if one.flops else ""
        least = max(memory, arithmetic) * 1e6
        rows.append(
            f"| `{one.op}` | {one.kernels} | {one.shape} | {one.num_bytes / 1e6:.2f} | {work}"
            f" | {least:.1f} | {bound} |"
        )
    head = "| op | kernels | shape | MB | TFLOP | least us | bound by |"
    return [head, "|---|---|---|---|---|---|---|", *rows]


def page(library: Path) -> str:
    kernels = read(library)
    lines = [
        *HEAD.splitlines(),
        "",
        f"Compiled by {compiler()}.",
        "",
        "## Modelled: bytes and operations at common sizes",
        "",
        *models(),
        "",
    ]
    for architecture in ARCHITECTURES:
        own = [k for k in kernels if k.architecture == architecture]
        spilling = sum(k.usage["STACK"] > 0 or k.usage["LOCAL"] > 0 for k in own)
        lines += [
            f"## Compiled: {architecture}",
            "",
            f"{len(own)} kernels, {spilling} with spills or a stack. Counts are of instructions in"
            " the code, not of executed ones.",
            "",
            *table(own),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY), end="")
