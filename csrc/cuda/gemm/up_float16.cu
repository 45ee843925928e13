#include "cuda/gemm/up.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus up_product_float16(const UpProduct& product, const CudaQueue& queue) {
  return up_product_as<Float16, cutlass::half_t, 8>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
