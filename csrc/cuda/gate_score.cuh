// The score functions of the gate on one logit, their derivatives, and the memory of a row: what both passes share.
//
// The formulas are those of cpu/gate_score.h, which computes them on vectors. No score loses an expert to underflow:
// sigmoid is taken from e = exp(-|z|), and sqrtsoftplus far below zero is exp(z / 2), to which it rounds there.
#pragma once

#include "cuda/block.cuh"
#include "ops/gate.h"

namespace fastmoe_route {
namespace cuda {

constexpr float kLinear = -17.0f;  // below, e^z / 4 is less than half an ulp of 1
constexpr float kWeightFloor = 1e-20f;

__device__ inline float sigmoid(float z) {
  const float e = expf(-fabsf(z));
  return (z >= 0.0f ? 1.0f : e) / (1.0f + e);
}

__device__ inline float sqrt_softplus(float z) {
  if (z < kLinear) return expf(0.5f * z);
  const float softplus = log1pf(expf(-fabsf(z)));
  return sqrtf(z < 0.0f ? softplus : z + softplus);  // a NaN stays one
}

// Elementwise scores: everything but softmax.
__device__ inline float elementwise_score(Score score, float z) {
  switch (score) {
    case Score::kSigmoid: return sigmoid(z);
    case Score::kSqrtSoftplus: return sqrt_softplus(z);
    case Score::kRelu: return z <= 0.0f ? 0.0f : z;
    default: return z;
  }
}

// d score / d z; 0 at z = -inf.
__device__ inline float elementwise_slope(Score score, float z) {
  switch (score) {
    case Score::kSigmoid: {
      const float e = expf(-fabsf(z));
      return e / ((1.0f + e) * (1.0f + e));
    }
    case Score::kSqrtSoftplus: return z < kLinear ? 0.5f * expf(0.5f * z) : 0.5f * sigmoid(z) / sqrt_softplus(z);
    case Score::kRelu: return z > 0.0f ? 1.0f : z <= 0.0f ? 0.0f : z;
    default: return z == -INFINITY ? 0.0f : 1.0f;
  }
}

// exp(z - max) where max is the largest number of the row, or -inf if there is none; 0 for a NaN, so that the other
// columns stay ordered.
__device__ inline float exponential(float z, float max) {
  return isnan(z) ? 0.0f : expf(z - (max == -INFINITY ? 0.0f : max));
}

// Row t of an argument, element c.
template <class T, class S>
__device__ inline T element(const Strided<S>& matrix, int64_t t, int64_t c) {
  return static_cast<const T*>(static_cast<const void*>(matrix.data))[t * matrix.stride_row + c * matrix.stride_col];
}

// ---- The memory of rows in flight: words of 4 bytes, so many a warp, in shared memory if a block's fit there, else in
// scratch memory on the device, which few blocks then share by walking over the rows.

struct RowMemory {
  int shared_words;  // what the block shares, first
  int warp_words;
  int64_t block_words;  // of all
  int num_warps;
  bool in_shared;
  unsigned num_blocks;
  float* scratch;  // null if in_shared
};

constexpr int kGateWarps = 8;
constexpr int64_t kGateThreads = kGateWarps * kWarp;
constexpr int64_t kSharedWords = 12 * 1024;      // without being asked for
constexpr int64_t kMostSharedWords = 24 * 1024;  // what every architecture from sm_80 on gives a block that asks
constexpr int64_t kScratchBlocks = 256;

__device__ inline float* block_memory(const RowMemory& m) {
  extern __shared__ __align__(16) float shared[];
  return m.in_shared ? shared : m.scratch + blockIdx.x * m.block_words;
}

__device__ inline float* warp_memory(const RowMemory& m, int warp) {
  return block_memory(m) + (m.shared_words + warp * m.warp_words);
}

// The widest block whose rows fit. Depends on the shape only, so the order of sums does as well.
inline RowMemory plan_rows(int64_t warp_words, int64_t shared_words, int64_t wanted_blocks, const CudaQueue& queue) {
  RowMemory memory{};
  memory.shared_words = static_cast<int>(shared_words);
  memory.warp_words = static_cast<int>(warp_words);
  memory.num_warps = kGateWarps;
  const auto words = [&] { return shared_words + memory.num_warps * warp_words; };
  while (memory.num_warps > 1 && words() > kSharedWords) memory.num_warps /= 2;
  memory.block_words = words();
  memory.in_shared = memory.block_words <= kMostSharedWords;
  memory.num_blocks = num_blocks(wanted_blocks, 1);
  if (memory.in_shared) return memory;
  if (memory.num_blocks > kScratchBlocks) memory.num_blocks = kScratchBlocks;
  memory.scratch = queue.scratch_of<float>(memory.num_blocks * memory.block_words);
  return memory;
}

// Launches kernel(args) with the memory planned for it.
template <class Args>
CudaStatus launch_rows(void (*kernel)(Args), const Args& args, const RowMemory& memory, const CudaQueue& queue) {
  const size_t bytes = memory.in_shared ? memory.block_words * sizeof(float) : 0;
  if (bytes > kSharedWords * sizeof(float)) {
    const CudaStatus status = status_of(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    if (status.code != 0) return status;
  }
  kernel<<<memory.num_blocks, memory.num_warps * kWarp, bytes, queue.stream>>>(args);
  return launched();
}

}  // namespace cuda
}  // namespace fastmoe_route
