// grouped_mm: one matrix product per expert over its own rows.
//
//   x [R, A], w [E, A, B], offsets [E + 1] -> y [R, B]; rows offsets[e] : offsets[e + 1] are multiplied by w[e], plus
//   bias[e] if given; rows past offsets[E] are zero. Accumulation in float32 (float64), rounded once.
// The gradient of x is grouped_mm itself with w transposed; that of w is grouped_mm_wgrad.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "common/dtype.h"

namespace fastmoe_route {

// [E, rows, cols] with one of the last two strides equal to 1, in elements.
struct ExpertMatrix {
  const void* data = nullptr;
  int64_t stride_expert = 0;
  int64_t stride_row = 0;
  int64_t stride_col = 1;
};

struct GroupedMmArgs {
  int64_t num_rows;     // R
  int64_t num_experts;  // E
  int64_t in;           // A
  int64_t out;          // B
  DType dtype;
  const void* x;           // [R, A]
  int64_t x_stride;        // elements between rows; columns are contiguous
  ExpertMatrix w;          // [E, A, B]
  const int32_t* offsets;  // [E + 1]: starts at 0, never falls, ends at most at R; checked on CPU
  const void* bias;        // [E, B], contiguous, of dtype, or null
  void* y;                 // [R, B], contiguous
};

// grad_w[e] = x[rows of e]^T grad_y[rows of e], exact zeros for experts without rows;
// grad_bias[e] = column sums of grad_y over the rows of e.
struct GroupedMmWgradArgs {
  int64_t num_rows;
  int64_t num_experts;
  int64_t in;
  int64_t out;
  DType dtype;
  const void* x;  // [R, A]
  int64_t x_stride;
  const void* grad_y;  // [R, B]
  int64_t grad_y_stride;
  const int32_t* offsets;
  void* grad_w;     // [E, A, B], or [E, B, A] when transposed; contiguous; or null
  bool transposed;  // grad_w is laid out as w.transpose(1, 2)
  void* grad_bias;  // [E, B], or null
};

namespace cpu {
void grouped_mm(const GroupedMmArgs& args);
void grouped_mm_wgrad(const GroupedMmWgradArgs& args);
}  // namespace cpu

// Offsets are not checked: they are held to [0, R] and to never fall. float64 is an error.
namespace cuda {
CudaStatus grouped_mm(const GroupedMmArgs& args, const CudaQueue& queue);
CudaStatus grouped_mm_wgrad(const GroupedMmWgradArgs& args, const CudaQueue& queue);
}  // namespace cuda

}  // namespace fastmoe_route
