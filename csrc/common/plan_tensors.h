// A plan as one host file makes it for another.
#pragma once

#include "common/tensor.h"

namespace fastmoe_route {

struct PlanTensors {
  Tensor offsets;      // [E + 1]
  Tensor row_to_slot;  // [T K]
  Tensor slot_to_row;  // [T, K]
};

// plan_dispatch without its other options, on the device of `experts`.
PlanTensors plan_every_slot(const Tensor& experts, int64_t num_experts, bool allow_unrouted);

}  // namespace fastmoe_route
