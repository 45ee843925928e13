// Exact top-k of one row of integer keys by a warp: repeated extraction of the maximum, ties to the lower position.
//
// A key is a float's bits made monotone as a signed integer, -0 made +0, NaN just above "disallowed", which is the
// smallest integer; the position is a second register, never bits of the key. Lane l owns positions l, l + 32, ... and
// keeps its best. An extraction is one redux for the key, one for the lowest position that has it, and a second look of
// the winner's lane at its own positions.
#pragma once

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

constexpr int kDisallowed = INT_MIN;

__device__ inline int ordered_key(float x) {
  if (isnan(x)) return kDisallowed + 1;
  const int bits = __float_as_int(x + 0.0f);
  return bits ^ ((bits >> 31) & INT_MAX);
}

// The float a key stands for; NaN and disallowed give NaN.
__device__ inline float key_value(int key) { return __int_as_float(key ^ ((key >> 31) & INT_MAX)); }

// Extracts keys of one row, best first; the keys are consumed. Every function is for all lanes.
class Selector {
 public:
  // keys [n], each written by its own lane, or visible to it.
  __device__ Selector(int* keys, int n) : keys_(keys), n_(n) { find_best(); }

  __device__ bool is_empty() const { return __reduce_max_sync(kAllLanes, best_key_) == kDisallowed; }

  // The position of the best allowed key, which goes to *key, or -1.
  __device__ int take(int* key) {
    *key = __reduce_max_sync(kAllLanes, best_key_);
    if (*key == kDisallowed) return -1;
    const int at = __reduce_min_sync(kAllLanes, best_key_ == *key ? best_at_ : INT_MAX);
    if (at == best_at_) {
      keys_[at] = kDisallowed;
      find_best();
    }
    return at;
  }

  // Disallows positions [begin, end) from here on.
  __device__ void disallow(int begin, int end) {
    for (int i = lane_index(); i < end; i += kWarp)
      if (i >= begin) keys_[i] = kDisallowed;
    if (best_at_ >= begin && best_at_ < end) find_best();
  }

 private:
  __device__ void find_best() {
    best_key_ = kDisallowed;
    best_at_ = INT_MAX;
    for (int i = lane_index(); i < n_; i += kWarp) {
      if (keys_[i] <= best_key_) continue;
      best_key_ = keys_[i];
      best_at_ = i;
    }
  }

  int* keys_;
  int n_;
  int best_key_;
  int best_at_;
};

}  // namespace cuda
}  // namespace fastmoe_route
