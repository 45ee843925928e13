// Tile iterators of CUTLASS 2.x whose lines lie elsewhere: rows of A taken by index, columns of B in another order.
//
// CUTLASS gathers by an index array in global memory, which it reads again at every access of the main loop. Here a
// thread looks up its few lines once a tile and keeps their distances in registers, 4 bytes a line; an access adds one
// multiply. A tile has all its lines: in the place of one that does not exist stands another, whose products nobody
// stores, which saves the registers of masks.
#pragma once

#include <cutlass/gemm/kernel/default_gemm.h>

#include <type_traits>

#include "cuda/block.cuh"

namespace fastmoe_route {
namespace cuda {

// An access iterator of CUTLASS whose lines are moved. Lines run across the memory's order: the rows of a row-major
// matrix, unless kAlong says that they run along it.
template <class Base, bool kAlong>
class Redirected : public Base {
 public:
  using Map = typename Base::ThreadMap;
  static_assert(Base::kAccessesPerVector == 1, "an access is a vector");
  static constexpr int kLines = kAlong ? Map::Iterations::kContiguous : Map::Iterations::kStrided;

  Redirected() = default;

  // distance_of(line) of the tile, in lines from where it would lie; `line_bytes` from one to the next.
  template <class DistanceOf>
  __device__ Redirected(const typename Base::Params& params, typename Base::Pointer pointer,
                        typename Base::TensorCoord extent, int thread, int32_t line_bytes,
                        const DistanceOf& distance_of)
      : Base(params, pointer, extent, thread), line_bytes_(line_bytes) {
    const auto start = Map::initial_offset(thread);
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      distance_[i] = kAlong ? distance_of(start.contiguous() + i * Map::Delta::kContiguous)
                            : distance_of(start.strided() + i * Map::Delta::kStrided);
    }
  }

  __device__ void set_iteration_index(int index) {
    Base::set_iteration_index(index);
    access_ = index;
  }
  __device__ Redirected& operator++() {
    Base::operator++();
    ++access_;
    return *this;
  }
  // The product is volatile, so that it is made at every access: hoisted out of the main loop, all of them together
  // take the registers that the loop has not got.
  __device__ typename Base::AccessType* get() const {
    int64_t bytes;
    asm volatile("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(distance_[line()]), "r"(line_bytes_));
    return reinterpret_cast<typename Base::AccessType*>(reinterpret_cast<char*>(Base::get()) + bytes);
  }

 private:
  __device__ int line() const {
    return kAlong ? access_ % Map::Iterations::kContiguous : access_ / Map::Iterations::kContiguous;
  }

  int32_t line_bytes_;
  int distance_[kLines];
  int access_ = 0;
};

// The same for main loops that load whole fragments through registers.
template <class Access>
class RedirectedTile {
 public:
  using Element = typename Access::Element;
  using Layout = typename Access::Layout;
  using ThreadMap = typename Access::ThreadMap;
  using Params = typename Access::Params;
  using Fragment = cutlass::Array<Element, ThreadMap::Iterations::kCount * ThreadMap::kElementsPerAccess>;

  template <class DistanceOf>
  __device__ RedirectedTile(const Params& params, typename Access::Pointer pointer, typename Access::TensorCoord extent,
                            int thread, int32_t line_bytes, const DistanceOf& distance_of)
      : access_(params, pointer, extent, thread, line_bytes, distance_of) {}

  __device__ void load(Fragment& fragment) {
    using Type = typename Access::AccessType;
    Type* const to = reinterpret_cast<Type*>(&fragment);
#pragma unroll
    for (int i = 0; i < ThreadMap::Iterations::kCount; ++i) {
      access_.set_iteration_index(i);
      cutlass::arch::global_load<Type, sizeof(Type)>(to[i], access_.get(), access_.valid());
      ++access_;
    }
  }
  __device__ RedirectedTile& operator++() {
    if (Access::kAdvanceRank == 1) access_.add_tile_offset({0, 1});
    else access_.add_tile_offset({1, 0});
    return *this;
  }
  __device__ void clear_mask(bool is_cleared) { access_.clear_mask(is_cleared); }

 private:
  Access access_;
};

// A CUTLASS iterator over tiles in global memory -> the redirected one that takes its place.
template <class Iterator>
struct RedirectedOf;
template <class Shape, class Element, class Layout, int kRank, class Map, class Access>
struct RedirectedOf<
    cutlass::transform::threadblock::PredicatedTileAccessIterator<Shape, Element, Layout, kRank, Map, Access, false>> {
  // A (rank 1) moves rows, B (rank 0) columns; both run along the memory where the other index is strided.
  static constexpr bool kAlong = (kRank == 0) == std::is_same<Layout, cutlass::layout::RowMajor>::value;
  using Type = Redirected<
      cutlass::transform::threadblock::PredicatedTileAccessIterator<Shape, Element, Layout, kRank, Map, Access, false>,
      kAlong>;
};
template <class Shape, class Element, class Layout, int kRank, class Map, int kAccess>
struct RedirectedOf<
    cutlass::transform::threadblock::PredicatedTileIterator<Shape, Element, Layout, kRank, Map, kAccess, false>> {
  using Access = cutlass::AlignedArray<Element, kAccess, kAccess* static_cast<int>(sizeof(Element))>;
  using Type = RedirectedTile<typename RedirectedOf<cutlass::transform::threadblock::PredicatedTileAccessIterator<
      Shape, Element, Layout, kRank, Map, Access, false>>::Type>;
};

// A CUTLASS main loop -> the same one on redirected operands.
template <class Mma>
struct RedirectedMma;
template <class Shape, class A, class SharedA, cutlass::arch::CacheOperation::Kind kCacheA, class B, class SharedB,
          cutlass::arch::CacheOperation::Kind kCacheB, class C, class LayoutC, class Policy, int kStages,
          cutlass::gemm::SharedMemoryClearOption kClear>
struct RedirectedMma<cutlass::gemm::threadblock::MmaMultistage<Shape, A, SharedA, kCacheA, B, SharedB, kCacheB, C,
                                                               LayoutC, Policy, kStages, kClear>> {
  using Type = cutlass::gemm::threadblock::MmaMultistage<Shape, typename RedirectedOf<A>::Type, SharedA, kCacheA,
                                                         typename RedirectedOf<B>::Type, SharedB, kCacheB, C, LayoutC,
                                                         Policy, kStages, kClear>;
};
template <class Shape, class A, class SharedA, class B, class SharedB, class C, class LayoutC, class Policy>
struct RedirectedMma<cutlass::gemm::threadblock::MmaPipelined<Shape, A, SharedA, B, SharedB, C, LayoutC, Policy>> {
  using Type = cutlass::gemm::threadblock::MmaPipelined<Shape, typename RedirectedOf<A>::Type, SharedA,
                                                        typename RedirectedOf<B>::Type, SharedB, C, LayoutC, Policy>;
};

}  // namespace cuda
}  // namespace fastmoe_route
