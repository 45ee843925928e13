// UpProduct (up.h) around the collectives of sm80.cuh: the same main loop on redirected operands, another epilogue.
//
// Who owns what. A persistent grid over tiles of 128 rows of one expert by 128 (float32: 64) columns of its weights.
// Gate and up of one activated column must meet in one block, so a tile of a gated layer with separate halves takes 8
// columns of the gate, the same 8 of up, the next 8 of the gate, ...: 16 bytes at a time lie together in memory, and a
// tile gives half as many activated columns. Interleaved and ungated layers take their columns as they lie.
// Epilogue: 64 rows of accumulators at a time go through shared memory as float32; threads take packs of columns from
// there, scale, add the bias, round to the pre-activation, and activate what was rounded: a call that keeps the
// pre-activations has the bits of one that does not.
// Bytes: x once per tile of columns, weights once per tile of rows, R I written, and R U where a gradient is needed.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/gemm/redirect.cuh"
#include "cuda/gemm/sm80.cuh"
#include "cuda/gemm/up.h"

namespace fastmoe_route {
namespace cuda {

constexpr int kPairedColumns = 8;  // of the gate, then of up
constexpr int kStagedRows = 64;

// Half as many columns and threads for float32, which would spill what redirected operands take more.
template <class Element, int kAccess>
struct UpTraits : ProductTraits<Element, kAccess> {};
template <>
struct UpTraits<float, 1> : Float32Traits {
  using Block = cutlass::gemm::GemmShape<128, 64, 8>;
};

// T is the storage type of dtype.h that has the bits of C's elements.
template <class T, class C>
struct UpCall {
  typename C::ParamsA a;
  typename C::ParamsB b;
  UpProduct p;
  int32_t a_line_bytes;
  int32_t b_line_bytes;
  int tile_columns;  // activated columns of a tile
  int64_t col_tiles;
  bool stores_packs;  // 16 bytes at once
};

template <class Element, class LayoutB, int kAccess>
struct UpCollective {
  using Plain = Collective<Element, cutlass::layout::RowMajor, LayoutB, kAccess, UpTraits<Element, kAccess>>;
  using Mma = typename RedirectedMma<typename Plain::Mma>::Type;
  using IteratorA = typename Mma::IteratorA;
  using IteratorB = typename Mma::IteratorB;
  using ParamsA = typename IteratorA::Params;
  using ParamsB = typename IteratorB::Params;
  using Layout = LayoutB;
  static constexpr int kThreads = Plain::kThreads;
  static constexpr int kTileRows = Plain::kTileRows;
  static constexpr int kTileCols = Plain::kTileCols;
  static constexpr bool kStoresPacks = kAccess > 1;    // whatever the call: it is for multiples of 16 bytes
  static constexpr int kStagedStride = kTileCols + 8;  // floats
  using WarpShape = typename Mma::Operator::Shape;
  static_assert(kTileRows % kStagedRows == 0 && kStagedRows % WarpShape::kM == 0, "epilogue");

  union Shared {
    typename Mma::SharedStorage main_loop;
    float staged[kStagedRows * kStagedStride];
  };

  // The warps that own rows [pass * kStagedRows, ...) of the tile write them to shared memory.
  __device__ static void stage(Shared& shared, int pass, const typename Mma::FragmentC& accumulators) {
    constexpr int kWarpRows = kTileRows / WarpShape::kM, kPassWarps = kStagedRows / WarpShape::kM;
    const int warp = cutlass::canonical_warp_idx_sync();
    const int warp_row = warp % kWarpRows, warp_col = warp / kWarpRows;
    if (warp_row / kPassWarps != pass) return;
    typename Mma::Operator::IteratorC to({shared.staged, kStagedStride}, lane_index());
    to.add_tile_offset({warp_row % kPassWarps, warp_col});
    to.store(accumulators);
  }
};

// One tile in flight.
template <class T, class C>
struct UpTile {
  const UpCall<T, C>& call;
  int group;
  int64_t first_row;  // of the buffer
  int num_rows;       // of the group from there on
  int first_col;      // activated

  // From column `line` of the weights to what column `line` of the tile is. Columns past the last take the first's.
  __device__ int column_distance(int line) const {
    const ExpertRows& rows = call.p.rows;
    const int last = static_cast<int>(rows.intermediate) - first_col;
    if (!rows.is_gated) return line < last ? first_col : first_col - line;
    if (rows.is_interleaved) return 2 * first_col - (line / 2 < last ? 0 : line);
    const int col = line / (2 * kPairedColumns) * kPairedColumns + line % kPairedColumns;
    const bool is_up = line / kPairedColumns % 2 != 0;
    return first_col - line + (col < last ? col + (is_up ? static_cast<int>(rows.intermediate) : 0) : 0);
  }

  // The same from row `line` of x. Rows past the last, and those without a slot, take the first token's.
  __device__ int token_distance(int line) const {
    const int64_t slot = line < num_rows ? call.p.rows.maps.slot_of(first_row + line) : -1;
    return (slot < 0 ? 0 : static_cast<int>(slot / call.p.top_k)) - line;
  }

  __device__ void multiply(typename C::Shared& shared, typename C::Mma::FragmentC& accumulators) const {
    using Element = typename C::IteratorA::Element;
    const UpProduct& p = call.p;
    const int thread = static_cast<int>(threadIdx.x), inner = static_cast<int>(p.rows.hidden);
    const Element* const x = static_cast<const Element*>(p.x);
    const Element* const w = static_cast<const Element*>(p.b) + group * p.b_group_stride;
    constexpr bool kIsRowMajor = std::is_same<typename C::Layout, cutlass::layout::RowMajor>::value;
    const int32_t column_bytes = kIsRowMajor ? static_cast<int32_t>(sizeof(Element)) : call.b_line_bytes;
    typename C::IteratorA from_a(call.a, const_cast<Element*>(x), {C::kTileRows, inner}, thread, call.a_line_bytes,
                                 [this](int line) { return token_distance(line); });
    typename C::IteratorB from_b(call.b, const_cast<Element*>(w), {inner, C::kTileCols}, thread, column_bytes,
                                 [this](int line) { return column_distance(line); });
    typename C::Mma mma(shared.main_loop, thread, cutlass::canonical_warp_idx_sync(), lane_index());
    mma((inner + C::Mma::Shape::kK - 1) / C::Mma::Shape::kK, accumulators, from_a, from_b, accumulators);
  }

  // N activated columns from `col` of the tile on, of a row in shared memory.
  template <int N>
  __device__ void finish(const float* staged, int64_t row, int col) const {
    const UpProduct& p = call.p;
    const ExpertRows& rows = p.rows;
    const int64_t slot = rows.maps.slot_of(row);
    const int64_t to_col = first_col + col;
    GateAndUp<T, N> pre{};
    Pack<T, N> result{};
    if (slot >= 0) {
      const float weight = p.scales_input ? rows.weights[slot] : 1.0f;
      const T* const bias = static_cast<const T*>(p.bias) + group * rows.up_size;
      const auto value = [&](int at, int64_t source) {
        return narrow<T>(fmaf(weight, staged[at], p.bias != nullptr ? widen(bias[source]) : 0.0f));
      };
      const int paired = col / kPairedColumns * 2 * kPairedColumns + col % kPairedColumns;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (!rows.is_gated) {
          pre.gate.values[n] = value(col + n, to_col + n);
        } else if (rows.is_interleaved) {
          pre.gate.values[n] = value(2 * (col + n), 2 * (to_col + n));
          pre.up.values[n] = value(2 * (col + n) + 1, 2 * (to_col + n) + 1);
        } else {
          pre.gate.values[n] = value(paired + n, to_col + n);
          pre.up.values[n] = value(paired + kPairedColumns + n, rows.intermediate + to_col + n);
        }
      }
      dispatch_activation(rows.activation, [&](auto f) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          result.values[n] = narrow<T>(decltype(f)::value(widen(pre.gate.values[n]), widen(pre.up.values[n])));
        }
      });
    }
    if (p.preactivation != nullptr) pre.store(rows, static_cast<T*>(p.preactivation) + row * rows.up_size, to_col);
    store_pack(static_cast<T*>(p.activated) + row * rows.intermediate + to_col, result);
  }

  // The rows of shared memory that the tile has. All threads of the block.
  template <int N>
  __device__ void finish_rows(const float* staged, int pass) const {
    const int left = num_rows - pass * kStagedRows;
    const int columns = min(call.tile_columns, static_cast<int>(call.p.rows.intermediate) - first_col);
    const int row_packs = columns / N, num_packs = min(left, kStagedRows) * row_packs;
#pragma unroll 1
    for (int item = static_cast<int>(threadIdx.x); item < num_packs; item += C::kThreads) {
      const int row = item / row_packs;
      finish<N>(staged + row * C::kStagedStride, first_row + pass * kStagedRows + row, item % row_packs * N);
    }
  }

  __device__ void run(typename C::Shared& shared) const {
    typename C::Mma::FragmentC accumulators;
    accumulators.clear();
    __syncthreads();  // the tile before is read out of the memory they share
    multiply(shared, accumulators);
    constexpr int kPack = 16 / static_cast<int>(sizeof(T));
#pragma unroll 1
    for (int pass = 0; pass * kStagedRows < C::kTileRows; ++pass) {
      __syncthreads();  // the main loop, or the pass before, is read
      C::stage(shared, pass, accumulators);
      __syncthreads();
      if (C::kStoresPacks || call.stores_packs) finish_rows<kPack>(shared.staged, pass);
      else finish_rows<1>(shared.staged, pass);
    }
  }
};

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, blocks_by_registers<typename C::Plain>())
    up_product_kernel(const __grid_constant__ UpCall<T, C> call) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  const RowGroups& groups = call.p.rows.groups;
  for_each_tile(groups, call.col_tiles, [&](int group, int row_tile, int col_tile) {
    const int64_t first_row = groups.bounds[group] + int64_t{row_tile} * C::kTileRows;
    UpTile<T, C>{call, group, first_row, static_cast<int>(groups.bounds[group + 1] - first_row),
                 col_tile * call.tile_columns}
        .run(shared);
  });
  if (call.p.preactivation == nullptr) return;
  // Rows of no group.
  T* const pre = static_cast<T*>(call.p.preactivation);
  const int64_t end = call.p.rows.num_rows * call.p.rows.up_size, num_threads = int64_t{gridDim.x} * blockDim.x;
  int64_t i = groups.bounds[groups.num_groups] * call.p.rows.up_size + int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i < end; i += num_threads) pre[i] = narrow<T>(0.0f);
}

template <class T, class Element, class LayoutB, int kAccess>
CudaStatus up_product_with(const UpProduct& p, const CudaQueue& queue) {
  using C = UpCollective<Element, LayoutB, kAccess>;
  const int tile_columns = p.rows.is_gated ? C::kTileCols / 2 : C::kTileCols;
  const int64_t col_tiles = ceil_div(p.rows.intermediate, tile_columns);
  const bool stores_packs = are_multiples(kWideBytes, {p.activated, p.preactivation}, {p.rows.intermediate}, sizeof(T));
  const UpCall<T, C> call{typename C::ParamsA(cutlass::layout::RowMajor(p.x_stride)),
                          typename C::ParamsB(LayoutB(p.b_stride)),
                          p,
                          static_cast<int32_t>(p.x_stride * sizeof(T)),
                          static_cast<int32_t>(p.b_stride * sizeof(T)),
                          tile_columns,
                          col_tiles,
                          stores_packs};
  const int64_t most_tiles = (p.rows.num_rows / C::kTileRows + p.rows.groups.num_groups) * col_tiles;
  return launch_persistent<C>(up_product_kernel<T, C>, call, most_tiles, queue);
}

template <class T, class Element, int kAccess>
CudaStatus up_product_as(const UpProduct& p, const CudaQueue& queue) {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  return p.b_is_column_major ? up_product_with<T, Element, Column, kAccess>(p, queue)
                             : up_product_with<T, Element, Row, kAccess>(p, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
