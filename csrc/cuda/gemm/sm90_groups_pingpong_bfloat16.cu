#include "cuda/gemm/sm90.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus groups_sm90_pingpong_bfloat16(const GroupsProduct& product, const CudaQueue& queue) {
  return native_groups<PingPongGroups, cutlass::bfloat16_t>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
