// What every peak kernel runs in: burn(iterations) does a fixed number of operations on registers, and all threads do
// their share at the same time.
#pragma once

#include "common/parallel.h"
#include "cpu/isa/namespace.h"
#include "ops/machine.h"

FASTMOE_ROUTE_ISA_BEGIN

template <class Burn>
inline void burn_on_all_threads(const PeakArgs& args, double flops_per_iteration, const Burn& burn) {
  const int threads = num_threads();
  const int64_t iterations = static_cast<int64_t>(args.flops / (flops_per_iteration * threads)) + 1;
  parallel_workers(threads, [&](int) { burn(iterations); });
}

FASTMOE_ROUTE_ISA_END
