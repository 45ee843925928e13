// The vector matrix micro-kernels of one level: float32 on vectors, bfloat16 and float16 widened to float32 as they are
// loaded, float64 (for gradient checks) by plain loops.
#include "cpu/gemm/dot.h"
#include "cpu/gemm/outer.h"

FASTMOE_ROUTE_ISA_BEGIN

// The weight-gradient kernels of this level (gemm/wgrad.cpp).
void wgrad_kernels(MicroKernels& micro);

namespace {

int64_t double_packed_bytes(int64_t m, int64_t k) { return m * k * static_cast<int64_t>(sizeof(double)); }

void double_pack(const void* const* rows, const void* scale, int64_t m, int64_t k, void* packed) {
  for (int64_t i = 0; i < m; ++i) {
    const RowReader<double> row(rows, scale, i);
    for (int64_t q = 0; q < k; ++q) static_cast<double*>(packed)[i * k + q] = row.element(q);
  }
}

// Sums element l, l + 8, ... in lane l, then the lanes in order.
void double_dot(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
                int64_t c_stride, const void*) {
  for (int64_t i = 0; i < m; ++i) {
    const double* a = static_cast<const double*>(packed) + i * k;
    for (int64_t j = 0; j < n; ++j) {
      const double* b = static_cast<const double*>(w) + j * w_stride;
      double lanes[8] = {};
      int64_t q = 0;
      for (; q + 8 <= k; q += 8)
        for (int l = 0; l < 8; ++l) lanes[l] += a[q + l] * b[q + l];
      for (int l = 0; q < k; ++q, ++l) lanes[l] += a[q] * b[q];
      double sum = 0;
      for (int l = 0; l < 8; ++l) sum += lanes[l];
      static_cast<double*>(c)[i * c_stride + j] = sum;
    }
  }
}

void double_outer(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
                  int64_t c_stride, const void*) {
  for (int64_t i = 0; i < m; ++i) {
    const double* a = static_cast<const double*>(packed) + i * k;
    double* out = static_cast<double*>(c) + i * c_stride;
    for (int64_t j = 0; j < n; ++j) out[j] = 0;
    for (int64_t q = 0; q < k; ++q) {
      const double* b = static_cast<const double*>(w) + q * w_stride;
      for (int64_t j = 0; j < n; ++j) out[j] += a[q] * b[j];
    }
  }
}

template <class T>
void fill(MicroKernels& micro, DType dtype) {
  micro.dot[static_cast<int>(dtype)] = dot_kernel<WidenedMath<T>>();
  micro.outer[static_cast<int>(dtype)] = {outer_packed_bytes, outer_pack<T>, outer_multiply<T>, outer_span_columns};
}

}  // namespace

MicroKernels micro_kernels() {
  MicroKernels micro{};
  fill<float>(micro, DType::kFloat32);
  fill<BFloat16>(micro, DType::kBFloat16);
  fill<Float16>(micro, DType::kFloat16);
  micro.dot[static_cast<int>(DType::kFloat64)] = {double_packed_bytes, double_pack, double_dot};
  micro.outer[static_cast<int>(DType::kFloat64)] = {double_packed_bytes, double_pack, double_outer};
  wgrad_kernels(micro);
  return micro;
}

FASTMOE_ROUTE_ISA_END
