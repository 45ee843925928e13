// machine: what this processor can do at best, measured; the denominators of the bench's "share of the limit".
//
// machine_peak does so many fused multiply-adds (bfloat16: the products of the level in use) on registers only, so
// nothing but the arithmetic units limits it. machine_read adds up a buffer, so that reading it is the whole cost.
// machine_info tells what the library chose.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastmoe_route {

// At least `flops` operations, shared among all threads of the pool. A fused multiply-add is two.
struct PeakArgs {
  double flops;
};

struct ReadArgs {
  const float* values;  // [count]
  int64_t count;
  int64_t passes;  // times every thread reads its part
  float* sum;
};

namespace cpu {
void peak_float32(const PeakArgs& args);
// The bfloat16 products the level has; without any, bfloat16 is multiplied in float32.
void peak_bfloat16(const PeakArgs& args);
void read_all(const ReadArgs& args);
}  // namespace cpu

}  // namespace fastmoe_route
