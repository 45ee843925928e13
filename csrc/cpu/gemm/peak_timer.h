// The timing around every peak kernel: burn(iterations) does a fixed number of operations on registers, and all
// threads do it at the same time, in stretches short enough that some are not interrupted. The best stretch counts: a
// limit is what the machine reaches when left alone.
#pragma once

#include <time.h>

#include "common/parallel.h"
#include "cpu/isa/namespace.h"
#include "ops/machine.h"

FASTMOE_ROUTE_ISA_BEGIN

inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

template <class Burn>
inline void measure_peak(const PeakArgs& args, double flops_per_iteration, const Burn& burn) {
  constexpr double kStretch = 2e-3;  // long beside starting the threads, short beside a time slice
  constexpr int64_t kTrial = 10000;
  const int threads = num_threads();
  double shortest = 1e30;  // seconds of one iteration, on this thread alone
  for (int trial = 0; trial < 20; ++trial) {
    const double start = now();
    burn(kTrial);
    const double seconds = (now() - start) / kTrial;
    shortest = seconds < shortest ? seconds : shortest;
  }
  const int64_t iterations = static_cast<int64_t>(kStretch / shortest) + 1;
  shortest = 1e30;  // on all threads
  const double end = now() + args.seconds;
  do {
    const double start = now();
    parallel_workers(threads, [&](int) { burn(iterations); });
    const double seconds = (now() - start) / static_cast<double>(iterations);
    shortest = seconds < shortest ? seconds : shortest;
  } while (now() < end);
  *args.flops = flops_per_iteration * threads / shortest;
}

FASTMOE_ROUTE_ISA_END
