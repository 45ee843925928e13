// What the lanes of a warp do together: shuffles, votes, matches, reductions, barriers of a warp. The scheduler calls
// these with exactly the lanes that the member mask names.
#include <cstring>

#include "engine/decoder.h"
#include "engine/machine.h"

namespace ptxvm {
namespace {

enum Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };

void shuffle(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const uint32_t* b = source<uint32_t>(c, in.b);
  const uint32_t* clamp = source<uint32_t>(c, in.list[0]);
  const uint32_t undefined = undefined_lanes(c, in.a);
  uint32_t missing = (undefined_lanes(c, in.b) | undefined_lanes(c, in.list[0])) & mask;
  uint32_t in_range = 0;
  uint32_t result[kLanes];
  if (in.mode == kButterfly && mask == kAllLanes && in.flag && missing == 0) {  // the same distance in all lanes
    const int distance = static_cast<int>(b[0] & 31);
    for (int l = 0; l < kLanes; ++l) result[l] = a[l ^ distance];
    uint32_t moved = undefined;
    if (undefined != 0) {
      moved = 0;
      for (int l = 0; l < kLanes; ++l) moved |= (undefined >> (l ^ distance) & 1u) << l;
    }
    std::memcpy(destination<uint32_t>(c, in.d), result, sizeof result);
    set_undefined(c, in.d, moved, mask);
    if (in.list.size() > 1) {
      set_predicate(c, in.list[1], kAllLanes, mask);
      set_undefined(c, in.list[1], 0, mask);
    }
    return;
  }
  each_lane(mask, [&](int l) {
    const int lane_bits = static_cast<int>(b[l] & 31), segment = static_cast<int>(clamp[l] >> 8 & 31);
    const int last = (l & segment) | (static_cast<int>(clamp[l] & 31) & ~segment);
    int from = 0;
    bool ok = false;
    switch (in.mode) {
      case kUp:
        from = l - lane_bits;
        ok = from >= last;
        break;
      case kDown:
        from = l + lane_bits;
        ok = from <= last;
        break;
      case kButterfly:
        from = l ^ lane_bits;
        ok = from <= last;
        break;
      default:
        from = (l & segment) | (lane_bits & ~segment);
        ok = from <= last;
        break;
    }
    if (!ok) from = l;
    if (ok) in_range |= 1u << l;
    if (!(mask >> from & 1) || (undefined >> from & 1)) missing |= 1u << l;
    result[l] = a[from];
  });
  uint32_t* d = destination<uint32_t>(c, in.d);
  each_lane(mask, [&](int l) { d[l] = result[l]; });
  set_undefined(c, in.d, missing, mask);
  if (in.list.size() > 1) {
    set_predicate(c, in.list[1], in_range, mask);
    set_undefined(c, in.list[1], 0, mask);
  }
}

enum Vote : uint8_t { kAll, kAny, kUniform, kBallot };

void vote(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t holds = (in.flag ? (in.imm != 0 ? kAllLanes : 0u) : predicate_lanes(c, in.a)) & mask;
  const uint32_t undefined = in.flag ? 0 : (undefined_lanes(c, in.a) & mask) != 0 ? kAllLanes : 0u;
  if (in.mode == kBallot) {
    uint32_t* d = destination<uint32_t>(c, in.d);
    each_lane(mask, [&](int l) { d[l] = holds; });
  } else {
    const bool yes = in.mode == kAll ? holds == mask : in.mode == kAny ? holds != 0 : holds == mask || holds == 0;
    set_predicate(c, in.d, yes ? kAllLanes : 0, mask);
  }
  set_undefined(c, in.d, undefined, mask);
}

// match.any and (flag) match.all, of 32 or 64 bits.
void match(Context& c, const Instr& in, uint32_t mask) {
  const bool undefined = (undefined_lanes(c, in.a) & mask) != 0;
  uint32_t peers[kLanes];
  each_lane(mask, [&](int l) {
    peers[l] = 0;
    each_lane(mask, [&](int other) {
      if (lane_value(c, in.a, l) == lane_value(c, in.a, other)) peers[l] |= 1u << other;
    });
  });
  const bool all = peers[__builtin_ctz(mask)] == mask;
  uint32_t* d = destination<uint32_t>(c, in.d);
  each_lane(mask, [&](int l) { d[l] = in.flag ? (all ? mask : 0) : peers[l]; });
  set_undefined(c, in.d, undefined ? kAllLanes : 0, mask);
  if (!in.list.empty()) {
    set_predicate(c, in.list[0], all ? kAllLanes : 0, mask);
    set_undefined(c, in.list[0], undefined ? kAllLanes : 0, mask);
  }
}

enum Reduce : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor };

void reduce(Context& c, const Instr& in, uint32_t mask) {
  const uint32_t* a = source<uint32_t>(c, in.a);
  const bool undefined = (undefined_lanes(c, in.a) & mask) != 0;
  uint32_t r = a[__builtin_ctz(mask)];
  each_lane(mask & (mask - 1), [&](int l) {
    const uint32_t x = a[l];
    const bool less = in.flag ? static_cast<int32_t>(x) < static_cast<int32_t>(r) : x < r;
    switch (in.mode) {
      case kAdd: r += x; break;
      case kMin: r = less ? x : r; break;
      case kMax: r = less ? r : x; break;
      case kAnd: r &= x; break;
      case kOr: r |= x; break;
      default: r ^= x; break;
    }
  });
  uint32_t* d = destination<uint32_t>(c, in.d);
  each_lane(mask, [&](int l) { d[l] = r; });
  set_undefined(c, in.d, undefined ? kAllLanes : 0, mask);
}

void sync_warp(Context& c, const Instr&, uint32_t mask) {
  c.block->order.meet_lanes(c.warp->order, mask, c.warp->live);
}

void active_mask(Context& c, const Instr& in, uint32_t mask) {
  uint32_t* d = destination<uint32_t>(c, in.d);
  each_lane(mask, [&](int l) { d[l] = mask; });
  set_undefined(c, in.d, 0, mask);
}

int index_of(const Decoder& d, const char* const* names, int count) {
  for (int i = 0; i < count; ++i) {
    if (d.has(names[i])) return i;
  }
  d.fail("not implemented");
}

bool decode_shuffle(Decoder& d, Instr& in) {
  static const char* const kModes[] = {"up", "down", "bfly", "idx"};
  in.mode = static_cast<uint8_t>(index_of(d, kModes, 4));
  const std::vector<std::string_view> results = split(d.text(0), '|');
  const Type word{'b', 4, false};
  in.d = d.destination(results[0]);
  in.a = d.source(1, word);
  in.b = d.source(2, word);
  in.list.push_back(d.source(3, word));
  if (results.size() > 1) in.list.push_back(d.predicate(results[1]));
  in.c = d.source(4, word);
  // Distance and clamp are immediates, and the clamp keeps to the whole warp.
  in.flag = (in.b.offset & kConstant) != 0 && d.text(3) == "31";
  in.run = shuffle;
  return true;
}

}  // namespace

bool decode_collective(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  const Type word{'b', 4, false};
  in.cls = Class::kCollective;
  if (op == "activemask") {
    in.d = d.destination(0);
    in.run = active_mask;
    return true;
  }
  const bool is_warp_barrier = op == "bar" && d.has("warp");
  if (op != "shfl" && op != "vote" && op != "match" && op != "redux" && !is_warp_barrier) return false;
  if (!d.has("sync")) d.fail("a collective without .sync does not exist on these architectures");
  in.kind = Kind::kCollective;
  if (is_warp_barrier) {
    in.cls = Class::kBarrier;
    in.c = d.source(0, word);
    in.run = sync_warp;
    return true;
  }
  if (op == "shfl") return decode_shuffle(d, in);
  if (op == "vote") {
    static const char* const kModes[] = {"all", "any", "uni", "ballot"};
    in.mode = static_cast<uint8_t>(index_of(d, kModes, 4));
    in.d = in.mode == kBallot ? d.destination(0) : d.predicate(d.text(0));
    in.flag = parse_integer(d.text(1), in.imm);
    if (!in.flag) in.a = d.predicate(d.text(1));
    in.c = d.source(2, word);
    in.run = vote;
    return true;
  }
  if (op == "match") {
    const std::vector<std::string_view> results = split(d.text(0), '|');
    in.flag = d.has("all");
    in.d = d.destination(results[0]);
    if (results.size() > 1) in.list.push_back(d.predicate(results[1]));
    in.a = d.source(1, d.type());
    in.c = d.source(2, word);
    in.run = match;
    return true;
  }
  static const char* const kOps[] = {"add", "min", "max", "and", "or", "xor"};
  if (d.type().kind == 'f') d.fail("not implemented");
  in.mode = static_cast<uint8_t>(index_of(d, kOps, 6));
  in.flag = d.type().kind == 's';
  in.d = d.destination(0);
  in.a = d.source(1, word);
  in.c = d.source(2, word);
  in.run = reduce;
  return true;
}

}  // namespace ptxvm
