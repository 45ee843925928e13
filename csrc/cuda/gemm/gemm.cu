// The way of a grouped product to its kernel (policy.h), and the table of that policy.
#include "cuda/gemm/gemm.h"

#include <cstdlib>
#include <sstream>
#include <string>

#include "cuda/gemm/native.h"
#include "cuda/gemm/policy.h"
#include "cuda/gemm/sm90_up.h"
#include "cuda/gemm/up.h"
#ifndef FASTMOE_ROUTE_CUDA_ARCHITECTURES
#define FASTMOE_ROUTE_CUDA_ARCHITECTURES "unknown"
#endif

namespace fastmoe_route {
namespace cuda {
namespace {

// Kernels for one architecture alone: those of sm_90a by default, with which the ops' tests have run on such a GPU.
// FASTMOE_ROUTE_CUDA_GEMM=native allows those of sm_100a too, which were compiled only; sm80 allows none. Read once.
bool uses_native(int capability) {
  static const std::string value = [] {
    const char* const text = std::getenv("FASTMOE_ROUTE_CUDA_GEMM");
    return std::string(text != nullptr ? text : "");
  }();
  return value == "native" || (value != "sm80" && capability == 90);
}

CudaStatus capability_of(int* capability) {
  int device = 0, major = 0, minor = 0;
  CudaStatus status = status_of(cudaGetDevice(&device));
  if (status.code != 0) return status;
  status = status_of(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (status.code != 0) return status;
  status = status_of(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  *capability = 10 * major + minor;
  return status;
}

const char* name_of(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kFma: return "cutlass 2.x simt float32, 128x128x8";
    case GemmKernel::kTf32: return "cutlass 2.x mma.sync tf32, 128x128x16, cp.async 3 stages";
    case GemmKernel::kTensorCores: return "cutlass 2.x mma.sync, 128x128x32, cp.async 3 stages";
    case GemmKernel::kTensorCoresNarrow: return "cutlass 2.x mma.sync, 128x64x32, element loads";
    case GemmKernel::kSm90Up: return "own wgmma, TMA, cp.async by index, 128x256x64";
    case GemmKernel::kSm90Cooperative: return "cutlass 3.x wgmma, TMA, cooperative 128x256x64, clusters of two";
    case GemmKernel::kSm90PingPong: return "cutlass 3.x wgmma, TMA, ping-pong 128x128x64, clusters of two";
    default: return "cutlass 3.x tcgen05, TMA, 128x256x64";
  }
}

// Of a group; of RowsProduct, GroupsProduct or ExpertRows.
template <class Product>
int64_t mean_rows(const Product& p) {
  return p.groups.num_groups > 0 ? p.num_rows / p.groups.num_groups : 0;
}

CudaStatus choose(GemmQuestion question, const CudaQueue& queue, GemmKernel* kernel) {
  question.allows_tf32 = question.dtype == DType::kFloat32 && queue.allows_tf32 != nullptr && queue.allows_tf32();
  const CudaStatus status = capability_of(&question.capability);
  question.uses_native = uses_native(question.capability);
  *kernel = choose_kernel(question);
  return status;
}

}  // namespace

CudaStatus rows_product(const RowsProduct& p, const CudaQueue& queue) {
  if (p.dtype == DType::kFloat64) return no_float64();
  const bool is_wide = are_multiples(kWideBytes, {p.a, p.b, p.bias, p.d},
                                     {p.in, p.out, p.a_stride, p.b_stride, p.b_group_stride}, element_size(p.dtype));
  GemmKernel kernel;
  const CudaStatus status = choose(
      {0, false, false, p.dtype, is_wide, p.bias != nullptr, GemmProduct::kRows, p.in, mean_rows(p)}, queue, &kernel);
  if (status.code != 0) return status;
  const bool is_bfloat16 = p.dtype == DType::kBFloat16;
  switch (kernel) {
    case GemmKernel::kFma: return rows_product_float32(p, queue);
    case GemmKernel::kTf32: return rows_product_tf32(p, queue);
    case GemmKernel::kSm90Up: {
      bool is_done = false;
      const CudaStatus tried =
          is_bfloat16 ? rows_sm90_bfloat16(p, queue, &is_done) : rows_sm90_float16(p, queue, &is_done);
      if (tried.code != 0 || is_done) return tried;
      if (p.bias != nullptr) break;
      return is_bfloat16 ? rows_sm90_cooperative_bfloat16(p, queue) : rows_sm90_cooperative_float16(p, queue);
    }
    case GemmKernel::kSm90PingPong: return rows_sm90_pingpong_bfloat16(p, queue);
    case GemmKernel::kSm100: return is_bfloat16 ? rows_sm100_bfloat16(p, queue) : rows_sm100_float16(p, queue);
    default: break;
  }
  return is_bfloat16 ? rows_product_bfloat16(p, is_wide, queue) : rows_product_float16(p, is_wide, queue);
}

CudaStatus groups_product(const GroupsProduct& p, const CudaQueue& queue) {
  if (p.dtype == DType::kFloat64) return no_float64();
  const bool is_wide =
      are_multiples(kWideBytes, {p.a, p.b, p.d}, {p.m, p.n, p.a_stride, p.b_stride}, element_size(p.dtype));
  GemmKernel kernel;
  const CudaStatus status = choose(
      {0, false, false, p.dtype, is_wide, false, GemmProduct::kGroups, mean_rows(p), mean_rows(p)}, queue, &kernel);
  if (status.code != 0) return status;
  const bool is_bfloat16 = p.dtype == DType::kBFloat16;
  switch (kernel) {
    case GemmKernel::kFma: return groups_product_float32(p, queue);
    case GemmKernel::kTf32: return groups_product_tf32(p, queue);
    case GemmKernel::kSm90Cooperative:
      return is_bfloat16 ? groups_sm90_cooperative_bfloat16(p, queue) : groups_sm90_cooperative_float16(p, queue);
    case GemmKernel::kSm90PingPong: return groups_sm90_pingpong_bfloat16(p, queue);
    case GemmKernel::kSm100: return is_bfloat16 ? groups_sm100_bfloat16(p, queue) : groups_sm100_float16(p, queue);
    default: break;
  }
  return is_bfloat16 ? groups_product_bfloat16(p, is_wide, queue) : groups_product_float16(p, is_wide, queue);
}

CudaStatus up_product(const UpProduct& p, const CudaQueue& queue, bool* is_done) {
  const bool is_wide = are_multiples(kWideBytes, {p.x, p.b, p.bias, p.preactivation, p.activated},
                                     {p.rows.hidden, p.rows.intermediate, p.x_stride, p.b_stride, p.b_group_stride},
                                     element_size(p.dtype));
  GemmKernel kernel;
  const CudaStatus status =
      choose({0, false, false, p.dtype, is_wide, p.bias != nullptr, GemmProduct::kUp, p.rows.hidden, mean_rows(p.rows)},
             queue, &kernel);
  *is_done = is_fused(kernel);
  if (status.code != 0 || !*is_done) return status;
  if (kernel == GemmKernel::kTf32) return up_product_tf32(p, queue);
  if (kernel == GemmKernel::kSm90Up) {
    *is_done = false;
    return p.dtype == DType::kBFloat16 ? up_sm90_bfloat16(p, queue, is_done) : up_sm90_float16(p, queue, is_done);
  }
  switch (p.dtype) {
    case DType::kFloat32: return up_product_float32(p, queue);
    case DType::kBFloat16: return up_product_bfloat16(p, queue);
    default: return up_product_float16(p, queue);
  }
}

// Lines of "device | dtype | product | shape | kernel", tab-separated, for every row of the policy.
std::string policy_table() {
  std::ostringstream text;
  using Product = GemmProduct;
  const auto line = [&](const char* device, const char* shape, GemmQuestion q) {
    const char* dtype = q.dtype == DType::kFloat32 ? "float32" : q.dtype == DType::kBFloat16 ? "bfloat16" : "float16";
    const bool is_rows = q.product == Product::kRows;
    text << device << '\t' << dtype << '\t' << (is_rows ? "forward, dgrad" : "wgrad") << '\t' << shape << '\t'
         << name_of(choose_kernel(q))
         << (is_rows && is_fused(choose_kernel(q)) ? "; moe_mlp: gather and activation in one launch" : "") << '\n';
  };
  for (const Product product : {Product::kRows, Product::kGroups}) {
    line("sm_80 and later", "any", {80, false, false, DType::kFloat32, true, false, product, 1, 1});
    line("sm_80 and later", "multiples of 16 bytes, torch allows tf32",
         {80, false, true, DType::kFloat32, true, false, product, 1, 1});
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const Product product : {Product::kRows, Product::kGroups}) {
      line("sm_80 and later", "not all multiples of 16 bytes", {80, true, false, dtype, false, false, product, 1, 1});
      line("sm_80 and later", "multiples of 16 bytes", {80, true, false, dtype, true, false, product, 1, 1});
      line("sm_100, if native is asked for", "multiples of 16 bytes, no bias",
           {100, true, false, dtype, true, false, product, 1, 1});
      const GemmQuestion longest{90, true, false, dtype, true, false, product, INT64_MAX, INT64_MAX};
      line("sm_90", "multiples of 16 bytes", longest);
      GemmQuestion shorter = longest;
      shorter.in = kPingPongMost;
      if (choose_kernel(shorter) == choose_kernel(longest)) continue;
      line("sm_90",
           product == Product::kRows
               ? "the same, no bias, inner size at most 1024 and 256 rows a group or more on average"
               : "the same, 256 to 1024 rows a group on average",
           shorter);
    }
  }
  return text.str();
}

}  // namespace cuda
}  // namespace fastmoe_route

// For `python -m fastmoe_route info`, which reads them without a GPU.
extern "C" __attribute__((visibility("default"))) const char* fastmoe_route_cuda_architectures() {
  return FASTMOE_ROUTE_CUDA_ARCHITECTURES;
}
extern "C" __attribute__((visibility("default"))) const char* fastmoe_route_cuda_policy() {
  static const std::string table = fastmoe_route::cuda::policy_table();
  return table.c_str();
}
