// plan_dispatch on the CPU: a stable counting sort over fixed tiles of slots.
//
//   count    each tile counts its slots per expert and looks for an id out of range, the only validation: dense ids by
//            count_bins, which compares whole vectors of them beside its counting
//   drop     only if some expert is asked for more often than its capacity: its slots are gathered, cut into scopes,
//            and everything past the capacity-th best slot of a scope is marked and taken off the counts
//   scan     rows of every expert, then the first row of every (tile, expert)
//   place    each tile walks its slots once more and hands out rows
// Tiles are independent in `count` and `place`, experts in `drop`; integers only, so the number of threads cannot show.
// Up to kTileSlots slots there is one tile and no thread is woken. Nothing is sized by the number of scopes: slots
// bound the (scope, expert) pairs that exist. Bytes: ids twice, both maps once, 8 E a tile.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/count_bins.h"
#include "cpu/keep_order.h"
#include "ops/plan_dispatch.h"

namespace fastmoe_route {
namespace {

constexpr int64_t kTileSlots = 16384;
constexpr int64_t kMaxTiles = 256;
constexpr int64_t kFillGrain = int64_t{1} << 18;

// A slot of an expert that is asked for too often. Smaller keys are kept first.
struct Candidate {
  uint64_t key;
  int32_t scope;
  int32_t slot;
};

// Expert ids where they lie. A bin is id + 1 as an unsigned number: 0 is none, 1 .. E are experts, E + 1 is the
// unrouted sentinel, and every other id, negative ones included, is larger.
template <class Id>
struct Slots {
  using Bin = std::make_unsigned_t<Id>;
  const Id* ids;
  int64_t stride_token;
  int64_t stride_slot;
  int64_t top_k;

  explicit Slots(const PlanArgs& args)
      : ids(static_cast<const Id*>(args.experts)), stride_token(args.experts_stride_token),
        stride_slot(args.experts_stride_slot), top_k(args.top_k) {}

  bool is_dense() const { return stride_slot == 1 && stride_token == top_k; }

  // visit(slot, bin) for slots begin .. end - 1 in order.
  template <class F>
  void each(int64_t begin, int64_t end, F&& visit) const {
    if (begin >= end) return;
    if (is_dense()) {
      for (int64_t slot = begin; slot < end; ++slot) visit(slot, static_cast<Bin>(static_cast<Bin>(ids[slot]) + 1));
      return;
    }
    int64_t slot = begin;
    int64_t j = begin % top_k;
    for (int64_t token = begin / top_k; slot < end; ++token, j = 0) {
      const Id* row = ids + token * stride_token;
      for (; j < top_k && slot < end; ++j, ++slot) {
        visit(slot, static_cast<Bin>(static_cast<Bin>(row[j * stride_slot]) + 1));
      }
    }
  }
};

// The working arrays of one call, in the calling thread's scratch.
struct Work {
  int64_t num_slots;
  int64_t num_tiles;
  int64_t tile_slots;
  int64_t bins;                         // E + 2
  int32_t* counts;                      // [tiles, E + 2] slots of the tile per bin
  int32_t* cursors;                     // [tiles, E + 2] next row of the tile per bin
  int32_t* first;                       // [E + 1] where each expert's candidates start
  uint8_t* bad_tiles;                   // [tiles]
  const uint8_t* is_dropped = nullptr;  // [S], or null if nothing is

  explicit Work(const PlanArgs& args) : num_slots(args.num_tokens * args.top_k), bins(args.num_experts + 2) {
    tile_slots = std::max({kTileSlots, bins, (num_slots + kMaxTiles - 1) / kMaxTiles});
    num_tiles = std::max<int64_t>(1, (num_slots + tile_slots - 1) / tile_slots);
    counts = static_cast<int32_t*>(scratch(Scratch::kPlan, (2 * num_tiles + 1) * bins * sizeof(int32_t) + num_tiles));
    cursors = counts + num_tiles * bins;
    first = cursors + num_tiles * bins;
    bad_tiles = reinterpret_cast<uint8_t*>(first + bins);
  }
  int64_t begin(int64_t tile) const { return tile * tile_slots; }
  int64_t end(int64_t tile) const { return std::min(num_slots, (tile + 1) * tile_slots); }
};

// Adds slots begin .. end - 1 to the counts, or returns false: an id is outside [-1, last_id].
template <class Id>
bool count_slots(const Slots<Id>& slots, int64_t begin, int64_t end, int64_t last_id, int32_t* counts) {
  using Bin = typename Slots<Id>::Bin;
  if (slots.is_dense()) {
    bool are_valid = true;
    cpu::count_bins({slots.ids + begin, sizeof(Id) == sizeof(int64_t), end - begin, last_id, counts, &are_valid});
    return are_valid;
  }
  const Bin last_bin = static_cast<Bin>(last_id + 1);
  bool is_bad = false;
  slots.each(begin, end, [&](int64_t, Bin bin) {
    is_bad |= bin > last_bin;
    ++counts[bin > last_bin ? 0 : bin];
  });
  return !is_bad;
}

template <class Id>
PlanStatus count(const PlanArgs& args, const Work& work) {
  const Slots<Id> slots(args);
  using Bin = typename Slots<Id>::Bin;
  const int64_t last_id = args.allow_unrouted ? args.num_experts : args.num_experts - 1;
  parallel_for(work.num_tiles, 1, [&](int64_t first_tile, int64_t last_tile) {
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      int32_t* counts = work.counts + tile * work.bins;
      std::memset(counts, 0, work.bins * sizeof(int32_t));
      work.bad_tiles[tile] = !count_slots(slots, work.begin(tile), work.end(tile), last_id, counts);
    }
  });
  for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
    if (!work.bad_tiles[tile]) continue;
    PlanStatus status;
    slots.each(work.begin(tile), work.end(tile), [&](int64_t slot, Bin bin) {
      if (bin <= static_cast<Bin>(last_id + 1) || status.kind != PlanStatus::kOk) return;
      status = {PlanStatus::kBadExpert, static_cast<int64_t>(static_cast<Id>(bin - 1)), slot};
    });
    return status;
  }
  return {};
}

// result[e] = slots of expert e over all tiles.
void sum_tiles(const PlanArgs& args, const Work& work, int32_t* result) {
  std::memcpy(result, work.counts + 1, args.num_experts * sizeof(int32_t));
  for (int64_t tile = 1; tile < work.num_tiles; ++tile) {
    const int32_t* counts = work.counts + tile * work.bins + 1;
    for (int64_t e = 0; e < args.num_experts; ++e) result[e] += counts[e];
  }
}

// cursors[tile][e] = start[e] + slots of expert e in earlier tiles.
void spread(const PlanArgs& args, const Work& work, const int32_t* start) {
  std::memcpy(work.cursors + 1, start, args.num_experts * sizeof(int32_t));
  for (int64_t tile = 1; tile < work.num_tiles; ++tile) {
    const int32_t* counts = work.counts + (tile - 1) * work.bins + 1;
    const int32_t* before = work.cursors + (tile - 1) * work.bins + 1;
    int32_t* cursors = work.cursors + tile * work.bins + 1;
    for (int64_t e = 0; e < args.num_experts; ++e) cursors[e] = before[e] + counts[e];
  }
}

// Fills `candidates` with the slots of experts that are asked for too often, in slot order inside an expert.
template <class Id, class KeyOf>
void gather_candidates(const PlanArgs& args, const Work& work, const int32_t* demand, Candidate* candidates,
                       const KeyOf& key_of) {
  const Slots<Id> slots(args);
  using Bin = typename Slots<Id>::Bin;
  parallel_for(work.num_tiles, 1, [&](int64_t first_tile, int64_t last_tile) {
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      int32_t* cursors = work.cursors + tile * work.bins;
      slots.each(work.begin(tile), work.end(tile), [&](int64_t slot, Bin bin) {
        const Bin expert = bin - 1;
        if (expert >= static_cast<Bin>(args.num_experts) || demand[expert] <= args.capacity) return;
        const uint32_t token = static_cast<uint32_t>(slot) / static_cast<uint32_t>(args.top_k);
        const int32_t scope = args.scope_ids != nullptr ? args.scope_ids[token] : 0;
        candidates[cursors[bin]++] = {key_of(slot, token), scope, static_cast<int32_t>(slot)};
      });
    }
  });
}

template <class Id>
void gather_candidates(const PlanArgs& args, const Work& work, const int32_t* demand, Candidate* candidates) {
  if (args.drop_policy == DropPolicy::kPosition) {
    return gather_candidates<Id>(args, work, demand, candidates, [&](int64_t slot, uint32_t token) {
      const uint32_t choice = static_cast<uint32_t>(slot) - token * static_cast<uint32_t>(args.top_k);
      return position_key(choice, token);
    });
  }
  dispatch_float(args.weights_dtype, [&](auto sample) {
    const auto* weights = static_cast<const decltype(sample)*>(args.weights);
    gather_candidates<Id>(args, work, demand, candidates,
                          [&](int64_t slot, uint32_t) { return falling_key(weights[slot]); });
  });
}

// Marks what one expert turns away, scope by scope, and takes it off the counts of the slot's tile.
void drop_surplus(const PlanArgs& args, const Work& work, int64_t expert, Candidate* begin, Candidate* end,
                  uint8_t* is_dropped) {
  const auto by_scope = [](const Candidate& a, const Candidate& b) {
    return a.scope != b.scope ? a.scope < b.scope : a.slot < b.slot;
  };
  const auto by_key = [](const Candidate& a, const Candidate& b) {
    return a.key != b.key ? a.key < b.key : a.slot < b.slot;
  };
  // Requests mostly lie one after another in a batch; then the candidates are in order already.
  if (!std::is_sorted(begin, end, by_scope)) std::sort(begin, end, by_scope);
  while (begin < end) {
    Candidate* scope_end = begin + 1;
    while (scope_end < end && scope_end->scope == begin->scope) ++scope_end;
    if (scope_end - begin > args.capacity) {
      Candidate* surplus = begin + args.capacity;
      std::nth_element(begin, surplus, scope_end, by_key);
      for (; surplus < scope_end; ++surplus) {
        is_dropped[surplus->slot] = 1;
        --work.counts[surplus->slot / work.tile_slots * work.bins + expert + 1];
      }
    }
    begin = scope_end;
  }
}

template <class Id>
void drop(const PlanArgs& args, Work& work, const int32_t* demand) {
  int64_t num_candidates = 0;
  for (int64_t e = 0; e < args.num_experts; ++e) {
    work.first[e] = static_cast<int32_t>(num_candidates);
    if (demand[e] > args.capacity) num_candidates += demand[e];
  }
  work.first[args.num_experts] = static_cast<int32_t>(num_candidates);
  if (num_candidates == 0) return;

  auto* candidates =
      static_cast<Candidate*>(scratch(Scratch::kPlanDrops, num_candidates * sizeof(Candidate) + work.num_slots));
  auto* is_dropped = reinterpret_cast<uint8_t*>(candidates + num_candidates);
  std::memset(is_dropped, 0, work.num_slots);
  spread(args, work, work.first);
  gather_candidates<Id>(args, work, demand, candidates);
  const int64_t grain = num_candidates <= kTileSlots ? args.num_experts : 1;
  parallel_for(args.num_experts, grain, [&](int64_t first_expert, int64_t last_expert) {
    for (int64_t e = first_expert; e < last_expert; ++e) {
      drop_surplus(args, work, e, candidates + work.first[e], candidates + work.first[e + 1], is_dropped);
    }
  });
  work.is_dropped = is_dropped;
}

void fill_with_none(int32_t* begin, int64_t count) {
  parallel_for(count, kFillGrain, [&](int64_t from, int64_t to) { std::fill(begin + from, begin + to, -1); });
}

void fill_padding(const PlanArgs& args, int64_t num_kept) {
  const int64_t end = args.offsets[args.num_experts];
  if (end != num_kept) {
    const int64_t grain = end - num_kept < kFillGrain ? args.num_experts : 1;
    parallel_for(args.num_experts, grain, [&](int64_t first_expert, int64_t last_expert) {
      for (int64_t e = first_expert; e < last_expert; ++e) {
        std::fill(args.row_to_slot + args.offsets[e] + args.kept[e], args.row_to_slot + args.offsets[e + 1], -1);
      }
    });
  }
  fill_with_none(args.row_to_slot + end, args.num_rows - end);
}

template <class Id, bool kHasDrops>
void place(const PlanArgs& args, const Work& work) {
  const Slots<Id> slots(args);
  using Bin = typename Slots<Id>::Bin;
  const Bin num_experts = static_cast<Bin>(args.num_experts);
  int32_t* const row_to_slot = args.row_to_slot;
  int32_t* const slot_to_row = args.slot_to_row;
  parallel_for(work.num_tiles, 1, [&](int64_t first_tile, int64_t last_tile) {
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      int32_t* const cursors = work.cursors + tile * work.bins;
      slots.each(work.begin(tile), work.end(tile), [&](int64_t slot, Bin bin) {
        const bool is_kept = static_cast<Bin>(bin - 1) < num_experts && !(kHasDrops && work.is_dropped[slot]);
        if (!is_kept) {
          slot_to_row[slot] = -1;
          return;
        }
        const int32_t row = cursors[bin]++;
        slot_to_row[slot] = row;
        row_to_slot[row] = static_cast<int32_t>(slot);
      });
    }
  });
}

template <class Id>
PlanStatus plan(const PlanArgs& args) {
  Work work(args);
  const PlanStatus status = count<Id>(args, work);
  if (status.kind != PlanStatus::kOk) return status;

  int32_t* const demand = args.dropped;
  sum_tiles(args, work, demand);
  if (args.capacity > 0) drop<Id>(args, work, demand);
  if (work.is_dropped != nullptr) {
    sum_tiles(args, work, args.kept);
  } else {
    std::memcpy(args.kept, demand, args.num_experts * sizeof(int32_t));
  }

  int64_t row = 0, num_kept = 0;
  for (int64_t e = 0; e < args.num_experts; ++e) {
    args.offsets[e] = static_cast<int32_t>(row);
    args.dropped[e] -= args.kept[e];
    num_kept += args.kept[e];
    row += args.align == 1 ? args.kept[e] : (args.kept[e] + args.align - 1) / args.align * args.align;
  }
  args.offsets[args.num_experts] = static_cast<int32_t>(row);
  if (num_kept > args.max_slots) return {PlanStatus::kTooManyRows, num_kept, 0};

  spread(args, work, args.offsets);
  if (work.is_dropped != nullptr) {
    place<Id, true>(args, work);
  } else {
    place<Id, false>(args, work);
  }
  fill_padding(args, num_kept);
  return {};
}

}  // namespace

namespace cpu {

void plan_dispatch(const PlanArgs& args) {
  if (args.scope_ids != nullptr) *args.status = judge_scopes(args.scope_ids, args.num_tokens, args.num_scopes);
  if (args.status->kind != PlanStatus::kOk) return;
  *args.status = args.experts_are_int64 ? plan<int64_t>(args) : plan<int32_t>(args);
}

}  // namespace cpu
}  // namespace fastmoe_route
