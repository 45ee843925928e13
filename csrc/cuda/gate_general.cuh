// The general way of a row of the gate: every option, any number of experts. A warp has the row in its own memory
// (gate_score.cuh), lane l the columns l, l + 32, ...
// Phases, as on the CPU: load -> scores -> ordered integer keys -> groups -> selection and stop rules -> weights ->
// statistics.
#pragma once

#include "cuda/gate_fast.cuh"
#include "cuda/gate_score.cuh"
#include "cuda/gate_select.cuh"

namespace fastmoe_route {
namespace cuda {

// The call, and what is decided once for all rows.
struct GateCall {
  GateArgs a;
  RowMemory memory;
  int num_columns;
  int num_experts;
  int group_size;
  int num_groups;
  int top_k;
  bool logit_keys;    // choice compares the logits themselves
  bool noisy_scores;  // every column's score under noise is formed
  bool has_top_p;
  bool has_threshold;
  bool counts_groups;  // a choice may close its group
  bool is_ranked;      // all K are chosen and ordered at once
  FastArgs fast;
  unsigned num_tokens;
  unsigned rows_per_tile;
  unsigned num_tiles;
  float* tile_sums;  // [tiles, E], or null

  // Words of a row: ranking; z, score, keys; noisy, noisy_score; group keys, group flags; taken; sums. A fast row uses
  // the first kFastWords of them, and packs of four.
  int64_t row_words() const {
    const int64_t words = (is_ranked ? ranking_words(top_k) : 0) +
                          (a.noise.data != nullptr ? 5 : 3) * int64_t{num_columns} + 2 * num_groups + top_k;
    const int64_t with_sums = (words < kFastWords ? kFastWords : words) + (a.score_sum != nullptr ? num_experts : 0);
    return ceil_div(with_sums, 4) * 4;
  }
};

// One row; every function is for all lanes.
template <class T>
class GeneralRow {
 public:
  __device__ GeneralRow(const GateCall& call, float* memory, int* demand) : c_(call), demand_(demand) {
    float* const end = memory + c_.memory.warp_words;
    const auto give = [&](int64_t words) {
      float* const given = memory;
      memory += words;
      return given;
    };
    ranking_ = give(c_.is_ranked ? ranking_words(c_.top_k) : 0);
    z_ = give(c_.num_columns);
    score_ = give(c_.num_columns);
    keys_ = reinterpret_cast<int*>(give(c_.num_columns));
    noisy_ = c_.a.noise.data != nullptr ? give(c_.num_columns) : z_;
    noisy_score_ = c_.a.noise.data != nullptr ? give(c_.num_columns) : score_;
    group_keys_ = reinterpret_cast<int*>(give(c_.num_groups));
    group_count_ = reinterpret_cast<int*>(give(c_.num_groups));
    taken_ = give(c_.top_k);
    sums_ = end - c_.num_experts;
  }

  __device__ void run(int64_t t) {
    load(t);
    const float sum = form_scores(z_, max_, score_);
    form_keys(t);
    if (has_nan_ && c_.a.shape.score == Score::kSoftmax) poison_scores();
    __syncwarp();
    if (c_.a.topk_groups < c_.num_groups) close_groups();
    Selector selector = c_.is_ranked ? ranked() : Selector(keys_, c_.num_columns);
    const bool is_empty = c_.a.logsumexp != nullptr && selector.is_empty();
    choose(t, selector);
    if (c_.a.scores != nullptr) {
      float* scores = static_cast<float*>(c_.a.scores) + t * c_.num_experts;
      for (int e = own_lane(); e < c_.num_experts; e += kWarp) scores[e] = score_[e];
    }
    if (c_.a.logsumexp != nullptr) write_statistics(t, is_empty, sum);
    __syncwarp();  // the next row writes what lanes have read of each other here
  }

 private:
  __device__ void load(int64_t t) {
    float max = -INFINITY;
    bool is_nan = false;
    for (int i = own_lane(); i < c_.num_columns; i += kWarp) {
      const float z = widen(element<T>(c_.a.logits, t, i));
      z_[i] = z;
      max = larger(max, z);
      is_nan |= isnan(z);
    }
    max_ = warp_max(max);
    has_nan_ = __any_sync(kAllLanes, is_nan);
    __syncwarp();
  }

  __device__ float max_of(const float* z, int begin, int end) const {
    float max = -INFINITY;
    for (int i = begin + own_lane(); i < end; i += kWarp) max = larger(max, z[i]);
    return warp_max(max);
  }

  // out = exp(z - max) over columns [begin, end) unless null; returns the sum.
  __device__ float exponentials(const float* z, int begin, int end, float max, float* out) const {
    float sum = 0.0f;
    for (int i = begin + own_lane(); i < end; i += kWarp) {
      const float e = exponential(z[i], max);
      if (out != nullptr) out[i] = e;
      sum += e;
    }
    return warp_sum(sum);
  }

  __device__ void divide(float* values, int begin, int end, float by) const {
    const float divisor = by == 0.0f ? 1.0f : by;
    for (int i = begin + own_lane(); i < end; i += kWarp) values[i] /= divisor;
  }

  __device__ bool is_grouped_softmax() const { return c_.a.shape.softmax_over_group && c_.num_groups > 1; }

  // Scores of all columns of z, whose largest number is max. Returns the softmax denominator of the whole row where it
  // was formed on the way, else 0.
  __device__ float form_scores(const float* z, float max, float* out) const {
    float sum = 0.0f;
    if (c_.a.shape.score != Score::kSoftmax) {
      for (int i = own_lane(); i < c_.num_columns; i += kWarp) out[i] = elementwise_score(c_.a.shape.score, z[i]);
    } else if (!is_grouped_softmax()) {
      sum = exponentials(z, 0, c_.num_columns, max, out);
      divide(out, 0, c_.num_columns, sum);
    } else {
      for (int begin = 0; begin < c_.num_experts; begin += c_.group_size) {
        const int end = begin + c_.group_size;
        divide(out, begin, end, exponentials(z, begin, end, max_of(z, begin, end), out));
      }
    }
    __syncwarp();
    return sum;
  }

  // keys = ordered(score(logits + noise) + bias), or of the logits + noise where that orders the same. NaN is last of
  // the allowed; -inf logits and masked columns are not allowed.
  __device__ void form_keys(int64_t t) {
    if (c_.a.noise.data != nullptr) {
      float max = -INFINITY;
      for (int i = own_lane(); i < c_.num_columns; i += kWarp) {
        noisy_[i] = z_[i] + element<float>(c_.a.noise, t, i);
        max = larger(max, noisy_[i]);
      }
      max = warp_max(max);
      __syncwarp();
      if (c_.noisy_scores) form_scores(noisy_, max, noisy_score_);
    }
    const float* source = c_.logit_keys ? noisy_ : key_scores();
    for (int i = own_lane(); i < c_.num_columns; i += kWarp) {
      const float bias = c_.a.bias.data != nullptr ? element<float>(c_.a.bias, t, i) : 0.0f;
      const bool is_allowed = z_[i] != -INFINITY && (c_.a.mask.data == nullptr || element<bool>(c_.a.mask, t, i));
      const int key = isnan(noisy_[i]) ? kDisallowed + 1 : ordered_key(source[i] + bias);
      keys_[i] = is_allowed ? key : kDisallowed;
    }
    __syncwarp();  // scores read here may be poisoned by other lanes
  }

  // Scores under noise where there is noise and they are formed, else the clean ones.
  __device__ const float* key_scores() const { return c_.noisy_scores ? noisy_score_ : score_; }

  // A softmax over a NaN is NaN throughout; inside groups, throughout the group.
  __device__ void poison_scores() {
    const int part = is_grouped_softmax() ? c_.group_size : c_.num_columns;
    for (int begin = 0; begin < c_.num_columns; begin += part) {
      bool is_nan = false;
      for (int i = begin + own_lane(); i < begin + part; i += kWarp) is_nan |= isnan(z_[i]);
      if (!__any_sync(kAllLanes, is_nan)) continue;
      for (int i = begin + own_lane(); i < begin + part; i += kWarp) score_[i] = NAN;
    }
  }

  // Disallows every expert outside the best groups.
  __device__ void close_groups() {
    for (int g = 0; g < c_.num_groups; ++g) {
      const int key = group_key(g * c_.group_size);
      if (own_lane() == 0) {
        group_keys_[g] = key;
        group_count_[g] = 0;
      }
    }
    __syncwarp();
    Selector groups(group_keys_, c_.num_groups);
    for (int j = 0; j < c_.a.topk_groups; ++j) {
      int key;
      const int g = groups.take(&key);
      if (g < 0) break;
      if (own_lane() == 0) group_count_[g] = 1;
    }
    __syncwarp();
    for (int i = own_lane(); i < c_.num_experts; i += kWarp)
      if (group_count_[i / c_.group_size] == 0) keys_[i] = kDisallowed;
    __syncwarp();  // whoever counts what a group has given clears the counts
  }

  // Key of the group that starts at column `begin`: of its best key, or of the sum of its two best keys.
  __device__ int group_key(int begin) const {
    const bool is_sum = c_.a.group_score == GroupScore::kTop2Sum;
    int first = kDisallowed, second = kDisallowed;
    for (int i = begin + own_lane(); i < begin + c_.group_size; i += kWarp) {
      int key = keys_[i];
      if (is_sum && c_.logit_keys && key != kDisallowed) key = ordered_key(key_scores()[i]);
      second = max(second, min(first, key));
      first = max(first, key);
    }
    const int best = __reduce_max_sync(kAllLanes, first);
    if (!is_sum || best == kDisallowed) return best;
    const int owner = __ffs(__ballot_sync(kAllLanes, first == best)) - 1;
    const int next = __reduce_max_sync(kAllLanes, own_lane() == owner ? second : first);
    return ordered_key(next == kDisallowed ? key_value(best) : key_value(best) + key_value(next));
  }

  __device__ Selector ranked() {
    int* const order = reinterpret_cast<int*>(ranking_ + ranking_words(c_.top_k) - c_.top_k);
    const int n = rank_best(keys_, c_.num_columns, c_.top_k, reinterpret_cast<uint64_t*>(ranking_), order);
    return Selector(keys_, order, n);
  }

  __device__ int slots_of(int64_t t) const {
    if (c_.a.k_per_token.data == nullptr) return c_.top_k;
    const int wanted = element<int32_t>(c_.a.k_per_token, t, 0);
    return wanted < 0 ? 0 : wanted < c_.top_k ? wanted : c_.top_k;
  }

  // Takes columns best first until the slots, the allowed columns or a stop rule end it, then writes experts and
  // weights. Null columns use up a choice and give no slot.
  __device__ void choose(int64_t t, Selector& selector) {
    const GateArgs& a = c_.a;
    const float top_p = a.top_p_per_token.data ? element<float>(a.top_p_per_token, t, 0) : static_cast<float>(a.top_p);
    const float threshold =
        a.threshold_per_token.data ? element<float>(a.threshold_per_token, t, 0) : static_cast<float>(a.threshold);
    const int limit = slots_of(t);
    int32_t* experts = a.experts + t * c_.top_k;
    if (c_.counts_groups) {
      for (int g = own_lane(); g < c_.num_groups; g += kWarp) group_count_[g] = 0;
      __syncwarp();
    }
    bool is_stopped = false;
    int num_real = 0;
    float cumulative = 0.0f, total = 0.0f;
    for (int j = 0; j < limit; ++j) {
      int key;
      const int column = selector.take(&key);
      if (column < 0) break;
      const float score = score_[column];
      is_stopped |= c_.has_threshold && !((c_.logit_keys ? key_scores()[column] : key_value(key)) > threshold);
      if (is_stopped && num_real >= a.min_k) break;
      cumulative += score;
      is_stopped |= c_.has_top_p && cumulative > top_p;
      if (c_.counts_groups) count_group(column / c_.group_size, selector);
      if (column >= c_.num_experts) continue;
      if (own_lane() == 0) {
        experts[num_real] = column;
        taken_[num_real] = score;
        atomicAdd(demand_ + column, 1);
      }
      total += score;
      ++num_real;
    }
    __syncwarp();
    write_weights(t, num_real, total);
  }

  // Closes a group that has given its share.
  __device__ void count_group(int g, Selector& selector) {
    int count = 0;
    if (own_lane() == 0) count = ++group_count_[g];
    count = __shfl_sync(kAllLanes, count, 0);
    if (count == c_.a.max_per_group) selector.disallow(g * c_.group_size, (g + 1) * c_.group_size);
  }

  __device__ void write_weights(int64_t t, int num_real, float total) {
    float* weights = static_cast<float*>(c_.a.weights) + t * c_.top_k;
    int32_t* experts = c_.a.experts + t * c_.top_k;
    const float divisor = !c_.a.shape.normalize ? 1.0f : total < kWeightFloor ? kWeightFloor : total;
    const float scale = has_nan_ ? NAN : static_cast<float>(c_.a.shape.scale);
    for (int j = own_lane(); j < c_.top_k; j += kWarp) {
      weights[j] = j < num_real ? taken_[j] / divisor * scale : 0.0f;
      if (j >= num_real) experts[j] = -1;
    }
  }

  // A row without an allowed column takes no part.
  __device__ void write_statistics(int64_t t, bool is_empty, float sum) {
    float* logsumexp = static_cast<float*>(c_.a.logsumexp) + t;
    if (is_empty) {
      if (own_lane() == 0) *logsumexp = -INFINITY;
      return;
    }
    if (c_.a.shape.score != Score::kSoftmax || is_grouped_softmax()) {
      sum = exponentials(z_, 0, c_.num_columns, max_, nullptr);
    }
    if (own_lane() == 0) *logsumexp = has_nan_ ? NAN : isinf(max_) ? max_ : max_ + logf(sum);
    for (int e = own_lane(); e < c_.num_experts; e += kWarp) sums_[e] += score_[e];
  }

  const GateCall& c_;
  float *ranking_, *z_, *score_, *noisy_, *noisy_score_, *taken_, *sums_;
  int *keys_, *group_keys_, *group_count_;
  int* demand_;  // [E], the block's or the result
  float max_;    // largest logit that is a number
  bool has_nan_;
};

}  // namespace cuda
}  // namespace fastmoe_route
