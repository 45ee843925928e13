// Exact top-k of one row of integer keys by a warp, ties to the lower position.
//
// A key is a float's bits made monotone as a signed integer, -0 made +0, NaN just above "disallowed", which is the
// smallest integer; the position is a second register, never bits of the key.
//
// For small k, repeated extraction of the maximum: lane l owns positions l, l + 32, ... and keeps its best; an
// extraction is one redux for the key, one for the lowest position that has it, and a second look of the winner's lane
// at its own positions. From kRadixK on, rank_best: a binary radix search for the k-th key, each probe a count of the
// keys that reach it, then one pass that takes what is there in order of position, so that of equal keys the first are
// taken, and ranks by counting what is better: k / 32 looks at k entries a lane instead of k looks at n / 32 keys.
#pragma once

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

constexpr int kDisallowed = INT_MIN;
constexpr int kRadixK = 16;

// lane_index(), in one instruction instead of two.
__device__ inline int own_lane() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  __builtin_assume(lane >= 0 && lane < kWarp);
  return lane;
}

// The bits of a float, those below the sign inverted if it is set; and back.
__device__ inline int invert_negative(int bits) {
  int result;
  asm("lop3.b32 %0, %1, %2, 0x7fffffff, 0x78;" : "=r"(result) : "r"(bits), "r"(bits >> 31));  // a ^ (b & c)
  return result;
}

// The key of a number.
__device__ inline int number_key(float x) { return invert_negative(__float_as_int(x + 0.0f)); }

__device__ inline int ordered_key(float x) { return isnan(x) ? kDisallowed + 1 : number_key(x); }

// The float a key stands for; NaN and disallowed give NaN.
__device__ inline float key_value(int key) { return __int_as_float(invert_negative(key)); }

// A key with its position: the larger entry is the better one, by key and then by lower position. 0 is worse than all.
__device__ inline uint64_t entry_of(int key, int position) {
  return uint64_t{static_cast<unsigned>(key) ^ 0x80000000u} << 32 | ~static_cast<unsigned>(position);
}
__device__ inline int entry_key(uint64_t entry) {
  return static_cast<int>(static_cast<unsigned>(entry >> 32) ^ 0x80000000u);
}
__device__ inline int entry_position(uint64_t entry) { return static_cast<int>(~static_cast<unsigned>(entry)); }

// How many of k entries are better than one; they are aligned to 16 bytes, and behind an odd number lies a 0.
__device__ inline int count_better(const uint64_t* entries, int k, uint64_t entry) {
  int count = 0;
#pragma unroll 4
  for (int j = 0; j < k; j += 2) {
    const ulonglong2 pair = *reinterpret_cast<const ulonglong2*>(entries + j);
    count += pair.x > entry;
    count += pair.y > entry;
  }
  return count;
}

// The middle of low < high, above low.
__device__ inline int middle_key(int low, int high) {
  return high - static_cast<int>((static_cast<unsigned>(high) - static_cast<unsigned>(low)) / 2);
}

// Narrows [low, high], where the k-th largest key is, until both are that key or exactly k keys reach `low`.
// count_from(key): how many keys are as large or larger. All lanes.
template <class CountFrom>
__device__ inline void find_kth_key(int k, int* low, int* high, const CountFrom& count_from) {
  while (*low < *high) {
    const int middle = middle_key(*low, *high);
    const int count = count_from(middle);
    if (count >= k) *low = middle;
    if (count < k) *high = middle - 1;
    if (count == k) break;
  }
}

constexpr int64_t ranking_words(int64_t k) { return 2 * (k + 2) + k; }

// The k best allowed of keys [n], best first, into order [k]; returns their number. entries [k + 1] is memory of the
// warp, aligned to 16 bytes. The keys stay. All lanes, which see all keys.
__device__ inline int rank_best(const int* keys, int n, int k, uint64_t* entries, int* order) {
  int best = kDisallowed, second = kDisallowed;
  for (int i = own_lane(); i < n; i += kWarp) {
    second = max(second, min(best, keys[i]));
    best = max(best, keys[i]);
  }
  int high = __reduce_max_sync(kAllLanes, best);
  if (high == kDisallowed) return 0;
  // Every lane has a key at the smallest of the lanes' best, and two at that of their second best.
  int low = k <= kWarp ? best : k <= 2 * kWarp ? second : kDisallowed;
  low = max(__reduce_min_sync(kAllLanes, low), kDisallowed + 1);
  const auto count_from = [&](int floor) {
    int count = 0;
#pragma unroll 8
    for (int i = own_lane(); i < n; i += kWarp) count += keys[i] >= floor;
    return __reduce_add_sync(kAllLanes, count);
  };
  int num_equal = INT_MAX;  // to be taken of those at the floor
  find_kth_key(k, &low, &high, count_from);
  if (low == high) num_equal = k - count_from(low + 1);
  const unsigned before = (1u << own_lane()) - 1u;
  int num_taken = 0;
  for (int begin = 0; begin < n; begin += kWarp) {
    const int i = begin + own_lane();
    const int key = i < n ? keys[i] : kDisallowed;
    const unsigned equal = __ballot_sync(kAllLanes, key == low);
    const unsigned taken = __ballot_sync(kAllLanes, key > low || (key == low && __popc(equal & before) < num_equal));
    if (taken >> own_lane() & 1u) entries[num_taken + __popc(taken & before)] = entry_of(key, i);
    num_taken += __popc(taken);
    num_equal -= __popc(equal & taken);
  }
  if (own_lane() == 0) entries[num_taken] = 0;
  __syncwarp();
  for (int at = own_lane(); at < num_taken; at += kWarp) {
    order[count_better(entries, num_taken, entries[at])] = entry_position(entries[at]);
  }
  __syncwarp();
  return num_taken;
}

// Gives keys of one row, best first. Every function is for all lanes.
class Selector {
 public:
  // keys [n], each written by its own lane, or visible to it; they are consumed.
  __device__ Selector(int* keys, int n) : keys_(keys), n_(n) { find_best(); }
  // Positions [n] in the order in which they are given.
  __device__ Selector(int* keys, const int* order, int n) : keys_(keys), order_(order), n_(n) {}

  __device__ bool is_empty() const {
    return order_ != nullptr ? n_ == 0 : __reduce_max_sync(kAllLanes, best_key_) == kDisallowed;
  }

  // The position of the best allowed key, which goes to *key, or -1.
  __device__ int take(int* key) {
    if (order_ != nullptr) {
      if (num_given_ == n_) return -1;
      const int position = order_[num_given_++];
      *key = keys_[position];
      return position;
    }
    *key = __reduce_max_sync(kAllLanes, best_key_);
    if (*key == kDisallowed) return -1;
    const int at = __reduce_min_sync(kAllLanes, best_key_ == *key ? best_at_ : INT_MAX);
    if (at == best_at_) {
      keys_[at] = kDisallowed;
      find_best();
    }
    return at;
  }

  // Disallows positions [begin, end) from here on, where there is no order.
  __device__ void disallow(int begin, int end) {
    for (int i = own_lane(); i < end; i += kWarp)
      if (i >= begin) keys_[i] = kDisallowed;
    if (best_at_ >= begin && best_at_ < end) find_best();
  }

 private:
  __device__ void find_best() {
    best_key_ = kDisallowed;
    best_at_ = INT_MAX;
    for (int i = own_lane(); i < n_; i += kWarp) {
      if (keys_[i] <= best_key_) continue;
      best_key_ = keys_[i];
      best_at_ = i;
    }
  }

  int* keys_;
  const int* order_ = nullptr;
  int n_;
  int num_given_ = 0;
  int best_key_ = kDisallowed;
  int best_at_ = INT_MAX;
};

}  // namespace cuda
}  // namespace fastmoe_route
