#include "cuda/gemm/sm100.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus groups_sm100_float16(const GroupsProduct& product, const CudaQueue& queue) {
  return native_groups<TensorMemoryProduct, cutlass::half_t>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
