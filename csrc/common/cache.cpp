#include "common/cache.h"

#include <unistd.h>

#include <algorithm>

namespace fastmoe_route {

int64_t cache_bytes_kept() {
  static const int64_t kept = [] {
    int64_t bytes = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    constexpr int64_t kUnknown = int64_t{11} << 20, kMost = int64_t{32} << 20;
    return bytes <= 0 ? kUnknown : std::min(bytes, kMost) / 4 * 3;
  }();
  return kept;
}

int64_t cached_result_bytes() {
  static const int64_t kept = [] {
    int64_t bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    constexpr int64_t kUnknown = int64_t{1} << 20;
    return (bytes <= 0 ? kUnknown : bytes) / 2;
  }();
  return kept;
}

int64_t cached_copy_bytes() {
  static const int64_t kept = [] {
    int64_t bytes = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return std::max(cached_result_bytes(), bytes / 64);
  }();
  return kept;
}

}  // namespace fastmoe_route
