// The common case of a row of the gate, in registers: top-k of at most 256 logits, without groups, masks, noise, bias
// or stop rules. What it does not take (a NaN, an infinity, many ties) goes the general way of gate.cu, with the same
// choice; which way a row goes depends on the row alone.
//
// A lane has kPerLane logits, in packs of up to 16 bytes. Let the floor be the K-th largest of the lanes' best keys:
// the K best columns are at the floor or above it, and so all lie in lanes whose best is (as a rule K of them). These
// put their keys side by side in shared memory, where every lane takes two; those at the floor or above, a few more
// than K, then get a lane each, and K extractions (one redux for the key, one for the lowest column that has it) rank
// them: a third of the instructions of K extractions over the whole row, which search a winner's lane anew every time.
#pragma once

#include "cuda/gate_score.cuh"
#include "cuda/gate_select.cuh"

namespace fastmoe_route {
namespace cuda {

constexpr int kFastElements = 64;                              // two a lane
constexpr int kFastWords = kFastElements + kWarp + 2 * kWarp;  // keys, their lanes, then candidates

// e^y for y <= 0; a NaN stays one. In short rows the product with log2(e) is taken in two parts; in long ones the bound
// on a weight leaves room for the error of one, |y| u.
template <bool kIsShort>
__device__ inline float fast_exponential(float y) {
  if (!kIsShort) return __expf(y);
  constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f, kSmallest = -200.0f;
  y = y < kSmallest ? kSmallest : y;  // an infinity would spoil the second part
  const float high = y * kLog2E;
  const float e = __expf(y);
  return fmaf(e, fmaf(y, kLog2E, -high) * kLn2, e);
}

// One row; every function is for all lanes.
template <class T, int kPerLane>
class FastRow {
 public:
  static constexpr int kMostColumns = kWarp * kPerLane;
  static constexpr int kPack = kPerLane * sizeof(T) <= 16 ? kPerLane : 16 / sizeof(T);

  // `memory` holds kFastWords, aligned to 16 bytes.
  __device__ FastRow(const GateArgs& args, int* memory, int* demand) : a_(args), memory_(memory), demand_(demand) {}

  // The whole row, or false and nothing written. `sums`, if not null, are the warp's sums of scores.
  __device__ bool run(int64_t t, float* sums) {
    load(t);
    int key[kPerLane], best = kDisallowed;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int bits = __float_as_int(z_[i] + 0.0f);
      key[i] = bits ^ ((bits >> 31) & INT_MAX);
      best = max(best, key[i]);
    }
    const int k = static_cast<int>(a_.shape.top_k);
    int floor = __reduce_max_sync(kAllLanes, best);
    const float max = key_value(floor);
    float e[kPerLane], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      e[i] = fast_exponential<kPerLane <= 4>(z_[i] - max);
      sum += e[i];
    }
    sum = warp_sum(sum);
    if (isnan(sum)) return false;  // of a NaN, of a +inf, of only -inf
    for (int j = 1, rest = best; j < k; ++j) {
      rest = rest == floor ? kDisallowed : rest;
      floor = __reduce_max_sync(kAllLanes, rest);
    }
    int candidate, column;
    if (floor <= kMinusInfinity || !gather(key, best >= floor, floor, &candidate, &column)) return false;
    finish(t, k, candidate, column, max, sum);
    if (sums != nullptr) add_statistics(t, e, max, sum, sums);
    __syncwarp();
    return true;
  }

 private:
  static constexpr int kMinusInfinity = static_cast<int>(0x807fffff);  // its key

  __device__ int column_of(int lane, int i) const { return (i / kPack * kWarp + lane) * kPack + i % kPack; }

  __device__ void load(int64_t t) {
    const T* const row = static_cast<const T*>(a_.logits.data) + t * a_.logits.stride_row;
    const int num_columns = static_cast<int>(a_.shape.num_experts);
#pragma unroll
    for (int p = 0; p < kPerLane / kPack; ++p) {
      const int column = column_of(lane_index(), p * kPack);
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

  // Gives every key at the floor or above it a lane; other lanes get "disallowed". False if there are too many.
  __device__ bool gather(const int (&key)[kPerLane], bool is_holder, int floor, int* candidate, int* column) {
    const unsigned before = (1u << lane_index()) - 1u;
    const unsigned holders = __ballot_sync(kAllLanes, is_holder);
    const int num_elements = __popc(holders) * kPerLane;
    if (num_elements > kFastElements) return false;
    int* const lanes = memory_ + kFastElements;
    int2* const candidates = reinterpret_cast<int2*>(lanes + kWarp);
    if (is_holder) {
      const int place = __popc(holders & before);
      Pack<int, kPerLane> keys;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) keys.values[i] = key[i];
      store_keys(memory_ + place * kPerLane, keys);
      lanes[place] = lane_index();
    }
    __syncwarp();
    const int first = 2 * lane_index();
    int2 own = make_int2(kDisallowed, kDisallowed);
    int own_column = 0;
    if (first < num_elements) {
      own = *reinterpret_cast<const int2*>(memory_ + first);
      own_column = column_of(lanes[first / kPerLane], first % kPerLane);
    }
    const bool takes_x = own.x >= floor, takes_y = own.y >= floor;
    const unsigned with_x = __ballot_sync(kAllLanes, takes_x), with_y = __ballot_sync(kAllLanes, takes_y);
    const int num_candidates = __popc(with_x) + __popc(with_y);
    if (num_candidates > kWarp) {
      __syncwarp();  // whoever takes the row next writes this memory
      return false;
    }
    if (takes_x) candidates[__popc(with_x & before)] = make_int2(own.x, own_column);
    if (takes_y) candidates[__popc(with_x) + __popc(with_y & before)] = make_int2(own.y, own_column + 1);
    __syncwarp();
    int2 taken = make_int2(kDisallowed, INT_MAX);
    if (lane_index() < num_candidates) taken = candidates[lane_index()];
    *candidate = taken.x;
    *column = taken.y;
    return true;
  }

  __device__ static void store_keys(int* to, const Pack<int, kPerLane>& keys) {
    if constexpr (kPerLane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 4) {
        *reinterpret_cast<int4*>(to + i) =
            make_int4(keys.values[i], keys.values[i + 1], keys.values[i + 2], keys.values[i + 3]);
      }
    } else {
      *reinterpret_cast<int2*>(to) = make_int2(keys.values[0], keys.values[1]);
    }
  }

  // Ranks the candidates and writes the K best: experts, weights, demand.
  __device__ void finish(int64_t t, int k, int candidate, int column, float max, float sum) {
    int rank = -1;
    for (int j = 0, left = candidate; j < k; ++j) {
      const int best = __reduce_max_sync(kAllLanes, left);
      const int lowest = __reduce_min_sync(kAllLanes, left == best ? column : INT_MAX);
      if (column == lowest) {
        rank = j;
        left = kDisallowed;
      }
    }
    const float z = key_value(candidate);
    float score = 0.0f;
    if (rank >= 0) {
      score = a_.shape.score == Score::kSoftmax ? fast_exponential<kPerLane <= 4>(z - max) / sum
                                                : elementwise_score(a_.shape.score, z);
    }
    float divisor = 1.0f;
    if (a_.shape.normalize) {
      const float total = warp_sum(score);
      divisor = total < kWeightFloor ? kWeightFloor : total;
    }
    if (rank < 0) return;
    const int64_t at = t * k + rank;
    static_cast<float*>(a_.weights)[at] = score / divisor * static_cast<float>(a_.shape.scale);
    a_.experts[at] = column;
    atomicAdd(demand_ + column, 1);
  }

  __device__ void add_statistics(int64_t t, const float (&e)[kPerLane], float max, float sum, float* sums) {
    if (lane_index() == 0) static_cast<float*>(a_.logsumexp)[t] = max + logf(sum);
    const bool is_softmax = a_.shape.score == Score::kSoftmax;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int column = column_of(lane_index(), i);
      if (column >= a_.shape.num_experts) continue;
      sums[column] += is_softmax ? e[i] / sum : elementwise_score(a_.shape.score, z_[i]);
    }
  }

  const GateArgs& a_;
  int* const memory_;
  int* const demand_;
  float z_[kPerLane];
};

}  // namespace cuda
}  // namespace fastmoe_route
