// The timing around every peak kernel: burn(iterations) does a fixed number of operations on registers, and all
// threads do it at the same time. The best stretch counts: a limit is what the machine reaches when left alone.
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
  constexpr double kStretch = 0.01;  // long beside starting the threads, short beside an interruption
  const int threads = num_threads();
  int64_t iterations = 1000;
  double shortest = 1e30;  // of any iteration so far: a stretch that was interrupted does not end the search
  bool is_long = false;
  const double end = now() + args.seconds;
  do {
    const double start = now();
    parallel_workers(threads, [&](int) { burn(iterations); });
    const double seconds = (now() - start) / static_cast<double>(iterations);
    shortest = seconds < shortest ? seconds : shortest;
    is_long = shortest * static_cast<double>(iterations) >= kStretch;
    if (!is_long) iterations *= 2;
  } while (!is_long || now() < end);
  const double best = flops_per_iteration * threads / shortest;
  *args.flops = best;
}

FASTMOE_ROUTE_ISA_END
