// softmax_topk on CUDA: one read of each row for its max, its sum of exponentials and its k best columns.
//
// Who owns what. A block owns a chunk of kChunk columns of a row, whose elements lie in its registers, thread by thread
// in packs of 16 bytes. A thread finds the largest of its own and adds their exponentials relative to it; warps and the
// block bring these sums to one max. Lists of the k best of neighbouring chunks are then merged, up to kChunk entries a
// block, until one is left; the last merge divides. Chunks and merges follow from the number of columns and k alone,
// so a row's bits do not depend on the batch.
//
// Selection (block_select.cuh) costs an element one comparison, that of its thread's max. With j = k / kWarps, rounded
// up, the j-th best thread of a warp has a max that j elements of the warp reach, so k of the block reach the lowest of
// these floors, and few more do: 22 of 8192 random ones for k = 8. Those are gathered, and ranked by counting which go
// before: neither ranks nor results depend on where an atomic placed them. Where fewer than k numbers are above -inf, a
// warp looks for -inf, then NaN, from the first column on.
// Sums: a thread's columns in order, a butterfly, another over the warps, then chunks in order in double.
// Bytes: x once, k entries of 8 or 12 bytes and a sum of 16 a chunk. Backward: x once, its gradient once, k columns.
#include "cuda/architecture.cuh"
#include "cuda/block_select.cuh"
#include "cuda/long_rows.cuh"
#include "ops/softmax_topk.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr int kWarps = kSelectWarps;
constexpr int kMostTaken = static_cast<int>(kSoftmaxTopkLimit);

// Elements a thread holds, and a block.
template <class T>
constexpr int kPerThread = sizeof(T) == 8 ? 16 : 32;
template <class T>
constexpr int kChunk = kPerThread<T> * kThreads;
// Blocks of a chunk each that a multiprocessor holds.
template <class T>
constexpr int kBlocks = sizeof(T) == 8        ? 4
                        : sizeof(T) == 2      ? 6
                        : kNeedsMoreRegisters ? 4
                                              : 5;

// The k best of a chunk or of several; sum is relative to max.
template <class Key>
struct Lists {
  Key* keys;         // [R, lists, k] 0 where there are fewer
  int32_t* columns;  // [R, lists, k]
  double* sums;      // [R, lists, 2] max (NaN ignored), sum
  int64_t num_lists;
};

__device__ inline double offset_of(double max) { return max == -static_cast<double>(INFINITY) ? 0.0 : max; }

// Writes the k best of what was found as a list, or as the results of the row if it is the only one. All threads,
// behind a barrier.
template <class T>
__device__ void write_list(const SoftmaxTopkArgs& a, const Lists<KeyOf<T>>& to, int64_t row, int64_t list,
                           const Selection<KeyOf<T>>& s, double max, double sum) {
  const int j = static_cast<int>(threadIdx.x), k = static_cast<int>(a.k), count = s.count;
  const int64_t at = row * to.num_lists + list;
  if (j < count) {
    const Entry<KeyOf<T>> own = s.found[j];
    int rank = 0;
    for (int i = 0; i < count; ++i) rank += goes_before(s.found[i], own);
    if (rank < k && to.num_lists > 1) {
      to.keys[at * k + rank] = own.key;
      to.columns[at * k + rank] = own.column;
    } else if (rank < k) {
      const double value = static_cast<double>(key_value(own.key));
      static_cast<T*>(a.values)[at * k + rank] =
          narrow<T>(static_cast<accumulate_t<T>>(exp(value - offset_of(max)) / sum));
      a.indices[at * k + rank] = own.column;
    }
  }
  if (to.num_lists > 1 && j >= count && j < k) to.keys[at * k + j] = 0;
  double* const sums = to.num_lists > 1 ? to.sums : a.statistics;
  if (j == 0 && sums != nullptr) {
    sums[2 * at] = max;
    sums[2 * at + 1] = sum;
  }
}

// A block's columns of a row.
template <class T>
struct Chunk {
  static constexpr int kPack = Packed<T>::kColumns, kPacks = kPerThread<T> / kPack;

  const T* x;
  int size;
  int32_t begin;  // the first one

  // Of a thread's element i.
  __device__ static int column_of(int i, int thread) { return (i / kPack * kThreads + thread) * kPack + i % kPack; }
  __device__ static int column_of(int i) { return column_of(i, static_cast<int>(threadIdx.x)); }
  // Pack p of every thread is past the end. The same in all threads.
  __device__ bool ends_before(int p) const { return p * (kThreads * kPack) >= size; }

  // -inf where there is no element.
  __device__ void load(Packed<T> (&packs)[kPacks], bool is_wide) const {
    const T none = narrow<T>(-static_cast<accumulate_t<T>>(INFINITY));
    const auto wide = [&](int p) { return Packed<T>{reinterpret_cast<const uint4*>(x)[p * kThreads + threadIdx.x]}; };
    if (is_wide && size == kChunk<T>) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) packs[p] = wide(p);
      return;
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = column_of(p * kPack);
      packs[p] = is_wide && column + kPack <= size ? wide(p) : Packed<T>::gather(x, column, size, none);
    }
  }

  // Adds what reaches the floor to what was found; own_key is the largest of this thread's. The warp looks at one such
  // thread at a time, a lane an element, read again: registers have no index.
  template <class Key>
  __device__ void gather(Selection<Key>& s, Key own_key, Key floor) const {
    static_assert(kPerThread<T> <= kWarp, "a lane an element");
    const int lane = lane_index();
    unsigned owners = __ballot_sync(kAllLanes, own_key >= floor);
    for (; owners != 0; owners &= owners - 1) {
      const int column = column_of(lane, warp_index() * kWarp + __ffs(static_cast<int>(owners)) - 1);
      if (lane >= kPerThread<T> || column >= size) continue;
      const Key key = rising_key(widen(x[column]));
      if (key >= floor) s.add(key, begin + column);
    }
  }

  // Calls visit(key, column of the row) for those of this thread that reach the floor, read again.
  template <class Key, class Visit>
  __device__ void each(Key floor, const Visit& visit) const {
#pragma unroll 1
    for (int i = 0; i < kPerThread<T>; ++i) {
      const int column = column_of(i);
      if (column >= size) return;
      const Key key = rising_key(widen(x[column]));
      if (key >= floor) visit(key, begin + column);
    }
  }
};

// Adds -inf from the first column on, then NaN, until `wanted` are found: all numbers above -inf are. All threads,
// behind a barrier.
template <class T>
__device__ void find_rest(Selection<KeyOf<T>>& s, const Chunk<T>& chunk, int wanted) {
  if (warp_index() == 0) {
    int count = s.count;
    for (int pass = 0; pass < 2; ++pass) {
      for (int base = 0; base < chunk.size && count < wanted; base += kWarp) {
        const int column = base + lane_index();
        const KeyOf<T> key = column < chunk.size ? rising_key(widen(chunk.x[column])) : 0;
        const KeyOf<T> sought = pass == 0 ? rising_key(-static_cast<accumulate_t<T>>(INFINITY)) : KeyOf<T>{1};
        const unsigned owners = __ballot_sync(kAllLanes, key == sought);
        const int at = count + __popc(owners & lanes_before());
        if (key == sought && at < wanted) s.found[at] = {key, chunk.begin + column};
        count += __popc(owners);
      }
    }
    __syncwarp();
    if (lane_index() == 0) s.count = count < wanted ? count : wanted;
  }
  __syncthreads();
}

// Calls f(list, row) for the lists of this block, with a barrier in between.
template <class F>
__device__ void for_each_list(int64_t num_lists, int64_t num_rows, const F& f) {
  for (int64_t list = blockIdx.y; list < num_lists; list += gridDim.y) {
    for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
      f(list, row);
      __syncthreads();
    }
  }
}

// A sum of exponentials relative to `from`, relative to a max that is at least that.
template <class Float>
__device__ inline Float relative_to(Float max, Float from, Float sum) {
  return from == max ? sum : sum * exponential_term(from - max);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    chunk_kernel(SoftmaxTopkArgs a, Lists<KeyOf<T>> to, bool is_wide) {
  using Float = accumulate_t<T>;
  using Key = KeyOf<T>;
  constexpr int kPack = Chunk<T>::kPack, kPacks = Chunk<T>::kPacks;
  __shared__ Selection<Key> s;
  __shared__ Float maxima[kWarps], sums[kWarps], max, sum;
  const int k = static_cast<int>(a.k);
  for_each_list(to.num_lists, a.num_rows, [&](int64_t list, int64_t row) {
    Chunk<T> chunk;
    chunk.begin = static_cast<int32_t>(list) * kChunk<T>;
    chunk.size = static_cast<int>(a.num_cols) - chunk.begin;
    chunk.size = chunk.size < kChunk<T> ? chunk.size : kChunk<T>;
    chunk.x = static_cast<const T*>(a.x) + row * a.x_stride + chunk.begin;
    Packed<T> packs[kPacks];
    chunk.load(packs, is_wide);

    Float own_max = -static_cast<Float>(INFINITY);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (chunk.ends_before(p)) break;
#pragma unroll
      for (int n = 0; n < kPack; ++n) own_max = larger(own_max, packs[p][n]);
    }
    const Float offset = own_max == -static_cast<Float>(INFINITY) ? Float{0} : own_max;
    Float own_sum = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (chunk.ends_before(p)) break;
#pragma unroll
      for (int n = 0; n < kPack; ++n) own_sum += exponential_term(packs[p][n] - offset);
    }

    const Key own_key = rising_key(own_max), warp_key = largest_key(own_key);
    const Float most = key_value(warp_key);
    const Float warp_total = warp_sum(relative_to(most, own_max, own_sum));
    const Key warp_floor = nth_key(own_key, warp_key, floor_rank(k));
    if (lane_index() == 0) {
      s.floors[warp_index()] = warp_floor;
      maxima[warp_index()] = most;
      sums[warp_index()] = warp_total;
    }
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();

    // Above -inf, so that what is no element is not found.
    const Key above = rising_key(-static_cast<Float>(INFINITY)) + 1, lowest = lowest_floor(s);
    const Key floor = lowest > above ? lowest : above;
    chunk.gather(s, own_key, floor);
    if (warp_index() == kWarps - 1) {
      const int w = lane_index() % kWarps;
      const Float block_max = warp_max(maxima[w]);
      const Float total = warp_sum(lane_index() < kWarps ? relative_to(block_max, maxima[w], sums[w]) : Float{0});
      if (lane_index() == 0) {
        max = block_max;
        sum = total;
      }
    }
    __syncthreads();
    const int count = s.count, wanted = k < chunk.size ? k : chunk.size;
    if (count > kMostFound) {
      select_exactly(s, k, [&](const auto& visit) { chunk.each(floor, visit); });
    } else if (count < wanted) {
      __syncthreads();  // s.count was read
      find_rest(s, chunk, wanted);
    }
    write_list<T>(a, to, row, list, s, max, sum);
  });
}

// One list of every `per_merge` neighbours.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    merge_kernel(SoftmaxTopkArgs a, Lists<KeyOf<T>> from, Lists<KeyOf<T>> to, int per_merge) {
  using Key = KeyOf<T>;
  __shared__ Selection<Key> s;
  __shared__ double maxima[kWarps], sums[kWarps];
  const int k = static_cast<int>(a.k);
  for_each_list(to.num_lists, a.num_rows, [&](int64_t list, int64_t row) {
    const int64_t first = list * per_merge, left = from.num_lists - first;
    const int num_lists = left < per_merge ? static_cast<int>(left) : per_merge;
    const int64_t source = row * from.num_lists + first;
    const Key* const keys = from.keys + source * k;
    const auto each = [&](Key floor, const auto& visit) {
      for (int c = static_cast<int>(threadIdx.x); c < num_lists * k; c += kThreads) {
        const Key key = keys[c];
        if (key >= floor) visit(key, from.columns[source * k + c]);
      }
    };
    Key own_key = 0;
    for (int c = static_cast<int>(threadIdx.x); c < num_lists * k; c += kThreads)
      own_key = keys[c] > own_key ? keys[c] : own_key;
    const Key warp_floor = nth_key(own_key, largest_key(own_key), floor_rank(k));
    if (lane_index() == 0) s.floors[warp_index()] = warp_floor;
    if (threadIdx.x == 0) s.count = 0;
    double own_max = -static_cast<double>(INFINITY);
    for (int l = static_cast<int>(threadIdx.x); l < num_lists; l += kThreads)
      own_max = larger(own_max, from.sums[2 * (source + l)]);
    const double max = block_max(own_max, maxima);

    const Key lowest = lowest_floor(s), floor = lowest > 0 ? lowest : 1;
    each(floor, [&](Key key, int32_t column) { s.add(key, column); });
    double own_sum = 0.0;
    for (int l = static_cast<int>(threadIdx.x); l < num_lists; l += kThreads)
      own_sum += relative_to(max, from.sums[2 * (source + l)], from.sums[2 * (source + l) + 1]);
    const double sum = block_sum(own_sum, sums);
    if (s.count > kMostFound) select_exactly(s, k, [&](const auto& visit) { each(floor, visit); });
    write_list<T>(a, to, row, list, s, max, sum);
  });
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
  lists.keys = queue.scratch_of<Key>(num_rows * num_lists * k);
  lists.columns = queue.scratch_of<int32_t>(num_rows * num_lists * k);
  lists.sums = queue.scratch_of<double>(num_rows * num_lists * 2);
  return lists;
}

// A block for every list of every row, rows along x; for_each_list walks on by the size of the grid.
dim3 grid_of(int64_t num_lists, int64_t num_rows) {
  constexpr int64_t kMostHeight = 65535;
  return {num_blocks(num_rows, 1), static_cast<unsigned>(num_lists < kMostHeight ? num_lists : kMostHeight)};
}

template <class T>
CudaStatus softmax_topk_as(const SoftmaxTopkArgs& a, const CudaQueue& queue) {
  using Key = KeyOf<T>;
  Lists<Key> lists = lists_of<Key>(a.num_rows, ceil_div(a.num_cols, kChunk<T>), a.k, queue);
  const bool is_wide = rows_are_wide<T>(a.x, a.x_stride, a.num_rows);
  chunk_kernel<T><<<grid_of(lists.num_lists, a.num_rows), kThreads, 0, queue.stream>>>(a, lists, is_wide);
  CudaStatus status = launched();
  const int per_merge = kChunk<T> / static_cast<int>(a.k);
  while (status.code == 0 && lists.num_lists > 1) {
    const Lists<Key> merged = lists_of<Key>(a.num_rows, ceil_div(lists.num_lists, per_merge), a.k, queue);
    merge_kernel<T><<<grid_of(merged.num_lists, a.num_rows), kThreads, 0, queue.stream>>>(a, lists, merged, per_merge);
    status = launched();
    lists = merged;
  }
  return status;
}

template <class T>
CudaStatus softmax_topk_backward_as(const SoftmaxTopkBackwardArgs& a, const CudaQueue& queue) {
  const int64_t num_parts = ceil_div(a.num_cols, kBackwardColumns);
  const bool is_wide =
      rows_are_wide<T>(a.x, a.x_stride, a.num_rows) && rows_are_wide<T>(a.grad_x, a.num_cols, a.num_rows);
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
