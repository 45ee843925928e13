// Every access of memory by a warp: addresses, address space, alignment, bounds; then definedness and races.
#pragma once

#include "engine/machine.h"

namespace ptxvm {

// One access by the lanes of a mask. `count` elements of `bytes` each, next to each other.
struct Access {
  alignas(64) uint64_t address[kLanes];  // in shared, local and param space the offset in it
  uint8_t* at[kLanes];                   // where the bytes are
  uint32_t mask = 0;
  uint32_t bytes = 0, count = 1;
  Space space = Space::kGlobal;
  Region* region = nullptr;  // global memory, when all lanes touch the same
  Order order = Order::kWeak;
  bool is_write = false;

  uint32_t size() const { return bytes * count; }
};

// Fills `access.address` from the operand of an instruction. Undefined addresses are a fault.
void read_addresses(const Context& c, Operand base, int64_t offset, uint32_t mask, Access& access);
// Splits an access by address space, checks alignment and bounds and calls `body` for each part.
template <class F>
void each_space(const Context& c, const Instr& instr, Access& access, const F& body);
// Checks alignment and bounds of lanes that all are in access.space, and fills access.at.
void locate(const Context& c, Access& access);
// Undefined lanes per element; faults on races.
void track_read(const Context& c, Access& access, uint32_t* undefined);
void track_write(const Context& c, const Instr& instr, Access& access);
// Both at once, for atomics; undefined targets are a fault.
void track_atomic(const Context& c, const Instr& instr, Access& access);
// The target of an asynchronous copy, when it is issued and when its thread has waited for it.
void start_async(const Context& c, uint64_t offset, uint32_t bytes, int lane);
void finish_async(const Context& c, uint64_t offset, uint32_t bytes, int lane, bool is_defined);
// A strong read takes over what was published through the location, a strong write publishes.
void take_order(const Context& c, const Access& access);
void publish_order(const Context& c, const Access& access, bool is_update);

Space space_of(uint64_t address);

template <class F>
void each_space(const Context& c, const Instr& instr, Access& access, const F& body) {
  if (instr.space != Space::kGeneric) {
    access.space = instr.space;
    locate(c, access);
    body(access);
    return;
  }
  for (uint32_t left = access.mask; left != 0;) {
    Access part = access;
    part.space = space_of(access.address[__builtin_ctz(left)]);
    part.mask = 0;
    each_lane(left, [&](int l) {
      if (space_of(access.address[l]) == part.space) part.mask |= 1u << l;
    });
    left &= ~part.mask;
    if (part.space != Space::kGlobal) {
      each_lane(part.mask, [&](int l) { part.address[l] &= kWindowSize - 1; });
    }
    locate(c, part);
    body(part);
  }
}

}  // namespace ptxvm
