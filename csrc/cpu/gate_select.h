// Exact top-k of one row of integer keys: repeated extraction of the maximum, ties to the lower position.
//
// A key is a float's bits made monotone as a signed integer, -0 made +0, NaN just above "disallowed", which is the
// smallest integer. Integer maxima take one cycle where float maxima take four, and every float, infinities and NaN
// included, has its one place. A vector of block maxima (one per vector of keys) makes an extraction cost two
// reductions instead of a pass over the row; up to kLanes blocks stay in a register.
#pragma once

#include "cpu/gate_score.h"

FASTMOE_ROUTE_ISA_BEGIN

// NaN ranks below every number and above what is not allowed.
template <class V>
inline typename Arithmetic<V>::KeyVec ordered_keys(V x) {
  using KeyVec = typename Arithmetic<V>::KeyVec;
  const KeyVec keys = KeyVec::of_bits(x + V::zero()).flip_negative();
  return select(is_nan(x), KeyVec::all(Arithmetic<V>::kDisallowed + 1), keys);
}

// The float a key stands for; NaN and disallowed give NaN.
inline float key_value(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline double key_value(int64_t key) {
  const int64_t bits = key ^ ((key >> 63) & INT64_MAX);
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Extracts keys of one row, best first. The keys are consumed.
template <class V>
class Selector {
 public:
  using Key = typename Arithmetic<V>::Key;
  using KeyVec = typename Arithmetic<V>::KeyVec;
  static constexpr int kLanes = V::kLanes;
  static constexpr Key kDisallowed = Arithmetic<V>::kDisallowed;

  // Room for the block maxima of n keys.
  static int64_t num_blocks(int64_t n) { return round_up(round_up(n, kLanes) / kLanes, kLanes); }

  // keys: whole vectors, padded with kDisallowed. block_max: num_blocks(n) keys of room.
  Selector(Key* keys, int64_t n, Key* block_max) : keys_(keys), block_max_(block_max), groups_(num_blocks(n) / kLanes) {
    const int64_t blocks = round_up(n, kLanes) / kLanes;
    for (int64_t b = 0; b < blocks; ++b) block_max[b] = reduce_max(KeyVec::load(keys + b * kLanes));
    for (int64_t b = blocks; b < groups_ * kLanes; ++b) block_max[b] = kDisallowed;
  }

  // Writes the positions and keys of up to `count` best allowed keys and returns how many there were.
  int64_t take(int64_t count, int32_t* positions, Key* taken) {
    return groups_ == 1 ? take_small(count, positions, taken) : take_large(count, positions, taken);
  }

  // Disallows keys [begin, end) from here on.
  void disallow(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) keys_[i] = kDisallowed;
    for (int64_t b = begin / kLanes; b <= (end - 1) / kLanes; ++b)
      block_max_[b] = reduce_max(KeyVec::load(keys_ + b * kLanes));
  }

 private:
  int64_t take_small(int64_t count, int32_t* positions, Key* taken) {
    KeyVec maxima = KeyVec::load(block_max_);
    int64_t j = 0;
    for (; j < count; ++j) {
      const Key best = reduce_max(maxima);
      if (best == kDisallowed) break;
      const int block = __builtin_ctz(equal_lanes(maxima, KeyVec::all(best)));
      maxima = replace(maxima, block, extract(block, best, positions + j));
      taken[j] = best;
    }
    maxima.store(block_max_);
    return j;
  }

  int64_t take_large(int64_t count, int32_t* positions, Key* taken) {
    int64_t j = 0;
    for (; j < count; ++j) {
      KeyVec best_lanes = KeyVec::load(block_max_);
      for (int64_t g = 1; g < groups_; ++g) best_lanes = max(best_lanes, KeyVec::load(block_max_ + g * kLanes));
      const Key best = reduce_max(best_lanes);
      if (best == kDisallowed) break;
      int64_t g = 0;
      uint32_t lanes = 0;
      while ((lanes = equal_lanes(KeyVec::load(block_max_ + g * kLanes), KeyVec::all(best))) == 0) ++g;
      const int64_t block = g * kLanes + __builtin_ctz(lanes);
      const Key next = extract(block, best, positions + j);
      replace(KeyVec::load(block_max_ + g * kLanes), __builtin_ctz(lanes), next).store(block_max_ + g * kLanes);
      taken[j] = best;
    }
    return j;
  }

  // Takes the first key equal to `best` out of a block; returns the block's new maximum.
  Key extract(int64_t block, Key best, int32_t* position) {
    const KeyVec keys = KeyVec::load(keys_ + block * kLanes);
    const int lane = __builtin_ctz(equal_lanes(keys, KeyVec::all(best)));
    *position = static_cast<int32_t>(block * kLanes + lane);
    const KeyVec rest = replace(keys, lane, kDisallowed);
    rest.store(keys_ + block * kLanes);
    return reduce_max(rest);
  }

  Key* keys_;
  Key* block_max_;
  int64_t groups_;
};

FASTMOE_ROUTE_ISA_END
