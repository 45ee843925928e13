#include "cuda/gemm/tensor_map.h"

#include <cudaTypedefs.h>

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr unsigned kDriverVersion = 12000;  // the first with tensor maps

struct Encoder {
  PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;  // or null: the driver has none
  CudaStatus status;
};

Encoder find_encoder() {
  Encoder found;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  found.status = status_of(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kDriverVersion,
                                                            cudaEnableDefault, &result));
  if (found.status.code == 0 && result == cudaDriverEntryPointSuccess) {
    found.encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }
  return found;
}

}  // namespace

CudaStatus map_tensor(const TensorBoxes& boxes, CUtensorMap* map, bool* is_mapped) {
  *is_mapped = false;
  static const Encoder encoder = find_encoder();
  if (encoder.status.code != 0 || encoder.encode == nullptr) return encoder.status;
  constexpr cuuint32_t kSteps[4] = {1, 1, 1, 1};
  const CUresult result = encoder.encode(
      map, boxes.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(boxes.data), boxes.sizes, boxes.strides, boxes.box, kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS && result != CUDA_ERROR_INVALID_VALUE) {
    return not_supported("the driver could not make a tensor map of the weights");
  }
  *is_mapped = result == CUDA_SUCCESS;
  return {};
}

}  // namespace cuda
}  // namespace fastmoe_route
