// The choice of a kernel for a grouped product, by device, dtype and shape; `gemm_policy` prints it.
#include "cuda/gemm/gemm.h"

namespace fastmoe_route {
namespace cuda {

CudaStatus rows_product(const RowsProduct& product, const CudaQueue& queue) {
  switch (product.dtype) {
    case DType::kFloat32: return rows_product_float32(product, queue);
    case DType::kBFloat16: return rows_product_bfloat16(product, queue);
    case DType::kFloat16: return rows_product_float16(product, queue);
    default: return no_float64();
  }
}

CudaStatus groups_product(const GroupsProduct& product, const CudaQueue& queue) {
  switch (product.dtype) {
    case DType::kFloat32: return groups_product_float32(product, queue);
    case DType::kBFloat16: return groups_product_bfloat16(product, queue);
    case DType::kFloat16: return groups_product_float16(product, queue);
    default: return no_float64();
  }
}

}  // namespace cuda
}  // namespace fastmoe_route
