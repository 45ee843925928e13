// Sums of the columns of every group's rows: the gradients of biases.
#pragma once

#include "common/dtype.h"
#include "cuda/gemm/groups.cuh"

namespace fastmoe_route {
namespace cuda {

// result[e][c] = sum over the rows r of e of row_weights[r] * rows[r][c], in float32, rounded once.
struct ColumnSums {
  DType dtype;
  RowGroups groups;
  int64_t num_cols;
  const void* rows;  // [R, num_cols]
  int64_t stride;
  const float* row_weights;  // [R], or null for 1
  void* result;              // [E, num_cols]
};

CudaStatus column_sums(const ColumnSums& sums, const CudaQueue& queue);

}  // namespace cuda
}  // namespace fastmoe_route
