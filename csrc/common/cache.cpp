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

int64_t level1_cache_bytes() {
  static const int64_t size = [] {
    int64_t bytes = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    constexpr int64_t kUnknown = int64_t{32} << 10;
    return bytes <= 0 ? kUnknown : bytes;
  }();
  return size;
}

int64_t level2_cache_bytes() {
  static const int64_t size = [] {
    int64_t bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    constexpr int64_t kUnknown = int64_t{1} << 20;
    return bytes <= 0 ? kUnknown : bytes;
  }();
  return size;
}

bool prefetch_waits_for_page() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

int64_t cached_result_bytes() { return level2_cache_bytes() / 2; }

}  // namespace fastmoe_route
