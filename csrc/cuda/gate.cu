// gate on CUDA: a warp per row, a lane per row where rows are short, one read of the logits.
//
// Who owns what. A block owns a tile of rows, whose size depends on the shape only; its warps take the tile's rows in
// turn. Rows of the common case stay in registers, of a warp (gate_fast.cuh) or of one lane (gate_lanes.cuh); the
// others lie in the warp's own memory (gate_score.cuh), lane l having columns l, l + 32, ...
// Phases of a row, as on the CPU: load -> scores -> ordered integer keys -> groups -> selection and stop rules ->
// weights -> statistics. Selection is exact (gate_select.cuh): K extractions, or from K = 16 on a radix selection.
//
// Determinism: every sum has a fixed order. score_sum is summed by warp over its rows, by block over its warps, then by
// a second kernel over tiles; no float is ever added by an atomic. Only demand, an integer, is.
//
// Choice compares the logits themselves where the score is monotone and there is no bias, and so agrees with the CPU
// bit for bit; otherwise it compares scores, which agree to a few ulp. Arithmetic is float32; float64 is for the CPU.
// Bytes: logits once, outputs once, and with statistics 4 E per tile, written and read.
#include "cuda/gate_fast.cuh"
#include "cuda/gate_lanes.cuh"
#include "cuda/gate_score.cuh"
#include "cuda/gate_select.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int64_t kMaxTiles = 1024;
constexpr int kSumThreads = 1024;

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

// One row in flight. Every function is for all lanes.
template <class T>
class GateRow {
 public:
  __device__ GateRow(const GateCall& call, float* memory, int* demand) : c_(call), demand_(demand) {
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

// kWarpRows: rows that a warp has in flight. Of one row, kPerLane > 0: it takes the way of gate_fast.cuh first, with so
// many logits a lane. Of 32: they take that of gate_lanes.cuh.
template <class T, int kPerLane, int kWarpRows>
__global__ void __launch_bounds__(kGateThreads, kWarpRows > 1 ? 2 : 1)
    gate_kernel(const __grid_constant__ GateCall call) {
  const RowMemory& m = call.memory;
  const int warp = warp_index();
  // Demand is counted by the block where its memory is shared, and added up once per block.
  const int num_counts = m.in_shared ? call.num_experts : 0;
  int* const demand = m.in_shared ? reinterpret_cast<int*>(block_memory(m)) : call.a.demand;
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < num_counts; e += static_cast<int>(blockDim.x)) demand[e] = 0;
  __syncthreads();

  const auto sums_of = [&](int w) { return warp_memory(m, w + 1) - call.num_experts; };
  unsigned tile = blockIdx.x;
  do {
    const unsigned begin = tile * call.rows_per_tile;
    const unsigned end = min(begin + call.rows_per_tile, call.num_tokens);
    if (call.tile_sums != nullptr) {
      for (int e = own_lane(); e < call.num_experts; e += kWarp) sums_of(warp)[e] = 0.0f;
      __syncwarp();  // not every way of a row has the columns lie by lanes alike
    }
    const unsigned step = static_cast<unsigned>(m.num_warps) * kWarpRows;
    for (unsigned t = begin + static_cast<unsigned>(warp) * kWarpRows; t < end; t += step) {
      unsigned left = 1;  // bit i: row t + i goes the general way
      if constexpr (kWarpRows > 1) {
        left = choose_by_lanes<T, kPerLane>(call.fast, t, end, demand,
                                            call.tile_sums != nullptr ? sums_of(warp) : nullptr);
      } else if constexpr (kPerLane > 0) {
        FastRow<T, kPerLane> fast(call.fast, demand);
        if (fast.choose(t, m)) {
          if (call.fast.has_more) fast.write_more(t, call.tile_sums != nullptr ? sums_of(warp) : nullptr);
          continue;
        }
      }
      for (; left != 0; left &= left - 1) {
        const unsigned row = t + static_cast<unsigned>(__ffs(static_cast<int>(left)) - 1);
        GateRow<T>(call, warp_memory(m, warp), demand).run(row);  // made here: other rows do not pay for it
      }
    }
    if (call.tile_sums == nullptr) continue;  // to the condition below
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < call.num_experts; e += static_cast<int>(blockDim.x)) {
      float sum = 0.0f;
      for (int w = 0; w < m.num_warps; ++w) sum += sums_of(w)[e];
      call.tile_sums[int64_t{tile} * call.num_experts + e] = sum;
    }
    __syncthreads();
  } while ((tile += gridDim.x) < call.num_tiles);
  if (num_counts == 0) return;
  __syncthreads();
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < num_counts; e += static_cast<int>(blockDim.x))
    if (demand[e] != 0) atomicAdd(call.a.demand + e, demand[e]);
}

// score_sum[e] = tile_sums[0][e] + tile_sums[1][e] + ..., 32 runs of tiles side by side, then the runs in order.
__global__ void __launch_bounds__(kSumThreads)
    sum_tiles_kernel(const float* tile_sums, int64_t num_tiles, int64_t num_experts, float* score_sum) {
  __shared__ float runs[kSumThreads / kWarp][kWarp + 1];
  const int run = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t e = int64_t{blockIdx.x} * kWarp + lane_index();
  const int64_t run_tiles = (num_tiles + kSumThreads / kWarp - 1) / (kSumThreads / kWarp);
  const int64_t past = (run + 1) * run_tiles;
  const int64_t end = past < num_tiles ? past : num_tiles;
  float sum = 0.0f;
  for (int64_t tile = run * run_tiles; e < num_experts && tile < end; ++tile) sum += tile_sums[tile * num_experts + e];
  runs[run][lane_index()] = sum;
  __syncthreads();
  if (run != 0 || e >= num_experts) return;
  float total = 0.0f;
  for (int r = 0; r < kSumThreads / kWarp; ++r) total += runs[r][lane_index()];
  score_sum[e] = total;
}

GateCall call_of(const GateArgs& a) {
  const GateShape& shape = a.shape;
  GateCall call{};
  call.a = a;
  call.num_columns = static_cast<int>(shape.num_experts + shape.num_null);
  call.num_experts = static_cast<int>(shape.num_experts);
  call.num_groups = static_cast<int>(shape.num_groups);
  call.group_size = static_cast<int>(shape.num_experts / shape.num_groups);
  call.top_k = static_cast<int>(shape.top_k);
  const bool is_grouped = shape.score == Score::kSoftmax && shape.softmax_over_group;
  call.logit_keys = shape.score != Score::kRelu && !is_grouped && a.bias.data == nullptr;
  call.counts_groups = a.max_per_group < shape.top_k && shape.num_null == 0;
  call.is_ranked = shape.top_k >= kRadixK && !call.counts_groups;
  call.has_top_p = a.top_p_per_token.data != nullptr || a.top_p < INFINITY;
  call.has_threshold = a.threshold_per_token.data != nullptr || a.threshold > -INFINITY;
  const bool sums_groups = a.topk_groups < shape.num_groups && a.group_score == GroupScore::kTop2Sum;
  call.fast = {a.logits.data,
               a.logits.stride_row,
               a.logits.stride_col,
               static_cast<float*>(a.weights),
               a.experts,
               static_cast<float*>(a.logsumexp),
               static_cast<float*>(a.scores),
               call.num_columns,
               call.top_k,
               shape.score,
               shape.normalize,
               a.logsumexp != nullptr || a.scores != nullptr,
               static_cast<float>(shape.scale),
               LogitLoads::kElements};
  call.noisy_scores =
      a.noise.data != nullptr && (!call.logit_keys || call.has_top_p || call.has_threshold || sums_groups);
  return call;
}

// How rows of a call are taken: the template arguments of gate_kernel. It follows from what is computed, never from the
// layout of the logits or from which results are asked for beside the weights, so these change no bit.
struct Way {
  int per_lane, warp_rows;
};
Way way_of(const GateCall& call) {
  constexpr Way kGeneral{0, 1};
  const GateArgs& a = call.a;
  const bool is_plain = call.logit_keys && a.mask.data == nullptr && a.noise.data == nullptr &&
                        a.k_per_token.data == nullptr && !call.has_top_p && !call.has_threshold;
  const bool is_free = a.topk_groups == a.shape.num_groups && a.max_per_group >= a.shape.top_k;
  if (!is_plain || !is_free || a.shape.num_null > 0) return kGeneral;
  if (call.num_columns <= kLanesMostColumns && a.shape.score != Score::kSqrtSoftplus)
    return {call.num_columns <= kLanesMostColumns / 2 ? kLanesMostColumns / 2 : kLanesMostColumns, kWarp};
  const int per_lane = call.num_columns <= 2 * kWarp ? 2 : call.num_columns <= 4 * kWarp ? 4 : 8;
  return call.num_columns > per_lane * kWarp || call.top_k > kFastMostK ? kGeneral : Way{per_lane, 1};
}

template <class T>
LogitLoads loads_of(const GateCall& call, const Way& way) {
  const Strided<void>& logits = call.a.logits;
  const int64_t most = way.per_lane * static_cast<int64_t>(sizeof(T)), bytes = most < 16 ? most : 16;
  const auto is_whole = [&](int64_t size) { return size * static_cast<int64_t>(sizeof(T)) % bytes == 0; };
  if (way.per_lane == 0 || logits.stride_col != 1 || !is_whole(logits.stride_row) || !is_whole(call.num_columns) ||
      reinterpret_cast<uintptr_t>(logits.data) % bytes != 0)
    return LogitLoads::kElements;
  return call.num_columns == way.per_lane * kWarp ? LogitLoads::kAllPacks : LogitLoads::kPacks;
}

template <class T>
CudaStatus launch_gate(const GateCall& call, const Way& way, const CudaQueue& queue) {
  const auto launch = [&](auto kernel) { return launch_rows<GateCall>(kernel, call, call.memory, queue); };
  switch (way.per_lane * way.warp_rows) {
    case 2: return launch(gate_kernel<T, 2, 1>);
    case 4: return launch(gate_kernel<T, 4, 1>);
    case 8: return launch(gate_kernel<T, 8, 1>);
    case 8 * kWarp: return launch(gate_kernel<T, 8, kWarp>);
    case 16 * kWarp: return launch(gate_kernel<T, 16, kWarp>);
    default: return launch(gate_kernel<T, 0, 1>);
  }
}

template <class T>
CudaStatus gate_as(const GateArgs& a, const CudaQueue& queue) {
  const int64_t num_tokens = a.shape.num_tokens;
  GateCall call = call_of(a);
  const size_t demand_bytes = call.num_experts * sizeof(int32_t);
  CudaStatus status = status_of(cudaMemsetAsync(a.demand, 0, demand_bytes, queue.stream));
  if (status.code != 0) return status;
  if (num_tokens == 0) {
    if (a.score_sum == nullptr) return {};
    return status_of(cudaMemsetAsync(a.score_sum, 0, call.num_experts * sizeof(float), queue.stream));
  }
  call.num_tokens = static_cast<unsigned>(num_tokens);
  const Way way = way_of(call);
  call.fast.loads = loads_of<T>(call, way);
  const int64_t block_rows = kGateWarps * way.warp_rows;
  call.rows_per_tile = static_cast<unsigned>(ceil_div(ceil_div(num_tokens, kMaxTiles), block_rows) * block_rows);
  call.num_tiles = static_cast<unsigned>(ceil_div(num_tokens, call.rows_per_tile));
  if (a.score_sum != nullptr) {
    call.tile_sums = static_cast<float*>(queue.scratch(int64_t{call.num_tiles} * call.num_experts * sizeof(float)));
  }
  call.memory = plan_rows(call.row_words(), ceil_div(call.num_experts, 4) * 4, call.num_tiles, queue);
  status = launch_gate<T>(call, way, queue);
  if (status.code != 0 || a.score_sum == nullptr) return status;
  sum_tiles_kernel<<<num_blocks(call.num_experts, kWarp), kSumThreads, 0, queue.stream>>>(
      call.tile_sums, call.num_tiles, call.num_experts, static_cast<float*>(a.score_sum));
  return launched();
}

}  // namespace

CudaStatus gate(const GateArgs& a, const CudaQueue& queue) {
  switch (a.dtype) {
    case DType::kFloat32: return gate_as<float>(a, queue);
    case DType::kBFloat16: return gate_as<BFloat16>(a, queue);
    case DType::kFloat16: return gate_as<Float16>(a, queue);
    default: return not_supported("logits must be float32, bfloat16 or float16 on CUDA, got float64");
  }
}

}  // namespace cuda
}  // namespace fastmoe_route
