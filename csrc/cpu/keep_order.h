// In which order slots that want the same expert are kept: unsigned keys, smaller ones first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace fastmoe_route {

// By score: larger weights first, both zeros equal, NaN last.
template <class T>
static inline uint64_t falling_key(T stored) {
  const double value = static_cast<double>(to_float(stored)) + 0.0;
  if (std::isnan(value)) return ~uint64_t{0};
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits >> 63) != 0 ? bits : ~bits & ~(uint64_t{1} << 63);
}

// By position: first choices before second choices, then lower tokens.
static inline uint64_t position_key(uint32_t choice, uint32_t token) { return uint64_t{choice} << 32 | token; }

}  // namespace fastmoe_route
