// The expert layer on CUDA, forward, in three launches and one for the bounds:
//   1. up           the rows' tokens taken by index, grouped product, the row's weight if weights_on is input, bias_up,
//                   activation (gemm/up.cuh); the pre-activations are stored where training keeps them
//   2. down         grouped product plus bias_down
//   3. unpermute    every token sums its rows, weighted, j ascending, and rounds once; the weight is a factor of the
//                   fma that adds the row: an epilogue of 2 would load and multiply it for nothing
// Where policy.h has no such kernel for 1, as for sizes that are not multiples of 16 bytes, it is permute (and with
// weights_on input a scaling in place), a grouped product into the pre-activations, and an activation kernel: R H more
// written and read, and the R U of the pre-activations in every call.
// Nothing is added by an atomic, and a row sees no other row. Rows without a slot are zeros in both results of 1.
//
// Pre-activations and expert outputs are rounded to the dtype, as in plain torch, so a call that keeps the
// pre-activations has the bits of one that does not.
// Bytes beside the products' operands: R I written, R U more with the pre-activations, R H written and (K + 1) T H for
// the combination, times the element size.
#include "cuda/activation.cuh"
#include "cuda/expert_rows.cuh"
#include "cuda/gemm/up.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostGridY = 65535;

// A warp owns 32 packs of a row: blockIdx.y counts them. They are loaded before the maps say whether the row has a
// slot, so that no load waits for another.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) activate_kernel(ExpertRows rows, T* preactivation, T* activated) {
  const int64_t step = int64_t{gridDim.y} * kWarp * N;
  for (int64_t row = grid_warp(); row < rows.num_rows; row += grid_warps()) {
    T* const pre = preactivation + row * rows.up_size;
    for (int64_t col = (int64_t{blockIdx.y} * kWarp + lane_index()) * N; col < rows.intermediate; col += step) {
      GateAndUp<T, N> in{};
      in.load(rows, pre, col);
      Pack<T, N> result{};
      if (rows.slot_of(row) < 0) {
        const GateAndUp<T, N> zeros{};
        zeros.store(rows, pre, col);
      } else {
        dispatch_activation(rows.activation, [&](auto f) {
#pragma unroll
          for (int n = 0; n < N; ++n) {
            result.values[n] = narrow<T>(decltype(f)::value(widen(in.gate.values[n]), widen(in.up.values[n])));
          }
        });
      }
      store_pack(activated + row * rows.intermediate + col, result);
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(ExpertRows rows, T* values) {
  const int64_t row_packs = rows.hidden / N;
  for (int64_t row = grid_warp(); row < rows.num_rows; row += grid_warps()) {
    const int64_t slot = rows.maps.slot_of(row);
    if (slot < 0) continue;
    const float weight = rows.weights[slot];
    Pack<T, N>* const packs = reinterpret_cast<Pack<T, N>*>(values + row * rows.hidden);
    for (int64_t i = lane_index(); i < row_packs; i += kWarp) {
      Pack<T, N> pack = packs[i];
#pragma unroll
      for (int n = 0; n < N; ++n) pack.values[n] = narrow<T>(weight * widen(pack.values[n]));
      packs[i] = pack;
    }
  }
}

// Of 2-byte dtypes: float32 has step 1 in one launch on every device.
CudaStatus activate(const ExpertRows& rows, DType dtype, void* preactivation, void* activated, const CudaQueue& queue) {
  const auto run = [&](auto sample) {
    using T = decltype(sample);
    const bool is_wide = are_multiples(kWideBytes, {preactivation, activated}, {rows.intermediate}, sizeof(T));
    dispatch_width<T>(is_wide, [&](auto width) {
      constexpr int N = decltype(width)::value;
      const int64_t chunks = ceil_div(rows.intermediate / N, kWarp);
      const dim3 grid(num_blocks(rows.num_rows, kThreads / kWarp),
                      static_cast<unsigned>(chunks < kMostGridY ? chunks : kMostGridY));
      activate_kernel<T, N>
          <<<grid, kThreads, 0, queue.stream>>>(rows, static_cast<T*>(preactivation), static_cast<T*>(activated));
    });
  };
  dtype == DType::kBFloat16 ? run(BFloat16{}) : run(Float16{});
  return launched();
}

}  // namespace

CudaStatus scale_rows(DType dtype, const ExpertRows& rows, void* values, const CudaQueue& queue) {
  dispatch_expert_float(dtype, [&](auto sample) {
    using T = decltype(sample);
    dispatch_width<T>(are_multiples(kWideBytes, {values}, {rows.hidden}, sizeof(T)), [&](auto width) {
      scale_rows_kernel<T, decltype(width)::value>
          <<<num_blocks(rows.num_rows, kThreads / kWarp), kThreads, 0, queue.stream>>>(rows, static_cast<T*>(values));
    });
  });
  return launched();
}

namespace {

// Step 1 in launches of its own, through hidden_rows [R, H].
CudaStatus up_in_launches(const MoeMlpArgs& a, const ExpertRows& rows, void* hidden_rows, void* activated,
                          const CudaQueue& queue) {
  const MoeMlpShape& shape = a.shape;
  const size_t pre_bytes = shape.num_rows * rows.up_size * element_size(shape.dtype);
  void* const pre = a.preactivation != nullptr ? a.preactivation : queue.scratch(pre_bytes);
  CudaStatus status = permute({shape.num_tokens, shape.top_k, shape.num_rows, shape.hidden, shape.dtype, a.x,
                               a.x_stride, a.row_to_slot, a.slot_to_row, hidden_rows},
                              queue);
  if (status.code != 0) return status;
  if (shape.weights_on_input) {
    if (status = scale_rows(shape.dtype, rows, hidden_rows, queue); status.code != 0) return status;
  }
  RowsProduct up = rows_product_of(shape.dtype, rows.groups, shape.num_rows, a.w_up, shape.hidden, rows.up_size);
  up.a = hidden_rows;
  up.a_stride = shape.hidden;
  up.bias = a.bias_up;
  up.d = pre;
  if (status = rows_product(up, queue); status.code != 0) return status;
  return activate(rows, shape.dtype, pre, activated, queue);
}

}  // namespace

CudaStatus moe_mlp(const MoeMlpArgs& a, const CudaQueue& queue) {
  const MoeMlpShape& shape = a.shape;
  if (shape.dtype == DType::kFloat64) return no_float64();
  const size_t size = element_size(shape.dtype);
  RowGroups groups;
  CudaStatus status = group_rows(a.offsets, shape.num_experts, shape.num_rows, kProductTileRows, queue, &groups);
  if (status.code != 0) return status;
  const ExpertRows rows = expert_rows(shape, groups, a.row_to_slot, a.slot_to_row, a.weights);
  void* const hidden_rows = queue.scratch(shape.num_rows * shape.hidden * size);  // outputs of experts
  void* const activated = queue.scratch(shape.num_rows * shape.intermediate * size);

  const RowsProduct w_up = rows_product_of(shape.dtype, groups, shape.num_rows, a.w_up, shape.hidden, rows.up_size);
  const UpProduct up{shape.dtype,
                     rows,
                     shape.top_k,
                     a.x,
                     a.x_stride,
                     w_up.b,
                     w_up.b_group_stride,
                     w_up.b_stride,
                     w_up.b_is_column_major,
                     a.bias_up,
                     shape.weights_on_input,
                     a.preactivation,
                     activated};
  bool is_done = false;
  if (status = up_product(up, queue, &is_done); status.code != 0) return status;
  if (!is_done) {
    if (status = up_in_launches(a, rows, hidden_rows, activated, queue); status.code != 0) return status;
  }
  RowsProduct down = rows_product_of(shape.dtype, groups, shape.num_rows, a.w_down, shape.intermediate, shape.hidden);
  down.a = activated;
  down.a_stride = shape.intermediate;
  down.bias = a.bias_down;
  down.d = hidden_rows;
  if (status = rows_product(down, queue); status.code != 0) return status;
  return unpermute({shape.num_tokens, shape.top_k, shape.num_rows, shape.hidden, shape.dtype, hidden_rows, shape.hidden,
                    a.slot_to_row, DType::kFloat32, shape.weights_on_input ? nullptr : a.weights, a.y},
                   queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
