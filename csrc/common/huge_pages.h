// Huge pages for large fresh results: the kernel clears memory on its first touch, and 512 page faults of 4 KB cost
// several times what one of 2 MB does. Where huge pages are set to "madvise", memory gets them only when asked for.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#endif

namespace fastmoe_route {

// From here on a result asks for huge pages; below it mostly reuses memory that was touched before.
constexpr size_t kHugePageBytes = size_t{4} << 20;
constexpr size_t kMostReportedBytes = size_t{128} << 20;

// Whether this is a virtual machine that hands its free memory back to its host (free page reporting). There a huge
// page that has lain free comes without memory behind it and costs several times what small pages do: measured 1.7 s
// a GB against 0.4 s. So only results that are small beside what lies free ask for huge pages there.
inline bool reports_free_pages() {
#if defined(__linux__)
  static const bool reports = [] {
    std::FILE* file = std::fopen("/sys/module/page_reporting/parameters/page_reporting_order", "r");
    if (file == nullptr) return false;
    long order = -1;
    const bool is_number = std::fscanf(file, "%ld", &order) == 1;
    std::fclose(file);
    return is_number && order >= 0 && order < 32;  // -1, perhaps as an unsigned number, while nothing is reported
  }();
  return reports;
#else
  return false;
#endif
}

// Whether memory that asks for huge pages can get them.
inline bool gives_huge_pages() {
#if defined(__linux__)
  static const bool gives = [] {
    std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
    if (file == nullptr) return false;
    char text[64] = {};
    const size_t length = std::fread(text, 1, sizeof(text) - 1, file);
    std::fclose(file);
    return length > 0 && std::strstr(text, "[never]") == nullptr;
  }();
  return gives;
#else
  return false;
#endif
}

// The whole pages of 4 KB inside a piece of memory; `begin` is not below `end` where there is none.
struct Pages {
  static constexpr uintptr_t kBytes = 4096;
  uintptr_t begin, end;

  Pages(const void* memory, size_t bytes)
      : begin((reinterpret_cast<uintptr_t>(memory) + kBytes - 1) / kBytes * kBytes),
        end((reinterpret_cast<uintptr_t>(memory) + bytes) / kBytes * kBytes) {}
};

// A hint only: errors are ignored, contents are not touched.
inline void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePageBytes || (bytes > kMostReportedBytes && reports_free_pages())) return;
  const Pages pages(memory, bytes);
  if (pages.begin < pages.end) madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// Whether a page of private memory is there: false for what has just come from the system.
inline bool has_page([[maybe_unused]] uintptr_t page) {
#if defined(__linux__)
  unsigned char is_there = 0;
  return mincore(reinterpret_cast<void*>(page), 1, &is_there) == 0 && (is_there & 1) != 0;
#else
  return false;
#endif
}

// Gives fresh memory its pages in one system call, just before it is overwritten: one fault per page costs nearly twice
// as much (measured: 0.6 s a GB against 1.0 s). Contents are not changed; where the pages are there already, or the
// system has no such call (Linux before 5.14), nothing happens. Pieces should stay in the cache until they are written.
// Returns whether the pages were there.
inline bool populate_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE
  const Pages pages(memory, bytes);
  if (pages.begin + 8 * Pages::kBytes >= pages.end) return false;
  if (has_page(pages.begin) && has_page(pages.end - Pages::kBytes)) return true;
  madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, kPopulateWrite);
#else
  (void)memory, (void)bytes;
#endif
  return false;
}

}  // namespace fastmoe_route
