// What the gate knows of a call and of a row in flight.
#pragma once

#include "cpu/gate_select.h"

FASTMOE_ROUTE_ISA_BEGIN

// Which parts of the general algorithm this call needs: decided once, not per row.
struct GateNeeds {
  bool logit_keys;    // choice compares the logits themselves
  bool scores;        // every column's score is formed
  bool noisy_scores;  // and every column's score under noise
  bool softmax_sum;   // the softmax denominator is formed
  bool late_scale;    // the scores stay exponentials until they are used: GateRow::factor makes scores of them
  bool logits_only;   // finite logits alone decide, and none of them is left out
  bool weigh_keys;    // a chosen key, taken back to its logit, gives the weight
  bool carry_scores;  // nothing but score_sum needs the scores of rows whose logits decide

  explicit GateNeeds(const GateArgs& args) {
    const GateShape& shape = args.shape;
    const bool softmax = shape.score == Score::kSoftmax;
    const bool monotone = shape.score != Score::kRelu && !(softmax && shape.softmax_over_group);
    const bool restricted =
        args.bias.data || args.mask.data || args.noise.data || shape.num_groups > 1 || args.max_per_group < shape.top_k;
    const bool stops = args.top_p_per_token.data || args.threshold_per_token.data || args.top_p < INFINITY ||
                       args.threshold > -INFINITY;
    const bool sums_groups = args.topk_groups < shape.num_groups && args.group_score == GroupScore::kTop2Sum;
    logit_keys = monotone && !args.bias.data;
    scores = !logit_keys || args.score_sum || args.scores || stops || sums_groups;
    noisy_scores = args.noise.data && (!logit_keys || stops || sums_groups);
    softmax_sum = softmax && (scores || args.logsumexp || restricted || shape.num_null > 0 || !shape.normalize);
    late_scale = softmax && logit_keys && !stops && !sums_groups;
    // The key of a logit -0 is that of +0: only the identity would tell.
    weigh_keys = logit_keys && !args.noise.data && !stops && shape.num_null == 0 && shape.score != Score::kIdentity &&
                 (late_scale || !softmax);
    logits_only = logit_keys && !restricted;
    carry_scores = logits_only && weigh_keys && softmax && args.score_sum && !args.scores;
  }
};

// Columns of a row in whole vectors.
template <class V>
int64_t padded_columns(const GateShape& shape) {
  return round_up(shape.num_experts + shape.num_null, V::kLanes);
}

// Row t of a matrix of T.
template <class T, class S>
inline const T* row_of(const Strided<S>& matrix, int64_t t) {
  return static_cast<const T*>(static_cast<const void*>(matrix.data)) + t * matrix.stride_row;
}

// What one row needs while it is in flight: its logits, z, lie in `buffer` or where they came from.
template <class V>
struct GateRow : RowOf<V> {
  using Float = typename Arithmetic<V>::Float;
  using Key = typename Arithmetic<V>::Key;
  V largest[kPiles<V>];  // logits, see scan()
  Float *buffer, *scores, *biased, *noisy, *noisy_scores, *taken_scores;
  Key *keys, *block_max, *group_keys, *group_block_max, *group_taken;
  int32_t *group_order, *group_count;
  int32_t* first_columns;   // of each vector of keys
  bool is_direct;           // chosen from the logits: `keys` are not formed
  bool is_carried;          // goes to score_sum with the next row
  int64_t num_keys;         // whole vectors, in rising order of columns; those of closed groups may be left out
  const Float* key_scores;  // scores of the noisy logits where there is noise, else the clean ones
  int64_t num_taken;        // columns selected
  int64_t num_chosen;       // experts among them, up to a stop rule
  Float sum;                // of exp(logit - max)
  Float factor;             // on `scores` and on exp(logit - max): 1 / sum where those are exponentials

  // Carves the buffers of row r of `rows` out of `memory`, or only counts when it is null; returns the bytes of a row.
  // A buffer lies beside that of the next row, so that the rows in flight spread over the sets of the cache.
  int64_t carve(char* memory, const GateShape& shape, int r, int rows) {
    const int64_t columns = padded_columns<V>(shape);
    const int64_t groups = round_up(shape.num_groups, V::kLanes);
    int64_t bytes = 0;
    const auto give = [&](auto*& pointer, int64_t count) {
      const int64_t size = round_up(count * static_cast<int64_t>(sizeof *pointer), 64);
      if (memory != nullptr)
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + rows * bytes + r * size);
      bytes += size;
    };
    for (Float** buffer : {&buffer, &scores, &biased, &noisy, &noisy_scores}) give(*buffer, columns);
    give(taken_scores, shape.top_k + V::kLanes);
    give(keys, columns), give(block_max, Selector<V>::num_blocks(columns));
    give(first_columns, columns / V::kLanes);
    give(group_keys, groups), give(group_block_max, Selector<V>::num_blocks(groups));
    give(group_taken, shape.num_groups), give(group_order, shape.num_groups), give(group_count, shape.num_groups);
    return bytes;
  }
};

FASTMOE_ROUTE_ISA_END
