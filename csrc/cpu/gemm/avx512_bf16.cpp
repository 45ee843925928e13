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
  static constexpr int64_t kMaxBlock = 2048;

  static __m512i load(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static __m512i load(const BFloat16* p, int count) { return load_words(p, count); }
  static __m512i load_packed(const BFloat16* p) { return _mm512_load_si512(p); }
  static Vec add_products(__m512i row, __m512i weight, Vec sum) { return {bf16::add_products(sum.v, row, weight)}; }
  static void keep(__m512i& value) { __asm__("" : "+v"(value)); }
  static void pack(const void* const* rows, const void* scales, int64_t i, int64_t q, int count, BFloat16* to) {
    const char* source = static_cast<const char*>(rows[i]) + q * 2;
    const float* factors = static_cast<const float*>(scales);
    _mm512_store_si512(to,
                       factors != nullptr ? load_scaled_words(source, count, factors[i]) : load_words(source, count));
  }
};

// ---- Outer form and weight gradients: pairs of x broadcast against a panel of interleaved pairs [pair][4 vectors]

// sum[i][0 .. 63] over `pairs` pairs, continued unless `first`; pair p of row i at x[i * row_step + p * pair_step].
template <int kM>
void outer_tile(const int32_t* x, int64_t row_step, int64_t pair_step, const char* panel, int64_t pairs, bool first,
                float* sum, int64_t sum_stride) {
  __m512 acc[kM][kCols];
  for (int i = 0; i < kM; ++i)
    for (int v = 0; v < kCols; ++v)
      acc[i][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + i * sum_stride + v * 16);
  for (int64_t p = 0; p < pairs; ++p, x += pair_step, panel += kCols * 64) {
    __m512i w[kCols];
    for (int v = 0; v < kCols; ++v) {
      w[v] = _mm512_load_si512(panel + v * 64);
      __asm__("" : "+v"(w[v]));
    }
    for (int i = 0; i < kM; ++i) {
      const __m512i value = _mm512_set1_epi32(x[i * row_step]);
      for (int v = 0; v < kCols; ++v) acc[i][v] = add_products(acc[i][v], value, w[v]);
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int v = 0; v < kCols; ++v) _mm512_storeu_ps(sum + i * sum_stride + v * 16, acc[i][v]);
}

void outer_tile(int64_t rows, const int32_t* x, int64_t row_step, int64_t pair_step, const char* panel, int64_t pairs,
                bool first, float* sum, int64_t sum_stride) {
  switch (rows) {
    case 1: return outer_tile<1>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride);
    case 2: return outer_tile<2>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride);
    case 3: return outer_tile<3>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride);
    case 4: return outer_tile<4>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride);
    case 5: return outer_tile<5>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride);
    default: return outer_tile<6>(x, row_step, pair_step, panel, pairs, first, sum, sum_stride);
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

void multiply_outer(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
                    int64_t c_stride, const void*) {
  constexpr int64_t kGroupBytes = kOuterDepth / 2 * kTileCols * 4;
  alignas(64) char panel[kOuterCols / kTileCols * kGroupBytes];
  alignas(64) float edge[kRows * kTileCols];
  for (int64_t n0 = 0; n0 < n; n0 += kOuterCols)
    for (int64_t k0 = 0; k0 < k; k0 += kOuterDepth) {
      const int64_t width = smaller(n - n0, kOuterCols), depth = smaller(k - k0, kOuterDepth);
      const char* rows = static_cast<const char*>(w) + (k0 * w_stride + n0) * 2;
      for (int64_t q = 0; q < depth; q += 2, rows += w_stride * 4)
        interleave_rows(rows, q + 1 < depth ? rows + w_stride * 2 : nullptr, width, panel + q / 2 * kTileCols * 4,
                        kGroupBytes);
      for (int64_t j = 0; j < width; j += kTileCols)
        for (int64_t i = 0; i < m; i += kRows) {
          const char* x = static_cast<const char*>(packed) + i * packed_stride(k) + k0 * 2;
          float* out = static_cast<float*>(c) + i * c_stride + n0 + j;
          const int64_t here = smaller(m - i, kRows), cols = smaller(width - j, kTileCols);
          const bool whole = cols == kTileCols;
          if (!whole && k0 > 0)
            for (int64_t s = 0; s < here; ++s) std::memcpy(edge + s * kTileCols, out + s * c_stride, cols * 4);
          outer_tile(here, reinterpret_cast<const int32_t*>(x), packed_stride(k) / 4, 1,
                     panel + j / kTileCols * kGroupBytes, divide_up(depth, 2), k0 == 0, whole ? out : edge,
                     whole ? c_stride : kTileCols);
          if (!whole)
            for (int64_t s = 0; s < here; ++s) std::memcpy(out + s * c_stride, edge + s * kTileCols, cols * 4);
        }
    }
}

constexpr int64_t kGradIn = 16 * kRows;  // inputs of a panel of x: 96, and whole vectors
constexpr int64_t kGradRows = 256;

struct GradientPanels {
  alignas(64) int32_t x[kGradRows / 2 * 128];         // [pair of rows][input], two groups of 64
  alignas(64) char y[kGradRows / 2 * kTileCols * 4];  // [pair of rows][64 outputs]
  alignas(64) float sum[kGradIn * kTileCols];
};

void weight_gradient(const void* const* x, const void* const* y, int64_t rows, int64_t a, int64_t b, void* out,
                     int64_t out_stride) {
  GradientPanels* panels = static_cast<GradientPanels*>(scratch(Scratch::kMicroKernel, sizeof(GradientPanels)));
  const auto row = [](const void* const* base, int64_t r, int64_t column) {
    return static_cast<const char*>(base[r]) + column * 2;
  };
  for (int64_t i0 = 0; i0 < a; i0 += kGradIn)
    for (int64_t j0 = 0; j0 < b; j0 += kTileCols) {
      const int64_t in = smaller(a - i0, kGradIn), width = smaller(b - j0, kTileCols);
      int64_t r0 = 0;
      do {  // once without rows: zeros
        const int64_t count = smaller(rows - r0, kGradRows);
        for (int64_t r = r0; r < r0 + count; r += 2) {
          const bool paired = r + 1 < r0 + count;
          if (j0 == 0 || rows > kGradRows)  // one block of rows: x is interleaved once for all outputs
            interleave_rows(row(x, r, i0), paired ? row(x, r + 1, i0) : nullptr, in,
                            reinterpret_cast<char*>(panels->x + (r - r0) / 2 * 128), kTileCols * 4);
          interleave_rows(row(y, r, j0), paired ? row(y, r + 1, j0) : nullptr, width,
                          panels->y + (r - r0) / 2 * kTileCols * 4, 0);
        }
        for (int64_t i = 0; i < in; i += kRows)
          outer_tile(smaller(in - i, kRows), panels->x + i, 1, 128, panels->y, divide_up(count, 2), r0 == 0,
                     panels->sum + i * kTileCols, kTileCols);
        r0 += kGradRows;
      } while (r0 < rows);
      for (int64_t i = 0; i < in; ++i)
        for (int64_t j = 0; j < width; j += 16)
          store_rounded(_mm512_load_ps(panels->sum + i * kTileCols + j), width - j,
                        static_cast<char*>(out) + ((i0 + i) * out_stride + j0 + j) * 2);
    }
}

}  // namespace

void use_avx512_bf16(MicroKernels& micro) {
  const int type = static_cast<int>(DType::kBFloat16);
  micro.dot[type] = dot_kernel<PairMath>();
  micro.outer[type] = {packed_bytes, pack, multiply_outer};
  micro.wgrad[type] = {weight_gradient};
}

FASTMOE_ROUTE_ISA_END
