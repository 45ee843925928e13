// plan_dispatch by warps: a warp walks a tile of slots in order, and a scan adds up in between. For more experts than a
// block has threads for, and for what limits turn away.
#pragma once

#include "cuda/plan_work.cuh"

namespace fastmoe_route {
namespace cuda {

constexpr int kWalkThreads = 128;  // of a block, whose warps have a tile each
constexpr int kWalkWarps = kWalkThreads / kWarp;

// Tiles, and the memory of their counts.
void cut_for_warps(PlanWork& work, const CudaQueue& queue);

// a.dropped = slots per expert, and where in the order of an expert's slots each tile starts.
CudaStatus count_demand(const PlanWork& work, const CudaQueue& queue);

// After count_demand: work.marks[slot] = 1 if `capacity` slots of its expert come before it in the order, else 0.
CudaStatus mark_late(const PlanWork& work, const CudaQueue& queue);

// The plan. `demand`, if any, is what was asked for before slots were turned away; it may be a.dropped itself.
CudaStatus place_by_warps(const PlanWork& work, const int32_t* demand, const CudaQueue& queue);

}  // namespace cuda
}  // namespace fastmoe_route
