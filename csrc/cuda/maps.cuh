// The two maps of a plan as kernels may use them. They are device data that no host has read, so a (slot, row) pair
// counts only if both maps claim it and both are in range: no access is out of bounds, and every row has one owner.
#pragma once

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

struct Maps {
  const int32_t* row_to_slot;  // [R]
  const int32_t* slot_to_row;  // [S]
  int64_t num_rows;
  int64_t num_slots;

  // The row that a slot owns, or -1.
  __device__ int64_t row_of(int64_t slot) const {
    const int32_t row = slot_to_row[slot];
    return row >= 0 && row < num_rows && row_to_slot[row] == slot ? row : -1;
  }
  // The slot that owns a row, or -1: the row is padding.
  __device__ int64_t slot_of(int64_t row) const {
    const int32_t slot = row_to_slot[row];
    return slot >= 0 && slot < num_slots && slot_to_row[slot] == row ? slot : -1;
  }
};

}  // namespace cuda
}  // namespace fastmoe_route
