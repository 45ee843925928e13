// Short vectors of float: one type, three implementations, chosen by the flags this unit is compiled with. The only
// file of the package that asks the compiler which instruction set it targets, apart from the matrix units.
//
// Vec::kLanes lanes. Arithmetic is IEEE; fma is fused where the hardware has it. max(a, b) returns b when either is
// NaN, as the x86 instructions do. Lane-crossing sums use one fixed tree per width, so they are deterministic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "cpu/isa/namespace.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

FASTMOE_ROUTE_ISA_BEGIN

#if defined(__AVX512F__)

struct Mask {
  __mmask16 bits;
  friend Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
  friend Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
  friend Mask operator~(Mask a) { return {static_cast<__mmask16>(~a.bits)}; }
  uint32_t lanes() const { return bits; }  // bit i is lane i
};

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr bool kLooksUp = true;  // has look_up
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // The first n lanes (0 <= n <= kLanes); the rest are `fill`. Memory past n is not touched.
  static Vec load(const float* p, int n, float fill = 0.0f) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p)};
  }
  static Vec load(const BFloat16* p, int n, float fill = 0.0f) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first(n), p);
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), wide)};
  }
  static Vec load(const Float16* p, int n, float fill = 0.0f) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first(n), p);
    return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), _mm512_cvtph_ps(bits))};
  }
  // Every other one of n elements, from element `odd` (0 or 1) on; the rest are zeros. Memory past n is not touched.
  static Vec load_alternate(const BFloat16* p, int odd, int n = 2 * kLanes) {
    const __m512i pairs = n < 2 * kLanes ? _mm512_maskz_loadu_epi16((1u << n) - 1u, p) : _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(odd != 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000))
                                         : _mm512_slli_epi32(pairs, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_bits()); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f16_bits()); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(BFloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), bf16_bits()); }
  void store(Float16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), f16_bits()); }
  static constexpr bool kStreams = true;  // whether stream() goes past the caches
  // A store past the caches; p is aligned to kLanes elements. A thread ends its streaming with stream_fence().
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(BFloat16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bf16_bits()); }
  void stream(Float16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), f16_bits()); }
  static void stream_fence() { _mm_sfence(); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  friend Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  // 1 / a within 1 ulp, for a in [1, 2].
  friend Vec reciprocal(Vec a) {
    const __m512 r = _mm512_rcp14_ps(a.v);
    return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f)), r)};
  }
  friend Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // a * 2^n for |a| in [0.5, 2] and integral n, rounded once through the subnormal range, 0 or inf past it.
  friend Vec ldexp(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  // Element i of a table of 16, aligned to 64 bytes, where i is the last four bits of the lane.
  static Vec look_up(const float* table, Vec index) {
    return {_mm512_permutexvar_ps(_mm512_castps_si512(index.v), _mm512_load_ps(table))};
  }
  // x = mantissa * 2^exponent with the mantissa in [1, 2), for positive finite x, subnormal included.
  friend void frexp(Vec x, Vec& mantissa, Vec& exponent) {
    exponent.v = _mm512_getexp_ps(x.v);
    mantissa.v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  }

  friend Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend Mask operator>(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend Mask operator>=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
  friend Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  friend Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
  friend Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_mov_ps(no.v, m.bits, yes.v)}; }

  friend float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
  friend float reduce_add(Vec a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 quad = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quad = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
    return _mm_cvtss_f32(_mm_add_ss(quad, _mm_movehdup_ps(quad)));
  }

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  __m256i bf16_bits() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
  __m256i f16_bits() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

// Integers of the width of a Vec lane, for exact comparison of floats (ordered_keys below).
struct Keys {
  static constexpr int kLanes = 16;
  __m512i v;

  static Keys load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static Keys all(int32_t x) { return {_mm512_set1_epi32(x)}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  friend Keys max(Keys a, Keys b) { return {_mm512_max_epi32(a.v, b.v)}; }
  friend Keys min(Keys a, Keys b) { return {_mm512_min_epi32(a.v, b.v)}; }
  friend uint32_t equal_lanes(Keys a, Keys b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
  // The largest lane, in every lane.
  friend Keys spread_max(Keys a) {
    __m512i m = _mm512_max_epi32(a.v, _mm512_shuffle_i64x2(a.v, a.v, 0x4e));
    m = _mm512_max_epi32(m, _mm512_shuffle_i64x2(m, m, 0xb1));
    m = _mm512_max_epi32(m, _mm512_shuffle_epi32(m, static_cast<_MM_PERM_ENUM>(0x4e)));
    return {_mm512_max_epi32(m, _mm512_shuffle_epi32(m, static_cast<_MM_PERM_ENUM>(0xb1)))};
  }
  int32_t first() const { return _mm512_cvtsi512_si32(v); }
  // Lanes of `yes` where the bit of the lane is set, of `no` elsewhere.
  friend Keys select_lanes(uint32_t lanes, Keys yes, Keys no) {
    return {_mm512_mask_mov_epi32(no.v, static_cast<__mmask16>(lanes), yes.v)};
  }
  friend Keys select(Mask m, Keys yes, Keys no) { return {_mm512_mask_mov_epi32(no.v, m.bits, yes.v)}; }
  static Keys of_bits(Vec x) { return {_mm512_castps_si512(x.v)}; }
  // 0, 1, 2, ...
  static Keys count() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
  friend Keys operator+(Keys a, Keys b) { return {_mm512_add_epi32(a.v, b.v)}; }
  friend Keys operator-(Keys a, Keys b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  friend Keys operator~(Keys a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi32(-1))}; }
  // Lanes 0, 2, 4 ... and 1, 3, 5 ... of a, followed by those of b.
  friend Keys even_lanes(Keys a, Keys b) { return {_mm512_permutex2var_epi32(a.v, (count() + count()).v, b.v)}; }
  friend Keys odd_lanes(Keys a, Keys b) {
    return {_mm512_permutex2var_epi32(a.v, (count() + count() + all(1)).v, b.v)};
  }
  friend uint32_t greater_lanes(Keys a, Keys b) { return _mm512_cmpgt_epi32_mask(a.v, b.v); }
  // x, plus 1 in the lanes where a > b.
  friend Keys count_greater(Keys x, Keys a, Keys b) {
    return {_mm512_mask_add_epi32(x.v, _mm512_cmpgt_epi32_mask(a.v, b.v), x.v, _mm512_set1_epi32(1))};
  }
  // The lanes of the mask, in order, to p[0 ...]; up to kLanes elements of p are written.
  void store_lanes(uint32_t lanes, int32_t* p) const {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), v));
  }
  // Lane i of the result is the lane whose place is i; the places are 0 .. 15 in any order. One hexadecimal digit of a
  // word for each place.
  static constexpr bool kSortsByPlace = true;
  friend Keys lanes_by_place(Keys place) {
    const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(place.v));
    const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(place.v, 1));
    const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i digits =
        _mm512_or_si512(_mm512_sllv_epi64(lanes, _mm512_slli_epi64(low, 2)),
                        _mm512_sllv_epi64(_mm512_add_epi64(lanes, _mm512_set1_epi64(8)), _mm512_slli_epi64(high, 2)));
    __m256i word = _mm256_or_si256(_mm512_castsi512_si256(digits), _mm512_extracti64x4_epi64(digits, 1));
    word = _mm256_or_si256(word, _mm256_permute4x64_epi64(word, 0x4e));
    word = _mm256_or_si256(word, _mm256_shuffle_epi32(word, 0x4e));
    const __m512i both = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                                  _mm512_castsi256_si512(word));
    return {_mm512_srlv_epi32(both, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28))};
  }
  // Lane i of the result is lane lanes[i] % 16 of x.
  friend Keys pick_lanes(Keys x, Keys lanes) { return {_mm512_permutexvar_epi32(lanes.v, x.v)}; }
  Keys flip_negative() const {
    // v ^ (sign & 0x7fffffff)
    return {_mm512_ternarylogic_epi32(v, _mm512_srai_epi32(v, 31), _mm512_set1_epi32(0x7fffffff), 0x78)};
  }
  Vec as_floats() const { return {_mm512_castsi512_ps(v)}; }
};

// Whether every id in the 128 bytes from p on is in [-1, last]: as unsigned numbers, id + 1 in [0, last + 1].
inline bool are_ids_within(const int32_t* p, int32_t last) {
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i low = _mm512_add_epi32(_mm512_loadu_si512(p), one);
  const __m512i high = _mm512_add_epi32(_mm512_loadu_si512(p + 16), one);
  return _mm512_cmpgt_epu32_mask(_mm512_max_epu32(low, high), _mm512_set1_epi32(last + 1)) == 0;
}
inline bool are_ids_within(const int64_t* p, int64_t last) {
  const __m512i one = _mm512_set1_epi64(1);
  const __m512i low = _mm512_add_epi64(_mm512_loadu_si512(p), one);
  const __m512i high = _mm512_add_epi64(_mm512_loadu_si512(p + 8), one);
  return _mm512_cmpgt_epu64_mask(_mm512_max_epu64(low, high), _mm512_set1_epi64(last + 1)) == 0;
}

#elif defined(__AVX2__)

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
  friend Vec reciprocal(Vec a) { return all(1.0f) / a; }
  friend Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Vec ldexp(Vec a, Vec n) {
    // Two powers of two: the first product is exact for a near 1, so the result is rounded once.
    const __m256 bounded = _mm256_min_ps(_mm256_max_ps(n.v, _mm256_set1_ps(-252.0f)), _mm256_set1_ps(254.0f));
    const __m256i whole = _mm256_cvtps_epi32(bounded);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
  }
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
  static constexpr bool kSortsByPlace = false;
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

#else  // portable: the compiler's own vectors, lowered to whatever the target has

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
  static Vec load(const T* p) {
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
  static Vec load(const T* p, int n, float fill = 0.0f) {
    Vec result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = i < n ? to_float(p[i]) : fill;
    return result;
  }
  static Vec load_alternate(const BFloat16* p, int odd, int n = 2 * kLanes) {
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
  void store(T* p, int n) const {
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
  friend Vec reciprocal(Vec a) { return {1.0f / a.v}; }
  friend Vec round(Vec a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = std::nearbyint(static_cast<float>(a.v[i]));
    return a;
  }
  friend Vec ldexp(Vec a, Vec n) {
    // As with AVX2; a NaN exponent becomes -252, and the NaN is in a.
    const Vec bounded = min(max(n, all(-252.0f)), all(254.0f));
    const Int8 whole = __builtin_convertvector(bounded.v, Int8);
    const Int8 half = whole >> 1;
    return {a.v * power(half) * power(whole - half)};
  }
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
  static constexpr bool kSortsByPlace = false;
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

#endif

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline Vec operator-(Vec a) { return Vec::zero() - a; }

FASTMOE_ROUTE_ISA_END
