// grouped_mm on the CPU: gemm/driver.h multiplies blocks of rows, this file adds the bias and rounds.
//
// float32 and float64 results are accumulated in y itself; 2-byte results in a float tile of the worker's scratch that
// is rounded once. Reads every row and the weights of every expert that has rows, the weights once per block of rows;
// writes y once.
#include <cstring>

#include "cpu/gemm/driver.h"
#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

// to[j] = tile[j] + bias[j], rounded once; bias may be null.
template <class T>
void finish_row(const float* tile, const T* bias, int64_t n, T* to) {
  constexpr int64_t L = Vec::kLanes;
  for (int64_t j = 0; j < n; j += L) {
    if (n - j >= L) {
      const Vec sum = Vec::load(tile + j);
      (bias == nullptr ? sum : sum + Vec::load(bias + j)).store(to + j);
    } else {
      const int rest = static_cast<int>(n - j);
      const Vec sum = Vec::load(tile + j, rest);
      (bias == nullptr ? sum : sum + Vec::load(bias + j, rest)).store(to + j, rest);
    }
  }
}
inline void finish_row(const double* tile, const double* bias, int64_t n, double* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = bias == nullptr ? tile[j] : tile[j] + bias[j];
}

template <class T>
void multiply_all(const GroupedMmArgs& args) {
  using A = accumulate_t<T>;
  constexpr bool kDirect = sizeof(A) == sizeof(T);
  T* y = static_cast<T*>(args.y);
  GroupedProduct product{args.num_experts, args.offsets, ExpertWeights(args.dtype, args.w), args.in, args.out};
  if (kDirect) {
    product.direct = y;
    product.direct_stride = args.out;
  }
  const auto rows = [&](int64_t begin, int64_t end, const void** pointers, A*) {
    for (int64_t r = begin; r < end; ++r) pointers[r - begin] = static_cast<const T*>(args.x) + r * args.x_stride;
  };
  const auto finish = [&](const FinishedTile<A>& done) {
    const T* bias =
        args.bias == nullptr ? nullptr : static_cast<const T*>(args.bias) + done.expert * args.out + done.col_begin;
    if (kDirect && bias == nullptr) return;
    for (int64_t r = done.row_begin; r < done.row_end; ++r)
      finish_row(done.tile + (r - done.row_begin) * done.stride, bias, done.col_end - done.col_begin,
                 y + r * args.out + done.col_begin);
  };
  grouped_product<A>(product, false, rows, finish);

  const int64_t used = args.num_experts > 0 ? args.offsets[args.num_experts] : 0;
  parallel_for(args.num_rows - used, 1 + 65536 / (1 + args.out), [&](int64_t begin, int64_t end) {
    std::memset(y + (used + begin) * args.out, 0, static_cast<size_t>((end - begin) * args.out) * sizeof(T));
  });
}

}  // namespace

void grouped_mm(const GroupedMmArgs& args) {
  dispatch_element(args.dtype, [&](auto type) { multiply_all<decltype(type)>(args); });
}

FASTMOE_ROUTE_ISA_END
