// The histogram of expert ids and the only check that they are in range, in one pass by the vectors of each
// instruction set. The ids of a block are looked at before the first of them is counted: a handful of instructions
// for 16 or 32 ids, beside a counting that waits for its stores. Blocks of 128 bytes, counted four ids at a time, are
// the fastest that was measured (Zen 4: 1.3 cycles an id, 0.1 of them for the check).
#include "cpu/count_bins.h"

#include <type_traits>

#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN
namespace {

template <class Id>
bool count_as(const Id* ids, int64_t count, Id last, int32_t* counts) {
  using Bin = std::make_unsigned_t<Id>;
  constexpr int kBlock = 128 / sizeof(Id);
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    if (__builtin_expect(!are_ids_within(ids + i, last), 0)) return false;
#pragma GCC unroll 4
    for (int u = 0; u < kBlock; ++u) ++counts[static_cast<Bin>(ids[i + u]) + 1];
  }
  for (; i < count; ++i) {
    if (ids[i] < -1 || ids[i] > last) return false;
    ++counts[ids[i] + 1];
  }
  return true;
}

}  // namespace

void count_bins(const CountBinsArgs& args) {
  const int64_t last = args.last_id;
  *args.are_valid = args.ids_are_int64 ? count_as(static_cast<const int64_t*>(args.ids), args.count, last, args.counts)
                                       : count_as(static_cast<const int32_t*>(args.ids), args.count,
                                                  static_cast<int32_t>(last), args.counts);
}

FASTMOE_ROUTE_ISA_END
