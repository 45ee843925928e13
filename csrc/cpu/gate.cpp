// gate on the CPU: one row at a time, in the first-level cache, one read of the logits.
//
// Phases of a row: load -> scores (only if something needs them) -> ordered integer keys -> groups -> selection ->
// stop rules -> weights -> statistics. A softmax gate that is normalised and keeps no statistics never forms the
// denominator: it cancels, so only the chosen logits are exponentiated.
// Threads own contiguous tiles of rows. score_sum is summed inside tiles whose size depends on T only and then over
// tiles in order, so its bits do not depend on the number of threads.
// Bytes: logits once, outputs once; scratch is a few rows per thread.
#include <cmath>

#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/gate_select.h"
#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr double kWeightFloor = 1e-20;

int64_t rows_per_tile(int64_t num_tokens) {
  const int64_t rows = (num_tokens + 1023) / 1024;
  return rows > 64 ? rows : 64;
}

// Which parts of the general algorithm this call needs: decided once, not per row.
struct Needs {
  bool logit_keys;     // choice compares the logits themselves
  bool scores;         // every column's score is formed
  bool noisy_scores;   // and every column's score under noise
  bool softmax_sum;    // the softmax denominator is formed

  explicit Needs(const GateArgs& a) {
    const GateShape& shape = a.shape;
    const bool softmax = shape.score == Score::kSoftmax;
    const bool monotone = shape.score != Score::kRelu && !(softmax && shape.softmax_over_group);
    const bool restricted = a.bias.data || a.mask.data || a.noise.data || shape.num_groups > 1 ||
                            a.max_per_group < shape.top_k;
    const bool stops = a.top_p_per_token.data || a.threshold_per_token.data || a.top_p < INFINITY ||
                       a.threshold > -INFINITY;
    const bool sums_groups = a.topk_groups < shape.num_groups && a.group_score == GroupScore::kTop2Sum;
    logit_keys = monotone && !a.bias.data;
    scores = !logit_keys || a.score_sum || a.scores || stops || sums_groups;
    noisy_scores = a.noise.data && (!logit_keys || stops || sums_groups);
    softmax_sum = softmax && (scores || a.logsumexp || restricted || shape.num_null > 0 || !shape.normalize);
  }
};

template <class V>
struct RowBuffers {
  using Float = typename Arithmetic<V>::Float;
  using Key = typename Arithmetic<V>::Key;
  Float *logits, *scores, *biased, *noisy, *noisy_scores, *taken_scores;
  Key *keys, *block_max, *group_keys, *group_block_max, *group_taken, *taken_keys;
  int32_t *taken, *group_order, *group_count, *demand;

  // Carves the buffers out of `memory`, or only counts when it is null; returns the bytes.
  size_t carve(char* memory, const GateShape& shape) {
    const int64_t columns = round_up(shape.num_experts + shape.num_null, V::kLanes);
    const int64_t blocks = Selector<V>::num_blocks(columns);
    const int64_t groups = round_up(shape.num_groups, V::kLanes);
    char* next = memory;
    const auto give = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
      next += round_up(count * static_cast<int64_t>(sizeof *pointer), 64);
    };
    give(logits, columns), give(scores, columns), give(biased, columns), give(noisy, columns), give(noisy_scores, columns);
    give(taken_scores, shape.top_k + V::kLanes);
    give(keys, columns), give(block_max, blocks);
    give(group_keys, groups), give(group_block_max, Selector<V>::num_blocks(groups));
    give(group_taken, shape.num_groups);
    give(taken_keys, shape.top_k), give(taken, shape.top_k);
    give(group_order, shape.num_groups), give(group_count, shape.num_groups);
    give(demand, shape.num_experts);
    return static_cast<size_t>(next - memory);
  }
};

// Largest of n logits without NaN, -inf if there is none; and whether there was a NaN. n whole vectors.
template <class V>
typename Arithmetic<V>::Float max_logit(const typename Arithmetic<V>::Float* z, int64_t n, bool* has_nan) {
  V best = V::all(-INFINITY);
  V poison = V::zero();
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const V x = V::load(z + i);
    poison = poison + x * V::zero();  // NaN from NaN and from infinities
    best = max(x, best);              // NaN in x gives best
  }
  *has_nan = false;
  if (is_nan(poison).lanes() != 0)
    for (int64_t i = 0; i < n; ++i) *has_nan |= z[i] != z[i];
  return reduce_max(best);
}

// out = exp(z - max) over n columns, NaN logits and a row of -inf giving 0; returns the sum. Nothing past n is written.
template <class V>
typename Arithmetic<V>::Float exponentials(const typename Arithmetic<V>::Float* z, int64_t n,
                                           typename Arithmetic<V>::Float max_z, typename Arithmetic<V>::Float* out) {
  using Float = typename Arithmetic<V>::Float;
  const V shift = V::all(max_z == -static_cast<Float>(INFINITY) ? 0 : max_z);
  V sums[2] = {V::zero(), V::zero()};
  for (int64_t i = 0, turn = 0; i < n; i += V::kLanes, turn ^= 1) {
    const int lanes = static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes);
    const V x = V::load(z + i, lanes, -INFINITY);
    const V e = exp(select(is_nan(x), V::all(-INFINITY), x - shift));
    if (out != nullptr) e.store(out + i, lanes);
    sums[turn] = sums[turn] + e;
  }
  return reduce_add(sums[0] + sums[1]);
}

template <class V>
void divide(typename Arithmetic<V>::Float* values, int64_t n, typename Arithmetic<V>::Float by) {
  const V divisor = V::all(by == 0 ? 1 : by);
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const int lanes = static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes);
    (V::load(values + i, lanes) / divisor).store(values + i, lanes);
  }
}

template <class V>
class Gate {
 public:
  using Float = typename Arithmetic<V>::Float;
  using Key = typename Arithmetic<V>::Key;
  using KeyVec = typename Arithmetic<V>::KeyVec;
  static constexpr Key kDisallowed = Arithmetic<V>::kDisallowed;

  Gate(const GateArgs& args, char* memory)
      : a_(args), shape_(args.shape), needs_(args), num_columns_(shape_.num_experts + shape_.num_null),
        padded_(round_up(num_columns_, V::kLanes)), group_size_(shape_.num_experts / shape_.num_groups) {
    b_.carve(memory, shape_);
    for (int64_t e = 0; e < shape_.num_experts; ++e) b_.demand[e] = 0;
  }

  static size_t bytes(const GateShape& shape) { return RowBuffers<V>{}.carve(nullptr, shape); }
  const int32_t* demand() const { return b_.demand; }

  // Row t; adds its scores to score_sum unless that is null.
  template <class T>
  void run(int64_t t, Float* score_sum) {
    load_logits<V>(static_cast<const T*>(a_.logits.data) + t * a_.logits.stride_row, a_.logits.stride_col,
                   num_columns_, b_.logits);
    max_ = max_logit<V>(b_.logits, padded_, &has_nan_);
    if (needs_.scores) sum_ = form_scores(b_.logits, max_, b_.scores);
    else if (needs_.softmax_sum) sum_ = exponentials<V>(b_.logits, num_columns_, max_, nullptr);
    form_keys(t);
    if (has_nan_ && needs_.scores && shape_.score == Score::kSoftmax) poison_scores();
    if (a_.topk_groups < shape_.num_groups) close_groups();
    const int64_t num_taken = select_columns(t);
    write_choice(t, num_before_stop(t, num_taken));
    if (a_.scores != nullptr) copy(b_.scores, static_cast<Float*>(a_.scores) + t * shape_.num_experts);
    if (a_.logsumexp != nullptr) write_statistics(t, num_taken == 0 && nothing_allowed(), score_sum);
  }

 private:
  // Scores of all columns of z, whose largest number is max_z; NaN logits count as -inf, so that the others stay
  // ordered. Returns the softmax denominator where there is one of the whole row.
  Float form_scores(const Float* z, Float max_z, Float* out) {
    if (shape_.score != Score::kSoftmax) {
      for (int64_t i = 0; i < padded_; i += V::kLanes) elementwise_score(shape_.score, V::load(z + i)).store(out + i);
      return 0;
    }
    if (!shape_.softmax_over_group || shape_.num_groups == 1) {
      const Float total = exponentials<V>(z, num_columns_, max_z, out);
      divide<V>(out, num_columns_, total);
      return total;
    }
    for (int64_t begin = 0; begin < shape_.num_experts; begin += group_size_) {
      const Float best = max_of(z + begin, group_size_);
      divide<V>(out + begin, group_size_, exponentials<V>(z + begin, group_size_, best, out + begin));
    }
    return max_z == -static_cast<Float>(INFINITY) || a_.logsumexp == nullptr
               ? 0
               : exponentials<V>(z, num_columns_, max_z, nullptr);
  }

  static Float max_of(const Float* z, int64_t n) {
    Float best = -static_cast<Float>(INFINITY);
    for (int64_t i = 0; i < n; ++i) best = z[i] > best ? z[i] : best;
    return best;
  }

  // keys = ordered(score(logits + noise) + bias), or ordered(logits + noise) where that orders the same. NaN is last
  // of the allowed; -inf logits and masked columns are not allowed.
  void form_keys(int64_t t) {
    const Float* z = b_.logits;
    key_scores_ = b_.scores;
    if (a_.noise.data != nullptr) {
      add_noise(row<Float>(a_.noise, t));
      z = b_.noisy;
      if (needs_.noisy_scores) {
        form_scores(b_.noisy, max_of(b_.noisy, num_columns_), b_.noisy_scores);
        key_scores_ = b_.noisy_scores;
      }
    }
    const Float* source = needs_.logit_keys ? z : key_scores_;
    if (a_.bias.data != nullptr) {
      add_bias(source, row<Float>(a_.bias, t));
      source = b_.biased;
    }
    const V nan = V::all(NAN);
    const V minus_inf = V::all(-INFINITY);
    for (int64_t i = 0; i < padded_; i += V::kLanes) {
      const V key = select(is_nan(V::load(z + i)), nan, V::load(source + i));
      select(V::load(b_.logits + i) == minus_inf, KeyVec::all(kDisallowed), ordered_keys(key)).store(b_.keys + i);
    }
    if (a_.mask.data == nullptr) return;
    const bool* mask = row<bool>(a_.mask, t);
    for (int64_t i = 0; i < num_columns_; ++i)
      if (!mask[i * a_.mask.stride_col]) b_.keys[i] = kDisallowed;
  }

  template <class T, class S>
  static const T* row(const Strided<S>& matrix, int64_t t) {
    return static_cast<const T*>(static_cast<const void*>(matrix.data)) + t * matrix.stride_row;
  }

  void add_noise(const Float* noise) {
    for (int64_t i = 0; i < num_columns_; ++i) b_.noisy[i] = b_.logits[i] + noise[i * a_.noise.stride_col];
    for (int64_t i = num_columns_; i < padded_; ++i) b_.noisy[i] = -static_cast<Float>(INFINITY);
  }

  void add_bias(const Float* source, const Float* bias) {
    if (a_.bias.stride_col == 1) {
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        (V::load(source + i) + V::load(bias + i, lanes_at(i, num_columns_))).store(b_.biased + i);
      return;
    }
    for (int64_t i = 0; i < num_columns_; ++i) b_.biased[i] = source[i] + bias[i * a_.bias.stride_col];
    for (int64_t i = num_columns_; i < padded_; ++i) b_.biased[i] = 0;
  }

  static int lanes_at(int64_t i, int64_t n) { return static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes); }

  // A softmax over a NaN is NaN throughout; inside groups, throughout the group.
  void poison_scores() {
    const int64_t part = shape_.softmax_over_group && shape_.num_groups > 1 ? group_size_ : num_columns_;
    for (int64_t begin = 0; begin < num_columns_; begin += part) {
      bool has_nan = false;
      for (int64_t i = begin; i < begin + part; ++i) has_nan |= b_.logits[i] != b_.logits[i];
      for (int64_t i = begin; has_nan && i < begin + part; ++i) b_.scores[i] = static_cast<Float>(NAN);
    }
  }

  // Disallows every expert outside the best groups.
  void close_groups() {
    for (int64_t g = 0; g < shape_.num_groups; ++g) b_.group_keys[g] = group_key(g * group_size_);
    for (int64_t g = shape_.num_groups; g % V::kLanes != 0; ++g) b_.group_keys[g] = kDisallowed;
    for (int64_t g = 0; g < shape_.num_groups; ++g) b_.group_count[g] = 0;
    Selector<V> groups(b_.group_keys, shape_.num_groups, b_.group_block_max);
    const int64_t open = groups.take(a_.topk_groups, b_.group_order, b_.group_taken);
    for (int64_t j = 0; j < open; ++j) b_.group_count[b_.group_order[j]] = 1;
    for (int64_t g = 0; g < shape_.num_groups; ++g)
      if (b_.group_count[g] == 0)
        for (int64_t i = g * group_size_; i < (g + 1) * group_size_; ++i) b_.keys[i] = kDisallowed;
  }

  // Key of the group that starts at column `begin`: of its best key, or of the sum of its two best keys.
  Key group_key(int64_t begin) const {
    const bool is_sum = a_.group_score == GroupScore::kTop2Sum;
    const KeyVec disallowed = KeyVec::all(kDisallowed);
    KeyVec first = disallowed, second = disallowed;
    if (group_size_ % V::kLanes == 0) {
      for (int64_t i = begin; i < begin + group_size_; i += V::kLanes) {
        KeyVec key = KeyVec::load(b_.keys + i);
        if (is_sum && needs_.logit_keys) key = keys_of_scores(i, key);
        second = max(second, min(first, key));
        first = max(first, key);
      }
    } else {
      for (int64_t i = begin; i < begin + group_size_; ++i) {
        Key key = b_.keys[i];
        if (is_sum && needs_.logit_keys && key != kDisallowed) key = ordered(key_scores_[i]);
        const KeyVec lane = replace(disallowed, static_cast<int>((i - begin) % V::kLanes), key);
        second = max(second, min(first, lane));
        first = max(first, lane);
      }
    }
    const Key best = reduce_max(first);
    if (!is_sum || best == kDisallowed) return best;
    const int lane = __builtin_ctz(equal_lanes(first, KeyVec::all(best)));
    alignas(64) Key seconds[V::kLanes];
    second.store(seconds);
    const Key next = reduce_max(replace(first, lane, seconds[lane]));
    return ordered(next == kDisallowed ? key_value(best) : key_value(best) + key_value(next));
  }

  KeyVec keys_of_scores(int64_t i, KeyVec key) const {
    alignas(64) Key lanes[V::kLanes];
    alignas(64) Key result[V::kLanes];
    key.store(lanes);
    ordered_keys(V::load(key_scores_ + i)).store(result);
    for (int j = 0; j < V::kLanes; ++j)
      if (lanes[j] == kDisallowed) result[j] = kDisallowed;
    return KeyVec::load(result);
  }

  static Key ordered(Float value) {
    alignas(64) Key lanes[V::kLanes];
    ordered_keys(V::all(value)).store(lanes);
    return lanes[0];
  }

  // The best allowed columns, best first, in b_.taken and b_.taken_keys.
  int64_t select_columns(int64_t t) {
    int64_t count = shape_.top_k;
    if (a_.k_per_token.data != nullptr) {
      const int64_t wanted = *row<int32_t>(a_.k_per_token, t);
      count = wanted < 0 ? 0 : wanted < count ? wanted : count;
    }
    Selector<V> columns(b_.keys, padded_, b_.block_max);
    if (a_.max_per_group >= shape_.top_k || shape_.num_null > 0) return columns.take(count, b_.taken, b_.taken_keys);
    for (int64_t g = 0; g < shape_.num_groups; ++g) b_.group_count[g] = 0;
    int64_t j = 0;
    while (j < count && columns.take(1, b_.taken + j, b_.taken_keys + j) == 1) {
      const int64_t g = b_.taken[j++] / group_size_;
      if (++b_.group_count[g] == a_.max_per_group) columns.disallow(g * group_size_, (g + 1) * group_size_);
    }
    return j;
  }

  bool nothing_allowed() const {
    for (int64_t i = 0; i < num_columns_; ++i)
      if (b_.keys[i] != kDisallowed) return false;
    return true;
  }

  // How many of the taken columns come before top_p or threshold stop the choice.
  int64_t num_before_stop(int64_t t, int64_t num_taken) const {
    const Float top_p = per_token(a_.top_p_per_token, a_.top_p, t);
    const Float threshold = per_token(a_.threshold_per_token, a_.threshold, t);
    if (!a_.top_p_per_token.data && !a_.threshold_per_token.data && a_.top_p == INFINITY && a_.threshold == -INFINITY)
      return num_taken;
    const bool has_threshold = a_.threshold_per_token.data || a_.threshold > -INFINITY;
    const bool has_top_p = a_.top_p_per_token.data || a_.top_p < INFINITY;
    bool is_stopped = false;
    Float cumulative = 0;
    int64_t num_real = 0;
    for (int64_t j = 0; j < num_taken; ++j) {
      const int32_t column = b_.taken[j];
      const Float key = needs_.logit_keys ? key_scores_[column] : key_value(b_.taken_keys[j]);
      is_stopped |= has_threshold && !(key > threshold);
      if (is_stopped && num_real >= a_.min_k) return j;
      num_real += column < shape_.num_experts;
      cumulative += b_.scores[column];
      is_stopped |= has_top_p && cumulative > top_p;
    }
    return num_taken;
  }

  Float per_token(const Strided<float>& values, double otherwise, int64_t t) const {
    return values.data != nullptr ? *row<float>(values, t) : static_cast<Float>(otherwise);
  }

  // Experts, demand and weights of the first num_chosen taken columns, null ones left out.
  void write_choice(int64_t t, int64_t num_chosen) {
    int32_t* experts = a_.experts + t * shape_.top_k;
    Float* weights = static_cast<Float*>(a_.weights) + t * shape_.top_k;
    int64_t num_real = 0;
    for (int64_t j = 0; j < num_chosen; ++j) {
      const int32_t column = b_.taken[j];
      if (column >= shape_.num_experts) continue;
      experts[num_real] = column;
      ++b_.demand[column];
      b_.taken_scores[num_real++] = needs_.scores ? b_.scores[column] : b_.logits[column];
    }
    if (!needs_.scores) score_taken(num_real);
    Float divisor = 1;
    if (shape_.normalize) {
      divisor = 0;
      for (int64_t j = 0; j < num_real; ++j) divisor += b_.taken_scores[j];
      if (divisor < static_cast<Float>(kWeightFloor)) divisor = static_cast<Float>(kWeightFloor);
    }
    const V scale = V::all(has_nan_ ? static_cast<Float>(NAN) : static_cast<Float>(shape_.scale));
    for (int64_t j = 0; j < num_real; j += V::kLanes)
      (V::load(b_.taken_scores + j) / V::all(divisor) * scale).store(weights + j, lanes_at(j, num_real));
    for (int64_t j = num_real; j < shape_.top_k; ++j) experts[j] = -1, weights[j] = 0;
  }

  // Logits of taken columns to their scores; softmax up to the denominator where that is not formed.
  void score_taken(int64_t count) {
    const V shift = V::all(max_);
    const V divisor = V::all(needs_.softmax_sum ? sum_ : 1);
    for (int64_t j = 0; j < count; j += V::kLanes) {
      const V z = V::load(b_.taken_scores + j, lanes_at(j, count));
      const V s = shape_.score == Score::kSoftmax ? exp(z - shift) / divisor : elementwise_score(shape_.score, z);
      s.store(b_.taken_scores + j);
    }
  }

  void copy(const Float* from, Float* to) const {
    for (int64_t i = 0; i < shape_.num_experts; i += V::kLanes) {
      const int lanes = lanes_at(i, shape_.num_experts);
      V::load(from + i, lanes).store(to + i, lanes);
    }
  }

  // A row without an allowed column takes no part.
  void write_statistics(int64_t t, bool is_empty, Float* score_sum) {
    Float* logsumexp = static_cast<Float*>(a_.logsumexp) + t;
    if (is_empty) {
      *logsumexp = -static_cast<Float>(INFINITY);
      return;
    }
    if (shape_.score != Score::kSoftmax) sum_ = exponentials<V>(b_.logits, num_columns_, max_, nullptr);
    *logsumexp = has_nan_ ? static_cast<Float>(NAN)
                 : std::isinf(max_) ? max_ : max_ + static_cast<Float>(std::log(static_cast<double>(sum_)));
    for (int64_t i = 0; i < shape_.num_experts; i += V::kLanes) {
      const int lanes = lanes_at(i, shape_.num_experts);
      (V::load(score_sum + i, lanes) + V::load(b_.scores + i, lanes)).store(score_sum + i, lanes);
    }
  }

  GateArgs a_;
  GateShape shape_;
  Needs needs_;
  int64_t num_columns_, padded_, group_size_;
  RowBuffers<V> b_;
  const Float* key_scores_ = nullptr;
  Float max_ = 0;
  Float sum_ = 0;  // of exp(logit - max_)
  bool has_nan_ = false;
};

template <class V, class T>
void gate_rows(const GateArgs& args) {
  using Float = typename Arithmetic<V>::Float;
  const int64_t num_tokens = args.shape.num_tokens;
  const int64_t num_experts = args.shape.num_experts;
  const int64_t tile = rows_per_tile(num_tokens);
  const int64_t num_tiles = (num_tokens + tile - 1) / tile;
  const int64_t workers = num_tiles < num_threads() ? num_tiles : num_threads();
  const int64_t row_bytes = round_up(static_cast<int64_t>(Gate<V>::bytes(args.shape)), 64);
  const int64_t sums_bytes = args.score_sum != nullptr ? num_tiles * num_experts * sizeof(Float) : 0;
  char* memory = static_cast<char*>(scratch(Scratch::kGateRows, workers * row_bytes + sums_bytes));
  Float* tile_sums = reinterpret_cast<Float*>(memory + workers * row_bytes);
  const bool has_sums = args.score_sum != nullptr;

  parallel_workers(workers, [&](int worker) {
    Gate<V> gate(args, memory + worker * row_bytes);
    for (int64_t i = num_tiles * worker / workers; i < num_tiles * (worker + 1) / workers; ++i) {
      Float* sums = has_sums ? tile_sums + i * num_experts : nullptr;
      for (int64_t e = 0; has_sums && e < num_experts; ++e) sums[e] = 0;
      const int64_t end = (i + 1) * tile < num_tokens ? (i + 1) * tile : num_tokens;
      for (int64_t t = i * tile; t < end; ++t) gate.template run<T>(t, sums);
    }
  });

  RowBuffers<V> rows;
  for (int64_t e = 0; e < num_experts; ++e) args.demand[e] = 0;
  for (int64_t worker = 0; worker < workers; ++worker) {
    rows.carve(memory + worker * row_bytes, args.shape);
    for (int64_t e = 0; e < num_experts; ++e) args.demand[e] += rows.demand[e];
  }
  if (!has_sums) return;
  Float* score_sum = static_cast<Float*>(args.score_sum);
  for (int64_t e = 0; e < num_experts; ++e) score_sum[e] = 0;
  for (int64_t i = 0; i < num_tiles; ++i)
    for (int64_t e = 0; e < num_experts; ++e) score_sum[e] += tile_sums[i * num_experts + e];
}

}  // namespace

void gate(const GateArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32: return gate_rows<Vec, float>(args);
    case DType::kBFloat16: return gate_rows<Vec, BFloat16>(args);
    case DType::kFloat16: return gate_rows<Vec, Float16>(args);
    case DType::kFloat64: return gate_rows<Vec64, double>(args);
  }
}

FASTMOE_ROUTE_ISA_END
