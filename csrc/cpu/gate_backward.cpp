// gate_backward on the CPU: one read of the logits gives the gradient of all four differentiable outputs.
//
// Per row, the gradients of the scores G = grad_score_sum + grad_scores + (chosen ones) d weights / d score, then
//   softmax:      dz = p (G - <p, G>), inside each group for a softmax over groups
//   elementwise:  dz = G s'(z)
// plus grad_logsumexp * softmax(z). The choice is a constant. The chosen part of G is kept apart, so that no row of G
// is written. Where nothing but the weights is differentiated, and these are a normalised softmax or an elementwise
// score, dz is zero outside the chosen and no other column's score is formed: a softmax's denominator cancels.
#include <initializer_list>
#include <type_traits>

#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/gate_score.h"
#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

// Chosen scores that sum to this much, beside the row's largest, are far above the floor whatever the denominator.
constexpr double kSafeSum = 1e-13;

template <class T, class Float>
T rounded(Float value) {
  if constexpr (std::is_same_v<T, double>) return value;
  else return from_float<T>(static_cast<float>(value));
}

// A row in flight. No chosen where the weights have no gradient; buffers of slots are whole vectors.
template <class V>
struct BackwardRow {
  using Float = typename Arithmetic<V>::Float;
  RowOf<V> logits;
  const int32_t* experts;
  const Float* grad_weights;
  int64_t num_chosen;
  bool is_sparse;  // grad_taken is all there is
  // Of columns: logits, and probabilities, or exponentials to divide by `sum`.
  Float *buffer, *scores;
  Float sum;
  Float *taken_z, *taken_scores, *grad_taken;
  Float mean_of_taken;  // the sum of taken_scores times grad_taken
};

// From the gradients g of the weights to those of the chosen scores: scale (g - mean) / sum if the weights are divided
// by the sum of the scores, with mean the sum of g times the weights before they are scaled; scale g otherwise.
template <class V>
struct ScoreGradient {
  using Float = typename Arithmetic<V>::Float;
  Float sum = 1;
  V mean = V::zero(), factor;

  // The sums over lanes of `scores` and of `dots`, scores times g, are the row's.
  ScoreGradient(const GateShape& shape, V scores, V dots) {
    Float divisor = 1;
    if (shape.normalize) {
      sum = reduce_add(scores);
      const bool is_floored = sum < static_cast<Float>(kWeightFloor);
      divisor = is_floored ? static_cast<Float>(kWeightFloor) : sum;
      if (!is_floored) mean = V::all(reduce_add(dots) / divisor);
    }
    factor = V::all(static_cast<Float>(shape.scale) / divisor);
  }
  V of(V grad_weights) const { return (grad_weights - mean) * factor; }
};

template <class V>
class GateBackward {
 public:
  using Float = typename Arithmetic<V>::Float;
  using Row = BackwardRow<V>;

  GateBackward(const GateBackwardArgs& args, char* memory)
      : args_(args), shape_(args.shape), num_columns_(shape_.num_experts + shape_.num_null),
        padded_(round_up(num_columns_, V::kLanes)), is_softmax_(shape_.score == Score::kSoftmax),
        num_parts_(is_softmax_ && shape_.softmax_over_group ? shape_.num_groups : 1), part_(num_columns_ / num_parts_),
        is_sparse_(!args_.grad_score_sum && !args_.grad_scores && !args_.grad_logsumexp &&
                   (!is_softmax_ || (num_parts_ == 1 && shape_.normalize))) {
    Float* next = reinterpret_cast<Float*>(memory);
    const auto give = [&](Float*& buffer, int64_t count) { buffer = next, next += count; };
    for (Float** buffer : {&grad_scores_, &grad_z_}) give(*buffer, padded_);
    for (Row& row : rows_) give(row.buffer, padded_);
    for (Row& row : rows_) give(row.scores, padded_);
    for (Row& row : rows_)
      for (Float** buffer : {&row.taken_z, &row.taken_scores, &row.grad_taken}) give(*buffer, padded_k(shape_));
  }

  static int64_t bytes(const GateShape& shape) {
    const int64_t padded = round_up(shape.num_experts + shape.num_null, V::kLanes);
    return round_up(((2 + 2 * kBatch) * padded + 3 * kBatch * padded_k(shape)) * static_cast<int64_t>(sizeof(Float)),
                    64);
  }

  // Rows [begin, end), several side by side, phase by phase: while one row waits for a sum, another works; and what is
  // stored by elements has to rest before it is loaded as a vector.
  template <class T>
  void run(int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += kBatch) {
      const int64_t count = end - t < kBatch ? end - t : kBatch;
      for (int64_t r = 0; r < count; ++r) read(rows_[r], t + r);
      for (int64_t r = 0; r < count; ++r) rows_[r].is_sparse = is_sparse_ && sparse(rows_[r]);
      for (int64_t r = 0; r < count; ++r)
        if (!rows_[r].is_sparse) form_scores(rows_[r]);
      for (int64_t r = 0; r < count; ++r)
        if (!rows_[r].is_sparse) weigh(rows_[r]);
      for (int64_t r = 0; r < count; ++r)
        finish(rows_[r], t + r, static_cast<T*>(args_.grad_logits) + (t + r) * num_columns_);
    }
  }

 private:
  static constexpr int kBatch = V::kLanes > 1 ? 4 : 1;

  static int64_t padded_k(const GateShape& shape) { return round_up(shape.top_k, V::kLanes); }
  static const Float* row_of(const void* rows, int64_t t, int64_t n) {
    return rows != nullptr ? static_cast<const Float*>(rows) + t * n : nullptr;
  }

  void read(Row& row, int64_t t) const {
    if (is_sparse_) load_row<V>(args_.dtype, args_.logits, t, num_columns_, row.buffer, row.logits);
    else load_row<V, true>(args_.dtype, args_.logits, t, num_columns_, row.buffer, row.logits);
    row.experts = args_.experts + t * shape_.top_k;
    row.grad_weights = row_of(args_.grad_weights, t, shape_.top_k);
    int64_t j = 0;
    for (; row.grad_weights != nullptr && j < shape_.top_k && row.experts[j] >= 0; ++j)
      row.taken_z[j] = row.logits.z[row.experts[j]];
    row.num_chosen = j;
  }

  template <class T>
  void finish(const Row& row, int64_t t, T* out) {
    if (row.is_sparse) {
      write(out, [](int64_t) { return V::zero(); });
      for (int64_t j = 0; j < row.num_chosen; ++j) out[row.experts[j]] = rounded<T>(row.grad_taken[j]);
      return;
    }
    if constexpr (std::is_same_v<T, Float>) {
      if (num_columns_ == padded_) return dense(row, t, out);
    }
    dense(row, t, grad_z_);
    write(out, [&](int64_t i) { return V::load(grad_z_ + i); });
  }

  // out = f(first column) by vectors of columns.
  template <class T, class F>
  void write(T* out, const F& f) const {
    int64_t i = 0;
    for (; i + V::kLanes <= num_columns_; i += V::kLanes) f(i).store(out + i);
    if (i < num_columns_) f(i).store(out + i, lanes_at<V>(i, num_columns_));
  }

  // The chosen logits from slot j on; past them, a logit whose score is 0.
  V taken_z(const Row& row, int64_t j) const {
    const Float none = shape_.score == Score::kIdentity ? 0 : -static_cast<Float>(INFINITY);
    return V::load(row.taken_z + j, lanes_at<V>(j, row.num_chosen), none);
  }

  // Calls use(j, scores, their gradients) for vectors of chosen slots, the scores from j on being score_of(j), 0 past
  // the chosen. Returns the sum of the scores where the weights are divided by it.
  template <class ScoreOf, class Use>
  Float weigh_chosen(const Row& row, const ScoreOf& score_of, const Use& use) const {
    const int64_t count = row.num_chosen;
    if (count == 0) return 1;
    const auto grad_weights = [&](int64_t j) { return V::load(row.grad_weights + j, lanes_at<V>(j, count)); };
    if (count <= V::kLanes) {  // all in registers
      const V scores = score_of(0), grads = grad_weights(0);
      const ScoreGradient<V> gradient(shape_, scores, scores * grads);
      use(0, scores, gradient.of(grads));
      return gradient.sum;
    }
    V total = V::zero(), dots = V::zero();
    for (int64_t j = 0; j < count; j += V::kLanes) {
      const V scores = score_of(j);
      total = total + scores;
      dots = fma(scores, grad_weights(j), dots);
    }
    const ScoreGradient<V> gradient(shape_, total, dots);
    for (int64_t j = 0; j < count; j += V::kLanes) use(j, score_of(j), gradient.of(grad_weights(j)));
    return gradient.sum;
  }

  // grad_taken = what the weights give to the chosen logits of an elementwise score.
  void weigh_elementwise(const Row& row) const {
    weigh_chosen(
        row, [&](int64_t j) { return elementwise_score(shape_.score, taken_z(row, j)); },
        [&](int64_t j, V, V grad) {
          (grad * elementwise_slope(shape_.score, taken_z(row, j))).store(row.grad_taken + j);
        });
  }

  // grad_taken = the gradients at the chosen, all others being zero. False where the general formula has to be used:
  // NaN, and for softmax +inf or scores near the floor.
  bool sparse(const Row& row) const {
    if (row.num_chosen == 0) return true;
    if (row.logits.has_nan) return false;
    if (!is_softmax_) return weigh_elementwise(row), true;
    const V shift = V::all(row.logits.max);
    const Float sum = weigh_chosen(
        row, [&](int64_t j) { return exp_of_difference(taken_z(row, j) - shift); },
        [&](int64_t j, V scores, V grad) { (grad * scores).store(row.grad_taken + j); });
    return sum > static_cast<Float>(kSafeSum);
  }

  // The probabilities of a softmax over groups; over all columns, exponentials.
  void form_scores(Row& row) const {
    const Float* z = row.logits.z;
    if (is_softmax_ && num_parts_ == 1)
      row.sum = exponentials<V>(z, num_columns_, row.logits.max, false, row.scores, row.logits.is_near);
    for (int64_t i = 0; num_parts_ > 1 && i < num_columns_; i += part_) {
      const Float sum = exponentials<V>(z + i, part_, max_of(z + i, part_), false, row.scores + i);
      scale_by<V>(row.scores + i, part_, inverse_of(sum));
    }
  }

  // grad_taken = what the weights give to the chosen: to their scores for softmax, else to their logits.
  void weigh(Row& row) const {
    if (!is_softmax_) return weigh_elementwise(row);
    V dots = V::zero();
    const auto keep = [&](int64_t j, V scores, V grad) {
      scores.store(row.taken_scores + j), grad.store(row.grad_taken + j);
      dots = fma(scores, grad, dots);
    };
    if (num_parts_ == 1) {
      const V shift = V::all(shift_of(row.logits.max)), divisor = V::all(row.sum == 0 ? 1 : row.sum);
      weigh_chosen(row, [&](int64_t j) { return exp_of_difference(taken_z(row, j) - shift) / divisor; }, keep);
    } else {
      for (int64_t j = 0; j < row.num_chosen; ++j) row.taken_scores[j] = row.scores[row.experts[j]];
      for (int64_t j = row.num_chosen; j % V::kLanes != 0; ++j) row.taken_scores[j] = 0;
      weigh_chosen(row, [&](int64_t j) { return V::load(row.taken_scores + j); }, keep);
    }
    row.mean_of_taken = reduce_add(dots);
  }

  // grad_z = the gradients of all columns; room for whole vectors.
  void dense(const Row& row, int64_t t, Float* grad_z) const {
    const bool takes_part =
        args_.logsumexp == nullptr || *row_of(args_.logsumexp, t, 1) != -static_cast<Float>(INFINITY);
    const Float* of_logsumexp = takes_part ? row_of(args_.grad_logsumexp, t, 1) : nullptr;
    const Float* of_scores = grad_scores(t, takes_part);
    if (!is_softmax_) elementwise_backward(row, of_scores, grad_z);
    else if (num_parts_ > 1) groups_backward(row, of_scores, grad_z);
    else {
      const Float of_row = of_logsumexp != nullptr ? *of_logsumexp : 0;
      part_backward(row, 0, inverse_of(row.sum), of_row - row.mean_of_taken, of_scores, grad_z);
    }
    if (of_logsumexp != nullptr && (!is_softmax_ || num_parts_ > 1)) {
      const Float sum = exponentials<V>(row.logits.z, num_columns_, row.logits.max, false, row.scores);
      const V grad = V::all(*of_logsumexp * inverse_of(sum));
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        fma(V::load(row.scores + i), grad, V::load(grad_z + i)).store(grad_z + i);
    }
    if (row.logits.is_plain) return;
    const V minus_inf = V::all(-INFINITY);
    for (int64_t i = 0; i < padded_; i += V::kLanes)
      select(V::load(row.logits.z + i) == minus_inf, V::zero(), V::load(grad_z + i)).store(grad_z + i);
  }

  // The gradients of all scores but for what the weights add to the chosen; null where there are none.
  const Float* grad_scores(int64_t t, bool takes_part) const {
    const Float* of_sum = takes_part ? static_cast<const Float*>(args_.grad_score_sum) : nullptr;
    const Float* of_scores = row_of(args_.grad_scores, t, shape_.num_experts);
    if (shape_.num_null == 0 && of_sum == nullptr) return of_scores;
    if (shape_.num_null == 0 && of_scores == nullptr) return of_sum;
    for (int64_t i = 0; i < num_columns_; ++i) grad_scores_[i] = 0;
    for (int64_t i = 0; of_sum != nullptr && i < shape_.num_experts; ++i) grad_scores_[i] += of_sum[i];
    for (int64_t i = 0; of_scores != nullptr && i < shape_.num_experts; ++i) grad_scores_[i] += of_scores[i];
    return grad_scores_;
  }

  void groups_backward(const Row& row, const Float* of_scores, Float* grad_z) const {
    for (int64_t begin = 0; begin < num_columns_; begin += part_) {
      Float of_chosen = 0;
      for (int64_t j = 0; j < row.num_chosen; ++j)
        if (row.experts[j] >= begin && row.experts[j] < begin + part_)
          of_chosen += row.taken_scores[j] * row.grad_taken[j];
      part_backward(row, begin, 1, -of_chosen, of_scores, grad_z);
    }
  }

  // The part of a softmax that begins at column `begin`, whose probabilities are `factor` row.scores. `of_row`: the
  // gradient of logsumexp less what the chosen add to the mean.
  void part_backward(const Row& row, int64_t begin, Float factor, Float of_row, const Float* of_scores,
                     Float* grad_z) const {
    const Float mean = of_scores != nullptr ? factor * dot(row.scores + begin, of_scores + begin, part_) : 0;
    const Float over_mean = of_row - mean;
    const V shift = V::all(over_mean);
    const V by = V::all(factor);
    for (int64_t i = begin; i < begin + part_; i += V::kLanes) {
      const int lanes = lanes_at<V>(i, begin + part_);
      const V grad = of_scores != nullptr ? V::load(of_scores + i, lanes) + shift : shift;
      (V::load(row.scores + i, lanes) * by * grad).store(grad_z + i, lanes);
    }
    // Formed anew: a sum of two products would lose what cancels between the gradient and the mean.
    for (int64_t j = 0; j < row.num_chosen; ++j) {
      const int64_t e = row.experts[j];
      const Float other = of_scores != nullptr ? of_scores[e] : 0;
      if (e >= begin && e < begin + part_) grad_z[e] = row.taken_scores[j] * (other + row.grad_taken[j] + over_mean);
    }
  }

  static Float dot(const Float* a, const Float* b, int64_t n) {
    V even = V::zero(), odd = V::zero();
    int64_t i = 0;
    for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
      even = fma(V::load(a + i), V::load(b + i), even);
      odd = fma(V::load(a + i + V::kLanes), V::load(b + i + V::kLanes), odd);
    }
    for (; i < n; i += V::kLanes)
      even = fma(V::load(a + i, lanes_at<V>(i, n)), V::load(b + i, lanes_at<V>(i, n)), even);
    return reduce_add(even + odd);
  }

  void elementwise_backward(const Row& row, const Float* of_scores, Float* grad_z) const {
    const bool has_slopes = of_scores != nullptr || row.logits.has_nan;  // 0 times a slope of NaN is NaN
    for (int64_t i = 0; i < padded_; i += V::kLanes) {
      V grad = of_scores != nullptr ? V::load(of_scores + i, lanes_at<V>(i, num_columns_)) : V::zero();
      if (has_slopes) grad = grad * elementwise_slope(shape_.score, V::load(row.logits.z + i));
      grad.store(grad_z + i);
    }
    for (int64_t j = 0; j < row.num_chosen; ++j) grad_z[row.experts[j]] += row.grad_taken[j];
  }

  GateBackwardArgs args_;
  GateShape shape_;
  int64_t num_columns_, padded_;
  bool is_softmax_;
  int64_t num_parts_, part_;  // of the columns, that each have a softmax of their own
  bool is_sparse_;
  Float *grad_scores_, *grad_z_;  // of columns
  Row rows_[kBatch];
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
    backward.template run<T>(num_tokens * worker / workers, num_tokens * (worker + 1) / workers);
  });
}

}  // namespace

void gate_backward(const GateBackwardArgs& args) {
  dispatch_element(args.dtype, [&](auto element) {
    using T = decltype(element);
    backward_rows<vector_t<T>, T>(args);
  });
}

FASTMOE_ROUTE_ISA_END
