// Vec and Keys of 16 lanes, see vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa/namespace.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr bool kHasFloat64 = false;  // see dispatch_element

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
  friend Vec negative_abs(Vec a) { return {_mm512_or_ps(a.v, _mm512_set1_ps(-0.0f))}; }
  // 1 / a within 1 ulp, for a in [1, 2].
  friend Vec reciprocal(Vec a) {
    const __m512 r = _mm512_rcp14_ps(a.v);
    return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f)), r)};
  }
  // a * 2^n for |a| in [0.5, 2] and integral n, rounded once through the subnormal range, 0 or inf past it.
  friend Vec ldexp(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  // The lanes rounded to integers, as they are; what does not fit an integer gives something.
  friend Vec integer_bits(Vec a) { return {_mm512_castsi512_ps(_mm512_cvtps_epi32(a.v))}; }
  // a * b by way of double, where it is exact: Intel's vmulps takes 100 cycles to read or to give a subnormal number.
  friend Vec product_gradual(Vec a, Vec b) {
    const auto low = [](Vec x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)); };
    const auto high = [](Vec x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)); };
    const __m512 lower = _mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_mul_pd(low(a), low(b))));
    return {_mm512_insertf32x8(lower, _mm512_cvtpd_ps(_mm512_mul_pd(high(a), high(b))), 1)};
  }
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

// Integers of the width of a Vec lane, for exact comparison of floats (gate_select.h).
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
  static constexpr bool kGathers = true;
  // The bits of p[index] in the lanes whose bit is set, 0 elsewhere.
  static Keys gather(uint32_t lanes, const float* p, Keys index) {
    return {_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), static_cast<__mmask16>(lanes), index.v, p, 4)};
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

FASTMOE_ROUTE_ISA_END
