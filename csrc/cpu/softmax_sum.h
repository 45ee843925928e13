// What softmax and softmax_topk share: walking a row by vectors, blocks and tiles, the online sum, and who takes which
// rows.
//
// Order of summation: floats inside a block of kBlock, doubles over the blocks of a tile of kTile, doubles over tiles;
// a function of the row length alone, whichever threads take the tiles. So a row has the same bits in every batch and
// with any number of threads.
#pragma once

#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "cpu/isa/math.h"

#define FASTMOE_ROUTE_INLINE __attribute__((always_inline))

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr int kLanes = Vec::kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 4096;
constexpr int64_t kTile = 16384;
// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 16384;

// ---- Vectors.

struct Full {};  // a whole vector
template <class T>
inline Vec get(const T* p, Full, float) {
  return Vec::load(p);
}
template <class T>
inline Vec get(const T* p, int n, float fill) {
  return Vec::load(p, n, fill);
}
template <class T>
inline void put(Vec v, T* p, Full) {
  v.store(p);
}
template <class T>
inline void put(Vec v, T* p, int n) {
  v.store(p, n);
}

// f(j, i, count) over the vectors of n elements: offset i, accumulator j of four, count elements (Full or int).
template <class F>
FASTMOE_ROUTE_INLINE inline void each_vec(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    f(0, i, Full{});
    f(1, i + kLanes, Full{});
    f(2, i + 2 * kLanes, Full{});
    f(3, i + 3 * kLanes, Full{});
  }
  for (; i + kLanes <= n; i += kLanes) f(0, i, Full{});
  if (i < n) f(1, i, static_cast<int>(n - i));
}

// ---- Runs of at most a block. NaN is ignored by the range and reaches the sum.

// The offset of a row: its max, or 0 when that is -inf, so that x - offset is no NaN of our own making.
inline float offset_of(float max) { return max == -kInfinity ? 0.0f : max; }

// The largest and the smallest number. Most rows are near: the search for the min costs what the bounds of the
// exponential cost, which they do without.
struct Range {
  float max = -kInfinity, min = kInfinity;
  void add(const Range& other) {
    max = other.max > max ? other.max : max;
    min = other.min < min ? other.min : min;
  }
  bool is_near() const { return offset_of(max) - min <= kNear; }
};

// f(true_type or false_type).
template <class F>
FASTMOE_ROUTE_INLINE inline void by_nearness(bool is_near, const F& f) {
  is_near ? f(std::true_type{}) : f(std::false_type{});
}

// e^x, and its product with `factor`, of a row that is near or not. What does not fill a vector has -inf beside it.
template <bool kIsNear>
inline Vec exp_in(Vec x, Full) {
  return exp_nonpositive<kIsNear ? Below::kNear : Below::kGradual>(x);
}
template <bool kIsNear>
inline Vec exp_in(Vec x, int) {
  return exp_nonpositive<kIsNear ? Below::kAny : Below::kGradual>(x);
}
template <bool kIsNear>
inline Vec scaled(Vec e, Vec factor) {
  return kIsNear ? e * factor : product_gradual(e, factor);
}

template <bool kHasMin, class T>
Range block_range(const T* x, int64_t n) {
  Vec m[4], low[4];
  for (int j = 0; j < 4; ++j) m[j] = Vec::all(-kInfinity), low[j] = Vec::all(kInfinity);
  each_vec(n, [&](int j, int64_t i, auto count) FASTMOE_ROUTE_INLINE {
    m[j] = max(get(x + i, count, -kInfinity), m[j]);
    if (kHasMin) low[j] = min(get(x + i, count, kInfinity), low[j]);
  });
  return {reduce_max(max(max(m[0], m[1]), max(m[2], m[3]))),
          kHasMin ? -reduce_max(-min(min(low[0], low[1]), min(low[2], low[3]))) : -kInfinity};
}

// Sum of exp(x - offset), offset finite or +inf.
template <class T>
float block_sum(const T* x, int64_t n, float offset) {
  Vec s[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  const Vec m = Vec::all(offset);
  each_vec(n, [&](int j, int64_t i, auto count) FASTMOE_ROUTE_INLINE {
    s[j] = s[j] + exp_nonpositive<Below::kAdded>(get(x + i, count, -kInfinity) - m);
  });
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

// The same, and the exponentials themselves.
template <bool kIsNear, class T>
float kept_block_sum(const T* x, int64_t n, float offset, float* keep) {
  Vec s[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  const Vec m = Vec::all(offset);
  each_vec(n, [&](int j, int64_t i, auto count) FASTMOE_ROUTE_INLINE {
    const Vec e = exp_in<kIsNear>(get(x + i, count, -kInfinity) - m, count);
    put(e, keep + i, count);
    s[j] = s[j] + e;
  });
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

// ---- Sums over a row.

// Sum of exp(x - max).
struct Sum {
  float max = -kInfinity, min = kInfinity;
  double sum = 0.0;

  // Makes `wanted` the offset if it is larger.
  void raise(float wanted) {
    if (!(wanted > max)) return;
    if (sum != 0.0) sum *= std::exp(static_cast<double>(max) - static_cast<double>(wanted));
    max = wanted;
  }
  void add(const Sum& other) {
    raise(other.max);
    min = other.min < min ? other.min : min;
    const double apart = static_cast<double>(other.max) - static_cast<double>(max);
    sum += max == other.max ? other.sum : other.sum * std::exp(apart);
  }
  // Of a row without a finite number 0, which makes NaN of every probability.
  double total() const { return max == -kInfinity ? 0.0 : sum; }
  bool is_near() const { return Range{max, min}.is_near(); }
};

// Calls of a tile's work, which is compiled once: a row is walked in more than one way, and tiles are long.
template <class F>
__attribute__((noinline)) auto one_tile(const F& tile, int64_t begin, int64_t count) {
  return tile(begin, count);
}

// tile(begin, count) over a row of n, added up in order. `partials` has room for every tile when the tiles may run on
// several threads, and is null when this thread takes them all: the sum has the same bits.
template <class S, class F>
S over_tiles(int64_t n, S* partials, const F& tile) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  const auto sum_of = [&](int64_t t) {
    return one_tile(tile, t * kTile, n - t * kTile < kTile ? n - t * kTile : kTile);
  };
  if (tiles == 1) return sum_of(0);
  if (partials != nullptr)
    parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) partials[t] = sum_of(t);
    });
  S total = partials != nullptr ? partials[0] : sum_of(0);
  for (int64_t t = 1; t < tiles; ++t) total.add(partials != nullptr ? partials[t] : sum_of(t));
  return total;
}

template <class F>
void each_tile(int64_t n, bool parallel, const F& tile) {
  if (!parallel) return one_tile(tile, 0, n);
  parallel_for((n + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kTile < n ? end * kTile : n;
    one_tile(tile, begin * kTile, last - begin * kTile);
    Vec::stream_fence();
  });
}

template <class F>
FASTMOE_ROUTE_INLINE inline void each_block(int64_t n, const F& block) {
  for (int64_t i = 0; i < n; i += kBlock) block(i, n - i < kBlock ? n - i : kBlock);
}

// ---- Threads.

// rows(first, last, worker) over disjoint ranges that cover [0, count).
template <class F>
void split_rows(int64_t count, int64_t num_cols, const F& rows) {
  int64_t workers = (count * num_cols + kGrain - 1) / kGrain;
  workers = workers < count ? workers : count;
  workers = workers < num_threads() ? workers : num_threads();
  parallel_workers(workers,
                   [&](int worker) { rows(count * worker / workers, count * (worker + 1) / workers, worker); });
}

// Whether the threads share each row instead of sharing out the rows: where there are too few rows to go round.
bool splits_rows(int64_t num_rows, int64_t num_cols) {
  const int threads = num_threads();
  return threads > 1 && num_cols >= 2 * kTile && num_rows < 4 * threads && num_rows % threads != 0;
}

}  // namespace

FASTMOE_ROUTE_ISA_END
