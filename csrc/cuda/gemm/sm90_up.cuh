// UpProduct (up.h) in the instructions of sm_90a, and with it RowsProduct with a bias: rows are taken by index on their
// way to shared memory, products are those of warp groups (wgmma), and activations are another group's work.
//
// Who owns what. A persistent grid of one block a multiprocessor walks over tiles of 128 rows of one expert by 256
// columns of its weights, those of a gated layer in halves: 128 of the gate and the same 128 of up. Three warp groups:
//   producers  two warps copy rows of A, 16 bytes at a time, to where the swizzle of wgmma wants them; one thread has
//              the copy engine (TMA) bring the columns of B from a map of all weights. Both complete the same barrier
//              of a ring of stages.
//   finishers  two warps activate and store, while the consumers are at the next tile: each serves one of these.
//   consumers  two groups of 64 rows: wgmma of both operands from shared memory, 128 accumulators a thread; then
//              weight, bias and rounding, and what is the pre-activation goes to shared memory.
// Barriers (barrier.cuh), and the arrivals that complete a phase of each:
//   full          of a stage: every lane of the producers when its copies are there; besides, at once, lane 0 of each
//                 of their warps, which wrote of the tile, and of which one tells of the bytes of B
//   empty         of a stage: lane 0 of each consumer warp, when the warp's products have read it
//   staged_full   of a consumer warp: its lanes, each after its stores
//   staged_empty  of a consumer warp: the lanes of its finisher, each after its loads
// An arrival releases what its own lane did, and a wait acquires it. That is all of the order here: a lane that stored
// or loaded `staged` arrives itself. Between two arrivals at staged_full a lane waits for staged_empty, whose phase
// needs all lanes of the finisher, and those have waited for all of the phase before; likewise the other way round,
// and for the stages. So no phase takes an arrival of another, none is passed unseen, and its parity tells it from its
// neighbours. Where tiles leave consumer warps without rows, nothing bounds how far a finisher is behind the
// producers: of a tile it reads in shared memory only what lies with the staged rows.
//
// A row without a slot, or past the last, is not loaded: what its place in shared memory holds reaches that row of
// accumulators alone, which is not stored, or zeros are. A consumer without rows multiplies all the same: it was 5 to
// 9 % slower not to where experts have few rows (docs/gpu.md).
//
// The inner dimension is taken in order, 16 at a time, into accumulators that begin at zero: the bits of CUTLASS's
// kernels on the same rows.
// Bytes: x once per tile of columns, weights once per tile of rows, R I written, and R U where a gradient is needed.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "cuda/gemm/sm90_consumer.cuh"
#include "cuda/gemm/sm90_producer.cuh"

namespace fastmoe_route {
namespace cuda {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) sm90_up_kernel(const __grid_constant__ Sm90Call call) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      shared.full[i].init(C::kProducerWarps * (kWarp + 1));
      shared.empty[i].init(C::kConsumerWarps);
    }
    for (int i = 0; i < C::kConsumerWarps; ++i) {
      shared.staged_full[i].init(kWarp);
      shared.staged_empty[i].init(kWarp);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int group = cutlass::canonical_warp_group_idx(), warp = cutlass::canonical_warp_idx_sync();
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    if (warp < C::kProducerWarps) Sm90Producer<C>{call, shared}.run();
    else Sm90Finisher<C>{call, shared, warp - C::kProducerWarps}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    Sm90Consumer<C>{call, shared, group - 1}.run();
  }
}

// The map of B whose boxes copy_columns asks for.
template <class C>
TensorBoxes sm90_boxes(const UpProduct& p) {
  const ExpertRows& rows = p.rows;
  constexpr int64_t kSize = sizeof(typename C::T);
  TensorBoxes boxes{p.dtype, p.b, {}, {}, {1, 1, 1, 1}};
  boxes.sizes[3] = static_cast<cuuint64_t>(rows.groups.num_groups);
  boxes.strides[2] = static_cast<cuuint64_t>(p.b_group_stride * kSize);
  const int64_t columns = rows.intermediate, halves = rows.is_gated ? 2 : 1;
  if (C::kBIsColumnMajor) {
    const int64_t line = p.b_stride * kSize;
    const int64_t sizes[3] = {rows.hidden, rows.is_interleaved ? halves : columns,
                              rows.is_interleaved ? columns : halves};
    for (int i = 0; i < 3; ++i) boxes.sizes[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes.strides[0] = static_cast<cuuint64_t>(line);
    boxes.strides[1] = static_cast<cuuint64_t>(line * sizes[1]);
    boxes.box[0] = C::kInner;
    boxes.box[rows.is_interleaved ? 2 : 1] = C::kMapColumns;
    return boxes;
  }
  const bool is_split = rows.is_gated && !rows.is_interleaved;
  const int64_t sizes[3] = {is_split ? columns : rows.up_size, is_split ? 2 : 1, rows.hidden};
  for (int i = 0; i < 3; ++i) boxes.sizes[i] = static_cast<cuuint64_t>(sizes[i]);
  boxes.strides[0] = static_cast<cuuint64_t>(sizes[0] * kSize);
  boxes.strides[1] = static_cast<cuuint64_t>(p.b_stride * kSize);
  boxes.box[0] = C::kMapColumns;
  boxes.box[2] = C::kInner;
  return boxes;
}

template <class C>
CudaStatus sm90_up_with(const UpProduct& p, const CudaQueue& queue, bool* is_done) {
  *is_done = false;
  if (p.x_stride > INT32_MAX) return {};
  Sm90Call call{{}, p, static_cast<uint32_t>(p.x_stride * 2), 0, p.rows.is_gated ? C::kHalf : C::kColumns};
  call.col_tiles = ceil_div(p.rows.intermediate, call.tile_columns);
  CudaStatus status = map_tensor(sm90_boxes<C>(p), &call.b, is_done);
  if (status.code != 0 || !*is_done) return status;
  int device = 0, multiprocessors = 0;
  if (status = status_of(cudaGetDevice(&device)); status.code != 0) return status;
  status = status_of(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (status.code != 0) return status;
  const int64_t most_tiles = (p.rows.num_rows / C::kRows + p.rows.groups.num_groups) * call.col_tiles;
  constexpr int kBytes = static_cast<int>(sizeof(typename C::Shared));
  static_assert(kBytes <= 227 * 1024, "shared memory of a multiprocessor");
  status = status_of(cudaFuncSetAttribute(reinterpret_cast<const void*>(sm90_up_kernel<C>),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  if (status.code != 0) return status;
  const unsigned blocks = static_cast<unsigned>(most_tiles < multiprocessors ? most_tiles : multiprocessors);
  sm90_up_kernel<C><<<blocks, C::kThreads, kBytes, queue.stream>>>(call);
  return launched();
}

template <class Element>
CudaStatus sm90_up_as(const UpProduct& p, const CudaQueue& queue, bool* is_done) {
  return p.b_is_column_major ? sm90_up_with<Sm90Up<Element, true>>(p, queue, is_done)
                             : sm90_up_with<Sm90Up<Element, false>>(p, queue, is_done);
}

// Rows as they lie, and no activation.
template <class Element>
CudaStatus sm90_rows_as(const RowsProduct& p, const CudaQueue& queue, bool* is_done) {
  UpProduct up{};
  up.dtype = p.dtype;
  up.rows.groups = p.groups;
  up.rows.num_rows = p.num_rows;
  up.rows.hidden = p.in;
  up.rows.intermediate = up.rows.up_size = p.out;
  up.top_k = 1;
  up.x = p.a;
  up.x_stride = p.a_stride;
  up.b = p.b;
  up.b_group_stride = p.b_group_stride;
  up.b_stride = p.b_stride;
  up.b_is_column_major = p.b_is_column_major;
  up.bias = p.bias;
  up.preactivation = p.d;
  return sm90_up_as<Element>(up, queue, is_done);
}

}  // namespace cuda
}  // namespace fastmoe_route
