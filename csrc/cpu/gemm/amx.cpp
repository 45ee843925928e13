// bfloat16 matrix micro-kernels on AMX tiles: 16 rows of 64 bytes, one instruction multiplies 16 x 32 by 32 x 16.
//
// Operand A of the tile product holds 32 consecutive reduction elements a row; operand B holds them as pairs, one row
// per pair. Weights whose reduction is contiguous (dot) are already A: they are multiplied by activations packed as B,
// and the product comes out transposed. Weights whose outputs are contiguous (outer) become B by interleaving rows
// k and k + 1, against activations packed as A. Weight gradients reduce over rows: x becomes A by a transpose, y
// becomes B by interleaving.
// Weights are copied block by block to a panel of whole tiles: it stays in L1/L2 for all rows of x, edges are zeros
// there, and the copy reads memory in long runs. Zeros meet zeros past the end of the reduction, so padding adds exact
// zeros; padded rows and columns are computed and never stored.
// Order of summation: tile products of 32 elements, ascending, accumulated in float; spilling a tile is exact, so the
// blocking is free to change with the sizes. The hardware treats subnormal inputs and results as zeros.
#include <cstring>

#include "common/workspace.h"
#include "cpu/gemm/bf16_tiles.h"
#include "cpu/gemm/micro.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr int64_t kSide = 16;   // rows of a tile, and its 32-bit columns
constexpr int64_t kDepth = 32;  // reduction elements of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPair = 2 * kSide;  // weight columns of a slice: two tiles
constexpr int64_t kSliceTiles = 8;    // tiles along the reduction in one slice of the panel: 16 KB
constexpr int64_t kSliceBytes = kSliceTiles * 2 * kTileBytes;
constexpr int64_t kSlices = 4;     // slices of a panel
constexpr int64_t kMaxRows = 512;  // rows of x per pass over the weights

int64_t divide_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// All eight tiles whole, for the life of one call: other libraries set their own.
class Tiles {
 public:
  Tiles() {
    alignas(64) Config config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kSide;
    }
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

// Tile loads are opaque to the compiler: everything stored so far has to be in memory.
inline void finish_stores() { __asm__ volatile("" : : : "memory"); }

// Up to two tiles of weights (tmm4, tmm5) by up to two of x (tmm6, tmm7) over `depth` tiles of the reduction. Sums
// are tiles at sum[x tile][weight tile]; continued unless `first`. kOuter: x is operand A, else the weights are.
template <int kXTiles, int kWTiles, bool kOuter>
inline void multiply_tiles(const char* x, int64_t x_next, const char* w, int64_t depth, bool first, float* sum) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sum, 64);
    if (kWTiles == 2) _tile_loadd(1, sum + 256, 64);
    if (kXTiles == 2) _tile_loadd(2, sum + 512, 64);
    if (kXTiles == 2 && kWTiles == 2) _tile_loadd(3, sum + 768, 64);
  }
  for (int64_t t = 0; t < depth; ++t, x += kTileBytes, w += 2 * kTileBytes) {
    _tile_loadd(4, w, 64);
    _tile_loadd(6, x, 64);
    if (kOuter) _tile_dpbf16ps(0, 6, 4);
    else _tile_dpbf16ps(0, 4, 6);
    if (kWTiles == 2) {
      _tile_loadd(5, w + kTileBytes, 64);
      if (kOuter) _tile_dpbf16ps(1, 6, 5);
      else _tile_dpbf16ps(1, 5, 6);
    }
    if (kXTiles == 2) {
      _tile_loadd(7, x + x_next, 64);
      if (kOuter) _tile_dpbf16ps(2, 7, 4);
      else _tile_dpbf16ps(2, 4, 7);
      if (kWTiles == 2) {
        if (kOuter) _tile_dpbf16ps(3, 7, 5);
        else _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sum, 64);
  if (kWTiles == 2) _tile_stored(1, sum + 256, 64);
  if (kXTiles == 2) _tile_stored(2, sum + 512, 64);
  if (kXTiles == 2 && kWTiles == 2) _tile_stored(3, sum + 768, 64);
}

template <bool kOuter>
void multiply_tiles(int64_t x_tiles, int64_t w_tiles, const char* x, int64_t x_next, const char* w, int64_t depth,
                    bool first, float* sum) {
  if (x_tiles == 2 && w_tiles == 2) multiply_tiles<2, 2, kOuter>(x, x_next, w, depth, first, sum);
  else if (x_tiles == 2) multiply_tiles<2, 1, kOuter>(x, x_next, w, depth, first, sum);
  else if (w_tiles == 2) multiply_tiles<1, 2, kOuter>(x, x_next, w, depth, first, sum);
  else multiply_tiles<1, 1, kOuter>(x, x_next, w, depth, first, sum);
}

// Weights of one block: `width` columns (at most kPair) and `depth` reduction elements become a slice of tiles
// [reduction / 32][2][1 KB], zeros past both ends. `ahead` is the distance in bytes to the block that comes next.
void copy_dot_slice(const char* w, int64_t stride_bytes, int64_t width, int64_t depth, int64_t ahead, char* slice) {
  const int64_t tiles = divide_up(depth, kDepth);
  for (int64_t j = 0; j < kPair; ++j) {
    char* out = slice + j / kSide * kTileBytes + j % kSide * 64;
    if (j >= width) {
      if (j / kSide * kSide >= width) return;
      for (int64_t t = 0; t < tiles; ++t) _mm512_store_si512(out + t * 2 * kTileBytes, _mm512_setzero_si512());
      continue;
    }
    const char* row = w + j * stride_bytes;
    int64_t t = 0;
    for (; (t + 1) * kDepth <= depth; ++t) {
      _mm_prefetch(row + t * 64 + ahead, _MM_HINT_T1);
      _mm512_store_si512(out + t * 2 * kTileBytes, _mm512_loadu_si512(row + t * 64));
    }
    if (t < tiles) _mm512_store_si512(out + t * 2 * kTileBytes, load_words(row + t * 64, depth - t * kDepth));
  }
}

// The same for a panel of slices side by side: whole runs of `width` columns of each weight row.
void copy_outer_panel(const char* w, int64_t stride_bytes, int64_t width, int64_t depth, int64_t ahead, char* panel) {
  const int64_t padded = divide_up(depth, kDepth) * kDepth;
  for (int64_t q = 0; q < padded; q += 2, w += 2 * stride_bytes) {
    char* out = panel + q / kDepth * 2 * kTileBytes + q % kDepth / 2 * 64;
    for (int64_t j = 0; j < width; j += kPair, out += kSliceBytes) {
      const __m512i even = q < depth ? load_words(w + j * 2, width - j) : _mm512_setzero_si512();
      const __m512i odd = q + 1 < depth ? load_words(w + stride_bytes + j * 2, width - j) : _mm512_setzero_si512();
      _mm_prefetch(w + j * 2 + ahead, _MM_HINT_T1);
      _mm_prefetch(w + stride_bytes + j * 2 + ahead, _MM_HINT_T1);
      __m512i low, high;
      interleave(even, odd, low, high);
      _mm512_store_si512(out, low);
      _mm512_store_si512(out + kTileBytes, high);
    }
  }
}

// Tile sums to c: rows < m, columns < n. kOuter: a sum tile is [x row][weight column], else its transpose.
template <bool kOuter>
void store_sum(const float* sum, int64_t m, int64_t n, float* c, int64_t c_stride) {
  const __mmask16 columns = first_dwords(n);
  if (kOuter) {
    for (int64_t i = 0; i < smaller(m, kSide); ++i)
      _mm512_mask_storeu_ps(c + i * c_stride, columns, _mm512_load_ps(sum + i * kSide));
  } else if (m < 4) {
    const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(kSide));
    for (int64_t i = 0; i < m; ++i)
      _mm512_mask_storeu_ps(c + i * c_stride, columns, _mm512_i32gather_ps(lanes, sum + i, 4));
  } else {
    __m512i rows[16];
    for (int64_t j = 0; j < kSide; ++j) rows[j] = _mm512_load_si512(sum + j * kSide);
    transpose(rows);
    for (int64_t i = 0; i < smaller(m, kSide); ++i)
      _mm512_mask_storeu_ps(c + i * c_stride, columns, _mm512_castsi512_ps(rows[i]));
  }
}

// Both forms: packed x is [row / 16][reduction / 32][1 KB], `m` at most kMaxRows.
template <bool kOuter>
void multiply_rows(const char* packed, int64_t m, const char* w, int64_t w_stride, int64_t n, int64_t k, float* c,
                   int64_t c_stride, char* panel, float* sums) {
  const int64_t stride_bytes = w_stride * 2;
  const int64_t next_row_tile = divide_up(k, kDepth) * kTileBytes;
  const int64_t row_tiles = divide_up(m, kSide);
  constexpr int64_t kSlice = kSliceTiles * kDepth;
  // Many rows of x: a block of them is read from L2 for several slices. Few: whole weight rows are read in one go.
  const int64_t panel_width = kOuter || row_tiles > 4 ? kSlices * kPair : kPair;
  const int64_t pairs = divide_up(row_tiles, 2);
  for (int64_t n0 = 0; n0 < n; n0 += panel_width) {
    const int64_t width = smaller(n - n0, panel_width);
    for (int64_t k0 = 0; k0 < k; k0 += kSlice) {
      const int64_t depth = smaller(k - k0, kSlice);
      const bool last = k0 + kSlice >= k;
      if (kOuter) {
        copy_outer_panel(w + k0 * stride_bytes + n0 * 2, stride_bytes, width, depth,
                         last ? panel_width * 2 - k0 * stride_bytes : kSlice * stride_bytes, panel);
      } else {
        for (int64_t j = 0; j < width; j += kPair)
          copy_dot_slice(w + (n0 + j) * stride_bytes + k0 * 2, stride_bytes, smaller(width - j, kPair), depth,
                         last ? panel_width * stride_bytes - k0 * 2 : kSlice * 2, panel + j / kPair * kSliceBytes);
      }
      finish_stores();
      for (int64_t j = 0; j < width; j += kPair) {
        const int64_t here = smaller(width - j, kPair);
        for (int64_t i = 0; i < row_tiles; i += 2) {
          // Spilled sums keep their place between slices of the reduction.
          float* sum = sums + (j / kPair * pairs + i / 2) * 4 * 256;
          const int64_t tiles = smaller(row_tiles - i, 2);
          multiply_tiles<kOuter>(tiles, here > kSide ? 2 : 1, packed + i * next_row_tile + k0 / kDepth * kTileBytes,
                                 next_row_tile, panel + j / kPair * kSliceBytes, divide_up(depth, kDepth), k0 == 0,
                                 sum);
          if (!last) continue;
          for (int64_t t = 0; t < tiles; ++t)
            for (int64_t s = 0; s < here; s += kSide)
              store_sum<kOuter>(sum + t * 512 + s * 16, m - (i + t) * kSide, here - s,
                                c + (i + t) * kSide * c_stride + n0 + j + s, c_stride);
        }
      }
    }
  }
}

template <bool kOuter>
void multiply(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
              int64_t c_stride, const void*) {
  constexpr int64_t kPanelBytes = kSlices * kSliceBytes;
  const int64_t rows = smaller(divide_up(m, kPair) * kPair, kMaxRows);
  char* panel =
      static_cast<char*>(scratch(Scratch::kMicroKernel, kPanelBytes + rows * kSlices * kPair * sizeof(float)));
  const Tiles tiles;
  for (int64_t i = 0; i < m; i += kMaxRows)
    multiply_rows<kOuter>(static_cast<const char*>(packed) + i / kSide * divide_up(k, kDepth) * kTileBytes,
                          smaller(m - i, kMaxRows), static_cast<const char*>(w), w_stride, n, k,
                          static_cast<float*>(c) + i * c_stride, c_stride, panel,
                          reinterpret_cast<float*>(panel + kPanelBytes));
}

int64_t packed_bytes(int64_t m, int64_t k) { return divide_up(m, kSide) * divide_up(k, kDepth) * kTileBytes; }

template <bool kOuter>
void pack(const void* const* rows, const void* scale, int64_t m, int64_t k, void* packed) {
  const float* factors = static_cast<const float*>(scale);
  char* out = static_cast<char*>(packed);
  for (int64_t i0 = 0; i0 < m; i0 += kSide)
    for (int64_t q = 0; q < k; q += kDepth, out += kTileBytes) {
      __m512i tile[16];
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t row = i0 + i;
        if (row >= m) {
          tile[i] = _mm512_setzero_si512();
          continue;
        }
        const char* source = static_cast<const char*>(rows[row]) + q * 2;
        tile[i] = factors != nullptr ? load_scaled_words(source, k - q, factors[row]) : load_words(source, k - q);
      }
      if (!kOuter) transpose(tile);
      for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(out + i * 64, tile[i]);
    }
}

// ---- Weight gradient

constexpr int64_t kGradRows = 256;  // rows per pass
constexpr int64_t kGradIn = 256;    // inputs per pass
constexpr int64_t kGradOut = 1024;  // outputs per pass
constexpr int64_t kGradCols = 256;  // outputs of one panel of y
constexpr int64_t kGradSliceBytes = kGradRows / kDepth * 2 * kTileBytes;

// 32 elements of row r, zeros past the rows and columns there are.
inline __m512i row_words(const void* const* base, int64_t r, int64_t rows, int64_t column, int64_t left) {
  if (r >= rows) return _mm512_setzero_si512();
  return load_words(static_cast<const char*>(base[r]) + column * 2, left);
}

// x [rows, a] from input i0, as operand A: [input / 16][row / 32][16 inputs][32 rows].
void pack_inputs(const void* const* x, int64_t rows, int64_t i0, int64_t width, char* out) {
  const int64_t row_tiles = divide_up(rows, kDepth);
  for (int64_t r = 0; r < row_tiles; ++r)
    for (int64_t i = 0; i < width; i += kPair) {
      __m512i low[16], high[16];
      for (int64_t p = 0; p < kSide; ++p)
        interleave(row_words(x, r * kDepth + 2 * p, rows, i0 + i, width - i),
                   row_words(x, r * kDepth + 2 * p + 1, rows, i0 + i, width - i), low[p], high[p]);
      transpose(low);
      char* tile = out + (i / kSide * row_tiles + r) * kTileBytes;
      for (int64_t p = 0; p < kSide; ++p) _mm512_store_si512(tile + p * 64, low[p]);
      if (width - i <= kSide) continue;
      transpose(high);
      tile += row_tiles * kTileBytes;
      for (int64_t p = 0; p < kSide; ++p) _mm512_store_si512(tile + p * 64, high[p]);
    }
}

// y [rows, b] from output j0, as operand B: slices of 32 outputs [row / 32][2][16 pairs of rows][16 outputs].
void pack_outputs(const void* const* y, int64_t rows, int64_t j0, int64_t width, char* panel) {
  for (int64_t r = 0; r < divide_up(rows, kDepth) * kDepth; r += 2) {
    char* out = panel + r / kDepth * 2 * kTileBytes + r % kDepth / 2 * 64;
    for (int64_t j = 0; j < width; j += kPair, out += kGradSliceBytes) {
      __m512i low, high;
      interleave(row_words(y, r, rows, j0 + j, width - j), row_words(y, r + 1, rows, j0 + j, width - j), low, high);
      _mm512_store_si512(out, low);
      _mm512_store_si512(out + kTileBytes, high);
    }
  }
}

// Up to 32 x 32 sums, rounded.
void store_gradient(const float* sum, int64_t in, int64_t width, char* out, int64_t out_stride) {
  const __mmask32 columns = first_words(width);
  for (int64_t i = 0; i < in; ++i, out += out_stride * 2) {
    const float* row = sum + i / kSide * 512 + i % kSide * 16;
    const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(row + 256), _mm512_load_ps(row));
    const __m512i bits = reinterpret_cast<const __m512i&>(rounded);
    if (width < kPair) _mm512_mask_storeu_epi16(out, columns, bits);
    else _mm512_storeu_si512(out, bits);
  }
}

struct GradientScratch {
  alignas(64) char x[kGradIn * kGradRows * 2];
  alignas(64) char y[kGradCols / kPair * kGradSliceBytes];
  alignas(64) float sums[kGradIn * kGradOut];  // spilled between passes over rows; few rows use the first tiles only
};

// One block of at most kGradIn inputs by kGradOut outputs, over all rows.
void gradient_block(const void* const* x, const void* const* y, int64_t rows, int64_t i0, int64_t in, int64_t j0,
                    int64_t width, char* out, int64_t out_stride, GradientScratch* scratch) {
  for (int64_t r = 0; r < rows; r += kGradRows) {
    const int64_t count = smaller(rows - r, kGradRows);
    const int64_t depth = divide_up(count, kDepth);
    const bool last = r + kGradRows >= rows;
    if (rows > kGradRows || j0 == 0) pack_inputs(x + r, count, i0, in, scratch->x);
    for (int64_t p = 0; p < width; p += kGradCols) {
      const int64_t panel = smaller(width - p, kGradCols);
      pack_outputs(y + r, count, j0 + p, panel, scratch->y);
      finish_stores();
      for (int64_t i = 0; i < in; i += kPair)
        for (int64_t j = 0; j < panel; j += kPair) {
          const int64_t high = smaller(in - i, kPair), here = smaller(panel - j, kPair);
          float* sum = scratch->sums;
          if (rows > kGradRows) sum += ((p + j) / kPair * (kGradIn / kPair) + i / kPair) * 1024;
          multiply_tiles<true>(high > kSide ? 2 : 1, here > kSide ? 2 : 1, scratch->x + i / kSide * depth * kTileBytes,
                               depth * kTileBytes, scratch->y + j / kPair * kGradSliceBytes, depth, r == 0, sum);
          if (last) store_gradient(sum, high, here, out + ((i0 + i) * out_stride + j0 + p + j) * 2, out_stride);
        }
    }
  }
}

void weight_gradient(const void* const* x, const void* const* y, int64_t rows, int64_t a, int64_t b, void* out,
                     int64_t out_stride, bool) {
  if (rows == 0) {
    for (int64_t i = 0; i < a; ++i) std::memset(static_cast<char*>(out) + i * out_stride * 2, 0, b * 2);
    return;
  }
  GradientScratch* buffers = static_cast<GradientScratch*>(scratch(Scratch::kMicroKernel, sizeof(GradientScratch)));
  const Tiles tiles;
  for (int64_t i = 0; i < a; i += kGradIn)
    for (int64_t j = 0; j < b; j += kGradOut)
      gradient_block(x, y, rows, i, smaller(a - i, kGradIn), j, smaller(b - j, kGradOut), static_cast<char*>(out),
                     out_stride, buffers);
}

}  // namespace

void use_amx(MicroKernels& micro) {
  const int type = static_cast<int>(DType::kBFloat16);
  micro.dot[type] = {packed_bytes, pack<false>, multiply<false>};
  micro.outer[type] = {packed_bytes, pack<true>, multiply<true>};
  micro.wgrad[type] = {weight_gradient};
}

FASTMOE_ROUTE_ISA_END
