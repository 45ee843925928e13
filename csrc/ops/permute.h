// permute and unpermute: rows of tokens to rows of experts, and back as a weighted sum.
//
//   permute:   x [T, H]                       -> rows [R, H]; rows[r] = x[row_to_slot[r] / K], zero for padding rows
//   unpermute: rows [R, H], weights [T, K]    -> y [T, H];    y[t] = sum over j ascending of weights[t, j] *
//              rows[slot_to_row[t, j]] in float32 (float64), rounded once; a token without kept slots gives 0
// Element offsets are 64-bit. Bytes: every source row is read once, every result row written once. The kernels of
// the CPU trust their maps: an op that is handed a plan checks it first with the functions at the end. Those of CUDA
// take a row or slot that is out of range, or not claimed by both maps, as none.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "common/dtype.h"

namespace fastmoe_route {

struct PermuteShape {
  int64_t num_tokens;  // T
  int64_t top_k;       // K
  int64_t num_rows;    // R
  int64_t hidden;      // H
  DType dtype;
};

struct PermuteArgs : PermuteShape {
  const void* x;               // [T, H]
  int64_t x_stride;            // elements between rows; columns are contiguous
  const int32_t* row_to_slot;  // [R]
  const int32_t* slot_to_row;  // [T, K], contiguous
  void* rows;                  // [R, H], contiguous
};

struct UnpermuteArgs : PermuteShape {
  const void* rows;  // [R, H]
  int64_t rows_stride;
  const int32_t* slot_to_row;  // [T, K], contiguous
  DType weights_dtype;
  const void* weights;  // [T, K], contiguous, or null for 1
  void* y;              // [T, H], contiguous
};

// grad_rows[r] = weight of its slot * grad_y[token], zero for padding; grad_weights[t, j] = <grad_y[t], rows[row]>,
// zero for slots without a row. One read of grad_y and of rows.
struct UnpermuteBackwardArgs : PermuteShape {
  const void* grad_y;  // [T, H]
  int64_t grad_y_stride;
  const void* rows;  // [R, H], or null when grad_weights is
  int64_t rows_stride;
  const int32_t* row_to_slot;
  const int32_t* slot_to_row;
  DType weights_dtype;
  const void* weights;  // or null for 1
  void* grad_rows;      // [R, H], contiguous, or null
  void* grad_weights;   // [T, K] of weights_dtype, or null
};

namespace cpu {
void permute(const PermuteArgs& args);
void unpermute(const UnpermuteArgs& args);
void unpermute_backward(const UnpermuteBackwardArgs& args);
}  // namespace cpu

namespace cuda {
CudaStatus permute(const PermuteArgs& args, const CudaQueue& queue);
CudaStatus unpermute(const UnpermuteArgs& args, const CudaQueue& queue);
CudaStatus unpermute_backward(const UnpermuteBackwardArgs& args, const CudaQueue& queue);
}  // namespace cuda

// Whether every slot's row is -1 or in [0, num_rows): enough for reading rows by slot.
inline bool rows_in_range(const int32_t* slot_to_row, int64_t num_slots, int64_t num_rows) {
  const uint32_t limit = static_cast<uint32_t>(num_rows);  // row + 1 is in [0, num_rows]
  uint32_t is_bad = 0;
  for (int64_t slot = 0; slot < num_slots; ++slot) is_bad |= static_cast<uint32_t>(slot_to_row[slot]) + 1 > limit;
  return is_bad == 0;
}

// Whether the maps are inverse to each other: a row holds a slot exactly where that slot names the row. Every row's
// slot names it, and no more slots name rows.
inline bool maps_agree(const int32_t* row_to_slot, int64_t num_rows, const int32_t* slot_to_row, int64_t num_slots) {
  if (!rows_in_range(slot_to_row, num_slots, num_rows)) return false;
  int64_t num_kept = 0, num_used = 0;
  for (int64_t slot = 0; slot < num_slots; ++slot) num_kept += slot_to_row[slot] >= 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t slot = row_to_slot[row];
    if (slot == -1) continue;
    if (slot < 0 || slot >= num_slots || slot_to_row[slot] != row) return false;
    ++num_used;
  }
  return num_kept == num_used;
}

}  // namespace fastmoe_route
