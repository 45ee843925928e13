#include "cuda/gemm/sm80.cuh"

namespace fastmoe_route {
namespace cuda {

CudaStatus rows_product_tf32(const RowsProduct& product, const CudaQueue& queue) {
  return rows_product_as<float, 4>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
