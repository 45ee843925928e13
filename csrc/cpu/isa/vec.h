// Short vectors of float, Vec, and of integers of their width, Keys, for exact comparison of floats: one interface and
// three implementations, chosen by the flags this unit is compiled with. The only file of the package that asks the
// compiler which instruction set it targets, apart from the matrix units.
//
// Vec::kLanes lanes. Arithmetic is IEEE; fma is fused where the hardware has it. max(a, b) returns b when either is
// NaN, as the x86 instructions do. Lane-crossing sums use one fixed tree per width, so they are deterministic.
#pragma once

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

FASTMOE_ROUTE_ISA_END
