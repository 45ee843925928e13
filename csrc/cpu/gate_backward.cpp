// gate_backward on the CPU: one read of the logits gives the gradient of all four differentiable outputs.
//
// Per row, the gradients of the scores G = grad_score_sum + grad_scores + (chosen ones) d weights / d score, then
//   softmax:      dz = p (G - <p, G>), inside each group for a softmax over groups
//   elementwise:  dz = G s'(z)
// plus grad_logsumexp * softmax(z). The choice is a constant. The chosen part of G is kept apart, so that no row of G is
// written. Where nothing but the weights is differentiated, and these are a normalised softmax or an elementwise score,
// dz is zero outside the chosen and no other column's score is formed: a softmax's denominator cancels.
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
        is_sparse_(!a_.grad_score_sum && !a_.grad_scores && !a_.grad_logsumexp &&
                   (!is_softmax_ || (num_parts_ == 1 && shape_.normalize))) {
    Float* next = reinterpret_cast<Float*>(memory);
    for (Float** buffer : {&logits_, &scores_, &grad_scores_, &grad_z_}) *buffer = next, next += padded_;
    for (Float** buffer : {&taken_z_, &taken_scores_, &grad_taken_}) *buffer = next, next += padded_k(shape_);
  }

  static int64_t bytes(const GateShape& shape) {
    const int64_t padded = round_up(shape.num_experts + shape.num_null, V::kLanes);
    return round_up((4 * padded + 3 * padded_k(shape)) * static_cast<int64_t>(sizeof(Float)), 64);
  }

  template <class T>
  void run(int64_t t) {
    row_ = load_row<V>(a_.dtype, a_.logits, t, num_columns_, logits_);
    experts_ = a_.experts + t * shape_.top_k;
    grad_weights_ = row_of(a_.grad_weights, t, shape_.top_k);
    num_chosen_ = 0;
    while (grad_weights_ != nullptr && num_chosen_ < shape_.top_k && experts_[num_chosen_] >= 0) ++num_chosen_;
    T* out = static_cast<T*>(a_.grad_logits) + t * num_columns_;
    if (is_sparse_ && sparse()) {
      write(out, [](int64_t) { return V::zero(); });
      for (int64_t j = 0; j < num_chosen_; ++j) out[experts_[j]] = rounded<T>(grad_taken_[j]);
      return;
    }
    if constexpr (std::is_same_v<T, Float>) {
      if (num_columns_ == padded_) return dense(t, out);
    }
    dense(t, grad_z_);
    write(out, [&](int64_t i) { return V::load(grad_z_ + i); });
  }

 private:
  static int64_t padded_k(const GateShape& shape) { return round_up(shape.top_k, V::kLanes); }
  static int lanes_at(int64_t i, int64_t n) { return static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes); }
  static const Float* row_of(const void* rows, int64_t t, int64_t n) {
    return rows != nullptr ? static_cast<const Float*>(rows) + t * n : nullptr;
  }

  // out = f(first column) by vectors of columns.
  template <class T, class F>
  void write(T* out, const F& f) const {
    int64_t i = 0;
    for (; i + V::kLanes <= num_columns_; i += V::kLanes) f(i).store(out + i);
    if (i < num_columns_) f(i).store(out + i, lanes_at(i, num_columns_));
  }

  // grad_taken_ = the gradients at the chosen, all others being zero. False where the general formula has to be used:
  // NaN, and for softmax +inf or scores near the floor.
  bool sparse() {
    if (num_chosen_ == 0) return true;
    if (row_.has_nan) return false;
    // Past the chosen, a logit whose score is 0.
    const Float none = shape_.score == Score::kIdentity ? 0 : -static_cast<Float>(INFINITY);
    const V shift = V::all(row_.max);
    for (int64_t j = 0; j < num_chosen_; ++j) taken_z_[j] = row_.z[experts_[j]];
    for (int64_t j = 0; j < num_chosen_; j += V::kLanes) {
      const V z = V::load(taken_z_ + j, lanes_at(j, num_chosen_), none);
      (is_softmax_ ? exp_nonpositive(z - shift) : elementwise_score(shape_.score, z)).store(taken_scores_ + j);
    }
    const Float sum = form_grad_taken();
    if (is_softmax_ && !(sum > static_cast<Float>(kSafeSum))) return false;
    for (int64_t j = 0; j < num_chosen_; j += V::kLanes) {
      const V slope = is_softmax_ ? V::load(taken_scores_ + j) : elementwise_slope(shape_.score, V::load(taken_z_ + j));
      (V::load(grad_taken_ + j) * slope).store(grad_taken_ + j);
    }
    return true;
  }

  // grad_taken_ = the gradients of taken_scores_, which are 0 up to a whole vector. Returns the sum of these.
  Float form_grad_taken() {
    V total = V::zero(), dot = V::zero();
    for (int64_t j = 0; j < num_chosen_; j += V::kLanes) {
      const V score = V::load(taken_scores_ + j);
      total = total + score;
      dot = fma(score, V::load(grad_weights_ + j, lanes_at(j, num_chosen_)), dot);
    }
    const Float sum = reduce_add(total);
    const bool is_floored = sum < static_cast<Float>(kWeightFloor);
    const Float divisor = !shape_.normalize ? 1 : is_floored ? static_cast<Float>(kWeightFloor) : sum;
    const V mean = V::all(shape_.normalize && !is_floored ? reduce_add(dot) / divisor : 0);
    const V factor = V::all(static_cast<Float>(shape_.scale) / divisor);
    for (int64_t j = 0; j < num_chosen_; j += V::kLanes)
      ((V::load(grad_weights_ + j, lanes_at(j, num_chosen_)) - mean) * factor).store(grad_taken_ + j);
    return sum;
  }

  // grad_z = the gradients of all columns; room for whole vectors.
  void dense(int64_t t, Float* grad_z) {
    const bool takes_part = a_.logsumexp == nullptr || *row_of(a_.logsumexp, t, 1) != -static_cast<Float>(INFINITY);
    const Float* of_logsumexp = takes_part ? row_of(a_.grad_logsumexp, t, 1) : nullptr;
    const Float* of_scores = grad_scores(t, takes_part);
    if (is_softmax_) softmax_backward(of_scores, num_parts_ == 1 ? of_logsumexp : nullptr, grad_z);
    else elementwise_backward(of_scores, grad_z);
    if (of_logsumexp != nullptr && (!is_softmax_ || num_parts_ > 1)) {
      const Float sum = exponentials<V>(row_.z, num_columns_, row_.max, false, scores_);
      const V grad = V::all(*of_logsumexp * inverse_of(sum));
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        fma(V::load(scores_ + i), grad, V::load(grad_z + i)).store(grad_z + i);
    }
    if (row_.is_plain) return;
    const V minus_inf = V::all(-INFINITY);
    for (int64_t i = 0; i < padded_; i += V::kLanes)
      select(V::load(row_.z + i) == minus_inf, V::zero(), V::load(grad_z + i)).store(grad_z + i);
  }

  // The gradients of all scores but for what the weights add to the chosen; null where there are none.
  const Float* grad_scores(int64_t t, bool takes_part) const {
    const Float* of_sum = takes_part ? static_cast<const Float*>(a_.grad_score_sum) : nullptr;
    const Float* of_scores = row_of(a_.grad_scores, t, shape_.num_experts);
    if (shape_.num_null == 0 && of_sum == nullptr) return of_scores;
    if (shape_.num_null == 0 && of_scores == nullptr) return of_sum;
    for (int64_t i = 0; i < num_columns_; ++i) grad_scores_[i] = 0;
    for (int64_t i = 0; of_sum != nullptr && i < shape_.num_experts; ++i) grad_scores_[i] += of_sum[i];
    for (int64_t i = 0; of_scores != nullptr && i < shape_.num_experts; ++i) grad_scores_[i] += of_scores[i];
    return grad_scores_;
  }

  // scores_ times `factor` are the scores: sets taken_scores_ and their gradients.
  void take_scores(Float factor) {
    for (int64_t j = 0; j < num_chosen_; ++j) taken_scores_[j] = scores_[experts_[j]] * factor;
    for (int64_t j = num_chosen_; j % V::kLanes != 0; ++j) taken_scores_[j] = 0;
    form_grad_taken();
  }

  void softmax_backward(const Float* of_scores, const Float* of_logsumexp, Float* grad_z) {
    const int64_t part = num_columns_ / num_parts_;
    Float factor = 1;
    if (num_parts_ == 1) {
      factor = inverse_of(exponentials<V>(row_.z, num_columns_, row_.max, false, scores_));
    } else {
      for (int64_t i = 0; i < num_columns_; i += part) {
        const Float sum = exponentials<V>(row_.z + i, part, max_of(row_.z + i, part), false, scores_ + i);
        scale_by<V>(scores_ + i, part, inverse_of(sum));
      }
    }
    take_scores(factor);
    for (int64_t begin = 0; begin < num_columns_; begin += part) {
      Float mean = of_scores != nullptr ? factor * dot(scores_ + begin, of_scores + begin, part) : 0;
      for (int64_t j = 0; j < num_chosen_; ++j)
        if (experts_[j] >= begin && experts_[j] < begin + part) mean += taken_scores_[j] * grad_taken_[j];
      const V shift = V::all(of_logsumexp != nullptr ? *of_logsumexp - mean : -mean);
      const V by = V::all(factor);
      for (int64_t i = begin; i < begin + part; i += V::kLanes) {
        const int lanes = lanes_at(i, begin + part);
        const V grad = of_scores != nullptr ? V::load(of_scores + i, lanes) + shift : shift;
        (V::load(scores_ + i, lanes) * by * grad).store(grad_z + i, lanes);
      }
    }
    for (int64_t j = 0; j < num_chosen_; ++j) grad_z[experts_[j]] += taken_scores_[j] * grad_taken_[j];
  }

  static Float dot(const Float* a, const Float* b, int64_t n) {
    V even = V::zero(), odd = V::zero();
    int64_t i = 0;
    for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
      even = fma(V::load(a + i), V::load(b + i), even);
      odd = fma(V::load(a + i + V::kLanes), V::load(b + i + V::kLanes), odd);
    }
    for (; i < n; i += V::kLanes) even = fma(V::load(a + i, lanes_at(i, n)), V::load(b + i, lanes_at(i, n)), even);
    return reduce_add(even + odd);
  }

  void elementwise_backward(const Float* of_scores, Float* grad_z) {
    for (int64_t i = 0; num_chosen_ > 0 && i < padded_; i += V::kLanes)
      elementwise_score(shape_.score, V::load(row_.z + i)).store(scores_ + i);
    take_scores(1);
    for (int64_t i = 0; i < padded_; i += V::kLanes) {
      const V slope = elementwise_slope(shape_.score, V::load(row_.z + i));
      slope.store(scores_ + i);
      const V grad = of_scores != nullptr ? V::load(of_scores + i, lanes_at(i, num_columns_)) : V::zero();
      (grad * slope).store(grad_z + i);
    }
    for (int64_t j = 0; j < num_chosen_; ++j) grad_z[experts_[j]] += scores_[experts_[j]] * grad_taken_[j];
  }

  GateBackwardArgs a_;
  GateShape shape_;
  int64_t num_columns_, padded_;
  bool is_softmax_;
  int64_t num_parts_;
  bool is_sparse_;
  // Of columns: buffers for the logits, scores or their slopes, gradients; of slots: logits, scores, gradients.
  Float *logits_, *scores_, *grad_scores_, *grad_z_, *taken_z_, *taken_scores_, *grad_taken_;
  // Of the row in work. No chosen where the weights have no gradient.
  RowOf<V> row_;
  const int32_t* experts_ = nullptr;
  const Float* grad_weights_ = nullptr;
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
