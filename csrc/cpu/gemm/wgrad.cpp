// Weight gradients on float vectors: out[i, j] = sum over rows r, ascending, of x[r][i] * y[r][j]; at least one row.
//
// The reduction runs over rows, so the native form is an outer product: a tile of 6 inputs by 4 (AVX-512) or 2 vectors
// of outputs stays in registers while the rows go by, one broadcast of x against whole vectors of y. Both operands are
// copied to small float panels first: they live in L1 and L2, strides no longer alias, and 2-byte types are widened
// once. The sums of more rows than a panel holds are added up in a float tile, so the result is rounded once, from
// registers; a few panels of x stay for all outputs.
// Order of summation: one fma per row, ascending, from +0, in even blocks of at most 96 rows (144 with large caches)
// whose sums are added ascending: one running sum of thousands of rows would err several times as much.
#include <cstring>

#include "common/cache.h"
#include "common/workspace.h"
#include "cpu/gemm/outer.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr int kTileIn = kOuterRows;
constexpr int kTileOut = kOuterVecs * Vec::kLanes;
constexpr int kBlockOut = 64;   // outputs of a panel of y
constexpr int kGroupOut = 256;  // outputs whose sums wait in L2 for more rows
constexpr int kKept = 4;        // panels of x that are copied once for all outputs, one for each block of rows

// What a panel holds, at most.
struct PanelSize {
  int64_t rows;  // of x and y
  int64_t in;    // inputs of x: whole tiles; a panel of y is copied once for so many
};
constexpr PanelSize kPanel{96, 144};  // 24 KB of y and 2 KB of x stay in an L1 of 32 KB; x and sums, 360 KB, in L2
constexpr PanelSize kLargePanel{144, 264};  // 36 and 3 KB in an L1 of 48 KB, 860 KB in an L2 of 2 MB

inline PanelSize panel_size() {
  const bool is_large = level1_cache_bytes() >= int64_t{48} << 10 && has_large_level2();
  return is_large ? kLargePanel : kPanel;
}

struct Panels {
  alignas(64) float x[kKept][kLargePanel.rows * kLargePanel.in];  // [input / kTileIn][row][kTileIn]
  alignas(64) float y[kLargePanel.rows * kBlockOut];              // [output / kTileOut][row][kTileOut]
  alignas(64) float sum[kLargePanel.in * kGroupOut];              // [input][output]
};

// Copies `width` elements of each row, from column `first`, widened; columns up to `padded` become zeros.
template <class T>
void copy_rows(const void* const* rows, int64_t num_rows, int64_t first, int64_t width, int64_t padded, float* panel,
               int64_t group, int64_t group_stride) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const T* row = static_cast<const T*>(rows[r]) + first;
    for (int64_t j = 0; j < padded; j += Vec::kLanes) {
      const int64_t left = width - j;
      const Vec value = left >= Vec::kLanes ? Vec::load(row + j)
                        : left > 0          ? Vec::load(row + j, static_cast<int>(left))
                                            : Vec::zero();
      value.store(panel + j / group * group_stride + r * group + j % group);
    }
  }
}

// The same for inputs, whose tiles are narrower than a vector: what needs widening, or a mask, by way of a line.
template <class T>
void copy_inputs(const void* const* rows, int64_t num_rows, int64_t first, int64_t width, float* panel,
                 int64_t panel_rows) {
  constexpr int64_t kLine = kLargePanel.in + Vec::kLanes;
  alignas(64) float line[kLine];
  const int64_t tiles = (width + kTileIn - 1) / kTileIn, in_place = sizeof(T) == sizeof(float) ? width / kTileIn : 0;
  const int64_t rest = width - in_place * kTileIn;
  for (int64_t r = 0; r < num_rows; ++r) {
    const auto deal = [&](int64_t t, const void* from) {
      std::memcpy(panel + (t * panel_rows + r) * kTileIn, from, kTileIn * sizeof(float));
    };
    const T* row = static_cast<const T*>(rows[r]) + first;
    for (int64_t t = 0; t < in_place; ++t) deal(t, row + t * kTileIn);
    if (rest == 0) continue;
    copy_rows<T>(rows + r, 1, first + in_place * kTileIn, rest, round_up(rest + kTileIn, Vec::kLanes), line, kLine, 0);
    for (int64_t t = in_place; t < tiles; ++t) deal(t, line + (t - in_place) * kTileIn);
  }
}

// Where a gradient goes: rows of `stride` elements; past the caches if `streams`.
template <class T>
struct Destination {
  T* out;
  int64_t stride;
  bool streams;
};

// A finished tile, with the sums of earlier rows if there are any, rounded from registers; `count` outputs of each row.
template <int R, class T>
inline __attribute__((always_inline)) void store_tile(Vec (&sums)[R][kOuterVecs], const float* earlier, int64_t count,
                                                      T* out, int64_t stride, bool streams) {
  constexpr int L = Vec::kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i, out += stride) {
    if (earlier != nullptr) {
#pragma GCC unroll 16
      for (int j = 0; j < kOuterVecs; ++j) sums[i][j] = Vec::load(earlier + i * kGroupOut + j * L) + sums[i][j];
    }
    if (streams) {
#pragma GCC unroll 16
      for (int j = 0; j < kOuterVecs; ++j) sums[i][j].stream(out + j * L);
    } else if (count >= kTileOut) {
#pragma GCC unroll 16
      for (int j = 0; j < kOuterVecs; ++j) sums[i][j].store(out + j * L);
    } else {
      for (int j = 0; j < kOuterVecs && j * L < count; ++j)
        sums[i][j].store(out + j * L, count - j * L < L ? static_cast<int>(count - j * L) : L);
    }
  }
}

// A tile to whose sums other rows add theirs: floats, whatever the gradients are.
template <int R>
__attribute__((noinline)) void add_to_sums(const float* x, const float* y, int64_t count, float* sum, bool first) {
  outer_tile<R, kOuterVecs, kTileIn>(x, y, kTileOut, count, sum, kGroupOut, kTileOut,
                                     first ? OuterEnd::kStore : OuterEnd::kAdd, OuterPlain{});
}

// One panel of y from column j0 of the group on: the last block of rows goes to the result, others to `sum`.
template <class T>
void multiply_panels(Panels* panels, const float* x_panel, int64_t panel_rows, int64_t count, int64_t in, int64_t j0,
                     int64_t width, bool first, bool last, const Destination<T>& to) {
  for (int64_t i = 0; i < in; i += kTileIn)
    with_rows<kTileIn>(in - i < kTileIn ? in - i : kTileIn, [&](auto height) __attribute__((always_inline)) {
      constexpr int R = decltype(height)::value;
      const float* x = x_panel + i * panel_rows;
      for (int64_t j = 0; j < width; j += kTileOut) {
        const float* y = panels->y + j * panel_rows;
        float* sum = panels->sum + i * kGroupOut + j0 + j;
        if (!last) add_to_sums<R>(x, y, count, sum, first);
        else
          outer_sums<R, kOuterVecs, kTileIn>(x, y, kTileOut, count, sum, kGroupOut, false, OuterPlain{},
                                             [&](Vec(&sums)[R][kOuterVecs]) __attribute__((always_inline)) {
                                               store_tile<R>(sums, first ? nullptr : sum, width - j,
                                                             to.out + i * to.stride + j, to.stride,
                                                             to.streams && width - j >= kTileOut);
                                             });
      }
    });
}

template <class T>
void multiply(const void* const* x, const void* const* y, int64_t rows, int64_t a, int64_t b, void* out,
              int64_t out_stride, bool past_caches) {
  Panels* panels = static_cast<Panels*>(scratch(Scratch::kMicroKernel, sizeof(Panels)));
  const auto smaller = [](int64_t p, int64_t q) { return p < q ? p : q; };
  const PanelSize most = panel_size();
  const int64_t blocks = (rows + most.rows - 1) / most.rows;
  const bool keeps_x = blocks <= kKept && b > kGroupOut;
  const bool streams = past_caches && is_whole_lines(out, out_stride * static_cast<int64_t>(sizeof(T)));
  for (int64_t i0 = 0; i0 < a; i0 += most.in)
    for (int64_t g0 = 0; g0 < b; g0 += kGroupOut) {
      const int64_t in = smaller(a - i0, most.in), group = smaller(b - g0, kGroupOut);
      T* result = static_cast<T*>(out) + i0 * out_stride + g0;
      int64_t r0 = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t count = rows * (block + 1) / blocks - r0;
        float* const x_panel = panels->x[keeps_x ? block : 0];
        if (g0 == 0 || !keeps_x) copy_inputs<T>(x + r0, count, i0, in, x_panel, most.rows);
        for (int64_t j0 = 0; j0 < group; j0 += kBlockOut) {
          const int64_t width = smaller(group - j0, kBlockOut);
          const int64_t padded = (width + kTileOut - 1) / kTileOut * kTileOut;
          copy_rows<T>(y + r0, count, g0 + j0, width, padded, panels->y, kTileOut, most.rows * kTileOut);
          multiply_panels<T>(panels, x_panel, most.rows, count, in, j0, width, block == 0, block + 1 == blocks,
                             {result + j0, out_stride, streams});
        }
        r0 += count;
      }
    }
  if (streams) Vec::stream_fence();
}

// float64, for gradient checks: plain loops.
void multiply_double(const void* const* x, const void* const* y, int64_t rows, int64_t a, int64_t b, void* out,
                     int64_t out_stride, bool) {
  for (int64_t i = 0; i < a; ++i) {
    double* line = static_cast<double*>(out) + i * out_stride;
    std::memset(line, 0, b * sizeof(double));
    for (int64_t r = 0; r < rows; ++r) {
      const double value = static_cast<const double*>(x[r])[i];
      const double* other = static_cast<const double*>(y[r]);
      for (int64_t j = 0; j < b; ++j) line[j] += value * other[j];
    }
  }
}

}  // namespace

void wgrad_kernels(MicroKernels& micro) {
  micro.wgrad[static_cast<int>(DType::kFloat32)] = {multiply<float>};
  micro.wgrad[static_cast<int>(DType::kBFloat16)] = {multiply<BFloat16>};
  micro.wgrad[static_cast<int>(DType::kFloat16)] = {multiply<Float16>};
  micro.wgrad[static_cast<int>(DType::kFloat64)] = {multiply_double};
}

FASTMOE_ROUTE_ISA_END
