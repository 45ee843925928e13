// The limits of plan_dispatch: the slots that capacity and max_rows turn away.
#pragma once

#include "cuda/plan_work.cuh"

namespace fastmoe_route {
namespace cuda {

// Whether a limit may turn slots away.
bool has_limit(const PlanWork& work);

// After cut_for_warps: counts the demand into a.dropped, and has every later launch pass over what is turned away.
CudaStatus turn_away(PlanWork& work, const CudaQueue& queue);

}  // namespace cuda
}  // namespace fastmoe_route
