// setp and set: comparisons of every type, with a second predicate joined in.
#include <utility>

#include "engine/decoder.h"
#include "engine/machine.h"
#include "engine/numbers.h"

namespace ptxvm {
namespace {

enum Relation : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
enum Join : uint8_t { kAlone, kAnd, kOr, kXor };

template <class T, Relation kRelation>
inline bool holds(T a, T b) {
  switch (kRelation) {
    case kEq: return a == b;
    case kNe: return a < b || a > b;
    case kLt: return a < b;
    case kLe: return a <= b;
    case kGt: return a > b;
    case kGe: return a >= b;
    case kEqu: return !(a < b) && !(a > b);
    case kNeu: return !(a == b);
    case kLtu: return !(a >= b);
    case kLeu: return !(a > b);
    case kGtu: return !(a <= b);
    case kGeu: return !(a < b);
    case kNum: return a == a && b == b;
    default: return a != a || b != b;
  }
}

struct HalfValue {
  static float load(uint16_t x) { return from_half(x); }
};
struct BFloatValue {
  static float load(uint16_t x) { return from_bfloat(x); }
};
template <class T>
struct Plain {
  static T load(T x) { return x; }
};

template <class T, class Load, Relation kRelation>
uint32_t compare(const Context& c, const Instr& in) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  alignas(64) uint8_t bit[kLanes];
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) {
    const auto x = Load::load(a[l]);
    bit[l] = holds<decltype(x), kRelation>(x, Load::load(b[l]));
  }
  uint32_t lanes = 0;
  for (int l = 0; l < kLanes; ++l) lanes |= static_cast<uint32_t>(bit[l]) << l;
  return lanes;
}

template <class T, class Load, Relation kRelation>
void set_predicates(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t lanes = compare<T, Load, kRelation>(c, in);
  uint32_t undefined = undefined_lanes(c, in.a) | undefined_lanes(c, in.b);
  uint32_t first = lanes, second = ~lanes;
  if (in.mode != kAlone) {
    const uint32_t other = predicate_lanes(c, in.c);
    const uint32_t other_undefined = undefined_lanes(c, in.c);
    const auto join = [&](uint32_t x) { return in.mode == kAnd ? x & other : in.mode == kOr ? x | other : x ^ other; };
    first = join(lanes);
    second = join(~lanes);
    uint32_t both = undefined | other_undefined;
    if (in.mode == kAnd) both &= ~((~undefined & ~lanes) | (~other_undefined & ~other));
    if (in.mode == kOr) both &= ~((~undefined & lanes) | (~other_undefined & other));
    undefined = both;
  }
  set_predicate(c, in.d, first, mask);
  set_undefined(c, in.d, undefined, mask);
  if (!in.list.empty()) {
    set_predicate(c, in.list[0], second, mask);
    set_undefined(c, in.list[0], undefined, mask);
  }
}

// set.CMP.dtype.stype: all ones or 1.0; mode2: 0 integer, 1 float.
template <class T, class Load, Relation kRelation>
void set_values(Context& c, const Instr& in, uint32_t mask) {
  uint32_t lanes = compare<T, Load, kRelation>(c, in);
  uint32_t undefined = undefined_lanes(c, in.a) | undefined_lanes(c, in.b);
  if (in.mode != kAlone) {
    const uint32_t other = predicate_lanes(c, in.c);
    lanes = in.mode == kAnd ? lanes & other : in.mode == kOr ? lanes | other : lanes ^ other;
    undefined |= undefined_lanes(c, in.c);
  }
  const uint32_t yes = in.mode2 == 0 ? 0xffffffffu : 0x3f800000u;
  for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) { return (lanes >> l) & 1u ? yes : 0u; });
  set_undefined(c, in.d, undefined, mask);
}

// Packed: setp gives a predicate for each half, set gives 1.0 (or all ones) in each half. flag: bfloat16.
template <Relation kRelation>
void compare_pair(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const uint32_t* b = source<uint32_t>(c, in.b);
  uint32_t part[2] = {};
  for (int high = 0; high < 2; ++high) {
    for (int l = 0; l < kLanes; ++l) {
      const uint16_t x = static_cast<uint16_t>(a[l] >> (16 * high)), y = static_cast<uint16_t>(b[l] >> (16 * high));
      const float u = in.flag ? from_bfloat(x) : from_half(x), v = in.flag ? from_bfloat(y) : from_half(y);
      if (holds<float, kRelation>(u, v)) part[high] |= 1u << l;
    }
  }
  const uint32_t undefined = undefined_lanes(c, in.a) | undefined_lanes(c, in.b);
  if (in.mode2 == 2) {  // setp
    set_predicate(c, in.d, part[0], mask);
    set_predicate(c, in.list[0], part[1], mask);
    set_undefined(c, in.list[0], undefined, mask);
  } else {
    const uint32_t yes = in.mode2 == 0 ? 0xffffu : in.flag ? 0x3f80u : 0x3c00u;
    for_lanes(destination<uint32_t>(c, in.d), mask,
              [&](int l) { return ((part[0] >> l) & 1u ? yes : 0u) | ((part[1] >> l) & 1u ? yes << 16 : 0u); });
  }
  set_undefined(c, in.d, undefined, mask);
}

template <class T, class Load, bool kIsSetp, int... kRelations>
Exec pick_from(int relation, std::integer_sequence<int, kRelations...>) {
  static const Exec kTable[] = {(kIsSetp ? set_predicates<T, Load, static_cast<Relation>(kRelations)>
                                         : set_values<T, Load, static_cast<Relation>(kRelations)>)...};
  return kTable[relation];
}
template <class T, class Load, bool kIsSetp>
Exec pick(int relation) {
  return pick_from<T, Load, kIsSetp>(relation, std::make_integer_sequence<int, kNan + 1>());
}

Exec pick_pair(int relation) {
  switch (relation) {
    case kEq: return compare_pair<kEq>;
    case kNe: return compare_pair<kNe>;
    case kLt: return compare_pair<kLt>;
    case kLe: return compare_pair<kLe>;
    case kGt: return compare_pair<kGt>;
    case kGe: return compare_pair<kGe>;
    case kNeu: return compare_pair<kNeu>;
    case kNan: return compare_pair<kNan>;
    default: return nullptr;
  }
}

template <bool kIsSetp>
Exec pick_type(Type t, int relation) {
  const bool is_signed = t.kind == 's';
  if (t.kind == 'f')
    return t.bytes == 8 ? pick<double, Plain<double>, kIsSetp>(relation) : pick<float, Plain<float>, kIsSetp>(relation);
  if (t.kind == 'h') return pick<uint16_t, HalfValue, kIsSetp>(relation);
  if (t.kind == 'g') return pick<uint16_t, BFloatValue, kIsSetp>(relation);
  switch (t.bytes) {
    case 2:
      return is_signed ? pick<int16_t, Plain<int16_t>, kIsSetp>(relation)
                       : pick<uint16_t, Plain<uint16_t>, kIsSetp>(relation);
    case 4:
      return is_signed ? pick<int32_t, Plain<int32_t>, kIsSetp>(relation)
                       : pick<uint32_t, Plain<uint32_t>, kIsSetp>(relation);
    default:
      return is_signed ? pick<int64_t, Plain<int64_t>, kIsSetp>(relation)
                       : pick<uint64_t, Plain<uint64_t>, kIsSetp>(relation);
  }
}

int relation_named(std::string_view name) {
  static const char* const kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                       "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  for (int i = 0; i < 14; ++i) {
    if (name == kNames[i]) return i;
  }
  // Unsigned comparisons have names of their own as well.
  if (name == "lo") return kLt;
  if (name == "ls") return kLe;
  if (name == "hi") return kGt;
  if (name == "hs") return kGe;
  return -1;
}

}  // namespace

bool decode_compare(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  if (op != "setp" && op != "set") return false;
  const Type t = d.type();
  const int relation = relation_named(d.parts[1]);
  if (relation < 0) d.fail("this comparison");
  in.cls = t.kind == 'f' ? (t.bytes == 8 ? Class::kDouble : Class::kFloat) : Class::kInteger;
  if (d.has("ftz") && t.kind == 'f') d.fail("a comparison with ftz");
  in.mode = d.has("and") ? kAnd : d.has("or") ? kOr : d.has("xor") ? kXor : kAlone;
  in.a = d.source(1, t);
  in.b = d.source(2, t);
  if (in.mode != kAlone) in.c = d.predicate(d.text(3));
  if (op == "setp") {
    const std::vector<std::string_view> both = split(d.text(0), '|');
    in.d = d.predicate(both[0]);
    if (both.size() > 1) in.list.push_back(d.predicate(both[1]));
    if (t.is_packed) {
      in.mode2 = 2;
      in.flag = t.kind == 'g';
      in.run = pick_pair(relation);
    } else {
      in.run = pick_type<true>(t, relation);
    }
    return in.run != nullptr;
  }
  in.d = d.destination(0);
  const Type result = d.type(1);
  in.mode2 = result.kind == 'f' || result.kind == 'h' || result.kind == 'g' ? 1 : 0;
  in.flag = t.kind == 'g';
  if (t.is_packed && in.mode != kAlone) d.fail("not implemented");
  in.run = t.is_packed ? pick_pair(relation) : pick_type<false>(t, relation);
  if (!t.is_packed && in.d.bytes != 4) d.fail("a result of this width");
  return in.run != nullptr;
}

}  // namespace ptxvm
