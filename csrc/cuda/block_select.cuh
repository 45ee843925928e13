// The k best elements of a block by (value, column), exactly. Keys are a value's bits made monotone, NaN below numbers.
//
// A floor that k elements reach comes from every warp's best threads, and what reaches it is found, in any order. Where
// that is too much, as in a row of few values, a radix select, 8 bits a pass, gives the k-th key, and a second one the
// last column of its equals that is taken. Atomics say where what is found lies, not what is found.
#pragma once

#include <type_traits>

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

constexpr int kSelectThreads = 256;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kMostFound = kSelectThreads;  // ranked by counting, one a thread
constexpr int kBins = 256;                  // of a radix select

// Keys order as values do: 0 is no element, 1 is NaN, both zeros share one.
__device__ inline uint32_t rising_key(float value) {
  if (isnan(value)) return 1;
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t rising_key(double value) {
  if (isnan(value)) return 1;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  return (bits >> 63) != 0 ? ~bits : bits | (uint64_t{1} << 63);
}
__device__ inline float key_value(uint32_t key) {
  if (key <= 1) return NAN;
  return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}
__device__ inline double key_value(uint64_t key) {
  if (key <= 1) return NAN;
  return __longlong_as_double(static_cast<long long>((key >> 63) != 0 ? key & ~(uint64_t{1} << 63) : ~key));
}

template <class T>
using KeyOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// A chosen element, or one that may be.
template <class Key>
struct alignas(2 * sizeof(Key)) Entry {
  Key key;
  int32_t column;
};
template <class Key>
__device__ inline bool goes_before(const Entry<Key>& a, const Entry<Key>& b) {
  return a.key > b.key || (a.key == b.key && a.column < b.column);
}

// Shared memory of a selection.
template <class Key>
struct Selection {
  Entry<Key> found[kMostFound];  // what reaches the floor, in any order
  int count;                     // how many do; those beyond kMostFound are not kept
  Key floors[kSelectWarps];
  int bins[kBins];  // of a radix select
  int warp_counts[kSelectWarps];
  int digit, rest;  // what the owner of the digit found

  __device__ void add(Key key, int32_t column) {
    const int at = atomicAdd(&count, 1);
    if (at < kMostFound) found[at] = {key, column};
  }
};

// The largest of the warp's keys, in every lane.
__device__ inline uint32_t largest_key(uint32_t key) { return __reduce_max_sync(kAllLanes, key); }
__device__ inline uint64_t largest_key(uint64_t key) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, key, mask);
    key = other > key ? other : key;
  }
  return key;
}

// The n-th largest of the warp's keys, given the largest.
template <class Key>
__device__ inline Key nth_key(Key key, Key largest, int n) {
  for (; n > 1; --n) {
    const unsigned owners = __ballot_sync(kAllLanes, key == largest);
    if (lane_index() == __ffs(static_cast<int>(owners)) - 1) key = 0;
    largest = largest_key(key);
  }
  return largest;
}

// A key that k of the block's keys reach, or 0; s.floors holds the ceil(k / kSelectWarps)-th of every warp.
template <class Key>
__device__ inline Key lowest_floor(const Selection<Key>& s) {
  Key floor = s.floors[0];
#pragma unroll
  for (int w = 1; w < kSelectWarps; ++w) floor = s.floors[w] < floor ? s.floors[w] : floor;
  return floor;
}
__device__ inline int floor_rank(int k) { return (k + kSelectWarps - 1) / kSelectWarps; }

// The largest digit so that the elements of it and of larger ones number at least `rest`; `rest` becomes what is to be
// taken of that digit's own. s.bins holds the counts and is cleared. All threads, behind a barrier; there are at least
// `rest` elements.
template <class Key>
__device__ int pick_digit(Selection<Key>& s, int& rest) {
  // Thread i looks at bin 255 - i: a scan over threads counts from the largest digit down.
  const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
  const int own = s.bins[bin];
  s.bins[bin] = 0;
  int before = warp_prefix_sum(own);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (lane_index() == kWarp - 1) s.warp_counts[warp] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp; ++w) before += s.warp_counts[w];
  if (before < rest && before + own >= rest) {
    s.digit = bin;
    s.rest = rest - before;
  }
  __syncthreads();
  rest = s.rest;
  return s.digit;
}

// The `rest`-th largest word among those that each(visit) visits, which number at least `rest`; `rest` is then how many
// equal to it are to be taken. All threads, behind a barrier.
template <int kBits, class Word, class Key, class Each>
__device__ Word select_word(Selection<Key>& s, int& rest, const Each& each) {
  Word prefix = 0, known = 0;
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    each([&](Word word) {
      if ((word & known) == prefix) atomicAdd(&s.bins[static_cast<int>(word >> shift) & (kBins - 1)], 1);
    });
    __syncthreads();
    prefix |= static_cast<Word>(pick_digit(s, rest)) << shift;
    known |= Word{kBins - 1} << shift;
  }
  return prefix;
}

// Leaves in s.found the k best of the elements that each(visit) visits, of which the block has more than k. All
// threads; its barriers come between a look at s.count and the first write to it.
template <class Key, class Each>
__device__ void select_exactly(Selection<Key>& s, int k, const Each& each) {
  static_assert(kSelectThreads == kBins, "a thread a bin");
  constexpr int kKeyBits = static_cast<int>(sizeof(Key)) * 8;
  s.bins[threadIdx.x] = 0;
  __syncthreads();
  int rest = k;
  const Key last =
      select_word<kKeyBits, Key>(s, rest, [&](const auto& visit) { each([&](Key key, int32_t) { visit(key); }); });
  // Columns inverted, so that the largest word is the lowest column.
  const uint32_t last_column = ~select_word<32, uint32_t>(s, rest, [&](const auto& visit) {
    each([&](Key key, int32_t column) {
      if (key == last) visit(~static_cast<uint32_t>(column));
    });
  });
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  each([&](Key key, int32_t column) {  // true for k of them
    if (key > last || (key == last && static_cast<uint32_t>(column) <= last_column))
      s.found[atomicAdd(&s.count, 1)] = {key, column};
  });
  __syncthreads();
}

}  // namespace cuda
}  // namespace fastmoe_route
