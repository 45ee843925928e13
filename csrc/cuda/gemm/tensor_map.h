// Tensor maps: how the copy engine of sm_90 and later (TMA) is told of a tensor in device memory.
#pragma once

#include <cuda.h>

#include "common/cuda_queue.h"
#include "common/dtype.h"

namespace fastmoe_route {
namespace cuda {

// Of four dimensions, the first contiguous; strides in bytes, multiples of 16. A box is what one copy moves; its first
// dimension is 128 bytes, which is also the width of its swizzle in shared memory.
struct TensorBoxes {
  DType dtype;  // of two bytes
  const void* data;
  cuuint64_t sizes[4];
  cuuint64_t strides[3];
  cuuint32_t box[4];
};

// Encodes a map on the host. The driver's function is found at run time: nothing links libcuda. A tensor that the
// driver cannot map, or a driver without maps, is *is_mapped = false and no error.
CudaStatus map_tensor(const TensorBoxes& boxes, CUtensorMap* map, bool* is_mapped);

}  // namespace cuda
}  // namespace fastmoe_route
