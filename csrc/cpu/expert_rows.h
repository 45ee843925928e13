// What the two passes of the expert layer share beside gemm/driver.h: the rows a plan leaves to each expert, small
// loops over one row, and the combine.
#pragma once

#include <cstring>

#include "cpu/gemm/driver.h"
#include "cpu/isa/activation.h"

FASTMOE_ROUTE_ISA_BEGIN

// The rows of one plan. A row without a slot inside an expert's rows (a plan may have them) reads a row of zeros and
// its results are ignored; rows without a slot at an expert's end (alignment) are not computed at all.
struct ExpertRows {
  const MoeMlpShape& shape;
  const int32_t* offsets;
  const int32_t* row_to_slot;
  int32_t* ends;      // [E]: one past the last row of each expert that holds a slot
  const void* zeros;  // as many as the longest row

  ExpertRows(const MoeMlpShape& s, const int32_t* starts, const int32_t* slots)
      : shape(s), offsets(starts), row_to_slot(slots) {
    const size_t ends_bytes = static_cast<size_t>((shape.num_experts + 15) / 16 * 64);
    const size_t zero_bytes = static_cast<size_t>(shape.hidden * element_size(shape.dtype));
    char* memory = static_cast<char*>(scratch(Scratch::kExpertTasks, ends_bytes + zero_bytes));
    ends = reinterpret_cast<int32_t*>(memory);
    zeros = std::memset(memory + ends_bytes, 0, zero_bytes);
    for (int64_t e = 0; e < shape.num_experts; ++e) {
      ends[e] = offsets[e + 1];
      while (ends[e] > offsets[e] && row_to_slot[ends[e] - 1] < 0) --ends[e];
    }
  }

  bool is_used(int64_t row) const { return row_to_slot[row] >= 0; }
  int64_t token(int64_t row) const { return row_to_slot[row] / shape.top_k; }

  // Row `row` of the matrix [T, H] at `data`, by token.
  template <class T>
  const T* gathered(const void* data, int64_t stride, int64_t row) const {
    return static_cast<const T*>(is_used(row) ? static_cast<const T*>(data) + token(row) * stride : zeros);
  }

  GroupedProduct product(const ExpertMatrix& w, int64_t k, int64_t n) const {
    GroupedProduct result{shape.num_experts, offsets, ExpertWeights(shape.dtype, w), k, n};
    result.ends = ends;
    return result;
  }
};

inline ExpertMatrix transposed(const ExpertMatrix& w) { return {w.data, w.stride_expert, w.stride_col, w.stride_row}; }

// Calls body(i, lanes) for the vectors of n elements; lanes is V::kLanes but for the last.
template <class V, class Body>
inline void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) body(i, V::kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

// Arithmetic type to element type, or back.
template <class From, class To>
inline void convert(const From* from, To* to, int64_t n) {
  using V = vector_t<From>;
  for_lanes<V>(n, [&](int64_t i, int lanes) {
    if (lanes == V::kLanes) V::load(from + i).store(to + i);
    else V::load(from + i, lanes).store(to + i, lanes);
  });
}

template <class A, class T>
inline void add_bias(A* row, const T* bias, int64_t n) {
  using V = vector_t<A>;
  for_lanes<V>(n, [&](int64_t i, int lanes) {
    if (lanes == V::kLanes) (V::load(row + i) + V::load(bias + i)).store(row + i);
    else (V::load(row + i, lanes) + V::load(bias + i, lanes)).store(row + i, lanes);
  });
}

// Even and odd elements of pairs[0:2n], and back.
template <class A>
inline void split_pairs(const A* pairs, A* even, A* odd, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    even[i] = pairs[2 * i];
    odd[i] = pairs[2 * i + 1];
  }
}
template <class A>
inline void join_pairs(const A* even, const A* odd, A* pairs, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    pairs[2 * i] = even[i];
    pairs[2 * i + 1] = odd[i];
  }
}

// Sum of a[i] * b[i] in one fixed order: four accumulators, then a tree.
template <class A, class T, class U>
inline A dot(const T* a, const U* b, int64_t n) {
  using V = vector_t<A>;
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::kLanes <= n; i += 4 * V::kLanes)
    for (int q = 0; q < 4; ++q) sums[q] = fma(V::load(a + i + q * V::kLanes), V::load(b + i + q * V::kLanes), sums[q]);
  for_lanes<V>(n - i, [&](int64_t j, int lanes) {
    sums[0] = fma(V::load(a + i + j, lanes), V::load(b + i + j, lanes), sums[0]);
  });
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y[t] = sum over j ascending of weight * rows[slot_to_row[t, j]], rounded once; weights null stands for 1.
template <class T>
void combine_rows(const MoeMlpShape& shape, const accumulate_t<T>* rows, const int32_t* slot_to_row,
                  const accumulate_t<T>* weights, T* y) {
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  constexpr int64_t kStep = 4 * V::kLanes;
  const int64_t hidden = shape.hidden, top_k = shape.top_k;
  parallel_for(shape.num_tokens, 1 + 16384 / (1 + hidden * top_k), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t c = 0; c < hidden; c += kStep) {
        const int64_t width = hidden - c < kStep ? hidden - c : kStep;
        V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        for (int64_t j = 0; j < top_k; ++j) {
          const int64_t row = slot_to_row[t * top_k + j];
          if (row < 0) continue;
          const V weight = V::all(weights == nullptr ? A(1) : weights[t * top_k + j]);
          const A* from = rows + row * hidden + c;
          if (width == kStep) {
            for (int q = 0; q < 4; ++q) sums[q] = fma(weight, V::load(from + q * V::kLanes), sums[q]);
          } else {
            for_lanes<V>(width, [&](int64_t i, int lanes) {
              V& sum = sums[i / V::kLanes];
              sum = fma(weight, V::load(from + i, lanes), sum);
            });
          }
        }
        T* to = y + t * hidden + c;
        for_lanes<V>(width, [&](int64_t i, int lanes) { sums[i / V::kLanes].store(to + i, lanes); });
      }
    }
  });
}

FASTMOE_ROUTE_ISA_END
