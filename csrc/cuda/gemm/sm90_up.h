// The products of sm90_up.cuh: UpProduct, and RowsProduct with or without a bias, in one kernel of our own.
#pragma once

#include "cuda/gemm/up.h"

namespace fastmoe_route {
namespace cuda {

// For 2-byte dtypes and everything a multiple of 16 bytes. Where the driver cannot map the weights, or rows are 4 GB
// apart, *is_done stays false and nothing is queued.
CudaStatus up_sm90_bfloat16(const UpProduct& product, const CudaQueue& queue, bool* is_done);
CudaStatus up_sm90_float16(const UpProduct& product, const CudaQueue& queue, bool* is_done);
CudaStatus rows_sm90_bfloat16(const RowsProduct& product, const CudaQueue& queue, bool* is_done);
CudaStatus rows_sm90_float16(const RowsProduct& product, const CudaQueue& queue, bool* is_done);

}  // namespace cuda
}  // namespace fastmoe_route
