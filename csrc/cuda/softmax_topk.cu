// softmax_topk on CUDA: one read of each row for its max, its sum of exponentials and its k best columns.
//
// Who owns what. A block owns a chunk of kChunk columns of a row, whose elements lie in its registers, thread by thread
// in packs of 16 bytes: it finds their max, adds their exponentials relative to it, and selects the k best, best first.
// Then lists of neighbouring chunks are merged, kChunk candidates a block, until one is left; the last merge divides.
// Chunks and merges follow from the number of columns and k alone, so a row's bits do not depend on the batch.
//
// Selection is exact, by (value, column): keys are the value's bits made monotone, NaN below every number. The k-th
// best of the threads' maxima is a floor below which nothing is chosen; a radix select over what is left, 8 bits a
// pass, gives the k-th key, and a second one over the columns of the equal ones gives the last column that is taken.
// Chosen entries are put in order by counting those that go before each. Why radix: k extractions of a block-wide
// maximum cost k barriers and more, a pass costs three however large k is.
// Sums: a thread's columns in order, a butterfly, the warps in order, then chunks in order in double.
// Bytes: x once, k entries of 12 or 16 bytes a chunk. Backward: x once, its gradient once, and k columns again.
#include <type_traits>

#include "cuda/block.cuh"
#include "ops/softmax_topk.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBins = 256;
constexpr int kMostTaken = static_cast<int>(kSoftmaxTopkLimit);

// Keys order as values do: 0 is no element, 1 is NaN, both zeros share one.
__device__ inline uint32_t rising_key(float value) {
  if (isnan(value)) return 1;
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t rising_key(double value) {
  if (isnan(value)) return 1;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  return (bits >> 63) != 0 ? ~bits : bits | (uint64_t{1} << 63);
}
__device__ inline float key_value(uint32_t key) {
  if (key <= 1) return NAN;
  return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}
__device__ inline double key_value(uint64_t key) {
  if (key <= 1) return NAN;
  return __longlong_as_double(static_cast<long long>((key >> 63) != 0 ? key & ~(uint64_t{1} << 63) : ~key));
}

template <class T>
using KeyOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// Elements a thread holds, and a block.
template <class T>
constexpr int kPerThread = sizeof(T) == 8 ? 16 : 32;
template <class T>
constexpr int kChunk = kPerThread<T> * kThreads;

// The k best of a chunk or of several; sum is relative to max.
template <class Key>
struct Lists {
  Key* keys;         // [R, lists, k] 0 where there are fewer
  int32_t* columns;  // [R, lists, k]
  double* sums;      // [R, lists, 2] max (NaN ignored), sum
  int64_t num_lists;
};

__device__ inline double offset_of(double max) { return max == -static_cast<double>(INFINITY) ? 0.0 : max; }

// Shared memory of a selection.
template <class Key>
struct Selection {
  int bins[kBins];  // 0 between two selections
  int warp_counts[kWarps];
  int digit, rest;  // what the owner of the digit found
  int count;        // elements there are
  int num_found;
  Key found_keys[kMostTaken];  // the chosen ones, in any order
  int32_t found_columns[kMostTaken];
  Key keys[kMostTaken];  // and best first
  int32_t columns[kMostTaken];
};

// The largest digit so that the elements of it and of larger ones number at least `rest`; `rest` becomes what is to be
// taken of that digit's own. s.bins holds the counts and is cleared. All threads, behind a barrier; there are at least
// `rest` elements.
template <class Key>
__device__ int pick_digit(Selection<Key>& s, int& rest) {
  // Thread i looks at bin 255 - i: a scan over threads counts from the largest digit down.
  const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
  const int own = s.bins[bin];
  s.bins[bin] = 0;
  int before = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, distance);
    if (lane_index() >= distance) before += other;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (lane_index() == kWarp - 1) s.warp_counts[warp] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp; ++w) before += s.warp_counts[w];
  if (before < rest && before + own >= rest) {
    s.digit = bin;
    s.rest = rest - before;
  }
  __syncthreads();
  rest = s.rest;
  return s.digit;
}

// The `rest`-th largest word among those that each(visit) visits, which number at least `rest`; `rest` is then how many
// equal to it are to be taken. All threads, behind a barrier.
template <int kBits, class Word, class Key, class Each>
__device__ Word select_word(Selection<Key>& s, int& rest, const Each& each) {
  Word prefix = 0, known = 0;
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    each([&](Word word) {
      if ((word & known) == prefix) atomicAdd(&s.bins[static_cast<int>(word >> shift) & (kBins - 1)], 1);
    });
    __syncthreads();
    prefix |= static_cast<Word>(pick_digit(s, rest)) << shift;
    known |= Word{kBins - 1} << shift;
  }
  return prefix;
}

// Puts the k best of the block's elements into s.keys and s.columns, best first; returns how many there are. `column`
// gives the column of element i of this thread, and among equal keys the lower one is better. All threads; what was in
// s may still be read by others, so long as they have a barrier of the block in between.
template <int N, class Key, class Column>
__device__ int select_best(Selection<Key>& s, const Key (&keys)[N], int k, const Column& column) {
  static_assert(kThreads == kBins, "a thread a bin");
  constexpr int kKeyBits = static_cast<int>(sizeof(Key)) * 8;
  int own = 0;
  Key largest = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    own += keys[i] != 0;
    largest = keys[i] > largest ? keys[i] : largest;
  }
  s.bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) s.count = s.num_found = 0;
  __syncthreads();
  if (own > 0) atomicAdd(&s.count, own);
  const int num_owners = __syncthreads_count(own > 0);
  const int count = s.count, taken = count < k ? count : k;
  Key floor = 1;
  int rest = k;
  if (num_owners >= k) {
    floor = select_word<kKeyBits, Key>(s, rest, [&](const auto& visit) {
      if (largest != 0) visit(largest);
    });
  }
  Key last = 1;
  uint32_t last_column = ~0u;
  if (count > k) {
    rest = k;
    last = select_word<kKeyBits, Key>(s, rest, [&](const auto& visit) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (keys[i] >= floor) visit(keys[i]);
    });
    // Columns inverted, so that the largest word is the lowest column.
    last_column = ~select_word<32, uint32_t>(s, rest, [&](const auto& visit) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (keys[i] == last) visit(~static_cast<uint32_t>(column(i)));
    });
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (keys[i] == 0 || keys[i] < last) continue;
    if (keys[i] == last && static_cast<uint32_t>(column(i)) > last_column) continue;
    const int at = atomicAdd(&s.num_found, 1);  // any order: the entries are put in order below
    s.found_keys[at] = keys[i];
    s.found_columns[at] = column(i);
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < taken) {
    const Key key = s.found_keys[threadIdx.x];
    const int32_t col = s.found_columns[threadIdx.x];
    int rank = 0;
    for (int j = 0; j < taken; ++j)
      rank += s.found_keys[j] > key || (s.found_keys[j] == key && s.found_columns[j] < col);
    s.keys[rank] = key;
    s.columns[rank] = col;
  }
  __syncthreads();
  return taken;
}

// Writes a list, or the results of its row if it is the last. All threads.
template <class T>
__device__ void write_list(const SoftmaxTopkArgs& a, const Lists<KeyOf<T>>& to, int64_t row, int64_t list,
                           const Selection<KeyOf<T>>& s, int taken, double max, double sum) {
  const int j = static_cast<int>(threadIdx.x);
  if (to.num_lists > 1) {
    const int64_t at = row * to.num_lists + list;
    if (j < a.k) {
      to.keys[at * a.k + j] = j < taken ? s.keys[j] : 0;
      to.columns[at * a.k + j] = j < taken ? s.columns[j] : 0;
    }
    if (j == 0) {
      to.sums[2 * at] = max;
      to.sums[2 * at + 1] = sum;
    }
    return;
  }
  if (j < a.k) {
    const double value = static_cast<double>(key_value(s.keys[j]));
    static_cast<T*>(a.values)[row * a.k + j] =
        narrow<T>(static_cast<accumulate_t<T>>(exp(value - offset_of(max)) / sum));
    a.indices[row * a.k + j] = s.columns[j];
  }
  if (j == 0 && a.statistics != nullptr) {
    a.statistics[2 * row] = max;
    a.statistics[2 * row + 1] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) chunk_kernel(SoftmaxTopkArgs a, Lists<KeyOf<T>> to, bool is_wide) {
  using Float = accumulate_t<T>;
  using Key = KeyOf<T>;
  constexpr int N = kPerThread<T>, kPack = 16 / sizeof(T), kPacks = N / kPack;
  __shared__ Selection<Key> s;
  __shared__ Float maxima[kWarps], sums[kWarps];
  for (int64_t item = blockIdx.x; item < a.num_rows * to.num_lists; item += gridDim.x) {
    const int64_t row = item / to.num_lists, begin = item % to.num_lists * kChunk<T>;
    const T* const x = static_cast<const T*>(a.x) + row * a.x_stride + begin;
    const int64_t left = a.num_cols - begin;
    const int size = left < kChunk<T> ? static_cast<int>(left) : kChunk<T>;
    const auto column_of = [&](int i) {
      return (i / kPack * kThreads + static_cast<int>(threadIdx.x)) * kPack + i % kPack;
    };
    T values[N];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int col = column_of(p * kPack);
      if (is_wide && col + kPack <= size) {
        const Pack<T, kPack> pack = *reinterpret_cast<const Pack<T, kPack>*>(x + col);
#pragma unroll
        for (int n = 0; n < kPack; ++n) values[p * kPack + n] = pack.values[n];
      } else {
#pragma unroll
        for (int n = 0; n < kPack; ++n) values[p * kPack + n] = col + n < size ? x[col + n] : T{};
      }
    }
    Float max = -static_cast<Float>(INFINITY);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (column_of(i) < size) max = larger(max, widen(values[i]));
    max = block_max(max, maxima);
    const Float offset = max == -static_cast<Float>(INFINITY) ? Float{0} : max;
    Float sum = 0;
    Key keys[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool is_inside = column_of(i) < size;
      const Float value = widen(values[i]);
      if (is_inside) sum += exp(value - offset);
      keys[i] = is_inside ? rising_key(value) : Key{0};
    }
    sum = block_sum(sum, sums);
    const int taken =
        select_best(s, keys, static_cast<int>(a.k), [&](int i) { return static_cast<int32_t>(begin) + column_of(i); });
    write_list<T>(a, to, row, item % to.num_lists, s, taken, max, sum);
  }
}

// One list of every `per_merge` neighbours. Entry i of a thread is candidate i * kThreads + thread.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    merge_kernel(SoftmaxTopkArgs a, Lists<KeyOf<T>> from, Lists<KeyOf<T>> to, int per_merge) {
  using Key = KeyOf<T>;
  constexpr int N = kPerThread<T>;
  __shared__ Selection<Key> s;
  __shared__ double maxima[kWarps], sums[kWarps];
  for (int64_t item = blockIdx.x; item < a.num_rows * to.num_lists; item += gridDim.x) {
    const int64_t row = item / to.num_lists, first = item % to.num_lists * per_merge;
    const int64_t left = from.num_lists - first;
    const int num_lists = left < per_merge ? static_cast<int>(left) : per_merge;
    const int64_t source = row * from.num_lists + first;
    const int num_candidates = num_lists * static_cast<int>(a.k);
    Key keys[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = i * kThreads + static_cast<int>(threadIdx.x);
      keys[i] = c < num_candidates ? from.keys[source * a.k + c] : Key{0};
    }
    double own_max = -static_cast<double>(INFINITY);
    for (int l = static_cast<int>(threadIdx.x); l < num_lists; l += kThreads)
      own_max = larger(own_max, from.sums[2 * (source + l)]);
    const double max = block_max(own_max, maxima);
    double own_sum = 0.0;
    for (int l = static_cast<int>(threadIdx.x); l < num_lists; l += kThreads) {
      const double list_max = from.sums[2 * (source + l)], list_sum = from.sums[2 * (source + l) + 1];
      own_sum += list_max == max ? list_sum : list_sum * exp(list_max - max);
    }
    const double sum = block_sum(own_sum, sums);
    const int32_t* const columns = from.columns + source * a.k;
    const int taken = select_best(s, keys, static_cast<int>(a.k),
                                  [&](int i) { return columns[i * kThreads + static_cast<int>(threadIdx.x)]; });
    write_list<T>(a, to, row, item % to.num_lists, s, taken, max, sum);
  }
}

// A block owns 4096 columns of a row; it writes what the choice does not touch, then, where they lie in its columns,
// the chosen ones. grad[c] = p[c] ([c is column j] grad_values[j] - dot).
constexpr int kBackwardColumns = 4096;

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    softmax_topk_backward_kernel(SoftmaxTopkBackwardArgs a, int64_t num_parts, bool is_wide) {
  using Float = accumulate_t<T>;
  constexpr int kPack = 16 / sizeof(T);
  __shared__ double chosen[kMostTaken], grads[kMostTaken], dot;
  const int k = static_cast<int>(a.k), thread = static_cast<int>(threadIdx.x);
  for (int64_t item = blockIdx.x; item < a.num_rows * num_parts; item += gridDim.x) {
    const int64_t row = item / num_parts, begin = item % num_parts * kBackwardColumns;
    const int64_t end = begin + kBackwardColumns < a.num_cols ? begin + kBackwardColumns : a.num_cols;
    const T* const x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* const grad_x = static_cast<T*>(a.grad_x) + row * a.num_cols;
    const double max = offset_of(a.statistics[2 * row]), sum = a.statistics[2 * row + 1];
    const int64_t own = thread < k ? a.indices[row * k + thread] : -1;
    const bool is_column = own >= 0 && own < a.num_cols;
    if (thread < k) {
      chosen[thread] = is_column ? exp(static_cast<double>(widen(x[own])) - max) / sum : 0.0;
      grads[thread] = static_cast<double>(widen(static_cast<const T*>(a.grad_values)[row * k + thread]));
    }
    __syncthreads();
    if (thread == 0) {
      double total = 0.0;
      for (int j = 0; j < k; ++j) total += grads[j] * chosen[j];
      dot = total;
    }
    __syncthreads();
    const Float offset = static_cast<Float>(max), factor = static_cast<Float>(-dot / sum);
    const auto others = [&](T value) { return narrow<T>(exp(widen(value) - offset) * factor); };
    for (int64_t col = begin + int64_t{thread} * kPack; col < end; col += kThreads * kPack) {
      if (is_wide && col + kPack <= end) {
        Pack<T, kPack> pack = *reinterpret_cast<const Pack<T, kPack>*>(x + col);
#pragma unroll
        for (int n = 0; n < kPack; ++n) pack.values[n] = others(pack.values[n]);
        store_pack(grad_x + col, pack);
      } else {
        for (int64_t c = col; c < end && c < col + kPack; ++c) grad_x[c] = others(x[c]);
      }
    }
    __syncthreads();  // the chosen columns are written by other threads than before
    if (is_column && own >= begin && own < end)
      grad_x[own] = narrow<T>(static_cast<Float>(chosen[thread] * (grads[thread] - dot)));
  }
}

template <class Key>
Lists<Key> lists_of(int64_t num_rows, int64_t num_lists, int64_t k, const CudaQueue& queue) {
  Lists<Key> lists{nullptr, nullptr, nullptr, num_lists};
  if (num_lists == 1) return lists;
  lists.keys = static_cast<Key*>(queue.scratch(num_rows * num_lists * k * sizeof(Key)));
  lists.columns = static_cast<int32_t*>(queue.scratch(num_rows * num_lists * k * sizeof(int32_t)));
  lists.sums = static_cast<double*>(queue.scratch(num_rows * num_lists * 2 * sizeof(double)));
  return lists;
}

template <class T>
bool rows_are_wide(const T* x, int64_t stride, int64_t num_rows) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && (num_rows == 1 || stride * sizeof(T) % 16 == 0);
}

template <class T>
CudaStatus softmax_topk_as(const SoftmaxTopkArgs& a, const CudaQueue& queue) {
  using Key = KeyOf<T>;
  Lists<Key> lists = lists_of<Key>(a.num_rows, ceil_div(a.num_cols, kChunk<T>), a.k, queue);
  const bool is_wide = rows_are_wide(static_cast<const T*>(a.x), a.x_stride, a.num_rows);
  chunk_kernel<T><<<num_blocks(a.num_rows * lists.num_lists, 1), kThreads, 0, queue.stream>>>(a, lists, is_wide);
  CudaStatus status = launched();
  const int per_merge = kChunk<T> / static_cast<int>(a.k);
  while (status.code == 0 && lists.num_lists > 1) {
    const Lists<Key> merged = lists_of<Key>(a.num_rows, ceil_div(lists.num_lists, per_merge), a.k, queue);
    merge_kernel<T>
        <<<num_blocks(a.num_rows * merged.num_lists, 1), kThreads, 0, queue.stream>>>(a, lists, merged, per_merge);
    status = launched();
    lists = merged;
  }
  return status;
}

template <class T>
CudaStatus softmax_topk_backward_as(const SoftmaxTopkBackwardArgs& a, const CudaQueue& queue) {
  const int64_t num_parts = ceil_div(a.num_cols, kBackwardColumns);
  const bool is_wide = rows_are_wide(static_cast<const T*>(a.x), a.x_stride, a.num_rows) &&
                       rows_are_wide(static_cast<const T*>(a.grad_x), a.num_cols, a.num_rows);
  softmax_topk_backward_kernel<T>
      <<<num_blocks(a.num_rows * num_parts, 1), kThreads, 0, queue.stream>>>(a, num_parts, is_wide);
  return launched();
}

}  // namespace

CudaStatus softmax_topk(const SoftmaxTopkArgs& a, const CudaQueue& queue) {
  CudaStatus status;
  if (a.num_rows == 0) return status;
  dispatch_float(a.dtype, [&](auto sample) { status = softmax_topk_as<decltype(sample)>(a, queue); });
  return status;
}

CudaStatus softmax_topk_backward(const SoftmaxTopkBackwardArgs& a, const CudaQueue& queue) {
  CudaStatus status;
  if (a.num_rows == 0 || a.num_cols == 0) return status;
  dispatch_float(a.dtype, [&](auto sample) { status = softmax_topk_backward_as<decltype(sample)>(a, queue); });
  return status;
}

}  // namespace cuda
}  // namespace fastmoe_route
