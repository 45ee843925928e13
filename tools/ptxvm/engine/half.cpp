// float16 and bfloat16 arithmetic, single and packed in pairs. Every result is rounded once.
#include "engine/decoder.h"
#include "engine/machine.h"
#include "engine/numbers.h"

namespace ptxvm {
namespace {

struct Half {
  static float widen(uint16_t x) { return from_half(x); }
  static uint16_t narrow(float x) { return to_half(x); }
  static uint16_t narrow(double x) { return to_half(x); }
};
struct BFloat {
  static float widen(uint16_t x) { return from_bfloat(x); }
  static uint16_t narrow(float x) { return to_bfloat(x); }
  static uint16_t narrow(double x) { return to_bfloat(x); }
};

enum Op { kAdd, kSub, kMul, kMin, kMax, kMinNaN, kMaxNaN, kFma, kFmaRelu, kAbs, kNeg, kEx2, kTanh };

bool is_nan(float x) { return x != x; }

template <class H, Op kOp>
uint16_t apply(uint16_t a, uint16_t b, uint16_t e) {
  if (kOp == kAbs) return a & 0x7fff;
  if (kOp == kNeg) return a ^ 0x8000;
  const float x = H::widen(a), y = H::widen(b);
  switch (kOp) {
    // A sum of two half values is exact in double, so it is rounded once.
    case kAdd: return H::narrow(add_to_odd(x, y));
    case kSub: return H::narrow(add_to_odd(x, -y));
    case kMul: return H::narrow(static_cast<double>(x) * y);
    case kFma:
    case kFmaRelu: {
      const double r = add_to_odd(static_cast<double>(x) * y, H::widen(e));
      if (kOp == kFmaRelu && r < 0) return 0;
      return H::narrow(r);
    }
    case kEx2: return H::narrow(std::exp2(static_cast<double>(x)));
    case kTanh: return H::narrow(std::tanh(static_cast<double>(x)));
    default: break;
  }
  const bool propagates = kOp == kMinNaN || kOp == kMaxNaN;
  if (is_nan(x) || is_nan(y)) {
    if (propagates || (is_nan(x) && is_nan(y))) return kNaN16;
    return is_nan(x) ? b : a;
  }
  if (x == y) return (kOp == kMin || kOp == kMinNaN) == ((a & 0x8000) != 0) ? a : b;
  return (x < y) == (kOp == kMin || kOp == kMinNaN) ? a : b;
}

template <class H, Op kOp>
void single(Context& c, const Instr& in, uint32_t mask) {
  const uint16_t* a = source<uint16_t>(c, in.a);
  const uint16_t* b = source<uint16_t>(c, in.b);
  const uint16_t* e = source<uint16_t>(c, in.c);
  for_lanes(destination<uint16_t>(c, in.d), mask, [&](int l) { return apply<H, kOp>(a[l], b[l], e[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

template <class H, Op kOp>
void pair(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const uint32_t* b = source<uint32_t>(c, in.b);
  const uint32_t* e = source<uint32_t>(c, in.c);
  for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) {
    const auto part = [](uint32_t x, int high) { return static_cast<uint16_t>(x >> (16 * high)); };
    const uint32_t low = apply<H, kOp>(part(a[l], 0), part(b[l], 0), part(e[l], 0));
    const uint32_t high = apply<H, kOp>(part(a[l], 1), part(b[l], 1), part(e[l], 1));
    return low | high << 16;
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

template <Op kOp>
Exec run_of(Type t) {
  if (t.kind == 'h') return t.is_packed ? pair<Half, kOp> : single<Half, kOp>;
  return t.is_packed ? pair<BFloat, kOp> : single<BFloat, kOp>;
}

Exec run_of(Decoder& d, Type t) {
  const std::string_view op = d.parts[0];
  const bool nan = d.has("NaN");
  if (op == "add") return run_of<kAdd>(t);
  if (op == "sub") return run_of<kSub>(t);
  if (op == "mul") return run_of<kMul>(t);
  if (op == "fma") return d.has("relu") ? run_of<kFmaRelu>(t) : run_of<kFma>(t);
  if (op == "min") return nan ? run_of<kMinNaN>(t) : run_of<kMin>(t);
  if (op == "max") return nan ? run_of<kMaxNaN>(t) : run_of<kMax>(t);
  if (op == "abs") return run_of<kAbs>(t);
  if (op == "neg") return run_of<kNeg>(t);
  if (op == "ex2") return run_of<kEx2>(t);
  if (op == "tanh") return run_of<kTanh>(t);
  return nullptr;
}

}  // namespace

bool decode_half(Decoder& d, Instr& in) {
  static const char* const kOps[] = {"add", "sub", "mul", "fma", "min", "max", "abs", "neg", "ex2", "tanh"};
  bool is_mine = false;
  for (const char* name : kOps) is_mine = is_mine || d.parts[0] == name;
  if (!is_mine) return false;
  const Type t = d.type();
  if (t.kind != 'h' && t.kind != 'g') return false;
  if (d.has("sat") || d.has("oob") || d.has("xorsign") || (d.has("ftz") && d.parts[0] != "ex2"))
    d.fail("not implemented");
  in.cls = Class::kHalf;
  in.d = d.destination(0);
  in.a = d.source(1, t);
  in.b = d.num_operands() > 2 ? d.source(2, t) : in.a;
  in.c = d.num_operands() > 3 ? d.source(3, t) : in.a;
  in.run = run_of(d, t);
  return in.run != nullptr;
}

}  // namespace ptxvm
