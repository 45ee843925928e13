// gate on the CPU: a few rows at a time, in the first-level cache, one read of the logits.
//
// Phases of a row: load -> scores (only if something needs them) and ordered integer keys (unless finite logits alone
// decide: these are searched as they are; gate_keys.h) -> groups (gate_groups.h) -> selection (gate_select.h) -> stop
// rules -> weights (gate_weights.h) -> statistics (gate_sums.h). The phases of kBatch rows run side by side.
// A softmax gate that is normalised and keeps no statistics never forms the denominator: it cancels, so only the chosen
// logits are exponentiated.
// Threads own contiguous tiles of rows.
// Bytes: logits once, outputs once; scratch is a few rows per thread.
#include <cmath>
#include <initializer_list>

#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/gate_groups.h"
#include "cpu/gate_keys.h"
#include "cpu/gate_sums.h"
#include "cpu/gate_weights.h"
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
      : args_(args), shape_(args.shape), needs_(args), keys_(args), groups_(args), weights_(args),
        num_columns_(shape_.num_experts + shape_.num_null), padded_(padded_columns<V>(shape_)),
        group_size_(shape_.num_experts / shape_.num_groups), slots_(padded_slots(shape_)),
        carried_(carried, needs_.carry_scores ? padded_ : 0), demand_(demand) {
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
      if (args_.topk_groups < shape_.num_groups)
        for (int64_t r = 0; r < count; ++r) groups_.close(rows_[r]);
      select_rows(t, count);
      for (int64_t r = 0; r < count; ++r) choose(rows_[r], t + r, r * slots_);
      for (int64_t r = 0; r < count; ++r) weights_.weigh(rows_[r], t + r, taken_keys_ + r * slots_);
      if (args_.logsumexp != nullptr) {
        for (int64_t r = 0; r < count && !are_carried; ++r) keep_logsumexp(rows_[r], r);
        logs_.close(count, t + count == end, static_cast<Float*>(args_.logsumexp) + t + count);
      }
      if (score_sum != nullptr && !are_carried) add_scores(count, score_sum);
    }
    if (needs_.carry_scores) carried_.add_to(score_sum);
  }

 private:
  static constexpr int kBatch = V::kLanes > 1 ? 4 : 1;
  static constexpr int kShortlist = 32;  // the longest

  // Places for the columns taken of a row: whole vectors, so that what is stored as one is loaded as one.
  static int64_t padded_slots(const GateShape& shape) { return round_up(shape.top_k, V::kLanes); }
  // And for those of a batch: a short list writes all its places.
  static int64_t num_taken(const GateShape& shape) { return kBatch * padded_slots(shape) + kShortlist; }

  template <bool kAsksNear>
  __attribute__((noinline)) void load_rows(int64_t t, int64_t count) {
    for (int64_t r = 0; r < count; ++r) load<kAsksNear>(rows_[r], t + r);
  }

  template <bool kAsksNear = false>
  void load(GateRow<V>& row, int64_t t) const {
    load_row<V, kAsksNear>(args_.dtype, args_.logits, t, num_columns_, row.buffer, row, row.largest);
  }

  // Where both scores and keys are stored, a row is loaded only now: four rows with all that belongs to them are too
  // much for the first-level cache.
  void prepare(GateRow<V>& row, int64_t t) {
    if (!needs_.logits_only) prefetch(t + 2 * kBatch), load(row, t);
    keys_.form(row, t);
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
    if (t >= shape_.num_tokens || args_.logits.stride_col != 1) return;
    const int64_t size = element_size(args_.dtype);
    const char* row = static_cast<const char*>(args_.logits.data) + t * args_.logits.stride_row * size;
    for (int64_t i = 0; i < num_columns_ * size; i += 64) __builtin_prefetch(row + i);
  }

  // Experts and demand of row t, whose selection begins at `first`: the columns taken before a stop rule, null ones
  // left out.
  void choose(GateRow<V>& row, int64_t t, int64_t first) {
    const int32_t* taken = taken_ + first;
    const int64_t slots = slots_of(t);
    int64_t num_before = row.num_taken < slots ? row.num_taken : slots;
    if (has_stops()) num_before = num_before_stop(row, t, taken, taken_keys_ + first, num_before);
    int32_t* experts = args_.experts + t * shape_.top_k;
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

  // Slots that token t fills at most.
  int64_t slots_of(int64_t t) const {
    if (args_.k_per_token.data == nullptr) return shape_.top_k;
    const int64_t wanted = *row_of<int32_t>(args_.k_per_token, t);
    return wanted < 0 ? 0 : wanted < shape_.top_k ? wanted : shape_.top_k;
  }

  // The best allowed columns of every row of the batch, which begins at row t, best first.
  void select_rows(int64_t t, int64_t count) {
    if constexpr (V::kLanes > 1) {
      if (args_.max_per_group >= shape_.top_k && shape_.top_k <= 8) return select_by_list<kShortlist / 2>(t, count);
      if (args_.max_per_group >= shape_.top_k && shape_.top_k <= 16) return select_by_list<kShortlist>(t, count);
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
    if (row.is_direct) keys_.form_keys(row, t + r);
    int32_t* taken = taken_ + r * slots_;
    Key* taken_keys = taken_keys_ + r * slots_;
    Selector<V> columns(row.keys, row.num_keys, row.block_max);
    if (args_.max_per_group >= shape_.top_k) {
      row.num_taken = columns.take(shape_.top_k, taken, taken_keys);
      for (int64_t j = 0; j < row.num_taken; ++j)
        taken[j] = row.first_columns[taken[j] / V::kLanes] + taken[j] % V::kLanes;
      return;
    }
    for (int64_t g = 0; g < shape_.num_groups; ++g) row.group_count[g] = 0;
    int64_t j = 0;
    for (; j < shape_.top_k && columns.take(1, taken + j, taken_keys + j) == 1; ++j) {
      const int64_t g = taken[j] / group_size_;
      if (++row.group_count[g] == args_.max_per_group) columns.disallow(g * group_size_, (g + 1) * group_size_);
    }
    row.num_taken = j;
  }

  bool has_top_p() const { return args_.top_p_per_token.data != nullptr || args_.top_p < INFINITY; }
  bool has_threshold() const { return args_.threshold_per_token.data != nullptr || args_.threshold > -INFINITY; }
  bool has_stops() const { return has_top_p() || has_threshold(); }

  // How many of the taken columns come before top_p or threshold stop the choice.
  int64_t num_before_stop(const GateRow<V>& row, int64_t t, const int32_t* taken, const Key* taken_keys,
                          int64_t num_taken) const {
    const Float top_p = per_token(args_.top_p_per_token, args_.top_p, t);
    const Float threshold = per_token(args_.threshold_per_token, args_.threshold, t);
    bool is_stopped = false;
    Float cumulative = 0;
    int64_t num_real = 0;
    for (int64_t j = 0; j < num_taken; ++j) {
      const Float key = needs_.logit_keys ? row.key_scores[taken[j]] : key_value(taken_keys[j]);
      is_stopped |= has_threshold() && !(key > threshold);
      if (is_stopped && num_real >= args_.min_k) return j;
      num_real += taken[j] < shape_.num_experts;
      cumulative += row.scores[taken[j]];
      is_stopped |= has_top_p() && cumulative > top_p;
    }
    return num_taken;
  }

  Float per_token(const Strided<float>& values, double otherwise, int64_t t) const {
    return values.data != nullptr ? *row_of<float>(values, t) : static_cast<Float>(otherwise);
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

  GateArgs args_;
  GateShape shape_;
  GateNeeds needs_;
  GateKeys<V> keys_;
  GateGroups<V> groups_;
  GateWeights<V> weights_;
  int64_t num_columns_, padded_, group_size_;
  int64_t slots_;
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
