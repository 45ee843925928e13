// plan_dispatch on CUDA: a stable counting sort over tiles of slots.
//
// Up to kFewExperts experts a block has a tile, and there are so few tiles that adding up the counts of all of them in
// every block costs less than a launch:
//   count   slots of every tile per expert, in any order
//   place   every block adds up the counts, which gives the experts' first rows and where its own tile starts, ranks
//           the tile's slots and fills its part of the padding with -1
// A tile of one chunk has counted itself by the time that it is ranked: then there is no other, and no `count`.
// Beyond, a warp walks a tile, and `scan` adds up once in between: a warp per expert, and the last block to finish lays
// out the experts.
// Ranks are taken 32 slots a step: ballots over the bits of the ids find the lanes of one expert, the first of them
// moves the expert's cursor, the others rank behind it by lane. So ranks follow slots, and no atomic orders anything.
// A step costs some 10 instructions and 4 a bit; what costs time is to wait, so the ids of kSteps steps come together.
//
// With a limit more launches go before, and mark the slots that are turned away; `count` then passes them over.
//   capacity by position   the same walks and scan with the slots ordered by choice, then token: a rank in that order
//                          is an arrival, and the walk marks ranks from `capacity` on
//   by score, or by scope  cub::DeviceRadixSort (stable, least digit first) orders the slots by key, then by (expert,
//                          scope); slot i of a group is turned away if slot i - capacity is of the same group
//   max_rows               the slot at which the rows are used up; it and all later ones are turned away
// Nothing is sized by the number of scopes, the host waits for nothing, and sizes follow from shapes and arguments.
//
// A single-pass algorithm (decoupled look-back) would save the second read of the ids, 4 bytes a slot, and need a
// window of shared memory of E counters per block; the ids stay in the second-level cache at these sizes.
// Ids out of range, and slots of a token whose scope is out of range, are none. Bytes: ids twice, both maps once,
// 4 E a tile and, by warps, as much again, or, by blocks, 4 E for every pair of tiles, from the second-level cache; a
// sort adds about 24 bytes a slot and pass over 8 bits of key.
#include <type_traits>

#include "cuda/debug.cuh"
#include "cuda/surplus.cuh"
#include "ops/plan_dispatch.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int64_t kLeastTileSlots = 128, kTileSlots = 512;  // of a warp
constexpr int64_t kManyTiles = 256;                         // from here on tiles are not cut below kTileSlots
constexpr int64_t kMaxTiles = 4096;
constexpr int64_t kSharedExperts = 2048;  // up to here a warp's cursors lie in shared memory
constexpr int kSteps = 4;                 // whose ids are loaded together
constexpr int kScanThreads = 256;

constexpr int64_t kFewExperts = 512;  // two launches; a thread each
constexpr int kPlaceThreads = 512;
constexpr int kPlaceWarps = kPlaceThreads / kWarp;
constexpr int64_t kPlaceMostTiles = 128;         // a multiprocessor each, about
constexpr int64_t kPlaceMostCounts = 32 * 1024;  // that every block adds up: 128 KiB
constexpr int kPlaceSums = 16;                   // of them a thread loads together
constexpr unsigned kMostPlaceBlocks = 64;        // where padding is what there is to do

// What every kernel of a plan knows.
struct Work {
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

  // The experts of slots that are in use, else -1; a slot may be -1, which loads what slot 0 does. Loads of one kind come
  // without a condition, or the compiler puts the use of one before the next; so a thread waits for all of them at once.
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

enum class Walk { kCount, kMarkDrops, kPlace };

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
  unsigned
      peers[kCount];  // lanes of the same expert, by ballots over the bits of its id; none has a bit that no id has
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
    const unsigned before = peers[u] & ((1u << lane_index()) - 1u);
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
  const int64_t num_threads = grid_warps() * kWarp;
  for (int64_t row = end + grid_warp() * kWarp + lane_index(); row < a.num_rows; row += num_threads) {
    a.row_to_slot[row] = -1;
  }
}

// ---- A warp per tile: more than kFewExperts experts, and limits.

// One tile, in order. All lanes.
template <Walk kWalk>
__device__ inline void walk_tile(const Work& work, int64_t tile, const Cursors& cursors) {
  const PlanArgs& a = work.a;
  const int64_t begin = tile * work.tile_slots;
  const int64_t end = begin + work.tile_slots < work.num_slots ? begin + work.tile_slots : work.num_slots;
  for (int64_t step = begin; step < end; step += kSteps * kWarp) {
    int slots[kSteps], experts[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int64_t position = step + u * kWarp + lane_index();
      slots[u] = position < end ? work.slot_at(position) : -1;
    }
    work.load_experts(slots, experts);
    if (kWalk == Walk::kCount) {
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
        if (experts[u] >= 0) atomicAdd(&cursors[experts[u]], 1);
      }
      continue;
    }
    int32_t ranks[kSteps];
    take_ranks<kSteps>(cursors, static_cast<int>(a.num_experts), experts, ranks);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (slots[u] < 0) continue;
      if (kWalk == Walk::kMarkDrops) work.marks[slots[u]] = experts[u] >= 0 && ranks[u] >= a.capacity;
      if (kWalk == Walk::kPlace) {
        a.slot_to_row[slots[u]] = experts[u] >= 0 ? ranks[u] : -1;
        if (experts[u] >= 0) a.row_to_slot[ranks[u]] = slots[u];
      }
    }
  }
}

template <Walk kWalk>
__global__ void __launch_bounds__(kThreads, 1) walk_kernel(Work work) {
  extern __shared__ int32_t shared_cursors[];
  const PlanArgs& a = work.a;
  const int64_t tile = grid_warp();
  if (kWalk == Walk::kCount && tile == 0 && lane_index() == 0) *work.ticket = 0;
  if (kWalk == Walk::kPlace) fill_padding(a, a.offsets, a.kept);
  if (tile >= work.num_tiles) return;  // no barrier of the block follows
  const bool in_shared = a.num_experts <= kSharedExperts;
  const Cursors in_column{work.starts + tile, work.num_tiles};
  const Cursors cursors = in_shared ? Cursors{shared_cursors + threadIdx.x / kWarp * a.num_experts, 1} : in_column;
  for (int64_t e = lane_index(); e < a.num_experts; e += kWarp) {
    if (kWalk == Walk::kCount) cursors[e] = 0;
    if (kWalk == Walk::kMarkDrops && in_shared) cursors[e] = in_column[e];
    if (kWalk == Walk::kPlace) cursors[e] = in_column[e] + a.offsets[e];
  }
  __syncwarp();
  walk_tile<kWalk>(work, tile, cursors);
  if (kWalk == Walk::kCount && in_shared) {
    __syncwarp();
    for (int64_t e = lane_index(); e < a.num_experts; e += kWarp) in_column[e] = cursors[e];
  }
}

// ---- A block per tile: up to kFewExperts experts.

// starts[tile] = slots per expert.
__global__ void __launch_bounds__(kPlaceThreads, 1) count_kernel(Work work) {
  extern __shared__ int32_t counts[];
  const int num_experts = static_cast<int>(work.a.num_experts), thread = static_cast<int>(threadIdx.x);
  if (thread < num_experts) counts[thread] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * work.tile_slots;
  const int64_t end = begin + work.tile_slots < work.num_slots ? begin + work.tile_slots : work.num_slots;
  for (int64_t first = begin + thread; first < end; first += kSteps * kPlaceThreads) {
    int slots[kSteps], experts[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      slots[u] = first + u * kPlaceThreads < end ? static_cast<int>(first) + u * kPlaceThreads : -1;
    }
    work.load_experts(slots, experts);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (experts[u] >= 0) atomicAdd(counts + experts[u], 1);
    }
  }
  __syncthreads();
  if (thread < num_experts) work.starts[blockIdx.x * num_experts + thread] = counts[thread];
}

// A tile goes by chunks: a warp has the next `steps` steps of slots in registers, ranks them from zero, and thread e
// adds up the warps' counters of expert e.
class Placer {
 public:
  __device__ Placer(const Work& work, int32_t* shared)
      : work_(work), num_experts_(static_cast<int>(work.a.num_experts)),
        steps_(static_cast<int>(work.tile_slots / kPlaceThreads < kSteps ? work.tile_slots / kPlaceThreads : kSteps)),
        counters_(shared), offsets_(counters_ + kPlaceWarps * num_experts_), kept_(offsets_ + num_experts_ + 1),
        before_(kept_ + num_experts_) {}

  // The tile of this block, or where there is none that of the first, which is then not written.
  __device__ void run(const int32_t* demand) {
    const bool has_tile = blockIdx.x < work_.num_tiles;
    const int64_t begin = (has_tile ? blockIdx.x : 0) * work_.tile_slots;
    const int64_t end = begin + work_.tile_slots < work_.num_slots ? begin + work_.tile_slots : work_.num_slots;
    if (has_expert()) kept_[thread()] = before_[thread()] = 0;
    int32_t cursor = 0;
    for (int64_t first = begin;; first += steps_ * kPlaceThreads) {
      rank(first, end);
      __syncthreads();
      if (first == begin) cursor = lay_out(demand);
      if (has_expert()) cursor = start_warps(cursor);
      __syncthreads();
      if (!has_tile) break;
      write();
      if (first + steps_ * kPlaceThreads >= end) break;
      __syncwarp();  // the warp has read its counters
    }
    fill_padding(work_.a, offsets_, kept_);
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ bool has_expert() const { return thread() < num_experts_; }
  __device__ int32_t* warp_counters() const { return counters_ + warp_index() * num_experts_; }

  // Of the warp's slots of a chunk: experts, and ranks among the warp's; its counters say how many.
  __device__ void rank(int64_t first, int64_t end) {
#pragma unroll 4
    for (int e = lane_index(); e < num_experts_; e += kWarp) warp_counters()[e] = 0;
    const int64_t own = first + warp_index() * steps_ * kWarp + lane_index();
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      slots_[u] = u < steps_ && own + u * kWarp < end ? static_cast<int>(own) + u * kWarp : -1;
    }
    if (first < end) {
      work_.load_experts(slots_, experts_);
    } else {  // a plan of no slots
#pragma unroll
      for (int u = 0; u < kSteps; ++u) experts_[u] = -1;
    }
    __syncwarp();
    constexpr int kPair = 2;
#pragma unroll
    for (int u = 0; u < kSteps; u += kPair) {
      if (u < steps_) take_ranks<kPair>(Cursors{warp_counters(), 1}, num_experts_, experts_ + u, ranks_ + u);
    }
  }

  // kept[e] = slots of all tiles, before[e] = those of tiles before this block's.
  __device__ void add_up_tiles() {
    const int num_sharers = kPlaceThreads / num_experts_;  // threads that share an expert
    const int expert = thread() % num_experts_, share = thread() / num_experts_;
    const int own = static_cast<int>(blockIdx.x) * num_experts_ + expert;  // where the counts lie; the next tile's
    const int last = static_cast<int>(work_.num_tiles - 1) * num_experts_ + expert;  // num_experts_ further
    if (share < num_sharers) {
      const int step = num_sharers * num_experts_;
      int32_t all = 0, earlier = 0;
      for (int first = thread(); first <= last; first += kPlaceSums * step) {
        int32_t counts[kPlaceSums];
#pragma unroll
        for (int u = 0; u < kPlaceSums; ++u) counts[u] = work_.starts[min(first + u * step, last)];
#pragma unroll
        for (int u = 0; u < kPlaceSums; ++u) {
          all += first + u * step <= last ? counts[u] : 0;
          earlier += first + u * step < own ? counts[u] : 0;
        }
      }
      atomicAdd(kept_ + expert, all);
      atomicAdd(before_ + expert, earlier);
    }
    __syncthreads();
  }

  // First rows: a scan over the experts, rounded up to the alignment. Returns the tile's first row of expert thread().
  __device__ int32_t lay_out(const int32_t* demand) {
    __shared__ int32_t warp_rows[kPlaceWarps];
    const PlanArgs& a = work_.a;
    if (work_.num_tiles > 1) add_up_tiles();
    int32_t own_kept = 0;
    if (has_expert()) own_kept = work_.num_tiles > 1 ? kept_[thread()] : sum_of_warps();
    const int32_t own_rows = static_cast<int32_t>((own_kept + a.align - 1) / a.align * a.align);
    int32_t end = own_rows;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, end, distance);
      if (lane_index() >= distance) end += other;
    }
    if (lane_index() == kWarp - 1) warp_rows[warp_index()] = end;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kPlaceWarps; ++w) end += w < warp_index() ? warp_rows[w] : 0;
    if (thread() == 0) offsets_[0] = 0;
    if (!has_expert()) return 0;
    offsets_[thread() + 1] = end;
    kept_[thread()] = own_kept;
    if (blockIdx.x == 0) {
      if (thread() == 0) a.offsets[0] = 0;
      a.offsets[thread() + 1] = end;
      a.kept[thread()] = own_kept;
      a.dropped[thread()] = demand != nullptr ? demand[thread()] - own_kept : 0;
    }
    return end - own_rows + before_[thread()];
  }

  // Of the counters of expert thread().
  __device__ int32_t sum_of_warps() const {
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kPlaceWarps; ++w) sum += counters_[w * num_experts_ + thread()];
    return sum;
  }

  // The same counters become first rows, `cursor` the first warp's. Returns that of the next chunk.
  __device__ int32_t start_warps(int32_t cursor) {
    int32_t counts[kPlaceWarps];
#pragma unroll
    for (int w = 0; w < kPlaceWarps; ++w) counts[w] = counters_[w * num_experts_ + thread()];
#pragma unroll
    for (int w = 0; w < kPlaceWarps; ++w) {
      counters_[w * num_experts_ + thread()] = cursor;
      cursor += counts[w];
    }
    return cursor;
  }

  __device__ void write() const {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (slots_[u] < 0) continue;
      const int32_t row = experts_[u] >= 0 ? warp_counters()[experts_[u]] + ranks_[u] : -1;
      work_.a.slot_to_row[slots_[u]] = row;
      if (row >= 0) work_.a.row_to_slot[row] = slots_[u];
    }
  }

  const Work& work_;
  const int num_experts_, steps_;
  int32_t *const counters_, *const offsets_, *const kept_, *const before_;  // [warps, E], [E + 1], [E], [E]
  int slots_[kSteps], experts_[kSteps];
  int32_t ranks_[kSteps];
};

// `demand` as in lay_out_experts.
__global__ void __launch_bounds__(kPlaceThreads, 1)
    place_kernel(const __grid_constant__ Work work, const int32_t* demand) {
  extern __shared__ int32_t shared[];
  Placer(work, shared).run(demand);
}

// ---- Scan.

// offsets, kept and dropped from the totals. `demand`, if any, is what was asked for before slots were turned away; it
// may be a.dropped itself. One block.
__device__ void lay_out_experts(const PlanArgs& a, const int32_t* totals, const int32_t* demand) {
  __shared__ int64_t warp_rows[kScanThreads / kWarp];
  const int64_t per_thread = (a.num_experts + kScanThreads - 1) / kScanThreads;
  const int64_t begin = threadIdx.x * per_thread < a.num_experts ? threadIdx.x * per_thread : a.num_experts;
  const int64_t end = begin + per_thread < a.num_experts ? begin + per_thread : a.num_experts;
  const auto rows_of = [&](int64_t e) { return (__ldcg(totals + e) + a.align - 1) / a.align * a.align; };
  int64_t own = 0;
  for (int64_t e = begin; e < end; ++e) own += rows_of(e);
  int64_t before = own;  // inclusive over the warp, then exclusive over the block
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, before, distance);
    if (lane_index() >= distance) before += other;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (lane_index() == kWarp - 1) warp_rows[warp] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp; ++w) before += warp_rows[w];
  for (int64_t e = begin; e < end; ++e) {
    const int32_t kept = __ldcg(totals + e);
    a.offsets[e] = static_cast<int32_t>(before);
    a.kept[e] = kept;
    a.dropped[e] = demand != nullptr ? demand[e] - kept : 0;
    before += rows_of(e);
    if (e == a.num_experts - 1) a.offsets[a.num_experts] = static_cast<int32_t>(before);
  }
}

// Counts to starts, a warp per expert. With is_last the block that finishes last lays out the experts, else the totals
// stay as the demand.
__global__ void __launch_bounds__(kScanThreads, 1)
    scan_kernel(Work work, int32_t* totals, const int32_t* demand, bool is_last) {
  const PlanArgs& a = work.a;
  for (int64_t e = grid_warp(); e < a.num_experts; e += grid_warps()) {
    int32_t* row = work.starts + e * work.num_tiles;
    int32_t before = 0;
    for (int64_t first = 0; first < work.num_tiles; first += kWarp) {
      const int64_t tile = first + lane_index();
      const int32_t count = tile < work.num_tiles ? row[tile] : 0;
      int32_t sum = count;
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const int32_t other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane_index() >= distance) sum += other;
      }
      if (tile < work.num_tiles) row[tile] = before + sum - count;
      before += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (lane_index() == 0) totals[e] = before;
  }
  if (!is_last) return;
  __shared__ bool is_last_block;
  __threadfence();  // the totals of this block before its ticket
  __syncthreads();
  if (threadIdx.x == 0) is_last_block = atomicAdd(work.ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;
  __syncthreads();
  if (!is_last_block) return;
  __threadfence();
  lay_out_experts(a, totals, demand);
}

// ---- Capacity by score or by scope: sorting.

__global__ void __launch_bounds__(kThreads) fill_score_keys_kernel(Work work, uint64_t* keys, int32_t* slots) {
  const int64_t num_threads = grid_warps() * kWarp;
  for (int64_t i = grid_warp() * kWarp + lane_index(); i < work.num_slots; i += num_threads) {
    keys[i] = falling_key(work.a.weights, work.a.weights_dtype, i);
    slots[i] = static_cast<int32_t>(i);
  }
}

// keys[i] = (expert, scope) of the i-th slot as one number, larger than all of them for none. The order is that of
// `sorted`, or by choice, then token.
__global__ void __launch_bounds__(kThreads)
    fill_group_keys_kernel(Work work, const int32_t* sorted, uint64_t* keys, int32_t* slots) {
  const PlanArgs& a = work.a;
  const int64_t num_threads = grid_warps() * kWarp;
  for (int64_t i = grid_warp() * kWarp + lane_index(); i < work.num_slots; i += num_threads) {
    const int slot = sorted != nullptr ? sorted[i] : work.slot_at(i);
    const int expert = work.expert_of(slot);
    const uint64_t scope = a.scope_ids != nullptr ? static_cast<uint32_t>(a.scope_ids[work.token_of(slot)]) : 0u;
    keys[i] = expert < 0 ? static_cast<uint64_t>(a.num_experts) * a.num_scopes
                         : static_cast<uint64_t>(expert) * a.num_scopes + scope;
    slots[i] = slot;
  }
}

// ---- max_rows.

__global__ void __launch_bounds__(kThreads, 1) count_used_kernel(Work work) {
  for (int64_t tile = grid_warp(); tile < work.num_tiles; tile += grid_warps()) {
    const int64_t begin = tile * work.tile_slots;
    int32_t used = 0;
    for (int64_t first = begin; first < begin + work.tile_slots; first += kWarp) {
      const int64_t slot = first + lane_index();
      used += __popc(__ballot_sync(kAllLanes, slot < work.num_slots && work.expert_of(static_cast<int>(slot)) >= 0));
    }
    if (lane_index() == 0) work.tile_used[tile] = used;
  }
}

// The slot in use that max_slots others precede, or S. One warp.
__global__ void __launch_bounds__(kWarp) find_cut_kernel(Work work, int32_t* first_cut) {
  int64_t room = work.a.max_slots;
  int64_t tile = 0;
  while (tile < work.num_tiles && work.tile_used[tile] <= room) room -= work.tile_used[tile++];
  int64_t cut = work.num_slots;
  for (int64_t first = tile * work.tile_slots; tile < work.num_tiles && cut == work.num_slots; first += kWarp) {
    const int64_t slot = first + lane_index();
    unsigned used = __ballot_sync(kAllLanes, slot < work.num_slots && work.expert_of(static_cast<int>(slot)) >= 0);
    const int count = __popc(used);
    if (room < count) {
      for (; room > 0; --room) used &= used - 1;
      cut = first + __ffs(used) - 1;
    } else {
      room -= count;
    }
  }
  if (lane_index() == 0) *first_cut = static_cast<int32_t>(cut);
}

// ---- Host.

template <class T>
T* scratch_of(const CudaQueue& queue, int64_t count) {
  return static_cast<T*>(queue.scratch(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)));
}

// Slots of a warp, and what walks and scans share.
void cut_for_warps(Work& work, const CudaQueue& queue) {
  int64_t tile_slots = ceil_div(work.num_slots, kManyTiles);
  if (tile_slots < kLeastTileSlots) tile_slots = kLeastTileSlots;
  if (tile_slots > kTileSlots) tile_slots = kTileSlots;
  if (tile_slots < work.a.num_experts) tile_slots = work.a.num_experts;  // a tile has as many counters at most
  if (tile_slots < ceil_div(work.num_slots, kMaxTiles)) tile_slots = ceil_div(work.num_slots, kMaxTiles);
  work.tile_slots = ceil_div(tile_slots, kWarp) * kWarp;
  work.num_tiles = work.num_slots > 0 ? ceil_div(work.num_slots, work.tile_slots) : 1;
  work.starts = scratch_of<int32_t>(queue, work.a.num_experts * work.num_tiles);
  work.totals = scratch_of<int32_t>(queue, work.a.num_experts);
  work.ticket = scratch_of<int32_t>(queue, 1);
}

size_t cursor_bytes(const PlanArgs& a) {
  return a.num_experts <= kSharedExperts ? kWarpsPerBlock * a.num_experts * sizeof(int32_t) : 0;
}

template <Walk kWalk>
CudaStatus walk(const Work& work, const CudaQueue& queue) {
  unsigned blocks = num_blocks(work.num_tiles, kWarpsPerBlock);
  if (kWalk == Walk::kPlace && work.a.align > 1) {  // there is padding to share
    const unsigned wanted = num_blocks(work.a.num_experts, kWarpsPerBlock);
    blocks = blocks > wanted ? blocks : wanted;
  }
  walk_kernel<kWalk><<<blocks, kThreads, cursor_bytes(work.a), queue.stream>>>(work);
  return launched();
}

CudaStatus scan(const Work& work, int32_t* totals, const int32_t* demand, bool is_last, const CudaQueue& queue) {
  const unsigned blocks = num_blocks(work.a.num_experts, kScanThreads / kWarp);
  scan_kernel<<<blocks, kScanThreads, 0, queue.stream>>>(work, totals, demand, is_last);
  return launched();
}

// Slots of a block, [tiles, E] counts: as many blocks as pay for adding up those of all in each.
void cut_for_blocks(Work& work) {
  int64_t most_tiles = kPlaceMostCounts / work.a.num_experts;
  if (most_tiles > kPlaceMostTiles) most_tiles = kPlaceMostTiles;
  int64_t tile_slots = work.num_slots;  // of one chunk
  if (tile_slots > kSteps * kPlaceThreads) tile_slots = ceil_div(work.num_slots, most_tiles);
  if (tile_slots < 1) tile_slots = 1;
  work.tile_slots = ceil_div(tile_slots, kPlaceThreads) * kPlaceThreads;
  work.num_tiles = work.num_slots > 0 ? ceil_div(work.num_slots, work.tile_slots) : 1;
}

// Counts, then rows.
CudaStatus place(Work work, const int32_t* demand, const CudaQueue& queue) {
  const PlanArgs& a = work.a;
  CudaStatus status;
  if (a.num_experts > kFewExperts) {
    if (status = walk<Walk::kCount>(work, queue); status.code != 0) return status;
    if (status = scan(work, work.totals, demand, true, queue); status.code != 0) return status;
    return walk<Walk::kPlace>(work, queue);
  }
  cut_for_blocks(work);
  if (work.num_tiles > 1) {
    work.starts = scratch_of<int32_t>(queue, work.num_tiles * a.num_experts);
    const size_t bytes = a.num_experts * sizeof(int32_t);
    count_kernel<<<num_blocks(work.num_tiles, 1), kPlaceThreads, bytes, queue.stream>>>(work);
    if (status = launched(); status.code != 0) return status;
  }
  unsigned blocks = num_blocks(work.num_tiles, 1);
  const unsigned wanted = num_blocks(a.num_rows, 8 * kPlaceThreads);  // that padding may fill
  if (wanted > blocks) blocks = wanted < kMostPlaceBlocks ? wanted : kMostPlaceBlocks;
  const size_t bytes = ((kPlaceWarps + 3) * a.num_experts + 1) * sizeof(int32_t);
  place_kernel<<<blocks, kPlaceThreads, bytes, queue.stream>>>(work, demand);
  return launched();
}

CudaStatus drop_by_sorting(Work work, uint8_t* is_dropped, const CudaQueue& queue) {
  const PlanArgs& a = work.a;
  const unsigned blocks = num_blocks(work.num_slots, kThreads);
  KeyedSlots slots(work.num_slots, queue);
  work.is_by_choice = a.drop_policy == DropPolicy::kPosition;
  const bool by_score = a.drop_policy == DropPolicy::kScore;
  CudaStatus status;
  if (by_score) {
    fill_score_keys_kernel<<<blocks, kThreads, 0, queue.stream>>>(work, slots.keys, slots.slots);
    if (status = launched(); status.code != 0) return status;
    if (status = slots.sort(falling_key_bits(a.weights_dtype), queue); status.code != 0) return status;
  }
  // In place: slot i is read before it is written, by the same thread.
  fill_group_keys_kernel<<<blocks, kThreads, 0, queue.stream>>>(work, by_score ? slots.slots : nullptr, slots.keys,
                                                                slots.slots);
  if (status = launched(); status.code != 0) return status;
  const int bits = bits_of(static_cast<uint64_t>(a.num_experts) * a.num_scopes);
  if (status = slots.sort(bits, queue); status.code != 0) return status;
  return slots.mark_surplus(a.capacity, is_dropped, queue);
}

// Most slots that capacity can leave: min(S, E * capacity * scopes), without overflow.
int64_t most_kept(const PlanArgs& a, int64_t num_slots) {
  const int64_t groups = a.num_experts * a.num_scopes;
  return a.capacity == 0 || a.capacity > num_slots / groups ? num_slots : groups * a.capacity;
}

// Counts the demand into a.dropped and marks what capacity turns away.
CudaStatus drop(Work& work, const CudaQueue& queue) {
  const PlanArgs& a = work.a;
  Work first = work;
  const bool by_arrival = a.drop_policy == DropPolicy::kPosition && a.scope_ids == nullptr;
  first.is_by_choice = by_arrival;
  CudaStatus status = walk<Walk::kCount>(first, queue);
  if (status.code != 0) return status;
  if (status = scan(first, a.dropped, nullptr, false, queue); status.code != 0) return status;
  if (a.capacity == 0) return {};
  uint8_t* is_dropped = scratch_of<uint8_t>(queue, work.num_slots);
  if (by_arrival) {
    first.marks = is_dropped;
    status = walk<Walk::kMarkDrops>(first, queue);
  } else {
    status = drop_by_sorting(first, is_dropped, queue);
  }
  work.is_dropped = is_dropped;
  return status;
}

CudaStatus cut_at_max_rows(Work& work, const CudaQueue& queue) {
  work.tile_used = scratch_of<int32_t>(queue, work.num_tiles);
  int32_t* first_cut = scratch_of<int32_t>(queue, 1);
  count_used_kernel<<<num_blocks(work.num_tiles, kWarpsPerBlock), kThreads, 0, queue.stream>>>(work);
  const CudaStatus status = launched();
  if (status.code != 0) return status;
  find_cut_kernel<<<1, kWarp, 0, queue.stream>>>(work, first_cut);
  work.first_cut = first_cut;
  return launched();
}

}  // namespace

CudaStatus plan_dispatch(const PlanArgs& a, const CudaQueue& queue) {
  Work work{};
  work.a = a;
  work.num_slots = a.num_tokens * a.top_k;
  work.is_even = a.top_k == 1 || a.experts_stride_token == a.top_k * a.experts_stride_slot;
  work.id_stride = a.top_k == 1 ? a.experts_stride_token : a.experts_stride_slot;
  const bool may_drop = a.capacity > 0 && work.num_slots > a.capacity;
  const bool may_overflow = a.max_slots < most_kept(a, work.num_slots);
  const int32_t* demand = may_drop || may_overflow ? a.dropped : nullptr;
  if (demand != nullptr || a.num_experts > kFewExperts) cut_for_warps(work, queue);
  CudaStatus status;
  if (demand != nullptr) {
    if (status = drop(work, queue); status.code != 0) return status;
  }
  if (may_overflow) {
    if (status = cut_at_max_rows(work, queue); status.code != 0) return status;
  }
  return place(work, demand, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
