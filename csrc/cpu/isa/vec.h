// Short vectors of float, Vec, and of integers of their width, Keys, for exact comparison of floats: one interface and
// three implementations, chosen by the flags this unit is compiled with. The only file of the package that asks the
// compiler which instruction set it targets, apart from the matrix units.
//
// Vec::kLanes lanes. Arithmetic is IEEE; fma is fused where the hardware has it. max(a, b) returns b when either is
// NaN, as the x86 instructions do. Lane-crossing sums use one fixed tree per width, so they are deterministic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Functions of a few instructions that take hundreds where vectors are lowered to what the target has: there they are
// calls, or a quarter of the time to compile that level would be theirs.
#if defined(__AVX2__) || !defined(__x86_64__)  // where other levels are used
#define FASTMOE_ROUTE_OUTLINED
#else
#define FASTMOE_ROUTE_OUTLINED __attribute__((noinline))
#endif

#if defined(__AVX512F__)
#include "cpu/isa/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/isa/vec_avx2.h"
#else
#include "cpu/isa/vec_portable.h"
#endif

FASTMOE_ROUTE_ISA_BEGIN

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline Vec operator-(Vec a) { return Vec::zero() - a; }

// The dtype switch of kernels of this level: calls body(T{}) with the storage type of `dtype`. float64, for gradient
// checks, is compiled at the portable level alone, and select.cpp sends it there whatever level is in use.
template <class F>
inline void dispatch_element(DType dtype, F&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
    case DType::kFloat64:
      if constexpr (kHasFloat64) return body(double{});
      __builtin_trap();
  }
}

FASTMOE_ROUTE_ISA_END
