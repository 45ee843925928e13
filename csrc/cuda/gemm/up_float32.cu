#include "cuda/gemm/up.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus up_product_float32(const UpProduct& product, const CudaQueue& queue) {
  return up_product_as<float, float, 1>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
