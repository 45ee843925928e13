#include "cuda/gemm/sm90.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus rows_sm90_cooperative_float16(const RowsProduct& product, const CudaQueue& queue) {
  return native_rows<CooperativeRows, cutlass::half_t>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
