#include "engine/memory.h"

#include <algorithm>
#include <cstdio>

namespace ptxvm {
namespace {

constexpr size_t kRemembered = 256;  // ranges whose end is still told apart from memory never known
constexpr uint64_t kNear = 4096;

std::string number(uint64_t value) { return std::to_string(value); }

}  // namespace

Region* GlobalMemory::exact(const void* base, uint64_t bytes) {
  const uint64_t at = reinterpret_cast<uintptr_t>(base);
  for (const auto& region : regions_) {
    if (region->base == at && region->bytes == bytes) return region.get();
  }
  return nullptr;
}

Region* GlobalMemory::add(const void* base, uint64_t bytes, bool is_writable, bool is_defined,
                          const std::string& what) {
  if (Region* known = exact(base, bytes)) {
    ++known->users;
    if (is_writable && !known->is_writable) {
      known->is_writable = true;
      if (known->shadow.is_empty()) known->shadow.reset(known->base, known->bytes, true);
    }
    return known;
  }
  auto region = std::make_unique<Region>();
  region->base = reinterpret_cast<uintptr_t>(base);
  region->bytes = bytes;
  region->is_writable = is_writable;
  region->what = what;
  if (is_writable || !is_defined) region->shadow.reset(region->base, bytes, is_defined);
  const uint64_t low = region->base, high = low + bytes;
  gone_.erase(std::remove_if(gone_.begin(), gone_.end(),
                             [&](const Gone& gone) { return gone.base < high && low < gone.base + gone.bytes; }),
              gone_.end());
  regions_.push_back(std::move(region));
  return regions_.back().get();
}

void GlobalMemory::remove(const void* base, uint64_t bytes) {
  const uint64_t at = reinterpret_cast<uintptr_t>(base);
  for (size_t i = 0; i < regions_.size(); ++i) {
    Region& region = *regions_[i];
    if (region.base != at || region.bytes != bytes) continue;
    if (--region.users > 0) return;
    gone_.push_back({region.base, region.bytes, region.what});
    if (gone_.size() > kRemembered) gone_.erase(gone_.begin());
    regions_.erase(regions_.begin() + static_cast<long>(i));
    return;
  }
}

Region* GlobalMemory::find(uint64_t low, uint64_t high, bool for_write) {
  Region* found = nullptr;
  for (const auto& region : regions_) {
    if (!region->holds(low, high)) continue;
    if (region->is_writable) return region.get();
    found = region.get();
  }
  (void)for_write;
  return found;
}

std::string GlobalMemory::describe(uint64_t address) const {
  char hex[32];
  std::snprintf(hex, sizeof hex, "0x%llx", static_cast<unsigned long long>(address));
  std::string text = hex;
  const Region* nearest = nullptr;
  uint64_t best = kNear;
  for (const auto& region : regions_) {
    const uint64_t end = region->base + region->bytes;
    const uint64_t gap = address < region->base ? region->base - address : address >= end ? address - end : 0;
    if (gap < best || (gap == 0 && best == 0)) {
      best = gap;
      nearest = region.get();
    }
  }
  for (const Gone& gone : gone_) {
    if (address >= gone.base && address < gone.base + gone.bytes && (nearest == nullptr || best > 0)) {
      return text + ", byte " + number(address - gone.base) + " of " + gone.what + " of " + number(gone.bytes) +
             " bytes that has been freed (use after free)";
    }
  }
  if (nearest == nullptr) return text + ", which is in no memory of the device";
  const uint64_t end = nearest->base + nearest->bytes;
  const std::string whose = nearest->what + " of " + number(nearest->bytes) + " bytes";
  if (address < nearest->base) return text + ", " + number(nearest->base - address) + " bytes before " + whose;
  if (address >= end) return text + ", " + number(address - end) + " bytes past the end of " + whose;
  return text + ", byte " + number(address - nearest->base) + " of " + whose;
}

void GlobalMemory::define(const void* base, uint64_t bytes) {
  const uint64_t low = reinterpret_cast<uintptr_t>(base), high = low + bytes;
  for (const auto& region : regions_) {
    if (region->shadow.is_empty() || region->base >= high || low >= region->base + region->bytes) continue;
    const uint64_t from = std::max(low, region->base), to = std::min(high, region->base + region->bytes);
    region->shadow.define(from, to - from);
  }
}

}  // namespace ptxvm
