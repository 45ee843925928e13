// The five score functions of the gate and their derivatives on short vectors, and the passes over a row that both
// directions share; V is Vec or Vec64.
//
// No score loses an expert to underflow: sigmoid is taken from e = exp(-|z|), and sqrtsoftplus below kLinear is
// exp(z / 2), to which sqrt(log1p(e^z)) rounds there. Softmax is exp(z - max), scaled by its caller.
#pragma once

#include <type_traits>

#include "cpu/isa/vec64.h"
#include "ops/gate.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr double kWeightFloor = 1e-20;  // the least sum that weights are divided by

template <class V>
struct Arithmetic;
template <>
struct Arithmetic<Vec> {
  using Float = float;
  using Key = int32_t;
  using KeyVec = Keys;
  static constexpr float kLinear = -17.0f;  // e^z / 4 is below half an ulp of 1
  static constexpr Key kDisallowed = INT32_MIN;
};
template <>
struct Arithmetic<Vec64> {
  using Float = double;
  using Key = int64_t;
  using KeyVec = Keys64;
  static constexpr double kLinear = -38.0;
  static constexpr Key kDisallowed = INT64_MIN;
};

template <class V>
inline V sigmoid(V z) {
  const V e = exp_nonpositive(negative_abs(z));
  const V r = reciprocal(V::all(1) + e);
  return select(z >= V::zero(), r, e * r);
}

template <class V>
inline V sqrt_softplus(V z) {
  const V e = exp_nonpositive(negative_abs(z));
  // max returns its second operand on NaN, so a NaN logit stays one.
  const V softplus = max(V::zero(), z) + log1p_positive(e);
  return select(z < V::all(Arithmetic<V>::kLinear), exp(z * V::all(0.5f)), sqrt(softplus));
}

// Elementwise scores: everything but softmax.
template <class V>
inline V elementwise_score(Score score, V z) {
  switch (score) {
    case Score::kSigmoid: return sigmoid(z);
    case Score::kSqrtSoftplus: return sqrt_softplus(z);
    case Score::kRelu: return max(V::zero(), z);
    default: return z;
  }
}

// d score / d z of the elementwise scores; 0 at z = -inf.
template <class V>
inline V elementwise_slope(Score score, V z) {
  const V one = V::all(1);
  switch (score) {
    case Score::kSigmoid: {
      const V e = exp_nonpositive(negative_abs(z));
      return e / ((one + e) * (one + e));
    }
    case Score::kSqrtSoftplus: {
      const V half = V::all(0.5f);
      return select(z < V::all(Arithmetic<V>::kLinear), half * exp(z * half), half * sigmoid(z) / sqrt_softplus(z));
    }
    case Score::kRelu: return select(z > V::zero(), one, select(is_nan(z), z, V::zero()));
    default: return select(z == V::all(-INFINITY), V::zero(), one);
  }
}

// How many lanes of the vector at i lie below n.
template <class V>
inline int lanes_at(int64_t i, int64_t n) {
  return static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes);
}

// A row of logits.
template <class V>
struct RowOf {
  using Float = typename Arithmetic<V>::Float;
  const Float* z;  // padded to whole vectors with -inf
  Float max;       // of its numbers, -inf if there is none
  bool is_near;    // all are finite and within kNear of the largest; false where nobody asked
  bool is_plain;   // all are finite
  bool has_nan;
};

// Vectors of piles: columns are dealt out to their lanes, one after the other.
template <class V>
constexpr int kPiles = V::kLanes > 1 ? 32 / V::kLanes : 2;

// Looks over n logits in a row, which it copies, padded, to `copy` unless that is null: then n is whole vectors.
// largest: of the numbers of every pile, or null.
template <bool kAsksNear, class V, class T>
__attribute__((always_inline)) inline void scan(const T* from, int64_t n, typename Arithmetic<V>::Float* copy,
                                                RowOf<V>& row, V* largest) {
  V best[kPiles<V>], zero[kPiles<V>];  // zero: NaN in a lane that met an infinity or a NaN
  for (int p = 0; p < kPiles<V>; ++p) best[p] = V::all(-INFINITY), zero[p] = V::zero();
  V least = V::all(INFINITY);
  int64_t i = 0;
  for (; i + kPiles<V> * V::kLanes <= n; i += kPiles<V> * V::kLanes) {
    for (int p = 0; p < kPiles<V>; ++p) {
      const V x = V::load(from + i + p * V::kLanes);
      if (copy != nullptr) x.store(copy + i + p * V::kLanes);
      best[p] = max(x, best[p]);  // a NaN in x gives best
      zero[p] = fma(x, V::zero(), zero[p]);
      if constexpr (kAsksNear) least = min(x, least);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPiles<V>; ++p, i += V::kLanes) {
    if (i >= n) break;
    const int lanes = lanes_at<V>(i, n);
    const V x = V::load(from + i, lanes, -INFINITY);
    if (copy != nullptr) x.store(copy + i);
    best[p] = max(x, best[p]);
    zero[p] = fma(V::load(from + i, lanes, 0), V::zero(), zero[p]);
    if constexpr (kAsksNear) least = min(V::load(from + i, lanes, INFINITY), least);
  }
  V top = best[0], zeros = zero[0];
  for (int p = 1; p < kPiles<V>; ++p) top = max(top, best[p]), zeros = zeros + zero[p];
  for (int p = 0; largest != nullptr && p < kPiles<V>; ++p) largest[p] = best[p];
  row.max = reduce_max(top);
  row.is_plain = is_nan(zeros).lanes() == 0;
  row.is_near = kAsksNear && row.is_plain && (least < V::all(row.max - kNear)).lanes() == 0;
}

// The n logits of a row, in `buffer` unless they can stay where they are; largest as in scan().
template <bool kAsksNear, class V, class T>
inline void load_logits(const T* from, int64_t stride, int64_t n, typename Arithmetic<V>::Float* buffer, RowOf<V>& row,
                        V* largest) {
  using Float = typename Arithmetic<V>::Float;
  row.z = buffer;
  row.has_nan = false;
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(from[i * stride]);
    scan<kAsksNear>(static_cast<const Float*>(buffer), n, buffer, row, largest);
  } else if constexpr (std::is_same_v<T, Float>) {
    const bool stays = n % V::kLanes == 0;
    if (stays) row.z = from;
    scan<kAsksNear>(from, n, stays ? nullptr : buffer, row, largest);
  } else {
    scan<kAsksNear>(from, n, buffer, row, largest);
  }
  if (row.is_plain) return;
  auto nan = is_nan(V::zero());
  for (int64_t i = 0; i < n; i += V::kLanes) nan = nan | is_nan(V::load(row.z + i));
  row.has_nan = nan.lanes() != 0;
}

// load_logits by the dtype of the logits.
template <class V, bool kAsksNear = false>
inline void load_row(DType dtype, const Strided<void>& logits, int64_t t, int64_t n,
                     typename Arithmetic<V>::Float* buffer, RowOf<V>& row, V* largest = nullptr) {
  const auto load = [&](auto type) {
    using T = decltype(type);
    load_logits<kAsksNear, V>(static_cast<const T*>(logits.data) + t * logits.stride_row, logits.stride_col, n, buffer,
                              row, largest);
  };
  if constexpr (V::kLanes == 1) {
    load(double{});
  } else {
    switch (dtype) {
      case DType::kBFloat16: return load(BFloat16{});
      case DType::kFloat16: return load(Float16{});
      default: return load(float{});
    }
  }
}

// The largest number of z, -inf if there is none.
template <class Float>
inline Float max_of(const Float* z, int64_t n) {
  Float best = -static_cast<Float>(INFINITY);
  for (int64_t i = 0; i < n; ++i) best = z[i] > best ? z[i] : best;
  return best;
}

// What exponentials take from every logit of a row whose largest number is max_z.
template <class Float>
inline Float shift_of(Float max_z) {
  return max_z == -static_cast<Float>(INFINITY) ? 0 : max_z;
}

// Calls keep(e, i, lanes) for the vectors e = exp(z - max) of n columns, of which kBelow says what is known; returns
// the sum. A row of -inf gives 0, and so does a NaN where the caller says that there may be one.
template <class V, Below kBelow = Below::kGradual, class Keep>
inline typename Arithmetic<V>::Float each_exponential(const typename Arithmetic<V>::Float* z, int64_t n,
                                                      typename Arithmetic<V>::Float max_z, bool may_have_nan,
                                                      const Keep& keep) {
  const V minus_inf = V::all(-INFINITY);
  const V shift = V::all(shift_of(max_z));
  constexpr Below kInTail = kBelow == Below::kNear ? Below::kAny : kBelow;
  const auto tail = [&](V x) {
    return exp_of_difference<kInTail>(may_have_nan ? select(is_nan(x), minus_inf, x - shift) : x - shift);
  };
  // Inlined apart, so that the loop over plain rows asks nothing.
  const auto pass = [&](const auto& of) {
    V even = V::zero(), odd = V::zero();
    int64_t i = 0;
    const auto next = [&](V& sum) {
      const V e = of(V::load(z + i));
      keep(e, i, V::kLanes);
      sum = sum + e;
      i += V::kLanes;
    };
    while (i + 2 * V::kLanes <= n) next(even), next(odd);
    if (i + V::kLanes <= n) next(even);
    if (i < n) {
      const int lanes = static_cast<int>(n - i);
      const V e = tail(V::load(z + i, lanes, -INFINITY));
      keep(e, i, lanes);
      even = even + e;
    }
    return reduce_add(even + odd);
  };
  if (may_have_nan)
    return pass([&](V x) { return exp_of_difference<kBelow>(select(is_nan(x), minus_inf, x - shift)); });
  return pass([&](V x) { return exp_of_difference<kBelow>(x - shift); });
}

// The same with out = e, for a row that is near or not; nothing past n is written.
template <class V>
inline typename Arithmetic<V>::Float exponentials(const typename Arithmetic<V>::Float* z, int64_t n,
                                                  typename Arithmetic<V>::Float max_z, bool may_have_nan,
                                                  typename Arithmetic<V>::Float* out, bool is_near = false) {
  const auto keep = [&](V e, int64_t i, int lanes) { lanes == V::kLanes ? e.store(out + i) : e.store(out + i, lanes); };
  return is_near ? each_exponential<V, Below::kNear>(z, n, max_z, may_have_nan, keep)
                 : each_exponential<V>(z, n, max_z, may_have_nan, keep);
}

// The sum alone, of at least 1 unless it is 0.
template <class V>
inline typename Arithmetic<V>::Float sum_of_exponentials(const typename Arithmetic<V>::Float* z, int64_t n,
                                                         typename Arithmetic<V>::Float max_z, bool may_have_nan) {
  if (max_z == -static_cast<typename Arithmetic<V>::Float>(INFINITY)) return 0;
  return each_exponential<V, Below::kAdded>(z, n, max_z, may_have_nan, [](V, int64_t, int) {});
}

// What makes probabilities of exponentials that sum to `sum`; a row of -inf stays 0.
template <class Float>
inline Float inverse_of(Float sum) {
  return 1 / (sum == 0 ? Float{1} : sum);
}

template <class V>
inline void scale_by(typename Arithmetic<V>::Float* values, int64_t n, typename Arithmetic<V>::Float by) {
  const V factor = V::all(by);
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) (V::load(values + i) * factor).store(values + i);
  if (i < n) {
    const int lanes = static_cast<int>(n - i);
    (V::load(values + i, lanes) * factor).store(values + i, lanes);
  }
}

FASTMOE_ROUTE_ISA_END
