// Grouped products around the threadblock collectives of CUTLASS 2.x for sm_80, which later GPUs run as well.
//
// Who owns what. A persistent grid: a block takes every gridDim.x-th tile, finds its group in device memory, runs the
// collective's main loop over the whole inner dimension and its epilogue. No host sync, no split of the inner
// dimension. Tiles of a group follow each other, row tiles first, so that blocks side by side share a tile of weights.
//
// Why not GemmGrouped. It wants arrays of pointers, sizes and strides that some kernel would have to write first; here
// they follow from two prefix sums. Its main loop also reads out of bounds where the inner size is 0 (the predicates of
// the residue tile are computed anew after it): here an empty group stores zeros without a main loop.
//
// bfloat16 and float16 run on tensor cores (16 x 8 x 16, float32 accumulators): 16-byte asynchronous copies in three
// stages where everything is a multiple of 16 bytes, else element by element through registers. float32 is real
// float32: fused multiply-adds, no tensor cores; accesses of 4 elements stand for the other float32, rounded to tf32
// and multiplied by tensor cores (16 x 8 x 8).
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/kernel/default_gemm.h>
#include <cutlass/half.h>

#include <type_traits>

#include "cuda/gemm/gemm.h"

namespace fastmoe_route {
namespace cuda {

constexpr int kBlocksPerMultiprocessor = 2;  // of the grid, and of the register budget

// Where ptxas would spill a few registers of the float32 loop to keep two blocks, one block keeps them all.
template <class C>
constexpr int blocks_by_registers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return std::is_same<typename C::Traits::Class, cutlass::arch::OpClassSimt>::value ? 1 : kBlocksPerMultiprocessor;
#else
  return kBlocksPerMultiprocessor;
#endif
}

struct TensorCoreTraits {
  using Class = cutlass::arch::OpClassTensorOp;
  using Block = cutlass::gemm::GemmShape<128, 128, 32>;
  using Warp = cutlass::gemm::GemmShape<64, 64, 32>;
  using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
  static constexpr int kWide = 8;
  static constexpr int kStages = 3;
  // Loads element by element take registers for their addresses: half as many columns.
  using NarrowBlock = cutlass::gemm::GemmShape<128, 64, 32>;
  using NarrowWarp = cutlass::gemm::GemmShape<64, 32, 32>;
};
struct Float32Traits {
  using Class = cutlass::arch::OpClassSimt;
  using Block = cutlass::gemm::GemmShape<128, 128, 8>;
  using Warp = cutlass::gemm::GemmShape<32, 64, 8>;
  using Instruction = cutlass::gemm::GemmShape<1, 1, 1>;
  static constexpr int kWide = 1;
  static constexpr int kStages = 2;
  using NarrowBlock = Block;
  using NarrowWarp = Warp;
};
struct Tf32Traits {
  using Class = cutlass::arch::OpClassTensorOp;
  using Block = cutlass::gemm::GemmShape<128, 128, 16>;
  using Warp = cutlass::gemm::GemmShape<64, 64, 16>;
  using Instruction = cutlass::gemm::GemmShape<16, 8, 8>;
  static constexpr int kWide = 4;
  static constexpr int kStages = 3;
  using NarrowBlock = Block;
  using NarrowWarp = Warp;
};
template <class Element, int kAccess>
struct ProductTraits : TensorCoreTraits {};
template <>
struct ProductTraits<float, 1> : Float32Traits {};
template <>
struct ProductTraits<float, 4> : Tf32Traits {};

// The collectives of CUTLASS for A [M, K] B [K, N] -> row-major D, `kAccess` elements an access of global memory.
template <class Element, class LayoutA, class LayoutB, int kAccess, class Chosen = ProductTraits<Element, kAccess>>
struct Collective {
  using Traits = Chosen;
  static constexpr bool kIsWide = kAccess == Traits::kWide;
  using Row = cutlass::layout::RowMajor;
  using Block = std::conditional_t<kIsWide, typename Traits::Block, typename Traits::NarrowBlock>;
  using Warp = std::conditional_t<kIsWide, typename Traits::Warp, typename Traits::NarrowWarp>;
  using Output = cutlass::epilogue::thread::LinearCombination<Element, kAccess, float, float>;
  using Gemm = typename cutlass::gemm::kernel::DefaultGemm<
      Element, LayoutA, kAccess, Element, LayoutB, kAccess, Element, Row, float, typename Traits::Class,
      cutlass::arch::Sm80, Block, Warp, typename Traits::Instruction, Output,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, kIsWide ? Traits::kStages : 2, false,
      cutlass::arch::OpMultiplyAdd>::GemmKernel;
  using Mma = typename Gemm::Mma;
  using Epilogue = typename Gemm::Epilogue;
  using IteratorA = typename Mma::IteratorA;
  using IteratorB = typename Mma::IteratorB;
  using IteratorD = typename Epilogue::OutputTileIterator;
  static constexpr int kThreads = Gemm::kThreadCount;
  static constexpr int kTileRows = Block::kM;
  static constexpr int kTileCols = Block::kN;
  static_assert(kTileRows == kProductTileRows, "group_rows counts tiles of this many rows");

  union Shared {
    typename Mma::SharedStorage main_loop;
    typename Epilogue::SharedStorage epilogue;
  };

  // What does not change from tile to tile.
  struct Params {
    typename IteratorA::Params a;
    typename IteratorB::Params b;
    typename IteratorD::Params bias;
    typename IteratorD::Params d;
    typename Output::Params output;

    Params(int64_t a_stride, int64_t b_stride, bool has_bias, int64_t d_stride)
        : a(LayoutA(a_stride)), b(LayoutB(b_stride)), bias(Row(0)), d(Row(d_stride)),
          output(1.0f, has_bias ? 1.0f : 0.0f) {}
  };

  // One tile of one product; the row of `bias` stands for all rows of a matrix. All threads of the block.
  __device__ static void run_tile(const Params& params, Shared& shared, cutlass::gemm::GemmCoord size, int row, int col,
                                  const Element* a, const Element* b, const Element* bias, Element* d) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = cutlass::canonical_warp_idx_sync();
    const int lane = thread % kWarp;
    typename Mma::FragmentC accumulators;
    accumulators.clear();
    __syncthreads();  // the epilogue of the tile before has read the memory they share
    if (size.k() > 0) {
      IteratorA from_a(params.a, const_cast<Element*>(a), {size.m(), size.k()}, thread, {row, 0});
      IteratorB from_b(params.b, const_cast<Element*>(b), {size.k(), size.n()}, thread, {0, col});
      Mma mma(shared.main_loop, thread, warp, lane);
      mma((size.k() + Mma::Shape::kK - 1) / Mma::Shape::kK, accumulators, from_a, from_b, accumulators);
    }
    IteratorD from_bias(params.bias, const_cast<Element*>(bias), size.mn(), thread, {row, col});
    IteratorD to_d(params.d, d, size.mn(), thread, {row, col});
    Epilogue epilogue(shared.epilogue, thread, warp, lane);
    epilogue(Output(params.output), to_d, accumulators, from_bias);  // begins with a barrier of the block
  }
};

// Calls visit(group, row_tile, col_tile) for this block's tiles, where every tile of rows has `col_tiles` of columns;
// the tiles of one group's rows come before its next tile of columns. All threads of the block.
template <class Visit>
__device__ inline void for_each_tile(const RowGroups& groups, int64_t col_tiles, const Visit& visit) {
  const int64_t num_tiles = groups.row_tiles[groups.num_groups] * col_tiles;
  int group = 0;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    group = find_group(groups, col_tiles, group, tile);
    const int first_tile = groups.row_tiles[group];
    const int row_tiles = groups.row_tiles[group + 1] - first_tile;
    const int64_t own = tile - first_tile * col_tiles;
    visit(group, static_cast<int>(own % row_tiles), static_cast<int>(own / row_tiles));
  }
}

// ---- d[r] = a[r] b[e] + bias[e].

template <class C>
struct RowsCall {
  typename C::Params params;
  RowsProduct p;
  int64_t col_tiles;
};

template <class Element, class C>
__global__ void __launch_bounds__(C::kThreads, blocks_by_registers<C>())
    rows_product_kernel(const __grid_constant__ RowsCall<C> call) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  const RowsProduct& p = call.p;
  const RowGroups& groups = p.groups;
  for_each_tile(groups, call.col_tiles, [&](int group, int row_tile, int col_tile) {
    const int64_t begin = groups.bounds[group];
    const int rows = static_cast<int>(groups.bounds[group + 1] - begin);
    C::run_tile(call.params, shared, {rows, static_cast<int>(p.out), static_cast<int>(p.in)}, row_tile * C::kTileRows,
                col_tile * C::kTileCols, static_cast<const Element*>(p.a) + begin * p.a_stride,
                static_cast<const Element*>(p.b) + group * p.b_group_stride,
                p.bias != nullptr ? static_cast<const Element*>(p.bias) + group * p.out : nullptr,
                static_cast<Element*>(p.d) + begin * p.out);
  });
  // Rows of no group.
  Element* const rest = static_cast<Element*>(p.d) + int64_t{groups.bounds[groups.num_groups]} * p.out;
  const int64_t rest_size = (p.num_rows - groups.bounds[groups.num_groups]) * p.out;
  const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rest_size; i += num_threads)
    rest[i] = Element(0);
}

// ---- d[e] = a^T b over the rows of e.

template <class C>
struct GroupsCall {
  typename C::Params params;
  GroupsProduct p;
  int64_t row_tiles;
  int64_t col_tiles;
};

template <class Element, class C>
__global__ void __launch_bounds__(C::kThreads, blocks_by_registers<C>())
    groups_product_kernel(const __grid_constant__ GroupsCall<C> call) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  const GroupsProduct& p = call.p;
  const int64_t group_tiles = call.row_tiles * call.col_tiles;
  for (int64_t tile = blockIdx.x; tile < p.groups.num_groups * group_tiles; tile += gridDim.x) {
    const int64_t group = tile / group_tiles, own = tile % group_tiles;
    const int64_t begin = p.groups.bounds[group];
    const int rows = static_cast<int>(p.groups.bounds[group + 1] - begin);
    C::run_tile(
        call.params, shared, {static_cast<int>(p.m), static_cast<int>(p.n), rows},
        static_cast<int>(own % call.row_tiles) * C::kTileRows, static_cast<int>(own / call.row_tiles) * C::kTileCols,
        static_cast<const Element*>(p.a) + begin * p.a_stride, static_cast<const Element*>(p.b) + begin * p.b_stride,
        nullptr, static_cast<Element*>(p.d) + group * p.m * p.n);
  }
}

// ---- Host.

// A grid that fills the device once, or less if there are fewer tiles.
inline CudaStatus persistent_blocks(int64_t num_tiles, unsigned* blocks) {
  int device = 0, multiprocessors = 0;
  CudaStatus status = status_of(cudaGetDevice(&device));
  if (status.code != 0) return status;
  status = status_of(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int64_t most = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  *blocks = static_cast<unsigned>(num_tiles < 1 ? 1 : num_tiles < most ? num_tiles : most);
  return status;
}

template <class C, class Call>
CudaStatus launch_persistent(void (*kernel)(Call), const Call& call, int64_t num_tiles, const CudaQueue& queue) {
  unsigned blocks = 0;
  CudaStatus status = persistent_blocks(num_tiles, &blocks);
  if (status.code != 0) return status;
  constexpr int kBytes = static_cast<int>(sizeof(typename C::Shared));
  if (kBytes > 48 * 1024) {
    status = status_of(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    if (status.code != 0) return status;
  }
  kernel<<<blocks, C::kThreads, kBytes, queue.stream>>>(call);
  return launched();
}

template <class Element, class LayoutB, int kAccess>
CudaStatus rows_product_with(const RowsProduct& p, const CudaQueue& queue) {
  using C = Collective<Element, cutlass::layout::RowMajor, LayoutB, kAccess>;
  const int64_t col_tiles = ceil_div(p.out, C::kTileCols);
  const RowsCall<C> call{typename C::Params(p.a_stride, p.b_stride, p.bias != nullptr, p.out), p, col_tiles};
  const int64_t most_tiles = (p.num_rows / C::kTileRows + p.groups.num_groups) * col_tiles;
  return launch_persistent<C>(rows_product_kernel<Element, C>, call, most_tiles, queue);
}

template <class Element, int kAccess>
CudaStatus rows_product_as(const RowsProduct& p, const CudaQueue& queue) {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  return p.b_is_column_major ? rows_product_with<Element, Column, kAccess>(p, queue)
                             : rows_product_with<Element, Row, kAccess>(p, queue);
}

template <class Element, int kAccess>
CudaStatus groups_product_as(const GroupsProduct& p, const CudaQueue& queue) {
  using C = Collective<Element, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor, kAccess>;
  const int64_t row_tiles = ceil_div(p.m, C::kTileRows), col_tiles = ceil_div(p.n, C::kTileCols);
  const GroupsCall<C> call{typename C::Params(p.a_stride, p.b_stride, false, p.n), p, row_tiles, col_tiles};
  return launch_persistent<C>(groups_product_kernel<Element, C>, call, p.groups.num_groups * row_tiles * col_tiles,
                              queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
