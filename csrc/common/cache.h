// What the caches of this processor keep from one operation to the next.
#pragma once

#include <cstdint>

namespace fastmoe_route {

// Bytes that one call may move and still find mostly in the last-level cache afterwards: three quarters of it, counted
// as 32 MB at most (larger ones serve many cores) and as 11 MB where its size is unknown.
int64_t cache_bytes_kept();

// The largest result that is better left in the caches than written around them: half a second-level cache, counted as
// 512 KB where its size is unknown.
int64_t cached_result_bytes();

}  // namespace fastmoe_route
