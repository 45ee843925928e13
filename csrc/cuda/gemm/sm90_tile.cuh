// The parts of sm90_up.cuh agree on these: the call, the walk over tiles, shared memory.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "cuda/gemm/barrier.cuh"
#include "cuda/gemm/tensor_map.h"
#include "cuda/gemm/up.h"

namespace fastmoe_route {
namespace cuda {

struct Sm90Call {
  CUtensorMap b;  // first: aligned to 64 bytes
  UpProduct p;    // with maps and `activated`, or with neither: then the rows of x are the rows, and not gated
  uint32_t x_stride_bytes;
  int64_t col_tiles;
  int tile_columns;  // activated, of a tile
};

// A tile of the walk, the same in all threads of the block.
struct Sm90Tile {
  int64_t index;
  int64_t first_row;  // of the buffer
  int group;
  int num_rows;   // 0 behind the last tile
  int first_col;  // activated

  // All lanes of a warp. `group` is at most that of the tile.
  __device__ static Sm90Tile at(const Sm90Call& call, int64_t index, int group) {
    const RowGroups& groups = call.p.rows.groups;
    Sm90Tile tile{index, 0, group, 0, 0};
    if (index >= groups.row_tiles[groups.num_groups] * call.col_tiles) return tile;
    tile.group = find_group(groups, call.col_tiles, group, index);
    const int before = groups.row_tiles[tile.group], row_tiles = groups.row_tiles[tile.group + 1] - before;
    const int own = static_cast<int>(index - before * call.col_tiles);
    tile.first_row = groups.bounds[tile.group] + int64_t{own % row_tiles} * kProductTileRows;
    tile.num_rows = min(static_cast<int>(groups.bounds[tile.group + 1] - tile.first_row), kProductTileRows);
    tile.first_col = own / row_tiles * call.tile_columns;
    return tile;
  }
  __device__ Sm90Tile next(const Sm90Call& call) const { return at(call, index + gridDim.x, group); }
};

// What follows of the element and the layout of B.
template <class Element_, bool kBIsColumnMajor_>
struct Sm90Up {
  using Element = Element_;
  using T = std::conditional_t<std::is_same<Element, cutlass::bfloat16_t>::value, BFloat16, Float16>;
  static constexpr bool kBIsColumnMajor = kBIsColumnMajor_;
  static constexpr int kInner = 64, kStages = 3;
  static constexpr int kRows = kProductTileRows, kColumns = 256, kHalf = kColumns / 2;
  static constexpr int kGroupThreads = 128, kGroupWarps = 4, kThreads = 3 * kGroupThreads;
  static constexpr int kProducerWarps = 2;
  // Of a thread. The block begins with 168 each, and what one warp group gives up another takes.
  static constexpr int kProducerRegisters = 104, kConsumerRegisters = 200;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "registers of the block");
  static constexpr int kConsumerWarps = 2 * kGroupWarps, kWarpRows = 16;
  static constexpr int kMapColumns = kBIsColumnMajor ? kHalf : 64;  // of B in one copy

  static constexpr auto kMajorB = kBIsColumnMajor ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  using TileShape = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kInner>>;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, TileShape, cute::GMMA::Major::K, kMajorB>(),
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  using RowAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  using ColumnAtom = std::conditional_t<kBIsColumnMajor, RowAtom, cute::GMMA::Layout_MN_SW128_Atom<Element>>;
  using LayoutA =
      decltype(cute::tile_to_shape(RowAtom{}, cute::Shape<cute::Int<kRows>, cute::Int<kInner>, cute::Int<kStages>>{}));
  using LayoutB = decltype(cute::tile_to_shape(
      ColumnAtom{}, cute::Shape<cute::Int<kColumns>, cute::Int<kInner>, cute::Int<kStages>>{},
      std::conditional_t<kBIsColumnMajor, cute::Step<cute::_1, cute::_2, cute::_3>,
                         cute::Step<cute::_2, cute::_1, cute::_3>>{}));

  // Tiles of which something is kept. Where the inner dimension is one stage: that whose rows are looked up, kStages on
  // the way or multiplied, one that becomes pre-activations.
  static constexpr int kTiles = kStages + 2;

  struct alignas(1024) Shared {
    Element a[kStages][kRows * kInner];
    Element b[kStages][kColumns * kInner];
    T staged[kConsumerWarps][kWarpRows * kColumns];  // pre-activations, see pack_of
    T bias[kTiles][kColumns];
    Sm90Tile tiles[kTiles];
    uint32_t loaded[kTiles][kRows / kWarp];  // rows that have a slot, a bit each
    uint32_t staged_loaded[kConsumerWarps];  // the same of the rows in `staged`
    Barrier full[kStages], empty[kStages];
    Barrier staged_full[kConsumerWarps], staged_empty[kConsumerWarps];
  };

  // A stage of the ring and how often it was passed.
  struct Ring {
    int stage = 0;
    unsigned phase = 0;
    __device__ void step() {
      if (++stage == kStages) {
        stage = 0;
        phase ^= 1;
      }
    }
  };

  // Pack `index` (0 to 31) of a row of 256 columns, as it lies in `staged`.
  __device__ static Pack<T, 8>* pack_of(T* staged, int row, int index) {
    return reinterpret_cast<Pack<T, 8>*>(staged + row * kColumns + (index ^ row % 8) * 8);
  }
};

// The same value, of which the compiler knows nothing: what is made of it is not kept in registers from tile to tile.
template <class Int>
__device__ inline Int opaque(Int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace cuda
}  // namespace fastmoe_route
