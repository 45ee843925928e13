// One double with the interface of Vec: what a kernel written on vectors needs to run in float64 for gradient checks.
#pragma once

#include "cpu/isa/math.h"

FASTMOE_ROUTE_ISA_BEGIN

struct Mask64 {
  bool bits;
  friend Mask64 operator&(Mask64 a, Mask64 b) { return {a.bits && b.bits}; }
  friend Mask64 operator|(Mask64 a, Mask64 b) { return {a.bits || b.bits}; }
  friend Mask64 operator~(Mask64 a) { return {!a.bits}; }
  uint32_t lanes() const { return bits ? 1u : 0u; }
};

struct Vec64 {
  static constexpr int kLanes = 1;
  double v;

  static Vec64 zero() { return {0.0}; }
  static Vec64 all(double x) { return {x}; }
  static Vec64 load(const double* p) { return {*p}; }
  static Vec64 load(const double* p, int n, double fill = 0.0) { return {n > 0 ? *p : fill}; }
  void store(double* p) const { *p = v; }
  void store(double* p, int n) const {
    if (n > 0) *p = v;
  }

  friend Vec64 operator+(Vec64 a, Vec64 b) { return {a.v + b.v}; }
  friend Vec64 operator-(Vec64 a, Vec64 b) { return {a.v - b.v}; }
  friend Vec64 operator*(Vec64 a, Vec64 b) { return {a.v * b.v}; }
  friend Vec64 operator/(Vec64 a, Vec64 b) { return {a.v / b.v}; }
  friend Vec64 fma(Vec64 a, Vec64 b, Vec64 c) { return {std::fma(a.v, b.v, c.v)}; }
  friend Vec64 max(Vec64 a, Vec64 b) { return {a.v > b.v ? a.v : b.v}; }
  friend Vec64 min(Vec64 a, Vec64 b) { return {a.v < b.v ? a.v : b.v}; }
  friend Vec64 sqrt(Vec64 a) { return {std::sqrt(a.v)}; }
  friend Vec64 negative_abs(Vec64 a) { return {-std::fabs(a.v)}; }
  friend Vec64 reciprocal(Vec64 a) { return {1 / a.v}; }
  friend Vec64 exp(Vec64 a) { return {std::exp(a.v)}; }
  friend Vec64 exp_nonpositive(Vec64 a) { return {std::exp(a.v)}; }
  friend Vec64 product_gradual(Vec64 a, Vec64 b) { return {a.v * b.v}; }
  friend Vec64 log_positive(Vec64 a) { return {std::log(a.v)}; }
  friend Vec64 log1p_positive(Vec64 a) { return {std::log1p(a.v)}; }

  friend Mask64 operator<(Vec64 a, Vec64 b) { return {a.v < b.v}; }
  friend Mask64 operator>(Vec64 a, Vec64 b) { return {a.v > b.v}; }
  friend Mask64 operator>=(Vec64 a, Vec64 b) { return {a.v >= b.v}; }
  friend Mask64 operator==(Vec64 a, Vec64 b) { return {a.v == b.v}; }
  friend Mask64 is_nan(Vec64 a) { return {a.v != a.v}; }
  friend Vec64 select(Mask64 m, Vec64 yes, Vec64 no) { return m.bits ? yes : no; }
  friend double reduce_max(Vec64 a) { return a.v; }
  friend double reduce_add(Vec64 a) { return a.v; }
};

template <Below = Below::kAny>
inline Vec64 exp_of_difference(Vec64 a) {
  return {std::exp(a.v)};
}

struct Keys64 {
  static constexpr int kLanes = 1;
  int64_t v;

  static Keys64 load(const int64_t* p) { return {*p}; }
  static Keys64 all(int64_t x) { return {x}; }
  void store(int64_t* p) const { *p = v; }
  friend Keys64 max(Keys64 a, Keys64 b) { return a.v > b.v ? a : b; }
  friend Keys64 min(Keys64 a, Keys64 b) { return a.v < b.v ? a : b; }
  friend uint32_t equal_lanes(Keys64 a, Keys64 b) { return a.v == b.v ? 1u : 0u; }
  friend Keys64 spread_max(Keys64 a) { return a; }
  friend Keys64 even_lanes(Keys64 a, Keys64) { return a; }
  friend Keys64 odd_lanes(Keys64, Keys64 b) { return b; }
  int64_t first() const { return v; }
  friend Keys64 select_lanes(uint32_t lanes, Keys64 yes, Keys64 no) { return lanes != 0 ? yes : no; }
  friend Keys64 select(Mask64 m, Keys64 yes, Keys64 no) { return m.bits ? yes : no; }
  static Keys64 of_bits(Vec64 x) {
    Keys64 result;
    std::memcpy(&result.v, &x.v, sizeof result.v);
    return result;
  }
  Keys64 flip_negative() const { return {v ^ ((v >> 63) & INT64_MAX)}; }
  Vec64 as_floats() const {
    Vec64 result;
    std::memcpy(&result.v, &v, sizeof v);
    return result;
  }
};

// What a kernel on elements T computes with.
template <class T>
using vector_t = std::conditional_t<std::is_same<T, double>::value, Vec64, Vec>;

FASTMOE_ROUTE_ISA_END
