// Integer arithmetic: add, sub, mul, mad, div, rem, min, max, abs, neg, sad, and the carry chain.
#include <climits>
#include <type_traits>

#include "engine/decoder.h"
#include "engine/machine.h"

namespace ptxvm {
namespace {

template <class T>
using Wide = std::conditional_t<
    std::is_signed_v<T>,
    std::conditional_t<sizeof(T) == 2, int32_t, std::conditional_t<sizeof(T) == 4, int64_t, __int128>>,
    std::conditional_t<sizeof(T) == 2, uint32_t, std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>>>;

template <class T, class F>
void unary(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) { return F()(a[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

template <class T, class F>
void binary(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) { return F()(a[l], b[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}

template <class D, class T, class F>
void ternary(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  const D* addend = source<D>(c, in.c);
  for_lanes(destination<D>(c, in.d), mask, [&](int l) { return F()(a[l], b[l], addend[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
struct Add {
  T operator()(T a, T b) const { return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b)); }
};
template <class T>
struct Sub {
  T operator()(T a, T b) const { return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b)); }
};
template <class T>
struct AddSaturated {
  T operator()(T a, T b) const {
    T sum;
    return __builtin_add_overflow(a, b, &sum) ? (b < 0 ? INT_MIN : INT_MAX) : sum;
  }
};
template <class T>
struct SubSaturated {
  T operator()(T a, T b) const {
    T sum;
    return __builtin_sub_overflow(a, b, &sum) ? (b < 0 ? INT_MAX : INT_MIN) : sum;
  }
};
template <class T>
struct MulLow {
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<uint64_t>(static_cast<Unsigned<T>>(a)) * static_cast<Unsigned<T>>(b));
  }
};
template <class T>
struct MulHigh {
  T operator()(T a, T b) const {
    return static_cast<T>((static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) >> (8 * sizeof(T)));
  }
};
template <class T>
struct MadLow {
  T operator()(T a, T b, T addend) const { return Add<T>()(MulLow<T>()(a, b), addend); }
};
template <class T>
struct MadHigh {
  T operator()(T a, T b, T addend) const { return Add<T>()(MulHigh<T>()(a, b), addend); }
};
template <class T>
struct MadWide {
  Wide<T> operator()(T a, T b, Wide<T> addend) const {
    return Add<Wide<T>>()(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b), addend);
  }
};
// Division by zero has no defined result; the machine gives all ones.
template <class T>
struct Div {
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub<T>()(0, a);
    return static_cast<T>(a / b);
  }
};
template <class T>
struct Rem {
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
template <class T>
struct Min {
  T operator()(T a, T b) const { return b < a ? b : a; }
};
template <class T>
struct Max {
  T operator()(T a, T b) const { return a < b ? b : a; }
};
template <class T>
struct Abs {
  T operator()(T a) const { return a < 0 ? Sub<T>()(0, a) : a; }
};
template <class T>
struct Neg {
  T operator()(T a) const { return Sub<T>()(0, a); }
};
template <class T>
struct Sad {
  T operator()(T a, T b, T addend) const { return Add<T>()(a < b ? Sub<T>()(b, a) : Sub<T>()(a, b), addend); }
};

template <class T>
void mul_wide(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  for_lanes(destination<Wide<T>>(c, in.d), mask,
            [&](int l) { return static_cast<Wide<T>>(a[l]) * static_cast<Wide<T>>(b[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}

// Division where a divisor in use is zero or undefined is reported: its result is anything.
template <class T, class F>
void division(Context& c, const Instr& in, uint32_t mask) {
  const T* b = source<T>(c, in.b);
  uint32_t zero = 0;
  each_lane(mask, [&](int l) {
    if (b[l] == 0) zero |= 1u << l;
  });
  binary<T, F>(c, in, mask);
  set_undefined(c, in.d, undefined_lanes(c, in.d) | zero, mask);
}

// add.cc, addc, sub.cc, subc, mad.lo.cc, madc: mode bit 0 reads the carry, bit 1 writes it. mode2: 0 add, 1 sub,
// 2 mad.lo, 3 mad.hi.
template <class T>
void with_carry(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  T* d = destination<T>(c, in.d);
  uint32_t carry_out = 0;
  each_lane(mask, [&](int l) {
    const unsigned __int128 in_carry = (in.mode & 1) != 0 ? c.warp->carry >> l & 1 : 0;
    unsigned __int128 x = a[l], y = b[l];
    if (in.mode2 >= 2) {
      const unsigned __int128 product = x * y;
      x = in.mode2 == 2 ? static_cast<T>(product) : static_cast<T>(product >> (8 * sizeof(T)));
      y = source<T>(c, in.c)[l];
    }
    const unsigned __int128 sum = in.mode2 == 1 ? x - y - in_carry : x + y + in_carry;
    d[l] = static_cast<T>(sum);
    if ((sum >> (8 * sizeof(T)) & 1) != 0) carry_out |= 1u << l;
  });
  if ((in.mode & 2) != 0) c.warp->carry = (c.warp->carry & ~mask) | carry_out;
  uint32_t undefined = undefined_lanes(c, in.a) | undefined_lanes(c, in.b);
  if (in.mode2 >= 2) undefined |= undefined_lanes(c, in.c);
  set_undefined(c, in.d, undefined, mask);
}

// run = f<T>() for the integer type of an instruction.
template <template <class> class F>
Exec binary_of(Type t) {
  switch (t.kind == 's' ? -t.bytes : t.bytes) {
    case 2: return binary<uint16_t, F<uint16_t>>;
    case 4: return binary<uint32_t, F<uint32_t>>;
    case 8: return binary<uint64_t, F<uint64_t>>;
    case -2: return binary<int16_t, F<int16_t>>;
    case -4: return binary<int32_t, F<int32_t>>;
    case -8: return binary<int64_t, F<int64_t>>;
    default: return nullptr;
  }
}
template <template <class> class F>
Exec division_of(Type t) {
  switch (t.kind == 's' ? -t.bytes : t.bytes) {
    case 2: return division<uint16_t, F<uint16_t>>;
    case 4: return division<uint32_t, F<uint32_t>>;
    case 8: return division<uint64_t, F<uint64_t>>;
    case -2: return division<int16_t, F<int16_t>>;
    case -4: return division<int32_t, F<int32_t>>;
    case -8: return division<int64_t, F<int64_t>>;
    default: return nullptr;
  }
}
template <template <class> class F>
Exec unary_of(Type t) {
  switch (t.bytes) {
    case 2: return unary<int16_t, F<int16_t>>;
    case 4: return unary<int32_t, F<int32_t>>;
    case 8: return unary<int64_t, F<int64_t>>;
    default: return nullptr;
  }
}
template <template <class> class F>
Exec ternary_of(Type t) {
  switch (t.kind == 's' ? -t.bytes : t.bytes) {
    case 2: return ternary<uint16_t, uint16_t, F<uint16_t>>;
    case 4: return ternary<uint32_t, uint32_t, F<uint32_t>>;
    case 8: return ternary<uint64_t, uint64_t, F<uint64_t>>;
    case -2: return ternary<int16_t, int16_t, F<int16_t>>;
    case -4: return ternary<int32_t, int32_t, F<int32_t>>;
    case -8: return ternary<int64_t, int64_t, F<int64_t>>;
    default: return nullptr;
  }
}

bool decode_carry(Decoder& d, Instr& in, Type t) {
  const std::string_view op = d.parts[0];
  in.mode = static_cast<uint8_t>((op == "addc" || op == "subc" || op == "madc" ? 1 : 0) | (d.has("cc") ? 2 : 0));
  in.mode2 = op[0] == 'a' ? 0 : op[0] == 's' ? 1 : d.has("hi") ? 3 : 2;
  if (in.mode2 == 3 && t.kind == 's') d.fail("signed mad.hi with carry");
  in.run = t.bytes == 8 ? with_carry<uint64_t> : with_carry<uint32_t>;
  in.d = d.destination(0);
  in.a = d.source(1, t);
  in.b = d.source(2, t);
  if (in.mode2 >= 2) in.c = d.source(3, t);
  return true;
}

}  // namespace

bool decode_integer(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  static const char* const kOps[] = {"add", "sub", "mul", "mad",  "div",  "rem",  "min",   "max",
                                     "abs", "neg", "sad", "addc", "subc", "madc", "mul24", "mad24"};
  bool is_mine = false;
  for (const char* name : kOps) is_mine = is_mine || op == name;
  if (!is_mine) return false;
  const Type t = d.type();
  if (t.kind != 'u' && t.kind != 's') return false;
  in.cls = Class::kInteger;
  if (d.has("cc") || op == "addc" || op == "subc" || op == "madc") return decode_carry(d, in, t);
  in.d = d.destination(0);
  in.a = d.source(1, t);
  if (op == "abs" || op == "neg") {
    in.run = op == "abs" ? unary_of<Abs>(t) : unary_of<Neg>(t);
    return true;
  }
  in.b = d.source(2, t);
  const bool is_wide = d.has("wide"), is_high = d.has("hi");
  if (op == "mad" || op == "sad") {
    const Type sum = is_wide ? Type{t.kind, t.bytes * 2, false} : t;
    in.c = d.source(3, sum);
    if (op == "sad") {
      in.run = ternary_of<Sad>(t);
    } else if (!is_wide) {
      if (d.has("sat")) d.fail("mad.sat");
      in.run = is_high ? ternary_of<MadHigh>(t) : ternary_of<MadLow>(t);
    } else if (t.kind == 's') {
      in.run = t.bytes == 2 ? ternary<int32_t, int16_t, MadWide<int16_t>> : ternary<int64_t, int32_t, MadWide<int32_t>>;
    } else {
      in.run = t.bytes == 2 ? ternary<uint32_t, uint16_t, MadWide<uint16_t>>
                            : ternary<uint64_t, uint32_t, MadWide<uint32_t>>;
    }
    return true;
  }
  if (op == "mul") {
    if (is_wide) {
      in.run = t.kind == 's' ? (t.bytes == 2 ? mul_wide<int16_t> : mul_wide<int32_t>)
                             : (t.bytes == 2 ? mul_wide<uint16_t> : mul_wide<uint32_t>);
    } else {
      in.run = is_high ? binary_of<MulHigh>(t) : binary_of<MulLow>(t);
    }
  } else if (op == "add") {
    in.run = d.has("sat") ? binary<int32_t, AddSaturated<int32_t>> : binary_of<Add>(t);
  } else if (op == "sub") {
    in.run = d.has("sat") ? binary<int32_t, SubSaturated<int32_t>> : binary_of<Sub>(t);
  } else if (op == "div") {
    in.run = division_of<Div>(t);
  } else if (op == "rem") {
    in.run = division_of<Rem>(t);
  } else if (op == "min") {
    in.run = binary_of<Min>(t);
  } else if (op == "max") {
    in.run = binary_of<Max>(t);
  } else {
    d.fail("not implemented");
  }
  return in.run != nullptr;
}

}  // namespace ptxvm
