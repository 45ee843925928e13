// machine: what this processor can do at best, measured; the denominators of the bench's "share of the limit".
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastmoe_route {

struct PeakArgs {
  DType dtype;               // float32 or bfloat16: fused multiply-adds or bfloat16 products, on registers only
  double seconds;            // how long to run, on every thread of the pool
  double* flops;             // operations per second of all threads together
};

namespace cpu {
void peak(const PeakArgs& args);
}  // namespace cpu

}  // namespace fastmoe_route
