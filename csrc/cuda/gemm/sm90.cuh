// The products of sm_90a: tiles of 128 x 256 for two cooperating groups of warps, and of 128 x 128 for two that take
// turns, in clusters of two that share an operand: rows_product the rows (1 x 2), groups_product the columns (2 x 1).
#pragma once

#include "cuda/gemm/native.cuh"

namespace fastmoe_route {
namespace cuda {

template <class Element, class LayoutA, class LayoutB, class Cluster>
using CooperativeProduct =
    NativeProduct<cutlass::arch::Sm90, Element, LayoutA, LayoutB, cute::Shape<cute::_128, cute::_256, cute::_64>,
                  Cluster, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative,
                  cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>;
template <class Element, class LayoutA, class LayoutB, class Cluster>
using PingPongProduct =
    NativeProduct<cutlass::arch::Sm90, Element, LayoutA, LayoutB, cute::Shape<cute::_128, cute::_128, cute::_64>,
                  Cluster, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong,
                  cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong>;

using OneBlock = cute::Shape<cute::_1, cute::_1, cute::_1>;
using OneByTwo = cute::Shape<cute::_1, cute::_2, cute::_1>;
using TwoByOne = cute::Shape<cute::_2, cute::_1, cute::_1>;

template <class Element, class LayoutA, class LayoutB>
using CooperativeRows = CooperativeProduct<Element, LayoutA, LayoutB, OneBlock>;
template <class Element, class LayoutA, class LayoutB>
using PingPongRows = PingPongProduct<Element, LayoutA, LayoutB, OneByTwo>;
template <class Element, class LayoutA, class LayoutB>
using CooperativeGroups = CooperativeProduct<Element, LayoutA, LayoutB, TwoByOne>;
template <class Element, class LayoutA, class LayoutB>
using PingPongGroups = PingPongProduct<Element, LayoutA, LayoutB, TwoByOne>;

}  // namespace cuda
}  // namespace fastmoe_route
