// Limited groups: only the experts of the best groups may be chosen.
//
// A group is ranked by its best key or by the sum of its two best. These are found for all groups of a vector at once:
// every group keeps the two best of each lane, and a tree halves the lanes of all groups together.
#pragma once

#include "cpu/gate_row.h"

FASTMOE_ROUTE_ISA_BEGIN

template <class V>
class GateGroups {
 public:
  using Float = typename Arithmetic<V>::Float;
  using Key = typename Arithmetic<V>::Key;
  using KeyVec = typename Arithmetic<V>::KeyVec;

  explicit GateGroups(const GateArgs& args)
      : args_(args), needs_(args), num_groups_(args.shape.num_groups),
        group_size_(args.shape.num_experts / args.shape.num_groups) {}

  // Leaves out the keys of every expert outside the best groups, or disallows them.
  void close(GateRow<V>& row) const {
    form_group_keys(row);
    if constexpr (V::kLanes > 1) {
      if (num_groups_ <= 16 && group_size_ % V::kLanes == 0 && args_.max_per_group >= args_.shape.top_k) {
        keep_groups(row, Shortlist<V, 16>::best_lanes(row.group_keys, num_groups_, args_.topk_groups));
        return;
      }
    }
    for (int64_t g = 0; g < num_groups_; ++g) row.group_count[g] = 0;
    Selector<V> groups(row.group_keys, num_groups_, row.group_block_max);
    const int64_t open = groups.take(args_.topk_groups, row.group_order, row.group_taken);
    for (int64_t j = 0; j < open; ++j) row.group_count[row.group_order[j]] = 1;
    for (int64_t g = 0; g < num_groups_; ++g)
      if (row.group_count[g] == 0)
        for (int64_t i = g * group_size_; i < (g + 1) * group_size_; ++i) row.keys[i] = kDisallowed;
  }

 private:
  static constexpr Key kDisallowed = Arithmetic<V>::kDisallowed;

  // Moves the keys of the groups whose bit is set, of whole vectors each, to the front.
  void keep_groups(GateRow<V>& row, uint32_t open) const {
    int64_t kept = 0;
    for (; open != 0; open &= open - 1) {
      const int64_t begin = __builtin_ctz(open) * group_size_;
      for (int64_t i = begin; i < begin + group_size_; i += V::kLanes, kept += V::kLanes) {
        KeyVec::load(row.keys + i).store(row.keys + kept);
        row.first_columns[kept / V::kLanes] = static_cast<int32_t>(i);
      }
    }
    // Without an open group every key is disallowed, and any vector of them will do.
    row.num_keys = kept > 0 ? kept : V::kLanes;
  }

  // group_keys = the keys of the groups, padded to whole vectors: of a group's best key, or of the sum of its two best.
  void form_group_keys(GateRow<V>& row) const {
    constexpr int kHalf = V::kLanes > 1 ? V::kLanes / 2 : 1;
    for (int64_t g = 0; g < num_groups_; g += V::kLanes) {
      const int count = lanes_at<V>(g, num_groups_);
      const KeyVec key =
          count <= kHalf ? keys_of_groups<kHalf>(row, g, count) : keys_of_groups<V::kLanes>(row, g, count);
      select_lanes((1u << count) - 1u, key, KeyVec::all(kDisallowed)).store(row.group_keys + g);
    }
  }

  // The keys of `count` groups from `begin` on, at most kRoom of them.
  template <int kRoom>
  KeyVec keys_of_groups(const GateRow<V>& row, int64_t begin, int count) const {
    const KeyVec disallowed = KeyVec::all(kDisallowed);
    KeyVec first[kRoom], second[kRoom];
#pragma GCC unroll 16
    for (int g = 0; g < kRoom; ++g) {
      first[g] = second[g] = disallowed;
      if (g < count) two_best(row, (begin + g) * group_size_, first[g], second[g]);
    }
    // Halves the lanes of every group, until lane g holds the two best of group g.
    const auto fold = [&](int g, int a, int b) {
      const KeyVec best = even_lanes(first[a], first[b]), rival = odd_lanes(first[a], first[b]);
      second[g] = max(max(even_lanes(second[a], second[b]), odd_lanes(second[a], second[b])), min(best, rival));
      first[g] = max(best, rival);
    };
#pragma GCC unroll 4
    for (int half = kRoom / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int g = 0; g < half; ++g) fold(g, 2 * g, 2 * g + 1);
#pragma GCC unroll 4
    for (int lanes = V::kLanes / kRoom; lanes > 1; lanes /= 2) fold(0, 0, 0);
    if (args_.group_score == GroupScore::kMax) return first[0];
    const KeyVec other = select_lanes(equal_lanes(second[0], disallowed), KeyVec::all(0), second[0]);
    const V sum = first[0].flip_negative().as_floats() + other.flip_negative().as_floats();
    return select_lanes(equal_lanes(first[0], disallowed), disallowed, ordered_keys(sum));
  }

  // The best and the second best key of every lane of the group that begins at column `begin`.
  void two_best(const GateRow<V>& row, int64_t begin, KeyVec& first, KeyVec& second) const {
    const bool by_score = args_.group_score == GroupScore::kTop2Sum && needs_.logit_keys;
    const auto insert = [&](KeyVec key) {
      second = max(second, min(first, key));
      first = max(first, key);
    };
    if (group_size_ % V::kLanes == 0) {
      for (int64_t i = begin; i < begin + group_size_; i += V::kLanes) {
        const KeyVec key = KeyVec::load(row.keys + i);
        insert(by_score ? keys_of_scores(row, i, key) : key);
      }
      return;
    }
    for (int64_t i = begin; i < begin + group_size_; ++i) {
      Key key = row.keys[i];
      if (by_score && key != kDisallowed) key = ordered(row.key_scores[i]);
      insert(select_lanes(1u << ((i - begin) % V::kLanes), KeyVec::all(key), KeyVec::all(kDisallowed)));
    }
  }

  static KeyVec keys_of_scores(const GateRow<V>& row, int64_t i, KeyVec key) {
    const KeyVec disallowed = KeyVec::all(kDisallowed);
    return select_lanes(equal_lanes(key, disallowed), disallowed, ordered_keys(V::load(row.key_scores + i)));
  }

  static Key ordered(Float value) { return ordered_keys(V::all(value)).first(); }

  GateArgs args_;
  GateNeeds needs_;
  int64_t num_groups_, group_size_;
};

FASTMOE_ROUTE_ISA_END
