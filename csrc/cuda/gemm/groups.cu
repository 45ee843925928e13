// group_rows: one block scans the offsets, kThreads experts a step. Bytes: 4 (E + 1) read, 8 (E + 1) written.
#include "cuda/gemm/groups.cuh"

#include <cub/block/block_scan.cuh>

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 512;

struct Larger {
  __device__ int32_t operator()(int32_t a, int32_t b) const { return a > b ? a : b; }
};

__global__ void __launch_bounds__(kThreads) group_rows_kernel(const int32_t* offsets, int num_groups, int32_t num_rows,
                                                              int tile_rows, int32_t* bounds, int32_t* row_tiles) {
  using Scan = cub::BlockScan<int32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int32_t ends[kThreads + 1];
  if (threadIdx.x == 0) bounds[0] = row_tiles[0] = 0;
  int32_t tiles_before = 0, last = 0;
  for (int first = 0; first < num_groups; first += kThreads) {
    const int g = first + static_cast<int>(threadIdx.x);
    const int32_t offset = g < num_groups ? offsets[g + 1] : 0;
    int32_t end = offset < 0 ? 0 : offset > num_rows ? num_rows : offset;
    if (threadIdx.x == 0) {
      end = end > last ? end : last;
      ends[0] = last;
    }
    Scan(storage).InclusiveScan(end, end, Larger{});
    ends[threadIdx.x + 1] = end;
    __syncthreads();
    const int32_t count = end - ends[threadIdx.x];
    const int32_t own_tiles = count / tile_rows + (count % tile_rows != 0);
    int32_t tiles, all_tiles;
    Scan(storage).InclusiveSum(own_tiles, tiles, all_tiles);
    if (g < num_groups) {
      bounds[g + 1] = end;
      row_tiles[g + 1] = tiles_before + tiles;
    }
    tiles_before += all_tiles;
    last = ends[kThreads];
    __syncthreads();  // `storage` is used again
  }
}

}  // namespace

CudaStatus group_rows(const int32_t* offsets, int64_t num_groups, int64_t num_rows, int tile_rows,
                      const CudaQueue& queue, RowGroups* groups) {
  const size_t bytes = static_cast<size_t>(num_groups + 1) * sizeof(int32_t);
  int32_t* const bounds = static_cast<int32_t*>(queue.scratch(bytes));
  int32_t* const row_tiles = static_cast<int32_t*>(queue.scratch(bytes));
  *groups = {bounds, row_tiles, static_cast<int>(num_groups)};
  group_rows_kernel<<<1, kThreads, 0, queue.stream>>>(offsets, static_cast<int>(num_groups),
                                                      static_cast<int32_t>(num_rows), tile_rows, bounds, row_tiles);
  return launched();
}

}  // namespace cuda
}  // namespace fastmoe_route
