// Products with output-contiguous weights: vectors run along the outputs, one element of a row is broadcast against
// vectors of weights, k goes by in registers.
//
// Order of summation: blocks of 128 elements of k, each summed one fma at a time, ascending, from +0; block sums are
// added in order. Nothing else enters.
//
// Tiles of up to kOuterRows rows by kOuterVecs vectors. Rows are packed, widened to float, as [tile][k][row]. For more
// rows than a tile holds, 128 by 64 weights become a 32 KB panel first: rows of a weight matrix lie a power of two
// apart and would evict each other from the caches. The first tile writes the panel from the vectors it multiplies, in
// the shadow of its products. Meanwhile the weights of the next block of k come to L2, a span of outputs at a time.
// Few rows read the weights once, in place, in runs as long as their rows: 8 elements of k at a time sweep over 512
// outputs whose sums wait in L1.
#pragma once

#include "common/cache.h"
#include "cpu/gemm/tile.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr int kOuterRows = kVectorRegisters == 8 ? 2 : 6;
constexpr int kOuterVecs = Vec::kLanes == 16 ? 4 : 2;
constexpr int64_t kOuterBlock = 128;  // elements of k summed before they join the result
constexpr int64_t kOuterPanel = 64;   // outputs of a panel
constexpr int64_t kOuterSpan = 384;   // outputs whose weights of a block of k are fetched together, at least
constexpr int64_t kOuterSegment = 8;  // steps of k between two fetches
constexpr int64_t kOuterSweep = 512;  // outputs whose sums wait in L1 while few rows go through the weights
constexpr int64_t kOuterStep = 8;     // elements of k of one sweep

// Outputs whose weights of a block of k are fetched together. Every page of a row of them has to be found anew, so wide
// spans are faster (1.16 to 1.2x at 32 rows, 1.08x at 64), where two blocks of weights and the results of m rows stay
// in L2; from some hundred rows on finding pages no longer counts.
inline int64_t outer_span_columns(int64_t m) {
  constexpr int64_t kWideSpan = 1024, kMostRows = 128;
  return m <= kMostRows && has_large_level2() ? kWideSpan : kOuterSpan;
}

// What a tile's sums start from and where they go.
enum class OuterEnd {
  kStore,     // c = sums from +0
  kAdd,       // c += sums from +0
  kContinue,  // the running sums themselves are in c
};

// The products of a[k][kStep], its first R, with w[k][V vectors], added to c if they continue; end(sums) takes them.
// walk(k, steps_to) goes through k: steps_to(q, beside) multiplies up to q and calls beside(q, weights) at every step.
template <int R, int V, int kStep, class T, class Walk, class End>
inline __attribute__((always_inline)) void outer_sums(const float* a, const T* w, int64_t w_stride, int64_t k,
                                                      const float* c, int64_t c_stride, bool continues,
                                                      const Walk& walk, const End& end) {
  constexpr int L = Vec::kLanes;
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) sums[i][j] = continues ? Vec::load(c + i * c_stride + j * L) : Vec::zero();
  int64_t q = 0;
  walk(k, [&](int64_t stop, const auto& beside) __attribute__((always_inline)) {
    for (; q < stop; ++q, w += w_stride, a += kStep) {
      Vec weights[V];
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) {
        weights[j] = Vec::load(w + j * L);
        keep_in_register(weights[j]);
      }
      beside(q, weights);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        Vec row = Vec::all(a[i]);
        keep_in_register(row);
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) sums[i][j] = fma(row, weights[j], sums[i][j]);
      }
    }
  });
  end(sums);
}

// A walk in one go, without anything beside the products.
struct OuterPlain {
  template <class Steps>
  inline __attribute__((always_inline)) void operator()(int64_t k, const Steps& steps_to) const {
    steps_to(k, [](int64_t, const auto&) __attribute__((always_inline)) {});
  }
};

// Sums of `count` outputs to c; the last may end inside a vector, unless the sums continue.
template <int R, int V, int kStep, class T, class Walk>
inline __attribute__((always_inline)) void outer_tile(const float* a, const T* w, int64_t w_stride, int64_t k, float* c,
                                                      int64_t c_stride, int64_t count, OuterEnd end, const Walk& walk) {
  constexpr int L = Vec::kLanes;
  const bool add = end == OuterEnd::kAdd;
  outer_sums<R, V, kStep>(
      a, w, w_stride, k, c, c_stride, end == OuterEnd::kContinue, walk,
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

// Packed rows and the results of their products.
struct OuterRows {
  const float* a;
  int64_t k;
  float* c;
  int64_t c_stride;
};

template <class T>
struct OuterProblem : OuterRows {
  const T* w;
  int64_t w_stride, n;
};

// Panel [kOuterPanel / width][k][width] of widened weights, width = kOuterVecs vectors; missing columns are zero.
template <class T>
void outer_fill_panel(const T* w, int64_t w_stride, int64_t k, int64_t columns, float* panel) {
  constexpr int L = Vec::kLanes;
  constexpr int64_t kWidth = kOuterVecs * L;
  for (int64_t q = 0; q < k; ++q) {
    const T* row = w + q * w_stride;
    for (int64_t j = 0; j < kOuterPanel; j += L) {
      const int64_t left = columns - j;
      const Vec value = left >= L  ? Vec::load(row + j)
                        : left > 0 ? Vec::load(row + j, static_cast<int>(left))
                                   : Vec::zero();
      value.store(panel + j / kWidth * kWidth * k + q * kWidth + j % kWidth);
    }
  }
}

// Row tiles: tile t of n holds rows [m t / n, m (t + 1) / n). Even tiles, because a tile of one or two rows would wait
// for its sums.
inline int64_t outer_tiles(int64_t m) { return (m + kOuterRows - 1) / kOuterRows; }

// One block of k, elements [q, q + depth), against columns [first, first + columns), by way of a panel; every tile
// fetches `lines` lines of `later`.
template <class Later>
struct OuterPart {
  int64_t q, depth, first, columns;
  Later& later;
  int64_t lines;

  // A walk through the steps of one tile that fetches meanwhile: every kOuterSegment steps, or at every one.
  template <class Steps, class Beside>
  inline __attribute__((always_inline)) void walk(const Steps& steps_to, const Beside& beside) const {
    if constexpr (Later::kAtEveryStep) {
      Later fetcher = later;  // a copy stays in registers
      const int64_t at_once = (lines + depth - 1) / depth;
      int64_t at = 0;
      for (int64_t left = lines; left > 0 && at < depth;) {
        const int64_t steps = fetcher.begin(depth - at, left, at_once);
        if (steps == 0) break;
        left -= steps * at_once;
        at += steps;
        steps_to(at, [&](int64_t s, const auto& weights) __attribute__((always_inline)) {
          for (int64_t i = 0; i < at_once; ++i) fetcher.next();
          beside(s, weights);
        });
      }
      later = fetcher;
      steps_to(depth, beside);
    } else {
      const int64_t segments = (depth + kOuterSegment - 1) / kOuterSegment, at_once = (lines + segments - 1) / segments;
      steps_to(depth, [&](int64_t s, const auto& weights) __attribute__((always_inline)) {
        if (s % kOuterSegment == 0) later.fetch(at_once);
        beside(s, weights);
      });
    }
  }
};

// Rows [row, row + R), a tile, against a part. tile(j, a, c, end) multiplies the columns from j of it on.
template <int R, class Later, class Tile>
inline __attribute__((always_inline)) void outer_tile_columns(const OuterRows& rows, const OuterPart<Later>& part,
                                                              int64_t row, const Tile& tile) {
  constexpr int64_t kWidth = kOuterVecs * Vec::kLanes;
  const float* a = rows.a + row * rows.k + part.q * R;
  for (int64_t j = 0; j < part.columns; j += kWidth) {
    float* const c = rows.c + row * rows.c_stride + part.first + j;
    for (int i = 0; part.q > 0 && i < R; ++i)
      for (int64_t v = 0; v < kWidth; v += 16) __builtin_prefetch(c + i * rows.c_stride + v, 1, 3);
    tile(j, a, c, part.q > 0 ? OuterEnd::kAdd : OuterEnd::kStore);
  }
}

// The same from a panel that is written: floats, whatever the weights are.
template <int R, class Later>
__attribute__((noinline)) void outer_tile_of_panel(const OuterRows& rows, const OuterPart<Later>& part, int64_t row,
                                                   const float* panel) {
  constexpr int64_t kWidth = kOuterVecs * Vec::kLanes;
  outer_tile_columns<R>(
      rows, part, row, [&](int64_t j, const float* a, float* c, OuterEnd end) __attribute__((always_inline)) {
        outer_tile<R, kOuterVecs, R>(a, panel + j * part.depth, kWidth, part.depth, c, rows.c_stride, part.columns - j,
                                     end, [&](int64_t, const auto& steps_to) __attribute__((always_inline)) {
                                       part.walk(steps_to, [](int64_t, const auto&) __attribute__((always_inline)) {});
                                     });
      });
}

// All rows against a part.
template <class T, class Later>
void outer_panel(const OuterProblem<T>& p, int64_t m, const OuterPart<Later>& part) {
  constexpr int L = Vec::kLanes;
  constexpr int64_t kWidth = kOuterVecs * L, kRowBytes = kWidth * static_cast<int64_t>(sizeof(T)), kAhead = 8;
  alignas(64) float panel[kOuterBlock * kOuterPanel];
  const T* const weights = p.w + part.q * p.w_stride + part.first;
  const bool is_whole = part.columns == kOuterPanel;
  if (!is_whole) outer_fill_panel(weights, p.w_stride, part.depth, part.columns, panel);
  const int64_t tiles = outer_tiles(m);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = m * tile / tiles, rows = m * (tile + 1) / tiles - row;
    with_rows<kOuterRows>(rows, [&](auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      if (tile > 0 || !is_whole) return outer_tile_of_panel<R>(p, part, row, panel);
      outer_tile_columns<R>(
          p, part, row, [&](int64_t j, const float* a, float* c, OuterEnd end) __attribute__((always_inline)) {
            const auto copy = [&](int64_t s, const Vec(&vectors)[kOuterVecs]) __attribute__((always_inline)) {
              const char* ahead = reinterpret_cast<const char*>(weights + j + (s + kAhead) * p.w_stride);
              for (int64_t at = 0; at < kRowBytes; at += 64) prefetch_soon(ahead + at);
#pragma GCC unroll 16
              for (int v = 0; v < kOuterVecs; ++v) vectors[v].store(panel + j * part.depth + s * kWidth + v * L);
            };
            outer_tile<R, kOuterVecs, R>(a, weights + j, p.w_stride, part.depth, c, p.c_stride, kWidth, end,
                                         [&](int64_t, const auto& steps_to)
                                             __attribute__((always_inline)) { part.walk(steps_to, copy); });
          });
    });
  }
}

// Columns [begin, end), at most one span, of all rows; `after`: the weights multiplied next, or null.
template <class Later, class T>
void outer_span(const OuterProblem<T>& p, int64_t m, int64_t begin, int64_t end, const T* after) {
  constexpr int64_t kTiles = kOuterPanel / (kOuterVecs * Vec::kLanes);
  const int64_t columns = end - begin, panels = (columns + kOuterPanel - 1) / kOuterPanel;
  const auto block = [&](int64_t q) { return p.k - q < kOuterBlock ? p.k - q : kOuterBlock; };
  for (int64_t q = 0; q < p.k; q += kOuterBlock) {
    const bool is_last = q + kOuterBlock >= p.k;
    const T* const next = is_last ? after : p.w + (q + kOuterBlock) * p.w_stride + begin;
    const int64_t next_depth = next == nullptr ? 0 : block(is_last ? 0 : q + kOuterBlock), depth = block(q);
    Later later(next, next_depth, next_depth, p.w_stride, columns, false);
    const int64_t passes = outer_tiles(m) * panels * kTiles, lines = (later.num_lines() + passes - 1) / passes;
    for (int64_t first = begin; first < end; first += kOuterPanel)
      outer_panel<T, Later>(p, m,
                            {q, depth, first, end - first < kOuterPanel ? end - first : kOuterPanel, later, lines});
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
      outer_tile<R, kOuterVecs, R>(p.a + (q + step) * R, w + j, p.w_stride, steps, sums + j, kOuterSweep, kWidth,
                                   step > 0 ? OuterEnd::kContinue : OuterEnd::kStore,
                                   [&](int64_t, const auto& steps_to) __attribute__((always_inline)) {
                                     steps_to(steps, [&](int64_t s, const auto&) __attribute__((always_inline)) {
                                       const auto* line =
                                           reinterpret_cast<const char*>(w + j + (s + steps) * p.w_stride);
#pragma GCC unroll 16
                                       for (int b = 0; b < kWidth * static_cast<int>(sizeof(T)); b += 64)
                                         prefetch_later(line + b);
                                     });
                                   });
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
      {static_cast<const float*>(packed), k, static_cast<float*>(c), c_stride}, static_cast<const T*>(w), w_stride, n};
  constexpr int64_t kWidth = kOuterVecs * Vec::kLanes;
  int64_t swept = 0;
  if (m <= kOuterRows) {
    const int64_t whole = n / kWidth * kWidth;
    with_rows<kOuterRows>(m, [&](auto count) {
      for (int64_t q = 0; q < k; q += kOuterBlock)
        for (swept = 0; swept < whole; swept += kOuterSweep)
          outer_few_rows<decltype(count)::value>(p, q, k - q < kOuterBlock ? k - q : kOuterBlock, swept,
                                                 whole - swept < kOuterSweep ? whole - swept : kOuterSweep);
    });
    swept = whole;
  }
  const int64_t span = outer_span_columns(m);
  for (int64_t begin = swept; begin < n; begin += span) {
    const bool is_last = begin + span >= n;
    const int64_t end = is_last ? n : begin + span;
    const T* const next = is_last ? static_cast<const T*>(after) : p.w + end;
    if (waits_for_page<T>()) outer_span<LineFetcher>(p, m, begin, end, next);
    else outer_span<TurnFetcher>(p, m, begin, end, next);
  }
}

inline int64_t outer_packed_bytes(int64_t m, int64_t k) { return m * k * static_cast<int64_t>(sizeof(float)); }

template <class T>
void outer_pack(const void* const* rows, const void* scale, int64_t m, int64_t k, void* packed) {
  constexpr int L = Vec::kLanes;
  const int64_t tiles = outer_tiles(m);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = m * tile / tiles, count = m * (tile + 1) / tiles - first;
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
