#include "common/cache.h"

#include <unistd.h>

#include <algorithm>

namespace fastmoe_route {

namespace {

// What the system says of a cache (glibc's names for sysconf), or `unknown`.
int64_t size_of_cache([[maybe_unused]] int level, int64_t unknown) {
  int64_t bytes = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
  bytes = sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
#endif
  return bytes <= 0 ? unknown : bytes;
}

}  // namespace

int64_t cache_bytes_kept() {
  constexpr int64_t kUnknown = int64_t{11} << 20, kMost = int64_t{32} << 20;
  static const int64_t size = size_of_cache(3, 0);
  return size == 0 ? kUnknown : std::min(size, kMost) / 4 * 3;
}

int64_t level1_cache_bytes() {
  static const int64_t size = size_of_cache(1, int64_t{32} << 10);
  return size;
}

int64_t level2_cache_bytes() {
  static const int64_t size = size_of_cache(2, int64_t{1} << 20);
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

bool lie_in_level2([[maybe_unused]] const void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__x86_64__)
  // An Emerald Rapids takes 50 to 120 ticks with the second-level cache, 280 and more with what lies behind it.
  constexpr uint64_t kMostTicks = 160;
  constexpr int kSamples = 4;
  if (!has_large_level2() || bytes > level2_cache_bytes() / 4 * 3) return false;
  const volatile char* memory = static_cast<const volatile char*>(begin);
  for (int i = 0; i < kSamples; ++i) {
    const volatile char* sample = memory + bytes * (2 * i + 1) / (2 * kSamples);
    __builtin_ia32_lfence();
    const uint64_t start = __builtin_ia32_rdtsc();
    __builtin_ia32_lfence();
    static_cast<void>(*sample);
    __builtin_ia32_lfence();
    if (__builtin_ia32_rdtsc() - start <= kMostTicks) return true;
  }
#endif
  return false;
}

}  // namespace fastmoe_route
