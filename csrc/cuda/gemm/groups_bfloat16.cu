#include "cuda/gemm/sm80.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus groups_product_bfloat16(const GroupsProduct& product, bool is_wide, const CudaQueue& queue) {
  return is_wide ? groups_product_as<cutlass::bfloat16_t, 8>(product, queue)
                 : groups_product_as<cutlass::bfloat16_t, 1>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
