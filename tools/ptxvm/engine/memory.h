// Global memory: the ranges of this process that kernels may touch, with their shadows.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/shadow.h"

namespace ptxvm {

struct Region {
  uint64_t base = 0, bytes = 0;
  bool is_writable = true;
  int users = 1;
  uint64_t launch = 0;  // whose times the shadow holds
  std::string what;
  Shadow shadow;  // of writable regions

  bool holds(uint64_t low, uint64_t high) const { return low >= base && low <= high && high <= base + bytes; }
};

class GlobalMemory {
 public:
  // Adds a range, or one more user of the same range. A range that anybody may write is writable.
  Region* add(const void* base, uint64_t bytes, bool is_writable, bool is_defined, const std::string& what);
  // Takes one user away; without users the range is gone.
  void remove(const void* base, uint64_t bytes);
  Region* exact(const void* base, uint64_t bytes);
  // The region that holds [low, high), preferably a writable one; null if none does.
  Region* find(uint64_t low, uint64_t high, bool for_write);
  // For messages: what is at or near an address.
  std::string describe(uint64_t address) const;
  // The host wrote or filled a range.
  void define(const void* base, uint64_t bytes);
  size_t size() const { return regions_.size(); }

 private:
  std::vector<std::unique_ptr<Region>> regions_;
  struct Gone {
    uint64_t base, bytes;
    std::string what;
  };
  std::vector<Gone> gone_;  // the newest few
};

}  // namespace ptxvm
