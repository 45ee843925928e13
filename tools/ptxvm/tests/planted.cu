// Kernels with one bug each, on purpose. The engine must report every one of them, on every seed, as the kind and at
// the line that its mark names. Every kernel takes: in [n] and table [n] read-only, out [n] and scratch [n] undefined.
//
// A mark is a comment "BUG kind" on the line of the report; a race may be reported at either of two marked lines. A bug
// that breaks no rule has the mark "BUG wrong result": the control of its name without "_wrongly" says what is right.
#include "tests/matrix_product.cuh"

#include <cstdint>

#define KERNEL extern "C" __global__ void

__device__ inline void copy_async(int* to, const int* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from)
               : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- Barriers.

KERNEL missing_barrier(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  values[t] = in[t];         // BUG shared memory race
  out[t] = values[127 - t];  // BUG shared memory race; undefined value
}

KERNEL missing_barrier_before_reuse(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    values[t] = in[t] + i;  // BUG shared memory race
    __syncthreads();
    sum += values[127 - t];  // BUG shared memory race
  }
  out[t] = sum;
}

KERNEL missing_barrier_in_tree(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  values[t] = in[t];
  __syncthreads();
  for (int half = 64; half > 0; half /= 2) {
    if (t < half) values[t] += values[t + half];  // BUG shared memory race
    if (half > 32) __syncthreads();
  }
  if (t == 0) out[0] = values[0];
}

KERNEL stale_stage(const int* in, const int*, int* out, int*, int) {
  __shared__ int stage[2][128];
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    stage[i % 2][t] = in[t] + i;  // BUG shared memory race
    __syncthreads();
    sum += stage[(i + 1) % 2][127 - t];  // BUG undefined value; shared memory race
  }
  out[t] = sum;  // BUG undefined value
}

KERNEL divergent_barrier(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  if (in[t] % 2 == 0) {
    __syncthreads();  // BUG divergent barrier
  }
  out[t] = t;
}

KERNEL barrier_of_some_warps(const int*, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  if (t < 64) {
    __syncthreads();  // BUG deadlock; divergent barrier
  }
  out[t] = t;
}  // BUG divergent barrier

KERNEL barrier_after_return(const int* in, const int*, int* out, int*, int n) {
  const int t = threadIdx.x;
  if (t >= n - 200) return;
  __syncthreads();  // BUG divergent barrier
  out[t] = in[t];
}

KERNEL two_different_barriers(const int*, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  if (t < 32) {
    out[t] = 1;
    __syncthreads();  // BUG divergent barrier
  } else {
    out[t] = 2;
    __syncthreads();  // BUG divergent barrier
  }
}

KERNEL named_barrier_of_too_many(const int*, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  if (t < 32) asm volatile("bar.sync 1, 64;" ::: "memory");  // BUG deadlock
  out[t] = t;
}

// ---- Warps.

KERNEL missing_syncwarp(const int* in, const int*, int* out, int*, int) {
  __shared__ int value;
  const int t = threadIdx.x;
  if (t == 0) value = in[0];  // BUG shared memory race
  out[t] = value;             // BUG shared memory race; undefined value
}

KERNEL missing_second_syncwarp(const int* in, const int*, int* out, int*, int) {
  __shared__ int value;
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    if (t == i) value = in[i];  // BUG shared memory race
    __syncwarp();
    sum += value;  // BUG shared memory race
  }
  out[t] = sum;
}

KERNEL shuffle_for_a_barrier(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[32];
  const int t = threadIdx.x;
  values[t] = in[t];  // BUG shared memory race
  const int other = __shfl_xor_sync(0xffffffffu, t, 1);
  out[t] = values[other];  // BUG shared memory race
}

KERNEL syncwarp_of_half(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[32];
  const int t = threadIdx.x;
  values[t] = in[t];  // BUG shared memory race
  __syncwarp(t < 16 ? 0x0000ffffu : 0xffff0000u);
  out[t] = values[31 - t];  // BUG shared memory race
}

KERNEL shuffle_in_a_branch(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  int value = in[t];
  if (value > 7) value = __shfl_down_sync(0xffffffffu, value, 1);  // BUG collective
  out[t] = value;
}

KERNEL mask_without_caller(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  out[t] = __shfl_xor_sync(0x0000ffffu, in[t], 1);  // BUG collective
}

KERNEL shuffle_from_outside(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  if (t < 16) out[t] = __shfl_sync(0x0000ffffu, in[t], t + 16);  // BUG undefined value
}

KERNEL ballot_in_uneven_loop(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  unsigned all = 0;
  for (int i = 0; i < in[t] % 5; ++i) all |= __ballot_sync(0xffffffffu, in[i] > 3);  // BUG collective
  out[t] = static_cast<int>(all);
}

// ---- Memory.

KERNEL uninitialised_shared(const int*, const int*, int* out, int*, int) {
  __shared__ int values[64];
  const int t = threadIdx.x;
  if (t < 63) values[t] = t;
  __syncthreads();
  if (t < 64) out[t] = values[t];  // BUG undefined value
}

KERNEL uninitialised_scratch(const int*, const int*, int* out, int* scratch, int) {
  const int t = threadIdx.x;
  if (scratch[t] > 5) out[t] = 1;  // BUG undefined value
}

KERNEL uninitialised_counter(const int* in, const int*, int* out, int*, int) {
  __shared__ int counts[8];
  const int t = threadIdx.x;
  if (t < 7) counts[t] = 0;
  __syncthreads();
  atomicAdd(&counts[in[t] & 7], 1);  // BUG undefined value
  __syncthreads();
  if (t < 8) out[t] = counts[t];  // BUG undefined value
}

KERNEL uninitialised_address(const int* in, const int*, int* out, int* scratch, int) {
  const int t = threadIdx.x;
  out[t] = in[scratch[t] & 15];  // BUG undefined value
}

KERNEL read_past_end(const int* in, const int*, int* out, int*, int n) {
  const int t = threadIdx.x;
  out[t] = in[n - 127 + t];  // BUG out of bounds
}

KERNEL write_past_end(const int* in, const int*, int* out, int*, int) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  out[t] = in[0];  // BUG out of bounds
}

KERNEL id_without_guard(const int* in, const int* table, int* out, int*, int) {
  const int t = threadIdx.x;
  out[t] = table[in[t] - 1];  // BUG out of bounds
}

KERNEL before_null(const int*, const int*, int* out, int*, int n) {
  const int t = threadIdx.x;
  const long long* const none = reinterpret_cast<const long long*>(static_cast<unsigned long long>(n) - 256);  // null
  out[t] = static_cast<int>(none[-1]);  // BUG out of bounds
}

KERNEL before_shared_array(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  values[t - (in[0] & 1)] = t;  // BUG out of bounds
  __syncthreads();
  out[t] = values[t];
}

KERNEL into_next_shared_array(const int* in, const int*, int* out, int*, int) {
  __shared__ int first[33];
  __shared__ int second[64];
  const int t = threadIdx.x;
  if (t < 64) second[t] = t;
  __syncthreads();
  if (t < 32) first[t + (in[2] & 3)] = t;  // BUG out of bounds
  __syncthreads();
  if (t < 32) out[t] = first[t + 2] + second[t];
}

KERNEL past_dynamic_shared(const int* in, const int*, int* out, int*, int) {
  extern __shared__ int dynamic[];
  const int t = threadIdx.x;
  dynamic[t + 1] = in[t];  // BUG out of bounds
  __syncthreads();
  out[t] = dynamic[t + 1];
}

KERNEL misaligned_vector(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  const int4 four = *reinterpret_cast<const int4*>(in + t);  // BUG misaligned
  out[t] = four.x + four.w;
}

KERNEL write_to_input(const int* in, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  out[t] = in[t];
  const_cast<int*>(in)[t] = 0;  // BUG write to an input
}

KERNEL cached_read_of_written(const int*, const int*, int* out, int*, int) {
  const int t = threadIdx.x;
  out[t] = t;
  __syncthreads();
  out[t] = __ldg(out + (t ^ 1)) + 1;  // BUG read-only load; global memory race
}

// ---- Blocks.

KERNEL blocks_write_one_place(const int*, const int*, int* out, int*, int) {
  if (threadIdx.x == 0) out[0] = static_cast<int>(blockIdx.x);  // BUG global memory race
}

KERNEL block_reads_another(const int* in, const int*, int* out, int* scratch, int) {
  if (threadIdx.x == 0) scratch[blockIdx.x] = in[blockIdx.x];  // BUG global memory race
  if (threadIdx.x == 0)
    out[blockIdx.x] = scratch[(blockIdx.x + 1) % gridDim.x];  // BUG global memory race; undefined value
}

__device__ int tickets[8];
// A reported launch leaves its ticket as it is. (No KERNEL: it has no bug.)
extern "C" __global__ void clear_tickets() {
  if (threadIdx.x < 8) tickets[threadIdx.x] = 0;
}

template <bool kWriterFence, bool kReaderFence, bool kBarrier>
__device__ void last_block_sums(const int* in, int* out, int* scratch, int* ticket) {
  __shared__ bool is_last;
  const int t = threadIdx.x;
  scratch[blockIdx.x * blockDim.x + t] = in[t];  // BUG global memory race
  if (kWriterFence) __threadfence();
  if (kBarrier) __syncthreads();
  if (t == 0) {
    if (kWriterFence) __threadfence();
    is_last = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
    if (kReaderFence) __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  int sum = 0;
  for (unsigned i = t; i < gridDim.x * blockDim.x; i += blockDim.x) sum += scratch[i ^ 1];  // BUG global memory race
  out[t] = sum;
  if (t == 0) *ticket = 0;
}
KERNEL last_block_without_writer_fence(const int* in, const int*, int* out, int* scratch, int) {
  last_block_sums<false, true, true>(in, out, scratch, tickets);
}
KERNEL last_block_without_reader_fence(const int* in, const int*, int* out, int* scratch, int) {
  last_block_sums<true, false, true>(in, out, scratch, tickets + 1);
}
KERNEL last_block_without_barrier(const int* in, const int*, int* out, int* scratch, int) {
  last_block_sums<true, true, false>(in, out, scratch, tickets + 2);
}

KERNEL atomic_and_plain(const int*, const int*, int* out, int* scratch, int) {
  const int t = threadIdx.x;
  if (t == 0) scratch[0] = 0;        // BUG global memory race
  if (t > 0) atomicAdd(scratch, 1);  // BUG global memory race; undefined value
  __syncthreads();
  if (t == 0) out[0] = scratch[0];
}

KERNEL plain_flag(const int* in, const int*, int* out, int* scratch, int) {
  volatile int* flag = scratch;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    scratch[1] = in[0];  // BUG global memory race
    __threadfence();
    scratch[0] = 1;  // BUG global memory race
  }
  if (blockIdx.x == 1 && threadIdx.x == 0) {
    if (*flag == 1) out[0] = scratch[1];  // BUG global memory race; undefined value
  }
}

KERNEL waits_for_nobody(const int*, const int*, int* out, int* scratch, int) {
  if (threadIdx.x == 0) {
    *reinterpret_cast<volatile int*>(scratch) = 0;
    while (*reinterpret_cast<volatile int*>(scratch) == 0) {  // BUG livelock
    }
  }
  out[threadIdx.x] = 1;
}

// ---- Asynchronous copies.

KERNEL async_without_wait(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  copy_async(values + t, in + t);
  commit();
  out[t] = values[t];  // BUG asynchronous copy
}

KERNEL async_without_barrier(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  copy_async(values + t, in + t);
  commit();
  wait<0>();                // BUG asynchronous copy; shared memory race
  out[t] = values[t ^ 32];  // BUG asynchronous copy; shared memory race; undefined value
}

KERNEL async_waits_for_too_few(const int* in, const int*, int* out, int*, int) {
  __shared__ int stage[2][128];
  const int t = threadIdx.x;
  copy_async(&stage[0][t], in + t);
  commit();
  copy_async(&stage[1][t], in + t);
  commit();
  wait<1>();
  __syncthreads();
  out[t] = stage[1][127 - t];  // BUG asynchronous copy
}

KERNEL async_without_commit(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  copy_async(values + t, in + t);
  wait<0>();
  __syncthreads();
  out[t] = values[127 - t];  // BUG asynchronous copy
}

KERNEL async_into_buffer_in_use(const int* in, const int*, int* out, int*, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  copy_async(values + t, in + t);
  commit();
  wait<0>();
  __syncthreads();
  const int value = values[127 - t];  // BUG asynchronous copy; shared memory race
  copy_async(values + t, in + t);     // BUG shared memory race
  commit();
  wait<0>();
  __syncthreads();
  out[t] = value + values[t ^ 1];
}

KERNEL async_source_in_flight(const int* in, const int*, int* out, int* scratch, int) {
  __shared__ int values[128];
  const int t = threadIdx.x;
  scratch[t] = in[t];                         // BUG global memory race
  copy_async(values + t, scratch + (t ^ 1));  // BUG global memory race
  commit();
  wait<0>();
  __syncthreads();
  out[t] = values[t];
}

// ---- Inline PTX and matrices.

KERNEL matrix_address_of_wrong_row(const int* in, const int*, int* out, int*, int) {
  __shared__ __align__(16) int tile[32];
  const int t = threadIdx.x;
  tile[t] = in[t];
  __syncwarp();
  unsigned r = 0;
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(tile)) + (t & 7) * 20;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(at));  // BUG misaligned
  out[t] = static_cast<int>(r);
}

KERNEL matrix_past_its_tile(const int* in, const int*, int* out, int*, int) {
  __shared__ __align__(16) int tile[28];
  const int t = threadIdx.x;
  if (t < 28) tile[t] = in[t];
  __syncwarp();
  unsigned r = 0;
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(tile)) + (t & 7) * 16;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(at));  // BUG out of bounds
  out[t] = static_cast<int>(r);
}

KERNEL matrix_product_wrongly(const int* in, const int*, int* out, int*, int) {
  matrix_product_of_a_warp<true>(in, out);  // BUG wrong result
}
