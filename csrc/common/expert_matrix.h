// Host side of the weights [E, A, B] of grouped_mm and moe_mlp: read in place where kernels can, else copied.
#pragma once

#include "common/tensor.h"
#include "ops/grouped_mm.h"

namespace fastmoe_route {

// Kernels hold the bytes between two rows in 32 bits. Only a dimension of size 1 has more in practice.
constexpr int64_t kMostStride = INT32_MAX / 8;

// Itself if each of its matrices is row- or column-major, else a copy.
inline Tensor as_matrix_view(const Tensor& w) {
  const bool is_view = w.stride(1) == 1 || w.stride(2) == 1 || w.size(1) <= 1 || w.size(2) <= 1;
  return is_view && w.stride(1) <= kMostStride && w.stride(2) <= kMostStride ? w : as_contiguous(w);
}

inline ExpertMatrix expert_matrix(const Tensor& w) {
  ExpertMatrix matrix{w.const_data_ptr(), w.stride(0), w.stride(1), w.stride(2)};
  // A dimension of size 1 may have any stride: it is the contiguous one where neither is.
  if (matrix.stride_row != 1 && matrix.stride_col != 1) (w.size(2) <= 1 ? matrix.stride_col : matrix.stride_row) = 1;
  return matrix;
}

}  // namespace fastmoe_route
