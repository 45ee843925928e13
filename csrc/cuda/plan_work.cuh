// What the kernels of plan_dispatch share: the experts of slots, and ranks within a warp.
//
// Ranks are taken 32 slots a step: ballots over the bits of the ids find the lanes of one expert, the first of them
// moves the expert's cursor, the others rank behind it by lane. So ranks follow slots, and no atomic orders anything.
// A step costs some 10 instructions and 4 a bit; what costs time is to wait, so the ids of kSteps steps come together.
#pragma once

#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/debug.cuh"
#include "ops/plan_dispatch.h"

namespace fastmoe_route {
namespace cuda {

constexpr int kSteps = 4;  // whose ids are loaded together

// What every kernel of a plan knows.
struct PlanWork {
  PlanArgs a;
  int64_t num_slots;
  int64_t num_tiles;
  int64_t tile_slots;   // a multiple of 32; of a block: of kPlaceThreads
  int32_t* starts;      // [E, tiles]: counts, then slots in earlier tiles; [tiles, E] for `place`: counts
  int32_t* totals;      // [E] what the last scan summed
  int32_t* ticket;      // [1] blocks of the last scan that have finished; `count` clears it
  uint8_t* is_dropped;  // [S] turned away by capacity, or null
  uint8_t* marks;       // [S] what the walk that marks drops writes
  int32_t* tile_used;   // [tiles] slots in use, for max_rows
  int32_t* first_cut;   // [1] first slot past max_rows, or null
  int64_t id_stride;    // of the ids, where all slots have the same
  bool is_even;         // they have
  bool is_by_choice;    // walks take slots by choice, then token

  // The slot at a position of the walk.
  __device__ int slot_at(int64_t position) const {
    if (!is_by_choice) return static_cast<int>(position);
    const uint32_t tokens = static_cast<uint32_t>(a.num_tokens);
    const uint32_t choice = static_cast<uint32_t>(position) / tokens;
    return static_cast<int>((static_cast<uint32_t>(position) - choice * tokens) * a.top_k + choice);
  }

  __device__ uint32_t token_of(int slot) const { return static_cast<uint32_t>(slot) / static_cast<uint32_t>(a.top_k); }

  // The experts of slots that are in use, else -1; a slot may be -1, which loads what slot 0 does. Loads of one kind
  // have no condition, or the compiler puts the use of one before the next: so a thread waits for all of them at once.
  template <int kCount>
  __device__ void load_experts(const int (&slots)[kCount], int (&experts)[kCount]) const {
    int64_t at[kCount];
    if (is_even) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) at[u] = at_least_0(slots[u]) * id_stride;
    } else {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const int64_t token = token_of(at_least_0(slots[u]));
        at[u] = token * a.experts_stride_token + (at_least_0(slots[u]) - token * a.top_k) * a.experts_stride_slot;
      }
    }
    if (a.experts_are_int64) {
      load_ids(static_cast<const int64_t*>(a.experts), at, slots, experts);
    } else {
      load_ids(static_cast<const int32_t*>(a.experts), at, slots, experts);
    }
    if (a.scope_ids != nullptr) pass_over_scopes(slots, experts);
    if (is_dropped != nullptr) pass_over_dropped(slots, experts);
    if (first_cut != nullptr) {
      const int cut = *first_cut;
#pragma unroll
      for (int u = 0; u < kCount; ++u) experts[u] = slots[u] < cut ? experts[u] : -1;
    }
  }

  // Of one slot.
  __device__ int expert_of(int slot) const {
    const int slots[1] = {slot};
    int experts[1];
    load_experts(slots, experts);
    return experts[0];
  }

 private:
  __device__ static int at_least_0(int slot) { return slot > 0 ? slot : 0; }

  template <class Id, int kCount>
  __device__ void load_ids(const Id* ids, const int64_t (&at)[kCount], const int (&slots)[kCount],
                           int (&experts)[kCount]) const {
    using Unsigned = std::make_unsigned_t<Id>;
    Id id[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) id[u] = ids[at[u]];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      debug_assert(slots[u] < 0 || (id[u] >= -1 && id[u] < a.num_experts + a.allow_unrouted));
      const bool is_expert = static_cast<Unsigned>(id[u]) < static_cast<Unsigned>(a.num_experts);  // nor negative
      experts[u] = slots[u] >= 0 && is_expert ? static_cast<int>(id[u]) : -1;
    }
  }

  template <int kCount>
  __device__ void pass_over_scopes(const int (&slots)[kCount], int (&experts)[kCount]) const {
    int32_t scope[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) scope[u] = a.scope_ids[token_of(at_least_0(slots[u]))];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const bool is_known = scope[u] >= 0 && scope[u] < a.num_scopes;
      debug_assert(is_known || experts[u] < 0);
      experts[u] = is_known ? experts[u] : -1;
    }
  }

  template <int kCount>
  __device__ void pass_over_dropped(const int (&slots)[kCount], int (&experts)[kCount]) const {
    uint8_t mark[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) mark[u] = is_dropped[at_least_0(slots[u])];
#pragma unroll
    for (int u = 0; u < kCount; ++u) experts[u] = mark[u] == 0 ? experts[u] : -1;
  }
};

// One expert's counter per warp: in shared memory, or in the tile's column of `starts`.
struct Cursors {
  int32_t* first;
  int64_t stride;
  __device__ int32_t& operator[](int expert) const { return first[expert * stride]; }
};

// Ranks the slots of kCount steps, one after the other: every lane brings the experts of its slots, or -1, and gets for
// each the cursor's value then. All lanes.
template <int kCount>
__device__ inline void take_ranks(const Cursors& cursors, int num_experts, const int* experts, int32_t* ranks) {
  // Lanes of the same expert, by ballots over the bits of its id; none has a bit that no id has.
  unsigned peers[kCount];
#pragma unroll
  for (int u = 0; u < kCount; ++u) peers[u] = kAllLanes;
  for (int bit = 1; bit <= num_experts; bit *= 2) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const bool has_bit = (experts[u] & bit) != 0;
      const unsigned have_bit = __ballot_sync(kAllLanes, has_bit);
      peers[u] &= has_bit ? have_bit : ~have_bit;
    }
  }
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const int32_t first = experts[u] >= 0 ? cursors[experts[u]] : 0;
    const unsigned before = peers[u] & lanes_before();
    __syncwarp();  // all have read
    if (experts[u] >= 0 && before == 0) cursors[experts[u]] = first + __popc(peers[u]);
    __syncwarp();  // the next step may have another first lane for this expert
    ranks[u] = first + __popc(before);
  }
}

// Rows that hold no slot: behind each expert's rows up to the next expert's first, and behind the last expert's. All
// warps of the grid share them.
__device__ inline void fill_padding(const PlanArgs& a, const int32_t* offsets, const int32_t* kept) {
  const int64_t end = offsets[a.num_experts];
  for (int64_t e = grid_warp(); a.align > 1 && e < a.num_experts; e += grid_warps()) {
    const int64_t next = offsets[e + 1];
    for (int64_t row = offsets[e] + kept[e] + lane_index(); row < next; row += kWarp) a.row_to_slot[row] = -1;
  }
  for (int64_t row = end + grid_thread(); row < a.num_rows; row += grid_threads()) a.row_to_slot[row] = -1;
}

}  // namespace cuda
}  // namespace fastmoe_route
