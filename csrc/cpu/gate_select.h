// Exact top-k of one row of integer keys, ties to the lower position: by a short list where few are wanted (Shortlist),
// by repeated extraction of the maximum otherwise (Selector).
//
// A key is a float's bits made monotone as a signed integer, -0 made +0, NaN just above "disallowed", which is the
// smallest integer. Integer maxima take one cycle where float maxima take four, and every float, infinities and NaN
// included, has its one place. A vector of block maxima (one per vector of keys) makes an extraction cost two
// reductions instead of a pass over the row.
#pragma once

#include "cpu/gate_score.h"

FASTMOE_ROUTE_ISA_BEGIN

// Keys of numbers.
template <class V>
inline typename Arithmetic<V>::KeyVec number_keys(V x) {
  return Arithmetic<V>::KeyVec::of_bits(x + V::zero()).flip_negative();
}

// NaN ranks below every number and above what is not allowed.
template <class V>
inline typename Arithmetic<V>::KeyVec ordered_keys(V x) {
  using KeyVec = typename Arithmetic<V>::KeyVec;
  return select(is_nan(x), KeyVec::all(Arithmetic<V>::kDisallowed + 1), number_keys(x));
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

  Key* keys_;
  Key* block_max_;
  int64_t num_groups_;
};

// The `count` best of a row without taking them out one by one, in steps that are free of branches and of long chains,
// so that the steps of several rows overlap:
//   1. the row is dealt out to kWidth piles; the count-th largest of the piles' largest keys is a bound that at least
//      `count` keys reach;
//   2. the keys that reach it, about 1.3 * count of them on random rows, are moved together;
//   3. each is compared with every other: the number that beat it is its place.
// Rows with more than kWidth keys on the list (the large keys shared few piles) are left to Selector.
template <class V, int kWidth>
class Shortlist {
 public:
  using Key = typename Arithmetic<V>::Key;
  using KeyVec = typename Arithmetic<V>::KeyVec;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kVecs = kWidth / kLanes;
  static constexpr Key kDisallowed = Arithmetic<V>::kDisallowed;

  // Step 1. keys: whole vectors, padded with kDisallowed; count: at most kWidth.
  void find_bound(const Key* keys, int64_t n, Key count) {
    KeyVec largest[kVecs];
    for (KeyVec& pile : largest) pile = KeyVec::all(kDisallowed);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
      for (int j = 0; j < kVecs; ++j) largest[j] = max(largest[j], KeyVec::load(keys + i + j * kLanes));
    for (int j = 0; i < n; i += kLanes, ++j) largest[j] = max(largest[j], KeyVec::load(keys + i));
    bound_ = bound_of(largest, count, kDisallowed + 1);
  }

  // Step 1 for a row that is its own keys, dealt out by scan(): all are finite but for -inf in the padding.
  void find_bound(const V* piles, Key count) {
    KeyVec largest[kVecs];
    for (int j = 0; j < kVecs; ++j) {
      V pile = piles[j];
      for (int p = j + kVecs; p < kPiles<V>; p += kVecs) pile = max(pile, piles[p]);
      largest[j] = number_keys(pile);
    }
    bound_ = bound_of(largest, count, number_keys(V::all(-INFINITY)).first() + 1);
  }

  // Steps 1 and 2 for a row of at most kWidth columns that is its own keys.
  void list_all(const RowOf<V>& row, int64_t num_columns) {
    for (int v = 0; v < kVecs; ++v) {
      if (v * kLanes < num_columns) KeyVec::of_bits(V::load(row.z + v * kLanes)).store(keys_ + v * kLanes);
      (KeyVec::count() + KeyVec::all(v * kLanes)).store(columns_ + v * kLanes);
    }
    size_ = static_cast<int>(num_columns);
    lists_floats_ = true;
  }

  // Step 2. first_columns: of each vector of keys. False if the list is too short for the keys that reach the bound.
  bool collect(const Key* keys, int64_t n, const int32_t* first_columns) {
    const KeyVec below = KeyVec::all(bound_ - 1);
    lists_floats_ = false;
    return collect_vectors(n, [&](int64_t i, KeyVec& key, KeyVec& column) {
      key = KeyVec::load(keys + i);
      column = KeyVec::count() + KeyVec::all(first_columns[i / kLanes]);
      return greater_lanes(key, below);
    });
  }

  // Step 2 for a row that is its own keys.
  bool collect(const RowOf<V>& row, int64_t n) {
    const V bound = V::all(key_value(bound_));
    lists_floats_ = true;
    if constexpr (KeyVec::kGathers) {
      if (n >= kGatherFrom) return collect_columns(row.z, n, bound);
    }
    KeyVec columns = KeyVec::count();
    return collect_vectors(n, [&](int64_t i, KeyVec& key, KeyVec& column) {
      const V z = V::load(row.z + i);
      key = KeyVec::of_bits(z);
      column = columns;
      columns = columns + KeyVec::all(kLanes);
      return (z >= bound).lanes();
    });
  }

  // The lanes of the `count` best allowed of n <= kWidth keys (whole vectors, padded with kDisallowed).
  static uint32_t best_lanes(const Key* keys, int64_t n, Key count) {
    uint32_t best = 0;
    for (int v = 0; v < n; v += kLanes) {
      const KeyVec key = KeyVec::load(keys + v);
      KeyVec place = KeyVec::all(0);
      for (int j = 0; j < n; ++j)
        place = count_greater(place, KeyVec::all(keys[j]), key - KeyVec::load(kAfter + kWidth - 1 - j + v));
      const uint32_t allowed = greater_lanes(key, KeyVec::all(kDisallowed));
      best |= (greater_lanes(KeyVec::all(count), place) & allowed) << v;
    }
    return best;
  }

  // Step 3. Positions and keys of the best, best first; returns how many of `count` there are. Up to kWidth elements of
  // both are written. No more than kListed keys are on the list.
  template <int kListed = kWidth>
  int64_t rank(int64_t count, int32_t* positions, Key* taken) {
    KeyVec key[kVecs], place[kVecs];
    const KeyVec size = KeyVec::all(size_);
    for (int v = 0; v < kVecs; ++v) {
      place[v] = KeyVec::count() + KeyVec::all(v * kLanes);
      const uint32_t listed = greater_lanes(size, place[v]);
      key[v] = KeyVec::load(keys_ + v * kLanes);
      if (lists_floats_) key[v] = number_keys(key[v].as_floats());
      key[v] = select_lanes(listed, key[v], KeyVec::all(kDisallowed));
      key[v].store(keys_ + v * kLanes);
      // What is not on the list stays where it is, after it.
      place[v] = select_lanes(listed, KeyVec::all(0), place[v]);
    }
    // j beats a key that is smaller, and an equal one that comes after it. No key on the list is the smallest integer,
    // and taking 1 from that gives the largest, which nothing beats.
    for (int j = 0; j < kListed; ++j) {
      const KeyVec other = KeyVec::all(keys_[j]);
      for (int v = 0; v < kVecs; ++v)
        place[v] = count_greater(place[v], other, key[v] - KeyVec::load(kAfter + kWidth - 1 - j + v * kLanes));
    }
    const int64_t listed = size_ < count ? size_ : count;
    if constexpr (KeyVec::kSortsByPlace && kVecs == 1) {
      const KeyVec lanes = lanes_by_place(place[0]);
      pick_lanes(key[0], lanes).store(taken);
      pick_lanes(KeyVec::load(columns_), lanes).store(positions);
      return listed;
    }
    for (int64_t i = 0; i < listed; ++i) {
      uint32_t lanes = 0;
      for (int v = 0; v < kVecs; ++v) lanes |= equal_lanes(place[v], KeyVec::all(static_cast<Key>(i))) << (v * kLanes);
      const int lane = __builtin_ctz(lanes);
      positions[i] = columns_[lane];
      taken[i] = keys_[lane];
    }
    return listed;
  }

 private:
  // kWidth zeros, then ones: the lanes after lane j begin at kAfter + kWidth - 1 - j.
  struct Steps {
    Key step[2 * kWidth] = {};
    constexpr Steps() {
      for (int i = kWidth; i < 2 * kWidth; ++i) step[i] = 1;
    }
  };
  static constexpr Steps kSteps{};
  static constexpr const Key* kAfter = kSteps.step;

  // The least of the piles that have fewer than `count` above them, but not below `lowest`.
  Key bound_of(const KeyVec* largest, Key count, Key lowest) {
    for (int j = 0; j < kVecs; ++j) largest[j].store(keys_ + j * kLanes);
    KeyVec place[kVecs];
    for (KeyVec& p : place) p = KeyVec::all(0);
    for (int j = 0; j < kWidth; ++j)
      for (int v = 0; v < kVecs; ++v) place[v] = count_greater(place[v], KeyVec::all(keys_[j]), largest[v]);
    KeyVec least = KeyVec::all(kDisallowed);
    for (int v = 0; v < kVecs; ++v) {
      const uint32_t lanes = greater_lanes(KeyVec::all(count), place[v]);
      least = max(least, select_lanes(lanes, ~largest[v], KeyVec::all(kDisallowed)));
    }
    return max(~spread_max(least), KeyVec::all(lowest)).first();
  }

  // lanes_of(i, key, column) gives the keys and columns of the vector at i, and which of them reach the bound.
  template <class LanesOf>
  bool collect_vectors(int64_t n, const LanesOf& lanes_of) {
    int64_t size = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      KeyVec key, column;
      const uint32_t lanes = lanes_of(i, key, column);
      const int64_t at = size < kWidth ? size : kWidth;
      key.store_lanes(lanes, keys_ + at);
      column.store_lanes(lanes, columns_ + at);
      size += __builtin_popcount(lanes);
    }
    size_ = static_cast<int>(size);
    return size <= kWidth;
  }

  // The columns that reach the bound first, and then their logits all at once: half the moving of collect_vectors.
  bool collect_columns(const typename Arithmetic<V>::Float* z, int64_t n, V bound) {
    int64_t size = 0;
    KeyVec columns = KeyVec::count();
    for (int64_t i = 0; i < n; i += kLanes) {
      const uint32_t lanes = (V::load(z + i) >= bound).lanes();
      const int64_t at = size < kWidth ? size : kWidth;
      columns.store_lanes(lanes, columns_ + at);
      columns = columns + KeyVec::all(kLanes);
      size += __builtin_popcount(lanes);
    }
    size_ = static_cast<int>(size);
    if (size > kWidth) return false;
    for (int v = 0; v < kVecs; ++v) {
      const uint32_t listed = greater_lanes(KeyVec::all(size_ - v * kLanes), KeyVec::count());
      KeyVec::gather(listed, z, KeyVec::load(columns_ + v * kLanes)).store(keys_ + v * kLanes);
    }
    return true;
  }

  // Columns from which on a gather costs less than the moving that it saves, with room for processors that gather
  // slowly.
  static constexpr int64_t kGatherFrom = 16 * kLanes;

  alignas(64) Key keys_[kWidth + kLanes];
  alignas(64) int32_t columns_[kWidth + kLanes];
  Key bound_;
  int size_;
  bool lists_floats_;  // keys_ are logits as they were
};

FASTMOE_ROUTE_ISA_END
