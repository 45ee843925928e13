// Products with reduction-contiguous weights (nn.Linear's layout): vectors run along k, one accumulator per output, so
// weights are read in place, in order, and never packed.
//
// Order of summation: k is cut into equal blocks of at most 1024. In a block, lane l of an accumulator sums elements
// l, l + kLanes, ... with one fma each, from +0; the lanes are added by one fixed tree; block sums are added in order.
// Every tile shape follows it, so a row's result depends on nothing but its own elements. It also errs 3 to 10 times
// less than one running sum.
//
// Tiles of kDotRows rows by 4 weights. Rows are packed, widened to float, as [tile][k / kLanes][row][lane]: a tile's k
// block is 24 KB that stays in L1 while a panel of weights passes from L2. Few rows (one tile) go through the weights
// in long runs instead, at the speed of memory.
#pragma once

#include "cpu/gemm/tile.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr int kDotRows = Vec::kLanes == 16 ? 6 : 3;
constexpr int kDotCols = 4;
constexpr int64_t kDotMaxBlock = 1024;  // elements of k summed before the lanes are added, at most
constexpr int64_t kDotPanel = 96;       // weights whose k block stays in L2 while all rows pass
constexpr int64_t kDotSegment = 8;      // steps of k between two fetches of what is multiplied later
constexpr int kDotAhead = 320;          // bytes of a weight row on their way from L2 to L1
constexpr int64_t kDotRowBlock = 192;   // rows whose k block stays in L2 beside them: whole tiles

// Lane sums of four accumulators. One tree for all widths of tile: (0 + 2) + (1 + 3) inside quads, then quads alike.
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

// Writes (first block of k) or adds (later blocks) the lane sums of one row's accumulators.
template <int C>
inline void finish_dots(const Vec* sums, float* const* c, int count, bool add) {
#if defined(__AVX2__)
  const __m128 dots = lane_sums(sums[0], sums[C > 1 ? 1 : 0], sums[C > 2 ? 2 : 0], sums[C > 3 ? 3 : 0]);
  if (C == 4 && count == 4) {
    _mm_storeu_ps(c[0], add ? _mm_add_ps(_mm_loadu_ps(c[0]), dots) : dots);
    return;
  }
  float values[4];
  _mm_storeu_ps(values, dots);
  for (int j = 0; j < count; ++j) *c[j] = add ? *c[j] + values[j] : values[j];
#else
  for (int j = 0; j < count; ++j) *c[j] = add ? *c[j] + lane_sum(sums[j]) : lane_sum(sums[j]);
#endif
}

// C weights against the R rows of a tile over one block of k. With C == 4 the outputs are neighbours; count <= C of
// them exist (the pointers of the others repeat a valid one).
struct DotOutput {
  float* c[kDotCols];  // row 0
  int64_t stride;
  int count;
  bool add;
};

// Fetches rows of weights that are multiplied later into L2, line by line.
struct LineFetcher {
  const char* line;
  const char* row_end;
  int64_t row_bytes, stride;
  int64_t rows;  // left

  template <class T>
  LineFetcher(const T* first, int64_t count, int64_t w_stride, int64_t k)
      : line(reinterpret_cast<const char*>(first)), row_end(line + k * static_cast<int64_t>(sizeof(T))),
        row_bytes(row_end - line), stride(w_stride * static_cast<int64_t>(sizeof(T))), rows(count) {}
  inline __attribute__((always_inline)) void fetch(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      prefetch_later(line);
      line += 64;
      if (line < row_end) continue;
      line = row_end - row_bytes + stride;
      row_end += stride;
      --rows;
    }
  }
};

// `lines` lines of what comes later are fetched per kDotSegment steps of k: at even distances, because a burst would
// fill the queue to memory and hold up the loads from L2. The weights themselves are asked for kAhead bytes before they
// are used, from L2 to L1, and the results' lines at the start, unless kAhead is 0.
template <int R, int C, int kAhead, class T>
inline __attribute__((always_inline)) void dot_tile(const float* a, const T* const* w, int64_t k, LineFetcher& later,
                                                    int64_t lines, const DotOutput& out) {
  constexpr int L = Vec::kLanes;
  if (kAhead > 0)
    for (int i = 0; i < R; ++i) __builtin_prefetch(out.c[0] + i * out.stride, 1, 3);
  Vec sums[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sums[i][j] = Vec::zero();
  const auto step = [&](const Vec* weights, const float* rows) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      Vec row = Vec::load(rows + i * L);
      keep_in_register(row);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sums[i][j] = fma(row, weights[j], sums[i][j]);
    }
  };
  int64_t q = 0;
  while (q + L <= k) {
    later.fetch(lines);
    const int64_t end = k - q < kDotSegment * L ? k / L * L : q + kDotSegment * L;
    for (; q < end; q += L) {
      Vec weights[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) {
        weights[j] = Vec::load(w[j] + q);
        keep_in_register(weights[j]);
        if (kAhead > 0) prefetch_soon(reinterpret_cast<const char*>(w[j] + q) + kAhead);
      }
      step(weights, a + q * R);
    }
  }
  if (q < k) {
    Vec weights[C];
    for (int j = 0; j < C; ++j) weights[j] = Vec::load(w[j] + q, static_cast<int>(k - q));
    step(weights, a + q * R);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    float* c[kDotCols];
    for (int j = 0; j < C; ++j) c[j] = out.c[j] + i * out.stride;
    finish_dots<C>(sums[i], c, out.count, out.add);
  }
}

// Calls f(integral constant R) for rows in [1, kDotRows].
template <int R>
struct RowCount {
  static constexpr int value = R;
};
template <class F>
inline void with_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1: return f(RowCount<1>{});
    case 2: return f(RowCount<2>{});
    case 3: return f(RowCount<3>{});
    case 4: return f(RowCount<(kDotRows > 3 ? 4 : 1)>{});
    case 5: return f(RowCount<(kDotRows > 3 ? 5 : 1)>{});
    default: return f(RowCount<kDotRows>{});
  }
}

template <class T>
struct DotProblem {
  const float* a;  // packed
  const T* w;
  int64_t w_stride, n, k;
  float* c;
  int64_t c_stride;
  int64_t block;  // elements of k in a block: whole vectors, a function of k alone
};

inline int64_t dot_block(int64_t k) {
  const int64_t blocks = (k + kDotMaxBlock - 1) / kDotMaxBlock;
  return round_up((k + blocks - 1) / blocks, Vec::kLanes);
}

// All of k for four neighbouring weights at a time, or for two at a time that lie half the weights apart: two long
// streams keep one core's memory reads busy, and more rows need the wider tile.
template <int R, class T>
void dot_few_rows(const DotProblem<T>& p) {
  constexpr int C = R <= 2 ? 2 : 4;
  const int64_t apart = C == 2 ? (p.n + 1) / 2 : 1;
  const int64_t count = C == 2 ? apart : p.n;
  for (int64_t j = 0; j < count; j += C == 2 ? 1 : 4) {
    const T* w[C];
    DotOutput out{{}, p.c_stride, 0, false};
    for (int i = 0; i < C; ++i) {
      const int64_t column = j + i * apart;
      const bool exists = column < p.n;
      w[i] = p.w + (exists ? column : j) * p.w_stride;
      out.c[i] = p.c + (exists ? column : j);
      out.count += exists;
    }
    for (int64_t q = 0; q < p.k; q += p.block) {
      const int64_t depth = p.k - q < p.block ? p.k - q : p.block;
      const T* block[C];
      for (int i = 0; i < C; ++i) block[i] = w[i] + q;
      out.add = q > 0;
      // The next four rows' block of k.
      LineFetcher later(block[0] + C * p.w_stride, R <= 2 || j + 2 * C > p.n ? 0 : C, p.w_stride, depth);
      dot_tile<R, C, 0>(p.a + q * R, block, depth, later, C * kDotSegment, out);
    }
  }
}

// One panel of weights over one block of k against all rows: a tile's rows stay in L1 while the panel passes from L2.
// The `next_rows` rows from `next` on, multiplied next, are fetched into L2 meanwhile.
template <class T>
void dot_panel(const DotProblem<T>& p, int64_t m, int64_t q, int64_t depth, int64_t panel, int64_t columns,
               const T* next, int64_t next_rows) {
  const int64_t padded = round_up(p.k, Vec::kLanes), tiles = (m + kDotRows - 1) / kDotRows;
  LineFetcher later(next, next_rows, p.w_stride, depth);
  const int64_t segments = tiles * ((columns + kDotCols - 1) / kDotCols) *
                           ((depth + kDotSegment * Vec::kLanes - 1) / (kDotSegment * Vec::kLanes));
  const int64_t lines = (next_rows * ((later.row_bytes + 63) / 64) + segments - 1) / segments;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kDotRows, rows = m - first < kDotRows ? m - first : kDotRows;
    const float* a = p.a + first * padded + q * rows;
    with_rows(rows, [&](auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      for (int64_t j = 0; j < columns; j += kDotCols) {
        const T* w[kDotCols];
        DotOutput out{{}, p.c_stride, static_cast<int>(columns - j < kDotCols ? columns - j : kDotCols), q > 0};
        for (int i = 0; i < kDotCols; ++i) {
          const int64_t column = panel + j + (i < out.count ? i : 0);
          w[i] = p.w + column * p.w_stride + q;
          out.c[i] = p.c + first * p.c_stride + column;
        }
        dot_tile<R, kDotCols, kDotAhead>(a, w, depth, later, lines, out);
      }
    });
  }
}

// Blocks of k, then panels of weights: the rows' block and the panel share L2.
template <class T>
void dot_many_rows(const DotProblem<T>& p, int64_t m) {
  for (int64_t q = 0; q < p.k; q += p.block) {
    const int64_t depth = p.k - q < p.block ? p.k - q : p.block;
    for (int64_t panel = 0; panel < p.n; panel += kDotPanel) {
      const int64_t columns = p.n - panel < kDotPanel ? p.n - panel : kDotPanel;
      const bool is_last = panel + kDotPanel >= p.n;
      const T* next = is_last ? p.w + q + p.block : p.w + (panel + kDotPanel) * p.w_stride + q;
      const int64_t left = is_last ? (q + p.block < p.k ? p.n : 0) : p.n - panel - kDotPanel;
      dot_panel(p, m, q, depth, panel, columns, next, left < kDotPanel ? left : kDotPanel);
    }
  }
}

template <class T>
void dot_multiply(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
                  int64_t c_stride) {
  const DotProblem<T> problem{static_cast<const float*>(packed),
                              static_cast<const T*>(w),
                              w_stride,
                              n,
                              k,
                              static_cast<float*>(c),
                              c_stride,
                              dot_block(k)};
  if (m > kDotRows) {
    const int64_t padded = round_up(k, Vec::kLanes);
    for (int64_t first = 0; first < m; first += kDotRowBlock) {
      DotProblem<T> part = problem;
      part.a += first * padded;
      part.c += first * c_stride;
      dot_many_rows(part, m - first < kDotRowBlock ? m - first : kDotRowBlock);
    }
    return;
  }
  with_rows(m, [&](auto count) { dot_few_rows<decltype(count)::value>(problem); });
}

inline int64_t dot_packed_bytes(int64_t m, int64_t k) {
  return m * round_up(k, Vec::kLanes) * static_cast<int64_t>(sizeof(float));
}

template <class T>
void dot_pack(const void* const* rows, const void* scale, int64_t m, int64_t k, void* packed) {
  constexpr int64_t L = Vec::kLanes;
  const int64_t padded = round_up(k, L);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t first = i / kDotRows * kDotRows, tile_rows = m - first < kDotRows ? m - first : kDotRows;
    float* to = static_cast<float*>(packed) + first * padded + (i - first) * L;
    const RowReader<T> row(rows, scale, i);
    for (int64_t q = 0; q < k; q += L) row.load(q, static_cast<int>(k - q < L ? k - q : L)).store(to + q * tile_rows);
  }
}

FASTMOE_ROUTE_ISA_END
