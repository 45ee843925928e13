// Scores of a row, and the keys by which its columns are chosen.
#pragma once

#include "cpu/gate_row.h"

FASTMOE_ROUTE_ISA_BEGIN

template <class V>
class GateKeys {
 public:
  using Float = typename Arithmetic<V>::Float;
  using Key = typename Arithmetic<V>::Key;
  using KeyVec = typename Arithmetic<V>::KeyVec;

  explicit GateKeys(const GateArgs& args)
      : args_(args), shape_(args.shape), needs_(args), num_columns_(shape_.num_experts + shape_.num_null),
        padded_(padded_columns<V>(shape_)), group_size_(shape_.num_experts / shape_.num_groups) {
    adds_plain_bias_ =
        shape_.score != Score::kSoftmax && !args_.noise.data && padded_ == num_columns_ && is_plain_bias();
  }

  // Scores of row t, and keys unless its logits decide, with what may not be chosen disallowed.
  void form(GateRow<V>& row, int64_t t) const {
    row.is_direct = needs_.logits_only && row.is_plain;
    row.key_scores = row.scores;
    if (adds_plain_bias_ && row.is_plain) return form_biased_keys(row, t);
    if (needs_.scores) row.sum = form_scores(row.z, row.max, row.has_nan, row.scores);
    else if (needs_.softmax_sum) row.sum = sum_of_exponentials<V>(row.z, num_columns_, row.max, row.has_nan);
    row.factor = needs_.softmax_sum && (needs_.late_scale || !needs_.scores) ? inverse_of(row.sum) : 1;
    if (!row.is_direct) form_keys(row, t);
    if (row.has_nan && needs_.scores && shape_.score == Score::kSoftmax) poison_scores(row);
  }

  // keys = ordered(score(logits + noise) + bias), or ordered(logits + noise) where that orders the same. NaN is last
  // of the allowed; -inf logits and masked columns are not allowed.
  void form_keys(GateRow<V>& row, int64_t t) const {
    const Float* z = row.z;
    if (args_.noise.data != nullptr) {
      add_noise(row, row_of<Float>(args_.noise, t));
      z = row.noisy;
      if (needs_.noisy_scores) {
        form_scores(row.noisy, max_of(row.noisy, num_columns_), true, row.noisy_scores);
        row.key_scores = row.noisy_scores;
      }
    }
    const Float* source = needs_.logit_keys ? z : row.key_scores;
    if (args_.bias.data != nullptr) {
      add_bias(row, source, row_of<Float>(args_.bias, t));
      source = row.biased;
    }
    const bool is_plain =
        row.is_plain && args_.noise.data == nullptr && args_.bias.data == nullptr && needs_.logit_keys;
    const int64_t plain = is_plain ? num_columns_ / V::kLanes * V::kLanes : 0;
    for (int64_t i = 0; i < plain; i += V::kLanes) number_keys(V::load(z + i)).store(row.keys + i);
    const V nan = V::all(NAN);
    const V minus_inf = V::all(-INFINITY);
    for (int64_t i = plain; i < padded_; i += V::kLanes) {
      const V key = select(is_nan(V::load(z + i)), nan, V::load(source + i));
      select(V::load(row.z + i) == minus_inf, KeyVec::all(kDisallowed), ordered_keys(key)).store(row.keys + i);
    }
    apply_mask(row, t);
  }

 private:
  static constexpr Key kDisallowed = Arithmetic<V>::kDisallowed;

  // Scores of all columns of z, whose largest number is max_z; NaN logits count as -inf, so that the others stay
  // ordered. Returns the softmax denominator where there is one of the whole row.
  Float form_scores(const Float* z, Float max_z, bool may_have_nan, Float* out) const {
    if (shape_.score != Score::kSoftmax) {
      for (int64_t i = 0; i < padded_; i += V::kLanes) elementwise_score(shape_.score, V::load(z + i)).store(out + i);
      return 0;
    }
    if (!shape_.softmax_over_group) {
      const Float total = exponentials<V>(z, num_columns_, max_z, may_have_nan, out);
      if (!needs_.late_scale) scale_by<V>(out, num_columns_, inverse_of(total));
      return total;
    }
    for (int64_t begin = 0; begin < shape_.num_experts; begin += group_size_) {
      const Float best = max_of(z + begin, group_size_);
      const Float total = exponentials<V>(z + begin, group_size_, best, may_have_nan, out + begin);
      scale_by<V>(out + begin, group_size_, inverse_of(total));
    }
    return max_z == -static_cast<Float>(INFINITY) || args_.logsumexp == nullptr
               ? 0
               : sum_of_exponentials<V>(z, num_columns_, max_z, may_have_nan);
  }

  void add_noise(GateRow<V>& row, const Float* noise) const {
    for (int64_t i = 0; i < num_columns_; ++i) row.noisy[i] = row.z[i] + noise[i * args_.noise.stride_col];
    for (int64_t i = num_columns_; i < padded_; ++i) row.noisy[i] = -static_cast<Float>(INFINITY);
  }

  void add_bias(GateRow<V>& row, const Float* source, const Float* bias) const {
    if (args_.bias.stride_col == 1) {
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        (V::load(source + i) + V::load(bias + i, lanes_at<V>(i, num_columns_))).store(row.biased + i);
      return;
    }
    for (int64_t i = 0; i < num_columns_; ++i) row.biased[i] = source[i] + bias[i * args_.bias.stride_col];
    for (int64_t i = num_columns_; i < padded_; ++i) row.biased[i] = 0;
  }

  void apply_mask(GateRow<V>& row, int64_t t) const {
    if (args_.mask.data == nullptr) return;
    const bool* mask = row_of<bool>(args_.mask, t);
    for (int64_t i = 0; i < num_columns_; ++i)
      if (!mask[i * args_.mask.stride_col]) row.keys[i] = kDisallowed;
  }

  // Whether the bias is one row of finite numbers.
  bool is_plain_bias() const {
    if (args_.bias.data == nullptr || args_.bias.stride_row != 0 || args_.bias.stride_col != 1) return false;
    const Float* bias = static_cast<const Float*>(args_.bias.data);
    bool is_plain = true;
    for (int64_t i = 0; i < num_columns_; ++i) is_plain &= bias[i] - bias[i] == 0;
    return is_plain;
  }

  // Scores and keys in one pass, where no key can be NaN or disallowed but by the mask.
  void form_biased_keys(GateRow<V>& row, int64_t t) const {
    const Float* bias = static_cast<const Float*>(args_.bias.data);
    row.factor = 1;
    const auto pass = [&](const auto& of, const auto& key_of) {
      const Float* z = row.z;
      Float* scores = row.scores;
      Key* keys = row.keys;
      for (int64_t i = 0; i < padded_; i += V::kLanes) {
        const V score = of(V::load(z + i));
        score.store(scores + i);
        key_of(score + V::load(bias + i)).store(keys + i);
      }
    };
    // A score that is no -0 leaves no -0 of the sum.
    const auto of_sum = [](V sum) { return KeyVec::of_bits(sum).flip_negative(); };
    if (shape_.score == Score::kSigmoid) pass([](V z) { return sigmoid(z); }, of_sum);
    else pass([&](V z) { return elementwise_score(shape_.score, z); }, [](V sum) { return number_keys(sum); });
    apply_mask(row, t);
  }

  // A softmax over a NaN is NaN throughout; inside groups, throughout the group.
  void poison_scores(GateRow<V>& row) const {
    const int64_t part = shape_.softmax_over_group ? group_size_ : num_columns_;
    for (int64_t begin = 0; begin < num_columns_; begin += part) {
      bool has_nan = false;
      for (int64_t i = begin; i < begin + part; ++i) has_nan |= row.z[i] != row.z[i];
      for (int64_t i = begin; has_nan && i < begin + part; ++i) row.scores[i] = static_cast<Float>(NAN);
    }
  }

  const GateArgs& args_;
  GateShape shape_;
  GateNeeds needs_;
  int64_t num_columns_, padded_, group_size_;
  bool adds_plain_bias_;  // an elementwise score plus one row of finite numbers is the key
};

FASTMOE_ROUTE_ISA_END
