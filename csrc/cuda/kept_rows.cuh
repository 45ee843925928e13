// softmax's rows that a block keeps: thread t has the packs t, t + blockDim.x, ... of 16 bytes, the first kHeld in
// registers, the others in groups of kHeld in shared memory.
//
// The row is copied there without registers, all of it at once, so that as many loads are in flight as it has; threads
// wait for their own packs only. An element costs a widening, a max, two operations and an ex2 in the sum, and a
// widening, three operations, an ex2 and half a rounding where it is written.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cfloat>

#include "cuda/architecture.cuh"
#include "cuda/long_rows.cuh"
#include "ops/softmax.h"

namespace fastmoe_route {
namespace cuda {

constexpr int kHeld = 4;
constexpr int kMostGroups = 3;
constexpr int kMostPacks = kHeld * (1 + kMostGroups);  // of a thread
constexpr int kKeptThreads = 1024;                     // at most
// Packs from shared memory that a thread adds up at once.
constexpr int kAddedTogether = kNeedsMoreRegisters ? 1 : kHeld;

// A sum of exponentials relative to the largest so far. That starts below every number, so that -inf adds 0; a NaN or
// +inf makes the sum NaN.
struct KeptSum {
  float max = -FLT_MAX, sum = 0.0f;

  template <class T, int kCount>
  __device__ void add(const Packed<T> (&packs)[kCount]) {
    float top = max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int n = 0; n < Packed<T>::kColumns; ++n) top = larger(top, packs[i][n]);
    }
    sum = relative_to(top);
    max = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int n = 0; n < Packed<T>::kColumns; ++n) sum += exponential_term(packs[i][n] - max);
    }
  }
  __device__ float relative_to(float larger_max) const { return sum * exponential_term(max - larger_max); }

  // Of all lanes.
  __device__ KeptSum of_warp() const {
    KeptSum total;
    total.max = warp_max(max);
    total.sum = warp_sum(relative_to(total.max));
    return total;
  }
};

// exp(x - max) / sum in rows that a block has, in whose bound a few roundings are nothing. For a result of 16
// bits, which is far from them, the power of two is computed 2^64 times too large, where none is too small for ex2, and
// the factor takes that back. One of float32 takes ex2 with gradual underflow instead.
template <class T>
class Probability {
 public:
  __device__ explicit Probability(const KeptSum& row) : max_(row.max), factor_(1.0f / row.sum * (1.0f / kLift)) {}

  __device__ float operator()(float x) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      float power;
      asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"((x - max_) * kLog2E));
      return power * factor_;
    } else {
      return power_of_two(fmaf(x - max_, kLog2E, 64.0f)) * factor_;
    }
  }

 private:
  static constexpr float kLift = sizeof(T) == sizeof(float) ? 1.0f : 18446744073709551616.0f;  // 2^64
  float max_, factor_;
};

template <class T, bool kIsWide>
class KeptRow {
 public:
  static constexpr int kColumns = Packed<T>::kColumns;

  __device__ KeptRow(const SoftmaxArgs& a, int64_t row, uint4* shared)
      : x_(static_cast<const T*>(a.x) + row * a.x_stride), y_(static_cast<T*>(a.y) + row * a.num_cols),
        num_cols_(static_cast<int>(a.num_cols)), num_packs_((num_cols_ + kColumns - 1) / kColumns), shared_(shared) {}

  // Starts the copies of all groups.
  __device__ void load() {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held_[i] = i >= count_of(0) ? nothing() : is_whole(pack_of(0, i)) ? whole(pack_of(0, i)) : part(pack_of(0, i));
    }
#pragma unroll
    for (int g = 1; g <= kMostGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i >= count_of(g)) break;
        const int pack = pack_of(g, i);
        if (is_whole(pack)) {
          __pipeline_memcpy_async(place_of(g, i), x_ + pack * kColumns, sizeof(uint4));
        } else {
          *place_of(g, i) = part(pack).words;
        }
      }
      __pipeline_commit();
    }
  }

  __device__ KeptSum sum() {
    KeptSum own;
    own.add(held_);
    __pipeline_wait_prior(2);
    add_group(own, 1);
    __pipeline_wait_prior(1);
    add_group(own, 2);
    __pipeline_wait_prior(0);
    add_group(own, 3);
    return own;
  }

  __device__ void write(const Probability<T>& probability) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < count_of(0)) write_pack(pack_of(0, i), held_[i], probability);
    for (int g = 1; count_of(g) > 0; ++g) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (i < count_of(g)) write_pack(pack_of(g, i), {*place_of(g, i)}, probability);
    }
  }

 private:
  __device__ static int pack_of(int group, int i) {
    return (group * kHeld + i) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  // How many packs of a group this thread has; 0 in the one behind the last.
  __device__ int count_of(int group) const {
    const int left = num_packs_ - pack_of(group, 0), threads = static_cast<int>(blockDim.x);
    return left <= 0 ? 0 : (left > (kHeld - 1) * threads) ? kHeld : (left > 2 * threads) ? 3 : left > threads ? 2 : 1;
  }
  __device__ uint4* place_of(int group, int i) const { return shared_ + pack_of(group - 1, i); }

  __device__ bool is_whole(int pack) const { return kIsWide && (pack + 1) * kColumns <= num_cols_; }
  __device__ Packed<T> whole(int pack) const { return {reinterpret_cast<const uint4*>(x_)[pack]}; }
  __device__ static Packed<T> nothing() {  // adds 0
    return Packed<T>::of([](int) { return -INFINITY; });
  }
  __device__ Packed<T> part(int pack) const {
    return Packed<T>::gather(x_, pack * kColumns, num_cols_, narrow<T>(-INFINITY));
  }

  __device__ void add_group(KeptSum& own, int group) const {
    const int count = count_of(group);
    if (count == 0) return;
#pragma unroll
    for (int first = 0; first < kHeld; first += kAddedTogether) {
      Packed<T> packs[kAddedTogether];
#pragma unroll
      for (int i = 0; i < kAddedTogether; ++i) {
        packs[i] = first + i < count ? Packed<T>{*place_of(group, first + i)} : nothing();
      }
      own.add(packs);
    }
  }

  __device__ void write_pack(int pack, const Packed<T>& from, const Probability<T>& probability) const {
    const Packed<T> to = Packed<T>::of([&](int n) { return probability(from[n]); });
    if (is_whole(pack)) {
      __stwb(reinterpret_cast<uint4*>(y_) + pack, to.words);
    } else {
      to.scatter(y_, pack * kColumns, num_cols_);
    }
  }

  const T* x_;
  T* y_;
  int num_cols_, num_packs_;
  uint4* shared_;
  Packed<T> held_[kHeld];
};

}  // namespace cuda
}  // namespace fastmoe_route
