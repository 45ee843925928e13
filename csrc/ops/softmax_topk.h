// softmax_topk: the k largest softmax probabilities of wide rows and their columns, in one read of x.
//
//   x [R, C] -> values [R, k] of the type of x, indices [R, k] int64; k <= 64, C < 2^31. Ranked by x, best first, ties
//   to the lower column, NaN above everything as in torch.topk's order of torch.softmax: a NaN row gives NaN values.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastmoe_route {

struct SoftmaxTopkArgs {
  int64_t num_rows;
  int64_t num_cols;
  int64_t k;
  DType dtype;
  const void* x;
  int64_t x_stride;
  void* values;
  int64_t* indices;
  void* logsumexp;           // [R] of the arithmetic type, for backward
};

namespace cpu {
void softmax_topk(const SoftmaxTopkArgs& args);
}  // namespace cpu

}  // namespace fastmoe_route
