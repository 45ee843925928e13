#include "engine/access.h"

#include <algorithm>
#include <cstdio>

namespace ptxvm {
namespace {

const char* name_of(Space space) {
  switch (space) {
    case Space::kShared: return "shared";
    case Space::kLocal: return "local";
    case Space::kConst: return "constant";
    case Space::kParam: return "parameter";
    default: return "global";
  }
}

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string what(const Access& access) {
  return std::string(access.is_write ? "write" : "read") + " of " + std::to_string(access.size()) + " bytes of " +
         name_of(access.space) + " memory";
}

[[noreturn]] void out_of_bounds(const Context& c, const Access& access, int lane) {
  std::string where;
  if (access.space == Space::kGlobal || access.space == Space::kConst) {
    where = c.launch->engine->memory.describe(access.address[lane]);
  } else if (access.space == Space::kShared) {
    where = "offset " + std::to_string(static_cast<int64_t>(access.address[lane] - kSharedStart));
    for (const Symbol& symbol : c.program->shared) {
      if (access.address[lane] + access.size() > symbol.address &&
          access.address[lane] < symbol.address + symbol.size + 64)
        where += ", near " + readable(symbol.name) + " of " + std::to_string(symbol.size) + " bytes at " +
                 std::to_string(symbol.address - kSharedStart);
    }
    if (c.launch->dynamic_shared > 0)
      where += "; dynamic shared memory has " + std::to_string(c.launch->dynamic_shared) + " bytes at " +
               std::to_string(c.program->static_shared);
  } else {
    where = "offset " + hex(access.address[lane]);
  }
  fault(c, "out of bounds", what(access) + " at " + where, lane);
}

// The bounds of all lanes at once, then one by one where they are not all in one piece.
struct Bounds {
  uint64_t low = UINT64_MAX, high = 0, bits = 0;
};
Bounds bounds_of(const Access& access) {
  Bounds b;
  if (access.mask == kAllLanes) {
    for (int l = 0; l < kLanes; ++l) {
      b.low = std::min(b.low, access.address[l]);
      b.high = std::max(b.high, access.address[l]);
      b.bits |= access.address[l];
    }
  } else {
    each_lane(access.mask, [&](int l) {
      b.low = std::min(b.low, access.address[l]);
      b.high = std::max(b.high, access.address[l]);
      b.bits |= access.address[l];
    });
  }
  b.high += access.size();
  return b;
}

void locate_global(const Context& c, Access& access, const Bounds& b) {
  GlobalMemory& memory = c.launch->engine->memory;
  Region*& last = c.launch->site[c.pc];
  if (last == nullptr || !last->holds(b.low, b.high) || (access.is_write && !last->is_writable)) {
    last = memory.find(b.low, b.high, access.is_write);
  }
  access.region = last;
  if (last == nullptr) {
    each_lane(access.mask, [&](int l) {
      const Region* own = memory.find(access.address[l], access.address[l] + access.size(), access.is_write);
      if (own == nullptr) out_of_bounds(c, access, l);
      if (access.is_write && !own->is_writable)
        fault(c, "write to an input", what(access) + " at " + memory.describe(access.address[l]), l);
    });
  } else if (access.is_write && !last->is_writable) {
    const int l = __builtin_ctz(access.mask);
    fault(c, "write to an input", what(access) + " at " + memory.describe(access.address[l]), l);
  }
  for (int l = 0; l < kLanes; ++l) access.at[l] = reinterpret_cast<uint8_t*>(access.address[l]);
}

// The part of an access that lies in one region.
template <class F>
void each_region(const Context& c, const Access& access, const F& body) {
  if (access.region != nullptr) {
    body(*access.region, access.mask);
    return;
  }
  for (uint32_t left = access.mask; left != 0;) {
    const int first = __builtin_ctz(left);
    Region* region =
        c.launch->engine->memory.find(access.address[first], access.address[first] + access.size(), access.is_write);
    uint32_t mask = 0;
    each_lane(left, [&](int l) {
      if (region->holds(access.address[l], access.address[l] + access.size())) mask |= 1u << l;
    });
    body(*region, mask);
    left &= ~mask;
  }
}

uint16_t thread_of(const Context& c, int lane) { return static_cast<uint16_t>(c.warp->index * kLanes + lane); }
bool is_strong(const Access& access) { return access.order != Order::kWeak; }

// Whether the thread may rely on an access of `other` of its own block at `time`.
bool knows(const Context& c, int lane, uint16_t other, uint32_t time) {
  if (time <= c.block->order.last_full) return true;
  const int warp = other / kLanes;
  if (warp == c.warp->index) return c.warp->order.lane_knows(lane, other % kLanes, time);
  return c.warp->order.knows_warp(warp, time);
}

bool knows_access(const Context& c, int lane, uint32_t block, uint16_t thread, uint32_t time) {
  if (block == c.block->index) return knows(c, lane, thread, time);
  return c.block->order.covers(thread_of(c, lane), block, thread, time);
}

std::string other_thread(const Context& c, uint32_t block, uint16_t thread) {
  std::string text = describe_thread(c, thread);
  if (block != c.block->index) text += " of block " + std::to_string(block);
  return text;
}

[[noreturn]] void race(const Context& c, const Access& access, int lane, const char* before, uint32_t block,
                       uint16_t thread) {
  const std::string where = access.space == Space::kShared
                                ? "offset " + std::to_string(access.address[lane] - kSharedStart)
                                : c.launch->engine->memory.describe(access.address[lane]);
  fault(c, access.space == Space::kShared ? "shared memory race" : "global memory race",
        what(access) + " at " + where + " is not ordered after the " + before + " of " + other_thread(c, block, thread),
        lane);
}

// Whether two lanes of one store write the same bytes.
bool same_values(const Context& c, const Instr& instr, int lane, int other) {
  for (const Operand& value : instr.list) {
    if (lane_value(c, value, lane) != lane_value(c, value, other)) return false;
  }
  return !instr.list.empty();
}

void note_read(const Context& c, Cell& cell, int lane, uint32_t now, bool strong) {
  const uint16_t me = thread_of(c, lane);
  const bool is_mine = cell.read_block == c.block->index;
  const bool was_read = cell.read_time != 0;
  const bool is_fresh =
      was_read && (!is_mine || (cell.flags & kManyBlocks) != 0 || cell.read_time > c.block->order.last_full);
  if (!is_fresh) {
    cell.flags &= ~(kManyLanes | kManyWarps | kManyBlocks);
    cell.flags |= kReadStrong;
  } else if (!is_mine) {
    cell.flags |= kManyBlocks;
  } else if ((cell.read_thread ^ me) >= kLanes) {
    cell.flags |= kManyWarps;
  } else if (cell.read_thread != me) {
    if ((cell.flags & (kManyWarps | kManyBlocks)) == 0 && cell.read_time <= c.warp->order.last_sync) {
      cell.flags &= ~kManyLanes;  // the others are ordered before whatever the warp does now
    } else {
      cell.flags |= kManyLanes;
    }
  }
  if (!strong) cell.flags &= ~kReadStrong;
  cell.read_time = now;
  cell.read_thread = me;
  cell.read_block = c.block->index;
}

void check_after_write(const Context& c, const Access& access, const Cell& cell, int lane) {
  if (cell.write_time == 0) return;
  if (cell.write_block == c.block->index && cell.write_thread == thread_of(c, lane)) return;
  if (is_strong(access) && (cell.flags & kWriteStrong) != 0) return;
  if (!knows_access(c, lane, cell.write_block, cell.write_thread, cell.write_time))
    race(c, access, lane, "write", cell.write_block, cell.write_thread);
}

void check_after_reads(const Context& c, const Access& access, const Cell& cell, int lane) {
  if (cell.read_time == 0) return;
  if (is_strong(access) && (cell.flags & kReadStrong) != 0) return;
  const bool is_mine = cell.read_block == c.block->index;
  if ((cell.flags & kManyBlocks) != 0) {
    // Readers of several blocks: some other block's is among them, and nothing was handed over.
    if (!c.launch->strong.is_used) race(c, access, lane, "read", cell.read_block, cell.read_thread);
    if (knows_access(c, lane, cell.read_block, cell.read_thread, cell.read_time)) return;
    race(c, access, lane, "read", cell.read_block, cell.read_thread);
  }
  if (is_mine && cell.read_time <= c.block->order.last_full) return;
  if ((cell.flags & kManyWarps) != 0 && is_mine && !c.block->order.has_partial_barriers)
    race(c, access, lane, "read", cell.read_block, cell.read_thread);
  const bool is_my_warp = is_mine && cell.read_thread / kLanes == c.warp->index;
  if ((cell.flags & kManyLanes) != 0 && is_my_warp && cell.read_time > c.warp->order.last_sync &&
      c.warp->order.lane_known.empty())
    race(c, access, lane, "read", cell.read_block, cell.read_thread);
  if (!knows_access(c, lane, cell.read_block, cell.read_thread, cell.read_time))
    race(c, access, lane, "read", cell.read_block, cell.read_thread);
}

// The lanes of one store may write one place if they write the same value.
bool same_store(const Context& c, const Instr& instr, const Access& access, const Cell& cell, int lane, uint32_t now) {
  if (cell.write_time != now || cell.write_block != c.block->index || cell.write_thread / kLanes != c.warp->index)
    return false;
  const int other = cell.write_thread % kLanes;
  return other < lane && (access.mask >> other & 1) && access.address[other] == access.address[lane] &&
         same_values(c, instr, lane, other);
}

void note_write(const Context& c, const Instr* instr, const Access& access, Cell& cell, int lane, uint32_t now) {
  const uint16_t me = thread_of(c, lane);
  if ((cell.flags & kInFlight) != 0)
    fault(c, "asynchronous copy", what(access) + " that an asynchronous copy is still filling", lane);
  const bool is_own = cell.write_block == c.block->index && cell.write_thread == me;
  if (cell.write_time != 0 && !is_own && (instr == nullptr || !same_store(c, *instr, access, cell, lane, now)))
    check_after_write(c, access, cell, lane);
  check_after_reads(c, access, cell, lane);
  cell.write_time = now;
  cell.write_thread = me;
  cell.write_block = c.block->index;
  cell.read_time = 0;
  cell.flags = kDefined | (is_strong(access) ? uint32_t{kWriteStrong} : 0u);
}

Shadow& shadow_of(const Context& c, const Access& access, Region& region) {
  if (access.space == Space::kShared) return c.block->shared_shadow;
  if (region.launch != c.launch->id) {
    region.launch = c.launch->id;
    region.shadow.forget_times();
  }
  return region.shadow;
}

void read_cells(const Context& c, Access& access, Shadow& shadow, uint32_t mask, uint32_t* undefined) {
  const uint32_t now = c.block->order.clock;
  const uint32_t full = c.block->order.last_full;
  const bool strong = is_strong(access);
  const bool is_shared = access.space == Space::kShared;
  shadow.refine(access.bytes);
  for (uint32_t e = 0; e < access.count; ++e) {
    uint32_t missing = 0;
    each_lane(mask, [&](int l) {
      int count = 0;
      Cell* cell = shadow.at(access.address[l] + e * access.bytes, access.bytes, &count);
      for (int i = 0; i < count; ++i, ++cell) {
        if ((cell->flags & (kDefined | kInFlight)) != kDefined) {
          if ((cell->flags & kInFlight) != 0)
            fault(c, "asynchronous copy", what(access) + " that an asynchronous copy is still filling", l);
          missing |= 1u << l;
        }
        if (!(is_shared && cell->write_time <= full)) check_after_write(c, access, *cell, l);
        note_read(c, *cell, l, now, strong);
      }
    });
    undefined[e] |= missing;
  }
}

void write_cells(const Context& c, const Instr* instr, Access& access, Shadow& shadow, uint32_t mask) {
  const uint32_t now = c.block->order.clock;
  const uint16_t first_thread = thread_of(c, 0);
  const uint32_t size = access.size();
  shadow.refine(access.bytes);
  each_lane(mask, [&](int l) {
    int count = 0;
    Cell* cell = shadow.at(access.address[l], size, &count);
    for (int i = 0; i < count; ++i, ++cell) {
      if (cell->write_time == 0 && cell->read_time == 0 && (cell->flags & kInFlight) == 0) {  // first touch
        cell->write_time = now;
        cell->write_thread = static_cast<uint16_t>(first_thread + l);
        cell->write_block = c.block->index;
        cell->flags = kDefined | (is_strong(access) ? uint32_t{kWriteStrong} : 0u);
      } else {
        note_write(c, instr, access, *cell, l, now);
      }
    }
  });
}

void count(const Context& c, const Access& access) {
  if (!c.launch->engine->options.counts) return;
  Counters& counters = c.launch->counters;
  if (access.space == Space::kShared) {
    count_phases(access.address, access.mask, access.size(), counters);
  } else if (access.space == Space::kGlobal) {
    const uint64_t sectors = static_cast<uint64_t>(count_sectors(access.address, access.mask, access.size()));
    const uint64_t bytes = static_cast<uint64_t>(__builtin_popcount(access.mask)) * access.size();
    (access.is_write ? counters.global_store_requests : counters.global_load_requests) += 1;
    (access.is_write ? counters.global_store_sectors : counters.global_load_sectors) += sectors;
    (access.is_write ? counters.global_store_bytes : counters.global_load_bytes) += bytes;
  }
}

}  // namespace

Space space_of(uint64_t address) {
  if (address - kSharedWindow < kWindowSize) return Space::kShared;
  if (address - kLocalWindow < kWindowSize) return Space::kLocal;
  if (address - kParamWindow < kWindowSize) return Space::kParam;
  return Space::kGlobal;
}

void read_addresses(const Context& c, Operand base, int64_t offset, uint32_t mask, Access& access) {
  access.mask = mask;
  if (const uint32_t bad = undefined_lanes(c, base) & mask)
    fault(c, "undefined value", "the address of an access of memory is undefined", __builtin_ctz(bad));
  if (base.bytes == 4) {
    const uint32_t* from = source<uint32_t>(c, base);
    for (int l = 0; l < kLanes; ++l) access.address[l] = from[l] + static_cast<uint32_t>(offset);
  } else {
    const uint64_t* from = source<uint64_t>(c, base);
    for (int l = 0; l < kLanes; ++l) access.address[l] = from[l] + static_cast<uint64_t>(offset);
  }
}

void locate(const Context& c, Access& access) {
  const Bounds b = bounds_of(access);
  const uint32_t size = access.size();
  if ((b.bits & (size - 1)) != 0) {
    each_lane(access.mask, [&](int l) {
      if (access.address[l] % size != 0)
        fault(c, "misaligned", what(access) + " at " + hex(access.address[l]) + ", which is no multiple of it", l);
    });
  }
  switch (access.space) {
    case Space::kShared: {
      // A generic address may point one window up; offsets wrap at 32 bits.
      const auto holds = [&](uint64_t low, uint64_t high) {
        for (const Range& range : c.launch->shared_ranges) {
          if (low >= range.low && high <= range.high) return true;
        }
        return false;
      };
      if (!holds(b.low, b.high)) {
        each_lane(access.mask, [&](int l) {
          if (!holds(access.address[l], access.address[l] + size)) out_of_bounds(c, access, l);
        });
      }
      for (int l = 0; l < kLanes; ++l) access.at[l] = c.block->shared + access.address[l];
      break;
    }
    case Space::kLocal:
      each_lane(access.mask, [&](int l) {
        const uint64_t at = access.address[l];
        if (at + size > c.program->local_bytes) out_of_bounds(c, access, l);
        access.at[l] = c.warp->local.data() + static_cast<size_t>(l) * c.program->local_bytes + at;
      });
      break;
    case Space::kParam:
      each_lane(access.mask, [&](int l) {
        if (access.is_write || access.address[l] + size > c.launch->params.size()) out_of_bounds(c, access, l);
        access.at[l] = c.launch->params.data() + access.address[l];
      });
      break;
    default: locate_global(c, access, b);
  }
  count(c, access);
}

void track_read(const Context& c, Access& access, uint32_t* undefined) {
  switch (access.space) {
    case Space::kShared: {
      read_cells(c, access, c.block->shared_shadow, access.mask, undefined);
      return;
    }
    case Space::kLocal:
      for (uint32_t e = 0; e < access.count; ++e) {
        each_lane(access.mask, [&](int l) {
          const uint8_t* defined = c.warp->local_defined.data() + (access.at[l] - c.warp->local.data());
          for (uint32_t b = 0; b < access.bytes; ++b) {
            if (!defined[e * access.bytes + b]) undefined[e] |= 1u << l;
          }
        });
      }
      return;
    case Space::kParam: return;
    default:
      each_region(c, access, [&](Region& region, uint32_t mask) {
        if (region.shadow.is_empty()) return;
        read_cells(c, access, shadow_of(c, access, region), mask, undefined);
      });
      if (is_strong(access)) take_order(c, access);
  }
}

void track_write(const Context& c, const Instr& instr, Access& access) {
  switch (access.space) {
    case Space::kShared: {
      write_cells(c, &instr, access, c.block->shared_shadow, access.mask);
      return;
    }
    case Space::kLocal: return;  // the store itself marks what is defined
    default:
      if (is_strong(access)) publish_order(c, access, false);
      each_region(c, access, [&](Region& region, uint32_t mask) {
        write_cells(c, &instr, access, shadow_of(c, access, region), mask);
      });
  }
}

void track_atomic(const Context& c, const Instr& instr, Access& access) {
  (void)instr;
  const auto both = [&](Shadow& shadow, uint32_t mask) {
    uint32_t undefined[4] = {};
    read_cells(c, access, shadow, mask, undefined);
    if (undefined[0] != 0)
      fault(c, "undefined value", "an atomic changes memory that was never written", __builtin_ctz(undefined[0]));
    const uint32_t now = c.block->order.clock;
    each_lane(mask, [&](int l) {
      int count = 0;
      Cell* cell = shadow.at(access.address[l], access.size(), &count);
      for (int i = 0; i < count; ++i, ++cell) note_write(c, nullptr, access, *cell, l, now);
    });
  };
  if (access.space == Space::kShared) {
    both(c.block->shared_shadow, access.mask);
    return;
  }
  take_order(c, access);
  publish_order(c, access, true);
  each_region(c, access, [&](Region& region, uint32_t mask) { both(shadow_of(c, access, region), mask); });
}

void start_async(const Context& c, uint64_t offset, uint32_t bytes, int lane) {
  Access access;
  access.space = Space::kShared;
  access.bytes = bytes;
  access.is_write = true;
  access.address[lane] = offset;
  int count = 0;
  Cell* cell = c.block->shared_shadow.at(offset, bytes, &count);
  for (int i = 0; i < count; ++i, ++cell) {
    note_write(c, nullptr, access, *cell, lane, c.block->order.clock);
    cell->flags |= kInFlight;
  }
}

void finish_async(const Context& c, uint64_t offset, uint32_t bytes, int lane, bool is_defined) {
  int count = 0;
  Cell* cell = c.block->shared_shadow.at(offset, bytes, &count);
  for (int i = 0; i < count; ++i, ++cell) {
    cell->write_time = c.block->order.clock;
    cell->write_thread = thread_of(c, lane);
    cell->flags = is_defined ? uint32_t{kDefined} : 0u;
  }
}

void take_order(const Context& c, const Access& access) {
  if (c.launch->strong.at.empty()) return;
  const bool acquires = access.order == Order::kAcquire || access.order == Order::kAcquireRelease;
  each_lane(access.mask, [&](int l) {
    const auto found = c.launch->strong.at.find(access.address[l]);
    if (found == c.launch->strong.at.end()) return;
    auto knowledge = std::make_shared<Knowledge>();
    knowledge->parts.emplace_back(found->second, static_cast<uint32_t>(found->second->entries.size()));
    c.block->order.take(thread_of(c, l), knowledge, acquires);
  });
}

void publish_order(const Context& c, const Access& access, bool is_update) {
  const bool releases = access.order == Order::kRelease || access.order == Order::kAcquireRelease;
  StrongLocations& strong = c.launch->strong;
  each_lane(access.mask, [&](int l) {
    if (releases) c.block->order.fence(thread_of(c, l));
    Published entry{};
    const bool publishes = c.block->order.publishes(c.block->index, thread_of(c, l), entry);
    if (!publishes && strong.at.empty()) return;
    std::shared_ptr<PublishedLog>& log = strong.at[access.address[l]];
    if (log == nullptr || !is_update) log = std::make_shared<PublishedLog>();
    if (!publishes) return;
    strong.is_used = true;
    log->add(entry);
  });
}

}  // namespace ptxvm
