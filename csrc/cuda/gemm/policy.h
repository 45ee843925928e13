// Which kernel multiplies: one function of the device, the dtype and the sizes, and the table it makes.
//
// Of the number of rows only between kernels that add in the same order: kernels of different architectures need not,
// and a token's bits must not depend on its batch. Kernels and tiles of sm_90a were chosen by measurement on an H200,
// where all gave the same bits (docs/gpu.md). float32 runs on tensor cores, rounded to tf32 (10 bits of mantissa), only
// where torch lets its own products do so: torch.backends.cuda.matmul.allow_tf32, torch.set_float32_matmul_precision.
#pragma once

#include "common/dtype.h"

namespace fastmoe_route {
namespace cuda {

enum class GemmKernel {
  kFma,
  kTf32,
  kTensorCores,
  kTensorCoresNarrow,
  kSm90Up,
  kSm90Cooperative,
  kSm90PingPong,
  kSm100
};
enum class GemmProduct { kRows, kUp, kGroups };  // rows_product, up_product, groups_product

struct GemmQuestion {
  int capability;    // 10 * major + minor
  bool uses_native;  // kernels for one architecture alone are allowed
  bool allows_tf32;  // torch's setting
  DType dtype;
  bool is_wide;  // sizes, strides and addresses are multiples of 16 bytes
  bool has_bias;
  GemmProduct product;
  int64_t in;          // inner size; of a groups_product the mean over the groups
  int64_t group_rows;  // the mean
};

// On sm_90, inner sizes and rows for which CUTLASS's smaller tiles, which take turns, are ahead: with fewer rows a
// product waits for the weights, and larger tiles wait best.
constexpr int64_t kPingPongMost = 1024, kPingPongLeastRows = 256;

inline GemmKernel choose_kernel(const GemmQuestion& q) {
  if (q.dtype == DType::kFloat32) return q.allows_tf32 && q.is_wide ? GemmKernel::kTf32 : GemmKernel::kFma;
  if (!q.is_wide) return GemmKernel::kTensorCoresNarrow;
  if (!q.uses_native) return GemmKernel::kTensorCores;
  if (q.capability == 90) {
    if (q.product == GemmProduct::kUp || q.has_bias) return GemmKernel::kSm90Up;
    const bool is_short = q.in <= kPingPongMost && q.group_rows >= kPingPongLeastRows;
    if (is_short && q.dtype == DType::kBFloat16) return GemmKernel::kSm90PingPong;
    return q.product == GemmProduct::kRows ? GemmKernel::kSm90Up : GemmKernel::kSm90Cooperative;
  }
  return q.capability == 100 && !q.has_bias ? GemmKernel::kSm100 : GemmKernel::kTensorCores;
}

// Whether the kernel is one for the up projection of the expert layer: it takes rows by index and activates in its
// epilogue. CUTLASS's native ones cannot, element loads are not worth it.
inline bool is_fused(GemmKernel kernel) {
  return kernel == GemmKernel::kFma || kernel == GemmKernel::kTf32 || kernel == GemmKernel::kTensorCores ||
         kernel == GemmKernel::kSm90Up;
}

}  // namespace cuda
}  // namespace fastmoe_route
