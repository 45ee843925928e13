// The products of sm_100a: tiles of 128 x 256 of one multiprocessor's tensor memory.
#pragma once

#include "cuda/gemm/native.cuh"

namespace fastmoe_route {
namespace cuda {

template <class Element, class LayoutA, class LayoutB>
using TensorMemoryProduct =
    NativeProduct<cutlass::arch::Sm100, Element, LayoutA, LayoutB, cute::Shape<cute::_128, cute::_256, cute::_64>,
                  cute::Shape<cute::_1, cute::_1, cute::_1>, cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmSm100,
                  cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm>;

}  // namespace cuda
}  // namespace fastmoe_route
