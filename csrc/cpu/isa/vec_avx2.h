// Vec and Keys of 8 lanes, see vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/isa/namespace.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr bool kHasFloat64 = false;  // see dispatch_element

struct Mask {
  __m256 bits;
  friend Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.bits, b.bits)}; }
  friend Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.bits, b.bits)}; }
  friend Mask operator~(Mask a) { return {_mm256_xor_ps(a.bits, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
  uint32_t lanes() const { return static_cast<uint32_t>(_mm256_movemask_ps(bits)); }
};

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr bool kLooksUp = false;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const float* p, int n, float fill = 0.0f) {
    const __m256i mask = first(n);
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))};
  }
  template <class T>
  static Vec load(const T* p, int n, float fill = 0.0f) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
    return load(lanes);
  }
  static Vec load_alternate(const BFloat16* p, int odd, int n = 2 * kLanes) {
    BFloat16 whole[2 * kLanes] = {};
    if (n < 2 * kLanes) p = static_cast<const BFloat16*>(std::memcpy(whole, p, n * sizeof(BFloat16)));
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(odd != 0 ? _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000))
                                         : _mm256_slli_epi32(pairs, 16))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16_bits()); }
  void store(Float16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), f16_bits()); }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  static constexpr bool kStreams = true;
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(BFloat16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), bf16_bits()); }
  void stream(Float16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), f16_bits()); }
  static void stream_fence() { _mm_sfence(); }
  template <class T>
  void store(T* p, int n) const {
    T lanes[kLanes];
    store(lanes);
    std::memcpy(p, lanes, n * sizeof(T));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  friend Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  friend Vec negative_abs(Vec a) { return {_mm256_or_ps(a.v, _mm256_set1_ps(-0.0f))}; }
  friend Vec reciprocal(Vec a) { return all(1.0f) / a; }
  friend Vec ldexp(Vec a, Vec n) {
    // Two powers of two: the first product is exact for a near 1, so the result is rounded once.
    const __m256 bounded = _mm256_min_ps(_mm256_max_ps(n.v, _mm256_set1_ps(-252.0f)), _mm256_set1_ps(254.0f));
    const __m256i whole = _mm256_cvtps_epi32(bounded);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
  }
  friend Vec integer_bits(Vec a) { return {_mm256_castsi256_ps(_mm256_cvtps_epi32(a.v))}; }
  friend Vec product_gradual(Vec a, Vec b) { return a * b; }
  friend void frexp(Vec x, Vec& mantissa, Vec& exponent) {
    const __m256 small = _mm256_cmp_ps(x.v, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ);
    const __m256 normal = _mm256_blendv_ps(x.v, _mm256_mul_ps(x.v, _mm256_set1_ps(16777216.0f)), small);
    const __m256i bits = _mm256_castps_si256(normal);
    const __m256 raised = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
    exponent.v = _mm256_sub_ps(raised, _mm256_and_ps(small, _mm256_set1_ps(24.0f)));
    mantissa.v = _mm256_castsi256_ps(
        _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)), _mm256_set1_epi32(0x3f800000)));
  }

  friend Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
  friend Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
  friend Mask operator>=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
  friend Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
  friend Mask is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
  friend Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.bits)}; }

  friend float reduce_max(Vec a) {
    __m128 quad = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    quad = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
    return _mm_cvtss_f32(_mm_max_ss(quad, _mm_movehdup_ps(quad)));
  }
  friend float reduce_add(Vec a) {
    __m128 quad = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    quad = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
    return _mm_cvtss_f32(_mm_add_ss(quad, _mm_movehdup_ps(quad)));
  }

  static __m256 power(__m256i n) {  // 2^n, n within the normal exponents
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  __m128i bf16_bits() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  __m128i f16_bits() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

struct Keys {
  static constexpr int kLanes = 8;
  __m256i v;

  static Keys load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static Keys all(int32_t x) { return {_mm256_set1_epi32(x)}; }
  void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  friend Keys max(Keys a, Keys b) { return {_mm256_max_epi32(a.v, b.v)}; }
  friend Keys min(Keys a, Keys b) { return {_mm256_min_epi32(a.v, b.v)}; }
  friend uint32_t equal_lanes(Keys a, Keys b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))));
  }
  friend Keys spread_max(Keys a) {
    __m256i m = _mm256_max_epi32(a.v, _mm256_permute2x128_si256(a.v, a.v, 0x01));
    m = _mm256_max_epi32(m, _mm256_shuffle_epi32(m, 0x4e));
    return {_mm256_max_epi32(m, _mm256_shuffle_epi32(m, 0xb1))};
  }
  int32_t first() const { return _mm256_cvtsi256_si32(v); }
  friend Keys select_lanes(uint32_t lanes, Keys yes, Keys no) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i here = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bit);
    return {_mm256_blendv_epi8(no.v, yes.v, _mm256_cmpeq_epi32(here, bit))};
  }
  friend Keys select(Mask m, Keys yes, Keys no) {
    return {_mm256_blendv_epi8(no.v, yes.v, _mm256_castps_si256(m.bits))};
  }
  static Keys of_bits(Vec x) { return {_mm256_castps_si256(x.v)}; }
  static Keys count() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
  friend Keys operator+(Keys a, Keys b) { return {_mm256_add_epi32(a.v, b.v)}; }
  friend Keys operator-(Keys a, Keys b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  friend Keys operator~(Keys a) { return {_mm256_xor_si256(a.v, _mm256_set1_epi32(-1))}; }
  friend Keys even_lanes(Keys a, Keys b) { return from_halves<0x88>(a, b); }
  friend Keys odd_lanes(Keys a, Keys b) { return from_halves<0xdd>(a, b); }
  friend uint32_t greater_lanes(Keys a, Keys b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))));
  }
  friend Keys count_greater(Keys x, Keys a, Keys b) { return {_mm256_sub_epi32(x.v, _mm256_cmpgt_epi32(a.v, b.v))}; }
  void store_lanes(uint32_t lanes, int32_t* p) const {
    alignas(32) int32_t all[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(all), v);
    for (; lanes != 0; lanes &= lanes - 1) *p++ = all[__builtin_ctz(lanes)];
  }
  static constexpr bool kSortsByPlace = false, kGathers = false;
  // The two lanes that `pick` names of each half of a, then of b.
  template <int pick>
  static Keys from_halves(Keys a, Keys b) {
    const __m256 mixed = _mm256_shuffle_ps(_mm256_castsi256_ps(a.v), _mm256_castsi256_ps(b.v), pick);
    return {_mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xd8)};
  }
  Keys flip_negative() const { return {_mm256_xor_si256(v, _mm256_srli_epi32(_mm256_srai_epi32(v, 31), 1))}; }
  Vec as_floats() const { return {_mm256_castsi256_ps(v)}; }
};

template <class Id>
inline bool are_ids_within(const Id* p, Id last) {
  constexpr bool kIsWide = sizeof(Id) == sizeof(int64_t);
  const __m256i high = kIsWide ? _mm256_set1_epi64x(last) : _mm256_set1_epi32(static_cast<int32_t>(last));
  const __m256i low = _mm256_set1_epi32(-1);
  __m256i bad = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    const __m256i ids = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    const __m256i above = kIsWide ? _mm256_cmpgt_epi64(ids, high) : _mm256_cmpgt_epi32(ids, high);
    const __m256i below = kIsWide ? _mm256_cmpgt_epi64(low, ids) : _mm256_cmpgt_epi32(low, ids);
    bad = _mm256_or_si256(bad, _mm256_or_si256(above, below));
  }
  return _mm256_testz_si256(bad, bad) != 0;
}

FASTMOE_ROUTE_ISA_END
