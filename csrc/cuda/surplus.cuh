// Stable sorts of slots by 64-bit keys, and the slots that come after the first `capacity` of their group.
#pragma once

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

// Bits [begin, end) of a key.
struct KeyBits {
  int begin, end;
};

// Slots and their keys, twice: a sort writes the other copy and names it as the current one.
struct KeyedSlots {
  int64_t count;
  uint64_t* keys;
  int32_t* slots;
  uint64_t* other_keys;
  int32_t* other_slots;

  KeyedSlots(int64_t num_slots, const CudaQueue& queue);

  // By these bits of the keys, least digit first, so that equal keys keep their order.
  CudaStatus sort(KeyBits bits, const CudaQueue& queue);
  // Of sorted ones: is_surplus[slot] = 1 if `capacity` slots with its key come before it, else 0.
  CudaStatus mark_surplus(int64_t capacity, uint8_t* is_surplus, const CudaQueue& queue) const;
};

// Those of 0 ... largest.
inline KeyBits bits_of(uint64_t largest) {
  KeyBits bits{0, 1};
  while (bits.end < 64 && largest >> bits.end != 0) ++bits.end;
  return bits;
}

// Numbers as unsigned ones in falling order: larger first, both zeros equal, NaN last. A narrow one keeps its order as
// a float.
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
// Those that order them: bits of the mantissa that a narrow number lacks are alike in all of one sign.
inline KeyBits falling_key_bits(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return {0, 64};
    case DType::kBFloat16: return {16, 32};
    case DType::kFloat16: return {13, 32};
    default: return {0, 32};
  }
}

}  // namespace cuda
}  // namespace fastmoe_route
