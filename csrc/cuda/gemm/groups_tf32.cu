#include "cuda/gemm/sm80.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus groups_product_tf32(const GroupsProduct& product, const CudaQueue& queue) {
  return groups_product_as<float, 4>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
