// cp.async: copies from global to shared memory that are under way until their thread has waited for them. The bytes
// move when the copy is issued or when it is waited for, as the seed says: both are what hardware may do.
#include <cstring>

#include "engine/access.h"
#include "engine/decoder.h"
#include "engine/machine.h"

namespace ptxvm {
namespace {

void move_bytes(const Context& c, AsyncCopy& copy) {
  uint8_t* to = c.block->shared + copy.to;
  std::memcpy(to, reinterpret_cast<const uint8_t*>(copy.from), copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.is_done = true;
}

// bytes: of the copy; c: bytes taken from the source, the rest becomes zero; flag: c is given.
void copy(Context& c, const Instr& in, uint32_t mask) {
  Access target;
  target.bytes = 4;
  target.count = in.bytes / 4u;
  target.is_write = true;
  target.space = Space::kShared;
  read_addresses(c, in.a, in.imm, mask, target);
  locate(c, target);
  c.block->shared_shadow.refine(4);
  uint32_t whole = 0, some = 0;
  if (in.flag && (undefined_lanes(c, in.c) & mask) != 0)
    fault(c, "undefined value", "the number of bytes that cp.async takes is undefined");
  each_lane(mask, [&](int l) {
    const uint64_t bytes = in.flag ? lane_value(c, in.c, l) : in.bytes;
    if (bytes > in.bytes) fault(c, "asynchronous copy", "takes more bytes than it writes", l);
    if (bytes == in.bytes) whole |= 1u << l;
    if (bytes > 0 && bytes < in.bytes) some |= 1u << l;
  });
  Access from;
  from.bytes = 4;
  from.count = in.bytes / 4u;
  read_addresses(c, in.b, in.offset, mask, from);
  uint32_t undefined[4] = {};
  if (whole != 0) {
    from.mask = whole;
    from.space = Space::kGlobal;
    locate(c, from);
    track_read(c, from, undefined);
  }
  each_lane(some, [&](int l) {  // less than the whole
    Access part;
    part.bytes = 1;
    part.mask = 1u << l;
    part.space = Space::kGlobal;
    const uint64_t bytes = lane_value(c, in.c, l);
    for (uint64_t b = 0; b < bytes; ++b) {
      part.address[l] = from.address[l] + b;
      locate(c, part);
      uint32_t one[4] = {};
      track_read(c, part, one);
      undefined[b / 4] |= one[0];
    }
  });
  if (c.warp->async == nullptr) c.warp->async = std::make_unique<AsyncState>();
  AsyncState& state = *c.warp->async;
  each_lane(mask, [&](int l) {
    const uint32_t source_bytes = (whole >> l & 1)  ? in.bytes
                                  : (some >> l & 1) ? static_cast<uint32_t>(lane_value(c, in.c, l))
                                                    : 0;
    AsyncCopy made{target.address[l],
                   from.address[l],
                   in.bytes,
                   source_bytes,
                   state.committed[static_cast<size_t>(l)],
                   c.pc,
                   false,
                   0};
    for (uint32_t e = 0; e < target.count; ++e) made.undefined |= (undefined[e] >> l & 1u) << e;
    start_async(c, made.to, made.bytes, l);
    if (c.launch->copies_early) move_bytes(c, made);
    state.copies[static_cast<size_t>(l)].push_back(made);
  });
}

void commit(Context& c, const Instr&, uint32_t mask) {
  if (c.warp->async == nullptr) c.warp->async = std::make_unique<AsyncState>();
  each_lane(mask, [&](int l) { ++c.warp->async->committed[static_cast<size_t>(l)]; });
}

// imm: groups that may stay under way; flag: also wait for copies that were never committed.
void wait(Context& c, const Instr& in, uint32_t mask) {
  if (c.warp->async == nullptr) return;
  AsyncState& state = *c.warp->async;
  each_lane(mask, [&](int l) {
    auto& copies = state.copies[static_cast<size_t>(l)];
    const uint32_t committed = state.committed[static_cast<size_t>(l)];
    const uint32_t limit = in.flag                                     ? UINT32_MAX
                           : committed > static_cast<uint64_t>(in.imm) ? committed - static_cast<uint32_t>(in.imm)
                                                                       : 0;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < limit; ++done) {
      AsyncCopy& one = copies[done];
      if (!one.is_done) move_bytes(c, one);
      for (uint32_t e = 0; e < one.bytes / 4; ++e) finish_async(c, one.to + 4 * e, 4, l, (one.undefined >> e & 1) == 0);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<long>(done));
  });
}

}  // namespace

bool decode_async(Decoder& d, Instr& in) {
  if (d.parts[0] != "cp" || !d.has("async")) return false;
  in.cls = Class::kAsyncCopy;
  if (d.has("commit_group")) {
    in.run = commit;
    return true;
  }
  if (d.has("wait_all") || d.has("wait_group")) {
    in.flag = d.has("wait_all");
    if (!in.flag && !parse_integer(d.text(0), in.imm)) d.fail("the number of groups");
    in.run = wait;
    return true;
  }
  if (d.has("bulk") || d.has("mbarrier") || !(d.has("ca") || d.has("cg"))) d.fail("not implemented");
  Instr from;
  d.address(d.text(1), from);
  d.address(d.text(0), in);
  in.b = from.a;
  in.offset = from.imm;
  int64_t bytes = 0;
  if (!parse_integer(d.text(2), bytes)) d.fail("the size");
  in.bytes = static_cast<uint8_t>(bytes);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || (d.has("cg") && bytes != 16)) d.fail("this size");
  // A cache policy may follow, as the last operand, in a 64-bit register.
  size_t count = d.num_operands();
  if (d.has("L2::cache_hint")) --count;
  if (count > 3) {
    in.c = d.source(3, {'u', 4, false});
    in.flag = true;
  }
  in.run = copy;
  return true;
}

}  // namespace ptxvm
