// Counting expert ids, for kernels that sort by them.
#pragma once

#include <cstdint>

namespace fastmoe_route {

// counts[id + 1] += 1 for every id, and *are_valid = true. At an id outside [-1, last_id] it stops: *are_valid = false,
// and counts hold some of the ids before.
struct CountBinsArgs {
  const void* ids;
  bool ids_are_int64;
  int64_t count;
  int64_t last_id;
  int32_t* counts;  // [last_id + 2]
  bool* are_valid;
};

namespace cpu { void count_bins(const CountBinsArgs& args); }  // namespace cpu

}  // namespace fastmoe_route
