// ld, st, prefetch, and the fences.
#include <cstring>

#include "engine/access.h"
#include "engine/decoder.h"
#include "engine/machine.h"

namespace ptxvm {
namespace {

// mode2 of a load: the value is sign-extended to its register.
template <class Register, int kBytes>
void copy_in(const Context& c, const Operand& d, const Access& access, uint32_t element, bool is_signed) {
  Register* to = destination<Register>(c, d);
  each_lane(access.mask, [&](int l) {
    uint64_t value = 0;
    std::memcpy(&value, access.at[l] + element * kBytes, kBytes);
    if (is_signed) {
      const int shift = 64 - 8 * kBytes;
      value = static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift);
    }
    to[l] = static_cast<Register>(value);
  });
}

using CopyIn = void (*)(const Context&, const Operand&, const Access&, uint32_t, bool);
template <int kBytes>
CopyIn copy_in_of(int register_bytes) {
  return register_bytes == 2   ? copy_in<uint16_t, kBytes>
         : register_bytes == 4 ? copy_in<uint32_t, kBytes>
                               : copy_in<uint64_t, kBytes>;
}
CopyIn copy_in_of(int bytes, int register_bytes) {
  switch (bytes) {
    case 1: return copy_in_of<1>(register_bytes);
    case 2: return copy_in_of<2>(register_bytes);
    case 4: return copy_in_of<4>(register_bytes);
    default: return copy_in_of<8>(register_bytes);
  }
}

template <int kBytes>
void copy_out(const Context& c, const Operand& value, const Access& access, uint32_t element) {
  // The low bytes of a register of any width.
  const uint8_t* from = source<uint8_t>(c, value);
  const uint32_t step = value.bytes;
  each_lane(access.mask, [&](int l) {
    std::memcpy(access.at[l] + element * kBytes, from + static_cast<uint32_t>(l) * step, kBytes);
  });
}
using CopyOut = void (*)(const Context&, const Operand&, const Access&, uint32_t);
CopyOut copy_out_of(int bytes) {
  return bytes == 1 ? copy_out<1> : bytes == 2 ? copy_out<2> : bytes == 4 ? copy_out<4> : copy_out<8>;
}

void check_not_written(const Context& c, const Access& access) {
  GlobalMemory& memory = c.launch->engine->memory;
  each_lane(access.mask, [&](int l) {
    Region* region = access.region;
    if (region == nullptr) region = memory.find(access.address[l], access.address[l] + access.size(), false);
    if (region->shadow.is_empty() || region->launch != c.launch->id) return;
    int count = 0;
    region->shadow.refine(access.bytes);
    const Cell* cell = region->shadow.at(access.address[l], access.size(), &count);
    for (int i = 0; i < count; ++i) {
      if (cell[i].write_time != 0)
        fault(c, "read-only load",
              "ld.global.nc reads memory that this launch writes, at " + memory.describe(access.address[l]), l);
    }
  });
}

void load(Context& c, const Instr& in, uint32_t mask) {
  Access access;
  access.bytes = in.bytes;
  access.count = in.count;
  access.order = in.order;
  read_addresses(c, in.a, in.imm, mask, access);
  each_space(c, in, access, [&](Access& part) {
    uint32_t undefined[4] = {};
    if (in.mode == 1 && part.space == Space::kGlobal) check_not_written(c, part);
    track_read(c, part, undefined);
    for (uint32_t e = 0; e < in.count; ++e) {
      copy_in_of(in.bytes, in.list[e].bytes)(c, in.list[e], part, e, in.mode2 != 0);
      set_undefined(c, in.list[e], undefined[e], part.mask);
    }
  });
}

void store(Context& c, const Instr& in, uint32_t mask) {
  Access access;
  access.bytes = in.bytes;
  access.count = in.count;
  access.order = in.order;
  access.is_write = true;
  read_addresses(c, in.a, in.imm, mask, access);
  each_space(c, in, access, [&](Access& part) {
    uint32_t undefined[4] = {};
    uint32_t any = 0;
    for (uint32_t e = 0; e < in.count; ++e) any |= undefined[e] = undefined_lanes(c, in.list[e]) & part.mask;
    if (any != 0 && part.space == Space::kGlobal)
      fault(c, "undefined value",
            "an undefined value is stored to global memory at " +
                c.launch->engine->memory.describe(part.address[__builtin_ctz(any)]),
            __builtin_ctz(any));
    track_write(c, in, part);
    if (part.space == Space::kParam || part.space == Space::kConst) fault(c, "bad store", "a store to this space");
    for (uint32_t e = 0; e < in.count; ++e) copy_out_of(in.bytes)(c, in.list[e], part, e);
    if (part.space == Space::kLocal) {
      each_lane(part.mask, [&](int l) {
        uint8_t* defined = c.warp->local_defined.data() + (part.at[l] - c.warp->local.data());
        for (uint32_t e = 0; e < in.count; ++e)
          std::memset(defined + e * in.bytes, (undefined[e] >> l & 1) ? 0 : 1, in.bytes);
      });
    } else if (any != 0) {  // shared memory takes over that a value is undefined
      for (uint32_t e = 0; e < in.count; ++e) {
        each_lane(undefined[e], [&](int l) {
          int count = 0;
          Cell* cell = c.block->shared_shadow.at(part.address[l] + e * in.bytes, in.bytes, &count);
          for (int i = 0; i < count; ++i) cell[i].flags &= ~kDefined;
        });
      }
    }
  });
}

// A parameter at a fixed offset: the same in all lanes.
void load_parameter(Context& c, const Instr& in, uint32_t mask) {
  const uint64_t at = source<uint64_t>(c, in.a)[0] + static_cast<uint64_t>(in.imm);
  if (at + static_cast<uint64_t>(in.bytes) * in.count > c.launch->params.size())
    fault(c, "out of bounds", "a read of a parameter past the last one");
  for (uint32_t e = 0; e < in.count; ++e) {
    uint64_t value = 0;
    std::memcpy(&value, c.launch->params.data() + at + e * in.bytes, in.bytes);
    if (in.mode2 != 0) {
      const int shift = 64 - 8 * in.bytes;
      value = static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift);
    }
    const Operand& d = in.list[e];
    if (d.bytes == 2) for_lanes(destination<uint16_t>(c, d), mask, [&](int) { return static_cast<uint16_t>(value); });
    if (d.bytes == 4) for_lanes(destination<uint32_t>(c, d), mask, [&](int) { return static_cast<uint32_t>(value); });
    if (d.bytes == 8) for_lanes(destination<uint64_t>(c, d), mask, [&](int) { return value; });
    set_undefined(c, d, 0, mask);
  }
}

void fence(Context& c, const Instr& in, uint32_t mask) {
  if (!in.flag) return;  // of the block only: nothing is handed to other blocks
  each_lane(mask, [&](int l) { c.block->order.fence(static_cast<uint16_t>(c.warp->index * kLanes + l)); });
}

void nothing(Context&, const Instr&, uint32_t) {}

Order order_of(const Decoder& d) {
  if (d.has("acquire")) return Order::kAcquire;
  if (d.has("release")) return Order::kRelease;
  if (d.has("volatile") || d.has("relaxed") || d.has("mmio")) return Order::kStrong;
  return Order::kWeak;
}

Space space_of(const Decoder& d) {
  for (std::string_view part : d.parts) {
    if (part == "global") return Space::kGlobal;
    if (part == "shared" || part == "shared::cta") return Space::kShared;
    if (part == "local") return Space::kLocal;
    if (part == "const") return Space::kConst;
    if (part == "param" || part == "param::entry") return Space::kParam;
  }
  return Space::kGeneric;
}

void set_class(Instr& in, bool is_load) {
  switch (in.space) {
    case Space::kShared: in.cls = is_load ? Class::kLoadShared : Class::kStoreShared; break;
    case Space::kGlobal:
    case Space::kGeneric: in.cls = is_load ? Class::kLoadGlobal : Class::kStoreGlobal; break;
    default: in.cls = Class::kOtherMemory;
  }
}

}  // namespace

bool decode_memory(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  if (op == "ld" || op == "ldu" || op == "st") {
    const Type t = d.type();
    const bool is_load = op != "st";
    in.space = space_of(d);
    in.order = order_of(d);
    in.bytes = static_cast<uint8_t>(t.bytes);
    in.count = d.has("v4") ? 4 : d.has("v2") ? 2 : 1;
    in.mode = d.has("nc") ? 1 : 0;
    in.mode2 = t.kind == 's' ? 1 : 0;
    if (t.bytes == 16 || d.has("v8") || d.has("cluster") || d.has("unified")) d.fail("not implemented");
    set_class(in, is_load);
    const size_t at = is_load ? 1 : 0;
    d.address(d.text(at), in);
    for (std::string_view member : d.members(1 - at))
      in.list.push_back(is_load ? d.destination(member) : d.source(member, t));
    if (in.list.size() != in.count) d.fail("not as many registers as elements");
    const bool is_fixed = in.space == Space::kParam && (in.a.offset & kConstant) != 0;
    in.run = is_load ? (is_fixed ? load_parameter : load) : store;
    if (!is_load && in.space == Space::kParam) in.run = nothing;  // of a call; those there are take no notice of them
    return true;
  }
  if (op == "membar" || op == "fence") {
    in.cls = Class::kBarrier;
    in.flag = d.has("gl") || d.has("gpu") || d.has("sys");
    if (d.has("proxy")) d.fail("not implemented");
    in.run = fence;
    return true;
  }
  if (op == "prefetch" || op == "prefetchu" || op == "discard" || op == "applypriority") {
    in.cls = Class::kOtherMemory;
    in.run = nothing;
    return true;
  }
  return false;
}

}  // namespace ptxvm
