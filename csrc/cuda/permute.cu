// permute, unpermute and their backward on CUDA.
//
// Who owns what. permute: a warp owns a token's chunk of columns, reads it once into registers and writes it to the K
// rows of the token. unpermute: a block owns a token, and a lane sums a pack of its K rows in slot order, a gather: no
// scatter, no atomics. backward: a warp owns a slot, its row of the gradient and its weight's gradient; the up to 8
// slots of a block are neighbours, so grad_y comes from the first-level cache after its first read. The padding rows
// are the work of further warps of the same launch, 32 rows at a time.
//
// Why. Token-major reads every source row once, row-major K times. permute has a chunk per warp, rather than a token,
// which fills the device at T = 1 too.
//
// The maps of a plan are device data and are not checked by the host, so a kernel acts on a (slot, row) pair only if
// slot_to_row[slot] == row and row_to_slot[row] == slot, both in range; unpermute, which only reads, asks for a row in
// range. So every row of a result is written exactly once whatever the maps hold.
//
// Bytes: permute T H + R H, unpermute K T H + T H, backward T H + 2 R H, times the element size, and the maps. Accesses
// are 16 bytes wide where addresses and strides allow it, else one element (permute: the widest word that fits);
// the order in which a weight's gradient is summed follows that width, all else is the same bits.
#include <type_traits>

#include "cuda/maps.cuh"
#include "ops/permute.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerLane = 4;  // loads in flight at once
constexpr int kChunkWords = kWarp * kWordsPerLane;

// Zeroes words [begin, end) of the padding rows among rows [first, first + 32). All lanes.
template <class Word>
__device__ void zero_padding(const Maps& maps, Word* rows, int64_t row_words, int64_t first, int64_t begin,
                             int64_t end) {
  const int64_t own = first + lane_index();
  unsigned padding = __ballot_sync(kAllLanes, own < maps.num_rows && maps.slot_of(own) < 0);
  for (; padding != 0; padding &= padding - 1) {
    Word* row = rows + (first + __ffs(padding) - 1) * row_words;
    for (int64_t i = begin + lane_index(); i < end; i += kWarp) row[i] = Word{};
  }
}

// x [T, row_words] with x_stride, rows [R, row_words]: both in words.
template <class Word>
__global__ void __launch_bounds__(kThreads) permute_kernel(Maps maps, int64_t num_tokens, int64_t top_k, const Word* x,
                                                           int64_t x_stride, Word* rows, int64_t row_words) {
  const int64_t num_chunks = (row_words + kChunkWords - 1) / kChunkWords;
  const int64_t num_owners = num_tokens + (maps.num_rows + kWarp - 1) / kWarp;  // tokens, then rows by the 32
  for (int64_t item = grid_warp(); item < num_owners * num_chunks; item += grid_warps()) {
    const int64_t owner = item / num_chunks;
    const int64_t begin = item % num_chunks * kChunkWords;
    const int64_t end = begin + kChunkWords < row_words ? begin + kChunkWords : row_words;
    if (owner >= num_tokens) {
      zero_padding(maps, rows, row_words, (owner - num_tokens) * kWarp, begin, end);
      continue;
    }
    const Word* source = x + owner * x_stride;
    Word words[kWordsPerLane];
#pragma unroll
    for (int u = 0; u < kWordsPerLane; ++u) {
      const int64_t i = begin + u * kWarp + lane_index();
      words[u] = i < end ? source[i] : Word{};
    }
    for (int64_t slot = owner * top_k; slot < (owner + 1) * top_k; ++slot) {
      const int64_t row = maps.row_of(slot);
      if (row < 0) continue;
      Word* result = rows + row * row_words;
#pragma unroll
      for (int u = 0; u < kWordsPerLane; ++u) {
        const int64_t i = begin + u * kWarp + lane_index();
        if (i < end) result[i] = words[u];
      }
    }
  }
}

// Blocks a multiprocessor holds: without this bound ptxas goes for more and spills.
template <class T, int N>
constexpr int kUnpermuteBlocks = std::is_same_v<T, BFloat16> || N == 1 ? 4 : 3;

// A block owns a token, a warp of it every so many chunks. Rows and weights of the token's slots come by one load of
// the warp, 32 slots at a time, and go around by shuffles. A slot without a row adds 0 * 0, which changes no sum.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kUnpermuteBlocks<T, N>) unpermute_kernel(UnpermuteArgs a) {
  using Float = accumulate_t<T>;
  constexpr int kRowsAtOnce = 4;
  const int64_t row_packs = a.hidden / N;
  const int64_t rows_stride = a.rows_stride / N;
  for (int64_t token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
    for (int64_t pack = threadIdx.x; pack - lane_index() < row_packs; pack += blockDim.x) {  // by whole warps
      const Pack<T, N>* const rows = static_cast<const Pack<T, N>*>(a.rows) + pack;
      Float sum[N] = {};
      for (int64_t first = 0; first < a.top_k; first += kWarp) {
        const int64_t choice = first + lane_index(), slot = token * a.top_k + choice;
        int32_t own_row = choice < a.top_k ? a.slot_to_row[slot] : -1;
        if (own_row >= a.num_rows) own_row = -1;
        Float own_weight = 0;
        if (own_row >= 0)
          own_weight = a.weights != nullptr ? load_as<Float>(a.weights, a.weights_dtype, slot) : Float{1};
        const int count = static_cast<int>(a.top_k - first < kWarp ? a.top_k - first : kWarp);
        for (int j = 0; j < count; j += kRowsAtOnce) {
          Pack<T, N> values[kRowsAtOnce];
#pragma unroll
          for (int u = 0; u < kRowsAtOnce; ++u) {
            const int32_t row = __shfl_sync(kAllLanes, own_row, j + u);
            values[u] = row >= 0 && pack < row_packs ? rows[row * rows_stride] : Pack<T, N>{};
          }
#pragma unroll
          for (int u = 0; u < kRowsAtOnce; ++u) {
            const Float weight = __shfl_sync(kAllLanes, own_weight, j + u);
#pragma unroll
            for (int n = 0; n < N; ++n) sum[n] = fma(weight, widen(values[u].values[n]), sum[n]);
          }
        }
      }
      if (pack >= row_packs) continue;
      Pack<T, N> result;
#pragma unroll
      for (int n = 0; n < N; ++n) result.values[n] = narrow<T>(sum[n]);
      store_pack(static_cast<T*>(a.y) + token * a.hidden + pack * N, result);
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) unpermute_backward_kernel(UnpermuteBackwardArgs a, Maps maps) {
  using Float = accumulate_t<T>;
  const int64_t row_packs = a.hidden / N;
  const T* grad_y = static_cast<const T*>(a.grad_y);
  const T* rows = static_cast<const T*>(a.rows);
  T* grad_rows = static_cast<T*>(a.grad_rows);
  const int64_t num_groups = a.grad_rows != nullptr ? (a.num_rows + kWarp - 1) / kWarp : 0;
  for (int64_t item = grid_warp(); item < maps.num_slots + num_groups; item += grid_warps()) {
    if (item >= maps.num_slots) {
      const int64_t first = (item - maps.num_slots) * kWarp;
      zero_padding(maps, reinterpret_cast<Pack<T, N>*>(grad_rows), row_packs, first, 0, row_packs);
      continue;
    }
    const int64_t row = maps.row_of(item);
    Float product = 0;
    if (row >= 0) {
      const Float weight = a.weights != nullptr ? load_as<Float>(a.weights, a.weights_dtype, item) : Float{1};
      const T* grad = grad_y + item / a.top_k * a.grad_y_stride;
#pragma unroll 4
      for (int64_t pack = lane_index(); pack < row_packs; pack += kWarp) {
        const Pack<T, N> g = *reinterpret_cast<const Pack<T, N>*>(grad + pack * N);
        if (a.grad_weights != nullptr) {
          const Pack<T, N> y = *reinterpret_cast<const Pack<T, N>*>(rows + row * a.rows_stride + pack * N);
#pragma unroll
          for (int n = 0; n < N; ++n) product = fma(widen(g.values[n]), widen(y.values[n]), product);
        }
        if (grad_rows != nullptr) {
          Pack<T, N> result;
#pragma unroll
          for (int n = 0; n < N; ++n) result.values[n] = narrow<T>(widen(g.values[n]) * weight);
          store_pack(grad_rows + row * a.hidden + pack * N, result);
        }
      }
      product = warp_sum(product);
    }
    if (a.grad_weights != nullptr && lane_index() == 0) store_as(a.grad_weights, a.weights_dtype, item, product);
  }
}

template <class Word>
CudaStatus permute_as(const PermuteArgs& a, const CudaQueue& queue) {
  const int64_t size = element_size(a.dtype);
  const int64_t row_words = a.hidden * size / static_cast<int64_t>(sizeof(Word));
  const int64_t x_stride = a.x_stride * size / static_cast<int64_t>(sizeof(Word));
  const Maps maps{a.row_to_slot, a.slot_to_row, a.num_rows, a.num_tokens * a.top_k};
  const int64_t owners = a.num_tokens + ceil_div(a.num_rows, kWarp);
  const unsigned blocks = num_blocks(owners * ceil_div(row_words, kChunkWords), kThreads / kWarp);
  permute_kernel<Word><<<blocks, kThreads, 0, queue.stream>>>(
      maps, a.num_tokens, a.top_k, static_cast<const Word*>(a.x), x_stride, static_cast<Word*>(a.rows), row_words);
  return launched();
}

template <class T, int N>
CudaStatus unpermute_as(const UnpermuteArgs& a, const CudaQueue& queue) {
  const int64_t threads = ceil_div(a.hidden / N, kWarp) * kWarp;
  unpermute_kernel<T, N><<<num_blocks(a.num_tokens, 1), static_cast<unsigned>(threads < kThreads ? threads : kThreads),
                           0, queue.stream>>>(a);
  return launched();
}

template <class T, int N>
CudaStatus unpermute_backward_as(const UnpermuteBackwardArgs& a, const CudaQueue& queue) {
  const Maps maps{a.row_to_slot, a.slot_to_row, a.num_rows, a.num_tokens * a.top_k};
  const int64_t items = maps.num_slots + (a.grad_rows != nullptr ? ceil_div(a.num_rows, kWarp) : 0);
  if (items == 0) return {};
  unpermute_backward_kernel<T, N><<<num_blocks(items, kThreads / kWarp), kThreads, 0, queue.stream>>>(a, maps);
  return launched();
}

}  // namespace

CudaStatus permute(const PermuteArgs& a, const CudaQueue& queue) {
  const auto fits = [&](int64_t bytes) {
    return are_multiples(bytes, {a.x, a.rows}, {a.hidden, a.num_tokens > 1 ? a.x_stride : 0}, element_size(a.dtype));
  };
  if (a.num_rows == 0 || a.hidden == 0) return {};
  if (fits(kWideBytes)) return permute_as<uint4>(a, queue);
  if (fits(8)) return permute_as<uint2>(a, queue);
  if (fits(4)) return permute_as<uint32_t>(a, queue);
  return permute_as<uint16_t>(a, queue);
}

CudaStatus unpermute(const UnpermuteArgs& a, const CudaQueue& queue) {
  if (a.num_tokens == 0 || a.hidden == 0) return {};
  const bool is_wide =
      are_multiples(kWideBytes, {a.rows, a.y}, {a.hidden, a.num_rows > 1 ? a.rows_stride : 0}, element_size(a.dtype));
  CudaStatus status;
  dispatch_float(a.dtype, [&](auto sample) {
    using T = decltype(sample);
    status = is_wide ? unpermute_as<T, kWideBytes / sizeof(T)>(a, queue) : unpermute_as<T, 1>(a, queue);
  });
  return status;
}

CudaStatus unpermute_backward(const UnpermuteBackwardArgs& a, const CudaQueue& queue) {
  const bool is_wide = are_multiples(
      kWideBytes, {a.grad_y, a.rows, a.grad_rows},
      {a.hidden, a.num_tokens > 1 ? a.grad_y_stride : 0, a.num_rows > 1 ? a.rows_stride : 0}, element_size(a.dtype));
  CudaStatus status;
  dispatch_float(a.dtype, [&](auto sample) {
    using T = decltype(sample);
    status =
        is_wide ? unpermute_backward_as<T, kWideBytes / sizeof(T)>(a, queue) : unpermute_backward_as<T, 1>(a, queue);
  });
  return status;
}

}  // namespace cuda
}  // namespace fastmoe_route
