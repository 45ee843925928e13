// Floating point as PTX has it: canonical NaN, flushing of subnormals, half types, roundings.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ptxvm {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline double as_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline uint64_t as_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

constexpr uint32_t kNaN32 = 0x7fffffffu;
constexpr uint16_t kNaN16 = 0x7fff;

inline float canonical(float value) { return value == value ? value : as_float(kNaN32); }
inline double canonical(double value) { return value; }

// Subnormals become zeros of the same sign.
inline float flushed(float value) {
  return (as_bits(value) & 0x7f800000u) == 0 ? as_float(as_bits(value) & 0x80000000u) : value;
}
inline double flushed(double value) { return value; }

// ---- Half types as bits.

inline float from_bfloat(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
inline float from_half(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

enum Rounding : uint8_t { kNearest, kZero, kDown, kUp };

inline uint16_t to_bfloat(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return kNaN16;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t to_half(float value) {
  if (value != value) return kNaN16;
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
// Toward zero, to infinity kept: for cvt.rz.
inline uint16_t to_bfloat_rz(float value) {
  return value != value ? kNaN16 : static_cast<uint16_t>(as_bits(value) >> 16);
}
inline uint16_t to_half_rz(float value) {
  if (value != value) return kNaN16;
  uint16_t bits = to_half(value);
  if (std::fabs(from_half(bits)) > std::fabs(value)) --bits;  // one step toward zero; from infinity to the largest
  return bits;
}

// A double that stands for an exact value between doubles by having its last bit set: rounding it once more, to fewer
// bits, gives what rounding the exact value would.
inline double rounded_to_odd(double sum, double error) {
  if (error == 0 || !std::isfinite(sum)) return sum;
  uint64_t bits = as_bits(sum);
  if ((bits & 1) == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
  return as_double(bits);
}
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  const double of_b = sum - a;
  const double error = (a - (sum - of_b)) + (b - of_b);
  return rounded_to_odd(sum, error);
}
// To bfloat16 from a double, rounded once.
inline uint16_t to_bfloat(double value) {
  if (value != value) return kNaN16;
  float narrow = static_cast<float>(value);
  if (static_cast<double>(narrow) != value && std::isfinite(narrow)) {  // to odd, in float
    uint32_t bits = as_bits(narrow);
    const bool is_beyond = std::fabs(static_cast<double>(narrow)) > std::fabs(value);
    if (is_beyond) --bits;
    bits |= 1;
    narrow = as_float(bits);
  }
  return to_bfloat(narrow);
}
inline uint16_t to_half(double value) {
  if (value != value) return kNaN16;
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

// A double that has its last bit set where it stands for more, as a float rounded in a direction.
inline float directed(double exact, Rounding mode) {
  const float nearest = static_cast<float>(exact);
  const double back = static_cast<double>(nearest);
  const bool is_negative = std::signbit(exact);
  const bool down = mode == kDown || (mode == kZero && !is_negative),
             up = mode == kUp || (mode == kZero && is_negative);
  uint32_t bits = as_bits(nearest);
  if (down && back > exact) bits = nearest > 0 ? bits - 1 : nearest < 0 ? bits + 1 : 0x80000001u;
  if (up && back < exact) bits = nearest < 0 ? bits - 1 : nearest > 0 ? bits + 1 : 1u;
  return as_float(bits);
}

// 2^x for a float's range, correct to about 2^-50: |x - n| <= 1/2, then the series of e^(y ln 2).
inline double exp2_of(double x) {
  const double bounded = x > 400.0 ? 400.0 : x < -400.0 ? -400.0 : x;
  const double n = std::nearbyint(bounded);
  const double y = (bounded - n) * 0.693147180559945309417;
  double p = 1.0 / 479001600.0;
  p = p * y + 1.0 / 39916800.0;
  p = p * y + 1.0 / 3628800.0;
  p = p * y + 1.0 / 362880.0;
  p = p * y + 1.0 / 40320.0;
  p = p * y + 1.0 / 5040.0;
  p = p * y + 1.0 / 720.0;
  p = p * y + 1.0 / 120.0;
  p = p * y + 1.0 / 24.0;
  p = p * y + 1.0 / 6.0;
  p = p * y + 0.5;
  p = p * y + 1.0;
  p = p * y + 1.0;
  const int64_t exponent = static_cast<int64_t>(n);  // of a NaN: anything
  const double scaled = p * as_double(static_cast<uint64_t>(exponent + 1023) << 52);
  return x == x ? scaled : x;
}

struct RoundingMode {
  explicit RoundingMode(Rounding mode) : before(std::fegetround()) {
    static const int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    std::fesetround(kModes[mode]);
  }
  ~RoundingMode() { std::fesetround(before); }
  int before;
};

}  // namespace ptxvm
