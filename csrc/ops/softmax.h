// softmax: exp(x - max) / sum along the last dimension, with three methods that differ in how often they read x.
//
//   x [R, C] -> y [R, C], rows strided, columns contiguous; float32 arithmetic, double for float64.
// Same values and the same NaN/inf pattern as torch.softmax: a row holding NaN or +inf is NaN where torch's is, a row
// of only -inf is NaN, -inf beside finite values gives exactly 0.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "common/dtype.h"

namespace fastmoe_route {

enum class SoftmaxMethod : int32_t { kAuto, kThreePass, kOnline, kTwoPass };

struct SoftmaxArgs {
  int64_t num_rows;
  int64_t num_cols;
  DType dtype;
  SoftmaxMethod method;
  const void* x;
  int64_t x_stride;  // elements between rows
  void* y;           // contiguous
};

struct SoftmaxBackwardArgs {
  int64_t num_rows;
  int64_t num_cols;
  DType dtype;
  const void* grad_y;  // contiguous
  const void* y;       // contiguous
  void* grad_x;        // contiguous
};

namespace cpu {
void softmax(const SoftmaxArgs& args);
void softmax_backward(const SoftmaxBackwardArgs& args);
}  // namespace cpu

namespace cuda {
CudaStatus softmax(const SoftmaxArgs& args, const CudaQueue& queue);
CudaStatus softmax_backward(const SoftmaxBackwardArgs& args, const CudaQueue& queue);
}  // namespace cuda

}  // namespace fastmoe_route
