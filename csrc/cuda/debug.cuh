// In a build without NDEBUG (CMAKE_BUILD_TYPE=Debug) an id out of range stops the kernel: an error of the next call
// that waits for it. In other builds it is none, and nothing is paid for.
#pragma once

#include <cassert>

namespace fastmoe_route {
namespace cuda {

__device__ inline void debug_assert([[maybe_unused]] bool holds) { assert(holds && "an id is out of range"); }

}  // namespace cuda
}  // namespace fastmoe_route
