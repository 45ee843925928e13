#include "cuda/gemm/sm90.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus groups_sm90_float16(const GroupsProduct& product, const CudaQueue& queue) {
  return native_groups<CooperativeProduct, cutlass::half_t>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
