#include "cuda/gemm/sm90.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus groups_sm90_cooperative_float16(const GroupsProduct& product, const CudaQueue& queue) {
  return native_groups<CooperativeGroups, cutlass::half_t>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
