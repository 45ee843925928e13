// atom and red: integers, bits, exchange, compare and swap, float additions. Lanes go one after another, lowest first.
#include <cstring>

#include "engine/access.h"
#include "engine/decoder.h"
#include "engine/machine.h"
#include "engine/numbers.h"

namespace ptxvm {
namespace {

enum Op : uint8_t { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExch, kCas };

// imm: the type's kind.
uint64_t apply(const Instr& in, uint64_t old, uint64_t b, uint64_t e) {
  const char kind = static_cast<char>(in.imm);
  const int shift = 64 - 8 * in.bytes;
  const auto as_signed = [&](uint64_t x) { return static_cast<int64_t>(x << shift) >> shift; };
  switch (in.mode) {
    case kAdd:
      if (kind == 'f' && in.bytes == 4)
        return as_bits(canonical(as_float(static_cast<uint32_t>(old)) + as_float(static_cast<uint32_t>(b))));
      if (kind == 'f') return as_bits(as_double(old) + as_double(b));
      if (kind == 'h') return to_half(from_half(static_cast<uint16_t>(old)) + from_half(static_cast<uint16_t>(b)));
      if (kind == 'g')
        return to_bfloat(from_bfloat(static_cast<uint16_t>(old)) + from_bfloat(static_cast<uint16_t>(b)));
      return old + b;
    case kMin: return kind == 's' ? (as_signed(b) < as_signed(old) ? b : old) : (b < old ? b : old);
    case kMax: return kind == 's' ? (as_signed(b) > as_signed(old) ? b : old) : (b > old ? b : old);
    case kInc: return old >= b ? 0 : old + 1;
    case kDec: return old == 0 || old > b ? b : old - 1;
    case kAnd: return old & b;
    case kOr: return old | b;
    case kXor: return old ^ b;
    case kExch: return b;
    default: return old == b ? e : old;
  }
}

// flag: the old value is wanted.
void atomic(Context& c, const Instr& in, uint32_t mask) {
  Access access;
  access.bytes = in.bytes;
  access.order = in.order;
  access.is_write = true;
  read_addresses(c, in.a, in.offset, mask, access);
  const uint32_t bad = (undefined_lanes(c, in.b) | (in.mode == kCas ? undefined_lanes(c, in.c) : 0)) & mask;
  if (bad != 0) fault(c, "undefined value", "an atomic takes an undefined value", __builtin_ctz(bad));
  each_space(c, in, access, [&](Access& part) {
    if (part.space != Space::kGlobal && part.space != Space::kShared) fault(c, "bad atomic", "an atomic on this space");
    track_atomic(c, in, part);
    each_lane(part.mask, [&](int l) {
      uint64_t old = 0;
      std::memcpy(&old, part.at[l], in.bytes);
      const uint64_t value = apply(in, old, lane_value(c, in.b, l), in.mode == kCas ? lane_value(c, in.c, l) : 0);
      std::memcpy(part.at[l], &value, in.bytes);
      if (in.flag) set_lane(c, in.d, l, old);
    });
    if (in.flag) set_undefined(c, in.d, 0, part.mask);
  });
}

}  // namespace

bool decode_atomic(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  if ((op != "atom" && op != "red") || d.has("async")) return false;
  static const char* const kOps[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"};
  const Type t = d.type();
  int found = -1;
  for (int i = 0; i < 10; ++i) {
    if (d.has(kOps[i])) found = i;
  }
  if (found < 0 || t.is_packed || t.bytes == 16 || d.has("v2") || d.has("v4")) d.fail("not implemented");
  in.cls = Class::kAtomic;
  in.mode = static_cast<uint8_t>(found);
  in.bytes = static_cast<uint8_t>(t.bytes);
  in.order = d.has("acq_rel")   ? Order::kAcquireRelease
             : d.has("acquire") ? Order::kAcquire
             : d.has("release") ? Order::kRelease
                                : Order::kStrong;
  in.space = d.has("global")                           ? Space::kGlobal
             : d.has("shared") || d.has("shared::cta") ? Space::kShared
                                                       : Space::kGeneric;
  in.flag = op == "atom";
  const size_t at = in.flag ? 1 : 0;
  if (in.flag) {
    in.flag = d.text(0) != "_";
    if (in.flag) in.d = d.destination(0);
  }
  d.address(d.text(at), in);
  in.offset = in.imm;
  in.imm = t.kind;
  in.b = d.source(at + 1, t);
  if (found == kCas) in.c = d.source(at + 2, t);
  in.run = atomic;
  return true;
}

}  // namespace ptxvm
