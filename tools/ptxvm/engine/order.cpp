#include "engine/order.h"

#include <algorithm>
#include <unordered_set>

namespace ptxvm {

namespace {

bool covers_from(const Knowledge& knowledge, uint32_t block, uint16_t thread, uint32_t time,
                 std::unordered_set<const Knowledge*>& seen) {
  if (!seen.insert(&knowledge).second) return false;
  for (const auto& [log, length] : knowledge.parts) {
    const auto found = log->of_block.find(block);
    if (found == log->of_block.end()) continue;
    for (const uint32_t at : found->second) {
      if (at >= length) break;
      const Published& entry = log->entries[at];
      if (time <= entry.all || (entry.thread == thread && time <= entry.fenced)) return true;
    }
  }
  for (const auto& [log, length] : knowledge.parts) {
    for (uint32_t at = 0; at < length; ++at) {
      const KnowledgePtr& also = log->entries[at].also;
      if (also != nullptr && covers_from(*also, block, thread, time, seen)) return true;
    }
  }
  return false;
}

}  // namespace

void PublishedLog::add(const Published& one) {
  of_block[one.block].push_back(static_cast<uint32_t>(entries.size()));
  entries.push_back(one);
}

bool Knowledge::covers(uint32_t block, uint16_t thread, uint32_t time) const {
  std::unordered_set<const Knowledge*> seen;
  return covers_from(*this, block, thread, time, seen);
}

KnowledgePtr joined(const KnowledgePtr& a, const KnowledgePtr& b) {
  if (a == nullptr || a == b) return b;
  if (b == nullptr) return a;
  auto both = std::make_shared<Knowledge>(*a);
  for (const auto& part : b->parts) {
    bool is_known = false;
    for (auto& mine : both->parts) {
      if (mine.first != part.first) continue;
      mine.second = std::max(mine.second, part.second);
      is_known = true;
    }
    if (!is_known) both->parts.push_back(part);
  }
  return both;
}

void BlockOrder::meet_lanes(WarpOrder& warp, uint32_t lanes, uint32_t live) {
  const uint32_t now = clock++;
  if ((lanes & live) == live) {
    warp.last_sync = now;
    return;
  }
  if (warp.lane_known.empty()) warp.lane_known.assign(32 * 32, 0);
  uint32_t all[32];
  std::fill(all, all + 32, 0u);
  for (int l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    for (int other = 0; other < 32; ++other)
      all[other] = std::max(all[other], warp.lane_known[static_cast<size_t>(l * 32 + other)]);
    all[l] = now;
  }
  for (int l = 0; l < 32; ++l) {
    if (lanes >> l & 1) std::copy(all, all + 32, warp.lane_known.begin() + l * 32);
  }
}

void BlockOrder::meet_all(uint32_t num_threads) {
  last_full = clock++;
  if (threads.empty()) return;
  // Fences of every thread before the barrier cover all that the block did up to the earliest of them; what one thread
  // knows of other blocks, all know now, and what it has read and not fenced yet, all may fence.
  uint32_t earliest = threads.size() == num_threads ? UINT32_MAX : 0;
  uint32_t all = 0;
  KnowledgePtr known, pending, fenced_known;
  for (const auto& entry : threads) {
    earliest = std::min(earliest, entry.second.fenced);
    all = std::max(all, entry.second.fenced_all);
    known = joined(known, entry.second.known);
    pending = joined(pending, entry.second.pending);
    fenced_known = joined(fenced_known, entry.second.fenced_known);
  }
  all = std::max(all, earliest);
  for (uint32_t t = 0; t < num_threads && (known != nullptr || pending != nullptr || all > 0); ++t) {
    ThreadOrder& thread = threads[static_cast<uint16_t>(t)];
    thread.known = known;
    thread.pending = pending;
    thread.fenced_known = fenced_known;
    thread.fenced_all = std::max(thread.fenced_all, all);
  }
}

void BlockOrder::fence(uint16_t thread) {
  ThreadOrder& mine = threads[thread];
  mine.known = joined(mine.known, mine.pending);
  mine.pending = nullptr;
  mine.fenced = clock;
  mine.fenced_all = std::max(mine.fenced_all, last_full);
  mine.fenced_known = mine.known;
}

bool BlockOrder::publishes(uint32_t block, uint16_t thread, Published& entry) {
  const auto found = threads.find(thread);
  if (found == threads.end()) return false;
  const ThreadOrder& mine = found->second;
  entry = {block, thread, mine.fenced, mine.fenced_all, mine.fenced_known};
  return mine.fenced != 0 || mine.fenced_all != 0;
}

void BlockOrder::take(uint16_t thread, const KnowledgePtr& knowledge, bool is_acquire) {
  if (knowledge == nullptr) return;
  ThreadOrder& mine = threads[thread];
  if (is_acquire) {
    mine.known = joined(mine.known, knowledge);
  } else {
    mine.pending = joined(mine.pending, knowledge);
  }
}

bool BlockOrder::covers(uint16_t thread, uint32_t block, uint16_t other, uint32_t time) const {
  const auto found = threads.find(thread);
  return found != threads.end() && found->second.known != nullptr && found->second.known->covers(block, other, time);
}

}  // namespace ptxvm
