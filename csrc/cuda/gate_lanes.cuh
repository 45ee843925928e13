// The common case of rows of at most 16 logits: a lane owns a row, so a warp has 32 in flight and no lane waits for
// another. What gate_fast.cuh does not take goes the general way of gate.cu from here too, row by row.
//
// A column's rank is the number of columns that are better, ties to the lower: one comparison for every pair of
// columns, whatever K is. Columns of rank below K go to the slot of their rank.
#pragma once

#include "cuda/gate_fast.cuh"

namespace fastmoe_route {
namespace cuda {

constexpr int kLanesMostColumns = 16;

template <class T, int kColumns>
class LaneRow {
 public:
  static constexpr int kPack = 16 / sizeof(T);

  __device__ explicit LaneRow(const FastArgs& args) : a_(args) {}

  // Experts and weights of row t, this lane's own; false, and nothing written, where the general way has to be gone.
  __device__ bool choose(unsigned t) {
    load(t);
    float max = z_[0];
#pragma unroll
    for (int i = 1; i < kColumns; ++i) max = larger(max, z_[i]);
    exponentials_ = Exponentials<true>(max);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      score_[i] = exponentials_(z_[i]);
      total += score_[i];
    }
    sum_ = total;
    if (!(total >= 0.5f && total <= 2.0f * kColumns)) return false;  // a NaN, a +inf, only -inf
    rank();
    if (!take_best()) return false;

    const bool is_softmax = a_.score == Score::kSoftmax;
    if (!is_softmax) form_elementwise();
    score_factor_ = is_softmax ? 1.0f / sum_ : 1.0f;
    float divisor = 1.0f;
    if (a_.normalize) {
      divisor = 0.0f;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) divisor += is_chosen(i) ? score_[i] : 0.0f;
      divisor = divisor < kWeightFloor ? kWeightFloor : divisor;
    } else if (is_softmax) {
      divisor = sum_;
    }
    write(t, 1.0f / divisor * a_.scale);
    return true;
  }

  __device__ bool is_chosen(int column) const { return (chosen_ >> column & 1) != 0; }
  __device__ float score(int column) const { return score_[column] * score_factor_; }
  __device__ float logsumexp() const { return exponentials_.log_of(sum_); }

 private:
  __device__ void load(unsigned t) {
    const T* const row = static_cast<const T*>(a_.logits) + t * a_.stride_row;
    if (a_.loads == LogitLoads::kElements) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) z_[i] = i < a_.num_columns ? widen(row[i * a_.stride_col]) : -INFINITY;
      return;
    }
#pragma unroll
    for (int p = 0; p < kColumns; p += kPack) {
      Pack<T, kPack> pack{};
      const bool is_there = p < a_.num_columns;
      if (is_there) pack = *reinterpret_cast<const Pack<T, kPack>*>(row + p);
#pragma unroll
      for (int n = 0; n < kPack; ++n) z_[p + n] = is_there ? widen(pack.values[n]) : -INFINITY;
    }
  }

  __device__ void rank() {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) rank_[i] = i;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
      for (int j = i + 1; j < kColumns; ++j) {
        const int is_better = z_[j] > z_[i];
        rank_[i] += is_better;
        rank_[j] -= is_better;
      }
    }
  }

  // The columns of rank below K; false if one of them holds -inf.
  __device__ bool take_best() {
    chosen_ = 0;
    bool are_numbers = true;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (rank_[i] >= a_.top_k) continue;
      chosen_ |= 1u << i;
      are_numbers &= z_[i] > -INFINITY;
    }
    return are_numbers;
  }

  // Sigmoid or identity: relu is not monotone, and sqrtsoftplus in so many copies would be long.
  __device__ void form_elementwise() {
    const bool is_sigmoid = a_.score == Score::kSigmoid;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) score_[i] = is_sigmoid ? sigmoid(z_[i]) : z_[i];
  }

  __device__ void write(unsigned t, float factor) const {
    const int first = static_cast<int>(t) * a_.top_k;  // below 2^31
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (rank_[i] >= a_.top_k) continue;
      a_.weights[first + rank_[i]] = score_[i] * factor;
      a_.experts[first + rank_[i]] = i;
    }
  }

  const FastArgs& a_;
  Exponentials<true> exponentials_{0.0f};
  float sum_, score_factor_;
  float z_[kColumns], score_[kColumns];
  int rank_[kColumns];
  unsigned chosen_;
};

// Rows [begin, end), 32 at most, of a warp: their experts, weights, demand, statistics and scores. Returns the lanes
// whose rows have to go the general way. `sums` are the warp's sums of scores, or null.
template <class T, int kColumns>
__device__ unsigned choose_by_lanes(const FastArgs& args, unsigned begin, unsigned end, int* demand, float* sums) {
  const unsigned t = begin + own_lane();
  LaneRow<T, kColumns> row(args);
  const bool is_row = t < end, is_done = is_row && row.choose(t);
  if (is_done && sums != nullptr) args.logsumexp[t] = row.logsumexp();
  if (is_done && args.scores != nullptr) {
#pragma unroll
    for (int e = 0; e < kColumns; ++e)
      if (e < args.num_columns) args.scores[int64_t{t} * args.num_columns + e] = row.score(e);
  }
  int count = 0;
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kColumns; ++e) {
    const unsigned takers = __ballot_sync(kAllLanes, is_done && row.is_chosen(e));
    if (own_lane() == e) count = __popc(takers);
    if (sums == nullptr) continue;
    const float total = warp_sum(is_done ? row.score(e) : 0.0f);
    if (own_lane() == e) sum = total;
  }
  if (count != 0) atomicAdd(demand + own_lane(), count);
  if (sums != nullptr && own_lane() < args.num_columns) sums[own_lane()] += sum;
  return __ballot_sync(kAllLanes, is_row && !is_done);
}

}  // namespace cuda
}  // namespace fastmoe_route
