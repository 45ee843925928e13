// The seam between the expert drivers (grouped_mm, moe_mlp: who multiplies what, and what happens to the result) and
// the matrix micro-kernels (how a block is multiplied on this processor).
//
// Order of summation: a function of k, the element type, the weight layout and the level only, never of m, n, of the
// position in the block or of the thread. That is what makes a token's result independent of its batch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastmoe_route {

// C[m, n] = A[m, k] W[k, n], accumulated in float (double for float64), for one element type and one weight layout.
// m, n and k are at least 1. Packed buffers start at multiples of 64 bytes; weights and c may start anywhere.
struct MicroKernel {
  // Bytes of m packed rows of k elements.
  int64_t (*packed_bytes)(int64_t m, int64_t k);
  // Copies row i, k contiguous elements at rows[i], into the layout `multiply` reads; multiplied by scale[i] in float
  // and rounded to the element type when scale is not null. scale points at floats (at doubles for float64).
  void (*pack)(const void* const* rows, const void* scale, int64_t m, int64_t k, void* packed);
  // c[i * c_stride + j] = sum over q of a[i, q] * w(q, j): float (double) results, overwritten, i < m, j < n.
  // `after`: weights of the same stride that this thread multiplies next, or null; a hint to fetch them in time.
  void (*multiply)(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
                   int64_t c_stride, const void* after);
  // Columns whose weights `multiply` fetches together for m rows; chunks are at least as wide. Null: any width.
  int64_t (*span)(int64_t m) = nullptr;
};

// out[i, j] = sum over rows r, ascending, of x[r][i] * y[r][j]: a weight gradient, rounded once to the element type.
// x[r] points at a elements, y[r] at b elements; out[i * out_stride + j] is overwritten; rows is at least 1.
// past_caches: whole lines of `out` had better be stored past the caches, for nobody reads them soon and ordinary
// stores read them first. Not where they have just been cleared through the caches, as fresh pages are: that would
// write memory twice (measured: 0.8 of torch's speed with such stores, 1.1 without).
struct WgradKernel {
  void (*multiply)(const void* const* x, const void* const* y, int64_t rows, int64_t a, int64_t b, void* out,
                   int64_t out_stride, bool past_caches);
};

// Whether every row of a result starts a line: what stores past the caches need.
inline bool is_whole_lines(const void* out, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(stride_bytes)) % 64 == 0;
}

// By DType. `dot`: w(q, j) at w[j * w_stride + q], the reduction is contiguous (nn.Linear's layout seen as [in, out]).
// `outer`: w(q, j) at w[q * w_stride + j], the outputs are contiguous.
struct MicroKernels {
  MicroKernel dot[4];
  MicroKernel outer[4];
  WgradKernel wgrad[4];
};

}  // namespace fastmoe_route
