// A grouped product of CUTLASS 3 out of its parts: architecture, schedule, tile, cluster, layouts. Those of sm_90a ran
// on an H200 (docs/gpu.md), those of sm_100a were compiled only.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/half.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/gemm/native.h"

namespace fastmoe_route {
namespace cuda {

template <class Arch, class Element, class LayoutA, class LayoutB, class Tile, class Cluster, class MainSchedule,
          class EpilogueSchedule>
struct NativeProduct {
  using Class = cutlass::arch::OpClassTensorOp;
  using Row = cutlass::layout::RowMajor;
  using Shape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  static constexpr int kWide = 16 / static_cast<int>(sizeof(Element));

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, Class, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row*, kWide,
      Element, Row*, kWide, EpilogueSchedule,
      cutlass::epilogue::fusion::LinearCombination<Element, float>>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, Class, Element, LayoutA*, kWide, Element, LayoutB*, kWide, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      MainSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape, Main, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // native_arrays writes strides as plain numbers and shapes as three of them.
  static_assert(sizeof(typename Kernel::InternalStrideA) == sizeof(int64_t), "one stride of a matrix is 1");
  static_assert(sizeof(typename Kernel::InternalStrideB) == sizeof(int64_t), "one stride of a matrix is 1");
  static_assert(sizeof(typename Kernel::InternalStrideD) == sizeof(int64_t), "one stride of a matrix is 1");
  static_assert(sizeof(typename Shape::UnderlyingProblemShape) == 3 * sizeof(int32_t), "M, N, K");

  static CudaStatus run(const NativeArrays& arrays, const CudaQueue& queue) {
    cutlass::KernelHardwareInfo hardware;
    CudaStatus status = status_of(cudaGetDevice(&hardware.device_id));
    if (status.code != 0) return status;
    status = status_of(cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount, hardware.device_id));
    if (status.code != 0) return status;
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape = {arrays.num_groups,
                               reinterpret_cast<typename Shape::UnderlyingProblemShape*>(arrays.shapes), nullptr};
    arguments.mainloop.ptr_A = reinterpret_cast<const Element**>(arrays.a);
    arguments.mainloop.dA = reinterpret_cast<typename Kernel::InternalStrideA*>(arrays.a_strides);
    arguments.mainloop.ptr_B = reinterpret_cast<const Element**>(arrays.b);
    arguments.mainloop.dB = reinterpret_cast<typename Kernel::InternalStrideB*>(arrays.b_strides);
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = 0.0f;
    arguments.epilogue.ptr_D = reinterpret_cast<Element**>(arrays.d);
    arguments.epilogue.dD = reinterpret_cast<typename Kernel::InternalStrideD*>(arrays.d_strides);
    arguments.hw_info = hardware;
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) {
      return not_supported("CUTLASS does not take this grouped product");
    }
    Gemm gemm;
    const size_t bytes = Gemm::get_workspace_size(arguments);
    void* const workspace = queue.scratch_of<char>(static_cast<int64_t>(bytes));
    cutlass::Status done = gemm.initialize(arguments, workspace, queue.stream);
    if (done == cutlass::Status::kSuccess) done = gemm.run(queue.stream);
    status = launched();
    if (status.code == 0 && done != cutlass::Status::kSuccess) status = not_supported(cutlassGetStatusString(done));
    return status;
  }
};

template <class Product, class Problem>
CudaStatus run_native(const Problem& problem, const CudaQueue& queue) {
  NativeArrays arrays;
  const CudaStatus status = native_arrays(problem, queue, &arrays);
  return status.code != 0 ? status : Product::run(arrays, queue);
}

template <template <class, class, class> class Product, class Element>
CudaStatus native_rows(const RowsProduct& product, const CudaQueue& queue) {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  return product.b_is_column_major ? run_native<Product<Element, Row, Column>>(product, queue)
                                   : run_native<Product<Element, Row, Row>>(product, queue);
}

template <template <class, class, class> class Product, class Element>
CudaStatus native_groups(const GroupsProduct& product, const CudaQueue& queue) {
  return run_native<Product<Element, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>>(product, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
