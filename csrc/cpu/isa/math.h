// exp and log1p on short vectors, over the whole float range, subnormal results included.
//
// exp: x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite's two-part ln 2), e^r by the degree-6 polynomial
// 1 + r + r^2 q(r) of least relative error (below 2^-28), then one scaling by 2^n. Below 0.9 ulp with fma, 1.2
// without (every 37th float, and a dense sweep of [-104, 89]).
// log1p: the correction of the rounding of u = 1 + x after Goldberg: log1p(x) = log(u) + (x - (u - 1)) / u, log(u) by
// atanh's series on s = (m - 1) / (m + 1), m in [sqrt 1/2, sqrt 2). Below 2.5 ulp.
#pragma once

#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN

// e^x as p * 2^n with p in [0.7, 1.42] and integral n, for |x| <= 4096 (n is held to two parts of ln 2: the error of r
// grows by n 6e-12). Beyond, n alone is right, and only while it is finite; NaN gives NaN in p.
inline Vec exp_parts(Vec x, Vec& n) {
  // Adding and taking away 1.5 * 2^23 rounds to an integer.
  const Vec shift = Vec::all(12582912.0f);
  n = fma(x, Vec::all(1.44269504088896341f), shift) - shift;
  Vec r = fma(n, Vec::all(-0.693359375f), x);
  r = fma(n, Vec::all(2.12194440e-4f), r);
  Vec p = Vec::all(1.38146023e-3f);
  p = fma(p, r, Vec::all(8.36871564e-3f));
  p = fma(p, r, Vec::all(4.16683890e-2f));
  p = fma(p, r, Vec::all(1.66665211e-1f));
  p = fma(p, r, Vec::all(4.99999940e-1f));
  p = fma(p, r, Vec::all(1.0f));
  return fma(p, r, Vec::all(1.0f));
}

// Smallest x that the exponentials below are given: what -inf, the filling of a vector that a row does not fill, stands
// for. e^x is 0 from -103.98 on, but Intel's vscalefps takes 160 cycles, not 2, for a power of 2 between -126 and -511
// that gives 0 (a microcode assist, as for a subnormal result); here the power is -514.
constexpr float kLowestExponent = -356.0f;

// Neither e^x nor its share of a sum of up to 2^31 is subnormal for x from -kNear to 0.
constexpr float kNear = 64.0f;

// What the exponentials below know of x <= 0, or of what becomes of e^x; NaN gives NaN.
enum class Below {
  kAny,      // below -103.98 (and for -inf) +0
  kGradual,  // the same bits as kAny, where results may be subnormal
  kNear,     // x is at least -kNear
  kAdded,    // e^x is added to a sum of at least 1, beside which 2^-126 stands for what is less
};

template <Below kBelow>
inline Vec bounded(Vec x) {
  // max returns its second operand on NaN.
  if constexpr (kBelow == Below::kNear) return x;
  return max(Vec::all(kBelow == Below::kAdded ? -87.33f : kLowestExponent), x);
}

// ldexp(a, n) for |a| in [0.5, 2] and n <= 0, NaN where a is. A subnormal number is its own bits as an integer, in
// units of 2^-149: Intel's vscalefps takes 160 cycles to give one.
FASTMOE_ROUTE_OUTLINED inline Vec ldexp_gradual(Vec a, Vec n) {
  n = max(Vec::all(-200.0f), n);
  const Mask small = n < Vec::all(-125.0f);
  const Vec scaled = ldexp(a, select(small, n + Vec::all(149.0f), n));
  return select(small, integer_bits(scaled), scaled);
}

template <Below kBelow>
inline Vec ldexp_of(Vec a, Vec n) {
  if constexpr (kBelow == Below::kGradual) return ldexp_gradual(a, n);
  return ldexp(a, n);
}

// e^x for x <= 0.
template <Below kBelow = Below::kAny>
FASTMOE_ROUTE_OUTLINED inline Vec exp_nonpositive(Vec x) {
  Vec n;
  const Vec p = exp_parts(bounded<kBelow>(x), n);
  return ldexp_of<kBelow>(p, n);
}

// 2^(i / 16).
alignas(64) constexpr float kSixteenthPowers[16] = {
    1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
    1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};

// e^x for x <= 0 that is a rounded difference. That rounding costs up to |x| / 2 ulp, beside which the (1.2 + |x| / 20)
// ulp of this form count for little (every 37th float), and where the processor looks up a table it takes 6
// multiply-adds instead of 9.
// x = k ln 2 + r, k a multiple of 1/16, |r| <= ln 2 / 32; e^r by its Taylor polynomial of degree 3.
template <Below kBelow = Below::kAny, class V>
inline V exp_of_difference(V x) {
  if constexpr (!V::kLooksUp) {
    return exp_nonpositive<kBelow>(x);
  } else {
    x = bounded<kBelow>(x);
    // Adding 1.5 * 2^19 rounds to a multiple of 1/16, whose fraction is then in the last four bits.
    const V shift = V::all(786432.0f);
    const V rounded = fma(x, V::all(1.44269504088896341f), shift);
    const V k = rounded - shift;
    const V r = fma(k, V::all(-0.693147180559945309f), x);
    const V power = V::look_up(kSixteenthPowers, rounded);
    const V q = fma(fma(V::all(1.0f / 6.0f), r, V::all(0.5f)), r, V::all(1.0f));
    return ldexp_of<kBelow>(fma(power * r, q, power), k);  // ldexp takes the whole part of k
  }
}

// e^x. NaN gives NaN, -inf gives +0, above 88.73 gives +inf, below -103.98 gives +0.
inline Vec exp(Vec x) { return exp_nonpositive(min(Vec::all(89.0f), x)); }

// log(x) for positive finite x.
inline Vec log_positive(Vec x) {
  Vec m, n;
  frexp(x, m, n);
  const Mask high = m > Vec::all(1.41421356237f);
  m = select(high, m * Vec::all(0.5f), m);
  n = select(high, n + Vec::all(1.0f), n);
  const Vec f = m - Vec::all(1.0f);
  const Vec s = f / (m + Vec::all(1.0f));
  const Vec z = s * s;
  Vec p = Vec::all(2.0f / 11.0f);
  p = fma(p, z, Vec::all(2.0f / 9.0f));
  p = fma(p, z, Vec::all(2.0f / 7.0f));
  p = fma(p, z, Vec::all(2.0f / 5.0f));
  p = fma(p, z, Vec::all(2.0f / 3.0f));
  p = p * z * s;
  // log m = 2 s + p; n ln 2 in two parts, small terms first.
  const Vec tail = fma(n, Vec::all(-2.12194440e-4f), p);
  return fma(n, Vec::all(0.693359375f), s + s + tail);
}

// log(1 + x) for finite x >= 0.
inline Vec log1p_positive(Vec x) {
  const Vec one = Vec::all(1.0f);
  const Vec u = one + x;
  const Vec lost = x - (u - one);
  return select(u == one, x, log_positive(u) + lost / u);
}

FASTMOE_ROUTE_ISA_END
