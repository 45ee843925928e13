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
// Ranks follow slots (plan_work.cuh), and no atomic orders anything.
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
#include <algorithm>

#include "cuda/plan_place.cuh"
#include "cuda/surplus.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int64_t kLeastTileSlots = 128, kTileSlots = 512;  // of a warp
constexpr int64_t kManyTiles = 256;                         // from here on tiles are not cut below kTileSlots
constexpr int64_t kMaxTiles = 4096;
constexpr int64_t kSharedExperts = 2048;  // up to here a warp's cursors lie in shared memory
constexpr int kScanThreads = 256;
constexpr int64_t kFewExperts = 512;  // two launches; a thread each

enum class Walk { kCount, kMarkDrops, kPlace };

// ---- A warp per tile: more than kFewExperts experts, and limits.

// One tile, in order. All lanes.
template <Walk kWalk>
__device__ inline void walk_tile(const PlanWork& work, int64_t tile, const Cursors& cursors) {
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
__global__ void __launch_bounds__(kThreads, 1) walk_kernel(PlanWork work) {
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
__global__ void __launch_bounds__(kPlaceThreads, 1) count_kernel(PlanWork work) {
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

// `demand` as in lay_out_experts.
__global__ void __launch_bounds__(kPlaceThreads, 1)
    place_kernel(const __grid_constant__ PlanWork work, const int32_t* demand) {
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
    scan_kernel(PlanWork work, int32_t* totals, const int32_t* demand, bool is_last) {
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

__global__ void __launch_bounds__(kThreads) fill_score_keys_kernel(PlanWork work, uint64_t* keys, int32_t* slots) {
  const int64_t num_threads = grid_warps() * kWarp;
  for (int64_t i = grid_warp() * kWarp + lane_index(); i < work.num_slots; i += num_threads) {
    keys[i] = falling_key(work.a.weights, work.a.weights_dtype, i);
    slots[i] = static_cast<int32_t>(i);
  }
}

// keys[i] = (expert, scope) of the i-th slot as one number, larger than all of them for none. The order is that of
// `sorted`, or by choice, then token.
__global__ void __launch_bounds__(kThreads)
    fill_group_keys_kernel(PlanWork work, const int32_t* sorted, uint64_t* keys, int32_t* slots) {
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

__global__ void __launch_bounds__(kThreads, 1) count_used_kernel(PlanWork work) {
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
__global__ void __launch_bounds__(kWarp) find_cut_kernel(PlanWork work, int32_t* first_cut) {
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
void cut_for_warps(PlanWork& work, const CudaQueue& queue) {
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
CudaStatus walk(const PlanWork& work, const CudaQueue& queue) {
  unsigned blocks = num_blocks(work.num_tiles, kWarpsPerBlock);
  if (kWalk == Walk::kPlace && work.a.align > 1) {  // there is padding to share
    const unsigned wanted = num_blocks(work.a.num_experts, kWarpsPerBlock);
    blocks = blocks > wanted ? blocks : wanted;
  }
  walk_kernel<kWalk><<<blocks, kThreads, cursor_bytes(work.a), queue.stream>>>(work);
  return launched();
}

CudaStatus scan(const PlanWork& work, int32_t* totals, const int32_t* demand, bool is_last, const CudaQueue& queue) {
  const unsigned blocks = num_blocks(work.a.num_experts, kScanThreads / kWarp);
  scan_kernel<<<blocks, kScanThreads, 0, queue.stream>>>(work, totals, demand, is_last);
  return launched();
}

// Slots of a block, [tiles, E] counts: as many blocks as pay for adding up those of all in each.
void cut_for_blocks(PlanWork& work) {
  constexpr int64_t kMostTiles = 128;         // a multiprocessor each, about
  constexpr int64_t kMostCounts = 32 * 1024;  // that every block adds up: 128 KiB
  const int64_t most_tiles = std::min(kMostCounts / work.a.num_experts, kMostTiles);
  int64_t tile_slots = work.num_slots;  // of one chunk
  if (tile_slots > kSteps * kPlaceThreads) tile_slots = ceil_div(work.num_slots, most_tiles);
  if (tile_slots < 1) tile_slots = 1;
  work.tile_slots = ceil_div(tile_slots, kPlaceThreads) * kPlaceThreads;
  work.num_tiles = work.num_slots > 0 ? ceil_div(work.num_slots, work.tile_slots) : 1;
}

// Counts, then rows.
CudaStatus place(PlanWork work, const int32_t* demand, const CudaQueue& queue) {
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
  constexpr unsigned kMostFillBlocks = 64;
  const unsigned to_fill = std::min(num_blocks(a.num_rows, 8 * kPlaceThreads), kMostFillBlocks);  // padding, perhaps
  const unsigned blocks = std::max(num_blocks(work.num_tiles, 1), to_fill);
  const size_t bytes = ((kPlaceWarps + 3) * a.num_experts + 1) * sizeof(int32_t);
  place_kernel<<<blocks, kPlaceThreads, bytes, queue.stream>>>(work, demand);
  return launched();
}

CudaStatus drop_by_sorting(PlanWork work, uint8_t* is_dropped, const CudaQueue& queue) {
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
  const KeyBits bits = bits_of(static_cast<uint64_t>(a.num_experts) * a.num_scopes);
  if (status = slots.sort(bits, queue); status.code != 0) return status;
  return slots.mark_surplus(a.capacity, is_dropped, queue);
}

// Most slots that capacity can leave: min(S, E * capacity * scopes), without overflow.
int64_t most_kept(const PlanArgs& a, int64_t num_slots) {
  const int64_t groups = a.num_experts * a.num_scopes;
  return a.capacity == 0 || a.capacity > num_slots / groups ? num_slots : groups * a.capacity;
}

// Counts the demand into a.dropped and marks what capacity turns away.
CudaStatus drop(PlanWork& work, const CudaQueue& queue) {
  const PlanArgs& a = work.a;
  PlanWork first = work;
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

CudaStatus cut_at_max_rows(PlanWork& work, const CudaQueue& queue) {
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
  PlanWork work{};
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
