// mov, packing and unpacking, selp, slct, cvta, isspacep.
#include "engine/access.h"
#include "engine/decoder.h"
#include "engine/machine.h"

namespace ptxvm {
namespace {

template <class T>
void move(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) { return a[l]; });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}
void move_predicate(Context& c, const Instr& in, uint32_t mask) {
  set_predicate(c, in.d, predicate_lanes(c, in.a), mask);
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}
void set_constant_predicate(Context& c, const Instr& in, uint32_t mask) {
  set_predicate(c, in.d, in.imm != 0 ? kAllLanes : 0, mask);
  set_undefined(c, in.d, 0, mask);
}
// A clock must not stand still.
void read_clock(Context& c, const Instr& in, uint32_t mask) {
  each_lane(mask, [&](int l) { set_lane(c, in.d, l, c.launch->instructions); });
  set_undefined(c, in.d, 0, mask);
}

void pack(Context& c, const Instr& in, uint32_t mask) {
  uint32_t undefined = 0;
  for (const Operand& part : in.list) undefined |= undefined_lanes(c, part);
  if (in.list.size() == 2 && in.d.bytes == 4) {
    const uint16_t* low = source<uint16_t>(c, in.list[0]);
    const uint16_t* high = source<uint16_t>(c, in.list[1]);
    for_lanes(destination<uint32_t>(c, in.d), mask,
              [&](int l) { return low[l] | static_cast<uint32_t>(high[l]) << 16; });
  } else if (in.list.size() == 2 && in.d.bytes == 8) {
    const uint32_t* low = source<uint32_t>(c, in.list[0]);
    const uint32_t* high = source<uint32_t>(c, in.list[1]);
    for_lanes(destination<uint64_t>(c, in.d), mask,
              [&](int l) { return low[l] | static_cast<uint64_t>(high[l]) << 32; });
  } else {
    const int bits = 8 * in.d.bytes / static_cast<int>(in.list.size());
    each_lane(mask, [&](int l) {
      uint64_t value = 0;
      for (size_t i = 0; i < in.list.size(); ++i) value |= lane_value(c, in.list[i], l) << (static_cast<int>(i) * bits);
      set_lane(c, in.d, l, value);
    });
  }
  set_undefined(c, in.d, undefined, mask);
}

void unpack(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t undefined = undefined_lanes(c, in.a);
  const int bits = 8 * in.a.bytes / static_cast<int>(in.list.size());
  for (size_t i = 0; i < in.list.size(); ++i) {
    each_lane(mask, [&](int l) { set_lane(c, in.list[i], l, lane_value(c, in.a, l) >> (static_cast<int>(i) * bits)); });
    set_undefined(c, in.list[i], undefined, mask);
  }
}

template <class T>
void select(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  const uint32_t choice = predicate_lanes(c, in.c);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) { return (choice >> l) & 1u ? a[l] : b[l]; });
  set_undefined(c, in.d,
                undefined_lanes(c, in.c) | (undefined_lanes(c, in.a) & choice) | (undefined_lanes(c, in.b) & ~choice),
                mask);
}

// slct: a if c >= 0, else b; flag: c is a float.
template <class T>
void select_by_sign(Context& c, const Instr& in, uint32_t mask) {
  const T* a = source<T>(c, in.a);
  const T* b = source<T>(c, in.b);
  const int32_t* by = source<int32_t>(c, in.c);
  for_lanes(destination<T>(c, in.d), mask, [&](int l) {
    float real;
    __builtin_memcpy(&real, &by[l], 4);
    return (in.flag ? real >= 0 : by[l] >= 0) ? a[l] : b[l];
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a) | undefined_lanes(c, in.b) | undefined_lanes(c, in.c), mask);
}

// cvta: flag: to a window of generic addresses, else out of it. imm: where the window starts, 0 for global memory.
void convert_address(Context& c, const Instr& in, uint32_t mask) {
  each_lane(mask, [&](int l) {
    const uint64_t at = lane_value(c, in.a, l);
    set_lane(c, in.d, l, in.flag ? at + static_cast<uint64_t>(in.imm) : at - static_cast<uint64_t>(in.imm));
  });
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}
void is_in_space(Context& c, const Instr& in, uint32_t mask) {
  uint32_t lanes = 0;
  each_lane(mask, [&](int l) {
    if (space_of(lane_value(c, in.a, l)) == in.space) lanes |= 1u << l;
  });
  set_predicate(c, in.d, lanes, mask);
  set_undefined(c, in.d, undefined_lanes(c, in.a), mask);
}

Space space_named(Decoder& d, int64_t* window) {
  *window = 0;
  if (d.has("shared") || d.has("shared::cta")) return *window = static_cast<int64_t>(kSharedWindow), Space::kShared;
  if (d.has("local")) return *window = static_cast<int64_t>(kLocalWindow), Space::kLocal;
  if (d.has("param")) return *window = static_cast<int64_t>(kParamWindow), Space::kParam;
  if (d.has("global") || d.has("const")) return Space::kGlobal;
  d.fail("this address space");
}

bool decode_mov(Decoder& d, Instr& in) {
  const Type t = d.type();
  in.cls = Class::kMove;
  if (t.kind == 'p') {
    in.d = d.predicate(d.text(0));
    if (parse_integer(d.text(1), in.imm)) {
      in.run = set_constant_predicate;
    } else {
      in.a = d.predicate(d.text(1));
      in.run = move_predicate;
    }
    return true;
  }
  if (d.text(1)[0] == '{') {
    in.d = d.destination(0);
    const int bytes = t.bytes / static_cast<int>(d.members(1).size());
    for (std::string_view part : d.members(1)) in.list.push_back(d.source(part, {'b', bytes, false}));
    in.run = pack;
    return true;
  }
  if (d.text(0)[0] == '{') {
    in.a = d.source(1, t);
    for (std::string_view part : d.members(0)) in.list.push_back(d.destination(part));
    in.run = unpack;
    return true;
  }
  in.d = d.destination(0);
  const std::string_view from = d.text(1);
  if (from == "%clock" || from == "%clock64" || from == "%globaltimer" || from == "%clock_hi") {
    in.run = read_clock;
    return true;
  }
  in.a = d.source(1, t);
  if (in.a.bytes != in.d.bytes) {
    // A 32-bit special register read as .u64, or a symbol's address.
    if ((in.a.offset & kConstant) != 0) d.fail("an immediate of another width");
    in.flag = true;
    in.run = convert_address;
    return true;
  }
  in.run = t.bytes == 2 || t.bytes == 1 ? move<uint16_t> : t.bytes == 4 ? move<uint32_t> : move<uint64_t>;
  return true;
}

}  // namespace

bool decode_move(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  if (op == "mov") return decode_mov(d, in);
  if (op == "selp") {
    const Type t = d.type();
    in.cls = Class::kMove;
    in.d = d.destination(0);
    in.a = d.source(1, t);
    in.b = d.source(2, t);
    in.c = d.predicate(d.text(3));
    in.run = t.bytes == 2 ? select<uint16_t> : t.bytes == 4 ? select<uint32_t> : select<uint64_t>;
    return true;
  }
  if (op == "slct") {
    const Type by = d.type(), t = d.type(1);
    in.cls = Class::kMove;
    in.d = d.destination(0);
    in.a = d.source(1, t);
    in.b = d.source(2, t);
    in.c = d.source(3, by);
    in.flag = by.kind == 'f';
    in.run = t.bytes == 2   ? select_by_sign<uint16_t>
             : t.bytes == 4 ? select_by_sign<uint32_t>
                            : select_by_sign<uint64_t>;
    return true;
  }
  if (op == "cvta") {
    in.cls = Class::kMove;
    space_named(d, &in.imm);
    in.flag = !d.has("to");
    in.d = d.destination(0);
    in.a = d.source(1, d.type());
    in.run = in.imm == 0 && in.a.bytes == 8 ? move<uint64_t> : convert_address;
    return true;
  }
  if (op == "isspacep") {
    in.cls = Class::kMove;
    in.space = space_named(d, &in.imm);
    in.d = d.predicate(d.text(0));
    in.a = d.source(1, {'u', 8, false});
    in.run = is_in_space;
    return true;
  }
  return false;
}

}  // namespace ptxvm
