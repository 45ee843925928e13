// Kernels without a bug that look like the planted ones: the engine must run them without a report and with the result
// that test_planted.py works out. Every kernel takes: in [n] and table [n] read-only, out [n] and scratch [n]
// undefined.
#include "tests/matrix_product.cuh"

#include <cstdint>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

#define KERNEL extern "C" __global__ void

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from, int source_bytes = kBytes) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
               "n"(kBytes), "r"(source_bytes)
               : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- Barriers.

KERNEL reverse(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  values[t] = in[t];
  __syncthreads();
  out[t] = values[127 - t];
}

KERNEL reuse(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    values[t] = in[t] + i;
    __syncthreads();
    sum += values[127 - t];
    __syncthreads();
  }
  out[t] = sum;
}

KERNEL double_buffer(const int* in, const int*, int* out, int*, int) {
  __shared__ int stage[2][128];
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 5; ++i) {
    stage[i % 2][t] = in[t] + i;
    __syncthreads();  // one barrier a round is enough for two buffers
    sum += stage[i % 2][127 - t];
  }
  out[t] = sum;
}

KERNEL tree(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  values[t] = in[t];
  __syncthreads();
  for (int half = 64; half > 0; half /= 2) {
    if (t < half) values[t] += values[t + half];
    __syncthreads();
  }
  out[t] = values[0];
}

KERNEL tree_of_a_warp(const int* in, const int*, int* out, int*, int) {
  __shared__ volatile int values[32];
  const int t = threadIdx.x;
  values[t] = in[t];
  __syncwarp();
  for (int half = 16; half > 0; half /= 2) {
    const int other = t < half ? values[t + half] : 0;
    __syncwarp();
    if (t < half) values[t] = values[t] + other;
    __syncwarp();
  }
  out[t] = values[0];
}

KERNEL block_votes(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  const int count = __syncthreads_count(in[t] % 3 == 0);
  const int any = __syncthreads_or(in[t] == 77);
  const int all = __syncthreads_and(in[t] >= 0);
  out[t] = count * 4 + (any != 0) * 2 + (all != 0);
}

// Warp 0 fills, warps 1 to 3 read: two named barriers hand the buffer back and forth.
KERNEL producer_and_consumers(const int* in, const int*, int* out, int*, int) {
  __shared__ int value[32];
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    if (t < 32) {
      if (i > 0) asm volatile("bar.sync 2, 128;" ::: "memory");
      value[t] = in[t] + i;
      asm volatile("bar.arrive 1, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      sum += value[t % 32];
      if (i < 3) asm volatile("bar.arrive 2, 128;" ::: "memory");
    }
  }
  out[t] = sum;
}

KERNEL warps_leave_early(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  if (t >= 64) {
    out[t] = -1;
    return;
  }
  out[t] = __shfl_xor_sync(0xffffffffu, in[t], 1);
}

KERNEL lanes_leave_early(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  out[t] = 0;
  if (t % 32 >= 20) return;
  const unsigned here = __activemask();
  out[t] = __reduce_add_sync(here, in[t]);
}

// ---- Warps.

KERNEL warp_sums(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  int value = in[t];
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  out[t] = value;
}

KERNEL scan_of_half_warps(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  int value = in[t];
  for (int d = 1; d < 16; d *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, d, 16);
    if (t % 16 >= d) value += other;
  }
  out[t] = value;
}

KERNEL branches_with_own_masks(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  const unsigned odd = __ballot_sync(0xffffffffu, in[t] & 1);
  int value = 0;
  if (in[t] & 1) {
    value = __reduce_max_sync(odd, in[t]);
  } else {
    value = -__reduce_add_sync(~odd, in[t]);
  }
  __syncwarp();
  out[t] = value;
}

KERNEL groups_by_match(const int* in, const int*, int* out, int*, int) {
  __shared__ int leader_of[4][32];
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  const unsigned peers = __match_any_sync(0xffffffffu, in[t] % 5);
  const int first = __ffs(peers) - 1;
  if (lane == first) leader_of[warp][first] = in[t];
  __syncwarp(peers);
  out[t] = leader_of[warp][first] * 100 + __popc(peers);
}

KERNEL uneven_loops(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < in[t] % 7; ++i) sum += in[(t + i) % 128];
  __syncwarp();
  out[t] = sum + __shfl_xor_sync(0xffffffffu, sum, 3);
}

KERNEL same_value_by_all_lanes(const int*, const int*, int* out, int*, int) {
  __shared__ int flag;
  flag = 5;  // one warp, one instruction, one value
  __syncwarp();
  out[threadIdx.x] = flag;
}

// ---- Memory.

KERNEL bytes_of_a_word(const int* in, const int*, int* out, int*, int) {
  __shared__ uint8_t bytes[128];
  __shared__ uint16_t halves[128];
  const int t = threadIdx.x;
  bytes[t] = static_cast<uint8_t>(in[t]);
  halves[t] = static_cast<uint16_t>(in[t] * 3);
  __syncthreads();
  out[t] = bytes[127 - t] + halves[t ^ 1];
}

KERNEL bytes_of_a_word_in_global(const int* in, const int*, int* out, int* scratch, int) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  bytes[t] = static_cast<uint8_t>(in[t]);
  out[t] = bytes[t] + 1;
}

KERNEL undefined_but_unused(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  if (t < 100) values[t] = in[t];
  __syncthreads();
  const int value = values[t];  // undefined from 100 on, and only chosen below that
  out[t] = t < 100 ? value : 7;
}

KERNEL padding_through_shared(const int* in, const int*, int* out, int*, int) {
  struct Pair {
    uint8_t small;
    int wide;
  };
  __shared__ Pair pairs[128];
  const int t = threadIdx.x;
  pairs[t].small = static_cast<uint8_t>(in[t]);
  pairs[t].wide = in[t] * 2;
  __syncthreads();
  const Pair other = pairs[127 - t];
  out[t] = other.small + other.wide;
}

KERNEL local_array(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  int values[9];
  for (int i = 0; i < 9; ++i) values[i] = in[(t + i) % 128];
  out[t] = values[in[t] % 9] + values[in[t ^ 1] % 9];
}

KERNEL vectors(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  if (t >= 32) {
    out[128 + t - 32] = 0;
    return;
  }
  int4 four = reinterpret_cast<const int4*>(in)[t];
  four.x += four.w;
  reinterpret_cast<int4*>(out)[t] = four;
}

KERNEL dynamic_shared(const int* in, const int*, int* out, int*, int) {
  extern __shared__ int dynamic[];
  const int t = threadIdx.x;
  dynamic[t] = in[t];
  __syncthreads();
  out[t] = dynamic[(t + 1) % 128];
}

KERNEL cached_reads(const int* in, const int* table, int* out, int*, int) {
  const int t = threadIdx.x;
  out[t] = __ldg(table + __ldg(in + t) % 128);
}

// ---- Blocks.

KERNEL shared_histogram(const int* in, const int*, int* out, int*, int) {
  __shared__ int counts[8];
  const int t = threadIdx.x;
  if (t < 8) counts[t] = 0;
  __syncthreads();
  atomicAdd(&counts[in[t] & 7], 1);
  __syncthreads();
  out[t] = counts[t & 7];
}

__device__ int totals[8];
__device__ unsigned ticket;
__device__ unsigned finished;

// Counts of all blocks by atomics; the last block to finish hands them out and clears them.
KERNEL last_block(const int* in, const int*, int* out, int* scratch, int) {
  __shared__ bool is_last;
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  scratch[i] = in[i] * 2;
  __syncthreads();
  if (t == 0) {
    __threadfence();
    is_last = atomicAdd(&ticket, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  for (unsigned at = t; at < gridDim.x * blockDim.x; at += blockDim.x) out[at] = scratch[at ^ 1];
  if (t == 0) ticket = 0;
}

// The same with a fence in every thread before the barrier.
KERNEL last_block_all_fence(const int* in, const int*, int* out, int* scratch, int) {
  __shared__ bool is_last;
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  scratch[i] = in[i] * 2;
  __threadfence();
  __syncthreads();
  if (t == 0) is_last = atomicInc(&finished, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (unsigned at = t; at < gridDim.x * blockDim.x; at += blockDim.x) out[at] = scratch[at ^ 1];
}

__device__ int sums[64];
__device__ int flags[64];

// Every block waits for the one before it. Blocks with lower numbers may start later.
KERNEL chained_sums(const int* in, const int*, int* out, int*, int) {
  __shared__ int before;
  const int t = threadIdx.x, b = blockIdx.x;
  if (t == 0) {
    int sum = 0;
    if (b > 0) {
      while (*reinterpret_cast<volatile int*>(flags + b - 1) == 0) {
      }
      __threadfence();
      sum = sums[b - 1];
    }
    before = sum;
    sums[b] = sum + in[b];
    __threadfence();
    *reinterpret_cast<volatile int*>(flags + b) = 1;
  }
  __syncthreads();
  out[b * blockDim.x + t] = before;
}
KERNEL clear_chain(const int*, const int*, int* out, int*, int) {
  if (threadIdx.x < 64) flags[threadIdx.x] = 0;
  out[threadIdx.x] = 0;
}

KERNEL order_of_atomics(const int* in, const int*, int* out, int* scratch, int) {
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    out[t] = atomicMax(totals, 0) < 0;
  } else {
    atomicMax(totals, in[t]);
    out[blockIdx.x * blockDim.x + t] = 1;
  }
  (void)scratch;
}

// ---- Asynchronous copies and matrices.

KERNEL async_copies(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  copy_async<4>(values + t, in + t);
  commit();
  wait<0>();
  __syncthreads();
  out[t] = values[127 - t];
}

KERNEL async_pipeline(const int* in, const int*, int* out, int*, int) {
  __shared__ int stage[3][128];
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    copy_async<4>(&stage[i][t], in + (t + i) % 128);
    commit();
  }
  int sum = 0;
  for (int i = 0; i < 6; ++i) {
    wait<1>();
    __syncthreads();
    sum += stage[i % 3][127 - t];
    if (i + 2 < 6) copy_async<4>(&stage[(i + 2) % 3][t], in + (t + i + 2) % 128);
    commit();  // an empty group counts as well
  }
  out[t] = sum;
}

KERNEL async_zero_fill(const int* in, const int*, int* out, int*, int n) {
  __shared__ __align__(16) int values[128];
  const int t = threadIdx.x;
  if (t < 32) {
    const int left = n - 140 - 4 * t;  // what is past it is not read and becomes zero
    copy_async<16>(values + 4 * t, left > 0 ? in + 4 * t : in, left <= 0 ? 0 : left >= 4 ? 16 : 4 * left);
    commit();
    wait<0>();
  }
  __syncthreads();
  out[t] = values[t];
}

KERNEL matrix_product(const int* in, const int*, int* out, int*, int) { matrix_product_of_a_warp<false>(in, out); }

// ---- CUB.

KERNEL cub_sorted(const int* in, const int*, int* out, int*, int) {
  using Sort = cub::BlockRadixSort<int, 64, 2>;
  __shared__ typename Sort::TempStorage storage;
  const int t = threadIdx.x;
  int keys[2] = {in[2 * t], in[2 * t + 1]};
  Sort(storage).Sort(keys);
  out[2 * t] = keys[0];
  out[2 * t + 1] = keys[1];
}

KERNEL cub_scanned(const int* in, const int*, int* out, int*, int) {
  using Scan = cub::BlockScan<int, 128>;
  __shared__ typename Scan::TempStorage storage;
  int sum = 0;
  Scan(storage).ExclusiveSum(in[threadIdx.x], sum);
  out[threadIdx.x] = sum;
}
