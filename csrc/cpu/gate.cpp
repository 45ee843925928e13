// gate on the CPU: a few rows at a time, in the first-level cache, one read of the logits.
//
// Phases of a row: load -> scores (only if something needs them) -> ordered integer keys (unless finite logits alone
// decide: these are searched as they are) -> groups -> selection -> stop rules -> weights -> statistics. The phases of
// kBatch rows run side by side (gate_select.h, gate_groups.h).
// A softmax gate that is normalised and keeps no statistics never forms the denominator: it cancels, so only the chosen
// logits are exponentiated.
// Threads own contiguous tiles of rows (gate_sums.h).
// Bytes: logits once, outputs once; scratch is a few rows per thread.
#include <cmath>
#include <initializer_list>

#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/gate_groups.h"
#include "cpu/gate_sums.h"
#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

int64_t rows_per_tile(int64_t num_tokens) {
  const int64_t rows = (num_tokens + 1023) / 1024;
  return rows > 64 ? rows : 64;
}

template <class V>
class Gate {
 public:
  using Float = typename Arithmetic<V>::Float;
  using Key = typename Arithmetic<V>::Key;
  using KeyVec = typename Arithmetic<V>::KeyVec;
  static constexpr Key kDisallowed = Arithmetic<V>::kDisallowed;

  // demand: [E], zeros; counts the rows that run() is given. At least one token. carried: room for a row's scores where
  // they are summed.
  Gate(const GateArgs& args, int32_t* demand, char* memory, Float* carried)
      : a_(args), shape_(args.shape), needs_(args), groups_(args), num_columns_(shape_.num_experts + shape_.num_null),
        padded_(padded_columns<V>(shape_)), group_size_(shape_.num_experts / shape_.num_groups),
        slots_(slots_of(shape_)), carried_(carried, needs_.carry_scores ? padded_ : 0), demand_(demand) {
    int64_t row_bytes = 0;
    for (int r = 0; r < kBatch && r < shape_.num_tokens; ++r) {
      GateRow<V>& row = rows_[r];
      row_bytes = row.carve(memory, shape_, r, kBatch);
      row.num_keys = padded_;
      row.is_carried = false;
      for (int64_t i = 0; i < padded_; i += V::kLanes) row.first_columns[i / V::kLanes] = static_cast<int32_t>(i);
    }
    memory += kBatch * row_bytes;
    taken_keys_ = reinterpret_cast<Key*>(memory);
    taken_ = reinterpret_cast<int32_t*>(memory += round_up(num_taken(shape_) * sizeof(Key), 64));
    adds_plain_bias_ = shape_.score != Score::kSoftmax && !a_.noise.data && padded_ == num_columns_ && is_plain_bias();
  }

  static int64_t bytes(const GateShape& shape) {
    return kBatch * GateRow<V>{}.carve(nullptr, shape, 0, kBatch) + round_up(num_taken(shape) * sizeof(Key), 64) +
           round_up(num_taken(shape) * sizeof(int32_t), 64);
  }

  // Rows [begin, end); adds their scores to score_sum, [padded_], unless that is null.
  void run(int64_t begin, int64_t end, Float* score_sum) {
    for (int64_t t = begin; t < end; t += kBatch) {
      const int64_t count = end - t < kBatch ? end - t : kBatch;
      if (needs_.logits_only) needs_.carry_scores ? load_rows<true>(t, count) : load_rows<false>(t, count);
      const bool are_carried = needs_.carry_scores && carry_rows(count, score_sum);
      for (int64_t r = 0; r < count && !are_carried; ++r)
        if (!rows_[r].is_carried) prepare(rows_[r], t + r);
      if (a_.topk_groups < shape_.num_groups)
        for (int64_t r = 0; r < count; ++r) groups_.close(rows_[r]);
      select_rows(t, count);
      for (int64_t r = 0; r < count; ++r) choose(rows_[r], t + r, r * slots_);
      for (int64_t r = 0; r < count; ++r) weigh(rows_[r], t + r, r * slots_);
      if (a_.logsumexp != nullptr) {
        for (int64_t r = 0; r < count && !are_carried; ++r) keep_logsumexp(rows_[r], r);
        logs_.close(count, t + count == end, static_cast<Float*>(a_.logsumexp) + t + count);
      }
      if (score_sum != nullptr && !are_carried) add_scores(count, score_sum);
    }
    if (needs_.carry_scores) carried_.add_to(score_sum);
  }

 private:
  static constexpr int kBatch = V::kLanes > 1 ? 4 : 1;
  static constexpr int kShortlist = 32;  // the longest

  // Places for the columns taken of a row: whole vectors, so that what is stored as one is loaded as one.
  static int64_t slots_of(const GateShape& shape) { return round_up(shape.top_k, V::kLanes); }
  // And for those of a batch: a short list writes all its places.
  static int64_t num_taken(const GateShape& shape) { return kBatch * slots_of(shape) + kShortlist; }

  template <bool kAsksNear>
  __attribute__((noinline)) void load_rows(int64_t t, int64_t count) {
    for (int64_t r = 0; r < count; ++r) load<kAsksNear>(rows_[r], t + r);
  }

  template <bool kAsksNear = false>
  void load(GateRow<V>& row, int64_t t) const {
    load_row<V, kAsksNear>(a_.dtype, a_.logits, t, num_columns_, row.buffer, row, row.largest);
  }

  // Scores of row t, and keys unless its logits decide, with what may not be chosen disallowed. Where both are stored,
  // a row is loaded only now: four rows with all that belongs to them are too much for the first-level cache.
  void prepare(GateRow<V>& row, int64_t t) {
    if (!needs_.logits_only) prefetch(t + 2 * kBatch), load(row, t);
    row.is_direct = needs_.logits_only && row.is_plain;
    row.key_scores = row.scores;
    if (adds_plain_bias_ && row.is_plain) return form_biased_keys(row, t);
    if (needs_.scores) row.sum = form_scores(row.z, row.max, row.has_nan, row.scores);
    else if (needs_.softmax_sum) row.sum = sum_of_exponentials<V>(row.z, num_columns_, row.max, row.has_nan);
    row.factor = needs_.softmax_sum && (needs_.late_scale || !needs_.scores) ? inverse_of(row.sum) : 1;
    if (!row.is_direct) form_keys(row, t);
    if (row.has_nan && needs_.scores && shape_.score == Score::kSoftmax) poison_scores(row);
  }

  // Rows that are near have all they need in one pass: their choice cannot fail. Returns whether all of the batch are.
  bool carry_rows(int64_t count, Float* score_sum) {
    int64_t num_carried = 0;
    for (int64_t r = 0; r < count; ++r) {
      GateRow<V>& row = rows_[r];
      row.is_direct = row.is_carried = row.is_near;
      if (!row.is_carried) continue;
      row.sum = carried_.take(row, num_columns_, score_sum);
      row.factor = carried_.factor();
      logs_.keep(r, row.max, row.sum);
      ++num_carried;
    }
    return num_carried == count;
  }

  // The processor's own prefetching ends at each page: a few rows. Inlined, or GCC drops the call of a function that it
  // sees no effect of.
  __attribute__((always_inline)) void prefetch(int64_t t) const {
    if (t >= shape_.num_tokens || a_.logits.stride_col != 1) return;
    const int64_t size = element_size(a_.dtype);
    const char* row = static_cast<const char*>(a_.logits.data) + t * a_.logits.stride_row * size;
    for (int64_t i = 0; i < num_columns_ * size; i += 64) __builtin_prefetch(row + i);
  }

  // Experts and demand of row t, whose selection begins at `first`: the columns taken before a stop rule, null ones
  // left out.
  void choose(GateRow<V>& row, int64_t t, int64_t first) {
    const int32_t* taken = taken_ + first;
    const int64_t slots = slots_of(t);
    int64_t num_before = row.num_taken < slots ? row.num_taken : slots;
    if (has_stops()) num_before = num_before_stop(row, t, taken, taken_keys_ + first, num_before);
    int32_t* experts = a_.experts + t * shape_.top_k;
    int64_t num_chosen = 0;
    for (int64_t j = 0; j < num_before; ++j) {
      const int32_t column = taken[j];
      if (column >= shape_.num_experts) continue;
      experts[num_chosen] = column;
      ++demand_[column];
      if (!needs_.weigh_keys)
        row.taken_scores[num_chosen] = needs_.scores ? row.scores[column] * row.factor : row.z[column];
      ++num_chosen;
    }
    row.num_chosen = num_chosen;
    for (int64_t j = num_chosen; j < shape_.top_k; ++j) experts[j] = -1;
  }

  // The weights of row t, and its scores where they are kept.
  void weigh(GateRow<V>& row, int64_t t, int64_t first) const {
    Float* weights = static_cast<Float*>(a_.weights) + t * shape_.top_k;
    if (needs_.weigh_keys) weigh_keys(row, taken_keys_ + first, weights);
    else weigh_scores(row, weights);
    for (int64_t j = row.num_chosen; j < shape_.top_k; ++j) weights[j] = 0;
    if (a_.scores != nullptr) copy_scores(row, static_cast<Float*>(a_.scores) + t * shape_.num_experts);
  }

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
    return max_z == -static_cast<Float>(INFINITY) || a_.logsumexp == nullptr
               ? 0
               : sum_of_exponentials<V>(z, num_columns_, max_z, may_have_nan);
  }

  // keys = ordered(score(logits + noise) + bias), or ordered(logits + noise) where that orders the same. NaN is last
  // of the allowed; -inf logits and masked columns are not allowed.
  void form_keys(GateRow<V>& row, int64_t t) const {
    const Float* z = row.z;
    if (a_.noise.data != nullptr) {
      add_noise(row, row_of<Float>(a_.noise, t));
      z = row.noisy;
      if (needs_.noisy_scores) {
        form_scores(row.noisy, max_of(row.noisy, num_columns_), true, row.noisy_scores);
        row.key_scores = row.noisy_scores;
      }
    }
    const Float* source = needs_.logit_keys ? z : row.key_scores;
    if (a_.bias.data != nullptr) {
      add_bias(row, source, row_of<Float>(a_.bias, t));
      source = row.biased;
    }
    const bool is_plain = row.is_plain && a_.noise.data == nullptr && a_.bias.data == nullptr && needs_.logit_keys;
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

  void apply_mask(GateRow<V>& row, int64_t t) const {
    if (a_.mask.data == nullptr) return;
    const bool* mask = row_of<bool>(a_.mask, t);
    for (int64_t i = 0; i < num_columns_; ++i)
      if (!mask[i * a_.mask.stride_col]) row.keys[i] = kDisallowed;
  }

  // Whether the bias is one row of finite numbers.
  bool is_plain_bias() const {
    if (a_.bias.data == nullptr || a_.bias.stride_row != 0 || a_.bias.stride_col != 1) return false;
    const Float* bias = static_cast<const Float*>(a_.bias.data);
    bool is_plain = true;
    for (int64_t i = 0; i < num_columns_; ++i) is_plain &= bias[i] - bias[i] == 0;
    return is_plain;
  }

  // Scores and keys in one pass, where no key can be NaN or disallowed but by the mask.
  void form_biased_keys(GateRow<V>& row, int64_t t) const {
    const Float* bias = static_cast<const Float*>(a_.bias.data);
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

  template <class T, class S>
  static const T* row_of(const Strided<S>& matrix, int64_t t) {
    return static_cast<const T*>(static_cast<const void*>(matrix.data)) + t * matrix.stride_row;
  }

  void add_noise(GateRow<V>& row, const Float* noise) const {
    for (int64_t i = 0; i < num_columns_; ++i) row.noisy[i] = row.z[i] + noise[i * a_.noise.stride_col];
    for (int64_t i = num_columns_; i < padded_; ++i) row.noisy[i] = -static_cast<Float>(INFINITY);
  }

  void add_bias(GateRow<V>& row, const Float* source, const Float* bias) const {
    if (a_.bias.stride_col == 1) {
      for (int64_t i = 0; i < padded_; i += V::kLanes)
        (V::load(source + i) + V::load(bias + i, lanes_at<V>(i, num_columns_))).store(row.biased + i);
      return;
    }
    for (int64_t i = 0; i < num_columns_; ++i) row.biased[i] = source[i] + bias[i * a_.bias.stride_col];
    for (int64_t i = num_columns_; i < padded_; ++i) row.biased[i] = 0;
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

  int64_t slots_of(int64_t t) const {
    if (a_.k_per_token.data == nullptr) return shape_.top_k;
    const int64_t wanted = *row_of<int32_t>(a_.k_per_token, t);
    return wanted < 0 ? 0 : wanted < shape_.top_k ? wanted : shape_.top_k;
  }

  // The best allowed columns of every row of the batch, which begins at row t, best first.
  void select_rows(int64_t t, int64_t count) {
    if constexpr (V::kLanes > 1) {
      if (a_.max_per_group >= shape_.top_k && shape_.top_k <= 8) return select_by_list<kShortlist / 2>(t, count);
      if (a_.max_per_group >= shape_.top_k && shape_.top_k <= 16) return select_by_list<kShortlist>(t, count);
    }
    for (int64_t r = 0; r < count; ++r) take_columns(t, r);
  }

  template <int kWidth>
  void select_by_list(int64_t t, int64_t count) {
    if (needs_.logits_only && padded_ <= kWidth) rank_rows<kWidth>(t, count);
    else select_short<kWidth>(t, count);
  }

  // Where a short list holds every column.
  template <int kWidth>
  __attribute__((noinline)) void rank_rows(int64_t t, int64_t count) {
    alignas(64) Shortlist<V, kWidth> lists[kBatch];
    const Key k = static_cast<Key>(shape_.top_k);
    for (int64_t r = 0; r < count; ++r)
      if (rows_[r].is_direct) lists[r].list_all(rows_[r], num_columns_);
    for (int64_t r = 0; r < count; ++r) {
      int32_t* taken = taken_ + r * slots_;
      Key* taken_keys = taken_keys_ + r * slots_;
      if (!rows_[r].is_direct) take_columns(t, r);
      else if (num_columns_ > kWidth / 2) rows_[r].num_taken = lists[r].rank(k, taken, taken_keys);
      else rows_[r].num_taken = lists[r].template rank<kWidth / 2>(k, taken, taken_keys);
    }
  }

  // Rows in rising order: what a short list writes past its places belongs to the next row.
  template <int kWidth>
  void select_short(int64_t t, int64_t count) {
    alignas(2048) Shortlist<V, kWidth> lists[kBatch];  // a store across two pages takes 25 cycles
    static_assert(sizeof lists <= 2048, "the lists must lie in one page");
    bool fits[kBatch];
    const Key k = static_cast<Key>(shape_.top_k);
    for (int64_t r = 0; r < count; ++r) {
      const GateRow<V>& row = rows_[r];
      row.is_direct ? lists[r].find_bound(row.largest, k) : lists[r].find_bound(row.keys, row.num_keys, k);
    }
    for (int64_t r = 0; r < count; ++r) {
      const GateRow<V>& row = rows_[r];
      fits[r] =
          row.is_direct ? lists[r].collect(row, padded_) : lists[r].collect(row.keys, row.num_keys, row.first_columns);
    }
    for (int64_t r = 0; r < count; ++r) {
      if (fits[r]) rows_[r].num_taken = lists[r].rank(k, taken_ + r * slots_, taken_keys_ + r * slots_);
      else take_columns(t, r);
    }
  }

  // Row r of the batch by repeated extraction.
  void take_columns(int64_t t, int64_t r) {
    GateRow<V>& row = rows_[r];
    if (row.is_direct) form_keys(row, t + r);
    int32_t* taken = taken_ + r * slots_;
    Key* taken_keys = taken_keys_ + r * slots_;
    Selector<V> columns(row.keys, row.num_keys, row.block_max);
    if (a_.max_per_group >= shape_.top_k) {
      row.num_taken = columns.take(shape_.top_k, taken, taken_keys);
      for (int64_t j = 0; j < row.num_taken; ++j)
        taken[j] = row.first_columns[taken[j] / V::kLanes] + taken[j] % V::kLanes;
      return;
    }
    for (int64_t g = 0; g < shape_.num_groups; ++g) row.group_count[g] = 0;
    int64_t j = 0;
    for (; j < shape_.top_k && columns.take(1, taken + j, taken_keys + j) == 1; ++j) {
      const int64_t g = taken[j] / group_size_;
      if (++row.group_count[g] == a_.max_per_group) columns.disallow(g * group_size_, (g + 1) * group_size_);
    }
    row.num_taken = j;
  }

  bool has_top_p() const { return a_.top_p_per_token.data != nullptr || a_.top_p < INFINITY; }
  bool has_threshold() const { return a_.threshold_per_token.data != nullptr || a_.threshold > -INFINITY; }
  bool has_stops() const { return has_top_p() || has_threshold(); }

  // How many of the taken columns come before top_p or threshold stop the choice.
  int64_t num_before_stop(const GateRow<V>& row, int64_t t, const int32_t* taken, const Key* taken_keys,
                          int64_t num_taken) const {
    const Float top_p = per_token(a_.top_p_per_token, a_.top_p, t);
    const Float threshold = per_token(a_.threshold_per_token, a_.threshold, t);
    bool is_stopped = false;
    Float cumulative = 0;
    int64_t num_real = 0;
    for (int64_t j = 0; j < num_taken; ++j) {
      const Float key = needs_.logit_keys ? row.key_scores[taken[j]] : key_value(taken_keys[j]);
      is_stopped |= has_threshold() && !(key > threshold);
      if (is_stopped && num_real >= a_.min_k) return j;
      num_real += taken[j] < shape_.num_experts;
      cumulative += row.scores[taken[j]];
      is_stopped |= has_top_p() && cumulative > top_p;
    }
    return num_taken;
  }

  Float per_token(const Strided<float>& values, double otherwise, int64_t t) const {
    return values.data != nullptr ? *row_of<float>(values, t) : static_cast<Float>(otherwise);
  }

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

  Float softmax_sum(const GateRow<V>& row) const {
    return shape_.score == Score::kSoftmax ? row.sum
                                           : sum_of_exponentials<V>(row.z, num_columns_, row.max, row.has_nan);
  }

  // Where logsumexp is no number, it is kept as itself and 1. A row without an allowed column takes no part in the
  // statistics.
  void keep_logsumexp(const GateRow<V>& row, int64_t r) {
    if (row.is_carried) return;
    const Float max = row.num_taken == 0 ? -static_cast<Float>(INFINITY)
                      : row.has_nan      ? static_cast<Float>(NAN)
                                         : row.max;
    logs_.keep(r, max, std::isfinite(max) ? softmax_sum(row) : 1);
  }

  // The rows of the batch in order, together: score_sum is loaded and stored once for all of them.
  void add_scores(int64_t count, Float* score_sum) const {
    const Float* scores[kBatch];
    V factors[kBatch];
    int num_open = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (rows_[r].num_taken == 0 || rows_[r].is_carried) continue;
      if (needs_.carry_scores && rows_[r].is_plain) {
        add_far_row(rows_[r], score_sum);
        continue;
      }
      scores[num_open] = rows_[r].scores;
      factors[num_open++] = V::all(rows_[r].factor);
    }
    if (num_open == kBatch) add_rows<kBatch>(scores, factors, score_sum);
    for (int r = 0; num_open < kBatch && r < num_open; ++r) add_rows<1>(scores + r, factors + r, score_sum);
  }

  // A row whose scores may be subnormal.
  void add_far_row(const GateRow<V>& row, Float* score_sum) const {
    const V factor = V::all(row.factor);
    for (int64_t i = 0; i < shape_.num_experts; i += V::kLanes) {
      const int lanes = lanes_at<V>(i, shape_.num_experts);
      (V::load(score_sum + i, lanes) + product_gradual(V::load(row.scores + i, lanes), factor))
          .store(score_sum + i, lanes);
    }
  }

  // score_sum += the sum of kRows rows times their factors.
  template <int kRows>
  void add_rows(const Float* const* scores, const V* factors, Float* score_sum) const {
    const auto add = [&](V sum, int64_t i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum = fma(V::load(scores[r] + i), factors[r], sum);
      return sum;
    };
    int64_t i = 0;
    for (; i + V::kLanes <= shape_.num_experts; i += V::kLanes) add(V::load(score_sum + i), i).store(score_sum + i);
    if (i < shape_.num_experts) {
      const int lanes = lanes_at<V>(i, shape_.num_experts);
      add(V::load(score_sum + i, lanes), i).store(score_sum + i, lanes);
    }
  }

  GateArgs a_;
  GateShape shape_;
  GateNeeds needs_;
  GateGroups<V> groups_;
  int64_t num_columns_, padded_, group_size_;
  int64_t slots_;
  bool adds_plain_bias_;  // an elementwise score plus one row of finite numbers is the key
  GateRow<V> rows_[kBatch];
  CarriedScores<V> carried_;
  LogSumExps<V, kBatch> logs_;
  Key* taken_keys_;  // [kBatch, slots_]
  int32_t* taken_;   // [kBatch, slots_]
  int32_t* demand_;  // [E], of the rows this worker has seen
};

template <class V>
void gate_rows(const GateArgs& args) {
  using Float = typename Arithmetic<V>::Float;
  const int64_t num_tokens = args.shape.num_tokens, num_experts = args.shape.num_experts;
  const int64_t tile = rows_per_tile(num_tokens), num_tiles = (num_tokens + tile - 1) / tile;
  const int64_t workers = num_tiles < num_threads() ? num_tiles : num_threads();
  const int64_t gate_bytes = Gate<V>::bytes(args.shape);
  const int64_t worker_bytes = gate_bytes + round_up(num_experts * sizeof(int32_t), 64) + 128;  // apart
  const int64_t padded = padded_columns<V>(args.shape);
  const bool has_sums = args.score_sum != nullptr;
  const int64_t sums_bytes = has_sums ? ScoreSums<V>::bytes(num_tiles, workers, padded) : 0;
  char* memory = static_cast<char*>(scratch(Scratch::kGateRows, workers * worker_bytes + sums_bytes));
  const ScoreSums<V> score_sums(memory + workers * worker_bytes, num_tiles, workers, padded);
  const auto demand_of = [&](int64_t worker) {
    return worker == 0 ? args.demand : reinterpret_cast<int32_t*>(memory + worker * worker_bytes + gate_bytes);
  };

  for (int64_t e = 0; e < num_experts; ++e) args.demand[e] = 0;
  parallel_workers(workers, [&](int worker) {
    int32_t* demand = demand_of(worker);
    for (int64_t e = 0; worker > 0 && e < num_experts; ++e) demand[e] = 0;
    Gate<V> gate(args, demand, memory + worker * worker_bytes, has_sums ? score_sums.carried(worker) : nullptr);
    for (int64_t i = score_sums.first_tile(worker); i < score_sums.first_tile(worker + 1); ++i) {
      Float* sums = has_sums ? score_sums.open(i, worker) : nullptr;
      const int64_t end = (i + 1) * tile < num_tokens ? (i + 1) * tile : num_tokens;
      gate.run(i * tile, end, sums);
      if (has_sums) score_sums.close(i, sums);
    }
  });
  for (int64_t worker = 1; worker < workers; ++worker) {
    const int32_t* demand = demand_of(worker);
    for (int64_t e = 0; e < num_experts; ++e) args.demand[e] += demand[e];
  }
  if (has_sums) score_sums.write(static_cast<Float*>(args.score_sum), num_experts);
}

}  // namespace

void gate(const GateArgs& args) {
  if constexpr (kHasFloat64)
    if (args.dtype == DType::kFloat64) return gate_rows<Vec64>(args);
  gate_rows<Vec>(args);
}

FASTMOE_ROUTE_ISA_END
