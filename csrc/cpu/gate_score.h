// The five score functions of the gate and their derivatives on short vectors; V is Vec or Vec64.
//
// No score loses an expert to underflow: sigmoid is taken from e = exp(-|z|), and sqrtsoftplus below kLinear is
// exp(z / 2), to which sqrt(log1p(e^z)) rounds there. Softmax is exp(z - max), scaled by its caller.
#pragma once

#include "cpu/isa/vec64.h"
#include "ops/gate.h"

FASTMOE_ROUTE_ISA_BEGIN

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
  const V one = V::all(1);
  const V e = exp(V::zero() - abs(z));
  return select(z >= V::zero(), one, e) / (one + e);
}

template <class V>
inline V sqrt_softplus(V z) {
  const V e = exp(V::zero() - abs(z));
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
      const V e = exp(V::zero() - abs(z));
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

// Loads n logits of a row into z, padded to whole vectors with -inf. Returns the largest number among them, -inf if
// there is none, and says whether there was a NaN.
template <class V, class T>
inline typename Arithmetic<V>::Float load_logits(const T* row, int64_t stride, int64_t n,
                                                 typename Arithmetic<V>::Float* z, bool* has_nan) {
  using Float = typename Arithmetic<V>::Float;
  V best = V::all(-INFINITY);
  auto nan = is_nan(best);
  const auto take = [&](V x, int64_t i) {
    x.store(z + i);
    nan = nan | is_nan(x);
    best = max(x, best);  // a NaN in x gives best
  };
  if (stride != 1) {
    int64_t i = 0;
    for (; i < n; ++i) z[i] = to_float(row[i * stride]);
    for (; i % V::kLanes != 0; ++i) z[i] = -static_cast<Float>(INFINITY);
    for (i = 0; i < n; i += V::kLanes) take(V::load(z + i), i);
  } else {
    int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) take(V::load(row + i), i);
    if (i < n) take(V::load(row + i, static_cast<int>(n - i), -INFINITY), i);
  }
  *has_nan = nan.lanes() != 0;
  return reduce_max(best);
}

FASTMOE_ROUTE_ISA_END
