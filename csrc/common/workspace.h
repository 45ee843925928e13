// Scratch memory that outlives a call. The page faults of fresh buffers cost several times what the kernels that
// fill them do, so each calling thread keeps its largest scratch and hands it out again.
#pragma once

#include <cstddef>

namespace fastmoe_route {

// Slots that may be in use at the same time by nested code; a slot has one user per thread at a time.
// kMicroKernel belongs to the matrix micro-kernels, on the thread that runs them.
enum class Scratch {
  kGateRows,
  kPlan,
  kPlanDrops,
  kIntermediateRows,
  kHiddenRows,
  kScaledRows,
  kPackedRows,
  kReduction,
  kRowLists,
  kExpertTasks,
  kMicroKernel,
  kCount
};

// At least `bytes` writable bytes, aligned to 64, uninitialised, owned by the calling thread and valid until it
// asks for the same slot again. Throws std::bad_alloc.
void* scratch(Scratch slot, size_t bytes);

// Bytes held now by the calling thread.
size_t scratch_bytes();

}  // namespace fastmoe_route
