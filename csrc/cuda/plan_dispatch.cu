// plan_dispatch on CUDA: a stable counting sort over tiles of slots; a warp owns a tile.
//
//   count   every warp walks its tile in order and counts per expert
//   place   every block adds up the counts of all tiles, which gives the experts' first rows and where its own tiles
//           start; the same walk once more hands out rows, and the warps fill the padding with -1
// Two launches, up to kFewExperts experts and so few tiles that adding them up again in every block costs less than a
// launch. Beyond, `scan` does it once in between: a warp per expert, and the last block to finish lays out the experts.
// A walk takes 32 slots a step: __match_any_sync finds the lanes of one expert, the lowest of them moves the expert's
// cursor, the others rank behind it by lane. So ranks follow slots, and no atomic orders anything.
//
// With a limit more launches go before, and mark the slots that are turned away; `count` then passes them over.
//   capacity by position   the same count and scan with the slots ordered by choice, then token: a rank in that order
//                          is an arrival, and the walk marks ranks from `capacity` on
//   by score, or by scope  cub::DeviceRadixSort (stable, least digit first) orders the slots by key, then by (expert,
//                          scope); slot i of a group is turned away if slot i - capacity is of the same group
//   max_rows               the slot at which the rows are used up; it and all later ones are turned away
// Nothing is sized by the number of scopes, the host waits for nothing, and sizes follow from shapes and arguments.
//
// A single-pass algorithm (decoupled look-back) would save the second read of the ids, 4 bytes a slot, and need a
// window of shared memory of E counters per block; the ids stay in the second-level cache at these sizes.
// Ids out of range, and slots of a token whose scope is out of range, are none. Bytes: ids twice, both maps once,
// 8 E a tile; a sort adds about 24 bytes a slot and pass over 8 bits of key.
#include "cuda/debug.cuh"
#include "cuda/surplus.cuh"
#include "ops/plan_dispatch.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int64_t kTileSlots = 512;
constexpr int64_t kMaxTiles = 4096;
constexpr int64_t kSharedExperts = 2048;  // up to here a warp's cursors lie in shared memory
constexpr int kStepsAhead = 4;            // steps whose ids are loaded together
constexpr int kScanThreads = 256;
constexpr int kPlaceThreads = 512;
constexpr int kPlaceWarps = kPlaceThreads / kWarp;
constexpr int64_t kFewExperts = 512;  // a thread each
constexpr int64_t kFewTiles = 256;
constexpr unsigned kMostPlaceBlocks = 64;

// What every kernel of a plan knows.
struct Work {
  PlanArgs a;
  int64_t num_slots;
  int64_t num_tiles;
  int64_t tile_slots;  // a multiple of 32
  int32_t* starts;     // [E, tiles], or [tiles, E] for two launches: counts, then slots in earlier tiles
  int64_t expert_stride;
  int64_t tile_stride;
  int32_t* totals;      // [E] what the last scan summed
  int32_t* ticket;      // [1] blocks of the last scan that have finished; `count` clears it
  uint8_t* is_dropped;  // [S] turned away by capacity, or null
  uint8_t* marks;       // [S] what the walk that marks drops writes
  int32_t* tile_used;   // [tiles] slots in use, for max_rows
  int32_t* first_cut;   // [1] first slot past max_rows, or null
  bool is_by_choice;    // walks take slots by choice, then token

  // The slot at a position of the walk.
  __device__ int64_t slot_at(int64_t position) const {
    if (!is_by_choice) return position;
    const uint32_t tokens = static_cast<uint32_t>(a.num_tokens);
    const uint32_t choice = static_cast<uint32_t>(position) / tokens;
    return (static_cast<uint32_t>(position) - choice * tokens) * a.top_k + choice;
  }

  // The expert of a slot that is in use, else -1.
  __device__ int expert_of(int64_t slot) const {
    const uint32_t token = static_cast<uint32_t>(slot) / static_cast<uint32_t>(a.top_k);
    const int64_t choice = slot - token * a.top_k;
    const int64_t at = token * a.experts_stride_token + choice * a.experts_stride_slot;
    const int64_t id =
        a.experts_are_int64 ? static_cast<const int64_t*>(a.experts)[at] : static_cast<const int32_t*>(a.experts)[at];
    debug_assert(id >= -1 && id < a.num_experts + a.allow_unrouted);
    if (id < 0 || id >= a.num_experts) return -1;
    if (a.scope_ids != nullptr && (a.scope_ids[token] < 0 || a.scope_ids[token] >= a.num_scopes)) {
      debug_assert(false);
      return -1;
    }
    if (is_dropped != nullptr && is_dropped[slot] != 0) return -1;
    if (first_cut != nullptr && slot >= *first_cut) return -1;
    return static_cast<int>(id);
  }
};

enum class Walk { kCount, kMarkDrops, kPlace };

// One expert's counter per warp: in shared memory, or in the tile's column of `starts`.
struct Cursors {
  int32_t* first;
  int64_t stride;
  __device__ int32_t& operator[](int expert) const { return first[expert * stride]; }
};

// Ranks the slots of one step: every lane brings the expert of its slot or -1, and gets the cursor's value for it.
// All lanes.
__device__ inline int32_t take_rank(const Cursors& cursors, int expert) {
  const unsigned peers = __match_any_sync(kAllLanes, expert);
  const int leader = __ffs(peers) - 1;
  int32_t first = 0;
  if (expert >= 0 && lane_index() == leader) {
    first = cursors[expert];
    cursors[expert] = first + __popc(peers);
  }
  first = __shfl_sync(kAllLanes, first, leader);
  __syncwarp();  // the next step may have another leader for this expert
  return first + __popc(peers & ((1u << lane_index()) - 1u));
}

// Rows that hold no slot: behind each expert's rows up to the next expert's first, and behind the last expert's. All
// warps of the grid share them.
__device__ inline void fill_padding(const PlanArgs& a, const int32_t* offsets, const int32_t* kept) {
  const int64_t end = offsets[a.num_experts];
  for (int64_t e = grid_warp(); e < a.num_experts; e += grid_warps()) {
    const int64_t next = offsets[e + 1];
    for (int64_t row = offsets[e] + kept[e] + lane_index(); row < next; row += kWarp) a.row_to_slot[row] = -1;
  }
  const int64_t num_threads = grid_warps() * kWarp;
  for (int64_t row = end + grid_warp() * kWarp + lane_index(); row < a.num_rows; row += num_threads) {
    a.row_to_slot[row] = -1;
  }
}

// One tile, in order. All lanes.
template <Walk kWalk>
__device__ inline void walk_tile(const Work& work, int64_t tile, const Cursors& cursors) {
  const PlanArgs& a = work.a;
  const int64_t begin = tile * work.tile_slots;
  const int64_t end = begin + work.tile_slots < work.num_slots ? begin + work.tile_slots : work.num_slots;
  for (int64_t step = begin; step < end; step += kStepsAhead * kWarp) {
    int64_t slots[kStepsAhead];
    int experts[kStepsAhead];
#pragma unroll
    for (int u = 0; u < kStepsAhead; ++u) {
      const int64_t position = step + u * kWarp + lane_index();
      slots[u] = position < end ? work.slot_at(position) : -1;
      experts[u] = slots[u] >= 0 ? work.expert_of(slots[u]) : -1;
    }
#pragma unroll
    for (int u = 0; u < kStepsAhead; ++u) {
      const int32_t rank = take_rank(cursors, experts[u]);
      if (slots[u] < 0) continue;
      if (kWalk == Walk::kMarkDrops) work.marks[slots[u]] = experts[u] >= 0 && rank >= a.capacity;
      if (kWalk == Walk::kPlace) {
        a.slot_to_row[slots[u]] = experts[u] >= 0 ? rank : -1;
        if (experts[u] >= 0) a.row_to_slot[rank] = static_cast<int32_t>(slots[u]);
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
  const Cursors in_column{work.starts + tile * work.tile_stride, work.expert_stride};
  const Cursors cursors = in_shared ? Cursors{shared_cursors + threadIdx.x / kWarp * a.num_experts, 1} : in_column;
  for (int64_t e = lane_index(); e < a.num_experts; e += kWarp) {
    if (kWalk == Walk::kCount) cursors[e] = 0;
    if (kWalk == Walk::kMarkDrops && in_shared) cursors[e] = in_column[e];
    if (kWalk == Walk::kPlace) cursors[e] = in_column[e] + a.offsets[e];
  }
  __syncwarp();
  walk_tile<kWalk>(work, tile, cursors);
  if (kWalk == Walk::kCount && in_shared) {
    for (int64_t e = lane_index(); e < a.num_experts; e += kWarp) in_column[e] = cursors[e];
  }
}

// The second of two launches, with counts as [tiles, E]. A block adds up the counts of all tiles, of those before its
// own, and of its own; thread e then has expert e. `demand` as in lay_out_experts.
__global__ void __launch_bounds__(kPlaceThreads, 1) place_kernel(Work work, const int32_t* demand) {
  extern __shared__ int32_t shared[];
  __shared__ int32_t warp_rows[kPlaceWarps];
  const PlanArgs& a = work.a;
  const int num_experts = static_cast<int>(a.num_experts), thread = static_cast<int>(threadIdx.x);
  int32_t* const cursors = shared;                              // [warps, E]
  int32_t* const offsets = shared + kPlaceWarps * num_experts;  // [E + 1]
  int32_t* const kept = offsets + num_experts + 1;              // [E]
  int32_t* const before = kept + num_experts;                   // [E]
  if (thread < num_experts) kept[thread] = before[thread] = 0;
  __syncthreads();
  const int first_tile = static_cast<int>(blockIdx.x) * kPlaceWarps;
  const int num_sharers = kPlaceThreads / num_experts;  // threads that share an expert
  if (thread < num_sharers * num_experts) {
    const int expert = thread % num_experts;
    int32_t all = 0, earlier = 0;
#pragma unroll 8
    for (int tile = thread / num_experts; tile < work.num_tiles; tile += num_sharers) {
      const int32_t count = work.starts[tile * num_experts + expert];
      all += count;
      earlier += tile < first_tile ? count : 0;
    }
    atomicAdd(kept + expert, all);
    atomicAdd(before + expert, earlier);
  }
  __syncthreads();

  // First rows: a scan over the experts, rounded up to the alignment.
  const int64_t own_kept = thread < num_experts ? kept[thread] : 0;
  const int32_t own_rows = static_cast<int32_t>((own_kept + a.align - 1) / a.align * a.align);
  int32_t end = own_rows;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, end, distance);
    if (lane_index() >= distance) end += other;
  }
  const int warp = thread / kWarp;
  if (lane_index() == kWarp - 1) warp_rows[warp] = end;
  __syncthreads();
  for (int w = 0; w < warp; ++w) end += warp_rows[w];
  if (thread == 0) offsets[0] = 0;
  if (thread < num_experts) {
    offsets[thread + 1] = end;
    int32_t cursor = end - own_rows + before[thread];
    for (int w = 0; w < kPlaceWarps; ++w) {
      cursors[w * num_experts + thread] = cursor;
      if (first_tile + w < work.num_tiles) cursor += work.starts[(first_tile + w) * num_experts + thread];
    }
    if (blockIdx.x == 0) {
      if (thread == 0) a.offsets[0] = 0;
      a.offsets[thread + 1] = end;
      a.kept[thread] = kept[thread];
      a.dropped[thread] = demand != nullptr ? demand[thread] - kept[thread] : 0;
    }
  }
  __syncthreads();
  fill_padding(a, offsets, kept);
  if (first_tile + warp < work.num_tiles) {
    walk_tile<Walk::kPlace>(work, first_tile + warp, Cursors{cursors + warp * num_experts, 1});
  }
}

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
    const int64_t slot = sorted != nullptr ? sorted[i] : work.slot_at(i);
    const int expert = work.expert_of(slot);
    const uint64_t scope = a.scope_ids != nullptr ? static_cast<uint32_t>(a.scope_ids[slot / a.top_k]) : 0u;
    keys[i] = expert < 0 ? static_cast<uint64_t>(a.num_experts) * a.num_scopes
                         : static_cast<uint64_t>(expert) * a.num_scopes + scope;
    slots[i] = static_cast<int32_t>(slot);
  }
}

// ---- max_rows.

__global__ void __launch_bounds__(kThreads, 1) count_used_kernel(Work work) {
  for (int64_t tile = grid_warp(); tile < work.num_tiles; tile += grid_warps()) {
    const int64_t begin = tile * work.tile_slots;
    int32_t used = 0;
    for (int64_t first = begin; first < begin + work.tile_slots; first += kWarp) {
      const int64_t slot = first + lane_index();
      used += __popc(__ballot_sync(kAllLanes, slot < work.num_slots && work.expert_of(slot) >= 0));
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
    unsigned used = __ballot_sync(kAllLanes, slot < work.num_slots && work.expert_of(slot) >= 0);
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

bool takes_two_launches(const PlanArgs& a) { return a.num_experts <= kFewExperts; }

// Counts, then rows.
CudaStatus place(Work& work, const int32_t* demand, const CudaQueue& queue) {
  const PlanArgs& a = work.a;
  const bool is_short = takes_two_launches(a);
  if (is_short) {
    work.expert_stride = 1;
    work.tile_stride = a.num_experts;
  }
  CudaStatus status = walk<Walk::kCount>(work, queue);
  if (status.code != 0) return status;
  if (!is_short) {
    if (status = scan(work, work.totals, demand, true, queue); status.code != 0) return status;
    return walk<Walk::kPlace>(work, queue);
  }
  unsigned blocks = num_blocks(work.num_tiles, kPlaceWarps);
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
  int64_t tile_slots = kTileSlots;
  if (tile_slots < a.num_experts) tile_slots = a.num_experts;  // the counters of a tile are at most its slots
  const int64_t most_tiles = takes_two_launches(a) ? kFewTiles : kMaxTiles;
  if (tile_slots < ceil_div(work.num_slots, most_tiles)) tile_slots = ceil_div(work.num_slots, most_tiles);
  work.tile_slots = ceil_div(tile_slots, kWarp) * kWarp;
  work.num_tiles = ceil_div(work.num_slots, work.tile_slots);
  if (work.num_tiles == 0) work.num_tiles = 1;
  work.expert_stride = work.num_tiles;
  work.tile_stride = 1;
  work.starts = scratch_of<int32_t>(queue, a.num_experts * work.num_tiles);
  work.totals = scratch_of<int32_t>(queue, a.num_experts);
  work.ticket = scratch_of<int32_t>(queue, 1);

  const bool may_drop = a.capacity > 0 && work.num_slots > a.capacity;
  const bool may_overflow = a.max_slots < most_kept(a, work.num_slots);
  const int32_t* demand = may_drop || may_overflow ? a.dropped : nullptr;
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
