// The largest of many expert ids, by the vectors of each instruction set: a loop the compiler does well.
#include "cpu/id_range.h"

#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN
namespace {

template <class Bin>
uint64_t largest_of(const void* ids, int64_t count) {
  const Bin* bins = static_cast<const Bin*>(ids);
  Bin largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bin bin = bins[i] + 1;
    largest = bin > largest ? bin : largest;
  }
  return largest;
}

}  // namespace

void largest_bin(const LargestBinArgs& args) {
  *args.largest =
      args.ids_are_int64 ? largest_of<uint64_t>(args.ids, args.count) : largest_of<uint32_t>(args.ids, args.count);
}

FASTMOE_ROUTE_ISA_END
