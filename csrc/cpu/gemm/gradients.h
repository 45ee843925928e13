// Sums over the rows of every expert, for grouped_mm and moe_mlp alike: weight gradients and bias gradients.
//
// Rows are given as lists of pointers, expert by expert: starts[e] : starts[e + 1] are those of expert e.
#pragma once

#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

// result[e] = sum over the rows of e, ascending, of left^T right: [a, b], or [b, a] when transposed; contiguous.
struct WeightGradient {
  DType dtype;
  int64_t num_experts;
  const int32_t* starts;
  const void* const* left;   // rows of a elements
  const void* const* right;  // rows of b elements
  int64_t a;
  int64_t b;
  void* result;
  bool transposed;
};
void weight_gradient(const WeightGradient& gradient);

// result[e] = sum over the rows of e, ascending, of factor * row: [n].
struct BiasGradient {
  DType dtype;
  int64_t num_experts;
  const int32_t* starts;
  const void* const* rows;  // n elements each
  const void* factors;      // one float (double for float64) per row of the lists; null for 1
  int64_t n;
  void* result;
};
void bias_gradient(const BiasGradient& gradient);

FASTMOE_ROUTE_ISA_END
