// The common case of a row of gate_backward, in registers: at most 256 logits and 32 choices, one softmax or a score
// that is short to write out, no null columns. It follows from the shape alone which rows go this way.
//
// A lane has kPerLane logits, in packs of up to 16 bytes, which are loaded one by one where rows do not lie in packs:
// the same lanes have the same columns, so bits do not depend on the layout. Lane j has slot j; all lanes take the
// slots in turn and add to the column they own, so that an expert named twice is added twice.
#pragma once

#include <type_traits>

#include "cuda/gate_score.cuh"
#include "cuda/gate_select.cuh"

namespace fastmoe_route {
namespace cuda {

struct FastBackwardCall {
  GateBackwardArgs a;
  int num_experts;
  int top_k;
  bool in_packs;  // logits, gradients and result may be loaded and stored so
};

// Every function is for all lanes.
template <class T, int kPerLane>
class FastBackwardRow {
 public:
  static constexpr int kMostColumns = kWarp * kPerLane;
  static constexpr int kPack = kPerLane * sizeof(T) <= 16 ? kPerLane : 16 / sizeof(T);

  __device__ explicit FastBackwardRow(const FastBackwardCall& call) : c_(call) {}

  __device__ void run(int64_t t) {
    const GateBackwardArgs& a = c_.a;
    load(t);
    const bool takes_part = logsumexp_ != -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) grad_[i] = (takes_part ? of_sum_[i] : 0.0f) + grad_[i];
    const bool is_softmax = a.shape.score == Score::kSoftmax;
    if (is_softmax) {
      form_softmax(score_);
    } else {
      elementwise([](auto score, float z, float) { return elementwise_score(score(), z); }, score_);
    }
    if (a.grad_weights != nullptr) add_grad_of_weights();
    if (is_softmax) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) dot = fmaf(score_[i], grad_[i], dot);
      dot = warp_sum(dot);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) grad_[i] = score_[i] * (grad_[i] - dot);
    } else {
      elementwise([](auto score, float z, float grad) { return grad * elementwise_slope(score(), z); }, grad_);
    }
    if (a.grad_logsumexp != nullptr && takes_part) {
      if (!is_softmax) form_softmax(score_);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) grad_[i] = fmaf(score_[i], of_logsumexp_, grad_[i]);
    }
    store(t);
  }

 private:
  // Rises with i.
  __device__ static int column_of(int i) { return i % kPack + i / kPack * (kPack * kWarp) + own_lane() * kPack; }

  // values = formula(score, z, values), a copy of the formula for each score, so that none is chosen column by column.
  template <class Formula>
  __device__ void elementwise(Formula formula, float (&values)[kPerLane]) const {
    const auto form = [&](auto score) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) values[i] = formula(score, z_[i], values[i]);
    };
    switch (c_.a.shape.score) {
      case Score::kSigmoid: return form(std::integral_constant<Score, Score::kSigmoid>{});
      case Score::kRelu: return form(std::integral_constant<Score, Score::kRelu>{});
      default: return form(std::integral_constant<Score, Score::kIdentity>{});
    }
  }

  // All that the row needs, before anything waits for it.
  __device__ void load(int64_t t) {
    const GateBackwardArgs& a = c_.a;
    const bool has_slot = own_lane() < c_.top_k && a.grad_weights != nullptr;
    expert_ = has_slot ? a.experts[t * c_.top_k + own_lane()] : -1;
    of_slot_ = has_slot ? static_cast<const float*>(a.grad_weights)[t * c_.top_k + own_lane()] : 0.0f;
    logsumexp_ = a.logsumexp != nullptr ? static_cast<const float*>(a.logsumexp)[t] : 0.0f;
    of_logsumexp_ = a.grad_logsumexp != nullptr ? static_cast<const float*>(a.grad_logsumexp)[t] : 0.0f;
    load_floats(a.grad_score_sum, 0, of_sum_);
    load_floats(a.grad_scores, t * c_.num_experts, grad_);
    if (c_.in_packs) {
      const T* const row = static_cast<const T*>(a.logits.data) + t * a.logits.stride_row;
#pragma unroll
      for (int p = 0; p < kPerLane; p += kPack) {
        Pack<T, kPack> pack{};
        const bool is_there = column_of(p) < c_.num_experts;
        if (is_there) pack = *reinterpret_cast<const Pack<T, kPack>*>(row + column_of(p));
#pragma unroll
        for (int n = 0; n < kPack; ++n) z_[p + n] = is_there ? widen(pack.values[n]) : -INFINITY;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        z_[i] = column_of(i) < c_.num_experts ? widen(element<T>(a.logits, t, column_of(i))) : -INFINITY;
      }
    }
  }

  // Those of the lane's columns from `begin` on; zeros where there are none.
  __device__ void load_floats(const void* from, int64_t begin, float (&values)[kPerLane]) const {
    constexpr int kFloats = 4;
    const float* const row = static_cast<const float*>(from) + begin;
#pragma unroll
    for (int p = 0; p < kPerLane; p += kFloats) {
      Pack<float, kFloats> pack{};
      if (from != nullptr && c_.in_packs) {
        if (column_of(p) < c_.num_experts) pack = *reinterpret_cast<const Pack<float, kFloats>*>(row + column_of(p));
      } else if (from != nullptr) {
#pragma unroll
        for (int n = 0; n < kFloats; ++n) {
          if (column_of(p + n) < c_.num_experts) pack.values[n] = row[column_of(p + n)];
        }
      }
#pragma unroll
      for (int n = 0; n < kFloats; ++n) values[p + n] = pack.values[n];
    }
  }

  __device__ void store(int64_t t) const {
    T* const row = static_cast<T*>(c_.a.grad_logits) + t * c_.num_experts;
#pragma unroll
    for (int p = 0; p < kPerLane; p += kPack) {
      Pack<T, kPack> pack;
#pragma unroll
      for (int n = 0; n < kPack; ++n) pack.values[n] = narrow<T>(z_[p + n] == -INFINITY ? 0.0f : grad_[p + n]);
      if (c_.in_packs) {
        if (column_of(p) < c_.num_experts) store_pack(row + column_of(p), pack);
      } else {
#pragma unroll
        for (int n = 0; n < kPack; ++n) {
          if (column_of(p + n) < c_.num_experts) row[column_of(p + n)] = pack.values[n];
        }
      }
    }
  }

  // Of a row of only -inf all are 0, a NaN makes all NaN.
  __device__ void form_softmax(float (&p)[kPerLane]) const {
    float max = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) max = larger(max, z_[i]);
    max = warp_max(max);
    max = max == -INFINITY ? 0.0f : max;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      p[i] = expf(z_[i] - max);
      sum += p[i];
    }
    sum = warp_sum(sum);
    const float factor = 1.0f / (sum == 0.0f ? 1.0f : sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) p[i] *= factor;
  }

  __device__ void add_grad_of_weights() {
    const GateShape& shape = c_.a.shape;
    const int expert = expert_ < c_.num_experts ? expert_ : -1;
    float sum[kPerLane], count[kPerLane];  // of the slots that name the column
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum[i] = count[i] = 0.0f;
#pragma unroll 4
    for (int j = 0; j < c_.top_k; ++j) {
      const int named = __shfl_sync(kAllLanes, expert, j);
      const float grad = __shfl_sync(kAllLanes, of_slot_, j);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (column_of(i) != named) continue;
        sum[i] += grad;
        count[i] += 1.0f;
      }
    }
    float divisor = 1.0f, mean = 0.0f;
    if (shape.normalize) {
      float total = 0.0f, dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (count[i] == 0.0f) continue;
        total = fmaf(score_[i], count[i], total);
        dot = fmaf(score_[i], sum[i], dot);
      }
      total = warp_sum(total);
      dot = warp_sum(dot);
      const bool is_floored = total < kWeightFloor;
      divisor = is_floored ? kWeightFloor : total;
      mean = is_floored ? 0.0f : dot / divisor;
    }
    const float factor = static_cast<float>(shape.scale) / divisor;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (count[i] != 0.0f) grad_[i] = fmaf(factor, fmaf(-count[i], mean, sum[i]), grad_[i]);
    }
  }

  const FastBackwardCall& c_;
  int expert_;
  float of_slot_, logsumexp_, of_logsumexp_;
  float z_[kPerLane], score_[kPerLane], grad_[kPerLane], of_sum_[kPerLane];
};

}  // namespace cuda
}  // namespace fastmoe_route
