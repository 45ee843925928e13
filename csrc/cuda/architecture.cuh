// What kernels ask about the architecture that they are compiled for.
#pragma once

namespace fastmoe_route {
namespace cuda {

// From sm_100 on ptxas takes more registers for the same source, and spills at bounds that hold below.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kNeedsMoreRegisters = true;
#else
constexpr bool kNeedsMoreRegisters = false;
#endif

}  // namespace cuda
}  // namespace fastmoe_route
