// Weights of the chosen experts, and the scores that are kept.
#pragma once

#include "cpu/gate_row.h"

FASTMOE_ROUTE_ISA_BEGIN

template <class V>
class GateWeights {
 public:
  using Float = typename Arithmetic<V>::Float;
  using Key = typename Arithmetic<V>::Key;
  using KeyVec = typename Arithmetic<V>::KeyVec;

  explicit GateWeights(const GateArgs& args) : args_(args), shape_(args.shape), needs_(args) {}

  // Weights of row t, whose chosen keys are given, and its scores where they are kept.
  void weigh(GateRow<V>& row, int64_t t, const Key* taken_keys) const {
    Float* weights = static_cast<Float*>(args_.weights) + t * shape_.top_k;
    if (needs_.weigh_keys) weigh_keys(row, taken_keys, weights);
    else weigh_scores(row, weights);
    for (int64_t j = row.num_chosen; j < shape_.top_k; ++j) weights[j] = 0;
    if (args_.scores != nullptr) copy_scores(row, static_cast<Float*>(args_.scores) + t * shape_.num_experts);
  }

 private:
  // Weights that are functions of the keys.
  void weigh_keys(const GateRow<V>& row, const Key* taken_keys, Float* weights) const {
    const int64_t num_chosen = row.num_chosen;
    const bool is_softmax = shape_.score == Score::kSoftmax;
    const V shift = V::all(row.max);
    const V factor = V::all(row.factor);
    const V minus_inf = V::all(-INFINITY);  // its score is 0
    const V scale = V::all(row.has_nan ? static_cast<Float>(NAN) : static_cast<Float>(shape_.scale));
    const bool is_one_vector = shape_.top_k <= V::kLanes;
    V total = V::zero();
    for (int64_t j = 0; j < num_chosen; j += V::kLanes) {
      V z = KeyVec::load(taken_keys + j).flip_negative().as_floats();
      if (num_chosen - j < V::kLanes)
        z = select_lanes((1u << (num_chosen - j)) - 1u, KeyVec::of_bits(z), KeyVec::of_bits(minus_inf)).as_floats();
      V s = is_softmax ? exp_of_difference(z - shift) * factor : elementwise_score(shape_.score, z);
      if (shape_.normalize && is_one_vector) s = s / V::all(floored(reduce_add(s)));
      if (!shape_.normalize || is_one_vector) (s * scale).store(weights + j, lanes_at<V>(j, num_chosen));
      else s.store(row.taken_scores + j), total = total + s;
    }
    if (shape_.normalize && !is_one_vector) {
      const V divisor = V::all(floored(reduce_add(total)));
      for (int64_t j = 0; j < num_chosen; j += V::kLanes)
        (V::load(row.taken_scores + j) / divisor * scale).store(weights + j, lanes_at<V>(j, num_chosen));
    }
  }

  static Float floored(Float sum) {
    return sum < static_cast<Float>(kWeightFloor) ? static_cast<Float>(kWeightFloor) : sum;
  }

  // Weights from taken_scores: the chosen alone, for a subnormal number behind them would cost the division 150 cycles.
  void weigh_scores(GateRow<V>& row, Float* weights) const {
    if (!needs_.scores) score_taken(row, row.num_chosen);
    Float divisor = 1;
    if (shape_.normalize) {
      divisor = 0;
      for (int64_t j = 0; j < row.num_chosen; ++j) divisor += row.taken_scores[j];
      divisor = floored(divisor);
    }
    const V scale = V::all(row.has_nan ? static_cast<Float>(NAN) : static_cast<Float>(shape_.scale));
    for (int64_t j = 0; j < row.num_chosen; j += V::kLanes) {
      const int lanes = lanes_at<V>(j, row.num_chosen);
      (V::load(row.taken_scores + j, lanes) / V::all(divisor) * scale).store(weights + j, lanes);
    }
  }

  // Logits of taken columns to their scores; softmax up to the denominator where that is not formed.
  void score_taken(GateRow<V>& row, int64_t count) const {
    const V shift = V::all(row.max);
    const V factor = V::all(row.factor);
    for (int64_t j = 0; j < count; j += V::kLanes) {
      const V z = V::load(row.taken_scores + j, lanes_at<V>(j, count));
      const V s =
          shape_.score == Score::kSoftmax ? exp_of_difference(z - shift) * factor : elementwise_score(shape_.score, z);
      s.store(row.taken_scores + j);
    }
  }

  void copy_scores(const GateRow<V>& row, Float* to) const {
    const V factor = V::all(row.factor);
    for (int64_t i = 0; i < shape_.num_experts; i += V::kLanes) {
      const int lanes = lanes_at<V>(i, shape_.num_experts);
      (V::load(row.scores + i, lanes) * factor).store(to + i, lanes);
    }
  }

  const GateArgs& args_;
  GateShape shape_;
  GateNeeds needs_;
};

FASTMOE_ROUTE_ISA_END
