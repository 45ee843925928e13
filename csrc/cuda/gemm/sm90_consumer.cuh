// The consumers and the finishers of sm90_up.cuh.
#pragma once

#include <cutlass/arch/barrier.h>

#include "cuda/activation.cuh"
#include "cuda/gemm/sm90_tile.cuh"

namespace fastmoe_route {
namespace cuda {

// ---- Consumers.

template <class C>
struct Sm90Consumer {
  using Shared = typename C::Shared;
  using T = typename C::T;

  const Sm90Call& call;
  Shared& shared;
  int group;  // 0 or 1
  int warp = static_cast<int>(threadIdx.x) % C::kGroupThreads / kWarp, lane = lane_index();
  int own = group * C::kGroupWarps + warp;  // among the warps of both

  // For the warp: waiting for wgmma is one instruction of all its lanes.
  __device__ void release(int stage) const {
    if (lane == 0) shared.empty[stage].arrive();
  }

  // The weight of a row of the tile's: 0 for a row without a slot.
  __device__ float weight_of(const Sm90Tile& tile, int row) const {
    const ExpertRows& rows = call.p.rows;
    const int64_t slot = row < tile.num_rows ? rows.maps.slot_of(tile.first_row + row) : -1;
    return slot < 0 ? 0.0f : rows.weights[slot];
  }

  // Columns 2 i and 2 i + 1 of the tile's bias, as accumulators have them.
  __device__ float2 bias_at(const T* bias, int column) const {
    const ExpertRows& rows = call.p.rows;
    if (C::kBIsColumnMajor && rows.is_interleaved) {  // gates before ups
      const int at = column < C::kHalf ? 2 * column : 2 * (column - C::kHalf) + 1;
      return {widen(bias[at]), widen(bias[at + 2])};
    }
    return {widen(bias[column]), widen(bias[column + 1])};
  }

  // Accumulators to shared memory as pre-activations. Lane 4 g + q has columns 2 q and 2 q + 1 of every 8, of rows g
  // and g + 8.
  template <bool kIsPlain, class Accumulators>
  __device__ void stage(const Accumulators& sums, const float (&weights)[2], const T* bias) const {
    const int row = lane / 4, quad = lane % 4;
    const unsigned to = opaque(shared_address(C::pack_of(shared.staged[own], row, 0)) + 4 * quad);
#pragma unroll
    for (int i = 0; i < C::kColumns / 8; ++i) {
      float2 offset{0.0f, 0.0f};
      if (!kIsPlain && bias != nullptr) offset = bias_at(bias, i * 8 + quad * 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float low = sums(4 * i + 2 * half), high = sums(4 * i + 2 * half + 1);
        if (!kIsPlain) {
          low = fmaf(weights[half], low, offset.x);
          high = fmaf(weights[half], high, offset.y);
        }
        const uint32_t pair = narrow<T>(low).bits | uint32_t{narrow<T>(high).bits} << 16;
        store_shared((to ^ i * 16) + half * 8 * C::kColumns * 2, pair);  // pack i of the row, see pack_of
      }
    }
  }

  // The product of a tile's rows, each stage released when the next one's products are queued.
  template <class A, class B, class Accumulators>
  __device__ void multiply(const A& a, const B& b, typename C::Ring& ring, Accumulators& sums) const {
    typename C::Mma mma;
    mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    int before = ring.stage;
#pragma unroll 1
    for (int inner = 0; inner < call.p.rows.hidden; inner += C::kInner) {
      shared.full[ring.stage].wait(ring.phase);
      cutlass::arch::fence_view_async_shared();  // rows were written by threads, and are read by the tensor cores
      cute::warpgroup_fence_operand(sums);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < C::kInner / 16; ++k) {
        cute::gemm(mma, a(cute::_, cute::_, k, ring.stage), b(cute::_, cute::_, k, ring.stage), sums);
        mma.accumulate_ = cute::GMMA::ScaleOut::One;
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(sums);
      if (inner > 0) release(before);
      before = ring.stage;
      ring.step();
    }
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(sums);
    release(before);
  }

  __device__ void run() const {
    typename C::Mma mma;
    const auto part = mma.get_slice(group * C::kGroupThreads);
    const auto a = part.make_fragment_A(
        part.partition_A(cute::make_tensor(cute::make_smem_ptr(shared.a[0]), typename C::LayoutA{})));
    const auto b = part.make_fragment_B(
        part.partition_B(cute::make_tensor(cute::make_smem_ptr(shared.b[0]), typename C::LayoutB{})));
    typename C::Ring ring;
    unsigned staged_phase = 0;
    for (int count = 0;; count = count + 1 == C::kTiles ? 0 : count + 1) {
      shared.full[ring.stage].wait(ring.phase);  // then the tile is known, too
      const Sm90Tile& tile = shared.tiles[count];
      const int first_row = group * 64, warp_row = first_row + warp * C::kWarpRows;
      const int num_rows = __shfl_sync(kAllLanes, tile.num_rows, 0);
      if (num_rows == 0) break;
      auto sums = cute::partition_fragment_C(mma, cute::Shape<cute::Int<C::kRows>, cute::Int<C::kColumns>>{});
      static_assert(decltype(cute::size(sums))::value == C::kColumns / 2, "accumulators of a thread");
      float weights[2] = {1.0f, 1.0f};
      if (call.p.scales_input) {
        weights[0] = weight_of(tile, warp_row + lane / 4);
        weights[1] = weight_of(tile, warp_row + lane / 4 + 8);
      }
      multiply(a, b, ring, sums);
      if (warp_row < num_rows) {
        const T* const bias = call.p.bias != nullptr ? shared.bias[count] : nullptr;
        shared.staged_empty[own].wait(staged_phase ^ 1);
        if (lane == 0) shared.staged_loaded[own] = shared.loaded[count][warp_row / kWarp] >> warp_row % kWarp;
        if (call.p.scales_input || bias != nullptr) stage<false>(sums, weights, bias);
        else stage<true>(sums, weights, bias);
        shared.staged_full[own].arrive();
        staged_phase ^= 1;
      }
    }
  }
};

// ---- Finisher.

template <class C>
struct Sm90Finisher {
  using Shared = typename C::Shared;
  using T = typename C::T;
  static constexpr int N = 8;

  const Sm90Call& call;
  Shared& shared;
  int group;  // of consumers, which it serves
  int lane = lane_index();

  // Zeros in the place of rows without a slot, a bit each.
  __device__ void clear(T* staged, unsigned missing) const {
    for (; missing != 0; missing &= missing - 1) *C::pack_of(staged, __ffs(missing) - 1, lane) = Pack<T, N>{};
    __syncwarp();
  }

  // Activates (F) and stores the rows that a consumer's warp left, two of a lane at a time, so that its instructions
  // wait less for each other. A lane has the same N columns of every kStep-th row.
  template <class F>
  __device__ void finish(T* staged, const Sm90Tile& tile, int64_t first_row, int num_rows) const {
    constexpr int kBatch = 2, kStep = F::kGated ? 2 : 1, kRowPacks = kWarp / kStep;
    const ExpertRows& rows = call.p.rows;
    const bool is_paired = F::kGated && !C::kBIsColumnMajor && rows.is_interleaved;  // as they lie in memory
    const int index = lane % kRowPacks, first = lane / kRowPacks;
    const int64_t col = tile.first_col + index * N;
    if (col >= rows.intermediate) return;
    const int low = is_paired ? 2 * index : index, high = is_paired ? low + 1 : index + C::kHalf / N;
    T* const pre = static_cast<T*>(call.p.preactivation);
    T* to = static_cast<T*>(call.p.activated) + (first_row + first) * rows.intermediate + col;
#pragma unroll 1
    for (int row = first; row < num_rows; row += kBatch * kStep) {
      GateAndUp<T, N> in[kBatch];
      Pack<T, N> out[kBatch];  // zeros of zeros
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        in[i].gate = *C::pack_of(staged, row + i * kStep, low);
        if (F::kGated) in[i].up = *C::pack_of(staged, row + i * kStep, high);
        if (is_paired) in[i].split(in[i].gate, in[i].up);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          out[i].values[n] = narrow<T>(F::value(widen(in[i].gate.values[n]), widen(in[i].up.values[n])));
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i, to += kStep * rows.intermediate) {
        const int at = row + i * kStep;
        if (at >= num_rows) break;
        store_pack(to, out[i]);
        if (pre != nullptr) in[i].store(rows, pre + (first_row + at) * rows.up_size, col, store_pack<T, N>);
      }
    }
  }

  // Stores rows that are results already.
  __device__ void copy(T* staged, const Sm90Tile& tile, int64_t first_row, int num_rows) const {
    constexpr int kBatch = 8;
    const int64_t columns = call.p.rows.intermediate, col = tile.first_col + lane * N;
    if (col >= columns) return;
    T* to = static_cast<T*>(call.p.preactivation) + first_row * columns + col;
#pragma unroll
    for (int row = 0; row < C::kWarpRows; row += kBatch) {
      Pack<T, N> packs[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) packs[i] = *C::pack_of(staged, row + i, lane);
#pragma unroll
      for (int i = 0; i < kBatch; ++i, to += columns) {
        if (row + i < num_rows) store_pack(to, packs[i]);
      }
    }
  }

  // Rows past the last group, which are zeros in the pre-activations.
  __device__ void clear_rest() const {
    const ExpertRows& rows = call.p.rows;
    if (call.p.preactivation == nullptr) return;
    Pack<T, N>* const packs = static_cast<Pack<T, N>*>(call.p.preactivation);
    const int64_t row_packs = rows.up_size / N, end = rows.num_rows * row_packs;
    int64_t i = rows.groups.bounds[rows.groups.num_groups] * row_packs + int64_t{blockIdx.x} * 2 * kWarp;
    for (i += group * kWarp + lane; i < end; i += int64_t{gridDim.x} * 2 * kWarp) packs[i] = Pack<T, N>{};
  }

  __device__ void run() const {
    const ExpertRows& rows = call.p.rows;
    unsigned phases = 0;  // a bit a warp
    Sm90Tile tile = Sm90Tile::at(call, blockIdx.x, 0);
    while (tile.num_rows > 0) {
      const Sm90Tile next = tile.next(call);
#pragma unroll 1
      for (int warp = 0; warp < C::kGroupWarps; ++warp) {
        const int own = group * C::kGroupWarps + warp, first_row = own * C::kWarpRows;
        const int num_rows = min(tile.num_rows - first_row, C::kWarpRows);
        if (num_rows <= 0) break;
        shared.staged_full[own].wait(phases >> warp & 1);
        const int64_t at = tile.first_row + first_row;
        if (call.p.activated == nullptr) {
          copy(shared.staged[own], tile, at, num_rows);
        } else {
          const unsigned missing = ~shared.staged_loaded[own] & ((1u << num_rows) - 1);
          if (missing != 0) clear(shared.staged[own], missing);
          dispatch_activation(rows.activation,
                              [&](auto f) { finish<decltype(f)>(shared.staged[own], tile, at, num_rows); });
        }
        shared.staged_empty[own].arrive();
        phases ^= 1u << warp;
      }
      tile = next;
    }
    clear_rest();
  }
};

}  // namespace cuda
}  // namespace fastmoe_route
