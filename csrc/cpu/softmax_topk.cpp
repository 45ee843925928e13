// softmax_topk: one read of each row for its max, its sum of exponentials and its k best columns.
//
// A block of the row lies in L1 while three things happen: its max is found; if that beats the k-th best so far (rare
// after the first blocks) the lanes that beat it are inserted into a short sorted list; its exponentials are added to
// the online sum (Milakov and Gimelshein, arXiv:1805.02867). The list moves only for strictly larger values, and
// columns come in rising order, so ties stay with the lower column.
// A row that is split over threads has one list per worker, merged in column order: the choice is exact, so the split
// does not show. The sum's order is that of softmax_sum.h.
#include "common/workspace.h"
#include "cpu/isa/kernels.h"
#include "cpu/softmax_sum.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

// Elements whose max is compared with the k-th best at once.
constexpr int64_t kScanBlock = 1024;

// The longest list into which entry by entry is the quicker way: vectors have to wait for what was just stored.
constexpr int kShortList = 32;

// The k best columns so far, best first.
template <class V>
struct BestColumns {
  int k;
  int count;
  // With room for what is moved by vectors; from `count` on values are NaN, or below the last.
  V value[kSoftmaxTopkLimit + 2 * kLanes];
  int32_t column[kSoftmaxTopkLimit + 2 * kLanes];

  void reset(int wanted) {
    k = wanted;
    count = 0;
    for (V& v : value) v = std::numeric_limits<V>::quiet_NaN();
  }
  bool takes(V v) const { return count < k ? v == v : v > value[k - 1]; }
  void insert(V v, int32_t c) {
    int i = count < k ? count++ : k - 1;
    if constexpr (std::is_same_v<V, float>) {
      if (k > kShortList) return insert_by_vectors(v, c, i);
    }
    for (; i > 0 && value[i - 1] < v; --i) {
      value[i] = value[i - 1];
      column[i] = column[i - 1];
    }
    value[i] = v;
    column[i] = c;
  }
  // In place of entry `last`, or of one before it.
  void insert_by_vectors(float v, int32_t c, int last) {
    int place = 0;
    for (int i = 0; i < last; i += kLanes) place += __builtin_popcount((Vec::load(value + i) >= Vec::all(v)).lanes());
    for (int i = last - 1 - (last - 1 - place) % kLanes; i >= place && last > place; i -= kLanes) {
      Vec::load(value + i).store(value + i + 1);
      Keys::load(column + i).store(column + i + 1);
    }
    value[place] = v;
    column[place] = c;
  }
  void add(const BestColumns& other) {
    for (int i = 0; i < other.count && takes(other.value[i]); ++i) insert(other.value[i], other.column[i]);
  }
};

using Best = BestColumns<float>;

// Inserts what block x[0, n), whose first column is `column`, has to offer.
template <class T>
void scan(const T* x, int64_t n, int64_t column, Best& best) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const Vec v = lanes == kLanes ? Vec::load(x + i) : Vec::load(x + i, lanes, -kInfinity);
    uint32_t mask = (best.count < best.k ? ~is_nan(v) : v > Vec::all(best.value[best.k - 1])).lanes();
    mask &= static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
    if (mask == 0) continue;
    float values[kLanes];
    v.store(values);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      if (best.takes(values[lane])) best.insert(values[lane], static_cast<int32_t>(column + i + lane));
    }
  }
}

// One tile: its sum is returned, its best columns go into `best`.
template <class T>
Sum scan_tile(const T* x, int64_t n, int64_t column, Best& best) {
  Sum tile;
  for (int64_t i = 0; i < n; i += kScanBlock) {
    const int64_t size = n - i < kScanBlock ? n - i : kScanBlock;
    const float max = block_range<false>(x + i, size).max;
    if (best.count < best.k || max > best.value[best.k - 1]) scan(x + i, size, column + i, best);
    tile.raise(max);
    tile.sum += block_sum(x + i, size, offset_of(tile.max));
  }
  return tile;
}

// Rows with fewer than k numbers: NaN columns follow, lower first.
template <class T, class V>
void fill_with_nan(const T* x, int64_t n, BestColumns<V>& best) {
  for (int64_t i = 0; i < n && best.count < best.k; ++i) {
    const V v = to_float(x[i]);
    if (v == v) continue;
    best.value[best.count] = v;
    best.column[best.count++] = static_cast<int32_t>(i);
  }
}

// exp(x - max) / sum, NaN where the sum is NaN or 0. x is at most max, or NaN.
inline double probability(double x, double max, double sum) {
  const double offset = max == -std::numeric_limits<double>::infinity() ? 0.0 : max;
  return std::exp(x - offset) / sum;
}

template <class T, class V>
void write_row(const SoftmaxTopkArgs& args, int64_t row, double max, double sum, const BestColumns<V>& best) {
  T* values = static_cast<T*>(args.values) + row * args.k;
  int64_t* indices = args.indices + row * args.k;
  for (int j = 0; j < args.k; ++j) {
    values[j] = from_float<T>(probability(best.value[j], max, sum));
    indices[j] = best.column[j];
  }
  if (args.statistics != nullptr) {
    args.statistics[2 * row] = max;
    args.statistics[2 * row + 1] = sum;
  }
}

// One row on this thread.
template <class T>
void one_row(const SoftmaxTopkArgs& args, int64_t row, Best& best) {
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  best.reset(static_cast<int>(args.k));
  const Sum sum = over_tiles<Sum>(
      args.num_cols, nullptr, [&](int64_t begin, int64_t count) { return scan_tile(x + begin, count, begin, best); });
  if (best.count < best.k) fill_with_nan(x, args.num_cols, best);
  write_row<T>(args, row, sum.max, sum.total(), best);
}

// One row on all threads: worker w takes its run of tiles, with the list lists[w].
template <class T>
void shared_row(const SoftmaxTopkArgs& args, int64_t row, Best* lists, Sum* partials) {
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const int64_t tiles = (args.num_cols + kTile - 1) / kTile;
  const int64_t workers = num_threads();
  parallel_workers(workers, [&](int worker) {
    Best& best = lists[worker];
    best.reset(static_cast<int>(args.k));
    for (int64_t t = tiles * worker / workers; t < tiles * (worker + 1) / workers; ++t) {
      const int64_t begin = t * kTile;
      const int64_t count = args.num_cols - begin < kTile ? args.num_cols - begin : kTile;
      partials[t] = scan_tile(x + begin, count, begin, best);
    }
  });
  for (int64_t w = 1; w < workers; ++w) lists[0].add(lists[w]);
  for (int64_t t = 1; t < tiles; ++t) partials[0].add(partials[t]);
  if (lists[0].count < lists[0].k) fill_with_nan(x, args.num_cols, lists[0]);
  write_row<T>(args, row, partials[0].max, partials[0].total(), lists[0]);
}

void one_double_row(const SoftmaxTopkArgs& args, int64_t row, BestColumns<double>& best) {
  const double* x = static_cast<const double*>(args.x) + row * args.x_stride;
  best.reset(static_cast<int>(args.k));
  for (int64_t i = 0; i < args.num_cols; ++i)
    if (best.takes(x[i])) best.insert(x[i], static_cast<int32_t>(i));
  const double max = best.count > 0 ? best.value[0] : -std::numeric_limits<double>::infinity();
  const double offset = best.count > 0 && max > -std::numeric_limits<double>::infinity() ? max : 0.0;
  double sum = 0.0;
  for (int64_t i = 0; i < args.num_cols; ++i) sum += std::exp(x[i] - offset);
  fill_with_nan(x, args.num_cols, best);
  write_row<double>(args, row, max, sum, best);
}

template <class T>
void topk_rows(const SoftmaxTopkArgs& args, T) {
  if (splits_rows(args.num_rows, args.num_cols)) {
    const size_t list_bytes = num_threads() * sizeof(Best);
    const int64_t tiles = (args.num_cols + kTile - 1) / kTile;
    char* memory = static_cast<char*>(scratch(Scratch::kReduction, list_bytes + tiles * sizeof(Sum)));
    for (int64_t row = 0; row < args.num_rows; ++row)
      shared_row<T>(args, row, reinterpret_cast<Best*>(memory), reinterpret_cast<Sum*>(memory + list_bytes));
    return;
  }
  split_rows(args.num_rows, args.num_cols, [&](int64_t first, int64_t last, int) {
    Best best;
    for (int64_t row = first; row < last; ++row) one_row<T>(args, row, best);
  });
}

inline void topk_rows(const SoftmaxTopkArgs& args, double) {
  split_rows(args.num_rows, args.num_cols, [&](int64_t first, int64_t last, int) {
    BestColumns<double> best;
    for (int64_t row = first; row < last; ++row) one_double_row(args, row, best);
  });
}

// ---- Backward: one read of x, one write of grad_x, and k columns written again.

template <class T>
void write_others(const T* x, T* grad_x, int64_t n, double max, double factor, bool split) {
  const Vec offset = Vec::all(offset_of(static_cast<float>(max)));
  const Vec scale = Vec::all(static_cast<float>(factor));
  each_tile(n, split, [&](int64_t begin, int64_t count) {
    each_vec(count, [&](int, int64_t i, auto lanes) FASTMOE_ROUTE_INLINE {
      put(exp_nonpositive(get(x + begin + i, lanes, 0.0f) - offset) * scale, grad_x + begin + i, lanes);
    });
  });
}

inline void write_others(const double* x, double* grad_x, int64_t n, double max, double factor, bool) {
  for (int64_t i = 0; i < n; ++i) grad_x[i] = probability(x[i], max, 1.0) * factor;
}

template <class T>
void backward_row(const SoftmaxTopkBackwardArgs& args, int64_t row, bool split) {
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* grad = static_cast<const T*>(args.grad_values) + row * args.k;
  const int64_t* columns = args.indices + row * args.k;
  T* grad_x = static_cast<T*>(args.grad_x) + row * args.num_cols;
  const double max = args.statistics[2 * row], sum = args.statistics[2 * row + 1];
  double p[kSoftmaxTopkLimit];
  double dot = 0.0;
  for (int64_t j = 0; j < args.k; ++j) {
    p[j] = probability(to_float(x[columns[j]]), max, sum);
    dot += to_float(grad[j]) * p[j];
  }
  write_others(x, grad_x, args.num_cols, max, -dot / sum, split);
  for (int64_t j = 0; j < args.k; ++j) grad_x[columns[j]] = from_float<T>(p[j] * (to_float(grad[j]) - dot));
}

}  // namespace

void softmax_topk(const SoftmaxTopkArgs& args) {
  dispatch_element(args.dtype, [&](auto element) { topk_rows(args, element); });
}

void softmax_topk_backward(const SoftmaxTopkBackwardArgs& args) {
  dispatch_element(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (splits_rows(args.num_rows, args.num_cols)) {
      for (int64_t row = 0; row < args.num_rows; ++row) backward_row<T>(args, row, true);
      return;
    }
    split_rows(args.num_rows, args.num_cols, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row) backward_row<T>(args, row, false);
    });
  });
}

FASTMOE_ROUTE_ISA_END
