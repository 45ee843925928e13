// Bits: logic, shifts, fields, permutations, counts.
#include "engine/decoder.h"
#include "engine/machine.h"

namespace ptxvm {
namespace {

enum Logic { kAnd, kOr, kXor };

// A lane of and/or is defined if one side decides it.
template <class T, Logic kLogic>
void logic(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  T* d = destination<T>(c, in.d);
  const uint32_t ua = undefined_lanes(c, in.a), ub = undefined_lanes(c, in.b);
  uint32_t undefined = ua | ub;
  if ((undefined & mask) != 0 && kLogic != kXor) {
    const T decides = kLogic == kAnd ? T{0} : static_cast<T>(~T{0});
    each_lane(undefined & mask, [&](int l) {
      const bool by_a = !(ua >> l & 1) && a[l] == decides;
      const bool by_b = !(ub >> l & 1) && b[l] == decides;
      if (by_a || by_b) undefined &= ~(1u << l);
    });
  }
  for_lanes(d, mask, [&](int l) {
    return static_cast<T>(kLogic == kAnd ? a[l] & b[l] : kLogic == kOr ? a[l] | b[l] : a[l] ^ b[l]);
  });
  set_undefined(c, in.d, undefined, mask);
}

template <Logic kLogic>
void predicate_logic(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t a = predicate_lanes(c, in.a), b = predicate_lanes(c, in.b);
  const uint32_t ua = undefined_lanes(c, in.a), ub = undefined_lanes(c, in.b);
  uint32_t undefined = ua | ub;
  if (kLogic == kAnd) undefined &= ~((~ua & ~a) | (~ub & ~b));
  if (kLogic == kOr) undefined &= ~((~ua & a) | (~ub & b));
  set_predicate(c, in.d, kLogic == kAnd ? a & b : kLogic == kOr ? a | b : a ^ b, mask);
  set_undefined(c, in.d, undefined, mask);
}

template <class T>
void invert(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) { return static_cast<T>(~a[l]); });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}
template <class T>
void is_zero(Context& c, const Instr& in, uint32_t mask) {  // cnot
  const T* a = source<T>(c, in.a);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) { return static_cast<T>(a[l] == 0); });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}
void invert_predicate(Context& c, const Instr& in, uint32_t mask) {
  set_predicate(c, in.d, ~predicate_lanes(c, in.a), mask);
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

// Shifts clamp: by the width or more gives 0, or the sign.
template <class T>
void shift_left(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const uint32_t* by = source<uint32_t>(c, in.b);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) {
    return static_cast<T>(by[l] >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<T>(a[l]) << by[l]));
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}
template <class T>
void shift_right(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const uint32_t* by = source<uint32_t>(c, in.b);
  constexpr uint32_t kBits = 8 * sizeof(T);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) {
    if (static_cast<T>(-1) < T{0}) return static_cast<T>(a[l] >> (by[l] >= kBits ? kBits - 1 : by[l]));
    return static_cast<T>(by[l] >= kBits ? T{0} : static_cast<T>(a[l] >> by[l]));
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}

// shf: 32 bits out of the pair (b : a). mode: 0 left, 1 right; flag: wrap, else clamp.
void funnel(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const uint32_t* b = source<uint32_t>(c, in.b);
  const uint32_t* by = source<uint32_t>(c, in.c);
  for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) {
    const uint32_t n = in.flag ? by[l] & 31 : (by[l] > 32 ? 32 : by[l]);
    const uint64_t pair = uint64_t{b[l]} << 32 | a[l];
    return static_cast<uint32_t>(in.mode == 0 ? pair << n >> 32 : pair >> n);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

void lookup3(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const uint32_t* b = source<uint32_t>(c, in.b);
  const uint32_t* e = source<uint32_t>(c, in.c);
  const uint32_t table = static_cast<uint32_t>(in.imm);
  for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) {
    uint32_t r = 0;
    for (uint32_t i = 0; i < 8; ++i) {
      if (!(table >> i & 1)) continue;
      r |= ((i & 4) != 0 ? a[l] : ~a[l]) & ((i & 2) != 0 ? b[l] : ~b[l]) & ((i & 1) != 0 ? e[l] : ~e[l]);
    }
    return r;
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

void permute_bytes(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const uint32_t* b = source<uint32_t>(c, in.b);
  const uint32_t* selector = source<uint32_t>(c, in.c);
  for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) {
    const uint64_t pair = uint64_t{b[l]} << 32 | a[l];
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = selector[l] >> (4 * i) & 15;
      uint32_t byte = static_cast<uint32_t>(pair >> (8 * (nibble & 7))) & 255;
      if ((nibble & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
      r |= byte << (8 * i);
    }
    return r;
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

template <class T>
void extract_field(Context& c, const Instr& in, uint32_t mask) {
  using U = std::make_unsigned_t<T>;
  constexpr int kBits = 8 * sizeof(T);
  const T* a = source<T>(c, in.a);
  const uint32_t* position = source<uint32_t>(c, in.b);
  const uint32_t* length = source<uint32_t>(c, in.c);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) {
    const int from = static_cast<int>(position[l] & 255), bits = static_cast<int>(length[l] & 255);
    const int last = from + bits - 1 < kBits - 1 ? from + bits - 1 : kBits - 1;
    const bool sign = static_cast<T>(-1) < T{0} && bits > 0 && (static_cast<U>(a[l]) >> last & 1) != 0;
    U r = 0;
    for (int i = 0; i < kBits; ++i) {
      const bool bit = i < bits && from + i < kBits ? (static_cast<U>(a[l]) >> (from + i) & 1) != 0 : sign;
      r |= static_cast<U>(bit) << i;
    }
    return static_cast<T>(r);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

template <class T>
void insert_field(Context& c, const Instr& in, uint32_t mask) {
  constexpr int kBits = 8 * sizeof(T);
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  const uint32_t* position = source<uint32_t>(c, in.c);
  const uint32_t* length = source<uint32_t>(c, in.list[0]);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) {
    const int from = static_cast<int>(position[l] & 255), bits = static_cast<int>(length[l] & 255);
    T r = b[l];
    for (int i = 0; i < bits && from + i < kBits; ++i) {
      const T bit = T{1} << (from + i);
      r = (a[l] >> i & 1) != 0 ? r | bit : r & ~bit;
    }
    return r;
  });
  set_undefined(
      c, in.d,
      undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c) | undefined_lanes(c, in.list[0]),
      mask);
}

// bmsk: `b` ones from bit `a` on; flag: both wrap at 32, else they clamp.
void bit_mask(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const uint32_t* b = source<uint32_t>(c, in.b);
  for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) {
    const uint32_t from = in.flag ? a[l] & 31 : (a[l] > 32 ? 32 : a[l]);
    const uint32_t ones = in.flag ? b[l] & 31 : (b[l] > 32 ? 32 : b[l]);
    return static_cast<uint32_t>(((uint64_t{1} << ones) - 1) << from);
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b), mask);
}

enum Count { kPopulation, kLeadingZeros, kReverse, kFindSigned, kFindUnsigned };

template <class T, Count kCount>
void count_bits(Context& c, const Instr& in, uint32_t mask) {
  constexpr int kBits = 8 * sizeof(T);
  const T* a = source<T>(c, in.a);
  const auto f = [&](int l) -> uint64_t {
    T x = a[l];
    if (kCount == kPopulation) return static_cast<uint64_t>(__builtin_popcountll(x));
    if (kCount == kLeadingZeros) return x == 0 ? kBits : static_cast<uint64_t>(__builtin_clzll(x) - (64 - kBits));
    if (kCount == kReverse) {
      uint64_t r = 0;
      for (int i = 0; i < kBits; ++i) r |= static_cast<uint64_t>(x >> i & 1) << (kBits - 1 - i);
      return r;
    }
    if (kCount == kFindSigned && (x >> (kBits - 1) & 1) != 0) x = static_cast<T>(~x);
    if (x == 0) return 0xffffffffu;
    const uint64_t position = static_cast<uint64_t>(63 - __builtin_clzll(x));
    return in.flag ? kBits - 1 - position : position;
  };
  if (kCount == kReverse && kBits == 64) {
    for_lanes(destination<uint64_t>(c, in.d), mask, f);
  } else {
    for_lanes(destination<uint32_t>(c, in.d), mask, [&](int l) { return static_cast<uint32_t>(f(l)); });
  }
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

template <Logic kLogic>
Exec logic_of(Type t) {
  return t.kind == 'p'  ? predicate_logic<kLogic>
         : t.bytes == 2 ? logic<uint16_t, kLogic>
         : t.bytes == 4 ? logic<uint32_t, kLogic>
                        : logic<uint64_t, kLogic>;
}

template <class T32, class T64>
Exec field_of(Type t) {
  return t.bytes == 4 ? extract_field<T32> : extract_field<T64>;
}

bool decode_shift(Decoder& d, Instr& in, Type t) {
  in.d = d.destination(0);
  in.a = d.source(1, t);
  in.b = d.source(2, {'u', 4, false});
  if (d.parts[0] == "shl") {
    in.run = t.bytes == 2 ? shift_left<uint16_t> : t.bytes == 4 ? shift_left<uint32_t> : shift_left<uint64_t>;
  } else if (t.kind == 's') {
    in.run = t.bytes == 2 ? shift_right<int16_t> : t.bytes == 4 ? shift_right<int32_t> : shift_right<int64_t>;
  } else {
    in.run = t.bytes == 2 ? shift_right<uint16_t> : t.bytes == 4 ? shift_right<uint32_t> : shift_right<uint64_t>;
  }
  return true;
}

}  // namespace

bool decode_bits(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  in.cls = Class::kInteger;
  const Type word{'u', 4, false};
  if (op == "and" || op == "or" || op == "xor") {
    const Type t = d.type();
    in.run = op == "and" ? logic_of<kAnd>(t) : op == "or" ? logic_of<kOr>(t) : logic_of<kXor>(t);
    if (t.kind == 'p') {
      in.d = d.predicate(d.text(0));
      in.a = d.predicate(d.text(1));
      in.b = d.predicate(d.text(2));
    } else {
      in.d = d.destination(0);
      in.a = d.source(1, t);
      in.b = d.source(2, t);
    }
    return true;
  }
  if (op == "not" || op == "cnot") {
    const Type t = d.type();
    if (t.kind == 'p') {
      in.d = d.predicate(d.text(0));
      in.a = d.predicate(d.text(1));
      in.run = invert_predicate;
      return true;
    }
    in.d = d.destination(0);
    in.a = d.source(1, t);
    if (op == "not") {
      in.run = t.bytes == 2 ? invert<uint16_t> : t.bytes == 4 ? invert<uint32_t> : invert<uint64_t>;
    } else {
      in.run = t.bytes == 2 ? is_zero<uint16_t> : t.bytes == 4 ? is_zero<uint32_t> : is_zero<uint64_t>;
    }
    return true;
  }
  if (op == "shl" || op == "shr") return decode_shift(d, in, d.type());
  if (op == "shf" || op == "lop3" || op == "prmt") {
    in.d = d.destination(0);
    in.a = d.source(1, word);
    in.b = d.source(2, word);
    in.c = d.source(3, word);
    if (op == "shf") {
      in.run = funnel;
      in.mode = d.has("r") ? 1 : 0;
      in.flag = d.has("wrap");
    } else if (op == "lop3") {
      if (!parse_integer(d.text(4), in.imm)) d.fail("a table that is no number");
      in.run = lookup3;
    } else {
      if (d.parts.size() > 2) d.fail("a mode of prmt");
      in.run = permute_bytes;
    }
    return true;
  }
  if (op == "bmsk") {
    in.d = d.destination(0);
    in.a = d.source(1, word);
    in.b = d.source(2, word);
    in.flag = d.has("wrap");
    in.run = bit_mask;
    return true;
  }
  if (op == "bfe" || op == "bfi") {
    const Type t = d.type();
    in.d = d.destination(0);
    in.a = d.source(1, t);
    in.b = d.source(2, op == "bfe" ? word : t);
    in.c = d.source(3, word);
    if (op == "bfi") {
      in.list.push_back(d.source(4, word));
      in.run = t.bytes == 4 ? insert_field<uint32_t> : insert_field<uint64_t>;
    } else {
      in.run = t.kind == 's' ? field_of<int32_t, int64_t>(t) : field_of<uint32_t, uint64_t>(t);
    }
    return true;
  }
  if (op == "popc" || op == "clz" || op == "brev" || op == "bfind") {
    const Type t = d.type();
    in.d = d.destination(0);
    in.a = d.source(1, t);
    in.flag = d.has("shiftamt");
    const bool is_word = t.bytes == 4;
    if (op == "popc") in.run = is_word ? count_bits<uint32_t, kPopulation> : count_bits<uint64_t, kPopulation>;
    if (op == "clz") in.run = is_word ? count_bits<uint32_t, kLeadingZeros> : count_bits<uint64_t, kLeadingZeros>;
    if (op == "brev") in.run = is_word ? count_bits<uint32_t, kReverse> : count_bits<uint64_t, kReverse>;
    if (op == "bfind" && t.kind == 's')
      in.run = is_word ? count_bits<uint32_t, kFindSigned> : count_bits<uint64_t, kFindSigned>;
    if (op == "bfind" && t.kind != 's')
      in.run = is_word ? count_bits<uint32_t, kFindUnsigned> : count_bits<uint64_t, kFindUnsigned>;
    return true;
  }
  return false;
}

}  // namespace ptxvm
