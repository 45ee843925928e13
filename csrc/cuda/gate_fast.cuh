// The common case of a row of the gate, in registers: top-k of at most 256 logits, without groups, masks, noise, bias
// or stop rules. What it does not take (a NaN, an infinity, fewer numbers than K) goes the general way of gate.cu, with
// the same choice; which way a row goes depends on the row alone.
//
// A lane has kPerLane logits, in packs of up to 16 bytes. For K < kRadixK it shows its best and keeps its second best:
// K picks, one redux each, move on whoever shows what was picked. They are right if exactly K logits reach the last
// value picked: a tie between lanes moves two on, a lane with three of the K best shows nothing in time, and either
// leaves more than K there. Such rows, and larger K, bisect for the K-th largest key (FastRow::select), which takes
// ties by column; the chosen ones then lie side by side in shared memory and are ranked by counting.
#pragma once

#include <utility>

#include "cuda/gate_score.cuh"
#include "cuda/gate_select.cuh"

namespace fastmoe_route {
namespace cuda {

constexpr int kFastMostK = 2 * kWarp;             // chosen columns of a fast row, two a lane
constexpr int kFastWords = 2 * (kFastMostK + 2);  // their entries, and one of padding

// The exponentials of a row, up to a common factor of about 1.
//
// In short rows e^(z - max), the product with log2(e) in two parts. In long ones the bound on a weight leaves room for
// one rounding of it, and 2^(z log2(e) - shift) is one fma; the shift is rounded, so that all have the factor 2^r.
template <bool kIsShort>
class Exponentials {
 public:
  __device__ explicit Exponentials(float max) : max_(max), shift_(max * kLog2E) {}

  // 0 for -inf; a NaN for a NaN, and for every infinity if the largest is one.
  __device__ float operator()(float z) const {
    if (!kIsShort) return exp2_approximate(fmaf(z, kLog2E, -shift_));
    constexpr float kLn2 = 0.69314718055994531f, kSmallest = -200.0f;
    float y = z - max_;
    y = y < kSmallest ? kSmallest : y;  // an infinity would spoil the second part
    const float high = y * kLog2E;
    const float e = __expf(y);
    return fmaf(e, fmaf(y, kLog2E, -high) * kLn2, e);
  }

  // log(sum of e^z), given the sum of these.
  __device__ float log_of(float sum) const {
    constexpr float kLn2 = 0.69314718055994531f;
    const float log = logf(sum);
    return max_ + (kIsShort ? log : fmaf(fmaf(max_, kLog2E, -shift_), -kLn2, log));
  }

 private:
  static constexpr float kLog2E = 1.4426950408889634f;

  __device__ static float exp2_approximate(float y) {
    float e;
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(y));
    return e;
  }

  float max_, shift_;
};

// One row; every function is for all lanes.
template <class T, int kPerLane>
class FastRow {
 public:
  static constexpr int kMostColumns = kWarp * kPerLane;
  static constexpr int kPack = kPerLane * sizeof(T) <= 16 ? kPerLane : 16 / sizeof(T);

  // `memory` holds kFastWords, aligned to 16 bytes.
  __device__ FastRow(const GateArgs& args, int* memory, int* demand)
      : a_(args), entries_(reinterpret_cast<uint64_t*>(memory)), demand_(demand) {}

  // The whole row, or false and nothing written. `sums`, if not null, are the warp's sums of scores.
  __device__ bool run(int64_t t, float* sums) {
    load(t);
    float first = larger(z_[0], z_[1]), second = fminf(z_[0], z_[1]);
#pragma unroll
    for (int i = 2; i < kPerLane; ++i) {
      second = larger(second, fminf(first, z_[i]));
      first = larger(first, z_[i]);
    }
    const int first_key = number_key(first), second_key = number_key(second);
    const int largest = __reduce_max_sync(kAllLanes, first_key);
    const Exponents exponents(key_value(largest));
    float e[kPerLane], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      e[i] = exponents(z_[i]);
      sum += e[i];
    }
    sum = warp_sum(sum);
    // Not of a NaN, of a +inf, of only -inf, nor where the common factor is far from 1.
    if (!(sum >= 0.5f && sum <= 2.0f * kMostColumns)) return false;

    const int k = static_cast<int>(a_.shape.top_k);
    const Scoring scoring{a_.shape.score, exponents, sum};
    int last = largest;
    if (k >= kRadixK || !pick(t, k, first, second, first_key, second_key, &last, scoring)) {
      if (k >= kRadixK) last = __reduce_min_sync(kAllLanes, k > kWarp ? second_key : first_key);
      last = last > kMinusInfinity ? last : kMinusInfinity + 1;
      if (!select(t, k, last, largest, scoring)) return false;
    }
    if (sums != nullptr) add_statistics(t, e, scoring, sums);
    return true;
  }

 private:
  using Exponents = Exponentials<(kPerLane <= 4)>;
  static constexpr int kMinusInfinity = static_cast<int>(0x807fffff);  // its key

  struct Scoring {
    Score score;
    Exponents exponents;
    float sum;

    __device__ float operator()(float z) const {
      return score == Score::kSoftmax ? exponents(z) / sum : elementwise_score(score, z);
    }
  };

  __device__ int column_of(int i) const { return (i / kPack * kWarp + lane_index()) * kPack + i % kPack; }

  __device__ void load(int64_t t) {
    const T* const row = static_cast<const T*>(a_.logits.data) + t * a_.logits.stride_row;
    const int num_columns = static_cast<int>(a_.shape.num_experts);
#pragma unroll
    for (int p = 0; p < kPerLane / kPack; ++p) {
      const int column = column_of(p * kPack);
      if (column < num_columns) {
        const Pack<T, kPack> pack = *reinterpret_cast<const Pack<T, kPack>*>(row + column);
#pragma unroll
        for (int n = 0; n < kPack; ++n) z_[p * kPack + n] = widen(pack.values[n]);
      } else {
#pragma unroll
        for (int n = 0; n < kPack; ++n) z_[p * kPack + n] = -INFINITY;
      }
    }
  }

  // Bit i: logit i of this lane is at the floor or above it.
  __device__ unsigned at_least(float floor) const {
    return at_least(floor, std::make_integer_sequence<int, kPerLane>{});
  }
  template <int... i>
  __device__ unsigned at_least(float floor, std::integer_sequence<int, i...>) const {
    unsigned bits = 0;
    (set_if_at_least<1 << i>(bits, z_[i], floor), ...);
    return bits;
  }
  // In two instructions, where the compiler takes three.
  template <int kBit>
  __device__ static void set_if_at_least(unsigned& bits, float z, float floor) {
    asm("{.reg .pred reaches; setp.ge.f32 reaches, %1, %2; @reaches or.b32 %0, %0, %3;}"
        : "+r"(bits)
        : "f"(z), "f"(floor), "n"(kBit));
  }

  // K picks. False, and nothing written, where they are not the K best; *last is then at the K-th largest key or below.
  __device__ bool pick(int64_t t, int k, float first, float second, int first_key, int second_key, int* last,
                       const Scoring& scoring) {
    int shown = first_key, next = second_key, best = *last;
    unsigned ranks = 0;  // bit j: what pick j took was this lane's
#pragma unroll
    for (int j = 0; j < kRadixK; ++j) {
      if (j >= k) break;
      if (j > 0) best = __reduce_max_sync(kAllLanes, shown);
      const bool is_own = shown == best;
      ranks |= is_own ? 1u << j : 0u;
      shown = is_own ? next : shown;
      next = is_own ? kDisallowed : next;
    }
    *last = best;
    const unsigned own = at_least(key_value(best));
    if (best <= kMinusInfinity || __reduce_add_sync(kAllLanes, __popc(own)) != k) return false;

    const bool has_two = __popc(own) == 2;
    float score = 0.0f, second_score = 0.0f;
    if (own != 0) score = scoring(first);
    if (has_two) second_score = scoring(second);
    const float divisor = divisor_of(score + second_score);
    if (own == 0) return true;
    unsigned of_first = own;
    if (has_two) {
      of_first = at_least(first);
      of_first &= ~of_first + 1;  // the lower column of equal ones
      write(t, k, 31 - __clz(ranks), column_of(31 - __clz(own ^ of_first)), second_score / divisor);
    }
    write(t, k, 31 - __clz(ranks & (~ranks + 1)), column_of(31 - __clz(of_first)), score / divisor);
    return true;
  }

  // What the scores of the chosen are divided by, given this lane's part of their sum.
  __device__ float divisor_of(float score) const {
    if (!a_.shape.normalize) return 1.0f;
    const float total = warp_sum(score);
    return total < kWeightFloor ? kWeightFloor : total;
  }

  __device__ void write(int64_t t, int k, int rank, int column, float weight) {
    const int64_t at = t * k + rank;
    static_cast<float*>(a_.weights)[at] = weight * static_cast<float>(a_.shape.scale);
    a_.experts[at] = column;
    atomicAdd(demand_ + column, 1);
  }

  // The K best, K up to kFastMostK, by bisection of [low, high], where the K-th largest key is. False, and nothing
  // written, if there are fewer numbers.
  __device__ bool select(int64_t t, int k, int low, int high, const Scoring& scoring) {
    while (low < high) {
      const int middle = middle_key(low, high);
      const int count = __reduce_add_sync(kAllLanes, __popc(at_least(key_value(middle))));
      if (count >= k) low = middle;
      if (count < k) high = middle - 1;
      if (count == k) break;
    }
    unsigned own = at_least(key_value(low));
    const int found = __reduce_add_sync(kAllLanes, __popc(own));
    if (found < k) return false;
    if (found > k) own = lowest_of_ties(k, own, at_least(key_value(low + 1)));
    place(k, own);
    __syncwarp();

    uint64_t entry[2] = {0, 0};
    float score[2] = {0.0f, 0.0f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = h * kWarp + lane_index();
      if (at >= k) continue;
      entry[h] = entries_[at];
      score[h] = scoring(key_value(entry_key(entry[h])));
    }
    const float divisor = divisor_of(score[0] + score[1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h * kWarp >= k) break;
      const int rank = count_better(entries_, k, entry[h]);
      if (h * kWarp + lane_index() < k) write(t, k, rank, entry_position(entry[h]), score[h] / divisor);
    }
    __syncwarp();  // the next row writes what is read here
    return true;
  }

  // The k best of `at_floor`, of which those outside `above` are equal: all above, and the lowest columns of the rest.
  __device__ unsigned lowest_of_ties(int k, unsigned at_floor, unsigned above) const {
    unsigned equal = at_floor ^ above, own = above;
    for (int left = k - __reduce_add_sync(kAllLanes, __popc(above)); left > 0; --left) {
      const int column = equal != 0 ? column_of(__ffs(equal) - 1) : INT_MAX;
      if (column == __reduce_min_sync(kAllLanes, column)) {
        own |= equal & (~equal + 1);
        equal &= equal - 1;
      }
    }
    return own;
  }

  // Puts the k chosen side by side, in any order, and a last entry behind them that is worse than all.
  __device__ void place(int k, unsigned own) {
    int at = __popc(own);
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, at, distance);
      at += lane_index() >= distance ? before : 0;
    }
    at -= __popc(own);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((own >> i & 1u) == 0) continue;
      entries_[at++] = entry_of(number_key(z_[i]), column_of(i));
    }
    if (lane_index() == 0) entries_[k] = 0;
  }

  __device__ void add_statistics(int64_t t, const float (&e)[kPerLane], const Scoring& scoring, float* sums) {
    if (lane_index() == 0) static_cast<float*>(a_.logsumexp)[t] = scoring.exponents.log_of(scoring.sum);
    const bool is_softmax = a_.shape.score == Score::kSoftmax;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int column = column_of(i);
      if (column >= a_.shape.num_experts) continue;
      sums[column] += is_softmax ? e[i] / scoring.sum : elementwise_score(a_.shape.score, z_[i]);
    }
  }

  const GateArgs& a_;
  uint64_t* const entries_;
  int* const demand_;
  float z_[kPerLane];
};

}  // namespace cuda
}  // namespace fastmoe_route
