#include "cuda/gemm/sm90.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus rows_sm90_pingpong_bfloat16(const RowsProduct& product, const CudaQueue& queue) {
  return native_rows<PingPongRows, cutlass::bfloat16_t>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
