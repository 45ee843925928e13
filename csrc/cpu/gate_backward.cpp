// gate_backward on the CPU: one read of the logits gives the gradient of all four differentiable outputs.
//
// Per row, the gradients of the scores G = grad_score_sum + grad_scores + (chosen ones) d weights / d score, then
//   softmax:      dz = p (G - <p, G>), inside each group for a softmax over groups
//   elementwise:  dz = G s'(z)
// plus grad_logsumexp * softmax(z). The choice is a constant. A normalised softmax whose weights are the only thing
// differentiated needs no denominator: dz is zero outside the chosen, w (g - <w, g>) on them.
#include <initializer_list>
#include <type_traits>

#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/gate_score.h"
#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr double kWeightFloor = 1e-20;
// Chosen scores that sum to this much, beside the row's largest, are far above the floor whatever the denominator.
constexpr double kSafeSum = 1e-13;

template <class T, class Float>
T rounded(Float value) {
  if constexpr (std::is_same_v<T, double>) return value;
  else return from_float<T>(static_cast<float>(value));
}

template <class V>
class GateBackward {
 public:
  using Float = typename Arithmetic<V>::Float;

  GateBackward(const GateBackwardArgs& args, char* memory)
      : a_(args), shape_(args.shape), num_columns_(shape_.num_experts + shape_.num_null),
        padded_(round_up(num_columns_, V::kLanes)), is_softmax_(shape_.score == Score::kSoftmax),
        num_parts_(is_softmax_ && shape_.softmax_over_group ? shape_.num_groups : 1),
        weights_only_(is_softmax_ && num_parts_ == 1 && shape_.normalize && !a_.grad_score_sum && !a_.grad_scores &&
                      !a_.grad_logsumexp) {
    Float* next = reinterpret_cast<Float*>(memory);
    for (Float** buffer : {&z_, &score_, &grad_score_, &grad_z_}) *buffer = next, next += padded_ + V::kLanes;
    grad_weight_ = next;
  }

  static int64_t bytes(const GateShape& shape) {
    const int64_t padded = round_up(shape.num_experts + shape.num_null, V::kLanes) + V::kLanes;
    return round_up((4 * padded + shape.top_k + V::kLanes) * static_cast<int64_t>(sizeof(Float)), 64);
  }

  template <class T>
  void run(int64_t t) {
    const RowOf<V> row = load_row<V>(a_.dtype, a_.logits, t, num_columns_, z_);
    experts_ = a_.experts + t * shape_.top_k;
    num_chosen_ = 0;
    while (num_chosen_ < shape_.top_k && experts_[num_chosen_] >= 0) ++num_chosen_;
    T* out = static_cast<T*>(a_.grad_logits) + t * num_columns_;
    if (weights_only_ && sparse(t, row)) return write_chosen(out);
    dense(t);
    write(out, [&](int64_t i) { return V::load(grad_z_ + i); });
  }

 private:
  // out = f(first column) by vectors of columns.
  template <class T, class F>
  void write(T* out, const F& f) const {
    int64_t i = 0;
    for (; i + V::kLanes <= num_columns_; i += V::kLanes) f(i).store(out + i);
    if (i < num_columns_) f(i).store(out + i, lanes_at(i, num_columns_));
  }

  template <class T>
  void write_chosen(T* out) const {
    write(out, [](int64_t) { return V::zero(); });
    for (int64_t j = 0; j < num_chosen_; ++j) out[experts_[j]] = rounded<T>(grad_weight_[j]);
  }

  static int lanes_at(int64_t i, int64_t n) { return static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes); }

  const Float* grad_weights(int64_t t) const {
    return a_.grad_weights != nullptr ? static_cast<const Float*>(a_.grad_weights) + t * shape_.top_k : nullptr;
  }

  // The normalised-softmax case: grad_weight_ = the gradients at the chosen. False where the general formula has to be
  // used (NaN, +inf, or scores near the floor).
  bool sparse(int64_t t, const RowOf<V>& row) {
    const Float* grad = grad_weights(t);
    if (grad == nullptr) num_chosen_ = 0;
    if (num_chosen_ == 0) return true;
    if (row.has_nan) return false;
    for (int64_t j = 0; j < num_chosen_; ++j) grad_weight_[j] = z_[experts_[j]];
    const V shift = V::all(row.max);
    V total = V::zero(), dot = V::zero();
    for (int64_t j = 0; j < num_chosen_; j += V::kLanes) {
      const int lanes = lanes_at(j, num_chosen_);
      const V weight = exp_nonpositive(V::load(grad_weight_ + j, lanes, -INFINITY) - shift);
      weight.store(grad_weight_ + j);
      total = total + weight;
      dot = fma(weight, V::load(grad + j, lanes), dot);
    }
    const Float sum = reduce_add(total);
    if (!(sum > static_cast<Float>(kSafeSum))) return false;
    const V mean = V::all(reduce_add(dot) / sum);
    const V factor = V::all(static_cast<Float>(shape_.scale) / sum);
    for (int64_t j = 0; j < num_chosen_; j += V::kLanes) {
      const V over_mean = V::load(grad + j, lanes_at(j, num_chosen_)) - mean;
      (V::load(grad_weight_ + j) * factor * over_mean).store(grad_weight_ + j);
    }
    return true;
  }

  void dense(int64_t t) {
    const bool takes_part =
        a_.logsumexp == nullptr || static_cast<const Float*>(a_.logsumexp)[t] != -static_cast<Float>(INFINITY);
    form_scores();
    form_grad_scores(t, takes_part);
    if (is_softmax_) {
      const int64_t part = num_columns_ / num_parts_;
      for (int64_t begin = 0; begin < num_columns_; begin += part) softmax_backward(begin, part);
    } else {
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        (V::load(grad_score_ + i) * elementwise_slope(shape_.score, V::load(z_ + i))).store(grad_z_ + i);
    }
    if (a_.grad_logsumexp != nullptr && takes_part) {
      if (!is_softmax_ || num_parts_ > 1) softmax_of(0, num_columns_);
      const V grad = V::all(static_cast<const Float*>(a_.grad_logsumexp)[t]);
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        fma(V::load(score_ + i), grad, V::load(grad_z_ + i)).store(grad_z_ + i);
    }
    const V minus_inf = V::all(-INFINITY);
    for (int64_t i = 0; i < padded_; i += V::kLanes)
      select(V::load(z_ + i) == minus_inf, V::zero(), V::load(grad_z_ + i)).store(grad_z_ + i);
  }

  void form_scores() {
    if (!is_softmax_) {
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        elementwise_score(shape_.score, V::load(z_ + i)).store(score_ + i);
      return;
    }
    const int64_t part = num_columns_ / num_parts_;
    for (int64_t begin = 0; begin < num_columns_; begin += part) softmax_of(begin, part);
  }

  // score = softmax of columns [begin, begin + n); a part of only -inf gives 0.
  void softmax_of(int64_t begin, int64_t n) {
    V largest = V::all(-INFINITY);
    for (int64_t i = begin; i < begin + n; i += V::kLanes)
      largest = max(largest, V::load(z_ + i, lanes_at(i, begin + n), -INFINITY));
    const Float best = reduce_max(largest);
    const V shift = V::all(best == -static_cast<Float>(INFINITY) ? 0 : best);
    V total = V::zero();
    for (int64_t i = begin; i < begin + n; i += V::kLanes) {
      const int lanes = lanes_at(i, begin + n);
      const V e = exp(V::load(z_ + i, lanes, -INFINITY) - shift);
      e.store(score_ + i, lanes);
      total = total + e;
    }
    const Float sum = reduce_add(total);
    const V divisor = V::all(sum == 0 ? 1 : sum);
    for (int64_t i = begin; i < begin + n; i += V::kLanes) {
      const int lanes = lanes_at(i, begin + n);
      (V::load(score_ + i, lanes) / divisor).store(score_ + i, lanes);
    }
  }

  void form_grad_scores(int64_t t, bool takes_part) {
    const Float* of_sum = takes_part ? static_cast<const Float*>(a_.grad_score_sum) : nullptr;
    const Float* of_scores =
        a_.grad_scores != nullptr ? static_cast<const Float*>(a_.grad_scores) + t * shape_.num_experts : nullptr;
    for (int64_t i = 0; i < padded_; ++i) grad_score_[i] = 0;
    for (int64_t i = 0; of_sum != nullptr && i < shape_.num_experts; ++i) grad_score_[i] += of_sum[i];
    for (int64_t i = 0; of_scores != nullptr && i < shape_.num_experts; ++i) grad_score_[i] += of_scores[i];
    const Float* grad = grad_weights(t);
    if (grad == nullptr) return;
    const Float scale = static_cast<Float>(shape_.scale);
    Float total = 0, dot = 0;
    for (int64_t j = 0; j < num_chosen_; ++j) {
      total += score_[experts_[j]];
      dot += score_[experts_[j]] * grad[j];
    }
    const bool is_floored = total < static_cast<Float>(kWeightFloor);
    const Float divisor = !shape_.normalize ? 1 : is_floored ? static_cast<Float>(kWeightFloor) : total;
    const Float mean = shape_.normalize && !is_floored ? dot / divisor : 0;
    for (int64_t j = 0; j < num_chosen_; ++j) grad_score_[experts_[j]] += scale * ((grad[j] - mean) / divisor);
  }

  void softmax_backward(int64_t begin, int64_t n) {
    V dot = V::zero();
    for (int64_t i = begin; i < begin + n; i += V::kLanes) {
      const int lanes = lanes_at(i, begin + n);
      dot = fma(V::load(score_ + i, lanes), V::load(grad_score_ + i, lanes), dot);
    }
    const V mean = V::all(reduce_add(dot));
    for (int64_t i = begin; i < begin + n; i += V::kLanes) {
      const int lanes = lanes_at(i, begin + n);
      (V::load(score_ + i, lanes) * (V::load(grad_score_ + i, lanes) - mean)).store(grad_z_ + i, lanes);
    }
  }

  GateBackwardArgs a_;
  GateShape shape_;
  int64_t num_columns_, padded_;
  bool is_softmax_;
  int64_t num_parts_;
  bool weights_only_;
  Float *z_, *score_, *grad_score_, *grad_z_, *grad_weight_;
  const int32_t* experts_ = nullptr;
  int64_t num_chosen_ = 0;
};

template <class V, class T>
void backward_rows(const GateBackwardArgs& args) {
  constexpr int64_t kGrain = 32;
  const int64_t num_tokens = args.shape.num_tokens;
  const int64_t bytes = GateBackward<V>::bytes(args.shape);
  int64_t workers = (num_tokens + kGrain - 1) / kGrain;
  workers = workers < num_threads() ? workers : num_threads();
  char* memory = static_cast<char*>(scratch(Scratch::kGateRows, workers * bytes));
  parallel_workers(workers, [&](int worker) {
    GateBackward<V> backward(args, memory + worker * bytes);
    const int64_t end = num_tokens * (worker + 1) / workers;
    for (int64_t t = num_tokens * worker / workers; t < end; ++t) backward.template run<T>(t);
  });
}

}  // namespace

void gate_backward(const GateBackwardArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32: return backward_rows<Vec, float>(args);
    case DType::kBFloat16: return backward_rows<Vec, BFloat16>(args);
    case DType::kFloat16: return backward_rows<Vec, Float16>(args);
    case DType::kFloat64: return backward_rows<Vec64, double>(args);
  }
}

FASTMOE_ROUTE_ISA_END
