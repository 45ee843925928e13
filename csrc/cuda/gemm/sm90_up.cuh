// UpProduct (up.h) in the instructions of sm_90a, and with it RowsProduct with a bias: rows are taken by index on their
// way to shared memory, products are those of warp groups (wgmma), and activations are another group's work.
//
// Who owns what. A persistent grid of one block a multiprocessor walks over tiles of 128 rows of one expert by 256
// columns of its weights, those of a gated layer in halves: 128 of the gate and the same 128 of up. Three warp groups:
//   producers  two warps copy rows of A, 16 bytes at a time, to where the swizzle of wgmma wants them; one thread has the
//              copy engine (TMA) bring the columns of B from a map of all weights. Both complete the same barrier of a
//              ring of stages.
//   finishers  two warps activate and store, while the consumers are at the next tile: each serves one of these.
//   consumers  two groups of 64 rows: wgmma of both operands from shared memory, 128 accumulators a thread; then weight,
//              bias and rounding, and what is the pre-activation goes to shared memory.
// A row without a slot is not loaded: what its place in shared memory holds reaches that row of accumulators alone, and
// zeros are stored for it. A consumer without rows multiplies nothing.
//
// The inner dimension is taken in order, 16 at a time, into accumulators that begin at zero: the bits of CUTLASS's
// kernels on the same rows.
// Bytes: x once per tile of columns, weights once per tile of rows, R I written, and R U where a gradient is needed.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "cuda/activation.cuh"
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

// What of the element, the layout of B and the depth follows.
template <class Element_, bool kBIsColumnMajor_, int kInner_, int kStages_>
struct Sm90Up {
  using Element = Element_;
  using T = std::conditional_t<std::is_same<Element, cutlass::bfloat16_t>::value, BFloat16, Float16>;
  static constexpr bool kBIsColumnMajor = kBIsColumnMajor_;
  static constexpr int kInner = kInner_, kStages = kStages_;
  static constexpr int kRows = kProductTileRows, kColumns = 256, kHalf = kColumns / 2;
  static constexpr int kGroupThreads = 128, kGroupWarps = 4, kThreads = 3 * kGroupThreads;
  static constexpr int kProducerWarps = 2, kFinisherWarps = 2;
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
  using InnerAtom = std::conditional_t<kInner == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                       cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using LayoutA = decltype(cute::tile_to_shape(InnerAtom{},
                                               cute::Shape<cute::Int<kRows>, cute::Int<kInner>, cute::Int<kStages>>{}));
  using LayoutB = decltype(cute::tile_to_shape(
      std::conditional_t<kBIsColumnMajor, InnerAtom, cute::GMMA::Layout_MN_SW128_Atom<Element>>{},
      cute::Shape<cute::Int<kColumns>, cute::Int<kInner>, cute::Int<kStages>>{},
      std::conditional_t<kBIsColumnMajor, cute::Step<cute::_1, cute::_2, cute::_3>,
                         cute::Step<cute::_2, cute::_1, cute::_3>>{}));

  // Tiles of which something is kept: the producers are at most kStages ahead of the consumers, who are at most one
  // ahead of the finishers.
  static constexpr int kTiles = kStages + 2;

  struct alignas(1024) Shared {
    Element a[kStages][kRows * kInner];
    Element b[kStages][kColumns * kInner];
    T staged[kConsumerWarps][kWarpRows * kColumns];  // pre-activations, see pack_of
    T bias[kTiles][kColumns];
    Sm90Tile tiles[kTiles];
    uint32_t loaded[kTiles][kRows / kWarp];  // rows that have a slot, a bit each
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

// ---- Producer.

// The token of a row, by loads that do not wait for each other until the last: slot, then its row, then which it is.
struct RowLookup {
  int32_t slot = -1;
  int32_t back = -1;

  __device__ void load_slot(const Maps& maps, const Sm90Tile& tile, int row) {
    if (row < tile.num_rows && maps.row_to_slot != nullptr) slot = maps.row_to_slot[tile.first_row + row];
  }
  __device__ void load_back(const Maps& maps) {
    if (slot >= 0 && slot < maps.num_slots) back = maps.slot_to_row[slot];
  }
  // Or -1 for a row that is not loaded.
  __device__ int token(const UpProduct& p, const Sm90Tile& tile, int row) const {
    const int64_t at = tile.first_row + row;
    if (row >= tile.num_rows) return -1;
    if (p.rows.maps.row_to_slot == nullptr) return static_cast<int>(at);
    return back == at ? slot / static_cast<int>(p.top_k) : -1;
  }
};

template <class C>
struct Sm90Producer {
  using Shared = typename C::Shared;
  using T = typename C::T;
  static constexpr int kRowPacks = C::kInner / 8;      // 16 bytes each, of a row of a stage
  static constexpr int kStepRows = kWarp / kRowPacks;  // that a warp copies at once
  static constexpr int kWarpRows = C::kRows / C::kProducerWarps;
  static constexpr int kLookups = kWarpRows / kWarp;  // rows of a lane
  static constexpr int kSteps = kWarpRows / kStepRows;
  static constexpr int kRowBytes = C::kInner * 2;
  static constexpr unsigned kAllSteps = (1u << kSteps) - 1;

  const Sm90Call& call;
  Shared& shared;
  int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_index();

  // Sources of the lane's packs of its warp's rows, and which of them are loaded.
  struct Rows {
    const char* from[kSteps];
    unsigned loaded = 0;
  };

  __device__ int row_of(int i) const { return warp * kWarpRows + i * kWarp + lane; }

  // Also says which rows of the tile have a slot.
  __device__ Rows rows_of(const Sm90Tile& tile, const RowLookup (&lookups)[kLookups], uint32_t* loaded) const {
    Rows rows;
    int tokens[kLookups];
#pragma unroll
    for (int i = 0; i < kLookups; ++i) {
      tokens[i] = lookups[i].token(call.p, tile, row_of(i));
      const unsigned has_slot = __ballot_sync(kAllLanes, tokens[i] >= 0);
      if (lane == 0) loaded[warp * kLookups + i] = has_slot;
    }
    const int first = opaque(lane / kRowPacks);
    const char* const x = static_cast<const char*>(call.p.x) + lane % kRowPacks * 16;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = i * kStepRows % kWarp + first;
      const int token = __shfl_sync(kAllLanes, tokens[i * kStepRows / kWarp], row);
      rows.loaded |= token >= 0 ? 1u << i : 0u;
      rows.from[i] = x + uint64_t{static_cast<uint32_t>(max(token, 0))} * call.x_stride_bytes;
    }
    return rows;
  }

  // Stage of A: where the inner dimension ends, zeros. Moves the sources on.
  __device__ void copy_rows(Rows& rows, int stage, int inner) const {
    const int row = lane / kRowPacks, pack = lane % kRowPacks;
    // A swizzle of 128 bytes sends pack p of row r to p ^ r % 8, one of 64 bytes to p ^ r / 2 % 4.
    const unsigned to = shared_address(shared.a[stage]) + (warp * kWarpRows + row) * kRowBytes;
    const unsigned even = to + 16 * (kRowPacks == 8 ? pack ^ row : pack ^ row / 2);
    const unsigned odd = kRowPacks == 8 ? to + 16 * (pack ^ row ^ kStepRows) : even;
    const int hidden = static_cast<int>(call.p.rows.hidden);
    if (rows.loaded == kAllSteps && inner + C::kInner <= hidden) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) copy_async_16((i % 2 ? odd : even) + i * kStepRows * kRowBytes, rows.from[i]);
    } else {
      const int bytes = inner + pack * 8 < hidden ? 16 : 0;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (rows.loaded >> i & 1) copy_async_16((i % 2 ? odd : even) + i * kStepRows * kRowBytes, rows.from[i], bytes);
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) rows.from[i] += kRowBytes;
  }

  // Calls visit(its columns in the tile, coordinates) for the boxes of B, which land one behind the other.
  template <class Visit>
  __device__ void for_boxes(const Sm90Tile& tile, int inner, const Visit& visit) const {
    const ExpertRows& rows = call.p.rows;
    constexpr int kBoxes = C::kColumns / C::kMapColumns;
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const int half = i * 2 / kBoxes, own = i * C::kMapColumns;  // of the gate and of up
      int at[3] = {};
      if (C::kBIsColumnMajor) {
        at[0] = inner;
        at[1] = rows.is_interleaved ? half : tile.first_col + (rows.is_gated ? 0 : own);
        at[2] = rows.is_interleaved ? tile.first_col : rows.is_gated ? half : 0;
      } else {
        const bool is_split = rows.is_gated && !rows.is_interleaved;
        at[0] = (rows.is_interleaved ? 2 : 1) * tile.first_col + own - (is_split ? half * C::kHalf : 0);
        at[1] = is_split ? half : 0;
        at[2] = inner;
      }
      visit(own, at);
    }
  }

  // Stage of B. One thread.
  __device__ void copy_columns(const Sm90Tile& tile, int stage, int inner) const {
    shared.full[stage].arrive_and_expect(sizeof shared.b[0]);
    for_boxes(tile, inner, [&](int own, const int (&at)[3]) {
      cute::SM90_TMA_LOAD_4D::copy(&call.b, shared.full[stage].word(),
                                   static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                   shared.b[stage] + own * C::kInner, at[0], at[1], at[2], tile.group);
    });
  }
  // The tile's bias in the order of memory, a pack a lane.
  __device__ void copy_bias(const Sm90Tile& tile, T* to) const {
    const ExpertRows& rows = call.p.rows;
    int64_t col = (rows.is_interleaved ? 2 : 1) * int64_t{tile.first_col} + lane * 8;
    int64_t end = rows.up_size;
    if (rows.is_gated && !rows.is_interleaved) {
      if (lane >= kWarp / 2) col += rows.intermediate - C::kHalf;
      else end = rows.intermediate;
    }
    const bool is_inside = col < end;
    const T* const bias = static_cast<const T*>(call.p.bias) + tile.group * rows.up_size;
    copy_async_16(shared_address(to + lane * 8), bias + (is_inside ? col : 0), is_inside ? 16 : 0);
  }

  // A stage without a tile, which tells the consumers that there is none.
  __device__ void finish(const typename C::Ring& ring, int count) const {
    shared.empty[ring.stage].wait(ring.phase ^ 1);
    if (lane == 0) {
      if (warp == 0) shared.tiles[count].num_rows = 0;
      shared.full[ring.stage].arrive();
    }
    shared.full[ring.stage].arrive_after_copies();
  }

  __device__ void run() const {
    const Maps& maps = call.p.rows.maps;
    typename C::Ring ring;
    int count = 0;
    Sm90Tile tile = Sm90Tile::at(call, blockIdx.x, 0);
    RowLookup lookups[kLookups];
    for (int i = 0; i < kLookups; ++i) lookups[i].load_slot(maps, tile, row_of(i));
    for (int i = 0; i < kLookups; ++i) lookups[i].load_back(maps);
    while (tile.num_rows > 0) {
      Rows rows = rows_of(tile, lookups, shared.loaded[count]);
      if (threadIdx.x == 0) shared.tiles[count] = tile;
      Sm90Tile next{};
      const auto look_ahead = [&](int step) {  // by steps of the tile before, so that no load is waited for
        if (step == 0) next = tile.next(call);
#pragma unroll
        for (int i = 0; i < kLookups; ++i) {
          if (step == 0) lookups[i] = {};
          if (step == 0) lookups[i].load_slot(maps, next, row_of(i));
          else lookups[i].load_back(maps);
        }
      };
#pragma unroll 1
      for (int inner = 0; inner < call.p.rows.hidden; inner += C::kInner) {
        shared.empty[ring.stage].wait(ring.phase ^ 1);
        if (lane == 0) {  // arrives, so that what it wrote of the tile is seen
          if (warp == 0) copy_columns(tile, ring.stage, inner);
          else shared.full[ring.stage].arrive();
        }
        copy_rows(rows, ring.stage, inner);
        if (inner == 0 && warp == 1 && call.p.bias != nullptr) copy_bias(tile, shared.bias[count]);
        shared.full[ring.stage].arrive_after_copies();
        ring.step();
        if (inner <= C::kInner) look_ahead(inner / C::kInner);
      }
      if (call.p.rows.hidden <= C::kInner) look_ahead(1);
      tile = next;
      if (++count == C::kTiles) count = 0;
    }
    finish(ring, count);
  }
};

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
        if (call.p.scales_input || bias != nullptr) stage<false>(sums, weights, bias);
        else stage<true>(sums, weights, bias);
        __syncwarp();
        if (lane == 0) shared.staged_full[own].arrive();
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
        if (is_paired) in[i].split();
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
        if (pre != nullptr) in[i].store(rows, pre + (first_row + at) * rows.up_size, col);
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
    for (int count = 0; tile.num_rows > 0; count = count + 1 == C::kTiles ? 0 : count + 1) {
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
          const unsigned has_slot = shared.loaded[count][first_row / kWarp] >> first_row % kWarp;
          if (const unsigned missing = ~has_slot & ((1u << num_rows) - 1)) clear(shared.staged[own], missing);
          dispatch_activation(rows.activation,
                              [&](auto f) { finish<decltype(f)>(shared.staged[own], tile, at, num_rows); });
        }
        __syncwarp();
        if (lane == 0) shared.staged_empty[own].arrive();
        phases ^= 1u << warp;
      }
      tile = next;
    }
    clear_rest();
  }
};

// ---- The kernel and its launch.

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) sm90_up_kernel(const __grid_constant__ Sm90Call call) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      shared.full[i].init(C::kProducerWarps * (kWarp + 1));
      shared.empty[i].init(C::kConsumerWarps);
    }
    for (int i = 0; i < C::kConsumerWarps; ++i) {
      shared.staged_full[i].init(1);
      shared.staged_empty[i].init(1);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int group = cutlass::canonical_warp_group_idx(), warp = cutlass::canonical_warp_idx_sync();
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    if (warp < C::kProducerWarps) Sm90Producer<C>{call, shared}.run();
    else Sm90Finisher<C>{call, shared, warp - C::kProducerWarps}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    Sm90Consumer<C>{call, shared, group - 1}.run();
  }
}

// The map of B whose boxes copy_columns asks for.
template <class C>
TensorBoxes sm90_boxes(const UpProduct& p) {
  const ExpertRows& rows = p.rows;
  constexpr int64_t kSize = sizeof(typename C::T);
  TensorBoxes boxes{p.dtype, p.b, {}, {}, {1, 1, 1, 1}};
  boxes.sizes[3] = static_cast<cuuint64_t>(rows.groups.num_groups);
  boxes.strides[2] = static_cast<cuuint64_t>(p.b_group_stride * kSize);
  const int64_t columns = rows.intermediate, halves = rows.is_gated ? 2 : 1;
  if (C::kBIsColumnMajor) {
    const int64_t line = p.b_stride * kSize;
    const int64_t sizes[3] = {rows.hidden, rows.is_interleaved ? halves : columns,
                              rows.is_interleaved ? columns : halves};
    for (int i = 0; i < 3; ++i) boxes.sizes[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes.strides[0] = static_cast<cuuint64_t>(line);
    boxes.strides[1] = static_cast<cuuint64_t>(line * sizes[1]);
    boxes.box[0] = C::kInner;
    boxes.box[rows.is_interleaved ? 2 : 1] = C::kMapColumns;
    return boxes;
  }
  const bool is_split = rows.is_gated && !rows.is_interleaved;
  const int64_t sizes[3] = {is_split ? columns : rows.up_size, is_split ? 2 : 1, rows.hidden};
  for (int i = 0; i < 3; ++i) boxes.sizes[i] = static_cast<cuuint64_t>(sizes[i]);
  boxes.strides[0] = static_cast<cuuint64_t>(sizes[0] * kSize);
  boxes.strides[1] = static_cast<cuuint64_t>(p.b_stride * kSize);
  boxes.box[0] = C::kMapColumns;
  boxes.box[2] = C::kInner;
  return boxes;
}

template <class C>
CudaStatus sm90_up_with(const UpProduct& p, const CudaQueue& queue, bool* is_done) {
  Sm90Call call{{}, p, static_cast<uint32_t>(p.x_stride * 2), 0, p.rows.is_gated ? C::kHalf : C::kColumns};
  call.col_tiles = ceil_div(p.rows.intermediate, call.tile_columns);
  CudaStatus status = map_tensor(sm90_boxes<C>(p), &call.b, is_done);
  if (status.code != 0 || !*is_done) return status;
  int device = 0, multiprocessors = 0;
  if (status = status_of(cudaGetDevice(&device)); status.code != 0) return status;
  status = status_of(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (status.code != 0) return status;
  const int64_t most_tiles = (p.rows.num_rows / C::kRows + p.rows.groups.num_groups) * call.col_tiles;
  constexpr int kBytes = static_cast<int>(sizeof(typename C::Shared));
  static_assert(kBytes <= 227 * 1024, "shared memory of a multiprocessor");
  status = status_of(cudaFuncSetAttribute(reinterpret_cast<const void*>(sm90_up_kernel<C>),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  if (status.code != 0) return status;
  const unsigned blocks = static_cast<unsigned>(most_tiles < multiprocessors ? most_tiles : multiprocessors);
  sm90_up_kernel<C><<<blocks, C::kThreads, kBytes, queue.stream>>>(call);
  return launched();
}

}  // namespace cuda
}  // namespace fastmoe_route
