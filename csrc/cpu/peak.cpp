// The float32 peak and the read pass of this level.
//
// peak_float32: independent chains of fused multiply-adds, enough of them to hide the latency (4 cycles on two units
// takes 8 chains) and few enough to stay in 16 registers. The values settle at 1, away from subnormals and infinity.
// read_all: eight streams per thread, far apart, and eight accumulators, so that neither loads nor additions are waited
// for. One stream alone stops at the end of every page of 4 KB until the next one's place is found, and reads a third
// less. Reads 4 * count bytes per pass.
#include "cpu/gemm/peak_burn.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

#if defined(__AVX2__) || defined(__AVX512F__)
constexpr int kChains = 12;
#else
constexpr int kChains = 6;  // a portable Vec takes two registers
#endif

__attribute__((noinline)) float burn_float32(int64_t iterations) {
  // Read through volatile, so that the compiler cannot work the chains out beforehand.
  volatile float factor = 0.75f, term = 0.25f;
  const Vec a = Vec::all(factor), b = Vec::all(term);
  Vec chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = Vec::all(1.0f + 0.001f * static_cast<float>(i));
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], a, b);
  }
  Vec total = Vec::zero();
  for (int i = 0; i < kChains; ++i) total = total + chain[i];
  return reduce_add(total);
}

}  // namespace

void peak_float32(const PeakArgs& args) {
  burn_on_all_threads(args, 2.0 * kChains * Vec::kLanes, [](int64_t iterations) {
    volatile float sink = burn_float32(iterations);
    (void)sink;
  });
}

void peak_bfloat16(const PeakArgs& args) { peak_float32(args); }

void read_all(const ReadArgs& args) {
  constexpr int64_t kStreams = 8, kStep = 8 * Vec::kLanes;
  constexpr int64_t kMaxThreads = 1024;
  float partial[kMaxThreads];
  const int64_t threads = num_threads() < kMaxThreads ? num_threads() : kMaxThreads;
  const int64_t steps = args.count / (kStreams * kStep);
  parallel_workers(threads, [&](int worker) {
    const int64_t first = steps * worker / threads, length = (steps * (worker + 1) / threads - first) * kStep;
    const float* begin = args.values + first * kStreams * kStep;
    Vec s[8];
    for (int i = 0; i < 8; ++i) s[i] = Vec::zero();
    for (int64_t pass = 0; pass < args.passes; ++pass) {
      for (int64_t at = 0; at < length; at += kStep) {
        for (int64_t stream = 0; stream < kStreams; ++stream) {
          const float* p = begin + stream * length + at;
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) s[i] = s[i] + Vec::load(p + i * Vec::kLanes);
        }
      }
    }
    partial[worker] = reduce_add(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
  });
  float total = 0.0f;
  for (int64_t worker = 0; worker < threads; ++worker) total += partial[worker];
  for (int64_t i = steps * kStreams * kStep; i < args.count; ++i) total += args.values[i];
  *args.sum = total;
}

FASTMOE_ROUTE_ISA_END
