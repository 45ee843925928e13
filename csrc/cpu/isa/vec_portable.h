// Vec and Keys of 8 lanes, see vec.h: the compiler's own vectors, lowered to whatever the target has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/isa/namespace.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr bool kHasFloat64 = true;  // see dispatch_element

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));

struct Mask {
  Int8 bits;
  friend Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
  friend Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
  friend Mask operator~(Mask a) { return {~a.bits}; }
  uint32_t lanes() const {
    uint32_t result = 0;
    for (int i = 0; i < 8; ++i) result |= (bits[i] != 0 ? 1u : 0u) << i;
    return result;
  }
};

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 8;
  static constexpr bool kLooksUp = false;
  Float8 v;

  static Vec zero() { return all(0.0f); }
  static Vec all(float x) { return {Float8{x, x, x, x, x, x, x, x}}; }
  template <class T>
  FASTMOE_ROUTE_OUTLINED static Vec load(const T* p) {
    Vec result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = to_float(p[i]);
    return result;
  }
  static Vec load(const float* p) {
    Vec result;
    std::memcpy(&result.v, p, sizeof result.v);
    return result;
  }
  template <class T>
  FASTMOE_ROUTE_OUTLINED static Vec load(const T* p, int n, float fill = 0.0f) {
    Vec result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = i < n ? to_float(p[i]) : fill;
    return result;
  }
  FASTMOE_ROUTE_OUTLINED static Vec load_alternate(const BFloat16* p, int odd, int n = 2 * kLanes) {
    Vec result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = 2 * i + odd < n ? to_float(p[2 * i + odd]) : 0.0f;
    return result;
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  template <class T>
  void store(T* p) const {
    store(p, kLanes);
  }
  template <class T>
  FASTMOE_ROUTE_OUTLINED void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(static_cast<float>(v[i]));
  }
  static constexpr bool kStreams = false;
  template <class T>
  void stream(T* p) const {
    store(p);
  }
  static void stream_fence() {}

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  friend Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  friend Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  friend Vec sqrt(Vec a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = std::sqrt(static_cast<float>(a.v[i]));
    return a;
  }
  friend Vec abs(Vec a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = std::fabs(static_cast<float>(a.v[i]));
    return a;
  }
  friend Vec negative_abs(Vec a) { return Vec::zero() - abs(a); }
  friend Vec reciprocal(Vec a) { return {1.0f / a.v}; }
  friend Vec ldexp(Vec a, Vec n) {
    // As with AVX2; a NaN exponent becomes -252, and the NaN is in a.
    const Vec bounded = min(max(n, all(-252.0f)), all(254.0f));
    const Int8 whole = __builtin_convertvector(bounded.v, Int8);
    const Int8 half = whole >> 1;
    return {a.v * power(half) * power(whole - half)};
  }
  friend Vec integer_bits(Vec a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = std::nearbyint(static_cast<float>(a.v[i]));
    return {reinterpret_cast<Float8>(__builtin_convertvector(min(max(a, all(-1e9f)), all(1e9f)).v, Int8))};
  }
  friend Vec product_gradual(Vec a, Vec b) { return a * b; }
  friend void frexp(Vec x, Vec& mantissa, Vec& exponent) {
    for (int i = 0; i < kLanes; ++i) {
      int power;
      mantissa.v[i] = 2.0f * std::frexp(static_cast<float>(x.v[i]), &power);
      exponent.v[i] = static_cast<float>(power - 1);
    }
  }

  static Float8 power(Int8 n) { return reinterpret_cast<Float8>((n + 127) << 23); }

  friend Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend Mask operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend Mask operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
  friend Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
  friend Mask is_nan(Vec a) { return {a.v != a.v}; }
  friend Vec select(Mask m, Vec yes, Vec no) { return {m.bits ? yes.v : no.v}; }

  friend float reduce_max(Vec a) {
    float result = a.v[0];
    for (int i = 1; i < kLanes; ++i) result = result > a.v[i] ? result : a.v[i];
    return result;
  }
  friend float reduce_add(Vec a) {
    const float quad[4] = {a.v[0] + a.v[4], a.v[1] + a.v[5], a.v[2] + a.v[6], a.v[3] + a.v[7]};
    return (quad[0] + quad[2]) + (quad[1] + quad[3]);
  }
};

struct Keys {
  static constexpr int kLanes = 8;
  Int8 v;

  static Keys load(const int32_t* p) {
    Keys result;
    std::memcpy(&result.v, p, sizeof result.v);
    return result;
  }
  static Keys all(int32_t x) { return {Int8{x, x, x, x, x, x, x, x}}; }
  void store(int32_t* p) const { std::memcpy(p, &v, sizeof v); }
  friend Keys max(Keys a, Keys b) { return {a.v > b.v ? a.v : b.v}; }
  friend Keys min(Keys a, Keys b) { return {a.v < b.v ? a.v : b.v}; }
  friend uint32_t equal_lanes(Keys a, Keys b) { return Mask{a.v == b.v}.lanes(); }
  friend Keys spread_max(Keys a) {
    int32_t result = a.v[0];
    for (int i = 1; i < kLanes; ++i) result = result > a.v[i] ? result : a.v[i];
    return all(result);
  }
  int32_t first() const { return v[0]; }
  friend Keys select_lanes(uint32_t lanes, Keys yes, Keys no) {
    for (int i = 0; i < kLanes; ++i)
      if ((lanes >> i) & 1u) no.v[i] = yes.v[i];
    return no;
  }
  friend Keys select(Mask m, Keys yes, Keys no) { return {m.bits ? yes.v : no.v}; }
  static Keys count() { return {Int8{0, 1, 2, 3, 4, 5, 6, 7}}; }
  friend Keys operator+(Keys a, Keys b) { return {a.v + b.v}; }
  friend Keys operator-(Keys a, Keys b) { return {a.v - b.v}; }
  friend Keys operator~(Keys a) { return {~a.v}; }
  friend Keys even_lanes(Keys a, Keys b) { return {__builtin_shuffle(a.v, b.v, Int8{0, 2, 4, 6, 8, 10, 12, 14})}; }
  friend Keys odd_lanes(Keys a, Keys b) { return {__builtin_shuffle(a.v, b.v, Int8{1, 3, 5, 7, 9, 11, 13, 15})}; }
  friend uint32_t greater_lanes(Keys a, Keys b) { return Mask{a.v > b.v}.lanes(); }
  friend Keys count_greater(Keys x, Keys a, Keys b) { return {x.v - (a.v > b.v)}; }
  void store_lanes(uint32_t lanes, int32_t* p) const {
    for (; lanes != 0; lanes &= lanes - 1) *p++ = v[__builtin_ctz(lanes)];
  }
  static Keys of_bits(Vec x) {
    Keys result;
    std::memcpy(&result.v, &x.v, sizeof result.v);
    return result;
  }
  static constexpr bool kSortsByPlace = false, kGathers = false;
  Keys flip_negative() const { return {v ^ ((v >> 31) & 0x7fffffff)}; }
  Vec as_floats() const {
    Vec result;
    std::memcpy(&result.v, &v, sizeof v);
    return result;
  }
};

// By the signs of id + 1 and last - id: the oldest processors compare neither 64 bits nor unsigned numbers.
template <class Id>
inline bool are_ids_within(const Id* p, Id last) {
  using Bits = std::make_unsigned_t<Id>;
  Bits bits = 0;
  for (size_t i = 0; i < 128 / sizeof(Id); ++i) {
    bits |= (static_cast<Bits>(p[i]) + 1) | (static_cast<Bits>(last) - static_cast<Bits>(p[i]));
  }
  return static_cast<Id>(bits) >= 0;
}

FASTMOE_ROUTE_ISA_END
