// The grouped products the expert ops are made of, without naming CUTLASS: the units behind them take seconds each to
// compile and know nothing else of the package.
//
// A row's bits depend on the sizes, the dtype, what policy.h asks of the whole call (a bias, multiples of 16 bytes) and
// that row alone: tiles of every size add products in the same order, and nothing splits the inner dimension.
#pragma once

#include <utility>

#include "common/cuda_queue.h"
#include "common/dtype.h"
#include "cuda/gemm/groups.cuh"
#include "ops/grouped_mm.h"

namespace fastmoe_route {
namespace cuda {

// d[r] = a[r] b[e] (+ bias[e]) for the rows r of every group e, and zeros for the rows of none.
struct RowsProduct {
  DType dtype;
  RowGroups groups;
  int64_t num_rows;  // R
  int64_t in;        // K
  int64_t out;       // N
  const void* a;     // [R, K]
  int64_t a_stride;
  const void* b;  // [E, K, N]
  int64_t b_group_stride;
  int64_t b_stride;        // between rows, or between columns
  bool b_is_column_major;  // columns are contiguous instead of rows
  const void* bias;        // [E, N], or null
  void* d;                 // [R, N], contiguous
};

// d[e] = a[rows of e]^T b[rows of e], exact zeros for a group without rows.
struct GroupsProduct {
  DType dtype;
  RowGroups groups;
  int64_t num_rows;  // R
  int64_t m;
  int64_t n;
  const void* a;  // [R, M]
  int64_t a_stride;
  const void* b;  // [R, N]
  int64_t b_stride;
  void* d;  // [E, M, N], contiguous

  // The same product transposed: d[e] = b^T a, [E, N, M].
  void exchange_operands() {
    std::swap(m, n);
    std::swap(a, b);
    std::swap(a_stride, b_stride);
  }
};

// Rows of a tile of RowsProduct, for group_rows.
constexpr int kProductTileRows = 128;

inline CudaStatus no_float64() { return not_supported("x must be float32, bfloat16 or float16 on CUDA, got float64"); }

// A product with the weights w [E, in, out]; a, bias and d are left to the caller.
RowsProduct rows_product_of(DType dtype, const RowGroups& groups, int64_t num_rows, const ExpertMatrix& w, int64_t in,
                            int64_t out);

CudaStatus rows_product(const RowsProduct& product, const CudaQueue& queue);
CudaStatus groups_product(const GroupsProduct& product, const CudaQueue& queue);

// One unit per dtype. is_wide: sizes, strides and addresses are multiples of 16 bytes.
CudaStatus rows_product_float32(const RowsProduct& product, const CudaQueue& queue);
CudaStatus rows_product_tf32(const RowsProduct& product, const CudaQueue& queue);
CudaStatus rows_product_bfloat16(const RowsProduct& product, bool is_wide, const CudaQueue& queue);
CudaStatus rows_product_float16(const RowsProduct& product, bool is_wide, const CudaQueue& queue);
CudaStatus groups_product_float32(const GroupsProduct& product, const CudaQueue& queue);
CudaStatus groups_product_tf32(const GroupsProduct& product, const CudaQueue& queue);
CudaStatus groups_product_bfloat16(const GroupsProduct& product, bool is_wide, const CudaQueue& queue);
CudaStatus groups_product_float16(const GroupsProduct& product, bool is_wide, const CudaQueue& queue);

}  // namespace cuda
}  // namespace fastmoe_route
