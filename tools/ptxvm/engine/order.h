// Happens-before between threads: which accesses of others a thread may rely on.
//
// Inside a block. Every barrier of a block or of lanes of a warp ends a tick of the block's clock. A barrier of all
// threads orders everything before it; one of some warps, or of some lanes, is kept as the newest tick each of them
// knows of each other. Shuffles and votes order nothing, as the CUDA guide says.
//
// Across blocks. A fence followed by a strong write (atomic, volatile, relaxed) to a location publishes what the fence
// covers; a strong read of that location followed by a fence takes it over. A barrier of the block passes on both what
// was read and what was taken over: the fence may stand behind the barrier, in another thread. A fence covers what its
// own thread did before, what a barrier of the block ordered before it, and, after a barrier, what every thread of the
// block had fenced before that barrier.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptxvm {

struct WarpOrder {
  uint32_t last_sync = 0;            // tick up to which all lanes know each other
  std::vector<uint32_t> warp_known;  // [warps] newest tick known of each warp of the block; empty until needed
  std::vector<uint32_t> lane_known;  // [32 * 32] likewise between lanes; empty until some but not all lanes met

  bool lane_knows(int lane, int other, uint32_t time) const {
    return lane == other || time <= last_sync ||
           (!lane_known.empty() && lane_known[static_cast<size_t>(lane * 32 + other)] >= time);
  }
  bool knows_warp(int warp, uint32_t time) const {
    return !warp_known.empty() && warp_known[static_cast<size_t>(warp)] >= time;
  }
};

struct Knowledge;
using KnowledgePtr = std::shared_ptr<const Knowledge>;

// One strong write behind a fence, and what it hands over.
struct Published {
  uint32_t block;
  uint16_t thread;
  uint32_t fenced;    // accesses of this thread up to here
  uint32_t all;       // accesses of its whole block up to here
  KnowledgePtr also;  // what the thread knew of other blocks
};
// What was published through one location, oldest first. Atomics add to it, a plain strong store starts a new one.
struct PublishedLog {
  std::vector<Published> entries;
  std::unordered_map<uint32_t, std::vector<uint32_t>> of_block;  // indices into entries
  void add(const Published& one);
};
// What a thread knows of other blocks: the first so many entries of some logs.
struct Knowledge {
  std::vector<std::pair<std::shared_ptr<const PublishedLog>, uint32_t>> parts;
  bool covers(uint32_t block, uint16_t thread, uint32_t time) const;
};
KnowledgePtr joined(const KnowledgePtr& a, const KnowledgePtr& b);

struct ThreadOrder {
  uint32_t fenced = 0;      // tick of its newest fence
  uint32_t fenced_all = 0;  // every access of the block up to here may be published by it
  KnowledgePtr known, pending, fenced_known;
};

struct BlockOrder {
  uint32_t clock = 1;
  uint32_t last_full = 0;  // tick of the newest barrier of all threads
  bool has_partial_barriers = false;
  std::unordered_map<uint16_t, ThreadOrder> threads;  // those that used a fence or a strong access

  // Bits of a warp's lanes met; `live` are all lanes there are.
  void meet_lanes(WarpOrder& warp, uint32_t lanes, uint32_t live);
  // A barrier of all warps of the block.
  void meet_all(uint32_t num_threads);
  void fence(uint16_t thread);
  // A strong write: what it publishes; false if nothing.
  bool publishes(uint32_t block, uint16_t thread, Published& entry);
  void take(uint16_t thread, const KnowledgePtr& knowledge, bool is_acquire);
  bool covers(uint16_t thread, uint32_t block, uint16_t other, uint32_t time) const;
};

// What was published through each location that strong accesses touched.
struct StrongLocations {
  std::unordered_map<uint64_t, std::shared_ptr<PublishedLog>> at;
  bool is_used = false;  // anything was ever published
};

}  // namespace ptxvm
