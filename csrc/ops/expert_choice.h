// expert_choice: every expert takes its `capacity` best tokens (per scope), ties to the lower token, NaN last.
//
//   scores [T, E] -> weights [T, E], experts [T, E] int32 (slot j holds j or -1), demand [E] int32.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "common/dtype.h"
#include "common/strided.h"

namespace fastmoe_route {

struct ExpertChoiceArgs {
  int64_t num_tokens;
  int64_t num_experts;
  int64_t capacity;
  DType dtype;
  Strided<void> scores;      // [T, E]
  const int32_t* scope_ids;  // [T], contiguous, checked on CPU, or null
  int64_t num_scopes;
  void* weights;  // [T, E] float (double)
  int32_t* experts;
  int32_t* demand;
};

namespace cpu { void expert_choice(const ExpertChoiceArgs& args); }  // namespace cpu

// A token whose scope is out of range is chosen by no expert.
namespace cuda { CudaStatus expert_choice(const ExpertChoiceArgs& args, const CudaQueue& queue); }  // namespace cuda

}  // namespace fastmoe_route
