// softmax_topk: the k largest softmax probabilities of wide rows and their columns, in one read of x.
//
//   x [R, C] -> values [R, k] of the type of x, indices [R, k] int64; 1 <= k <= min(64, C), C < 2^31. Ranked by x, best
//   first, ties to the lower column, NaN below every number. A row holding NaN or +inf, or only -inf, gives NaN values,
//   as its softmax would; its indices stay valid and distinct.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "common/dtype.h"

namespace fastmoe_route {

constexpr int64_t kSoftmaxTopkLimit = 64;

struct SoftmaxTopkArgs {
  int64_t num_rows;
  int64_t num_cols;
  int64_t k;
  DType dtype;
  const void* x;
  int64_t x_stride;  // elements between rows; columns are contiguous
  void* values;      // [R, k], contiguous; likewise below
  int64_t* indices;
  double* statistics;  // [R, 2]: the row's max (NaN ignored) and its sum of exp(x - max), for backward; or null
};

// grad_x[c] = p[c] * ([c is column j] * grad_values[j] - sum over j of grad_values[j] * p[column j]).
struct SoftmaxTopkBackwardArgs {
  int64_t num_rows;
  int64_t num_cols;
  int64_t k;
  DType dtype;
  const void* grad_values;  // [R, k], contiguous
  const void* x;
  int64_t x_stride;
  const double* statistics;
  const int64_t* indices;
  void* grad_x;  // [R, C], contiguous
};

namespace cpu {
void softmax_topk(const SoftmaxTopkArgs& args);
void softmax_topk_backward(const SoftmaxTopkBackwardArgs& args);
}  // namespace cpu

// Columns out of range are passed over in backward.
namespace cuda {
CudaStatus softmax_topk(const SoftmaxTopkArgs& args, const CudaQueue& queue);
CudaStatus softmax_topk_backward(const SoftmaxTopkBackwardArgs& args, const CudaQueue& queue);
}  // namespace cuda

}  // namespace fastmoe_route
