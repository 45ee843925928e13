// float32 and float64 arithmetic. Approximate instructions (ex2.approx and its like) give the correctly computed value
// rounded to float, which is nearer to the truth than hardware is: results that depend on their error are not shown.
#include <type_traits>

#include "engine/decoder.h"
#include "engine/machine.h"
#include "engine/numbers.h"

namespace ptxvm {
namespace {

// flag: saturate to [0, 1]; mode2: flush subnormals; mode: rounding.
template <class T, bool kFlush>
inline T in_value(T x) {
  return kFlush ? flushed(x) : x;
}
template <class T, bool kFlush>
inline T out_value(T x, bool saturate) {
  x = canonical(x);
  if (kFlush) x = flushed(x);
  if (saturate) x = x > T{0} ? (x < T{1} ? x : T{1}) : T{0};  // NaN becomes 0
  return x;
}

enum Op { kAdd, kSub, kMul, kDiv, kMin, kMax, kMinNaN, kMaxNaN, kCopySign };

template <class T, Op kOp>
inline T apply(T a, T b) {
  switch (kOp) {
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    case kDiv: return a / b;
    case kCopySign: return std::copysign(b, a);
    case kMin:
    case kMinNaN:
      if (kOp == kMinNaN && (a != a || b != b)) return std::numeric_limits<T>::quiet_NaN();
      if (a != a) return b;
      if (b != b) return a;
      return a < b || (a == b && std::signbit(a)) ? a : b;
    default:
      if (kOp == kMaxNaN && (a != a || b != b)) return std::numeric_limits<T>::quiet_NaN();
      if (a != a) return b;
      if (b != b) return a;
      return a > b || (a == b && !std::signbit(a)) ? a : b;
  }
}

template <class T, Op kOp, bool kFlush>
void binary(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  const bool saturate = in.flag;
  for_lanes(destination<T>(c, in.d), mask, [&](int l) {
    return out_value<T, kFlush>(apply<T, kOp>(in_value<T, kFlush>(a[l]), in_value<T, kFlush>(b[l])), saturate);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}

template <class T, bool kFlush>
void multiply_add(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  const T* e = source<T>(c, in.c);
  const bool saturate = in.flag;
  for_lanes(destination<T>(c, in.d), mask, [&](int l) {
    return out_value<T, kFlush>(
        std::fma(in_value<T, kFlush>(a[l]), in_value<T, kFlush>(b[l]), in_value<T, kFlush>(e[l])), saturate);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

// The same in another rounding mode. float32: the exact result as a double, then rounded in the direction.
template <Op kOp>
void binary_directed(Context& c, const Instr& in, uint32_t mask) {
  const float* a = source<float>(c, in.a);
  const float* b = source<float>(c, in.b);
  const Rounding mode = static_cast<Rounding>(in.mode);
  const bool saturate = in.flag;
  for_lanes(destination<float>(c, in.d), mask, [&](int l) {
    const double x = a[l], y = b[l];
    const double exact = kOp == kMul ? x * y : add_to_odd(x, kOp == kSub ? -y : y);
    if (exact == 0 && mode == kDown && kOp != kMul && x != 0) return -0.0f;  // what cancels is -0 downward
    return out_value<float, false>(directed(exact, mode), saturate);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}
void multiply_add_directed(Context& c, const Instr& in, uint32_t mask) {
  const float* a = source<float>(c, in.a);
  const float* b = source<float>(c, in.b);
  const float* e = source<float>(c, in.c);
  const Rounding mode = static_cast<Rounding>(in.mode);
  const bool flush = in.mode2 != 0, saturate = in.flag;
  for_lanes(destination<float>(c, in.d), mask, [&](int l) {
    const auto value = [&](float x) { return static_cast<double>(flush ? flushed(x) : x); };
    const double exact = add_to_odd(value(a[l]) * value(b[l]), value(e[l]));
    const float r = exact == 0 && mode == kDown && value(e[l]) != 0 ? -0.0f : directed(exact, mode);
    return flush ? out_value<float, true>(r, saturate) : out_value<float, false>(r, saturate);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

// In hardware's own mode. The values pass through volatile variables: the compiler must not move the arithmetic.
template <class T, Op kOp>
void binary_rounded(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  T* d = destination<T>(c, in.d);
  const RoundingMode mode(static_cast<Rounding>(in.mode));
  each_lane(mask, [&](int l) {
    volatile T x = a[l], y = b[l];
    volatile T r = apply<T, kOp>(x, y);
    d[l] = out_value<T, false>(r, in.flag);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}
void multiply_add_rounded(Context& c, const Instr& in, uint32_t mask) {
  const double* a = source<double>(c, in.a);
  const double* b = source<double>(c, in.b);
  const double* e = source<double>(c, in.c);
  double* d = destination<double>(c, in.d);
  const RoundingMode mode(static_cast<Rounding>(in.mode));
  each_lane(mask, [&](int l) {
    volatile double x = a[l], y = b[l], z = e[l];
    volatile double r = std::fma(x, y, z);
    d[l] = r;
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

enum Fn { kAbs, kNeg, kRcp, kSqrt, kRsqrt, kEx2, kLg2, kSin, kCos, kTanh };

template <class T, Fn kFn>
inline T evaluate(T x) {
  const double wide = static_cast<double>(x);
  switch (kFn) {
    case kAbs: return std::fabs(x);
    case kNeg: return -x;
    case kRcp: return static_cast<T>(T{1} / x);
    case kSqrt: return std::sqrt(x);
    case kRsqrt: return static_cast<T>(1.0 / std::sqrt(wide));
    case kEx2: return static_cast<T>(exp2_of(wide));
    case kLg2: return static_cast<T>(std::log2(wide));
    case kSin: return static_cast<T>(std::sin(wide));
    case kCos: return static_cast<T>(std::cos(wide));
    default: return static_cast<T>(std::tanh(wide));
  }
}

template <class T, Fn kFn, bool kFlush>
void unary(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const bool saturate = in.flag;
  for_lanes(destination<T>(c, in.d), mask, [&](int l) {
    const T r = evaluate<T, kFn>(in_value<T, kFlush>(a[l]));
    // abs and neg change a bit, whatever the value.
    if (kFn == kAbs || kFn == kNeg) return kFlush ? flushed(r) : r;
    return out_value<T, kFlush>(r, saturate);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

enum Test { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };

template <class T>
void test(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  uint32_t lanes = 0;
  each_lane(mask, [&](int l) {
    const int kind = std::fpclassify(a[l]);
    bool is = false;
    switch (in.mode) {
      case kFinite: is = std::isfinite(a[l]); break;
      case kInfinite: is = kind == FP_INFINITE; break;
      case kNumber: is = kind != FP_NAN; break;
      case kNotANumber: is = kind == FP_NAN; break;
      case kNormal: is = kind == FP_NORMAL; break;
      default: is = kind == FP_SUBNORMAL; break;
    }
    if (is) lanes |= 1u << l;
  });
  set_predicate(c, in.d, lanes, mask);
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

template <Op kOp>
Exec binary_of(Type t, bool flush) {
  if (t.bytes == 8) return binary<double, kOp, false>;
  return flush ? binary<float, kOp, true> : binary<float, kOp, false>;
}
template <Op kOp>
Exec rounded_of(Type t) {
  if (t.bytes == 8) return binary_rounded<double, kOp>;
  return kOp == kDiv ? binary_rounded<float, kOp> : binary_directed<kOp>;
}
template <Fn kFn>
Exec unary_of(Type t, bool flush) {
  if (t.bytes == 8) return unary<double, kFn, false>;
  return flush ? unary<float, kFn, true> : unary<float, kFn, false>;
}

Rounding rounding_of(const Decoder& d) {
  return d.has("rz") ? kZero : d.has("rm") ? kDown : d.has("rp") ? kUp : kNearest;
}

bool decode_unary(Decoder& d, Instr& in, Type t, bool flush) {
  const std::string_view op = d.parts[0];
  in.a = d.source(1, t);
  if (op == "testp") {
    static const char* const kTests[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    for (uint8_t i = 0; i < 6; ++i) {
      if (d.has(kTests[i])) in.mode = i;
    }
    in.d = d.predicate(d.text(0));
    in.run = t.bytes == 8 ? test<double> : test<float>;
    return true;
  }
  in.d = d.destination(0);
  if ((op == "rcp" || op == "sqrt") && rounding_of(d) != kNearest) d.fail("this rounding");
  if (op != "abs" && op != "neg") in.cls = Class::kSpecial;
  if (op == "abs") in.run = unary_of<kAbs>(t, flush);
  if (op == "neg") in.run = unary_of<kNeg>(t, flush);
  if (op == "rcp") in.run = unary_of<kRcp>(t, flush);
  if (op == "sqrt") in.run = unary_of<kSqrt>(t, flush);
  if (op == "rsqrt") in.run = unary_of<kRsqrt>(t, flush);
  if (op == "ex2") in.run = unary_of<kEx2>(t, flush);
  if (op == "lg2") in.run = unary_of<kLg2>(t, flush);
  if (op == "sin") in.run = unary_of<kSin>(t, flush);
  if (op == "cos") in.run = unary_of<kCos>(t, flush);
  if (op == "tanh") in.run = unary_of<kTanh>(t, flush);
  return in.run != nullptr;
}

}  // namespace

bool decode_float(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  static const char* const kUnary[] = {"abs", "neg", "rcp", "sqrt", "rsqrt", "ex2",
                                       "lg2", "sin", "cos", "tanh", "testp"};
  static const char* const kOther[] = {"add", "sub", "mul", "div", "min", "max", "fma", "mad", "copysign"};
  bool is_unary = false, is_other = false;
  for (const char* name : kUnary) is_unary = is_unary || op == name;
  for (const char* name : kOther) is_other = is_other || op == name;
  if (!is_unary && !is_other) return false;
  const Type t = d.type();
  if (t.kind != 'f' || (t.bytes != 4 && t.bytes != 8)) return false;
  in.cls = t.bytes == 8 ? Class::kDouble : Class::kFloat;
  const bool flush = d.has("ftz");
  const Rounding rounding = rounding_of(d);
  in.flag = d.has("sat");
  in.mode = rounding;
  in.mode2 = flush ? 1 : 0;
  if (is_unary) return decode_unary(d, in, t, flush);
  in.d = d.destination(0);
  in.a = d.source(1, t);
  in.b = d.source(2, t);
  if (op == "fma" || op == "mad") {
    in.c = d.source(3, t);
    if (rounding != kNearest) {
      in.run = t.bytes == 8 ? multiply_add_rounded : multiply_add_directed;
    } else if (t.bytes == 8) {
      in.run = multiply_add<double, false>;
    } else {
      in.run = flush ? multiply_add<float, true> : multiply_add<float, false>;
    }
    return true;
  }
  if (rounding != kNearest) {
    if (flush) d.fail("this rounding with ftz");
    if (op == "add") in.run = rounded_of<kAdd>(t);
    if (op == "sub") in.run = rounded_of<kSub>(t);
    if (op == "mul") in.run = rounded_of<kMul>(t);
    if (op == "div") in.run = rounded_of<kDiv>(t);
    return in.run != nullptr;
  }
  if (d.has("xorsign") || d.has("abs")) d.fail("not implemented");
  if (op == "add") in.run = binary_of<kAdd>(t, flush);
  if (op == "sub") in.run = binary_of<kSub>(t, flush);
  if (op == "mul") in.run = binary_of<kMul>(t, flush);
  if (op == "div") in.run = binary_of<kDiv>(t, flush);
  if (op == "min") in.run = d.has("NaN") ? binary_of<kMinNaN>(t, flush) : binary_of<kMin>(t, flush);
  if (op == "max") in.run = d.has("NaN") ? binary_of<kMaxNaN>(t, flush) : binary_of<kMax>(t, flush);
  if (op == "copysign") in.run = binary_of<kCopySign>(t, false);
  return in.run != nullptr;
}

}  // namespace ptxvm
