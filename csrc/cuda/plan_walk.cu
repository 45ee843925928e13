// Three launches: a warp a tile counts its slots per expert, `scan` adds up the counts of the tiles, a warp an expert,
// and a warp a tile takes its slots' ranks (plan_work.cuh). The last block of the scan to finish lays out the experts.
#include "cuda/plan_walk.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int64_t kLeastTileSlots = 128, kTileSlots = 512;  // of a warp
constexpr int64_t kManyTiles = 256;                         // from here on tiles are not cut below kTileSlots
constexpr int64_t kMaxTiles = 4096;
constexpr int64_t kSharedExperts = 2048;  // up to here a warp's cursors lie in shared memory
constexpr int kScanThreads = 256;

enum class Walk { kCount, kMarkDrops, kPlace };

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
__global__ void __launch_bounds__(kWalkThreads, 1) walk_kernel(PlanWork work) {
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
  int64_t before = warp_prefix_sum(own);  // then exclusive over the block
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
      const int32_t sum = warp_prefix_sum(count);
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

// ---- Host.

size_t cursor_bytes(const PlanArgs& a) {
  return a.num_experts <= kSharedExperts ? kWalkWarps * a.num_experts * sizeof(int32_t) : 0;
}

template <Walk kWalk>
CudaStatus walk(const PlanWork& work, const CudaQueue& queue) {
  unsigned blocks = num_blocks(work.num_tiles, kWalkWarps);
  if (kWalk == Walk::kPlace && work.a.align > 1) {  // there is padding to share
    const unsigned wanted = num_blocks(work.a.num_experts, kWalkWarps);
    blocks = blocks > wanted ? blocks : wanted;
  }
  walk_kernel<kWalk><<<blocks, kWalkThreads, cursor_bytes(work.a), queue.stream>>>(work);
  return launched();
}

CudaStatus scan(const PlanWork& work, int32_t* totals, const int32_t* demand, bool is_last, const CudaQueue& queue) {
  const unsigned blocks = num_blocks(work.a.num_experts, kScanThreads / kWarp);
  scan_kernel<<<blocks, kScanThreads, 0, queue.stream>>>(work, totals, demand, is_last);
  return launched();
}

}  // namespace

void cut_for_warps(PlanWork& work, const CudaQueue& queue) {
  int64_t tile_slots = ceil_div(work.num_slots, kManyTiles);
  if (tile_slots < kLeastTileSlots) tile_slots = kLeastTileSlots;
  if (tile_slots > kTileSlots) tile_slots = kTileSlots;
  if (tile_slots < work.a.num_experts) tile_slots = work.a.num_experts;  // a tile has as many counters at most
  if (tile_slots < ceil_div(work.num_slots, kMaxTiles)) tile_slots = ceil_div(work.num_slots, kMaxTiles);
  work.tile_slots = ceil_div(tile_slots, kWarp) * kWarp;
  work.num_tiles = work.num_slots > 0 ? ceil_div(work.num_slots, work.tile_slots) : 1;
  work.starts = queue.scratch_of<int32_t>(work.a.num_experts * work.num_tiles);
  work.totals = queue.scratch_of<int32_t>(work.a.num_experts);
  work.ticket = queue.scratch_of<int32_t>(1);
}

CudaStatus count_demand(const PlanWork& work, const CudaQueue& queue) {
  if (const CudaStatus status = walk<Walk::kCount>(work, queue); status.code != 0) return status;
  return scan(work, work.a.dropped, nullptr, false, queue);
}

CudaStatus mark_late(const PlanWork& work, const CudaQueue& queue) { return walk<Walk::kMarkDrops>(work, queue); }

CudaStatus place_by_warps(const PlanWork& work, const int32_t* demand, const CudaQueue& queue) {
  CudaStatus status = walk<Walk::kCount>(work, queue);
  if (status.code != 0) return status;
  if (status = scan(work, work.totals, demand, true, queue); status.code != 0) return status;
  return walk<Walk::kPlace>(work, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
