// What stands in for the kernels of CUTLASS 3 (wgmma, tcgen05, TMA), whose instructions the virtual machine has not:
// plain products that read the arrays of native.h as those kernels do. So the arrays, the zeros and the way there are
// executed; the kernels themselves are not.
#include "cuda/gemm/native.h"
#include "cuda/gemm/sm90_up.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// d = a b of every group, d row-major; a thread an element.
template <class T>
__global__ void __launch_bounds__(kThreads)
    stand_in_product_kernel(NativeArrays arrays, bool a_is_column_major, bool b_is_column_major) {
  for (int64_t e = blockIdx.x; e < arrays.num_groups; e += gridDim.x) {
    const int64_t m = arrays.shapes[3 * e], n = arrays.shapes[3 * e + 1], k = arrays.shapes[3 * e + 2];
    const T* const a = static_cast<const T*>(arrays.a[e]);
    const T* const b = static_cast<const T*>(arrays.b[e]);
    for (int64_t i = threadIdx.x; i < m * n; i += kThreads) {
      const int64_t row = i / n, col = i % n;
      float sum = 0.0f;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t of_a = a_is_column_major ? j * arrays.a_strides[e] + row : row * arrays.a_strides[e] + j;
        const int64_t of_b = b_is_column_major ? col * arrays.b_strides[e] + j : j * arrays.b_strides[e] + col;
        sum = fmaf(widen(a[of_a]), widen(b[of_b]), sum);
      }
      static_cast<T*>(arrays.d[e])[row * arrays.d_strides[e] + col] = narrow<T>(sum);
    }
  }
}

template <class T, class Product>
CudaStatus multiply(const Product& product, bool a_is_column_major, bool b_is_column_major, const CudaQueue& queue) {
  NativeArrays arrays;
  const CudaStatus status = native_arrays(product, queue, &arrays);
  if (status.code != 0) return status;
  stand_in_product_kernel<T>
      <<<num_blocks(arrays.num_groups, 1), kThreads, 0, queue.stream>>>(arrays, a_is_column_major, b_is_column_major);
  return launched();
}
template <class T>
CudaStatus rows(const RowsProduct& product, const CudaQueue& queue) {
  return multiply<T>(product, false, product.b_is_column_major, queue);
}
template <class T>
CudaStatus groups(const GroupsProduct& product, const CudaQueue& queue) {
  return multiply<T>(product, true, false, queue);
}

}  // namespace

// As where the driver cannot map the weights: the portable kernels, or several launches, take their place.
CudaStatus up_sm90_bfloat16(const UpProduct&, const CudaQueue&, bool*) { return {}; }
CudaStatus up_sm90_float16(const UpProduct&, const CudaQueue&, bool*) { return {}; }
CudaStatus rows_sm90_bfloat16(const RowsProduct&, const CudaQueue&, bool*) { return {}; }
CudaStatus rows_sm90_float16(const RowsProduct&, const CudaQueue&, bool*) { return {}; }
CudaStatus rows_sm90_cooperative_bfloat16(const RowsProduct& p, const CudaQueue& q) { return rows<BFloat16>(p, q); }
CudaStatus rows_sm90_cooperative_float16(const RowsProduct& p, const CudaQueue& q) { return rows<Float16>(p, q); }
CudaStatus rows_sm90_pingpong_bfloat16(const RowsProduct& p, const CudaQueue& q) { return rows<BFloat16>(p, q); }
CudaStatus groups_sm90_cooperative_bfloat16(const GroupsProduct& p, const CudaQueue& q) {
  return groups<BFloat16>(p, q);
}
CudaStatus groups_sm90_cooperative_float16(const GroupsProduct& p, const CudaQueue& q) { return groups<Float16>(p, q); }
CudaStatus groups_sm90_pingpong_bfloat16(const GroupsProduct& p, const CudaQueue& q) { return groups<BFloat16>(p, q); }
CudaStatus rows_sm100_bfloat16(const RowsProduct& p, const CudaQueue& q) { return rows<BFloat16>(p, q); }
CudaStatus rows_sm100_float16(const RowsProduct& p, const CudaQueue& q) { return rows<Float16>(p, q); }
CudaStatus groups_sm100_bfloat16(const GroupsProduct& p, const CudaQueue& q) { return groups<BFloat16>(p, q); }
CudaStatus groups_sm100_float16(const GroupsProduct& p, const CudaQueue& q) { return groups<Float16>(p, q); }

}  // namespace cuda
}  // namespace fastmoe_route
