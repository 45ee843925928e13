// Kernels on the rows of experts that the two passes of the expert layer share, beside permute and the products.
#pragma once

#include "cuda/gemm/gemm.h"
#include "cuda/maps.cuh"
#include "ops/moe_mlp.h"
#include "ops/permute.h"

namespace fastmoe_route {
namespace cuda {

// One call of the layer, as its kernels see it.
struct ExpertRows {
  Maps maps;
  RowGroups groups;
  int64_t num_rows;
  int64_t intermediate;  // I
  int64_t up_size;       // U
  int64_t hidden;        // H
  Activation activation;
  bool is_gated;
  bool is_interleaved;
  const float* weights;  // [T, K]

  // The slot of a row that an expert works on, or -1. Rows past the last group belong to nobody.
  __device__ int64_t slot_of(int64_t row) const {
    return row < groups.bounds[groups.num_groups] ? maps.slot_of(row) : -1;
  }
};

inline ExpertRows expert_rows(const MoeMlpShape& shape, const RowGroups& groups, const int32_t* row_to_slot,
                              const int32_t* slot_to_row, const float* weights) {
  const bool gated = is_gated(shape.activation);
  return {{row_to_slot, slot_to_row, shape.num_rows, shape.num_tokens * shape.top_k},
          groups,
          shape.num_rows,
          shape.intermediate,
          shape.intermediate * (gated ? 2 : 1),
          shape.hidden,
          shape.activation,
          gated,
          gated && shape.interleaved,
          weights};
}

// Columns [col, col + N) of gate and up, of a row of pre-activations or of their gradients; col is a multiple of N.
template <class T, int N>
struct GateAndUp {
  Pack<T, N> gate, up;

  __device__ static const Pack<T, N>* pack(const T* row, int64_t col) {
    return reinterpret_cast<const Pack<T, N>*>(row + col);
  }
  __device__ void load(const ExpertRows& rows, const T* row, int64_t col) {
    if (!rows.is_interleaved) {
      gate = *pack(row, col);
      if (rows.is_gated) up = *pack(row, rows.intermediate + col);
      return;
    }
    split(*pack(row, 2 * col), *pack(row, 2 * col + N));
  }
  // From the first and the second N of 2 N columns, gates and ups in turn.
  __device__ void split(const Pack<T, N> first, const Pack<T, N> second) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      gate.values[n] = 2 * n < N ? first.values[2 * n] : second.values[2 * n - N];
      up.values[n] = 2 * n + 1 < N ? first.values[2 * n + 1] : second.values[2 * n + 1 - N];
    }
  }
  __device__ void store(const ExpertRows& rows, T* row, int64_t col) const {
    store(rows, row, col, [](T* to, const Pack<T, N>& from) { *reinterpret_cast<Pack<T, N>*>(to) = from; });
  }
  // put(to, pack) stores a pack.
  template <class Put>
  __device__ void store(const ExpertRows& rows, T* row, int64_t col, const Put& put) const {
    if (!rows.is_interleaved) {
      put(row + col, gate);
      if (rows.is_gated) put(row + rows.intermediate + col, up);
      return;
    }
    Pack<T, N> first, second;
#pragma unroll
    for (int n = 0; n < 2 * N; ++n) {
      const T value = n % 2 == 0 ? gate.values[n / 2] : up.values[n / 2];
      (n < N ? first.values[n] : second.values[n - N]) = value;
    }
    put(row + 2 * col, first);
    put(row + 2 * col + N, second);
  }
};

// rows[r] *= weight of its slot, rounded; [R, H].
CudaStatus scale_rows(DType dtype, const ExpertRows& rows, void* values, const CudaQueue& queue);

// Calls body(N) with the elements of a load or store: of kWideBytes, or 1.
template <class T, class Body>
void dispatch_width(bool is_wide, const Body& body) {
  if (is_wide) body(std::integral_constant<int, kWideBytes / sizeof(T)>{});
  else body(std::integral_constant<int, 1>{});
}

// The one dtype switch of the expert ops on CUDA, where float64 is not supported.
template <class Body>
void dispatch_expert_float(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(BFloat16{});
    default: return body(Float16{});
  }
}

}  // namespace cuda
}  // namespace fastmoe_route
