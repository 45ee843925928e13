// plan_dispatch on CUDA: a stable counting sort over tiles of slots.
//
// Up to kFewExperts experts a block has a tile, and there are so few tiles that adding up the counts of all of them in
// every block costs less than a launch:
//   count   slots of every tile per expert, in any order
//   place   every block adds up the counts, which gives the experts' first rows and where its own tile starts, ranks
//           the tile's slots and fills its part of the padding with -1
// A tile of one chunk has counted itself by the time that it is ranked: then there is no other, and no `count`.
// Beyond, a warp has a tile (plan_walk.cu).
// Ranks follow slots (plan_work.cuh), and no atomic orders anything.
//
// With a limit more launches go before, and mark the slots that are turned away (plan_limits.cu); `count` then passes
// them over. The host waits for nothing, and sizes follow from shapes and arguments.
//
// A single-pass algorithm (decoupled look-back) would save the second read of the ids, 4 bytes a slot, and need a
// window of shared memory of E counters per block; the ids stay in the second-level cache at these sizes.
// Ids out of range, and slots of a token whose scope is out of range, are none. Bytes: ids twice, both maps once,
// 4 E a tile and, by warps, as much again, or, by blocks, 4 E for every pair of tiles, from the second-level cache.
#include <algorithm>

#include "cuda/plan_limits.cuh"
#include "cuda/plan_place.cuh"
#include "cuda/plan_walk.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int64_t kFewExperts = 512;  // a thread each

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

// `demand` as in place_by_warps.
__global__ void __launch_bounds__(kPlaceThreads, 1)
    place_kernel(const __grid_constant__ PlanWork work, const int32_t* demand) {
  extern __shared__ int32_t shared[];
  Placer(work, shared).run(demand);
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

CudaStatus place_by_blocks(PlanWork work, const int32_t* demand, const CudaQueue& queue) {
  const PlanArgs& a = work.a;
  cut_for_blocks(work);
  if (work.num_tiles > 1) {
    work.starts = queue.scratch_of<int32_t>(work.num_tiles * a.num_experts);
    const size_t bytes = a.num_experts * sizeof(int32_t);
    count_kernel<<<num_blocks(work.num_tiles, 1), kPlaceThreads, bytes, queue.stream>>>(work);
    if (const CudaStatus status = launched(); status.code != 0) return status;
  }
  constexpr unsigned kMostFillBlocks = 64;
  const unsigned to_fill = std::min(num_blocks(a.num_rows, 8 * kPlaceThreads), kMostFillBlocks);  // padding, perhaps
  const unsigned blocks = std::max(num_blocks(work.num_tiles, 1), to_fill);
  const size_t bytes = ((kPlaceWarps + 3) * a.num_experts + 1) * sizeof(int32_t);
  place_kernel<<<blocks, kPlaceThreads, bytes, queue.stream>>>(work, demand);
  return launched();
}

}  // namespace

CudaStatus plan_dispatch(const PlanArgs& a, const CudaQueue& queue) {
  PlanWork work{};
  work.a = a;
  work.num_slots = a.num_tokens * a.top_k;
  work.is_even = a.top_k == 1 || a.experts_stride_token == a.top_k * a.experts_stride_slot;
  work.id_stride = a.top_k == 1 ? a.experts_stride_token : a.experts_stride_slot;
  const bool is_limited = has_limit(work), has_few_experts = a.num_experts <= kFewExperts;
  if (is_limited || !has_few_experts) cut_for_warps(work, queue);
  if (is_limited) {
    if (const CudaStatus status = turn_away(work, queue); status.code != 0) return status;
  }
  const int32_t* const demand = is_limited ? a.dropped : nullptr;
  return has_few_experts ? place_by_blocks(work, demand, queue) : place_by_warps(work, demand, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
