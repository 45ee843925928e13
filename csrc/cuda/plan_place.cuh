// The last launch of plan_dispatch up to kFewExperts experts, and the only one for one tile: a block has a tile of
// slots, and adds up the counts of all tiles by itself.
#pragma once

#include "cuda/plan_work.cuh"

namespace fastmoe_route {
namespace cuda {

constexpr int kPlaceThreads = 512;
constexpr int kPlaceWarps = kPlaceThreads / kWarp;
constexpr int kPlaceSums = 16;  // counts of tiles that a thread loads together

// A tile goes by chunks: a warp has the next `steps` steps of slots in registers, ranks them from zero, and thread e
// adds up the warps' counters of expert e.
class Placer {
 public:
  __device__ Placer(const PlanWork& work, int32_t* shared)
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
    int32_t end = warp_prefix_sum(own_rows);
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

  const PlanWork& work_;
  const int num_experts_, steps_;
  int32_t *const counters_, *const offsets_, *const kept_, *const before_;  // [warps, E], [E + 1], [E], [E]
  int slots_[kSteps], experts_[kSteps];
  int32_t ranks_[kSteps];
};

}  // namespace cuda
}  // namespace fastmoe_route
