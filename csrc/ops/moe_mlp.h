// moe_mlp: the expert layer in one op: gather, up projection, activation, down projection, weighted combine.
//
//   x [T, H], a plan, weights [T, K], w_up [E, H, U], w_down [E, I, H] -> y [T, H]
//   for every kept slot of expert e: u = x[t] w_up[e] + bias_up[e]; a = act(u); o = a w_down[e] + bias_down[e];
//   y[t] = sum over j ascending of weights[t, j] * o, in float32 (weights_on output), or the token is multiplied by its
//   weight before the up projection and the outputs are summed (weights_on input).
// U = 2 I for gated activations, I otherwise. The activations and their formulas: python/fastmoe_route/moe_mlp.py.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "common/dtype.h"
#include "ops/grouped_mm.h"

namespace fastmoe_route {

enum class Activation : int32_t { kSwiGlu, kGeGlu, kReGlu, kSwiGluClamped, kSilu, kGelu, kRelu, kRelu2 };
inline bool is_gated(Activation activation) { return activation <= Activation::kSwiGluClamped; }

struct MoeMlpShape {
  int64_t num_tokens;    // T
  int64_t top_k;         // K
  int64_t num_rows;      // R
  int64_t num_experts;   // E
  int64_t hidden;        // H
  int64_t intermediate;  // I
  Activation activation;
  bool interleaved;  // gate in even, up in odd columns of w_up
  bool weights_on_input;
  DType dtype;  // of x, w_up, w_down, biases, y
};

// What both passes read.
struct MoeMlpInputs {
  MoeMlpShape shape;
  const void* x;  // [T, H]
  int64_t x_stride;
  const int32_t* offsets;      // [E + 1]
  const int32_t* row_to_slot;  // [R]
  const int32_t* slot_to_row;  // [T, K], contiguous
  const float* weights;        // [T, K], contiguous (double for float64)
  ExpertMatrix w_up;
  ExpertMatrix w_down;
  const void* bias_down;  // [E, H], contiguous, or null
};

struct MoeMlpArgs : MoeMlpInputs {
  const void* bias_up;  // [E, U], contiguous, or null
  void* y;              // [T, H], contiguous
  void* preactivation;  // [R, U] of dtype, after bias_up, for backward; or null. Rows without a slot are zero.
};

struct MoeMlpBackwardArgs : MoeMlpInputs {
  const void* grad_y;         // [T, H], contiguous
  const void* preactivation;  // [R, U]
  // Results; null where not wanted. Contiguous; the weight gradients follow the layout of their weights.
  void* grad_x;         // [T, H]
  float* grad_weights;  // [T, K] (double for float64)
  void* grad_w_up;      // [E, H, U] or [E, U, H]
  bool grad_w_up_transposed;
  void* grad_w_down;  // [E, I, H] or [E, H, I]
  bool grad_w_down_transposed;
  void* grad_bias_up;    // [E, U]
  void* grad_bias_down;  // [E, H]
};

namespace cpu {
void moe_mlp(const MoeMlpArgs& args);
void moe_mlp_backward(const MoeMlpBackwardArgs& args);
}  // namespace cpu

// Offsets and maps are not checked: a (slot, row) pair counts only if both maps claim it. float64 is an error.
namespace cuda {
CudaStatus moe_mlp(const MoeMlpArgs& args, const CudaQueue& queue);
CudaStatus moe_mlp_backward(const MoeMlpBackwardArgs& args, const CudaQueue& queue);
}  // namespace cuda

}  // namespace fastmoe_route
