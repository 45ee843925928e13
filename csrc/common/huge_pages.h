// Huge pages for large fresh results: the kernel clears memory on its first touch, and 512 page faults of 4 KB cost
// several times what one of 2 MB does. Where huge pages are set to "madvise", memory gets them only when asked for.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmoe_route {

// From here on a result asks for huge pages; below it mostly reuses memory that was touched before.
constexpr size_t kHugePageBytes = size_t{4} << 20;

// A hint only: errors are ignored, contents are not touched.
inline void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePageBytes) return;
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace fastmoe_route
