"""Places of the kernels that may lose their protection without harm, each with the reason.

A place is found by the text of the source that begins in one of its lines, spaces taken as one: of
the line itself, or of one it was inlined at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from engine_fixture import ROOT


class Harmless(NamedTuple):
    """Places of a file that protect nothing that can be seen, and why."""

    kind: str
    file: str
    reason: str
    near: tuple[str, ...]


ONE_LANE = "all lanes hold the same value; that one of them stores it saves stores"
FIRST_TURN = "the loop has a first turn in every call: its entry is never passed by"

HARMLESS = (
    Harmless(
        "order",
        "gemm/groups.cu",
        "CUB asks for a barrier before its storage is used again; the scan it takes needs none",
        ("__syncthreads(); // `storage` is used again",),
    ),
    Harmless(
        "order",
        "gemm/sm80.cuh",
        "CUTLASS ends a main loop with a wait for copies that its last iterations issue switched"
        " off, and with a barrier; the epilogue begins with one as well",
        ("mma((size.k()",),
    ),
    Harmless(
        "order",
        "gemm/up.cuh",
        "the same; a barrier comes before the accumulators are staged",
        ("mma((inner + C::Mma::Shape",),
    ),
    Harmless(
        "order",
        "gemm/sm80.cuh",
        "the epilogue's barriers around a bias, in the kernel that never has one: not reached",
        ("C::run_tile( call.params, shared, {static_cast<int>(p.m)",),
    ),
    Harmless("guard", "block.cuh", ONE_LANE, ("if (lane_index() == 0) partial[warp] = value;",)),
    Harmless(
        "guard",
        "block.cuh",
        "a block has 8 or 16 warps, whole turns of the unrolled loop",
        ("for (int w = 0; w < num_warps; ++w) total", "for (int w = 1; w < num_warps; ++w) best"),
    ),
    Harmless(
        "guard",
        "expert_choice.cu",
        "an element of the tensor is loaded in vain, or a zero is added",
        (
            "static_cast<double*>(a.weights)[slot] = is_taken ?",
            "static_cast<float*>(a.weights)[slot] = is_taken ?",
            "if (taken != 0) atomicAdd",
        ),
    ),
    Harmless(
        "guard",
        "gate_general.cuh",
        ONE_LANE,
        (
            "if (own_lane() == 0) { group_keys_[g] = key;",
            "if (own_lane() == 0) group_count_[g] = 1;",
            "if (own_lane() == 0) *logsumexp =",
        ),
    ),
    Harmless(
        "guard",
        "gate_general.cuh",
        FIRST_TURN,
        (
            "for (int begin = 0; begin < c_.num_columns; begin += part) {",
            "for (int j = 0; j < c_.a.topk_groups; ++j) {",
        ),
    ),
    Harmless(
        "guard",
        "gate_general.cuh",
        "scores under noise have a place whenever they are formed",
        ("if (out != nullptr) out[i] = e;",),
    ),
    Harmless(
        "guard",
        "gate_general.cuh",
        "clears memory that nobody reads in this call",
        ("if (c_.counts_groups) { for (int g = own_lane()",),
    ),
    Harmless(
        "guard",
        "gate.cu",
        "clears memory that nobody reads in this call; a loop without a turn; adds a zero",
        (
            "if (call.tile_sums != nullptr) { for (int e",
            "if (num_counts == 0) return;",
            "if (demand[e] != 0) atomicAdd",
        ),
    ),
    Harmless(
        "guard",
        "gate_backward.cu",
        FIRST_TURN,
        ("for (int begin = 0; begin < c_.num_columns; begin += part) softmax_backward",),
    ),
    Harmless(
        "guard",
        "gate_fast.cuh",
        ONE_LANE,
        ("if (own_lane() == 0) entries[k] = 0;",),
    ),
    Harmless(
        "guard",
        "gate_fast.cuh",
        "rows that have all their packs may be loaded as those that have some",
        ("if (a_.loads == LogitLoads::kAllPacks) {",),
    ),
    Harmless(
        "guard",
        "gate_fast.cuh",
        "ranks entries that no lane has and none writes",
        ("for (int h = 0; h < 2; ++h) { if (h * kWarp >= k) break;",),
    ),
    Harmless(
        "guard", "gate_select.cuh", ONE_LANE, ("if (own_lane() == 0) entries[num_taken] = 0;",)
    ),
    Harmless(
        "guard",
        "gate_select.cuh",
        FIRST_TURN,
        (
            "for (int begin = 0; begin < n; begin += kWarp) {",
            "for (int j = 0; j < k; j += 2) {",
        ),
    ),
    Harmless(
        "guard",
        "gate_select.cuh",
        "a second look finds the same best; of exactly k keys at the floor all are taken",
        (
            "if (best_at_ >= begin && best_at_ < end) find_best();",
            "if (low == high) num_equal = k - count_from(low + 1);",
        ),
    ),
    Harmless(
        "guard",
        "moe_mlp.cu",
        "rows past the last group hold zeros, as activated zeros are",
        ("if (rows.slot_of(row) < 0) {",),
    ),
    Harmless("guard", "moe_mlp_backward.cu", ONE_LANE, ("if (lane_index() == 0) g.grad_weights",)),
    Harmless(
        "guard",
        "moe_mlp_backward.cu",
        "one expert: a look at the middle finds the lower bound again",
        ("while (high - low > 1) {",),
    ),
    Harmless(
        "guard",
        "grouped_mm.cu",
        FIRST_TURN,
        ("for (int64_t item = blockIdx.x; item < sums.groups.num_groups",),
    ),
    Harmless(
        "guard", "permute.cu", ONE_LANE, ("if (a.grad_weights != nullptr && lane_index() == 0)",)
    ),
    Harmless(
        "guard",
        "plan_walk.cu",
        ONE_LANE,
        ("if (lane_index() == 0) totals[e] = before;",),
    ),
    Harmless(
        "guard",
        "plan_walk.cu",
        FIRST_TURN,
        ("for (int64_t first = 0; first < work.num_tiles; first += kWarp) {",),
    ),
    Harmless(
        "guard",
        "plan_walk.cu",
        "counters that lie in the column are copied to themselves",
        ("if (kWalk == Walk::kCount && in_shared) {",),
    ),
    Harmless(
        "guard",
        "plan_limits.cu",
        ONE_LANE,
        (
            "if (lane_index() == 0) work.tile_used[tile] = used;",
            "if (lane_index() == 0) *first_cut =",
        ),
    ),
    Harmless(
        "guard",
        "plan_limits.cu",
        FIRST_TURN,
        ("while (tile < work.num_tiles && work.tile_used[tile] <= room)",),
    ),
    Harmless(
        "guard",
        "plan_work.cuh",
        "without alignment no row lies between two experts' rows",
        ("for (int64_t e = grid_warp(); a.align > 1 && e < a.num_experts;",),
    ),
    Harmless(
        "guard",
        "plan_place.cuh",
        "steps without slots are ranked",
        ("if (u < steps_) take_ranks<kPair>(",),
    ),
    Harmless(
        "guard",
        "plan_place.cuh",
        "a share that begins past the last tile loads the last count, and adds zeros",
        ("for (int first = thread(); first <= last; first += kPlaceSums * step)",),
    ),
    Harmless(
        "guard",
        "reroute.cu",
        ONE_LANE,
        (
            "if (lane_index() == 0) work.missing[token] = missing;",
            "if (lane_index() == 0) work.room[group] = room - granted;",
        ),
    ),
    Harmless(
        "guard",
        "reroute.cu",
        FIRST_TURN,
        ("for (int64_t first = 0; first < a.num_candidates; first += kWarp) {",),
    ),
    Harmless(
        "guard",
        "reroute.cu",
        "the first place looks at itself; a place that begins no group keeps a room nobody reads; a"
        " warp past the last place finds no group",
        (
            "while (low < high) {",
            "if (low == i) work.room[i] =",
            "for (int64_t first = begin + grid_warp() * kWarp; first < end;",
        ),
    ),
    Harmless(
        "guard",
        "reroute.cu",
        "who is granted, or may ask, names an expert; who names none may ask, and is in no group",
        (
            "return a.overflow != Overflow::kLocal || a.rank_of_expert",
            "const int32_t expert = work.expert_of(row + column); a.choice[at]",
            "for (int64_t other = 0; may_ask && other < column; ++other) may_ask",
        ),
    ),
    Harmless(
        "guard", "softmax.cu", ONE_LANE, ("if (lane_index() == 0) warp_sums[turn][warp_index()] =",)
    ),
    Harmless(
        "guard",
        "softmax.cu",
        "a row of float32 or 16 bits that no block keeps has a pack for every thread",
        ("for (int64_t pack = threadIdx.x; pack < num_packs; pack += blockDim.x) {",),
    ),
    Harmless(
        "guard",
        "kept_rows.cuh",
        "a pack past the end of the row has no column to load or store, every other has a first",
        (
            "held_[i] = i >= count_of(0) ? nothing()",
            "if (i < count_of(0)) write_pack(pack_of(0, i), held_[i], probability);",
        ),
    ),
    Harmless(
        "guard",
        "softmax.cu",
        "the compiler's four turns at once of a loop that has one: a row ends in less than a pack",
        ("for (int64_t c = num_packs * kColumns + threadIdx.x; c < num_cols;",),
    ),
    Harmless(
        "guard",
        "softmax_topk.cu",
        ONE_LANE,
        (
            "if (lane_index() == 0) s.count =",
            "if (lane_index() == 0) { s.floors[warp_index()] = warp_floor; maxima",
            "if (lane_index() == 0) { max = block_max;",
            "if (lane_index() == 0) s.floors[warp_index()] = warp_floor;",
        ),
    ),
    Harmless(
        "guard",
        "softmax_topk.cu",
        "k elements reach the floor: what does not is counted behind them, and never taken",
        ("if (key >= floor) visit(key, begin + column);",),
    ),
    Harmless(
        "guard",
        "softmax_topk.cu",
        "the first turn of the first pass is always due; one of the second when all are found"
        " places none, as `at < wanted` says",
        (
            "for (int pass = 0; pass < 2; ++pass) {",
            "for (int base = 0; base < chunk.size && count < wanted; base += kWarp) {",
        ),
    ),
)


@cache
def words_of(file: str) -> list[str]:
    """The lines of a source, spaces as one, each with what follows it."""
    lines = (ROOT / file).read_text().splitlines()
    return [" ".join(" ".join(lines[i : i + 3]).split()) for i in range(len(lines))]


def lines_of(place: str) -> Iterator[tuple[str, str, int]]:
    """Of every line of the package that a place names: file, text from there on, and its length."""
    for file, number in re.findall(r"(csrc/cuda/[\w/.]+):(\d+)", place):
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        yield file, words_of(file)[int(number) - 1], len(" ".join(line.split()))


def covers(entry: Harmless, kind: str, place: str) -> tuple[str, ...]:
    """The texts of an entry that a place is found by."""
    if kind != entry.kind:
        return ()
    return tuple(
        near
        for near in entry.near
        for file, text, length in lines_of(place)
        if file.endswith(f"/{entry.file}") and 0 <= text.find(near) < length
    )
