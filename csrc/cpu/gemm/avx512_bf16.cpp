// bfloat16 matrix micro-kernels on vdpbf16ps: 16 lanes, each adds the products of one pair of neighbours to a float.
//
// Dot form (the reduction is contiguous): gemm/dot.h, its vectors holding 16 pairs.
// Outer form and weight gradients: pairs of weight rows (rows of y) are interleaved into an L1 panel, pairs of x are
// broadcast against it. Order of summation: pairs ascending, one accumulator per product.
// Past the end of the reduction zeros meet zeros. The instruction treats subnormals as zeros.
#include <cstring>

#include "common/workspace.h"
#include "cpu/gemm/bf16_tiles.h"
#include "cpu/gemm/dot.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr int kRows = 6;  // rows of x in a register tile
constexpr int kCols = 4;  // vectors of outputs of a register tile
constexpr int64_t kTileCols = kCols * 16;

int64_t divide_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Packed rows: k rounded up to 32 with zeros, and a line more, so that rows of 4 KB do not share their sets.
int64_t packed_stride(int64_t k) { return divide_up(k, 32) * 64 + 64; }
int64_t packed_bytes(int64_t m, int64_t k) { return m * packed_stride(k); }

void pack(const void* const* rows, const void* scale, int64_t m, int64_t k, void* packed) {
  const float* factors = static_cast<const float*>(scale);
  for (int64_t i = 0; i < m; ++i) {
    char* out = static_cast<char*>(packed) + i * packed_stride(k);
    for (int64_t q = 0; q < k; q += 32) {
      const char* source = static_cast<const char*>(rows[i]) + q * 2;
      _mm512_store_si512(out + q * 2,
                         factors != nullptr ? load_scaled_words(source, k - q, factors[i]) : load_words(source, k - q));
    }
  }
}

inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(a), reinterpret_cast<const __m512bh&>(b));
}

// ---- Dot form: gemm/dot.h on pairs of bfloat16

struct PairMath {
  using Element = BFloat16;
  using Packed = BFloat16;
  using Value = __m512i;
  static constexpr int64_t kStep = 32;
  static constexpr int kVectors = 1;
  static constexpr int64_t kSpread = 1;
  static constexpr bool kWidens = false;
  static constexpr int64_t kStreamAhead = 2048;
  static constexpr int64_t kMaxBlock = 2048;

  static __m512i load(const BFloat16* p, int) { return _mm512_loadu_si512(p); }
  static __m512i load(const BFloat16* p, int, int count) { return load_words(p, count); }
  static __m512i load_packed(const BFloat16* p) { return _mm512_load_si512(p); }
  static Vec add_products(__m512i row, __m512i weight, Vec sum) { return {bf16::add_products(sum.v, row, weight)}; }
  static void keep(__m512i& value) { __asm__("" : "+v"(value)); }
  static void pack(const void* const* rows, const void* scales, int64_t i, int64_t q, int count, BFloat16* to,
                   int64_t) {
    const char* source = static_cast<const char*>(rows[i]) + q * 2;
    const float* factors = static_cast<const float*>(scales);
    _mm512_store_si512(to,
                       factors != nullptr ? load_scaled_words(source, count, factors[i]) : load_words(source, count));
  }
};

// ---- Outer form and weight gradients: pairs of x broadcast against a panel of interleaved pairs [pair][4 vectors]

// What the outer form asks for while a panel is multiplied: of every row of the weights of the next panel, `lines`
// lines from `at` on. The tiles of a panel share its lines, each takes some of every row.
struct NextPanel {
  const char* at = nullptr;
  int64_t stride = 0;  // bytes between rows
  int64_t lines = 0;

  inline __attribute__((always_inline)) void fetch() {
    for (int64_t i = 0; i < lines; ++i) prefetch_later(at + i * 64);
    at += stride;
  }
  // The lines of tile `tile` of `tiles`, of rows of row_lines lines.
  NextPanel share(int64_t tile, int64_t tiles, int64_t row_lines) const {
    const int64_t each = (row_lines + tiles - 1) / tiles, first = tile * each;
    if (at == nullptr || first >= row_lines) return {};
    return {at + first * 64, stride, first + each <= row_lines ? each : row_lines - first};
  }
};

// Products of kM rows with 64 columns over `pairs` pairs, added to `sum` unless `first`; pair p of row i at
// x[i * row_step + p * pair_step]. What becomes of them is up to end(acc).
template <int kM, class End>
inline __attribute__((always_inline)) void outer_tile(const int32_t* x, int64_t row_step, int64_t pair_step,
                                                      const char* panel, int64_t pairs, bool first, const float* sum,
                                                      int64_t sum_stride, NextPanel next, const End& end) {
  __m512 acc[kM][kCols];
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kCols; ++v)
      acc[i][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + i * sum_stride + v * 16);
  for (int64_t p = 0; p < pairs; ++p, x += pair_step, panel += kCols * 64) {
    next.fetch();  // one row each
    next.fetch();
    __m512i w[kCols];
    for (int v = 0; v < kCols; ++v) {
      w[v] = _mm512_load_si512(panel + v * 64);
      __asm__("" : "+v"(w[v]));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
      __m512i value = _mm512_set1_epi32(x[i * row_step]);
      __asm__("" : "+v"(value));  // one broadcast, not one per vector
#pragma GCC unroll 4
      for (int v = 0; v < kCols; ++v) acc[i][v] = add_products(acc[i][v], value, w[v]);
    }
  }
  end(acc);
}

// The sums go back to `sum`.
template <int kM>
void outer_tile(const int32_t* x, int64_t row_step, int64_t pair_step, const char* panel, int64_t pairs, bool first,
                float* sum, int64_t sum_stride, NextPanel next) {
  outer_tile<kM>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride, next,
                 [&](const __m512(&acc)[kM][kCols]) __attribute__((always_inline)) {
#pragma GCC unroll 8
                   for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
                     for (int v = 0; v < kCols; ++v) _mm512_storeu_ps(sum + i * sum_stride + v * 16, acc[i][v]);
                 });
}

void outer_tile(int64_t rows, const int32_t* x, int64_t row_step, int64_t pair_step, const char* panel, int64_t pairs,
                bool first, float* sum, int64_t sum_stride, const NextPanel& next = {}) {
  switch (rows) {
    case 1: return outer_tile<1>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride, next);
    case 2: return outer_tile<2>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride, next);
    case 3: return outer_tile<3>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride, next);
    case 4: return outer_tile<4>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride, next);
    case 5: return outer_tile<5>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride, next);
    default: return outer_tile<6>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride, next);
  }
}

// One pair of rows, `width` columns, to groups of 64 columns that lie group_bytes apart; zeros up to a group's end.
void interleave_rows(const char* even, const char* odd, int64_t width, char* out, int64_t group_bytes) {
  for (int64_t j = 0; j < width; j += kTileCols, out += group_bytes)
    for (int64_t s = 0; s < kTileCols; s += 32) {
      const __m512i first = load_words(even + (j + s) * 2, width - j - s);
      const __m512i second = odd != nullptr ? load_words(odd + (j + s) * 2, width - j - s) : _mm512_setzero_si512();
      __m512i low, high;
      interleave(first, second, low, high);
      _mm512_store_si512(out + s * 4, low);
      _mm512_store_si512(out + s * 4 + 64, high);
    }
}

constexpr int64_t kOuterDepth = 128;  // weight rows of a panel
constexpr int64_t kOuterCols = 256;   // columns of a panel: four groups of 16 KB

// One panel, interleaved: all rows of x against `width` columns of the weights over `depth` of their rows.
struct OuterPanel {
  const char* x;
  int64_t x_stride;  // bytes
  int64_t m;
  const char* panel;
  int64_t group_bytes;
  int64_t width;
  int64_t depth;
  bool first;
  NextPanel next;
};

void multiply_panel(const OuterPanel& p, float* c, int64_t c_stride) {
  alignas(64) float edge[kRows * kTileCols];
  const int64_t tiles = divide_up(p.m, kRows) * divide_up(p.width, kTileCols);
  int64_t tile = 0;
  for (int64_t j = 0; j < p.width; j += kTileCols)
    for (int64_t i = 0; i < p.m; i += kRows, ++tile) {
      float* out = c + i * c_stride + j;
      const int64_t here = smaller(p.m - i, kRows), cols = smaller(p.width - j, kTileCols);
      const bool whole = cols == kTileCols;
      if (!whole && !p.first)
        for (int64_t s = 0; s < here; ++s) std::memcpy(edge + s * kTileCols, out + s * c_stride, cols * 4);
      outer_tile(here, reinterpret_cast<const int32_t*>(p.x + i * p.x_stride), p.x_stride / 4, 1,
                 p.panel + j / kTileCols * p.group_bytes, divide_up(p.depth, 2), p.first, whole ? out : edge,
                 whole ? c_stride : kTileCols, p.next.share(tile, tiles, divide_up(p.width * 2, 64)));
      if (!whole)
        for (int64_t s = 0; s < here; ++s) std::memcpy(out + s * c_stride, edge + s * kTileCols, cols * 4);
    }
}

constexpr int64_t kSweep = 1024;   // outputs whose sums wait in L1 while few rows of x go through the weights
constexpr int64_t kSweepStep = 8;  // weight rows of one sweep

// Few rows of x: weight rows are interleaved in registers, in place, in runs as long as a sweep; `width` is whole tiles
// and at most kSweep. The same order of summation.
template <int kM>
void outer_sweep(const char* x, int64_t x_stride, const char* w, int64_t w_stride, int64_t width, int64_t k, float* c,
                 int64_t c_stride) {
  alignas(64) float sums[kM * kSweep];
  for (int64_t k0 = 0; k0 < k; k0 += kSweepStep)
    for (int64_t j = 0; j < width; j += kTileCols) {
      __m512 acc[kM][kCols];
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kCols; ++v)
          acc[i][v] = k0 == 0 ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * kSweep + j + v * 16);
      for (int64_t q = k0; q < smaller(k, k0 + kSweepStep); q += 2) {
        const char* even = w + q * w_stride + j * 2;
        const char* odd = even + w_stride;
        __m512i pairs[kCols];
        for (int half = 0; half < 2; ++half) {
          prefetch_later(even + half * 64 + kSweepStep * w_stride);
          prefetch_later(odd + half * 64 + kSweepStep * w_stride);
          interleave(_mm512_loadu_si512(even + half * 64),
                     q + 1 < k ? _mm512_loadu_si512(odd + half * 64) : _mm512_setzero_si512(), pairs[2 * half],
                     pairs[2 * half + 1]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kM; ++i) {
          int32_t pair;
          std::memcpy(&pair, x + i * x_stride + q * 2, sizeof pair);
          __m512i value = _mm512_set1_epi32(pair);
          __asm__("" : "+v"(value));
#pragma GCC unroll 4
          for (int v = 0; v < kCols; ++v) acc[i][v] = add_products(acc[i][v], value, pairs[v]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kCols; ++v) _mm512_store_ps(sums + i * kSweep + j + v * 16, acc[i][v]);
    }
  for (int i = 0; i < kM; ++i)
    std::memcpy(c + i * c_stride, sums + i * kSweep, static_cast<size_t>(width) * sizeof(float));
}

void multiply_outer(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
                    int64_t c_stride, const void* after) {
  constexpr int64_t kGroupBytes = kOuterDepth / 2 * kTileCols * 4;
  alignas(64) char panel[kOuterCols / kTileCols * kGroupBytes];
  const char* weights = static_cast<const char*>(w);
  int64_t swept = 0;
  if (m <= kRows) {
    const int64_t whole = n / kTileCols * kTileCols;
    with_rows<kRows>(m, [&](auto count) {
      for (; swept < whole; swept += smaller(whole - swept, kSweep))
        outer_sweep<decltype(count)::value>(static_cast<const char*>(packed), packed_stride(k), weights + swept * 2,
                                            w_stride * 2, smaller(whole - swept, kSweep), k,
                                            static_cast<float*>(c) + swept, c_stride);
    });
  }
  for (int64_t n0 = swept; n0 < n; n0 += kOuterCols)
    for (int64_t k0 = 0; k0 < k; k0 += kOuterDepth) {
      const int64_t width = smaller(n - n0, kOuterCols), depth = smaller(k - k0, kOuterDepth);
      const char* rows = weights + (k0 * w_stride + n0) * 2;
      for (int64_t q = 0; q < depth; q += 2, rows += w_stride * 4)
        interleave_rows(rows, q + 1 < depth ? rows + w_stride * 2 : nullptr, width, panel + q / 2 * kTileCols * 4,
                        kGroupBytes);
      const char* next = k0 + kOuterDepth < k  ? weights + ((k0 + kOuterDepth) * w_stride + n0) * 2
                         : n0 + kOuterCols < n ? weights + (n0 + kOuterCols) * 2
                                               : static_cast<const char*>(after);
      multiply_panel({static_cast<const char*>(packed) + k0 * 2, packed_stride(k), m, panel, kGroupBytes, width, depth,
                      k0 == 0, NextPanel{next, w_stride * 2, 0}},
                     static_cast<float*>(c) + n0, c_stride);
    }
}

constexpr int64_t kGradIn = 16 * kRows;  // inputs of a panel of x: 96, and whole vectors
constexpr int64_t kGradRows = 160;       // of a panel: 20 KB of y and 2 KB of x stay in an L1 of 32 KB
constexpr int64_t kGradPairs = kGradRows / 2;

struct GradientPanels {
  alignas(64) int32_t x[kGradIn * kGradPairs];     // [input / kRows][pair of rows][kRows]
  alignas(64) char y[kGradPairs * kTileCols * 4];  // [pair of rows][64 outputs]
  alignas(64) float sum[kGradIn * kTileCols];
};

const char* row_at(const void* const* rows, int64_t r, int64_t count, int64_t column) {
  return r < count ? static_cast<const char*>(rows[r]) + column * 2 : nullptr;
}

// `in` inputs from i0 on, dealt out to tiles.
void interleave_inputs(const void* const* x, int64_t count, int64_t i0, int64_t in, int32_t* panel) {
  alignas(64) char line[2 * kTileCols * 4];
  for (int64_t r = 0; r < count; r += 2) {
    interleave_rows(row_at(x, r, count, i0), row_at(x, r + 1, count, i0), in, line, kTileCols * 4);
    for (int64_t i = 0; i < in; i += kRows)
      std::memcpy(panel + i * kGradPairs + r / 2 * kRows, line + i * 4, kRows * 4);
  }
}

inline __m512i rounded_pair(__m512 low, __m512 high) {
  const __m512bh words = _mm512_cvtne2ps_pbh(high, low);
  return reinterpret_cast<const __m512i&>(words);
}

// A tile of a gradient, rounded from registers: the first `rows` rows, `width` outputs of each.
inline __attribute__((always_inline)) void store_gradient(const __m512 (&acc)[kRows][kCols], int64_t rows,
                                                          int64_t width, char* out, int64_t out_stride, bool streams) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i words = rounded_pair(acc[i][2 * half], acc[i][2 * half + 1]);
      char* to = out + i * out_stride * 2 + half * 64;
      if (streams) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), words);
      else if (width == kTileCols) _mm512_storeu_si512(to, words);
      else _mm512_mask_storeu_epi16(to, first_words(width - half * 32), words);
    }
  }
}

void weight_gradient(const void* const* x, const void* const* y, int64_t rows, int64_t a, int64_t b, void* out,
                     int64_t out_stride, bool past_caches) {
  GradientPanels* panels = static_cast<GradientPanels*>(scratch(Scratch::kMicroKernel, sizeof(GradientPanels)));
  const int64_t blocks = divide_up(rows, kGradRows);
  const int64_t block_rows = blocks > 0 ? divide_up(divide_up(rows, blocks), 2) * 2 : 0;  // pairs stay together
  const bool streams = past_caches && is_whole_lines(out, out_stride * 2);
  for (int64_t i0 = 0; i0 < a; i0 += kGradIn)
    for (int64_t j0 = 0; j0 < b; j0 += kTileCols) {
      const int64_t in = smaller(a - i0, kGradIn), width = smaller(b - j0, kTileCols);
      char* result = static_cast<char*>(out) + (i0 * out_stride + j0) * 2;
      for (int64_t r0 = 0; r0 < rows; r0 += block_rows) {
        const int64_t count = smaller(rows - r0, block_rows), pairs = divide_up(count, 2);
        if (j0 == 0 || blocks > 1)  // one block of rows: x is interleaved once for all outputs
          interleave_inputs(x + r0, count, i0, in, panels->x);
        for (int64_t r = 0; r < count; r += 2)
          interleave_rows(row_at(y + r0, r, count, j0), row_at(y + r0, r + 1, count, j0), width,
                          panels->y + r / 2 * kTileCols * 4, 0);
        for (int64_t i = 0; i < in; i += kRows) {
          float* sum = panels->sum + i * kTileCols;
          const int32_t* inputs = panels->x + i * kGradPairs;
          if (r0 + block_rows < rows)
            outer_tile<kRows>(inputs, 1, kRows, panels->y, pairs, r0 == 0, sum, kTileCols, {});
          else
            outer_tile<kRows>(inputs, 1, kRows, panels->y, pairs, r0 == 0, sum, kTileCols, {},
                              [&](const __m512(&acc)[kRows][kCols]) __attribute__((always_inline)) {
                                store_gradient(acc, in - i, width, result + i * out_stride * 2, out_stride,
                                               streams && width == kTileCols);
                              });
        }
      }
    }
  if (streams) _mm_sfence();
}

}  // namespace

void use_avx512_bf16(MicroKernels& micro) {
  const int type = static_cast<int>(DType::kBFloat16);
  micro.dot[type] = dot_kernel<PairMath>();
  micro.outer[type] = {packed_bytes, pack, multiply_outer};
  micro.wgrad[type] = {weight_gradient};
}

FASTMOE_ROUTE_ISA_END
