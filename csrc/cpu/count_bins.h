// Counting expert ids, for kernels that sort by them.
#pragma once

#include <cstdint>

namespace fastmoe_route {

// counts[id + 1] += 1 for every id, and *are_valid = true. A bin id + 1 is an unsigned number of the width of an id,
// so that -1 has bin 0 and every other negative id a larger one than any expert. At a bin above last_bin it stops:
// *are_valid = false, and counts hold some of the ids before.
struct CountBinsArgs {
  const void* ids;
  bool ids_are_int64;
  int64_t count;
  uint64_t last_bin;
  int32_t* counts;  // [last_bin + 1]
  bool* are_valid;
};

namespace cpu { void count_bins(const CountBinsArgs& args); }  // namespace cpu

}  // namespace fastmoe_route
