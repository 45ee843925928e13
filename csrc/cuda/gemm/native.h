// Grouped products in the instructions that one architecture alone has: wgmma and TMA on sm_90a, tcgen05 and TMA on
// sm_100a. The collectives are CUTLASS 3's for arrays of pointers; what they read from device memory is written by one
// kernel here, so no host waits.
#pragma once

#include "cuda/gemm/gemm.h"

namespace fastmoe_route {
namespace cuda {

// Of every group, in device memory.
struct NativeArrays {
  int32_t* shapes;  // [E, 3] M, N, K
  const void** a;   // [E]
  const void** b;
  void** d;
  int64_t* a_strides;  // [E] the one stride that is not 1
  int64_t* b_strides;
  int64_t* d_strides;
  int num_groups;
};

// Queues what fills the arrays, and zeros for rows of no group (rows_product) or groups without rows (groups_product):
// those have no tiles.
CudaStatus native_arrays(const RowsProduct& product, const CudaQueue& queue, NativeArrays* arrays);
CudaStatus native_arrays(const GroupsProduct& product, const CudaQueue& queue, NativeArrays* arrays);

// For 2-byte dtypes, everything a multiple of 16 bytes, no bias. One unit each: a kernel takes some 20 s and up to 4 GB
// to compile.
CudaStatus rows_sm90_cooperative_bfloat16(const RowsProduct& product, const CudaQueue& queue);
CudaStatus rows_sm90_cooperative_float16(const RowsProduct& product, const CudaQueue& queue);
CudaStatus rows_sm90_pingpong_bfloat16(const RowsProduct& product, const CudaQueue& queue);
CudaStatus groups_sm90_cooperative_bfloat16(const GroupsProduct& product, const CudaQueue& queue);
CudaStatus groups_sm90_cooperative_float16(const GroupsProduct& product, const CudaQueue& queue);
CudaStatus groups_sm90_pingpong_bfloat16(const GroupsProduct& product, const CudaQueue& queue);
CudaStatus rows_sm100_bfloat16(const RowsProduct& product, const CudaQueue& queue);
CudaStatus rows_sm100_float16(const RowsProduct& product, const CudaQueue& queue);
CudaStatus groups_sm100_bfloat16(const GroupsProduct& product, const CudaQueue& queue);
CudaStatus groups_sm100_float16(const GroupsProduct& product, const CudaQueue& queue);

}  // namespace cuda
}  // namespace fastmoe_route
