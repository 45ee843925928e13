// The expert activations and their derivatives on one element, in float32: the formulas of cpu/isa/activation.h.
#pragma once

#include "cuda/block.cuh"
#include "ops/moe_mlp.h"

namespace fastmoe_route {
namespace cuda {

// 1 / (1 + e^-x). The reciprocal is one instruction, within one ulp, of subnormal results too, where a division takes
// ten. On sm_80 the products' epilogue has no register left for it, but for the exact one.
__device__ inline float logistic(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return __frcp_rn(1.0f + expf(-x));
#else
  float s;
  asm("rcp.approx.f32 %0, %1;" : "=f"(s) : "f"(1.0f + expf(-x)));
  return s;
#endif
}

struct Silu {
  __device__ static float value(float x) { return x * logistic(x); }
  __device__ static float slope(float x, float& d) {
    const float s = logistic(x);
    d = s * fmaf(x, 1.0f - s, 1.0f);
    return x * s;
  }
};
struct Gelu {  // x Phi(x); normcdff keeps the relative accuracy of the tails
  __device__ static float value(float x) { return x * normcdff(x); }
  __device__ static float slope(float x, float& d) {
    const float cumulative = normcdff(x);
    d = fmaf(x, 0.3989422804014327f * expf(-0.5f * x * x), cumulative);
    return x * cumulative;
  }
};
// A NaN stays one, as in torch.
struct Relu {
  __device__ static float value(float x) { return x <= 0.0f ? 0.0f : x; }
  __device__ static float slope(float x, float& d) {
    d = x > 0.0f ? 1.0f : 0.0f;
    return value(x);
  }
};
struct Relu2 {
  __device__ static float value(float x) { return Relu::value(x) * Relu::value(x); }
  __device__ static float slope(float x, float& d) {
    const float r = Relu::value(x);
    d = r + r;
    return r * r;
  }
};

// value(gate, up); slope(...) also gives the derivatives in both. Pointwise activations do not read `up`.
template <class F>
struct Gated {
  static constexpr bool kGated = true;
  __device__ static float value(float gate, float up) { return F::value(gate) * up; }
  __device__ static float slope(float gate, float up, float& d_gate, float& d_up) {
    float d;
    d_up = F::slope(gate, d);
    d_gate = d * up;
    return d_up * up;
  }
};
template <class F>
struct Pointwise {
  static constexpr bool kGated = false;
  __device__ static float value(float gate, float) { return F::value(gate); }
  __device__ static float slope(float gate, float, float& d_gate, float& d_up) {
    d_up = 0.0f;
    return F::slope(gate, d_gate);
  }
};
struct SwiGluClamped {
  static constexpr bool kGated = true;
  static constexpr float kLimit = 7.0f, kSteepness = 1.702f;
  // Comparisons, and not fminf, so that a NaN passes the clamps as it does in torch.
  __device__ static float at_most_limit(float x) { return x > kLimit ? kLimit : x; }
  __device__ static float clamped(float x) { return x < -kLimit ? -kLimit : at_most_limit(x); }
  __device__ static float value(float gate, float up) {
    const float g = at_most_limit(gate);
    return (clamped(up) + 1.0f) * (g * logistic(kSteepness * g));
  }
  __device__ static float slope(float gate, float up, float& d_gate, float& d_up) {
    const float g = at_most_limit(gate), u = clamped(up) + 1.0f;
    const float s = logistic(kSteepness * g);
    const float glu = g * s;
    // The clamps pass the gradient on their bounds, as torch's do.
    d_gate = gate <= kLimit ? u * s * fmaf(kSteepness * g, 1.0f - s, 1.0f) : 0.0f;
    d_up = up <= kLimit && up >= -kLimit ? glu : 0.0f;
    return u * glu;
  }
};

// Calls body(F{}) with the struct of `activation`, which is the same in all threads.
template <class Body>
__device__ inline void dispatch_activation(Activation activation, const Body& body) {
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

}  // namespace cuda
}  // namespace fastmoe_route
