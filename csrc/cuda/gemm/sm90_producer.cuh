// The producers of sm90_up.cuh.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/gemm/sm90_tile.cuh"

namespace fastmoe_route {
namespace cuda {

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
    // The swizzle sends pack p of row r to p ^ r % 8.
    const unsigned to = shared_address(shared.a[stage]) + (warp * kWarpRows + row) * kRowBytes;
    const unsigned even = to + 16 * (pack ^ row), odd = to + 16 * (pack ^ row ^ kStepRows);
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

  // Stage of B, in boxes that land one behind the other. One thread.
  __device__ void copy_columns(const Sm90Tile& tile, int stage, int inner) const {
    const ExpertRows& rows = call.p.rows;
    constexpr int kBoxes = C::kColumns / C::kMapColumns;
    shared.full[stage].arrive_and_expect(sizeof shared.b[0]);
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
      cute::SM90_TMA_LOAD_4D::copy(&call.b, shared.full[stage].word(),
                                   static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                   shared.b[stage] + own * C::kInner, at[0], at[1], at[2], tile.group);
    }
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

}  // namespace cuda
}  // namespace fastmoe_route
