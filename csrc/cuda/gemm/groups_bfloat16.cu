#include "cuda/gemm/sm80.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus groups_product_bfloat16(const GroupsProduct& product, const CudaQueue& queue) {
  return groups_product_as<cutlass::bfloat16_t>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
