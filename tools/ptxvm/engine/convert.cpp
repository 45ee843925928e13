// cvt: between all types, with rounding and saturation.
#include <type_traits>

#include "engine/decoder.h"
#include "engine/machine.h"
#include "engine/numbers.h"

namespace ptxvm {
namespace {

// mode: Rounding; mode2: bits of these.
enum Flag : uint8_t { kSaturate = 1, kFlush = 2, kRelu = 4, kToInteger = 8, kSigned = 16, kFromSigned = 32 };

// Integer to integer: containers D and S hold values of `bytes` (target) and `count` (source) bytes.
template <class D, class S>
void integer_to_integer(Context& c, const Instr& in, uint32_t mask) {
  const S* a = source<S>(c, in.a);
  const int from = 64 - 8 * in.count, to = 64 - 8 * in.bytes;
  const bool from_signed = (in.mode2 & kFromSigned) != 0, to_signed = (in.mode2 & kSigned) != 0;
  D* d = destination<D>(c, in.d);
  if ((in.mode2 & kSaturate) != 0) {
    each_lane(mask, [&](int l) {
      const uint64_t raw = static_cast<uint64_t>(a[l]) << from;
      const __int128 value =
          from_signed ? static_cast<__int128>(static_cast<int64_t>(raw) >> from) : static_cast<__int128>(raw >> from);
      const __int128 top = (static_cast<__int128>(1) << (8 * in.bytes - (to_signed ? 1 : 0))) - 1;
      const __int128 bottom = to_signed ? -top - 1 : 0;
      d[l] = static_cast<D>(value > top ? top : value < bottom ? bottom : value);
    });
  } else {
    const auto convert = [&](auto extend_source, auto extend_target) {
      for_lanes(d, mask, [&](int l) {
        return static_cast<D>(extend_target(extend_source(static_cast<uint64_t>(a[l]) << from) << to));
      });
    };
    const auto sign_from = [&](uint64_t x) { return static_cast<uint64_t>(static_cast<int64_t>(x) >> from); };
    const auto zero_from = [&](uint64_t x) { return x >> from; };
    const auto sign_to = [&](uint64_t x) { return static_cast<uint64_t>(static_cast<int64_t>(x) >> to); };
    const auto zero_to = [&](uint64_t x) { return x >> to; };
    if (from_signed && to_signed) convert(sign_from, sign_to);
    if (from_signed && !to_signed) convert(sign_from, zero_to);
    if (!from_signed && to_signed) convert(zero_from, sign_to);
    if (!from_signed && !to_signed) convert(zero_from, zero_to);
  }
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

template <class S>
Exec integer_from(int d_bytes) {
  return d_bytes == 2   ? integer_to_integer<uint16_t, S>
         : d_bytes == 4 ? integer_to_integer<uint32_t, S>
                        : integer_to_integer<uint64_t, S>;
}

double rounded(double x, int mode) {
  switch (mode) {
    case kZero: return std::trunc(x);
    case kDown: return std::floor(x);
    case kUp: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}

// A float in a register as a double; exact.
double load_real(const Context& c, const Instr& in, char kind, int lane) {
  switch (kind) {
    case 'h': return from_half(source<uint16_t>(c, in.a)[lane]);
    case 'g': return from_bfloat(source<uint16_t>(c, in.a)[lane]);
    case 'd': return source<double>(c, in.a)[lane];
    default: {
      const float x = source<float>(c, in.a)[lane];
      return (in.mode2 & kFlush) != 0 ? flushed(x) : x;
    }
  }
}

// imm: kind of the source and of the target, as characters.
char source_kind(const Instr& in) { return static_cast<char>(in.imm & 255); }
char target_kind(const Instr& in) { return static_cast<char>(in.imm >> 8 & 255); }

void real_to_integer(Context& c, const Instr& in, uint32_t mask) {
  const bool to_signed = (in.mode2 & kSigned) != 0;
  const int bits = 8 * in.bytes;
  each_lane(mask, [&](int l) {
    const double x = rounded(load_real(c, in, source_kind(in), l), in.mode);
    uint64_t value;
    if (to_signed) {
      const double limit = std::ldexp(1.0, bits - 1);
      const int64_t top = static_cast<int64_t>((uint64_t{1} << (bits - 1)) - 1);
      const int64_t v = x != x       ? (bits == 64 ? INT64_MIN : 0)
                        : x >= limit ? top
                        : x < -limit ? -top - 1
                                     : static_cast<int64_t>(x);
      value = static_cast<uint64_t>(v);
    } else {
      const double limit = std::ldexp(1.0, bits);
      const uint64_t top = bits == 64 ? UINT64_MAX : (uint64_t{1} << bits) - 1;
      value = x != x ? (bits == 64 ? uint64_t{1} << 63 : 0) : x >= limit ? top : x <= 0 ? 0 : static_cast<uint64_t>(x);
    }
    set_lane(c, in.d, l, value);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

void store_real(const Context& c, const Instr& in, char kind, int lane, double value, float single) {
  switch (kind) {
    case 'd': destination<double>(c, in.d)[lane] = value; break;
    case 'h':
      destination<uint16_t>(c, in.d)[lane] = in.mode == kZero ? to_half_rz(static_cast<float>(value)) : to_half(value);
      break;
    case 'g':
      destination<uint16_t>(c, in.d)[lane] =
          in.mode == kZero ? to_bfloat_rz(static_cast<float>(value)) : to_bfloat(value);
      break;
    default: destination<float>(c, in.d)[lane] = single;
  }
}

float narrowed(double x, int mode) {
  if (mode == kNearest) return static_cast<float>(x);
  const RoundingMode scope(static_cast<Rounding>(mode));
  volatile double in = x;
  volatile float out = static_cast<float>(in);
  return out;
}

// Integers as floats, rounded once. imm as above.
void integer_to_real(Context& c, const Instr& in, uint32_t mask) {
  const int from = 64 - 8 * in.count;
  const bool from_signed = (in.mode2 & kFromSigned) != 0;
  const char kind = target_kind(in);
  const RoundingMode scope(static_cast<Rounding>(in.mode));
  each_lane(mask, [&](int l) {
    const uint64_t raw = lane_value(c, in.a, l) << from;
    volatile int64_t as_signed = static_cast<int64_t>(raw) >> from;
    volatile uint64_t as_unsigned = raw >> from;
    if (kind == 'd') {
      volatile double r = from_signed ? static_cast<double>(as_signed) : static_cast<double>(as_unsigned);
      destination<double>(c, in.d)[l] = r;
    } else if (kind == 'f') {
      volatile float r = from_signed ? static_cast<float>(as_signed) : static_cast<float>(as_unsigned);
      destination<float>(c, in.d)[l] = r;
    } else {
      const double r = from_signed ? static_cast<double>(as_signed) : static_cast<double>(as_unsigned);
      store_real(c, in, kind, l, r, 0.0f);
    }
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

void signed_word_to_float(Context& c, const Instr& in, uint32_t mask) {
  const int32_t* a = source<int32_t>(c, in.a);
  for_lanes(destination<float>(c, in.d), mask, [&](int l) { return static_cast<float>(a[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}
void saturate_float(Context& c, const Instr& in, uint32_t mask) {  // cvt.sat.f32.f32
  const float* a = source<float>(c, in.a);
  for_lanes(destination<float>(c, in.d), mask, [&](int l) { return a[l] > 0.0f ? (a[l] < 1.0f ? a[l] : 1.0f) : 0.0f; });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}
void float_to_double(Context& c, const Instr& in, uint32_t mask) {
  const float* a = source<float>(c, in.a);
  for_lanes(destination<double>(c, in.d), mask, [&](int l) { return static_cast<double>(a[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}
void half_to_float(Context& c, const Instr& in, uint32_t mask) {
  const uint16_t* a = source<uint16_t>(c, in.a);
  for_lanes(destination<float>(c, in.d), mask, [&](int l) { return canonical(from_half(a[l])); });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

void real_to_real(Context& c, const Instr& in, uint32_t mask) {
  const char from = source_kind(in), to = target_kind(in);
  each_lane(mask, [&](int l) {
    double x = load_real(c, in, from, l);
    if ((in.mode2 & kToInteger) != 0) x = rounded(x, in.mode);
    if ((in.mode2 & kSaturate) != 0) x = x > 0 ? (x < 1 ? x : 1) : 0;
    if ((in.mode2 & kRelu) != 0) x = x < 0 ? 0 : x;
    float single = to == 'f' ? ((in.mode2 & kToInteger) != 0 ? static_cast<float>(x) : narrowed(x, in.mode)) : 0.0f;
    single = canonical(single);
    if ((in.mode2 & kFlush) != 0) single = flushed(single);
    store_real(c, in, to, l, x, single);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

// cvt.rn.bf16x2.f32 d, a, b: a in the upper half.
void pack_halves(Context& c, const Instr& in, uint32_t mask) {
  const float* a = source<float>(c, in.a);
  const float* b = source<float>(c, in.b);
  const char kind = target_kind(in);
  const bool relu = (in.mode2 & kRelu) != 0, zero = in.mode == kZero;
  const auto narrow = [&](float x) -> uint32_t {
    if (relu && x < 0) x = 0;
    if (kind == 'h') return zero ? to_half_rz(x) : to_half(x);
    return zero ? to_bfloat_rz(x) : to_bfloat(x);
  };
  for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) { return narrow(a[l]) << 16 | narrow(b[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}

// cvt.rna.tf32.f32: nearest, ties away from zero; 10 bits of mantissa.
void to_tf32(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const bool away = in.flag;
  for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) {
    const uint32_t bits = a[l];
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
    const uint32_t half = away ? 0x1000u : 0x0fffu + (bits >> 13 & 1u);
    return (bits + half) & 0xffffe000u;
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

char real_kind(Type t) { return t.kind == 'f' ? (t.bytes == 8 ? 'd' : 'f') : t.kind; }
bool is_real(Type t) { return t.kind == 'f' || t.kind == 'h' || t.kind == 'g'; }

}  // namespace

bool decode_convert(Decoder& d, Instr& in) {
  if (d.parts[0] != "cvt") return false;
  const Type from = d.type(), to = d.type(1);
  in.cls = is_real(from) || is_real(to) ? Class::kFloat : Class::kInteger;
  in.mode = d.has("rz") || d.has("rzi")   ? kZero
            : d.has("rm") || d.has("rmi") ? kDown
            : d.has("rp") || d.has("rpi") ? kUp
                                          : kNearest;
  const bool to_integer = d.has("rni") || d.has("rzi") || d.has("rmi") || d.has("rpi");
  in.mode2 = static_cast<uint8_t>((d.has("sat") ? kSaturate : 0) | (d.has("ftz") ? kFlush : 0) |
                                  (d.has("relu") ? kRelu : 0) | (to_integer ? kToInteger : 0) |
                                  (to.kind == 's' ? kSigned : 0) | (from.kind == 's' ? kFromSigned : 0));
  in.imm = real_kind(from) | static_cast<int64_t>(real_kind(to)) << 8;
  in.bytes = static_cast<uint8_t>(to.bytes);
  in.count = static_cast<uint8_t>(from.bytes);
  in.d = d.destination(0);
  if (to.kind == 't') {
    if (from.kind != 'f' || d.has("rz") || d.has("satfinite")) d.fail("not implemented");
    in.a = d.source(1, from);
    in.flag = d.has("rna");
    in.run = to_tf32;
    return true;
  }
  if (from.bytes == 0 || to.bytes == 0) d.fail("not implemented");
  in.a = d.source(1, from);
  if (to.is_packed) {
    if (from.kind != 'f' || d.num_operands() != 3) d.fail("not implemented");
    in.b = d.source(2, from);
    in.run = pack_halves;
    return true;
  }
  if (is_real(from) && is_real(to)) {
    const bool plain = (in.mode2 & (kFlush | kRelu | kToInteger)) == 0;
    if (plain && from.kind == 'f' && from.bytes == 4 && to.kind == 'f' && to.bytes == 4 && d.has("sat")) {
      in.run = saturate_float;
    } else if (plain && !d.has("sat") && from.kind == 'f' && from.bytes == 4 && to.kind == 'f' && to.bytes == 8) {
      in.run = float_to_double;
    } else if (plain && !d.has("sat") && from.kind == 'h' && to.kind == 'f' && to.bytes == 4) {
      in.run = half_to_float;
    } else {
      in.run = real_to_real;
    }
  } else if (is_real(from)) {
    in.run = real_to_integer;
  } else if (is_real(to)) {
    const bool is_word = from.kind == 's' && from.bytes == 4 && to.kind == 'f' && to.bytes == 4 && in.mode == kNearest;
    in.run = is_word ? signed_word_to_float : integer_to_real;
  } else {
    in.run = in.a.bytes == 2   ? integer_from<uint16_t>(in.d.bytes)
             : in.a.bytes == 4 ? integer_from<uint32_t>(in.d.bytes)
                               : integer_from<uint64_t>(in.d.bytes);
  }
  return true;
}

}  // namespace ptxvm
