// score_sum of all rows: rows are summed inside tiles, tiles inside groups, then groups, each in order. Tiles and
// groups depend on T only, so the bits do not depend on the number of threads.
//
// A worker that has every tile of a group adds them up itself: one row of sums travels to the core that finishes, not
// eight. The tiles of a group that workers share are added by that core, in the same order.
#pragma once

#include "cpu/gate_row.h"

FASTMOE_ROUTE_ISA_BEGIN

template <class V>
class ScoreSums {
 public:
  using Float = typename Arithmetic<V>::Float;

  // memory: bytes() of it. padded: columns in whole vectors.
  ScoreSums(char* memory, int64_t num_tiles, int64_t workers, int64_t padded)
      : num_tiles_(num_tiles), workers_(workers), padded_(padded), groups_(reinterpret_cast<Float*>(memory)),
        tiles_(groups_ + num_groups(num_tiles) * padded), own_(tiles_ + num_tiles * padded) {}

  static int64_t bytes(int64_t num_tiles, int64_t workers, int64_t padded) {
    const int64_t rows = (num_groups(num_tiles) + num_tiles) * padded + workers * own_size(padded);
    return rows * static_cast<int64_t>(sizeof(Float));
  }

  int64_t first_tile(int64_t worker) const { return num_tiles_ * worker / workers_; }
  // Room for one row of a worker.
  Float* carried(int64_t worker) const { return own(worker) + padded_; }

  // Zeros, to which the rows of a tile are added.
  Float* open(int64_t tile, int64_t worker) const {
    Float* sums = has_one_worker(tile / kGroup) ? own(worker) : tiles_ + tile * padded_;
    for (int64_t i = 0; i < padded_; i += V::kLanes) V::zero().store(sums + i);
    return sums;
  }

  void close(int64_t tile, const Float* sums) const {
    if (!has_one_worker(tile / kGroup)) return;
    Float* group = groups_ + tile / kGroup * padded_;
    const bool is_first = tile % kGroup == 0;
    for (int64_t i = 0; i < padded_; i += V::kLanes)
      ((is_first ? V::zero() : V::load(group + i)) + V::load(sums + i)).store(group + i);
  }

  // When every tile is closed.
  void write(Float* score_sum, int64_t num_experts) const {
    for (int64_t i = 0; i < num_experts; i += V::kLanes) {
      V total = V::zero();
      for (int64_t g = 0; g < num_groups(num_tiles_); ++g) total = total + group_sum(g, i);
      total.store(score_sum + i, lanes_at<V>(i, num_experts));
    }
  }

 private:
  static constexpr int64_t kGroup = 8;

  // Two rows, and a gap: a processor that fetches lines in pairs takes the neighbour's away.
  static int64_t own_size(int64_t padded) { return 2 * padded + 256 / static_cast<int64_t>(sizeof(Float)); }
  Float* own(int64_t worker) const { return own_ + worker * own_size(padded_); }
  static int64_t num_groups(int64_t num_tiles) { return (num_tiles + kGroup - 1) / kGroup; }
  int64_t end_of(int64_t group) const { return (group + 1) * kGroup < num_tiles_ ? (group + 1) * kGroup : num_tiles_; }
  int64_t worker_of(int64_t tile) const { return ((tile + 1) * workers_ - 1) / num_tiles_; }
  bool has_one_worker(int64_t group) const { return worker_of(group * kGroup) == worker_of(end_of(group) - 1); }

  V group_sum(int64_t group, int64_t i) const {
    if (has_one_worker(group)) return V::load(groups_ + group * padded_ + i);
    V sum = V::zero();
    for (int64_t tile = group * kGroup; tile < end_of(group); ++tile) sum = sum + V::load(tiles_ + tile * padded_ + i);
    return sum;
  }

  int64_t num_tiles_, workers_, padded_;
  Float* groups_;  // [groups, padded], of those that one worker has
  Float* tiles_;   // [tiles, padded], of the other groups
  Float* own_;     // of workers
};

FASTMOE_ROUTE_ISA_END
