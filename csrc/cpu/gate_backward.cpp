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

constexpr double kWeightFloor = 1e-20;
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
  Float* buffer;   // of columns
  Float *taken_z, *taken_scores, *grad_taken;
};

template <class V>
class GateBackward {
 public:
  using Float = typename Arithmetic<V>::Float;
  using Row = BackwardRow<V>;

  GateBackward(const GateBackwardArgs& args, char* memory)
      : a_(args), shape_(args.shape), num_columns_(shape_.num_experts + shape_.num_null),
        padded_(round_up(num_columns_, V::kLanes)), is_softmax_(shape_.score == Score::kSoftmax),
        num_parts_(is_softmax_ && shape_.softmax_over_group ? shape_.num_groups : 1),
        is_sparse_(!a_.grad_score_sum && !a_.grad_scores && !a_.grad_logsumexp &&
                   (!is_softmax_ || (num_parts_ == 1 && shape_.normalize))) {
    Float* next = reinterpret_cast<Float*>(memory);
    const auto give = [&](Float*& buffer, int64_t count) { buffer = next, next += count; };
    for (Float** buffer : {&scores_, &grad_scores_, &grad_z_}) give(*buffer, padded_);
    for (Row& row : rows_) {
      give(row.buffer, padded_);
      for (Float** buffer : {&row.taken_z, &row.taken_scores, &row.grad_taken}) give(*buffer, padded_k(shape_));
    }
  }

  static int64_t bytes(const GateShape& shape) {
    const int64_t padded = round_up(shape.num_experts + shape.num_null, V::kLanes);
    return round_up(((3 + kBatch) * padded + 3 * kBatch * padded_k(shape)) * static_cast<int64_t>(sizeof(Float)), 64);
  }

  // Rows [begin, end), several side by side: what is stored by elements has to rest before it is loaded as a vector.
  template <class T>
  void run(int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += kBatch) {
      const int64_t count = end - t < kBatch ? end - t : kBatch;
      for (int64_t r = 0; r < count; ++r) read(rows_[r], t + r);
      for (int64_t r = 0; r < count; ++r) rows_[r].is_sparse = is_sparse_ && sparse(rows_[r]);
      for (int64_t r = 0; r < count; ++r)
        finish(rows_[r], t + r, static_cast<T*>(a_.grad_logits) + (t + r) * num_columns_);
    }
  }

 private:
  static constexpr int kBatch = V::kLanes > 1 ? 4 : 1;

  static int64_t padded_k(const GateShape& shape) { return round_up(shape.top_k, V::kLanes); }
  static const Float* row_of(const void* rows, int64_t t, int64_t n) {
    return rows != nullptr ? static_cast<const Float*>(rows) + t * n : nullptr;
  }

  void read(Row& row, int64_t t) const {
    row.logits = load_row<V>(a_.dtype, a_.logits, t, num_columns_, row.buffer);
    row.experts = a_.experts + t * shape_.top_k;
    row.grad_weights = row_of(a_.grad_weights, t, shape_.top_k);
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

  // grad_taken = the gradients at the chosen, all others being zero. False where the general formula has to be used:
  // NaN, and for softmax +inf or scores near the floor.
  bool sparse(const Row& row) const {
    if (row.num_chosen == 0) return true;
    if (row.logits.has_nan) return false;
    // Past the chosen, a logit whose score is 0.
    const Float none = shape_.score == Score::kIdentity ? 0 : -static_cast<Float>(INFINITY);
    const V shift = V::all(row.logits.max);
    for (int64_t j = 0; j < row.num_chosen; j += V::kLanes) {
      const V z = V::load(row.taken_z + j, lanes_at<V>(j, row.num_chosen), none);
      (is_softmax_ ? exp_nonpositive(z - shift) : elementwise_score(shape_.score, z)).store(row.taken_scores + j);
    }
    const Float sum = form_grad_taken(row);
    if (is_softmax_ && !(sum > static_cast<Float>(kSafeSum))) return false;
    for (int64_t j = 0; j < row.num_chosen; j += V::kLanes) {
      const V slope =
          is_softmax_ ? V::load(row.taken_scores + j) : elementwise_slope(shape_.score, V::load(row.taken_z + j));
      (V::load(row.grad_taken + j) * slope).store(row.grad_taken + j);
    }
    return true;
  }

  // grad_taken = the gradients of taken_scores, which are 0 up to a whole vector. Returns the sum of these where the
  // weights are divided by it.
  Float form_grad_taken(const Row& row) const {
    Float sum = 1, mean = 0, divisor = 1;
    if (shape_.normalize) {
      V total = V::zero(), dot = V::zero();
      for (int64_t j = 0; j < row.num_chosen; j += V::kLanes) {
        const V score = V::load(row.taken_scores + j);
        total = total + score;
        dot = fma(score, V::load(row.grad_weights + j, lanes_at<V>(j, row.num_chosen)), dot);
      }
      sum = reduce_add(total);
      const bool is_floored = sum < static_cast<Float>(kWeightFloor);
      divisor = is_floored ? static_cast<Float>(kWeightFloor) : sum;
      mean = is_floored ? 0 : reduce_add(dot) / divisor;
    }
    const V factor = V::all(static_cast<Float>(shape_.scale) / divisor);
    for (int64_t j = 0; j < row.num_chosen; j += V::kLanes) {
      const V over_mean = V::load(row.grad_weights + j, lanes_at<V>(j, row.num_chosen)) - V::all(mean);
      (over_mean * factor).store(row.grad_taken + j);
    }
    return sum;
  }

  // grad_z = the gradients of all columns; room for whole vectors.
  void dense(const Row& row, int64_t t, Float* grad_z) const {
    const bool takes_part = a_.logsumexp == nullptr || *row_of(a_.logsumexp, t, 1) != -static_cast<Float>(INFINITY);
    const Float* of_logsumexp = takes_part ? row_of(a_.grad_logsumexp, t, 1) : nullptr;
    const Float* of_scores = grad_scores(t, takes_part);
    if (is_softmax_) softmax_backward(row, of_scores, num_parts_ == 1 ? of_logsumexp : nullptr, grad_z);
    else elementwise_backward(row, of_scores, grad_z);
    if (of_logsumexp != nullptr && (!is_softmax_ || num_parts_ > 1)) {
      const Float sum = exponentials<V>(row.logits.z, num_columns_, row.logits.max, false, scores_);
      const V grad = V::all(*of_logsumexp * inverse_of(sum));
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        fma(V::load(scores_ + i), grad, V::load(grad_z + i)).store(grad_z + i);
    }
    if (row.logits.is_plain) return;
    const V minus_inf = V::all(-INFINITY);
    for (int64_t i = 0; i < padded_; i += V::kLanes)
      select(V::load(row.logits.z + i) == minus_inf, V::zero(), V::load(grad_z + i)).store(grad_z + i);
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

  // scores_ over `divisor` are the scores: sets taken_scores and their gradients.
  void take_scores(const Row& row, Float divisor) const {
    for (int64_t j = 0; j < row.num_chosen; ++j) row.taken_scores[j] = scores_[row.experts[j]] / divisor;
    for (int64_t j = row.num_chosen; j % V::kLanes != 0; ++j) row.taken_scores[j] = 0;
    form_grad_taken(row);
  }

  void softmax_backward(const Row& row, const Float* of_scores, const Float* of_logsumexp, Float* grad_z) const {
    const int64_t part = num_columns_ / num_parts_;
    Float divisor = 1;
    if (num_parts_ == 1) {
      const Float sum = exponentials<V>(row.logits.z, num_columns_, row.logits.max, false, scores_);
      divisor = sum == 0 ? 1 : sum;
    } else {
      for (int64_t i = 0; i < num_columns_; i += part) {
        const Float sum = exponentials<V>(row.logits.z + i, part, max_of(row.logits.z + i, part), false, scores_ + i);
        scale_by<V>(scores_ + i, part, inverse_of(sum));
      }
    }
    take_scores(row, divisor);
    const Float factor = 1 / divisor;
    for (int64_t begin = 0; begin < num_columns_; begin += part) {
      const auto is_here = [&](int64_t j) { return row.experts[j] >= begin && row.experts[j] < begin + part; };
      Float mean = of_scores != nullptr ? factor * dot(scores_ + begin, of_scores + begin, part) : 0;
      Float of_chosen[2] = {0, 0};
      for (int64_t j = 0; j < row.num_chosen; ++j)
        if (is_here(j)) of_chosen[j % 2] += row.taken_scores[j] * row.grad_taken[j];
      mean += of_chosen[0] + of_chosen[1];
      const Float over_mean = of_logsumexp != nullptr ? *of_logsumexp - mean : -mean;
      const V shift = V::all(over_mean);
      const V by = V::all(factor);
      for (int64_t i = begin; i < begin + part; i += V::kLanes) {
        const int lanes = lanes_at<V>(i, begin + part);
        const V grad = of_scores != nullptr ? V::load(of_scores + i, lanes) + shift : shift;
        (V::load(scores_ + i, lanes) * by * grad).store(grad_z + i, lanes);
      }
      // Formed anew: a sum of two products would lose what cancels between the gradient and the mean.
      for (int64_t j = 0; j < row.num_chosen; ++j) {
        const Float other = of_scores != nullptr ? of_scores[row.experts[j]] : 0;
        if (is_here(j)) grad_z[row.experts[j]] = row.taken_scores[j] * (other + row.grad_taken[j] + over_mean);
      }
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
    for (int64_t i = 0; row.num_chosen > 0 && i < padded_; i += V::kLanes)
      elementwise_score(shape_.score, V::load(row.logits.z + i)).store(scores_ + i);
    take_scores(row, 1);
    for (int64_t i = 0; i < padded_; i += V::kLanes) {
      const V slope = elementwise_slope(shape_.score, V::load(row.logits.z + i));
      slope.store(scores_ + i);
      const V grad = of_scores != nullptr ? V::load(of_scores + i, lanes_at<V>(i, num_columns_)) : V::zero();
      (grad * slope).store(grad_z + i);
    }
    for (int64_t j = 0; j < row.num_chosen; ++j) grad_z[row.experts[j]] += scores_[row.experts[j]] * row.grad_taken[j];
  }

  GateBackwardArgs a_;
  GateShape shape_;
  int64_t num_columns_, padded_;
  bool is_softmax_;
  int64_t num_parts_;
  bool is_sparse_;
  Float *scores_, *grad_scores_, *grad_z_;  // of columns; scores or their slopes
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
  switch (args.dtype) {
    case DType::kFloat32: return backward_rows<Vec, float>(args);
    case DType::kBFloat16: return backward_rows<Vec, BFloat16>(args);
    case DType::kFloat16: return backward_rows<Vec, Float16>(args);
    case DType::kFloat64: return backward_rows<Vec64, double>(args);
  }
}

FASTMOE_ROUTE_ISA_END
