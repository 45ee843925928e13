#include "common/workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace fastmoe_route {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Buffer {
  void* memory = nullptr;
  size_t bytes = 0;

  ~Buffer() { release(); }
  void release() {
    std::free(memory);
    memory = nullptr;
    bytes = 0;
  }
  void grow(size_t wanted) {
    release();
    // Large buffers are whole huge pages: fewer page faults and TLB misses.
    const size_t alignment = wanted >= kHugePage ? kHugePage : 64;
    const size_t rounded = (wanted + alignment - 1) / alignment * alignment;
    memory = std::aligned_alloc(alignment, rounded);
    if (memory == nullptr) throw std::bad_alloc();
    if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
    bytes = rounded;
  }
};

thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];

}  // namespace

void* scratch(Scratch slot, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes || buffer.memory == nullptr) buffer.grow(bytes > 0 ? bytes : 64);
  return buffer.memory;
}

size_t scratch_bytes() {
  size_t total = 0;
  for (const Buffer& buffer : buffers) total += buffer.bytes;
  return total;
}

}  // namespace fastmoe_route
