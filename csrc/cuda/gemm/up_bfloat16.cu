#include "cuda/gemm/up.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus up_product_bfloat16(const UpProduct& product, const CudaQueue& queue) {
  return up_product_as<BFloat16, cutlass::bfloat16_t, 8>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
