// What a kernel did, counted: instructions by class, requests and sectors of global memory, phases of shared memory.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "engine/program.h"

namespace ptxvm {

struct Counters {
  std::array<uint64_t, static_cast<size_t>(Class::kCount)> warp_instructions{};
  uint64_t lane_instructions = 0;
  uint64_t matrix_multiplies = 0;  // mma instructions of a warp
  uint64_t global_load_requests = 0, global_load_sectors = 0, global_load_bytes = 0;
  uint64_t global_store_requests = 0, global_store_sectors = 0, global_store_bytes = 0;
  uint64_t shared_requests = 0;   // warp instructions that touched shared memory
  uint64_t shared_phases = 0;     // the fewest phases their sizes allow
  uint64_t shared_conflicts = 0;  // phases beyond that

  void add(const Counters& other);
  std::map<std::string, uint64_t> as_map() const;
};

// Sectors of 32 bytes that a request of `bytes` a lane touches.
int count_sectors(const uint64_t* address, uint32_t mask, uint32_t bytes);
// Phases of shared memory: 32 banks of 4 bytes; lanes go together by 32, 16 (8 bytes each) or 8 (16 bytes each); one
// phase more for every further word of the same bank.
void count_phases(const uint64_t* offset, uint32_t mask, uint32_t bytes, Counters& counters);

}  // namespace ptxvm
