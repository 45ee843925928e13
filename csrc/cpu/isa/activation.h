// The expert activations and their derivatives, on short vectors of float, or on double for float64.
//
// Gated: swiglu, geglu, reglu are f(gate) * up with f = silu, gelu, relu; swiglu_clamped (gpt-oss) is
// (clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g) with g = min(gate, 7). Pointwise: silu, gelu, relu, relu2 = relu(x)^2.
// gelu is the exact form x Phi(x). Phi(-z sqrt 2) = erfc(z) / 2 with erfc(z) = e^(-z^2) Q(t), t = 1 / (1 + 0.35 z) and
// Q of degree 10, fitted to a relative error of 7e-9: the tails keep their relative accuracy, where 1 + erf would
// cancel.
// Each activation is a struct with value(gate, up), and slope(gate, up, d_gate, d_up) that also returns the value.
#pragma once

#include <cmath>

#include "cpu/isa/math.h"
#include "cpu/isa/vec64.h"
#include "ops/moe_mlp.h"

FASTMOE_ROUTE_ISA_BEGIN

// The standard normal distribution function and density.
inline void normal(Vec x, Vec& cumulative, Vec& density) {
  const Vec e = exp(Vec::all(-0.5f) * x * x);
  density = Vec::all(0.3989422804014327f) * e;
  const Vec t = Vec::all(1.0f) / fma(abs(x), Vec::all(0.35f * 0.70710678118654752f), Vec::all(1.0f));
  Vec q = Vec::all(0.03840436413884163f);
  q = fma(q, t, Vec::all(-0.15894635021686554f));
  q = fma(q, t, Vec::all(0.18150393664836884f));
  q = fma(q, t, Vec::all(-0.027762925252318382f));
  q = fma(q, t, Vec::all(0.08706668019294739f));
  q = fma(q, t, Vec::all(0.14601628482341766f));
  q = fma(q, t, Vec::all(0.1511952131986618f));
  q = fma(q, t, Vec::all(0.18790045380592346f));
  q = fma(q, t, Vec::all(0.19713859260082245f));
  q = fma(q, t, Vec::all(0.19748376309871674f));
  const Vec tail = Vec::all(0.5f) * e * (q * t);
  cumulative = select(x < Vec::zero(), tail, Vec::all(1.0f) - tail);
}
inline void normal(Vec64 x, Vec64& cumulative, Vec64& density) {
  cumulative.v = 0.5 * std::erfc(-0.70710678118654752440 * x.v);
  density.v = 0.39894228040143267794 * std::exp(-0.5 * x.v * x.v);
}

// Not named sigmoid: that of the gate (gate_score.h) rounds otherwise, and of two templates of one name in a level the
// linker keeps one.
template <class V>
inline V logistic(V x) {
  return V::all(1) / (V::all(1) + exp(V::zero() - x));
}

struct Silu {
  template <class V>
  static V value(V x) {
    return x / (V::all(1) + exp(V::zero() - x));
  }
  template <class V>
  static V slope(V x, V& d) {
    const V s = logistic(x);
    d = s * fma(x, V::all(1) - s, V::all(1));
    return x * s;
  }
};

struct Gelu {
  template <class V>
  static V value(V x) {
    V cumulative, density;
    normal(x, cumulative, density);
    return x * cumulative;
  }
  template <class V>
  static V slope(V x, V& d) {
    V cumulative, density;
    normal(x, cumulative, density);
    d = fma(x, density, cumulative);
    return x * cumulative;
  }
};

struct Relu {
  template <class V>
  static V value(V x) {
    return max(V::zero(), x);
  }
  template <class V>
  static V slope(V x, V& d) {
    d = select(x > V::zero(), V::all(1), V::zero());
    return value(x);
  }
};

struct Relu2 {
  template <class V>
  static V value(V x) {
    const V r = Relu::value(x);
    return r * r;
  }
  template <class V>
  static V slope(V x, V& d) {
    const V r = Relu::value(x);
    d = r + r;
    return r * r;
  }
};

// f(gate) * up.
template <class F>
struct Gated {
  static constexpr bool kGated = true;
  template <class V>
  static V value(V gate, V up) {
    return F::value(gate) * up;
  }
  template <class V>
  static V slope(V gate, V up, V& d_gate, V& d_up) {
    V d;
    d_up = F::slope(gate, d);
    d_gate = d * up;
    return d_up * up;
  }
};

template <class F>
struct Pointwise {
  static constexpr bool kGated = false;
  template <class V>
  static V value(V gate, V) {
    return F::value(gate);
  }
  template <class V>
  static V slope(V gate, V, V& d_gate, V& d_up) {
    d_up = V::zero();
    return F::slope(gate, d_gate);
  }
};

struct SwiGluClamped {
  static constexpr bool kGated = true;
  template <class V>
  static V value(V gate, V up) {
    const V g = min(V::all(7), gate);
    const V u = min(V::all(7), max(V::all(-7), up));
    return (u + V::all(1)) * (g / (V::all(1) + exp(V::all(-1.702) * g)));
  }
  template <class V>
  static V slope(V gate, V up, V& d_gate, V& d_up) {
    const V seven = V::all(7), one = V::all(1);
    const V g = min(seven, gate);
    const V u = min(seven, max(V::all(-7), up)) + one;
    const V s = logistic(V::all(1.702) * g);
    const V glu = g * s;
    // The clamps pass the gradient on their bounds, as torch's do.
    d_gate = select(seven >= gate, u * s * fma(V::all(1.702) * g, one - s, one), V::zero());
    d_up = select(seven >= up, select(up >= V::all(-7), glu, V::zero()), V::zero());
    return u * glu;
  }
};

// Calls body(F{}) with the struct of `activation`.
template <class Body>
inline void dispatch_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kSwiGlu: return body(Gated<Silu>{});
    case Activation::kGeGlu: return body(Gated<Gelu>{});
    case Activation::kReGlu: return body(Gated<Relu>{});
    case Activation::kSwiGluClamped: return body(SwiGluClamped{});
    case Activation::kSilu: return body(Pointwise<Silu>{});
    case Activation::kGelu: return body(Pointwise<Gelu>{});
    case Activation::kRelu: return body(Pointwise<Relu>{});
    case Activation::kRelu2: return body(Pointwise<Relu2>{});
  }
}

// result[i] = activation of gate[i], up[i]; up is not read by pointwise activations.
template <class A, class T>
inline void activate(Activation activation, const A* gate, const A* up, int64_t n, T* result) {
  using V = vector_t<A>;
  dispatch_activation(activation, [&](auto f) {
    using F = decltype(f);
    int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes)
      F::value(V::load(gate + i), F::kGated ? V::load(up + i) : V::zero()).store(result + i);
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      F::value(V::load(gate + i, rest), F::kGated ? V::load(up + i, rest) : V::zero()).store(result + i, rest);
    }
  });
}

// The chain rule through the activation for one row: `grad` is the gradient of the *unweighted* activation's output
// before the slot's weight is applied. Writes d_gate, d_up = weight * grad * slope, scaled = weight * activation, and
// returns <grad, activation>. d_up and up are not touched by pointwise activations.
template <class A>
inline A activate_backward(Activation activation, const A* gate, const A* up, const A* grad, A weight, int64_t n,
                           A* d_gate, A* d_up, A* scaled) {
  using V = vector_t<A>;
  V dot = V::zero();
  dispatch_activation(activation, [&](auto f) {
    using F = decltype(f);
    for (int64_t i = 0; i < n; i += V::kLanes) {
      const int rest = n - i < V::kLanes ? static_cast<int>(n - i) : V::kLanes;
      const V g = V::load(grad + i, rest);
      V slope_gate, slope_up;
      const V other = F::kGated ? V::load(up + i, rest) : V::zero();
      const V a = F::slope(V::load(gate + i, rest), other, slope_gate, slope_up);
      const V weighted = V::all(weight) * g;
      (weighted * slope_gate).store(d_gate + i, rest);
      if (F::kGated) (weighted * slope_up).store(d_up + i, rest);
      (V::all(weight) * a).store(scaled + i, rest);
      // Lanes past n must add nothing: their activation may be anything but their gradient is 0, and 0 * a is 0 only
      // for finite a, which act(0) is for every activation.
      dot = fma(g, a, dot);
    }
  });
  return reduce_add(dot);
}

FASTMOE_ROUTE_ISA_END
