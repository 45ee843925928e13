// What every CUDA kernel here is made of: storage types on the device, reductions over a warp and a block, launches.
//
// Reductions are butterflies or fixed trees, never atomics: the same bits on every run. Every function that says "warp"
// must be reached by all 32 lanes, every one that says "block" by all threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "common/cuda_queue.h"
#include "common/dtype.h"

namespace fastmoe_route {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x / kWarp); }  // in the block
__device__ inline unsigned lanes_before() { return (1u << lane_index()) - 1u; }       // this one, a bit each

// ---- Storage types. Arithmetic is in float for all but double.

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

// Rounds to nearest even; NaN stays NaN.
template <class T>
__device__ T narrow(accumulate_t<T> value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline double narrow<double>(double value) {
  return value;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline Float16 narrow<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// N elements that are loaded and stored at once; their address must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// Stores a pack of 16 bytes as one word: an assignment of its elements the compiler may take apart.
template <class T, int N>
__device__ inline void store_pack(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    uint4 word;
    memcpy(&word, &pack, sizeof word);
    __stwb(reinterpret_cast<uint4*>(to), word);
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}

// Element i of a vector whose type is known at run time only: one per slot, so the branch costs nothing.
template <class Float>
__device__ inline Float load_as(const void* from, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<Float>(static_cast<const float*>(from)[i]);
    case DType::kBFloat16: return static_cast<Float>(widen(static_cast<const BFloat16*>(from)[i]));
    case DType::kFloat16: return static_cast<Float>(widen(static_cast<const Float16*>(from)[i]));
    default: return static_cast<Float>(static_cast<const double*>(from)[i]);
  }
}
template <class Float>
__device__ inline void store_as(void* to, DType dtype, int64_t i, Float value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(to)[i] = static_cast<float>(value); return;
    case DType::kBFloat16: static_cast<BFloat16*>(to)[i] = narrow<BFloat16>(static_cast<float>(value)); return;
    case DType::kFloat16: static_cast<Float16*>(to)[i] = narrow<Float16>(static_cast<float>(value)); return;
    default: static_cast<double*>(to)[i] = static_cast<double>(value);
  }
}

// ---- Reductions. A butterfly adds the same pairs in every lane, so all lanes get the same bits.

// The value of the lane whose index differs in `mask`. In a float's register, where the intrinsic goes by integers.
template <int mask>
__device__ inline float shuffle_xor(float value) {
  float other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(other) : "f"(value), "n"(mask));
  return other;
}
template <int mask>
__device__ inline double shuffle_xor(double value) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

template <class Float>
__device__ inline Float warp_sum(Float value) {
  value += shuffle_xor<16>(value);
  value += shuffle_xor<8>(value);
  value += shuffle_xor<4>(value);
  value += shuffle_xor<2>(value);
  value += shuffle_xor<1>(value);
  return value;
}

// The largest number; a NaN loses against every number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
template <class Float>
__device__ inline Float warp_max(Float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

// The sum over the lanes up to this one.
template <class Int>
__device__ inline Int warp_prefix_sum(Int value) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Int other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane_index() >= distance) value += other;
  }
  return value;
}

// The sum over the block, in every thread. `partial` holds one value a warp; it may be written again after a barrier of
// the block, such as that of a reduction through another array.
template <class Float>
__device__ inline Float block_sum(Float value, Float* partial) {
  value = warp_sum(value);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  if (lane_index() == 0) partial[warp] = value;
  __syncthreads();
  Float total = 0;
  for (int w = 0; w < num_warps; ++w) total += partial[w];
  return total;
}

// Likewise the largest number.
template <class Float>
__device__ inline Float block_max(Float value, Float* partial) {
  value = warp_max(value);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  if (lane_index() == 0) partial[warp] = value;
  __syncthreads();
  Float best = partial[0];
  for (int w = 1; w < num_warps; ++w) best = larger(best, partial[w]);
  return best;
}

// ---- Launches.

// The runtime keeps the newest error for whoever asks next: it is taken back, so that the next call does not report it.
inline CudaStatus status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return {static_cast<int>(error), cudaGetErrorString(error)};
}
// Of the launch just made.
inline CudaStatus launched() { return status_of(cudaGetLastError()); }
inline CudaStatus not_supported(const char* text) { return {static_cast<int>(cudaErrorNotSupported), text}; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kWideBytes = 16;  // of the widest load or store of a thread

// Whether addresses, and sizes and strides in elements, are all multiples of that many bytes.
inline bool are_multiples(int64_t bytes, std::initializer_list<const void*> addresses,
                          std::initializer_list<int64_t> sizes, int64_t element_bytes) {
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) return false;
  for (const int64_t size : sizes)
    if (size * element_bytes % bytes != 0) return false;
  return true;
}

// Blocks for `count` items, `per_block` at a time; kernels walk on by the size of the grid if there are more.
inline unsigned num_blocks(int64_t count, int64_t per_block) {
  const int64_t blocks = ceil_div(count, per_block);
  return static_cast<unsigned>(blocks < INT_MAX ? blocks : INT_MAX);
}

// This thread among all of the grid's, and their number; its warp, and theirs.
__device__ inline int64_t grid_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
__device__ inline int64_t grid_warp() { return grid_thread() / kWarp; }
__device__ inline int64_t grid_warps() { return grid_threads() / kWarp; }

// f(0), ..., f(count - 1), one a thread where the grid has as many. Its loop stays as it is: to take four turns at once
// the compiler would have every thread divide, and there is one.
template <class F>
__device__ inline void each_of_grid(int64_t count, const F& f) {
#pragma unroll 1
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) f(i);
}

}  // namespace cuda
}  // namespace fastmoe_route
