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

// The same for copies, or a 64th of the last-level cache if that is more: the larger that one is, the likelier it still
// holds what lay in the memory of the result, and storing past lines that are there is slow. (512 KB either way on
// Zen 4; 1 and 4 MB on an Emerald Rapids with 2 and 260 MB.)
int64_t cached_copy_bytes();

}  // namespace fastmoe_route
