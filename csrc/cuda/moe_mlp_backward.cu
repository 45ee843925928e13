// The expert layer on CUDA, backward, from x, the pre-activations and the integer maps.
//
// With g = grad_y of a row's token, w its weight, u = g w_down^T and a = act(pre), recomputed:
//   1. g to expert rows, u by a grouped product
//   2. a warp per row: dS = <u, a> + <g, bias_down>, d_pre = w u act'(pre), a' = w a (in place of u)
//   3. grad_w_down = a'^T g over the rows of each expert, grad_bias_down = sum of w g
//   4. d_pre w_up^T by a grouped product, summed per token: grad_x
//   5. x to expert rows, grad_w_up = x^T d_pre, grad_bias_up = sum of d_pre
// weights_on input: w scales x instead, so a' = a and d_pre = u act'(pre); with dx' = d_pre w_up^T: grad_x = sum of
// w dx', dS = <dx', x>, and round(w x) stands for x in 5.
// Rows without a slot hold zeros wherever rows are summed over. One buffer [R, H] serves 1, 4 and 5 in turn.
#include "cuda/activation.cuh"
#include "cuda/architecture.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/expert_rows.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kActivateBlocks = kNeedsMoreRegisters ? 3 : 4;  // that a multiprocessor holds

// What step 2 reads and writes, in elements of T.
template <class T>
struct ActivationGradient {
  ExpertRows rows;
  const T* preactivation;  // [R, U]
  T* up_grad;              // [R, I] u, then a'
  T* pre_grad;             // [R, U] d_pre
  const T* grad_rows;      // [R, H] g
  const T* bias_down;      // [E, H], or null
  float* row_weights;      // [R] w, 0 for rows without a slot, or null
  float* grad_weights;     // [T, K], or null; slots without a row are cleared before
  bool weights_on_input;
};

// The last group that starts at or before a row of some group.
__device__ inline int64_t group_of(const RowGroups& groups, int64_t row) {
  int64_t low = 0, high = groups.num_groups;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (groups.bounds[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, kActivateBlocks)
    activate_backward_kernel(const __grid_constant__ ActivationGradient<T> g) {
  const ExpertRows& rows = g.rows;
  for (int64_t row = grid_warp(); row < rows.num_rows; row += grid_warps()) {
    const int64_t slot = rows.slot_of(row);
    const float weight = slot < 0 ? 0.0f : g.weights_on_input ? 1.0f : rows.weights[slot];
    T* const scaled = g.up_grad + row * rows.intermediate;
    T* const pre_grad = g.pre_grad + row * rows.up_size;
    float dot = 0.0f;
    for (int64_t col = int64_t{lane_index()} * N; col < rows.intermediate; col += kWarp * N) {
      GateAndUp<T, N> in{}, out{};
      Pack<T, N> kept{};
      in.load(rows, g.preactivation + row * rows.up_size, col);  // before the maps have said whether it counts
      const Pack<T, N> upstream = *reinterpret_cast<const Pack<T, N>*>(scaled + col);
      if (slot >= 0) {
        dispatch_activation(rows.activation, [&](auto f) {
#pragma unroll
          for (int n = 0; n < N; ++n) {
            float d_gate, d_up;
            const float a = decltype(f)::slope(widen(in.gate.values[n]), widen(in.up.values[n]), d_gate, d_up);
            const float u = widen(upstream.values[n]);
            dot = fmaf(u, a, dot);
            out.gate.values[n] = narrow<T>(weight * u * d_gate);
            out.up.values[n] = narrow<T>(weight * u * d_up);
            kept.values[n] = narrow<T>(weight * a);
          }
        });
      }
      out.store(rows, pre_grad, col);
      store_pack(scaled + col, kept);
    }
    if (lane_index() == 0 && g.row_weights != nullptr) g.row_weights[row] = weight;
    if (slot < 0 || g.grad_weights == nullptr) continue;
    if (g.bias_down != nullptr) {
      const T* const bias = g.bias_down + group_of(rows.groups, row) * rows.hidden;
      const T* const grad = g.grad_rows + row * rows.hidden;
      for (int64_t i = lane_index(); i < rows.hidden; i += kWarp) dot = fmaf(widen(grad[i]), widen(bias[i]), dot);
    }
    dot = warp_sum(dot);
    if (lane_index() == 0) g.grad_weights[slot] = dot;
  }
}

ExpertMatrix transposed(const ExpertMatrix& w) { return {w.data, w.stride_expert, w.stride_col, w.stride_row}; }

// The call, its buffers, and one function per step above.
struct Backward {
  const MoeMlpBackwardArgs& a;
  const MoeMlpShape& shape;
  const CudaQueue& queue;
  RowGroups groups{};
  ExpertRows rows{};
  void* hidden_rows = nullptr;  // [R, H]
  void* inter_rows = nullptr;   // [R, I] u, then a'
  void* pre_grad = nullptr;     // [R, U]
  float* row_weights = nullptr;

  bool wants_dx() const { return a.grad_x != nullptr || (shape.weights_on_input && a.grad_weights != nullptr); }

  CudaStatus prepare() {
    const CudaStatus status =
        group_rows(a.offsets, shape.num_experts, shape.num_rows, kProductTileRows, queue, &groups);
    rows = expert_rows(shape, groups, a.row_to_slot, a.slot_to_row, a.weights);
    const size_t size = element_size(shape.dtype);
    hidden_rows = queue.scratch(shape.num_rows * shape.hidden * size);
    inter_rows = queue.scratch(shape.num_rows * shape.intermediate * size);
    pre_grad = queue.scratch(shape.num_rows * rows.up_size * size);
    if (a.grad_bias_down != nullptr && !shape.weights_on_input) {
      row_weights = queue.scratch_of<float>(shape.num_rows);
    }
    return status;
  }

  CudaStatus to_expert_rows(const void* tokens, int64_t stride) const {
    return permute({shape.num_tokens, shape.top_k, shape.num_rows, shape.hidden, shape.dtype, tokens, stride,
                    a.row_to_slot, a.slot_to_row, hidden_rows},
                   queue);
  }

  // d [R, out] = rows [R, in] w.
  CudaStatus multiply(const void* from, const ExpertMatrix& w, int64_t in, int64_t out, void* d) const {
    RowsProduct product = rows_product_of(shape.dtype, groups, shape.num_rows, w, in, out);
    product.a = from;
    product.a_stride = in;
    product.d = d;
    return rows_product(product, queue);
  }

  CudaStatus weight_gradient(const void* left, int64_t m, const void* right, int64_t n, bool is_transposed,
                             void* result) const {
    GroupsProduct product{shape.dtype, groups, shape.num_rows, m, n, left, m, right, n, result};
    if (is_transposed) product.exchange_operands();
    return groups_product(product, queue);
  }

  CudaStatus activation_gradients() const {
    float* const grad_weights = shape.weights_on_input ? nullptr : a.grad_weights;
    if (grad_weights != nullptr) {
      const size_t bytes = shape.num_tokens * shape.top_k * sizeof(float);
      const CudaStatus status = status_of(cudaMemsetAsync(grad_weights, 0, bytes, queue.stream));
      if (status.code != 0) return status;
    }
    dispatch_expert_float(shape.dtype, [&](auto sample) {
      using T = decltype(sample);
      const ActivationGradient<T> call{rows,
                                       static_cast<const T*>(a.preactivation),
                                       static_cast<T*>(inter_rows),
                                       static_cast<T*>(pre_grad),
                                       static_cast<const T*>(hidden_rows),
                                       static_cast<const T*>(a.bias_down),
                                       row_weights,
                                       grad_weights,
                                       shape.weights_on_input};
      const bool is_wide = are_multiples(kWideBytes, {a.preactivation}, {shape.intermediate}, sizeof(T));
      dispatch_width<T>(is_wide, [&](auto width) {
        activate_backward_kernel<T, decltype(width)::value>
            <<<num_blocks(shape.num_rows, kThreads / kWarp), kThreads, 0, queue.stream>>>(call);
      });
    });
    return launched();
  }

  CudaStatus down_gradients() const {
    if (a.grad_w_down != nullptr) {
      const CudaStatus status = weight_gradient(inter_rows, shape.intermediate, hidden_rows, shape.hidden,
                                                a.grad_w_down_transposed, a.grad_w_down);
      if (status.code != 0) return status;
    }
    if (a.grad_bias_down == nullptr) return {};
    return column_sums({shape.dtype, groups, shape.hidden, hidden_rows, shape.hidden, row_weights, a.grad_bias_down},
                       queue);
  }

  CudaStatus input_gradients() const {
    if (!wants_dx()) return {};
    CudaStatus status = multiply(pre_grad, transposed(a.w_up), rows.up_size, shape.hidden, hidden_rows);
    if (status.code != 0) return status;
    if (a.grad_x != nullptr) {
      status = unpermute(
          {shape.num_tokens, shape.top_k, shape.num_rows, shape.hidden, shape.dtype, hidden_rows, shape.hidden,
           a.slot_to_row, DType::kFloat32, shape.weights_on_input ? a.weights : nullptr, a.grad_x},
          queue);
      if (status.code != 0) return status;
    }
    if (!shape.weights_on_input || a.grad_weights == nullptr) return {};
    return unpermute_backward(
        {shape.num_tokens, shape.top_k, shape.num_rows, shape.hidden, shape.dtype, a.x, a.x_stride, hidden_rows,
         shape.hidden, a.row_to_slot, a.slot_to_row, DType::kFloat32, nullptr, nullptr, a.grad_weights},
        queue);
  }

  CudaStatus up_gradients() const {
    CudaStatus status;
    if (a.grad_w_up != nullptr) {
      if (status = to_expert_rows(a.x, a.x_stride); status.code != 0) return status;
      if (shape.weights_on_input) {
        if (status = scale_rows(shape.dtype, rows, hidden_rows, queue); status.code != 0) return status;
      }
      status = weight_gradient(hidden_rows, shape.hidden, pre_grad, rows.up_size, a.grad_w_up_transposed, a.grad_w_up);
      if (status.code != 0) return status;
    }
    if (a.grad_bias_up == nullptr) return status;
    return column_sums({shape.dtype, groups, rows.up_size, pre_grad, rows.up_size, nullptr, a.grad_bias_up}, queue);
  }
};

}  // namespace

CudaStatus moe_mlp_backward(const MoeMlpBackwardArgs& a, const CudaQueue& queue) {
  const MoeMlpShape& shape = a.shape;
  if (shape.dtype == DType::kFloat64) return no_float64();
  Backward call{a, shape, queue};
  CudaStatus status = call.prepare();
  if (status.code != 0) return status;
  if (status = call.to_expert_rows(a.grad_y, shape.hidden); status.code != 0) return status;
  status = call.multiply(call.hidden_rows, transposed(a.w_down), shape.hidden, shape.intermediate, call.inter_rows);
  if (status.code != 0) return status;
  if (status = call.activation_gradients(); status.code != 0) return status;
  if (status = call.down_gradients(); status.code != 0) return status;
  if (status = call.input_gradients(); status.code != 0) return status;
  return call.up_gradients();
}

}  // namespace cuda
}  // namespace fastmoe_route
