// Register blocks the bfloat16 units share: 16 x 16 transposes, interleaving of row pairs, masked edges.
// A "pair" is two bfloat16 that are neighbours in the reduction, held in one 32-bit lane, the lower index low.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa/namespace.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

// The first `count` 16-bit lanes; none below 1, all from 32 on.
inline __mmask32 first_words(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : count <= 0 ? 0 : static_cast<__mmask32>((uint32_t{1} << count) - 1);
}
inline __mmask16 first_dwords(int64_t count) {
  return count >= 16  ? static_cast<__mmask16>(0xffff)
         : count <= 0 ? 0
                      : static_cast<__mmask16>((uint32_t{1} << count) - 1);
}

// Up to 32 elements, the rest zeros; memory past them is not touched.
inline __m512i load_words(const void* p, int64_t count) {
  return count >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first_words(count), p);
}

// Up to 32 elements multiplied by `scale` in float and rounded to nearest even.
inline __m512i load_scaled_words(const void* p, int64_t count, float scale) {
  const __m512i words = load_words(p, count);
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), 16));
  const __m512 high =
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1)), 16));
  const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
  // Zeros past the end, even where the scale is not finite.
  return _mm512_maskz_mov_epi16(first_words(count), reinterpret_cast<const __m512i&>(rounded));
}

// Rows of 32-bit lanes become columns.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // r[4 g + c] holds, in its 128-bit lane l, rows 4 g .. 4 g + 3 of column 4 l + c.
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Pairs of two rows: lane j of `low` is (even[j], odd[j]), of `high` (even[16 + j], odd[16 + j]).
inline void interleave(__m512i even, __m512i odd, __m512i& low, __m512i& high) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  even = _mm512_permutexvar_epi64(order, even);
  odd = _mm512_permutexvar_epi64(order, odd);
  low = _mm512_unpacklo_epi16(even, odd);
  high = _mm512_unpackhi_epi16(even, odd);
}

}  // namespace

FASTMOE_ROUTE_ISA_END
