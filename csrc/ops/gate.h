// gate: scores, top-k choice, combine weights and statistics of every token, in one read of the logits.
//
//   logits [T, E + num_null] -> weights [T, K], experts [T, K], demand [E], and on request score_sum [E],
//   logsumexp [T], scores [T, E].
//
// The rules (score, key, allowed, choose, weight; ties to the lower expert; NaN, inf, empty rows) are those of the
// public docstring in python/fastmoe_route/gate.py. float32 arithmetic, double for float64 logits.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "common/dtype.h"
#include "common/strided.h"

namespace fastmoe_route {

enum class Score : int32_t { kSoftmax, kSigmoid, kSqrtSoftplus, kRelu, kIdentity };
enum class GroupScore : int32_t { kMax, kTop2Sum };

// What both passes need to know of the scores and weights.
struct GateShape {
  int64_t num_tokens;
  int64_t num_experts;  // E, null columns not counted
  int64_t num_null;     // columns E .. E + num_null - 1 of the logits
  int64_t top_k;        // K
  Score score;
  bool softmax_over_group;  // of several groups
  int64_t num_groups;       // divides E
  bool normalize;
  double scale;
};

struct GateArgs {
  GateShape shape;
  DType dtype;
  Strided<void> logits;  // [T, E + num_null]
  Strided<void> bias;    // float (double for float64 logits); data null: none; likewise below
  Strided<bool> mask;
  Strided<void> noise;  // as bias
  int64_t topk_groups;
  GroupScore group_score;
  int64_t max_per_group;  // K when unlimited
  double top_p;           // +inf: off
  Strided<float> top_p_per_token;
  double threshold;  // -inf: off
  Strided<float> threshold_per_token;
  int64_t min_k;
  Strided<int32_t> k_per_token;
  // Outputs, contiguous. Weights and statistics are float, double for float64 logits.
  void* weights;     // [T, K]
  int32_t* experts;  // [T, K]
  int32_t* demand;   // [E]
  void* score_sum;   // [E], or null
  void* logsumexp;   // [T], or null
  void* scores;      // [T, E], or null
};

struct GateBackwardArgs {
  GateShape shape;
  DType dtype;
  Strided<void> logits;
  const int32_t* experts;  // [T, K]
  // Gradients of the outputs, contiguous, of the arithmetic type; null where there is none.
  const void* grad_weights;
  const void* grad_score_sum;
  const void* grad_logsumexp;
  const void* grad_scores;
  const void* logsumexp;  // [T] as forward returned it: -inf marks rows that took no part in the statistics; or null
  void* grad_logits;      // [T, E + num_null], contiguous, of dtype
};

namespace cpu {
void gate(const GateArgs& args);
void gate_backward(const GateBackwardArgs& args);
}  // namespace cpu

// float64 logits are an error.
namespace cuda {
CudaStatus gate(const GateArgs& args, const CudaQueue& queue);
CudaStatus gate_backward(const GateBackwardArgs& args, const CudaQueue& queue);
}  // namespace cuda

}  // namespace fastmoe_route
