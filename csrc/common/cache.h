// What the caches of this processor keep from one operation to the next.
#pragma once

#include <cstdint>

namespace fastmoe_route {

// Bytes that one call may move and still find mostly in the last-level cache afterwards: three quarters of it, counted
// as 32 MB at most (larger ones serve many cores) and as 11 MB where its size is unknown.
int64_t cache_bytes_kept();

// Size of a core's first-level data cache, 32 KB where it is unknown.
int64_t level1_cache_bytes();

// Size of a core's second-level cache, 1 MB where it is unknown.
int64_t level2_cache_bytes();
inline bool has_large_level2() { return level2_cache_bytes() >= int64_t{2} << 20; }

// Whether a prefetch into the second-level cache stands still until the address of its page is found: Zen 4 does, Intel
// goes on (both measured).
bool prefetch_waits_for_page();

// The largest result that is better left in the caches than written around them, wherever its memory was before: half
// a second-level cache.
int64_t cached_result_bytes();

// Whether any of four lines of the `bytes` from `begin` on lies in this core's second-level cache. They are read, and
// the time is taken: up to two microseconds, and a page fault each where the memory is fresh. No where that cache has
// less than 2 MB, or little room beside the bytes.
bool lie_in_level2(const void* begin, int64_t bytes);

}  // namespace fastmoe_route
