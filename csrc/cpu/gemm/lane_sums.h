// The end of the dot form: the lanes of accumulators are added and join the results.
//
// One tree for every shape of tile: (0 + 2) + (1 + 3) inside quads, then quads alike.
#pragma once

#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN

#if defined(__AVX512F__)
inline __m128 lane_sums(Vec a, Vec b, Vec c, Vec d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 quads = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 pairs = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}
#elif defined(__AVX2__)
inline __m128 lane_sums(Vec a, Vec b, Vec c, Vec d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
  const __m256 quads = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  return _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
}
#else
inline float lane_sum(Vec a) {
  const float low = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return low + ((a.v[4] + a.v[6]) + (a.v[5] + a.v[7]));
}
#endif

// Writes (first block of k) or adds (later blocks) the sums of one row's accumulators, the first `count` of them.
template <int C>
inline void finish_dots(const Vec* sums, float* const* c, int count, bool add) {
#if defined(__AVX2__)
  const __m128 dots = lane_sums(sums[0], sums[C > 1 ? 1 : 0], sums[C > 2 ? 2 : 0], sums[C > 3 ? 3 : 0]);
  float values[4];
  _mm_storeu_ps(values, dots);
  for (int j = 0; j < count; ++j) *c[j] = add ? *c[j] + values[j] : values[j];
#else
  for (int j = 0; j < count; ++j) *c[j] = add ? *c[j] + lane_sum(sums[j]) : lane_sum(sums[j]);
#endif
}

// The same for R rows of four neighbours, `stride` apart.
#if defined(__AVX512F__)
// Every addition is of two vectors that hold two sums each: a blend of both, and a shuffle that brings the other
// halves of the sums beside them. A third of the shuffles of lane_sums; Intel shuffles on one of the two units that
// multiply.
template <int R>
inline void finish_tile(const Vec (&sums)[R][4], float* c, int64_t stride, bool add) {
  const __m512i neighbours = _mm512_set_epi32(30, 15, 28, 13, 26, 11, 24, 9, 22, 7, 20, 5, 18, 3, 16, 1);
  const __m512i quads = _mm512_set_epi32(27, 26, 25, 24, 15, 14, 13, 12, 19, 18, 17, 16, 7, 6, 5, 4);
  const auto halve = [](Vec a, Vec b) {  // 0 + 2 and 1 + 3 of the quads of a, then of b
    return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a.v, b.v), _mm512_shuffle_ps(a.v, b.v, 0x4e));
  };
  __m512 rows[R], pairs[(R + 1) / 2];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {  // a quad's sums of the four
    const __m512 a = halve(sums[i][0], sums[i][2]), b = halve(sums[i][1], sums[i][3]);
    rows[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, a, b), _mm512_permutex2var_ps(a, neighbours, b));
  }
#pragma GCC unroll 3
  for (int i = 0; i < R; i += 2) {  // quads 0 + 2 and 1 + 3 of two rows
    const __m512 a = rows[i], b = rows[i + 1 < R ? i + 1 : i];
    pairs[i / 2] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
  const auto put = [&](int i, __m128 dots) {
    float* const to = c + i * stride;
    _mm_storeu_ps(to, add ? _mm_add_ps(_mm_loadu_ps(to), dots) : dots);
  };
#pragma GCC unroll 2
  for (int i = 0; i < R; i += 4) {  // rows i, i + 2, i + 1, i + 3
    const __m512 a = pairs[i / 2], b = pairs[i + 2 < R ? i / 2 + 1 : i / 2];
    const __m512 dots = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a, b), _mm512_permutex2var_ps(a, quads, b));
    put(i, _mm512_castps512_ps128(dots));
    if (i + 1 < R) put(i + 1, _mm512_extractf32x4_ps(dots, 2));
    if (i + 2 < R) put(i + 2, _mm512_extractf32x4_ps(dots, 1));
    if (i + 3 < R) put(i + 3, _mm512_extractf32x4_ps(dots, 3));
  }
}
#else
template <int R>
inline void finish_tile(const Vec (&sums)[R][4], float* c, int64_t stride, bool add) {
  for (int i = 0; i < R; ++i, c += stride) {
#if defined(__AVX2__)
    const __m128 dots = lane_sums(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    _mm_storeu_ps(c, add ? _mm_add_ps(_mm_loadu_ps(c), dots) : dots);
#else
    for (int j = 0; j < 4; ++j) c[j] = add ? c[j] + lane_sum(sums[i][j]) : lane_sum(sums[i][j]);
#endif
  }
}
#endif

FASTMOE_ROUTE_ISA_END
