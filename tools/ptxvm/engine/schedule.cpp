#include "engine/schedule.h"

#include <algorithm>
#include <cstring>

namespace ptxvm {
namespace {

constexpr int kMostResident = 4;
constexpr size_t kWindow = 8;                  // blocks that may change places
constexpr uint64_t kSpinning = 200'000;        // instructions without progress before another block is let in
constexpr uint64_t kLivelock = 60'000'000;     // and before the launch is given up
constexpr int kShortRun = 12, kLongRun = 400;  // instructions of a warp in a row
constexpr int kFragmentRun = 200;              // of some lanes of a warp, where others wait
constexpr size_t kAlignment = 128;

uint8_t* aligned(BufferPool& pool, Buffer& storage, size_t bytes) {
  if (storage.bytes < bytes + kAlignment) storage = pool.take(bytes + kAlignment);
  const uintptr_t raw = reinterpret_cast<uintptr_t>(storage.memory.get());
  return reinterpret_cast<uint8_t*>((raw + kAlignment - 1) / kAlignment * kAlignment);
}

uint32_t lanes_below(int lane) { return (1u << lane) - 1; }

uint64_t special_value(const Block& block, const Warp& warp, Special what, int lane) {
  const Launch& launch = *block.launch;
  const uint32_t thread = static_cast<uint32_t>(warp.index * kLanes + lane);
  switch (what) {
    case Special::kTidX: return thread % launch.block.x;
    case Special::kTidY: return thread / launch.block.x % launch.block.y;
    case Special::kTidZ: return thread / launch.block.x / launch.block.y;
    case Special::kNtidX: return launch.block.x;
    case Special::kNtidY: return launch.block.y;
    case Special::kNtidZ: return launch.block.z;
    case Special::kCtaX: return block.x;
    case Special::kCtaY: return block.y;
    case Special::kCtaZ: return block.z;
    case Special::kNctaX: return launch.grid.x;
    case Special::kNctaY: return launch.grid.y;
    case Special::kNctaZ: return launch.grid.z;
    case Special::kLaneId: return static_cast<uint64_t>(lane);
    case Special::kWarpId: return static_cast<uint64_t>(warp.index);
    case Special::kNwarpId: return block.warps.size();
    case Special::kLaneEq: return 1u << lane;
    case Special::kLaneLt: return lanes_below(lane);
    case Special::kLaneLe: return lanes_below(lane) | 1u << lane;
    case Special::kLaneGt: return ~(lanes_below(lane) | 1u << lane);
    case Special::kLaneGe: return ~lanes_below(lane);
    case Special::kSmId: return block.index % static_cast<uint32_t>(launch.engine->options.num_sms);
    case Special::kNsmId: return static_cast<uint64_t>(launch.engine->options.num_sms);
    case Special::kGridId: return launch.id;
    case Special::kDynamicShared: return launch.dynamic_shared;
    case Special::kTotalShared: return launch.dynamic_shared + launch.program->static_shared;
    case Special::kDynamicStart: return kSharedStart + launch.program->static_shared;
    default: return launch.instructions;  // clocks
  }
}

}  // namespace

Scheduler::Scheduler(Launch& launch) : launch_(launch), program_(*launch.program) {
  most_resident_ = 1 + static_cast<int>(launch.random() % kMostResident);
  mixes_fragments_ = launch.random() % 2 == 0;
  launch.copies_early = launch.random() % 2 == 0;
}

Scheduler::~Scheduler() {
  BufferPool& pool = launch_.engine->buffers;
  for (auto* blocks : {&resident_, &spare_}) {
    for (auto& block : *blocks) {
      pool.give(std::move(block->shared_storage));
      for (auto& warp : block->warps) pool.give(std::move(warp->storage));
    }
  }
}

std::unique_ptr<Block> Scheduler::new_block(uint32_t index) {
  std::unique_ptr<Block> block;
  if (!spare_.empty()) {
    block = std::move(spare_.back());
    spare_.pop_back();
  } else {
    block = std::make_unique<Block>();
    block->launch = &launch_;
    block->num_threads = static_cast<uint32_t>(launch_.block.count());
    for (uint32_t w = 0; w * kLanes < block->num_threads; ++w) block->warps.push_back(std::make_unique<Warp>());
  }
  start_block(*block, index);
  return block;
}

void Scheduler::start_block(Block& block, uint32_t index) {
  block.index = index;
  block.x = index % launch_.grid.x;
  block.y = index / launch_.grid.x % launch_.grid.y;
  block.z = index / launch_.grid.x / launch_.grid.y;
  block.num_live = static_cast<int>(block.warps.size());
  block.num_exited_threads = 0;
  block.order = BlockOrder{};
  block.spun = 0;
  for (Barrier& barrier : block.barriers) barrier = Barrier{};
  const size_t bytes = kSharedStart + program_.static_shared + launch_.dynamic_shared;
  block.shared = aligned(launch_.engine->buffers, block.shared_storage, bytes);
  block.shared_shadow.reset(0, bytes, false);
  for (size_t w = 0; w < block.warps.size(); ++w) start_warp(block, static_cast<int>(w));
}

void Scheduler::start_warp(Block& block, int index) {
  Warp& warp = *block.warps[static_cast<size_t>(index)];
  const uint32_t left = block.num_threads - static_cast<uint32_t>(index) * kLanes;
  warp.index = index;
  warp.state = Warp::kReady;
  warp.live = left >= kLanes ? kAllLanes : lanes_below(static_cast<int>(left));
  warp.all = warp.live;
  warp.fragments.assign(1, {0, warp.live, false});
  warp.registers = aligned(launch_.engine->buffers, warp.storage, program_.file_bytes);
  warp.undefined.assign(program_.num_slots, kAllLanes);
  warp.undefined[0] = 0;
  warp.predicates.assign(program_.num_predicates + 1, static_cast<uint32_t>(launch_.random()));
  warp.local.resize(size_t{program_.local_bytes} * kLanes);
  warp.local_defined.assign(warp.local.size(), 0);
  warp.order = WarpOrder{};
  warp.async.reset();
  Context c{warp.registers, nullptr, warp.undefined.data(), nullptr, &warp, &block, &launch_, &program_, 0};
  for (const SpecialRegister& special : program_.specials) {
    for (int lane = 0; lane < kLanes; ++lane)
      set_lane(c, special.at, lane, special_value(block, warp, special.what, lane));
    warp.undefined[special.at.slot] = 0;
  }
}

bool Scheduler::admit() {
  const uint64_t total = launch_.grid.count();
  while (order_.size() < kWindow && next_block_ < total) order_.push_back(static_cast<uint32_t>(next_block_++));
  if (order_.empty()) return false;
  const size_t pick = launch_.random() % order_.size();
  resident_.push_back(new_block(order_[pick]));
  order_.erase(order_.begin() + static_cast<long>(pick));
  return true;
}

void Scheduler::run() {
  std::vector<int> ready;
  while (true) {
    while (resident_.size() < static_cast<size_t>(most_resident_ + extra_resident_) && admit()) {
    }
    if (resident_.empty()) return;
    // A block, starting at a random one, that has a warp ready; a random such warp.
    const size_t first = launch_.random() % resident_.size();
    Block* chosen = nullptr;
    size_t at = 0;
    for (size_t i = 0; i < resident_.size() && chosen == nullptr; ++i) {
      at = (first + i) % resident_.size();
      ready.clear();
      for (const auto& warp : resident_[at]->warps) {
        if (warp->state == Warp::kReady) ready.push_back(warp->index);
      }
      if (!ready.empty()) chosen = resident_[at].get();
    }
    if (chosen == nullptr) report_deadlock();
    Warp& warp = *chosen->warps[static_cast<size_t>(ready[launch_.random() % ready.size()])];
    const uint64_t draw = launch_.random();
    const int budget = draw % 4 == 0 ? 1 + static_cast<int>(draw >> 8) % kShortRun
                                     : kShortRun + static_cast<int>((draw >> 8) % kLongRun);
    const uint64_t before = launch_.instructions;
    run_warp(*chosen, warp, budget);
    chosen->spun += launch_.instructions - before;
    calm_ += launch_.instructions - before;
    if (chosen->num_live == 0) {
      calm_ = 0;
      spare_.push_back(std::move(resident_[at]));
      resident_.erase(resident_.begin() + static_cast<long>(at));
    }
    if (calm_ > kSpinning) watch_progress();
  }
}

// Blocks that only wait for blocks not started yet: let in another, until there is none.
void Scheduler::watch_progress() {
  const bool all_spin =
      std::all_of(resident_.begin(), resident_.end(), [](const auto& block) { return block->spun > kSpinning; });
  if (all_spin && next_block_ + order_.size() > 0 && (next_block_ < launch_.grid.count() || !order_.empty())) {
    ++extra_resident_;
    for (auto& block : resident_) block->spun = 0;
    calm_ = 0;
    return;
  }
  if (calm_ < kLivelock && launch_.instructions < launch_.engine->options.most_instructions) return;
  Block& block = *resident_[0];
  Warp& warp = *block.warps[0];
  Context c{nullptr, nullptr, nullptr, nullptr, &warp, &block, &launch_, &program_, 0};
  for (const auto& any : block.warps) {
    if (any->state == Warp::kReady) {
      c.warp = any.get();
      c.pc = any->fragments[0].pc;
    }
  }
  fault(c, "livelock", "no block has finished or passed a barrier in " + std::to_string(calm_) + " instructions");
}

void Scheduler::report_deadlock() {
  Block& block = *resident_[0];
  std::string text = "no warp can go on:";
  Context c{nullptr, nullptr, nullptr, nullptr, block.warps[0].get(), &block, &launch_, &program_, 0};
  for (const auto& warp : block.warps) {
    if (warp->state != Warp::kAtBarrier) continue;
    c.warp = warp.get();
    c.pc = warp->barrier_pc;
    text += " warp " + std::to_string(warp->index) + " waits at barrier " + std::to_string(warp->barrier_id) + " (" +
            source_line(launch_, warp->barrier_pc) + ");";
  }
  fault(c, "deadlock", text);
}

void Scheduler::report_stuck_warp(Context& c, Warp& warp) {
  std::string text = "lanes wait for each other:";
  bool at_barrier = false;
  for (const Fragment& fragment : warp.fragments) {
    const Instr& instr = program_.code[fragment.pc];
    char mask[16];
    std::snprintf(mask, sizeof mask, "%08x", fragment.mask);
    at_barrier = at_barrier || instr.kind == Kind::kBarrier;
    text += std::string(" lanes ") + mask + " at " + program_.texts[fragment.pc] + " (" +
            source_line(launch_, fragment.pc) + ");";
  }
  c.pc = warp.fragments[0].pc;
  fault(c, at_barrier ? "divergent barrier" : "collective", text, __builtin_ctz(warp.fragments[0].mask));
}

int Scheduler::choose(Context& c, Warp& warp) {
  int best = -1, count = 0;
  for (size_t i = 0; i < warp.fragments.size(); ++i) {
    if (warp.fragments[i].is_parked) continue;
    ++count;
    if (best < 0 || warp.fragments[i].pc < warp.fragments[static_cast<size_t>(best)].pc) best = static_cast<int>(i);
  }
  if (count == 0) report_stuck_warp(c, warp);
  // Any of them may go first; the lowest keeps the lanes together.
  if (count > 1 && launch_.random() % (mixes_fragments_ ? 4 : 32) == 0) {
    int skip = static_cast<int>(launch_.random() % static_cast<uint64_t>(count));
    for (size_t i = 0; i < warp.fragments.size(); ++i) {
      if (!warp.fragments[i].is_parked && skip-- == 0) return static_cast<int>(i);
    }
  }
  return best;
}

void Scheduler::split_off(Warp& warp, int current, uint32_t mask, uint32_t pc) {
  warp.fragments[static_cast<size_t>(current)].mask &= ~mask;
  if (mask != 0) warp.fragments.push_back({pc, mask, false});
}

// Joins fragments that have met, and drops empty ones. Returns where `current` is now, or -1.
int Scheduler::settle(Context& c, Warp& warp, int current) {
  auto& all = warp.fragments;
  for (size_t i = 0; i < all.size(); ++i) {
    for (size_t j = i + 1; j < all.size();) {
      if (all[j].mask == 0 || (all[j].pc == all[i].pc && all[i].mask != 0)) {
        if (all[j].mask != 0) {
          all[i].mask |= all[j].mask;
          all[i].is_parked = false;
          if (current == static_cast<int>(j)) current = static_cast<int>(i);
        } else if (current == static_cast<int>(j)) {
          current = -1;
        }
        all.erase(all.begin() + static_cast<long>(j));
        if (current > static_cast<int>(j)) --current;
      } else {
        ++j;
      }
    }
  }
  if (!all.empty() && all[0].mask == 0) {
    all.erase(all.begin());
    current = current > 0 ? current - 1 : -1;
  }
  (void)c;
  return current;
}

void Scheduler::branch(Warp& warp, int current, uint32_t taken, uint32_t target) {
  Fragment& fragment = warp.fragments[static_cast<size_t>(current)];
  const uint32_t rest = fragment.mask & ~taken;
  if (taken == 0) {
    ++fragment.pc;
  } else if (rest == 0) {
    fragment.pc = target;
  } else {
    const uint32_t next = fragment.pc + 1;
    fragment.pc = target;
    split_off(warp, current, rest, next);
  }
}

void Scheduler::branch_table(Context& c, Warp& warp, int current, const Instr& instr) {
  const std::vector<uint32_t>& table = program_.tables[instr.target];
  uint32_t left = warp.fragments[static_cast<size_t>(current)].mask;
  if (undefined_lanes(c, instr.a) & left) fault(c, "undefined value", "a branch depends on an undefined value");
  const uint32_t* index = source<uint32_t>(c, instr.a);
  while (left != 0) {
    const uint32_t value = index[__builtin_ctz(left)];
    if (value >= table.size()) fault(c, "bad branch", "brx.idx past the end of its table", __builtin_ctz(left));
    uint32_t same = 0;
    each_lane(left, [&](int l) {
      if (index[l] == value) same |= 1u << l;
    });
    left &= ~same;
    if (left == 0) {
      warp.fragments[static_cast<size_t>(current)].pc = table[value];
    } else {
      split_off(warp, current, same, table[value]);
    }
  }
}

void Scheduler::exit_lanes(Context& c, Warp& warp, uint32_t mask) {
  Block& block = *c.block;
  for (const Barrier& barrier : block.barriers) {
    if (!barrier.waiting.empty() && barrier.expected >= block.warps.size() * kLanes)
      fault(c, "divergent barrier",
            "a thread exits while others wait for it at a barrier (" + source_line(launch_, barrier.pc) + ")",
            __builtin_ctz(mask));
  }
  block.num_exited_threads += __builtin_popcount(mask);
  warp.live &= ~mask;
  if (warp.live == 0) {
    warp.state = Warp::kDone;
    --block.num_live;
  }
}

bool Scheduler::collective(Context& c, Warp& warp, int current, const Instr& instr, uint32_t mask) {
  const uint32_t pc = warp.fragments[static_cast<size_t>(current)].pc;
  if (const uint32_t bad = undefined_lanes(c, instr.c) & mask)
    fault(c, "undefined value", "the member mask of a collective is undefined", __builtin_ctz(bad));
  const uint32_t* members = source<uint32_t>(c, instr.c);
  uint32_t done = warp.fragments[static_cast<size_t>(current)].mask & ~mask;  // switched off by the guard
  for (uint32_t left = mask; left != 0;) {
    uint32_t named = members[__builtin_ctz(left)];
    uint32_t group = 0;
    each_lane(left, [&](int l) {
      if (members[l] == named) group |= 1u << l;
    });
    if (instr.has_wrong_mask) named = named == kAllLanes ? kAllLanes >> (kLanes / 2) : kAllLanes;
    left &= ~group;
    if ((group & ~named) != 0) {
      char text[16];
      std::snprintf(text, sizeof text, "%08x", named);
      fault(c, "collective",
            program_.texts[pc] + " is executed by a lane that its member mask " + text + " does not name",
            __builtin_ctz(group & ~named));
    }
    if (const uint32_t gone = named & warp.all & ~warp.live)
      fault(c, "collective", program_.texts[pc] + " names a lane that has exited or may have", __builtin_ctz(gone));
    if (group != (named & warp.all)) continue;
    instr.run(c, instr, group);
    done |= group;
  }
  Fragment& fragment = warp.fragments[static_cast<size_t>(current)];
  if (done == fragment.mask) {
    ++fragment.pc;
    return true;
  }
  if (done != 0) split_off(warp, current, done, pc + 1);
  warp.fragments[static_cast<size_t>(current)].is_parked = true;
  return false;
}

bool Scheduler::barrier(Context& c, Warp& warp, int current, const Instr& instr, uint32_t mask) {
  Block& block = *c.block;
  Fragment& fragment = warp.fragments[static_cast<size_t>(current)];
  if (mask != fragment.mask) split_off(warp, current, fragment.mask & ~mask, fragment.pc + 1);
  if (mask != warp.live) {
    warp.fragments[static_cast<size_t>(current)].is_parked = true;
    return false;
  }
  const int lane = __builtin_ctz(mask);
  const uint32_t pc = warp.fragments[static_cast<size_t>(current)].pc;
  const uint32_t id = static_cast<uint32_t>(lane_value(c, instr.a, lane));
  const uint32_t whole = static_cast<uint32_t>(block.warps.size()) * kLanes;
  const uint32_t expected = instr.mode2 != 0 ? static_cast<uint32_t>(lane_value(c, instr.b, lane)) : whole;
  if (id >= block.barriers.size()) fault(c, "barrier", "barrier " + std::to_string(id) + " does not exist", lane);
  if (expected == 0 || expected % kLanes != 0 || expected > whole)
    fault(c, "barrier",
          "a barrier for " + std::to_string(expected) + " threads in a block of " + std::to_string(block.num_threads),
          lane);
  if (block.num_exited_threads > 0 && expected == whole)
    fault(c, "divergent barrier", "a barrier of the whole block after threads of it have exited", lane);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived > 0 && barrier.expected != expected)
    fault(c, "barrier", "warps disagree about how many threads meet at barrier " + std::to_string(id), lane);
  if (barrier.arrived > 0 && id == 0 && barrier.pc != pc && expected == whole)
    fault(c, "divergent barrier",
          "warps of the block meet at different barriers, the other at " + source_line(launch_, barrier.pc), lane);
  barrier.expected = expected;
  barrier.pc = pc;
  barrier.arrived += kLanes;
  warp.barrier_id = id;
  warp.barrier_pc = pc;
  if (instr.mode >= 2) {
    if (undefined_lanes(c, instr.list[0]) & mask) fault(c, "undefined value", "the predicate of bar.red is undefined");
    warp.barrier_value = predicate_lanes(c, instr.list[0]) & mask;
  }
  ++warp.fragments[static_cast<size_t>(current)].pc;
  const bool waits = instr.mode != 1;
  if (waits) {
    warp.state = Warp::kAtBarrier;
    barrier.waiting.push_back(warp.index);
  } else {
    barrier.passed.push_back(warp.index);
  }
  if (barrier.arrived == barrier.expected) complete(c, id);
  return !waits;
}

void Scheduler::complete(Context& c, uint32_t id) {
  Block& block = *c.block;
  Barrier& barrier = block.barriers[id];
  const bool is_full = barrier.expected == block.warps.size() * kLanes;
  if (is_full && barrier.passed.empty()) {
    block.order.meet_all(block.num_threads);
  } else {
    const uint32_t now = block.order.clock++;
    block.order.has_partial_barriers = true;
    std::vector<uint32_t> known(block.warps.size(), 0);
    const auto gather = [&](int w) {
      const auto& own = block.warps[static_cast<size_t>(w)]->order.warp_known;
      for (size_t i = 0; i < own.size(); ++i) known[i] = std::max(known[i], own[i]);
      known[static_cast<size_t>(w)] = now;
    };
    for (int w : barrier.waiting) gather(w);
    for (int w : barrier.passed) gather(w);
    for (int w : barrier.waiting) {
      block.warps[static_cast<size_t>(w)]->order.warp_known = known;
      block.warps[static_cast<size_t>(w)]->order.last_sync = now;
    }
  }
  uint32_t count = 0;
  bool all = true;
  for (int w : barrier.waiting) {
    const Warp& warp = *block.warps[static_cast<size_t>(w)];
    count += static_cast<uint32_t>(__builtin_popcount(warp.barrier_value));
    all = all && warp.barrier_value == warp.live;
  }
  for (int w : barrier.waiting) {
    Warp& warp = *block.warps[static_cast<size_t>(w)];
    const Instr& instr = program_.code[warp.barrier_pc];
    warp.state = Warp::kReady;
    if (instr.mode < 2) continue;
    Context own = c;
    own.registers = warp.registers;
    own.undefined = warp.undefined.data();
    own.predicates = warp.predicates.data();
    if (instr.mode == 2) {
      each_lane(warp.live, [&](int l) { set_lane(own, instr.d, l, count); });
    } else {
      set_predicate(own, instr.d, (instr.mode == 3 ? all : count > 0) ? kAllLanes : 0, warp.live);
    }
    set_undefined(own, instr.d, 0, warp.live);
  }
  block.spun = 0;
  calm_ = 0;
  barrier = Barrier{};
}

void Scheduler::run_warp(Block& block, Warp& warp, int budget) {
  Context c{warp.registers,
            program_.constants.data(),
            warp.undefined.data(),
            warp.predicates.data(),
            &warp,
            &block,
            &launch_,
            &program_,
            0};
  const Instr* const code = program_.code.data();
  int current = choose(c, warp);
  const bool counts = launch_.engine->options.counts;
  int run = kFragmentRun;
  for (; budget > 0; --budget) {
    Fragment& fragment = warp.fragments[static_cast<size_t>(current)];
    const Instr& instr = code[fragment.pc];
    uint32_t mask = fragment.mask;
    c.pc = fragment.pc;
    ++launch_.instructions;
    if (instr.guard != kNoGuard) {
      if (const uint32_t bad = warp.undefined[instr.guard_slot] & mask)
        fault(c, "undefined value", program_.texts[fragment.pc] + " is guarded by an undefined predicate",
              __builtin_ctz(bad));
      const uint32_t guard = warp.predicates[instr.guard];
      mask &= instr.guard_negated ? ~guard : guard;
    }
    if (counts) {
      ++launch_.counters.warp_instructions[static_cast<size_t>(instr.cls)];
      launch_.counters.lane_instructions += static_cast<uint64_t>(__builtin_popcount(mask));
      if (!program_.executed.empty()) program_.executed[fragment.pc] = 1;
    }
    bool goes_on = true;
    switch (instr.kind) {
      case Kind::kPlain:
        if (mask != 0) instr.run(c, instr, mask);
        ++fragment.pc;
        break;
      case Kind::kBranch: branch(warp, current, mask, instr.target); break;
      case Kind::kBranchTable: branch_table(c, warp, current, instr); break;
      case Kind::kExit:
        if (mask != 0) {
          exit_lanes(c, warp, mask);
          if (warp.state == Warp::kDone) {
            block.spun = 0;
            return;
          }
          fragment.mask &= ~mask;
        }
        ++fragment.pc;
        // Lanes at a collective or barrier that only waited for these can go on.
        for (Fragment& other : warp.fragments) other.is_parked = false;
        break;
      case Kind::kCollective:
        if (mask == 0) {
          ++fragment.pc;
        } else {
          goes_on = collective(c, warp, current, instr, mask);
        }
        break;
      case Kind::kBarrier:
        if (mask == 0) {
          ++fragment.pc;
          break;
        }
        goes_on = barrier(c, warp, current, instr, mask);
        if (warp.state == Warp::kAtBarrier) return;
        break;
    }
    if (warp.fragments.size() == 1 && goes_on) continue;
    current = settle(c, warp, current);
    const bool is_lowest =
        current >= 0 && std::none_of(warp.fragments.begin(), warp.fragments.end(), [&](const Fragment& other) {
          return !other.is_parked && other.pc < warp.fragments[static_cast<size_t>(current)].pc;
        });
    if (current >= 0 && !warp.fragments[static_cast<size_t>(current)].is_parked && is_lowest && --run > 0) continue;
    run = kFragmentRun;
    current = choose(c, warp);
  }
}

}  // namespace ptxvm
