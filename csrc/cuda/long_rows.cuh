// What the softmaxes of long rows are made of: 16 bytes of elements as they lie in memory, and exponentials.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

// Elements that lie in registers as they lie in memory: one of 16 bits is widened from its half in one instruction,
// where an array of them would first be taken apart.
template <class T>
struct Packed {
  static constexpr int kColumns = 16 / sizeof(T);
  uint4 words;

  // i is known when it is compiled.
  __device__ accumulate_t<T> operator[](int i) const {
    if constexpr (sizeof(T) == 8) {
      return i == 0 ? __hiloint2double(static_cast<int>(words.y), static_cast<int>(words.x))
                    : __hiloint2double(static_cast<int>(words.w), static_cast<int>(words.z));
    } else if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word(i));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return __uint_as_float(i % 2 == 0 ? word(i / 2) << 16 : word(i / 2) & 0xffff0000u);
    } else {
      const unsigned pair = word(i / 2);
      __half2 halves;
      memcpy(&halves, &pair, sizeof halves);
      return i % 2 == 0 ? __low2float(halves) : __high2float(halves);
    }
  }

  // f(0), f(1), ..., rounded to T.
  template <class F>
  __device__ static Packed of(const F& f) {
    Packed packed;
    if constexpr (std::is_same_v<T, BFloat16>) {
      packed.words = words_of([&](int i) { return __floats2bfloat162_rn(f(2 * i), f(2 * i + 1)); });
    } else if constexpr (std::is_same_v<T, Float16>) {
      packed.words = words_of([&](int i) { return __floats2half2_rn(f(2 * i), f(2 * i + 1)); });
    } else {
      static_assert(std::is_same_v<T, float>, "a type that rows of a block have");
      packed.words = words_of(f);
    }
    return packed;
  }

  // The columns from `column` on, one by one; `none` where they are at `end` or past it.
  __device__ static Packed gather(const T* row, int64_t column, int64_t end, T none) {
    Pack<T, kColumns> values;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) values.values[n] = column + n < end ? row[column + n] : none;
    Packed packed;
    memcpy(&packed, &values, sizeof packed);
    return packed;
  }

  // The reverse.
  __device__ void scatter(T* row, int64_t column, int64_t end) const {
    Pack<T, kColumns> values;
    memcpy(&values, this, sizeof values);
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      if (column + n < end) row[column + n] = values.values[n];
  }

 private:
  template <class F>
  __device__ static uint4 words_of(const F& f) {
    const auto bits = [&](int i) {
      const auto value = f(i);
      unsigned word;
      static_assert(sizeof value == sizeof word);
      memcpy(&word, &value, sizeof word);
      return word;
    };
    return {bits(0), bits(1), bits(2), bits(3)};
  }
  __device__ unsigned word(int i) const { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }
};

// Whether rows of T, a stride apart, may be read and written kWideBytes at a time.
template <class T>
bool rows_are_wide(const void* rows, int64_t stride, int64_t num_rows) {
  return are_multiples(kWideBytes, {rows}, {num_rows > 1 ? stride : 0}, sizeof(T));
}

constexpr float kLog2E = 1.4426950408889634f;

// 2^y; 0 where that is below the smallest normal number.
__device__ inline float power_of_two(float y) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
}

// e^y for a term of a sum whose largest is 1: off by 2^-22 and |y| 2^-24, relative, and 0 below 2^-126. As the mean of
// |y| over a row, weighted by e^y, is at most the log of its length, the error of the sum stays within C + 8 roundings.
__device__ inline float exponential_term(float y) { return power_of_two(y * kLog2E); }
__device__ inline double exponential_term(double y) { return exp(y); }

}  // namespace cuda
}  // namespace fastmoe_route
