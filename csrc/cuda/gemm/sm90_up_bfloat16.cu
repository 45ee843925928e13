#include "cuda/gemm/sm90_up.cuh"
#include "cuda/gemm/sm90_up.h"

namespace fastmoe_route {
namespace cuda {

CudaStatus up_sm90_bfloat16(const UpProduct& product, const CudaQueue& queue, bool* is_done) {
  return sm90_up_as<cutlass::bfloat16_t>(product, queue, is_done);
}
CudaStatus rows_sm90_bfloat16(const RowsProduct& product, const CudaQueue& queue, bool* is_done) {
  return sm90_rows_as<cutlass::bfloat16_t>(product, queue, is_done);
}

}  // namespace cuda
}  // namespace fastmoe_route
