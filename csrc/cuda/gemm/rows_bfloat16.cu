#include "cuda/gemm/sm80.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus rows_product_bfloat16(const RowsProduct& product, bool is_wide, const CudaQueue& queue) {
  return is_wide ? rows_product_as<cutlass::bfloat16_t, 8>(product, queue)
                 : rows_product_as<cutlass::bfloat16_t, 1>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
