// The products of sm_90a: tiles of 128 x 256 for two cooperating groups of warps, of 64 x 256 for two that take turns.
#pragma once

#include "cuda/gemm/native.cuh"

namespace fastmoe_route {
namespace cuda {

template <class Element, class LayoutA, class LayoutB>
using CooperativeProduct =
    NativeProduct<cutlass::arch::Sm90, Element, LayoutA, LayoutB, cute::Shape<cute::_128, cute::_256, cute::_64>,
                  cute::Shape<cute::_1, cute::_1, cute::_1>,
                  cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative,
                  cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>;

template <class Element, class LayoutA, class LayoutB>
using PingPongProduct =
    NativeProduct<cutlass::arch::Sm90, Element, LayoutA, LayoutB, cute::Shape<cute::_64, cute::_256, cute::_64>,
                  cute::Shape<cute::_1, cute::_1, cute::_1>,
                  cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong,
                  cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong>;

}  // namespace cuda
}  // namespace fastmoe_route
