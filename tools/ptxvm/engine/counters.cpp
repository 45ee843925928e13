#include "engine/counters.h"

#include <algorithm>

namespace ptxvm {
namespace {

constexpr uint64_t kSectorBytes = 32;
constexpr int kBanks = 32;
constexpr const char* kClassNames[] = {"integer",      "float",        "double",      "half",         "special",
                                       "move",         "control",      "load_global", "store_global", "load_shared",
                                       "store_shared", "other_memory", "atomic",      "async_copy",   "barrier",
                                       "collective",   "matrix",       "load_matrix"};
static_assert(sizeof kClassNames / sizeof *kClassNames == static_cast<size_t>(Class::kCount), "a name per class");

}  // namespace

void Counters::add(const Counters& other) {
  for (size_t i = 0; i < warp_instructions.size(); ++i) warp_instructions[i] += other.warp_instructions[i];
  lane_instructions += other.lane_instructions;
  matrix_multiplies += other.matrix_multiplies;
  global_load_requests += other.global_load_requests;
  global_load_sectors += other.global_load_sectors;
  global_load_bytes += other.global_load_bytes;
  global_store_requests += other.global_store_requests;
  global_store_sectors += other.global_store_sectors;
  global_store_bytes += other.global_store_bytes;
  shared_requests += other.shared_requests;
  shared_phases += other.shared_phases;
  shared_conflicts += other.shared_conflicts;
}

std::map<std::string, uint64_t> Counters::as_map() const {
  std::map<std::string, uint64_t> all;
  uint64_t total = 0;
  for (size_t i = 0; i < warp_instructions.size(); ++i) {
    all[std::string("instructions_") + kClassNames[i]] = warp_instructions[i];
    total += warp_instructions[i];
  }
  all["instructions"] = total;
  all["lane_instructions"] = lane_instructions;
  all["mma"] = matrix_multiplies;
  all["global_load_requests"] = global_load_requests;
  all["global_load_sectors"] = global_load_sectors;
  all["global_load_bytes"] = global_load_bytes;
  all["global_store_requests"] = global_store_requests;
  all["global_store_sectors"] = global_store_sectors;
  all["global_store_bytes"] = global_store_bytes;
  all["shared_requests"] = shared_requests;
  all["shared_phases"] = shared_phases;
  all["shared_conflicts"] = shared_conflicts;
  return all;
}

int count_sectors(const uint64_t* address, uint32_t mask, uint32_t bytes) {
  uint64_t sectors[kLanes * 2];
  int count = 0;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const uint64_t at = address[__builtin_ctz(left)];
    const uint64_t first = at / kSectorBytes, last = (at + bytes - 1) / kSectorBytes;
    sectors[count++] = first;
    if (last != first) sectors[count++] = last;
  }
  std::sort(sectors, sectors + count);
  return static_cast<int>(std::unique(sectors, sectors + count) - sectors);
}

void count_phases(const uint64_t* offset, uint32_t mask, uint32_t bytes, Counters& counters) {
  const int together = bytes <= 4 ? kLanes : bytes == 8 ? kLanes / 2 : kLanes / 4;
  const int words = bytes <= 4 ? 1 : static_cast<int>(bytes / 4);
  ++counters.shared_requests;
  for (int first = 0; first < kLanes; first += together) {
    uint64_t seen[kLanes * 4];
    int count = 0;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int w = 0; w < words; ++w) seen[count++] = offset[lane] / 4 + static_cast<uint64_t>(w);
    }
    if (count == 0) continue;
    std::sort(seen, seen + count);
    count = static_cast<int>(std::unique(seen, seen + count) - seen);
    int of_bank[kBanks] = {};
    int most = 0;
    for (int i = 0; i < count; ++i) most = std::max(most, ++of_bank[seen[i] % kBanks]);
    counters.shared_phases += 1;
    counters.shared_conflicts += static_cast<uint64_t>(most - 1);
  }
}

}  // namespace ptxvm
