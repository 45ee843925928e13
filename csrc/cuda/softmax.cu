// softmax on CUDA: exp(x - max) / sum along a row, and the backward pass y * (g - sum(g * y) / sum(y)): the sum of
// the rounded y differs from 1, and where one y is close to 1 that would be all that is left of its g - sum(g * y).
//
// Who owns what. A row of at most kMostColumns belongs to a warp, which keeps it in registers. A longer row belongs to
// a block, which keeps it, if it fits, in registers and shared memory (kept_rows.cuh): 131,072 columns of 16 bits, or
// 65,536 of float32, on a multiprocessor with 227 KiB. These read x once, whatever the method. Of the others, and of
// double,
//   three_pass  reads x for the max, for the sum, and to write
//   online      reads x for both at once (Milakov and Gimelshein, arXiv:1805.02867), and to write
// `auto` is online. two_pass, a sum of mantissas and exponents that saves a pass on a processor whose exp is long
// (arXiv:2001.04438), also runs as online here: that reads x as often.
//
// Sums run over a thread's columns in order, then over a butterfly and the warps of the block in order: a function of
// the row length alone, so a row has the same bits in every batch. -inf columns add nothing, and the merge of two sums
// of which one has seen only -inf is defined; a row of only -inf, or with a +inf or NaN, is NaN, as in torch.
//
// Bytes of a row: 1 read and 1 write where it is kept, else 2 or 3 reads (the later ones from the second-level cache if
// the row fits) and 1 write. Backward: 2 reads and 1 write in registers, else 4 reads and 1 write.
#include <algorithm>

#include "cuda/kept_rows.cuh"
#include "ops/softmax.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kWarpThreads = 128;   // 4 rows a block
constexpr int kBlockThreads = 512;  // 1 row a block
constexpr int kShortColumns = 256;
// Columns of the longest row that fits the registers of a warp.
template <class T>
constexpr int kMostColumns = sizeof(T) == 8 ? 256 : 512;

template <class Float>
__device__ Float minus_infinity() {
  return -static_cast<Float>(INFINITY);
}
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// A sum of exp(x - max) over the columns seen so far, all relative to the largest of them.
template <class Float>
struct OnlineSum {
  Float max = -static_cast<Float>(INFINITY);
  Float sum = 0;

  __device__ void add(Float x) {
    if (x > max) {
      sum = sum * exponential(max - x) + 1;
      max = x;
    } else if (x != minus_infinity<Float>()) {
      sum += exponential(x - max);  // a NaN comes here too
    }
  }
  // Sum relative to a max that is at least this one.
  __device__ Float relative_to(Float larger_max) const {
    return max == larger_max ? sum : sum * exponential(max - larger_max);
  }
};

// exp(x - max) / sum. A +inf in the row makes every column NaN, also the finite ones, whose exponentials are 0.
template <class Float>
__device__ Float divisor_of(Float max, Float sum) {
  return max == static_cast<Float>(INFINITY) ? static_cast<Float>(NAN) : sum;
}

// A warp per row; lane l holds columns l, l + 32, ...
template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarpThreads, 1) softmax_warp_kernel(SoftmaxArgs a) {
  using Float = accumulate_t<T>;
  const int num_cols = static_cast<int>(a.num_cols);
  for (int64_t row = grid_warp(); row < a.num_rows; row += grid_warps()) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    Float values[kPerLane];
    Float max = minus_infinity<Float>();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int c = i * kWarp + lane_index();
      values[i] = c < num_cols ? widen(x[c]) : minus_infinity<Float>();
      max = larger(max, values[i]);
    }
    max = warp_max(max);
    Float sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * kWarp + lane_index() >= num_cols) continue;
      values[i] = exponential(values[i] - max);  // NaN for a NaN, for a +inf, and in a row of only -inf
      sum += values[i];
    }
    sum = warp_sum(sum);
    T* y = static_cast<T*>(a.y) + row * a.num_cols;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int c = i * kWarp + lane_index();
      if (c < num_cols) y[c] = narrow<T>(values[i] / sum);
    }
  }
}

// Columns are handed to the threads of a block in packs of 16 bytes, read as one where the rows are aligned and one by
// one elsewhere: which thread adds which columns, and so the bits of a sum, do not depend on where a row lies.
template <class T>
constexpr int kPackColumns = 16 / sizeof(T);
template <class T>
using RowPack = Pack<T, kPackColumns<T>>;

template <class T, bool kIsWide>
__device__ RowPack<T> load_pack(const T* row, int64_t pack) {
  if constexpr (kIsWide) {
    return reinterpret_cast<const RowPack<T>*>(row)[pack];
  } else {
    RowPack<T> values;
#pragma unroll
    for (int n = 0; n < kPackColumns<T>; ++n) values.values[n] = row[pack * kPackColumns<T> + n];
    return values;
  }
}

template <class T, bool kIsWide>
__device__ void store_pack(T* row, int64_t pack, const RowPack<T>& values) {
  if constexpr (kIsWide) {
    reinterpret_cast<RowPack<T>*>(row)[pack] = values;
  } else {
#pragma unroll
    for (int n = 0; n < kPackColumns<T>; ++n) row[pack * kPackColumns<T> + n] = values.values[n];
  }
}

// Calls visit(column, value) for the columns of this thread, in order: its packs, then what is past the last whole one.
template <class T, bool kIsWide, class F>
__device__ void each_column(const T* x, int64_t num_cols, const F& visit) {
  constexpr int kColumns = kPackColumns<T>;
  const int64_t num_packs = num_cols / kColumns;
  for (int64_t pack = threadIdx.x; pack < num_packs; pack += blockDim.x) {
    const RowPack<T> values = load_pack<T, kIsWide>(x, pack);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) visit(pack * kColumns + n, widen(values.values[n]));
  }
  for (int64_t c = num_packs * kColumns + threadIdx.x; c < num_cols; c += blockDim.x) visit(c, widen(x[c]));
}

// y[c] = f(c, x[c]), as each_column walks.
template <class T, bool kIsWide, class F>
__device__ void map_columns(const T* x, T* y, int64_t num_cols, const F& f) {
  constexpr int kColumns = kPackColumns<T>;
  const int64_t num_packs = num_cols / kColumns;
  for (int64_t pack = threadIdx.x; pack < num_packs; pack += blockDim.x) {
    const RowPack<T> values = load_pack<T, kIsWide>(x, pack);
    RowPack<T> results;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) results.values[n] = narrow<T>(f(pack * kColumns + n, widen(values.values[n])));
    store_pack<T, kIsWide>(y, pack, results);
  }
  for (int64_t c = num_packs * kColumns + threadIdx.x; c < num_cols; c += blockDim.x)
    y[c] = narrow<T>(f(c, widen(x[c])));
}

// ---- Rows that a block keeps.

template <class T, bool kIsWide>
__global__ void __launch_bounds__(kKeptThreads, 1) softmax_kept_kernel(SoftmaxArgs a) {
  extern __shared__ uint4 shared_packs[];
  __shared__ float2 warp_sums[2][kWarp];
  int turn = 0;  // the sums of a row are still read where those of the next are written
  for (int64_t row = blockIdx.x; row < a.num_rows; row += gridDim.x, turn ^= 1) {
    KeptRow<T, kIsWide> kept(a, row, shared_packs);
    kept.load();
    KeptSum sum = kept.sum().of_warp();
    if (lane_index() == 0) warp_sums[turn][warp_index()] = {sum.max, sum.sum};
    __syncthreads();
    sum = KeptSum();
    if (lane_index() < static_cast<int>(blockDim.x) / kWarp) {
      sum.max = warp_sums[turn][lane_index()].x;
      sum.sum = warp_sums[turn][lane_index()].y;
    }
    kept.write(Probability<T>(sum.of_warp()));
  }
}

template <class T, bool kIsWide, bool kIsOnline>
__global__ void __launch_bounds__(kBlockThreads, 1) softmax_block_kernel(SoftmaxArgs a) {
  using Float = accumulate_t<T>;
  __shared__ Float maxima[kBlockThreads / kWarp], sums[kBlockThreads / kWarp];
  for (int64_t row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    Float max, sum;
    if (kIsOnline) {
      OnlineSum<Float> online;
      each_column<T, kIsWide>(x, a.num_cols, [&](int64_t, Float value) { online.add(value); });
      max = block_max(online.max, maxima);
      sum = block_sum(online.relative_to(max), sums);
    } else {
      Float own_max = minus_infinity<Float>();
      each_column<T, kIsWide>(x, a.num_cols, [&](int64_t, Float value) { own_max = larger(own_max, value); });
      max = block_max(own_max, maxima);
      Float own_sum = 0;
      each_column<T, kIsWide>(x, a.num_cols, [&](int64_t, Float value) { own_sum += exponential(value - max); });
      sum = block_sum(own_sum, sums);
    }
    const Float divisor = divisor_of(max, sum);
    T* y = static_cast<T*>(a.y) + row * a.num_cols;
    map_columns<T, kIsWide>(x, y, a.num_cols, [&](int64_t, Float value) { return exponential(value - max) / divisor; });
  }
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarpThreads, 1) softmax_backward_warp_kernel(SoftmaxBackwardArgs a) {
  using Float = accumulate_t<T>;
  const int num_cols = static_cast<int>(a.num_cols);
  for (int64_t row = grid_warp(); row < a.num_rows; row += grid_warps()) {
    const T* grad_y = static_cast<const T*>(a.grad_y) + row * a.num_cols;
    const T* y = static_cast<const T*>(a.y) + row * a.num_cols;
    T grad[kPerLane], value[kPerLane];
    Float weighted = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int c = i * kWarp + lane_index();
      if (c >= num_cols) continue;
      grad[i] = grad_y[c];
      value[i] = y[c];
      weighted = fma(widen(grad[i]), widen(value[i]), weighted);
      total += widen(value[i]);
    }
    const Float mean = warp_sum(weighted) / warp_sum(total);
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.num_cols;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int c = i * kWarp + lane_index();
      if (c < num_cols) grad_x[c] = narrow<T>(widen(value[i]) * (widen(grad[i]) - mean));
    }
  }
}

template <class T, bool kIsWide>
__global__ void __launch_bounds__(kBlockThreads, 1) softmax_backward_block_kernel(SoftmaxBackwardArgs a) {
  using Float = accumulate_t<T>;
  __shared__ Float partial[2][kBlockThreads / kWarp];  // two: a sum's barrier frees the other's memory
  for (int64_t row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
    const T* grad_y = static_cast<const T*>(a.grad_y) + row * a.num_cols;
    const T* y = static_cast<const T*>(a.y) + row * a.num_cols;
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.num_cols;
    Float weighted = 0, total = 0;
    each_column<T, kIsWide>(y, a.num_cols, [&](int64_t c, Float value) {
      weighted = fma(widen(grad_y[c]), value, weighted);
      total += value;
    });
    const Float mean = block_sum(weighted, partial[0]) / block_sum(total, partial[1]);
    map_columns<T, kIsWide>(y, grad_x, a.num_cols,
                            [&](int64_t c, Float value) { return value * (widen(grad_y[c]) - mean); });
  }
}

template <class T, bool kIsWide>
CudaStatus softmax_block(const SoftmaxArgs& a, const CudaQueue& queue) {
  const unsigned blocks = num_blocks(a.num_rows, 1);
  if (a.method == SoftmaxMethod::kThreePass) {
    softmax_block_kernel<T, kIsWide, false><<<blocks, kBlockThreads, 0, queue.stream>>>(a);
  } else {
    softmax_block_kernel<T, kIsWide, true><<<blocks, kBlockThreads, 0, queue.stream>>>(a);
  }
  return launched();
}

// Launches for a row that a block keeps, or says that it does not fit.
template <class T, bool kIsWide>
CudaStatus softmax_kept(const SoftmaxArgs& a, const CudaQueue& queue, bool* fits) {
  const int64_t num_packs = ceil_div(a.num_cols, Packed<T>::kColumns);
  // Two blocks a multiprocessor, where shared memory holds their rows: one reads while the other writes.
  const int64_t most_threads = num_packs > kKeptThreads / 2 * kMostPacks ? kKeptThreads : kKeptThreads / 2;
  const int64_t threads = std::clamp(ceil_div(ceil_div(num_packs, kHeld), kWarp) * kWarp, int64_t{128}, most_threads);
  const int64_t packs_each = ceil_div(num_packs, threads);
  *fits = packs_each <= kMostPacks;
  if (!*fits) return {};
  const auto kernel = softmax_kept_kernel<T, kIsWide>;
  const auto launch = [&](int64_t blocks, int64_t bytes) {
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), bytes, queue.stream>>>(a);
    return launched();
  };
  if (packs_each <= kHeld) return launch(num_blocks(a.num_rows, 1), 0);

  constexpr int64_t kStaticBytes = 1024;  // and what the system takes
  const int64_t bytes = (packs_each - kHeld) * threads * static_cast<int64_t>(sizeof(uint4));
  int device = 0, most_bytes = 0, num_processors = 0;
  CudaStatus status = status_of(cudaGetDevice(&device));
  if (status.code == 0)
    status = status_of(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (status.code == 0)
    status = status_of(cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device));
  most_bytes -= kStaticBytes;
  *fits = bytes <= most_bytes;
  if (status.code != 0 || !*fits) return status;
  // The same in every thread of the host, whatever it launches.
  status = status_of(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes));
  if (status.code != 0) return status;
  // As many blocks as are resident: their warps go on to the next row one by one, while others still write.
  return launch(std::min(a.num_rows, num_processors * (kKeptThreads / threads)), bytes);
}

template <class T>
CudaStatus softmax_as(const SoftmaxArgs& a, const CudaQueue& queue) {
  const unsigned blocks = num_blocks(a.num_rows, kWarpThreads / kWarp);
  if (a.num_cols <= kShortColumns) {
    softmax_warp_kernel<T, kShortColumns / kWarp><<<blocks, kWarpThreads, 0, queue.stream>>>(a);
    return launched();
  }
  if (a.num_cols <= kMostColumns<T>) {
    softmax_warp_kernel<T, kMostColumns<T> / kWarp><<<blocks, kWarpThreads, 0, queue.stream>>>(a);
    return launched();
  }
  const bool all_wide = rows_are_wide<T>(a.x, a.x_stride, a.num_rows) && rows_are_wide<T>(a.y, a.num_cols, a.num_rows);
  if constexpr (sizeof(T) <= sizeof(float)) {
    bool fits = false;
    const CudaStatus status =
        all_wide ? softmax_kept<T, true>(a, queue, &fits) : softmax_kept<T, false>(a, queue, &fits);
    if (fits || status.code != 0) return status;
  }
  return all_wide ? softmax_block<T, true>(a, queue) : softmax_block<T, false>(a, queue);
}

template <class T>
CudaStatus softmax_backward_as(const SoftmaxBackwardArgs& a, const CudaQueue& queue) {
  const unsigned warp_blocks = num_blocks(a.num_rows, kWarpThreads / kWarp);
  const unsigned row_blocks = num_blocks(a.num_rows, 1);
  if (a.num_cols <= kShortColumns) {
    softmax_backward_warp_kernel<T, kShortColumns / kWarp><<<warp_blocks, kWarpThreads, 0, queue.stream>>>(a);
  } else if (a.num_cols <= kMostColumns<T>) {
    softmax_backward_warp_kernel<T, kMostColumns<T> / kWarp><<<warp_blocks, kWarpThreads, 0, queue.stream>>>(a);
  } else if (rows_are_wide<T>(a.y, a.num_cols, a.num_rows) && rows_are_wide<T>(a.grad_x, a.num_cols, a.num_rows)) {
    softmax_backward_block_kernel<T, true><<<row_blocks, kBlockThreads, 0, queue.stream>>>(a);
  } else {
    softmax_backward_block_kernel<T, false><<<row_blocks, kBlockThreads, 0, queue.stream>>>(a);
  }
  return launched();
}

}  // namespace

CudaStatus softmax(const SoftmaxArgs& a, const CudaQueue& queue) {
  CudaStatus status;
  if (a.num_rows == 0 || a.num_cols == 0) return status;
  dispatch_float(a.dtype, [&](auto sample) { status = softmax_as<decltype(sample)>(a, queue); });
  return status;
}

CudaStatus softmax_backward(const SoftmaxBackwardArgs& a, const CudaQueue& queue) {
  CudaStatus status;
  if (a.num_rows == 0 || a.num_cols == 0) return status;
  dispatch_float(a.dtype, [&](auto sample) { status = softmax_backward_as<decltype(sample)>(a, queue); });
  return status;
}

}  // namespace cuda
}  // namespace fastmoe_route
