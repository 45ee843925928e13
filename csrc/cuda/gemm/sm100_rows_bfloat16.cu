#include "cuda/gemm/sm100.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus rows_sm100_bfloat16(const RowsProduct& product, const CudaQueue& queue) {
  return native_rows<TensorMemoryProduct, cutlass::bfloat16_t>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
