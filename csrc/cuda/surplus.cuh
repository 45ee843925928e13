// Stable sorts of slots by 64-bit keys, and the slots that come after the first `capacity` of their group.
#pragma once

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

// Slots and their keys, twice: a sort writes the other copy and names it as the current one.
struct KeyedSlots {
  int64_t count;
  uint64_t* keys;
  int32_t* slots;
  uint64_t* other_keys;
  int32_t* other_slots;

  KeyedSlots(int64_t num_slots, const CudaQueue& queue);

  // By the low `bits` of the keys, least digit first, so that equal keys keep their order.
  CudaStatus sort(int bits, const CudaQueue& queue);
  // Of sorted ones: is_surplus[slot] = 1 if `capacity` slots with its key come before it, else 0.
  CudaStatus mark_surplus(int64_t capacity, uint8_t* is_surplus, const CudaQueue& queue) const;
};

// Bits that hold 0 ... largest.
inline int bits_of(uint64_t largest) {
  int bits = 1;
  while (bits < 64 && largest >> bits != 0) ++bits;
  return bits;
}

// Numbers as unsigned ones in falling order: larger first, both zeros equal, NaN last. A narrow one keeps its order as
// a float, which needs 32 bits.
__device__ inline uint64_t falling_key(const void* values, DType dtype, int64_t at) {
  if (dtype == DType::kFloat64) {
    const double value = static_cast<const double*>(values)[at] + 0.0;
    if (isnan(value)) return ~uint64_t{0};
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value));
    return (bits >> 63) != 0 ? bits : ~bits & ~(uint64_t{1} << 63);
  }
  const float value = load_as<float>(values, dtype, at) + 0.0f;
  if (isnan(value)) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(value);
  return (bits >> 31) != 0 ? bits : ~bits & 0x7fffffffu;
}
inline int falling_key_bits(DType dtype) { return dtype == DType::kFloat64 ? 64 : 32; }

}  // namespace cuda
}  // namespace fastmoe_route
