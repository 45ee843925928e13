// Products with output-contiguous weights: vectors run along the outputs, one element of a row is broadcast against
// vectors of weights, k goes by in registers.
//
// Order of summation: blocks of 128 elements of k, each summed one fma at a time, ascending, from +0; block sums are
// added in order. Nothing else enters.
//
// Tiles of kOuterRows rows by kOuterVecs vectors. Rows are packed, widened to float, as [tile][k][row]. For more rows
// than a tile holds, 128 by 64 weights are copied to a 32 KB panel first: rows of a weight matrix lie a power of two
// apart and would evict each other from the caches. Few rows read the weights once, in place, in runs as long as their
// rows: 8 elements of k at a time sweep over 512 outputs whose sums wait in L1.
#pragma once

#include "cpu/gemm/tile.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr int kOuterRows = kVectorRegisters == 8 ? 2 : 6;
constexpr int kOuterVecs = Vec::kLanes == 16 ? 4 : 2;
constexpr int64_t kOuterBlock = 128;  // elements of k summed before they join the result
constexpr int64_t kOuterPanel = 64;   // outputs of a panel
constexpr int64_t kOuterSweep = 512;  // outputs whose sums wait in L1 while few rows go through the weights
constexpr int64_t kOuterStep = 8;     // elements of k of one sweep

// What a tile's sums start from and where they go.
enum class OuterEnd {
  kStore,     // c = sums from +0
  kAdd,       // c += sums from +0
  kContinue,  // the running sums themselves are in c
};

// The products of a[k][kStep], its first R, with w[k][V vectors], added to c if they continue; end(sums) takes them.
// kPrefetch asks for the same columns of the rows `k` further on.
template <int R, int V, bool kPrefetch, int kStep, class T, class End>
inline __attribute__((always_inline)) void outer_sums(const float* a, const T* w, int64_t w_stride, int64_t k,
                                                      const float* c, int64_t c_stride, bool continues, NextPanel next,
                                                      const End& end) {
  constexpr int L = Vec::kLanes;
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) sums[i][j] = continues ? Vec::load(c + i * c_stride + j * L) : Vec::zero();
  for (int64_t q = 0; q < k; ++q, w += w_stride, a += kStep) {
    if (!kPrefetch) next.fetch();
    if (kPrefetch) {
      const char* line = reinterpret_cast<const char*>(w + k * w_stride);
#pragma GCC unroll 16
      for (int p = 0; p < V * L * static_cast<int>(sizeof(T)); p += 64) prefetch_later(line + p);
    }
    Vec weights[V];
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) {
      weights[j] = Vec::load(w + j * L);
      keep_in_register(weights[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      Vec row = Vec::all(a[i]);
      keep_in_register(row);
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) sums[i][j] = fma(row, weights[j], sums[i][j]);
    }
  }
  end(sums);
}

// Sums of `count` outputs to c; the last may end inside a vector, unless the sums continue.
template <int R, int V, bool kPrefetch, int kStep, class T>
inline __attribute__((always_inline)) void outer_tile(const float* a, const T* w, int64_t w_stride, int64_t k, float* c,
                                                      int64_t c_stride, int64_t count, OuterEnd end,
                                                      NextPanel next = {}) {
  constexpr int L = Vec::kLanes;
  const bool add = end == OuterEnd::kAdd;
  outer_sums<R, V, kPrefetch, kStep>(
      a, w, w_stride, k, c, c_stride, end == OuterEnd::kContinue, next,
      [&](const Vec(&sums)[R][V]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          float* out = c + i * c_stride;
          if (count >= V * L) {
#pragma GCC unroll 16
            for (int j = 0; j < V; ++j) (add ? Vec::load(out + j * L) + sums[i][j] : sums[i][j]).store(out + j * L);
          } else {
            for (int j = 0; j < V && j * L < count; ++j) {
              const int lanes = count - j * L < L ? static_cast<int>(count - j * L) : L;
              (add ? Vec::load(out + j * L, lanes) + sums[i][j] : sums[i][j]).store(out + j * L, lanes);
            }
          }
        }
      });
}

template <class T>
struct OuterProblem {
  const float* a;  // packed
  const T* w;
  int64_t w_stride, n, k;
  float* c;
  int64_t c_stride;
};

// Panel [kOuterPanel / width][k][width] of widened weights, width = kOuterVecs vectors; missing columns are zero.
template <class T>
void outer_fill_panel(const T* w, int64_t w_stride, int64_t k, int64_t columns, float* panel) {
  constexpr int L = Vec::kLanes;
  constexpr int64_t kWidth = kOuterVecs * L, kAhead = 8;
  for (int64_t q = 0; q < k; ++q) {
    const T* row = w + q * w_stride;
    for (int64_t p = 0; p < kOuterPanel * static_cast<int64_t>(sizeof(T)); p += 64)
      prefetch_soon(reinterpret_cast<const char*>(row + kAhead * w_stride) + p);
    for (int64_t j = 0; j < kOuterPanel; j += L) {
      const int64_t left = columns - j;
      const Vec value = left >= L  ? Vec::load(row + j)
                        : left > 0 ? Vec::load(row + j, static_cast<int>(left))
                                   : Vec::zero();
      value.store(panel + j / kWidth * kWidth * k + q * kWidth + j % kWidth);
    }
  }
}

// All rows against columns [first, first + columns) of one block of k, by way of a panel.
template <class T>
void outer_panel(const OuterProblem<T>& p, int64_t m, int64_t q, int64_t depth, int64_t first, int64_t columns,
                 const T* after) {
  constexpr int64_t kWidth = kOuterVecs * Vec::kLanes;
  constexpr int64_t kLines = kOuterPanel * static_cast<int64_t>(sizeof(T)) / 64;
  const NextPanel next{reinterpret_cast<const char*>(after), p.w_stride * static_cast<int64_t>(sizeof(T)), 0};
  const int64_t tiles = (m + kOuterRows - 1) / kOuterRows * ((columns + kWidth - 1) / kWidth);
  int64_t tile = 0;
  alignas(64) float panel[kOuterBlock * kOuterPanel];
  outer_fill_panel(p.w + q * p.w_stride + first, p.w_stride, depth, columns, panel);
  for (int64_t row = 0; row < m; row += kOuterRows) {
    const int64_t rows = m - row < kOuterRows ? m - row : kOuterRows;
    with_rows<kOuterRows>(rows, [&](auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      for (int64_t j = 0; j < columns; j += kWidth)
        outer_tile<R, kOuterVecs, false, R>(
            p.a + row * p.k + q * R, panel + j * depth, kWidth, depth, p.c + row * p.c_stride + first + j, p.c_stride,
            columns - j, q > 0 ? OuterEnd::kAdd : OuterEnd::kStore, next.share(tile++, tiles, kLines));
    });
  }
}

// R rows, the whole of a tile, against columns [first, first + columns) of one block of k, in place; columns are whole
// tiles and at most kOuterSweep.
template <int R, class T>
void outer_few_rows(const OuterProblem<T>& p, int64_t q, int64_t depth, int64_t first, int64_t columns) {
  constexpr int L = Vec::kLanes;
  constexpr int64_t kWidth = kOuterVecs * L;
  alignas(64) float sums[R * kOuterSweep];
  for (int64_t step = 0; step < depth; step += kOuterStep) {
    const int64_t steps = depth - step < kOuterStep ? depth - step : kOuterStep;
    const T* w = p.w + (q + step) * p.w_stride + first;
    for (int64_t j = 0; j < columns; j += kWidth)
      outer_tile<R, kOuterVecs, true, R>(p.a + (q + step) * R, w + j, p.w_stride, steps, sums + j, kOuterSweep, kWidth,
                                         step > 0 ? OuterEnd::kContinue : OuterEnd::kStore);
  }
  for (int64_t i = 0; i < R; ++i) {
    float* c = p.c + i * p.c_stride + first;
    for (int64_t j = 0; j < columns; j += L) {
      const Vec sum = Vec::load(sums + i * kOuterSweep + j);
      (q > 0 ? Vec::load(c + j) + sum : sum).store(c + j);
    }
  }
}

template <class T>
void outer_multiply(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
                    int64_t c_stride, const void* after) {
  const OuterProblem<T> p{
      static_cast<const float*>(packed), static_cast<const T*>(w), w_stride, n, k, static_cast<float*>(c), c_stride};
  constexpr int64_t kWidth = kOuterVecs * Vec::kLanes;
  for (int64_t q = 0; q < k; q += kOuterBlock) {
    const int64_t depth = k - q < kOuterBlock ? k - q : kOuterBlock;
    int64_t first = 0;
    if (m <= kOuterRows) {
      const int64_t whole = n / kWidth * kWidth;
      with_rows<kOuterRows>(m, [&](auto count) {
        for (; first < whole; first += kOuterSweep)
          outer_few_rows<decltype(count)::value>(p, q, depth, first,
                                                 whole - first < kOuterSweep ? whole - first : kOuterSweep);
      });
      first = whole;
    }
    for (; first < n; first += kOuterPanel) {
      const T* next = first + kOuterPanel < n ? p.w + q * w_stride + first + kOuterPanel
                      : q + kOuterBlock < k   ? p.w + (q + kOuterBlock) * w_stride
                                              : static_cast<const T*>(after);
      outer_panel(p, m, q, depth, first, n - first < kOuterPanel ? n - first : kOuterPanel, next);
    }
  }
}

inline int64_t outer_packed_bytes(int64_t m, int64_t k) { return m * k * static_cast<int64_t>(sizeof(float)); }

template <class T>
void outer_pack(const void* const* rows, const void* scale, int64_t m, int64_t k, void* packed) {
  constexpr int L = Vec::kLanes;
  for (int64_t first = 0; first < m; first += kOuterRows) {
    const int64_t count = m - first < kOuterRows ? m - first : kOuterRows;
    float* to = static_cast<float*>(packed) + first * k;
    for (int64_t q = 0; q < k; q += L) {
      const int lanes = static_cast<int>(k - q < L ? k - q : L);
      float block[kOuterRows][L];
      for (int64_t i = 0; i < count; ++i) RowReader<T>(rows, scale, first + i).load(q, lanes).store(block[i]);
      for (int l = 0; l < lanes; ++l)
        for (int64_t i = 0; i < count; ++i) to[(q + l) * count + i] = block[i][l];
    }
  }
}

FASTMOE_ROUTE_ISA_END
