// The common case of a row of the gate, in registers: top-k of at most 256 logits, without groups, masks, noise, bias
// or stop rules. What it does not take (a NaN, an infinity, fewer numbers than K) goes the general way, with the same
// choice; which way a row goes depends on the row alone.
//
// A lane has kPerLane logits, in packs of up to 16 bytes, which are loaded one by one where rows do not lie in packs:
// the same lanes have the same columns, so bits do not depend on the layout. For K up to kMostPicks a lane shows its
// best and keeps its second best: K picks, one redux each, move on whoever shows what was picked. They are right if
// exactly K logits reach the last value picked: a tie between lanes moves two on, a lane with three of the K best shows
// nothing in time, and either leaves more than K there. Such rows, and larger K, bisect for the K-th largest key
// (FastRow::select), which takes ties by column; the chosen ones then lie side by side in shared memory and are ranked
// by counting.
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

// How a lane loads its logits: in packs, all of which are there, in packs, or one by one.
enum class LogitLoads { kAllPacks, kPacks, kElements };

// The part of a call that fast rows look at.
struct FastArgs {
  const void* logits;
  int64_t stride_row;
  int64_t stride_col;
  float* weights;
  int32_t* experts;
  float* logsumexp;
  float* scores;  // [T, E], or null
  int num_columns;
  int top_k;
  Score score;
  bool normalize;
  bool has_more;  // statistics or scores
  float scale;
  LogitLoads loads;
};

// One row; every function is for all lanes.
template <class T, int kPerLane>
class FastRow {
 public:
  static constexpr int kMostColumns = kWarp * kPerLane;
  static constexpr int kPack = kPerLane * sizeof(T) <= 16 ? kPerLane : 16 / sizeof(T);
  // Where lanes show all they have, only ties fail; elsewhere many of the K best are likely to meet in a lane.
  static constexpr int kMostPicks = kPerLane == 2 ? kWarp : kRadixK - 1;

  __device__ FastRow(const FastArgs& args, int* demand) : a_(args), demand_(demand) {}

  // Experts, weights and demand of row t, or false and nothing written. Of the warp's memory it may use kFastWords.
  __device__ bool choose(unsigned t, const RowMemory& memory) {
    load(t);
    float first = larger(z_[0], z_[1]), second = fminf(z_[0], z_[1]);
#pragma unroll
    for (int i = 2; i < kPerLane; ++i) {
      second = larger(second, fminf(first, z_[i]));
      first = larger(first, z_[i]);
    }
    const int first_key = number_key(first), second_key = number_key(second);
    int largest = __reduce_max_sync(kAllLanes, first_key);
    exponentials_ = Exponents(key_value(largest));
    sum_ = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      e_[i] = exponentials_(z_[i]);
      sum_ += e_[i];
    }
    sum_ = warp_sum(sum_);
    // Not of a NaN, of a +inf, of only -inf, nor where the common factor is far from 1: in [1/2, 2 kMostColumns].
    constexpr unsigned kLeast = 0x3f000000, kDoubling = 0x00800000;
    constexpr unsigned kRange = (kPerLane == 2 ? 8 : kPerLane == 4 ? 9 : 10) * kDoubling - 1;
    if (__float_as_uint(sum_) - kLeast > kRange) return false;

    const int k = a_.top_k;
    int floor;
    if (k <= kMostPicks) {
      Picks picks{first_key, second_key, largest};
      if (k == 8) {  // the usual K, saving the count
        picks.take(std::make_integer_sequence<int, 8>{});
      } else {
        picks.take_up_to(k, std::make_integer_sequence<int, kMostPicks>{});
      }
      if (write_picks(t, k, first, second, picks)) return true;
      floor = picks.best;
    } else {
      floor = __reduce_min_sync(kAllLanes, k > kWarp ? second_key : first_key);
    }
    floor = floor > kMinusInfinity ? floor : kMinusInfinity + 1;
    if (k <= kMostPicks) raise(k, &floor, &largest);
    return select(t, k, floor, largest, reinterpret_cast<uint64_t*>(warp_memory(memory, warp_index())));
  }

  // After a choice: statistics, where `sums` are the warp's sums of scores and not null, and scores.
  __device__ void write_more(unsigned t, float* sums) {
    if (sums != nullptr && own_lane() == 0) a_.logsumexp[t] = exponentials_.log_of(sum_);
    const bool is_softmax = a_.score == Score::kSoftmax;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int column = column_of(i);
      if (column >= a_.num_columns) continue;
      const float score = is_softmax ? e_[i] / sum_ : elementwise_score(a_.score, z_[i]);
      if (sums != nullptr) sums[column] += score;
      if (a_.scores != nullptr) a_.scores[int64_t{t} * a_.num_columns + column] = score;
    }
  }

 private:
  using Exponents = Exponentials<(kPerLane <= 4)>;
  static constexpr int kMinusInfinity = static_cast<int>(0x807fffff);  // its key

  __device__ static unsigned bit(int i) { return 0x80000000u >> i; }
  __device__ static int first_of(unsigned bits) { return __clz(static_cast<int>(bits)); }

  // Rises with i.
  __device__ static int column_of(int i) { return i % kPack + i / kPack * (kPack * kWarp) + own_lane() * kPack; }

  __device__ void load(unsigned t) {
    const T* const row = static_cast<const T*>(a_.logits) + t * a_.stride_row;
    if (a_.loads == LogitLoads::kAllPacks) {
      load<true>(row + own_lane() * kPack);
    } else if (a_.loads == LogitLoads::kPacks) {
      load<false>(row + own_lane() * kPack);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int column = column_of(i);
        z_[i] = column < a_.num_columns ? widen(row[column * a_.stride_col]) : -INFINITY;
      }
    }
  }
  template <bool kIsFull>
  __device__ void load(const T* row) {
#pragma unroll
    for (int p = 0; p < kPerLane / kPack; ++p) {
      if (kIsFull || column_of(p * kPack) < a_.num_columns) {
        const Pack<T, kPack> pack = *reinterpret_cast<const Pack<T, kPack>*>(row + p * kPack * kWarp);
#pragma unroll
        for (int n = 0; n < kPack; ++n) z_[p * kPack + n] = widen(pack.values[n]);
      } else {
#pragma unroll
        for (int n = 0; n < kPack; ++n) z_[p * kPack + n] = -INFINITY;
      }
    }
  }

  // bit(i): logit i of this lane is at the floor or above it.
  __device__ unsigned at_least(float floor) const {
    return at_least(floor, std::make_integer_sequence<int, kPerLane>{});
  }
  template <int... i>
  __device__ unsigned at_least(float floor, std::integer_sequence<int, i...>) const {
    unsigned bits = 0;
    (set_if_at_least<(0x80000000u >> i)>(bits, z_[i], floor), ...);
    return bits;
  }
  // In two instructions, where the compiler takes three.
  template <unsigned kBit>
  __device__ static void set_if_at_least(unsigned& bits, float z, float floor) {
    asm("{.reg .pred reaches; setp.ge.f32 reaches, %1, %2; @reaches or.b32 %0, %0, %3;}"
        : "+r"(bits)
        : "f"(z), "f"(floor), "n"(kBit));
  }

  // What a lane shows, what it shows next, and what the warp picks.
  struct Picks {
    int shown, next;
    int best;            // of the last pick; the largest key at first
    unsigned ranks = 0;  // bit(j): what pick j took was this lane's

    template <int... j>
    __device__ void take(std::integer_sequence<int, j...>) {
      (take_one<j>(), ...);
    }
    template <int... j>
    __device__ void take_up_to(int k, std::integer_sequence<int, j...>) {
      (void)((take_one<j>(), j + 1 < k) && ...);
    }
    template <int j>
    __device__ void take_one() {
      if (j > 0) best = __reduce_max_sync(kAllLanes, shown);
      // Predicated moves, where the compiler selects and combines.
      asm("{.reg .pred is_own; setp.eq.s32 is_own, %0, %3; @is_own or.b32 %2, %2, %4;"
          " @is_own mov.b32 %0, %1; @is_own mov.b32 %1, 0x80000000;}"
          : "+r"(shown), "+r"(next), "+r"(ranks)
          : "r"(best), "n"(0x80000000u >> j));
    }
  };

  // False, and nothing written, where the picks are not the K best. The last one is at the K-th largest key or below.
  __device__ bool write_picks(unsigned t, int k, float first, float second, const Picks& picks) {
    const unsigned own = at_least(key_value(picks.best));
    // Of a pick of -inf these are all there are, and of one of "disallowed", a NaN, none.
    if (__reduce_add_sync(kAllLanes, __popc(own)) != k) return false;

    const bool has_two = __popc(own) == 2;
    float score = score_of(first), second_score = 0.0f;  // of the lanes that have one
    if (__any_sync(kAllLanes, has_two)) second_score = has_two ? score_of(second) : 0.0f;
    if (a_.normalize) {
      const float divisor = total_of(own != 0 ? score + second_score : 0.0f);
      score /= divisor;
      second_score /= divisor;
    }
    if (own == 0) return true;
    const int rank = first_of(picks.ranks);
    int at = first_of(own);
    if (has_two) {
      at = first_of(at_least(first));
      write(t, k, first_of(picks.ranks ^ bit(rank)), column_of(first_of(own ^ bit(at))), second_score);
    }
    write(t, k, rank, column_of(at), score);
    return true;
  }

  __device__ float score_of(float z) const {
    return a_.score == Score::kSoftmax ? exponentials_(z) / sum_ : elementwise_score(a_.score, z);
  }

  // What normalized scores are divided by, given this lane's part of their sum.
  __device__ static float total_of(float score) {
    const float total = warp_sum(score);
    return total < kWeightFloor ? kWeightFloor : total;
  }

  __device__ void write(unsigned t, int k, int rank, int column, float score) {
    const int at = static_cast<int>(t) * k + rank;  // below 2^31
    a_.weights[at] = score * a_.scale;
    a_.experts[at] = column;
    atomicAdd(demand_ + column, 1);
  }

  // Narrows [low, high], where the K-th largest key is: picks fail mostly by the one logit or two that reach their last
  // one too many, which is found sooner from below than by bisection.
  __device__ void raise(int k, int* low, int* high) const {
    for (int step = 0; step < 2; ++step) {
      const float floor = key_value(*low);
      float least = INFINITY;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) least = z_[i] >= floor ? fminf(least, z_[i]) : least;
      const int lowest = __reduce_min_sync(kAllLanes, number_key(least));
      const int count = count_from(lowest + 1);
      *low = count >= k ? lowest + 1 : lowest;
      if (count <= k) *high = *low;
      if (count <= k) return;
    }
  }

  // How many logits have that key or a larger one.
  __device__ int count_from(int key) const { return __reduce_add_sync(kAllLanes, __popc(at_least(key_value(key)))); }

  // The K best, K up to kFastMostK, by bisection of [low, high], where the K-th largest key is. False, and nothing
  // written, if there are fewer numbers.
  __device__ bool select(unsigned t, int k, int low, int high, uint64_t* entries) {
    find_kth_key(k, &low, &high, [this](int key) { return count_from(key); });
    unsigned own = at_least(key_value(low));
    const int found = __reduce_add_sync(kAllLanes, __popc(own));
    if (found < k) return false;
    if (found > k) own = lowest_of_ties(k, own, at_least(key_value(low + 1)));
    place(k, own, entries);
    __syncwarp();

    uint64_t entry[2] = {0, 0};
    float score[2] = {0.0f, 0.0f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = h * kWarp + own_lane();
      if (at >= k) continue;
      entry[h] = entries[at];
      score[h] = score_of(key_value(entry_key(entry[h])));
    }
    const float divisor = a_.normalize ? total_of(score[0] + score[1]) : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h * kWarp >= k) break;
      const int rank = count_better(entries, k, entry[h]);
      if (h * kWarp + own_lane() < k) write(t, k, rank, entry_position(entry[h]), score[h] / divisor);
    }
    __syncwarp();  // the next row writes what is read here
    return true;
  }

  // The k best of `at_floor`, of which those outside `above` are equal: all above, and the lowest columns of the rest.
  __device__ static unsigned lowest_of_ties(int k, unsigned at_floor, unsigned above) {
    unsigned equal = at_floor ^ above, own = above;
    for (int left = k - __reduce_add_sync(kAllLanes, __popc(above)); left > 0; --left) {
      const int i = first_of(equal);
      const int column = equal != 0 ? column_of(i) : INT_MAX;
      if (column == __reduce_min_sync(kAllLanes, column)) {
        own |= bit(i);
        equal ^= bit(i);
      }
    }
    return own;
  }

  // Puts the k chosen side by side, in any order, and an entry behind them that is worse than all.
  __device__ void place(int k, unsigned own, uint64_t* entries) const {
    int at = __popc(own);
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, at, distance);
      at += own_lane() >= distance ? before : 0;
    }
    at -= __popc(own);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((own & bit(i)) == 0) continue;
      entries[at++] = entry_of(number_key(z_[i]), column_of(i));
    }
    if (own_lane() == 0) entries[k] = 0;
  }

  const FastArgs& a_;
  int* const demand_;
  Exponents exponentials_{0.0f};
  float sum_;
  float z_[kPerLane], e_[kPerLane];
};

}  // namespace cuda
}  // namespace fastmoe_route
