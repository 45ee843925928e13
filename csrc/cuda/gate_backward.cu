// gate_backward on CUDA: a warp per row, one read of the logits gives the gradient of all four differentiable outputs.
//
// Per row, the gradients of the scores G = grad_score_sum + grad_scores + (chosen ones) d weights / d score, then
//   softmax:      dz = p (G - <p, G>), inside each group for a softmax over groups
//   elementwise:  dz = G s'(z)
// plus grad_logsumexp * softmax(z). The choice is a constant. Scores are formed again: keeping them from the forward
// pass would cost T E floats, written and read, for some E exponentials a row.
//
// Rows of the common case lie in registers (gate_backward_fast.cuh), others in the warp's own memory (gate_score.cuh);
// sums are butterflies over the lanes, so bits repeat. Bytes: the logits and grad_scores once, K ids and gradients, the
// result once; grad_score_sum stays in the caches.
#include "cuda/gate_backward_fast.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

struct BackwardCall {
  GateBackwardArgs a;
  RowMemory memory;
  int num_columns;
  int num_experts;
  int num_parts;  // softmaxes of a row
  int top_k;
};

// One row in flight. Every function is for all lanes.
template <class T>
class BackwardRow {
 public:
  __device__ BackwardRow(const BackwardCall& call, float* memory)
      : c_(call), z_(memory), score_(memory + call.num_columns), grad_(memory + 2 * call.num_columns) {}

  static constexpr int kBuffers = 3;

  __device__ void run(int64_t t) {
    const GateBackwardArgs& a = c_.a;
    const bool takes_part = a.logsumexp == nullptr || static_cast<const float*>(a.logsumexp)[t] != -INFINITY;
    load(t, takes_part);
    const int part = c_.num_columns / c_.num_parts;
    const bool is_softmax = a.shape.score == Score::kSoftmax;
    if (is_softmax) {
      for (int begin = 0; begin < c_.num_columns; begin += part) form_softmax(begin, begin + part);
    } else {
      for (int i = lane_index(); i < c_.num_columns; i += kWarp) score_[i] = elementwise_score(a.shape.score, z_[i]);
    }
    __syncwarp();
    if (a.grad_weights != nullptr) add_grad_of_weights(t);
    if (is_softmax) {
      for (int begin = 0; begin < c_.num_columns; begin += part) softmax_backward(begin, begin + part);
    } else {
      for (int i = lane_index(); i < c_.num_columns; i += kWarp) grad_[i] *= elementwise_slope(a.shape.score, z_[i]);
    }
    __syncwarp();
    if (a.grad_logsumexp != nullptr && takes_part) {
      add_grad_of_logsumexp(static_cast<const float*>(a.grad_logsumexp)[t], is_softmax && c_.num_parts == 1);
    }
    T* out = static_cast<T*>(a.grad_logits) + t * c_.num_columns;
    for (int i = lane_index(); i < c_.num_columns; i += kWarp) {
      out[i] = narrow<T>(z_[i] == -INFINITY ? 0.0f : grad_[i]);
    }
  }

 private:
  // Logits, and the gradients of scores that do not depend on the choice.
  __device__ void load(int64_t t, bool takes_part) {
    const GateBackwardArgs& a = c_.a;
    const float* of_sum = takes_part ? static_cast<const float*>(a.grad_score_sum) : nullptr;
    const float* of_scores =
        a.grad_scores != nullptr ? static_cast<const float*>(a.grad_scores) + t * c_.num_experts : nullptr;
    for (int i = lane_index(); i < c_.num_columns; i += kWarp) {
      z_[i] = widen(element<T>(a.logits, t, i));
      float grad = 0.0f;
      if (of_sum != nullptr && i < c_.num_experts) grad += of_sum[i];
      if (of_scores != nullptr && i < c_.num_experts) grad += of_scores[i];
      grad_[i] = grad;
    }
    __syncwarp();
  }

  __device__ float max_of(int begin, int end) const {
    float max = -INFINITY;
    for (int i = begin + lane_index(); i < end; i += kWarp) max = larger(max, z_[i]);
    max = warp_max(max);
    return max == -INFINITY ? 0.0f : max;
  }

  // score = softmax of columns [begin, end); a part of only -inf gives 0, a NaN in it makes it NaN.
  __device__ void form_softmax(int begin, int end) {
    const float max = max_of(begin, end);
    float sum = 0.0f;
    for (int i = begin + lane_index(); i < end; i += kWarp) {
      score_[i] = expf(z_[i] - max);
      sum += score_[i];
    }
    sum = warp_sum(sum);
    const float divisor = sum == 0.0f ? 1.0f : sum;
    for (int i = begin + lane_index(); i < end; i += kWarp) score_[i] /= divisor;
  }

  // The lane of a column adds to it, slot by slot, so that an expert named twice is added twice.
  __device__ void add_grad_of_weights(int64_t t) {
    const GateShape& shape = c_.a.shape;
    const int32_t* experts = c_.a.experts + t * c_.top_k;
    const float* grad = static_cast<const float*>(c_.a.grad_weights) + t * c_.top_k;
    const auto is_used = [&](int j) { return experts[j] >= 0 && experts[j] < c_.num_experts; };
    float total = 0.0f, dot = 0.0f;
    for (int j = lane_index(); shape.normalize && j < c_.top_k; j += kWarp) {
      if (!is_used(j)) continue;
      total += score_[experts[j]];
      dot = fmaf(score_[experts[j]], grad[j], dot);
    }
    total = warp_sum(total);
    dot = warp_sum(dot);
    const bool is_floored = total < kWeightFloor;
    const float divisor = !shape.normalize ? 1.0f : is_floored ? kWeightFloor : total;
    const float mean = shape.normalize && !is_floored ? dot / divisor : 0.0f;
    const float scale = static_cast<float>(shape.scale);
    for (int j = 0; j < c_.top_k; ++j) {
      if (!is_used(j) || experts[j] % kWarp != lane_index()) continue;
      grad_[experts[j]] += scale * ((grad[j] - mean) / divisor);
    }
    __syncwarp();
  }

  __device__ void softmax_backward(int begin, int end) {
    float dot = 0.0f;
    for (int i = begin + lane_index(); i < end; i += kWarp) dot = fmaf(score_[i], grad_[i], dot);
    dot = warp_sum(dot);
    for (int i = begin + lane_index(); i < end; i += kWarp) grad_[i] = score_[i] * (grad_[i] - dot);
  }

  // grad += upstream * softmax(z) of the whole row, which `score_` may hold already.
  __device__ void add_grad_of_logsumexp(float upstream, bool has_softmax) {
    if (has_softmax) {
      for (int i = lane_index(); i < c_.num_columns; i += kWarp) grad_[i] = fmaf(score_[i], upstream, grad_[i]);
      return;
    }
    const float max = max_of(0, c_.num_columns);
    float sum = 0.0f;
    for (int i = lane_index(); i < c_.num_columns; i += kWarp) sum += expf(z_[i] - max);
    sum = warp_sum(sum);
    const float divisor = sum == 0.0f ? 1.0f : sum;
    for (int i = lane_index(); i < c_.num_columns; i += kWarp) {
      grad_[i] = fmaf(expf(z_[i] - max) / divisor, upstream, grad_[i]);
    }
  }

  const BackwardCall& c_;
  float *z_, *score_, *grad_;
};

template <class T>
__global__ void __launch_bounds__(kGateThreads, 1) gate_backward_kernel(const __grid_constant__ BackwardCall call) {
  BackwardRow<T> row(call, warp_memory(call.memory, warp_index()));
  for (int64_t t = grid_warp(); t < call.a.shape.num_tokens; t += grid_warps()) row.run(t);
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kGateThreads, 1)
    gate_backward_fast_kernel(const __grid_constant__ FastBackwardCall call) {
  FastBackwardRow<T, kPerLane> row(call);
  for (int64_t t = grid_warp(); t < call.a.shape.num_tokens; t += grid_warps()) row.run(t);
}

constexpr int64_t kFastMostExperts = 256;

// At most kFastMostExperts logits and a choice a lane; a score of few instructions, of which a row has eight copies.
bool is_fast(const GateShape& shape) {
  const bool is_short =
      shape.score != Score::kSqrtSoftplus && !(shape.score == Score::kSoftmax && shape.softmax_over_group);
  return is_short && shape.num_null == 0 && shape.num_experts <= kFastMostExperts && shape.top_k <= kWarp;
}

template <class T>
CudaStatus gate_backward_fast(const GateBackwardArgs& a, const CudaQueue& queue) {
  constexpr int kFew = 4, kMany = kFastMostExperts / kWarp;
  const int64_t num_experts = a.shape.num_experts;
  FastBackwardCall call{a, static_cast<int>(num_experts), static_cast<int>(a.shape.top_k), false};
  call.in_packs = a.logits.stride_col == 1 && num_experts % 8 == 0 &&
                  are_multiples(kWideBytes, {a.logits.data, a.grad_score_sum, a.grad_scores, a.grad_logits},
                                {a.logits.stride_row}, sizeof(T));
  const auto launch = [&](auto kernel) {
    kernel<<<num_blocks(a.shape.num_tokens, kGateWarps), kGateThreads, 0, queue.stream>>>(call);
    return launched();
  };
  if (num_experts <= kFew * kWarp) return launch(gate_backward_fast_kernel<T, kFew>);
  return launch(gate_backward_fast_kernel<T, kMany>);
}

template <class T>
CudaStatus gate_backward_as(const GateBackwardArgs& a, const CudaQueue& queue) {
  const GateShape& shape = a.shape;
  if (shape.num_tokens == 0) return {};
  if (is_fast(shape)) return gate_backward_fast<T>(a, queue);
  BackwardCall call{};
  call.a = a;
  call.num_columns = static_cast<int>(shape.num_experts + shape.num_null);
  call.num_experts = static_cast<int>(shape.num_experts);
  call.num_parts = shape.score == Score::kSoftmax && shape.softmax_over_group ? static_cast<int>(shape.num_groups) : 1;
  call.top_k = static_cast<int>(shape.top_k);
  call.memory =
      plan_rows(BackwardRow<T>::kBuffers * int64_t{call.num_columns}, 0, ceil_div(shape.num_tokens, kGateWarps), queue);
  return launch_rows<BackwardCall>(gate_backward_kernel<T>, call, call.memory, queue);
}

}  // namespace

CudaStatus gate_backward(const GateBackwardArgs& a, const CudaQueue& queue) {
  switch (a.dtype) {
    case DType::kFloat32: return gate_backward_as<float>(a, queue);
    case DType::kBFloat16: return gate_backward_as<BFloat16>(a, queue);
    case DType::kFloat16: return gate_backward_as<Float16>(a, queue);
    default: return not_supported("logits must be float32, bfloat16 or float16 on CUDA, got float64");
  }
}

}  // namespace cuda
}  // namespace fastmoe_route
