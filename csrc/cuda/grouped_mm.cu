// grouped_mm on CUDA: bounds from the offsets in one launch, then a grouped product (gemm/), then for the backward pass
// the column sums that are the bias gradients.
//
// column_sums: a block owns an expert and 32 columns; its 8 warps take the expert's rows in turn, a lane a column, and
// the 8 sums are added in order: the order follows from the rows of the expert alone. Reads the rows once.
#include "cuda/column_sums.cuh"
#include "cuda/gemm/gemm.h"
#include "ops/grouped_mm.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kSumWarps = 8;

template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp) column_sums_kernel(ColumnSums sums, int64_t col_blocks) {
  __shared__ float partial[kSumWarps][kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const T* const rows = static_cast<const T*>(sums.rows);
  for (int64_t item = blockIdx.x; item < sums.groups.num_groups * col_blocks; item += gridDim.x) {
    const int64_t group = item / col_blocks;
    const int64_t col = item % col_blocks * kWarp + lane_index();
    float sum = 0.0f;
    if (col < sums.num_cols) {
      for (int64_t row = sums.groups.bounds[group] + warp; row < sums.groups.bounds[group + 1]; row += kSumWarps) {
        const float weight = sums.row_weights != nullptr ? sums.row_weights[row] : 1.0f;
        sum = fmaf(weight, widen(rows[row * sums.stride + col]), sum);
      }
    }
    partial[warp][lane_index()] = sum;
    __syncthreads();
    if (warp == 0 && col < sums.num_cols) {
      float total = 0.0f;
      for (int w = 0; w < kSumWarps; ++w) total += partial[w][lane_index()];
      static_cast<T*>(sums.result)[group * sums.num_cols + col] = narrow<T>(total);
    }
    __syncthreads();
  }
}

template <class T>
CudaStatus column_sums_of(const ColumnSums& sums, const CudaQueue& queue) {
  const int64_t col_blocks = ceil_div(sums.num_cols, kWarp);
  const unsigned blocks = num_blocks(sums.groups.num_groups * col_blocks, 1);
  column_sums_kernel<T><<<blocks, kSumWarps * kWarp, 0, queue.stream>>>(sums, col_blocks);
  return launched();
}

}  // namespace

CudaStatus column_sums(const ColumnSums& sums, const CudaQueue& queue) {
  switch (sums.dtype) {
    case DType::kFloat32: return column_sums_of<float>(sums, queue);
    case DType::kBFloat16: return column_sums_of<BFloat16>(sums, queue);
    default: return column_sums_of<Float16>(sums, queue);
  }
}

RowsProduct rows_product_of(DType dtype, const RowGroups& groups, int64_t num_rows, const ExpertMatrix& w, int64_t in,
                            int64_t out) {
  RowsProduct product{};
  product.dtype = dtype;
  product.groups = groups;
  product.num_rows = num_rows;
  product.in = in;
  product.out = out;
  product.b = w.data;
  product.b_group_stride = w.stride_expert;
  product.b_is_column_major = w.stride_col != 1;
  product.b_stride = product.b_is_column_major ? w.stride_col : w.stride_row;
  return product;
}

CudaStatus grouped_mm(const GroupedMmArgs& a, const CudaQueue& queue) {
  if (a.dtype == DType::kFloat64) return no_float64();
  RowGroups groups;
  CudaStatus status = group_rows(a.offsets, a.num_experts, a.num_rows, kProductTileRows, queue, &groups);
  if (status.code != 0) return status;
  RowsProduct product = rows_product_of(a.dtype, groups, a.num_rows, a.w, a.in, a.out);
  product.a = a.x;
  product.a_stride = a.x_stride;
  product.bias = a.bias;
  product.d = a.y;
  return rows_product(product, queue);
}

CudaStatus grouped_mm_wgrad(const GroupedMmWgradArgs& a, const CudaQueue& queue) {
  if (a.dtype == DType::kFloat64) return no_float64();
  RowGroups groups;
  CudaStatus status = group_rows(a.offsets, a.num_experts, a.num_rows, kProductTileRows, queue, &groups);
  if (status.code != 0) return status;
  if (a.grad_w != nullptr) {
    GroupsProduct product{a.dtype,    groups,   a.num_rows,      a.in,    a.out, a.x,
                          a.x_stride, a.grad_y, a.grad_y_stride, a.grad_w};
    if (a.transposed) product.exchange_operands();
    if (status = groups_product(product, queue); status.code != 0) return status;
  }
  if (a.grad_bias == nullptr) return {};
  return column_sums({a.dtype, groups, a.out, a.grad_y, a.grad_y_stride, nullptr, a.grad_bias}, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
