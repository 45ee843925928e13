// Where the address spaces of a thread lie in generic addresses. Global memory is the memory of this process; the other
// windows lie where no process has memory, and a null pointer is in none of them.
#pragma once

#include <cstdint>

namespace ptxvm {

constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint64_t kLocalWindow = uint64_t{2} << 56;
constexpr uint64_t kParamWindow = uint64_t{3} << 56;
constexpr uint64_t kWindowSize = uint64_t{1} << 32;
// Offset of the first variable in shared memory: 0 stays invalid.
constexpr uint64_t kSharedStart = 1024;

}  // namespace ptxvm
