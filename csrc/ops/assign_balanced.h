// assign_balanced: every expert receives exactly T / E tokens, the total score close to the largest possible.
//
//   scores [T, E], finite -> experts [T] int32. The total is within T * eps of the optimum, with
//   eps = max(score range / 50, 1e-4). Deterministic; no gradient. E divides T.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/strided.h"

namespace fastmoe_route {

struct AssignBalancedArgs {
  int64_t num_tokens;
  int64_t num_experts;
  DType dtype;
  Strided<void> scores;  // [T, E]
  int32_t* experts;      // [T]
};

// False if a score is not finite; the result is then undefined.
namespace cpu { bool assign_balanced(const AssignBalancedArgs& args); }  // namespace cpu

}  // namespace fastmoe_route
