// The element types kernels see, by the numbers of the one dtype switch (dispatch_float, below), and their conversions.
// All static: each instruction-set level compiles this file, and a copy shared by the linker would leak across levels.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastmoe_route {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Storage types: bits only, arithmetic is done in float. Conversions round to nearest even; NaN stays NaN.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(float value) { return value; }
static inline double to_float(double value) { return value; }
static inline float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
static inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));  // inf, NaN
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // units of 2^-24
  return sign != 0 ? -subnormal : subnormal;
}

template <class T>
static T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline double from_float<double>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or above
  if (magnitude < 0x38800000u) {  // subnormal result: let float addition round at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}
// A double goes to a narrower type through its one rounding to float, except to double itself.
template <class T>
static inline T from_float(double value) {
  return from_float<T>(static_cast<float>(value));
}
template <>
inline double from_float<double>(double value) {
  return value;
}

// Arithmetic type of an element type: float, or double for double.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateType<T>::type;

static inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The one dtype switch: calls body(T{}) with the storage type of `dtype`.
template <class F>
static inline void dispatch_float(DType dtype, F&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
    case DType::kFloat64: return body(double{});
  }
}

}  // namespace fastmoe_route
