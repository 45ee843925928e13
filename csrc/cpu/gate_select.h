// Exact top-k of one row of integer keys: repeated extraction of the maximum, ties to the lower position.
//
// A key is a float's bits made monotone as a signed integer, -0 made +0, NaN just above "disallowed", which is the
// smallest integer. Integer maxima take one cycle where float maxima take four, and every float, infinities and NaN
// included, has its one place. A vector of block maxima (one per vector of keys) makes an extraction cost two
// reductions instead of a pass over the row; up to kLanes blocks ("small") stay in a register.
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
  static bool is_small(int64_t n) { return num_blocks(n) == kLanes; }

  Selector() = default;
  // keys: whole vectors, padded with kDisallowed. block_max: num_blocks(n) keys of room.
  Selector(Key* keys, int64_t n, Key* block_max)
      : keys_(keys), block_max_(block_max), num_groups_(num_blocks(n) / kLanes) {
    const int64_t blocks = round_up(n, kLanes) / kLanes;
    for (int64_t b = 0; b < blocks; ++b) block_max[b] = spread_max(KeyVec::load(keys + b * kLanes)).first();
    for (int64_t b = blocks; b < num_groups_ * kLanes; ++b) block_max[b] = kDisallowed;
  }

  // Writes the positions and keys of up to `count` best allowed keys and returns how many there were.
  int64_t take(int64_t count, int32_t* positions, Key* taken) {
    int64_t j = 0;
    for (; j < count; ++j) {
      KeyVec best = KeyVec::load(block_max_);
      for (int64_t g = 1; g < num_groups_; ++g) best = max(best, KeyVec::load(block_max_ + g * kLanes));
      best = spread_max(best);
      if (best.first() == kDisallowed) break;
      Key* maxima = block_max_;
      while (equal_lanes(KeyVec::load(maxima), best) == 0) maxima += kLanes;
      const uint32_t lane = lowest(equal_lanes(KeyVec::load(maxima), best));
      const int64_t block = maxima - block_max_ + __builtin_ctz(lane);
      select_lanes(lane, extract(block, best, positions + j), KeyVec::load(maxima)).store(maxima);
      taken[j] = best.first();
    }
    return j;
  }

  // take() for kRows small rows at once. An extraction is a chain of some 60 cycles that uses few of them: rows side
  // by side fill the gaps. Row r's results start at r * count; taken keys equal kDisallowed past the last allowed.
  template <int kRows>
  static void take_side_by_side(Selector* rows, int64_t count, int32_t* positions, Key* taken) {
    KeyVec maxima[kRows];
    for (int r = 0; r < kRows; ++r) maxima[r] = KeyVec::load(rows[r].block_max_);
    for (int64_t j = 0; j < count; ++j)
      for (int r = 0; r < kRows; ++r) {
        const KeyVec best = spread_max(maxima[r]);
        const uint32_t lane = lowest(equal_lanes(maxima[r], best));
        const KeyVec next = rows[r].extract(__builtin_ctz(lane), best, positions + r * count + j);
        maxima[r] = select_lanes(lane, next, maxima[r]);
        taken[r * count + j] = best.first();
      }
  }

  // Disallows keys [begin, end) from here on.
  void disallow(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) keys_[i] = kDisallowed;
    for (int64_t b = begin / kLanes; b <= (end - 1) / kLanes; ++b)
      block_max_[b] = spread_max(KeyVec::load(keys_ + b * kLanes)).first();
  }

 private:
  static uint32_t lowest(uint32_t lanes) { return lanes & (0u - lanes); }

  // Takes the first key equal to `best` out of a block; returns the block's new maximum.
  KeyVec extract(int64_t block, KeyVec best, int32_t* position) const {
    const KeyVec keys = KeyVec::load(keys_ + block * kLanes);
    const uint32_t lane = lowest(equal_lanes(keys, best));
    *position = static_cast<int32_t>(block * kLanes + __builtin_ctz(lane));
    const KeyVec rest = select_lanes(lane, KeyVec::all(kDisallowed), keys);
    rest.store(keys_ + block * kLanes);
    return spread_max(rest);
  }

  Key* keys_ = nullptr;
  Key* block_max_ = nullptr;
  int64_t num_groups_ = 0;
};

FASTMOE_ROUTE_ISA_END
