// The first half of the expert layer in one launch: rows of x taken by index, the up projection, bias and activation.
#pragma once

#include "cuda/expert_rows.cuh"

namespace fastmoe_route {
namespace cuda {

// With e the expert of row r, t its token and w its weight (1 unless scales_input):
// pre[r] = w (x[t] b[e]) + bias[e], rounded; activated[r] = act(pre[r]). Rows without a slot are zeros; rows past the
// last group are zeros in pre and not written in activated. Strides are below 2^31 bytes.
struct UpProduct {
  DType dtype;
  ExpertRows rows;
  int64_t top_k;
  const void* x;  // [T, H]
  int64_t x_stride;
  const void* b;  // [E, H, U]
  int64_t b_group_stride;
  int64_t b_stride;
  bool b_is_column_major;
  const void* bias;  // [E, U], or null
  bool scales_input;
  void* preactivation;  // [R, U], or null where no gradient is needed
  void* activated;      // [R, I]
};

// Where policy.h has a kernel for it; otherwise *is_done is false and nothing was queued: permute, rows_product and an
// activation kernel do the same.
CudaStatus up_product(const UpProduct& product, const CudaQueue& queue, bool* is_done);

// One unit per dtype. tf32 and the 2-byte dtypes: sizes, strides and addresses are multiples of 16 bytes.
CudaStatus up_product_float32(const UpProduct& product, const CudaQueue& queue);
CudaStatus up_product_tf32(const UpProduct& product, const CudaQueue& queue);
CudaStatus up_product_bfloat16(const UpProduct& product, const CudaQueue& queue);
CudaStatus up_product_float16(const UpProduct& product, const CudaQueue& queue);

}  // namespace cuda
}  // namespace fastmoe_route
