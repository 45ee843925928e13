// Groups of rows, one per expert, and the walk of a persistent grid over their tiles.
//
// Offsets are device data that no host has read, so every kernel of a grouped product takes bounds made of them here:
// clamped to [0, R], from 0, never falling. So no expert reaches past the buffer and every row has at most one owner,
// whatever the offsets hold.
#pragma once

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

struct RowGroups {
  const int32_t* bounds;     // [E + 1]: rows bounds[e] : bounds[e + 1] belong to expert e
  const int32_t* row_tiles;  // [E + 1]: tiles of rows of all experts before e
  int num_groups;
};

// Makes bounds and row_tiles for tiles of `tile_rows` rows, in one launch.
CudaStatus group_rows(const int32_t* offsets, int64_t num_groups, int64_t num_rows, int tile_rows,
                      const CudaQueue& queue, RowGroups* groups);

// The group that holds `tile` where group g has tiles [row_tiles[g], row_tiles[g + 1]) * width; `group` is at most that
// group, and tile is below the number of tiles. All lanes of a warp, which look at 32 groups a step.
__device__ inline int find_group(const RowGroups& groups, int64_t width, int group, int64_t tile) {
  for (;; group += kWarp) {
    const int own = group + lane_index();
    const bool is_past = own < groups.num_groups && tile >= groups.row_tiles[own + 1] * width;
    const unsigned past = __ballot_sync(kAllLanes, is_past);
    if (past != kAllLanes) return group + __popc(past);
  }
}

}  // namespace cuda
}  // namespace fastmoe_route
