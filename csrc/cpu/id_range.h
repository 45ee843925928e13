// The check of many expert ids at once, for kernels that index by them.
#pragma once

#include <cstdint>

namespace fastmoe_route {

// *largest = the largest id + 1, as an unsigned number of the width of an id: 0 for -1 only, and every other negative
// id is larger than any count of experts. 0 if there are none.
struct LargestBinArgs {
  const void* ids;
  bool ids_are_int64;
  int64_t count;
  uint64_t* largest;
};

namespace cpu { void largest_bin(const LargestBinArgs& args); }  // namespace cpu

}  // namespace fastmoe_route
