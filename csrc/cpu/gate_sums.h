// The statistics of the gate: what of them costs time while the rows go by, and score_sum over all rows.
#pragma once

#include "cpu/gate_row.h"

FASTMOE_ROUTE_ISA_BEGIN

// The exponentials of a row, whose scores are added to score_sum while the next row's are formed: an addition costs
// next to nothing there, and one row of exponentials is all that the first-level cache has to hold.
template <class V>
class CarriedScores {
 public:
  using Float = typename Arithmetic<V>::Float;

  // memory: [padded], columns in whole vectors.
  CarriedScores(Float* memory, int64_t padded) : exponentials_(memory), padded_(padded) {
    for (int64_t i = 0; i < padded; ++i) memory[i] = 0;
  }

  // Adds the row before to score_sum and takes a row of n columns that is near; returns the sum of its exponentials.
  Float take(const RowOf<V>& row, int64_t n, Float* score_sum) {
    const V factor = V::all(factor_);
    Float* const carried = exponentials_;  // by value: no store to it can change it
    const Float sum = each_exponential<V, Below::kNear>(row.z, n, row.max, false, [=](V e, int64_t i, int) {
      fma(V::load(carried + i), factor, V::load(score_sum + i)).store(score_sum + i);
      e.store(carried + i);
    });
    factor_ = 1 / sum;
    return sum;
  }

  // Makes scores of the exponentials of the row.
  Float factor() const { return factor_; }

  // Adds the row to score_sum.
  void add_to(Float* score_sum) {
    const V factor = V::all(factor_);
    for (int64_t i = 0; i < padded_; i += V::kLanes)
      fma(V::load(exponentials_ + i), factor, V::load(score_sum + i)).store(score_sum + i);
    factor_ = 0;
  }

 private:
  Float* exponentials_;  // always finite
  int64_t padded_;
  Float factor_ = 0;  // 0 where the row has been added
};

// logsumexp is max + log(sum), kept as those two until there are enough for whole vectors.
template <class V, int kBatch>
class LogSumExps {
 public:
  using Float = typename Arithmetic<V>::Float;

  // Of row r of the batch; `close` follows when the batch has all its rows.
  void keep(int64_t r, Float max, Float sum) {
    maxima_[size_ + r] = max;
    sums_[size_ + r] = sum;
  }

  // The batch has `count` rows, which are kept; what is kept is written once it fills vectors or is the last. end: of
  // logsumexp up to this batch.
  void close(int64_t count, bool is_last, Float* end) {
    size_ += count;
    if (size_ < kRows && !is_last) return;
    for (int64_t i = 0; i < size_; i += V::kLanes)
      (V::load(maxima_ + i) + log_positive(V::load(sums_ + i))).store(end - size_ + i, lanes_at<V>(i, size_));
    size_ = 0;
  }

 private:
  static constexpr int kRows = kBatch > V::kLanes ? kBatch : V::kLanes;  // whole batches and vectors
  Float maxima_[kRows] = {}, sums_[kRows] = {};
  int64_t size_ = 0;
};

// score_sum of all rows: rows are summed inside tiles, tiles inside groups, then groups, each in order. Tiles and
// groups depend on T only, so the bits do not depend on the number of threads.
//
// A worker that has every tile of a group adds them up itself: one row of sums travels to the core that finishes, not
// eight. The tiles of a group that workers share are added by that core, in the same order.
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

  // Two rows, and a page between them and those of the next worker: a processor that fetches ahead of a worker's rows
  // takes the lines behind them away from their core, but stays within the page.
  static int64_t own_size(int64_t padded) { return 2 * padded + 4096 / static_cast<int64_t>(sizeof(Float)); }
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
