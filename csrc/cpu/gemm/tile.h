// What the two vector forms of the matrix product share: register barriers, prefetch, and the copy of rows.
#pragma once

#include <type_traits>

#include "common/cache.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN

// How many Vec the registers of a level hold: the tiles are made for it.
#if defined(__AVX512F__)
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorRegisters = 8;  // two halves each
#endif

// Keeps a loaded vector in a register: left alone, gcc loads it again as the memory operand of every product it is in.
inline void keep_in_register([[maybe_unused]] Vec& value) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(value.v));
#elif defined(__AVX2__)
  __asm__("" : "+x"(value.v));
#endif
}

// f(RowCount<n>) for a tile of n rows, 1 to kMost <= 6: one instance of a kernel per number of rows.
template <int R>
struct RowCount {
  static constexpr int value = R;
};
template <int kMost, class F>
inline __attribute__((always_inline)) void with_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1: return f(RowCount<1>{});
    case 2: return f(RowCount<(kMost >= 2 ? 2 : 1)>{});
    case 3: return f(RowCount<(kMost >= 3 ? 3 : 1)>{});
    case 4: return f(RowCount<(kMost >= 4 ? 4 : 1)>{});
    case 5: return f(RowCount<(kMost >= 5 ? 5 : 1)>{});
    default: return f(RowCount<kMost>{});
  }
}

// Asks for the cache line at p: into L2 and beyond (it will be used later), or into L1. Where the page of p was not
// used lately, Zen 4 stands still for 60 to 350 cycles on the first (PREFETCHT1, measured); on the second it goes on
// while it looks for the page, if that is one page at a time. always_inline is not a matter of speed: gcc takes a
// function that only prefetches for one without effects, and removes calls not yet inlined.
inline __attribute__((always_inline)) void prefetch_later(const void* p) { __builtin_prefetch(p, 0, 2); }
inline __attribute__((always_inline)) void prefetch_soon(const void* p) { __builtin_prefetch(p, 0, 3); }

// prefetch_waits_for_page() where elements T are multiplied. Half of the kinds of tiles need no compiling where that is
// known: of processors with AVX-512, those that wait multiply bfloat16 in pairs (avx512_bf16.cpp), the others widen it
// or have AMX; the portable level is tuned for none.
template <class T>
constexpr bool waits_for_page() {
  if (kVectorRegisters == 8) return true;
#if defined(__AVX512BF16__)
  return true;
#else
  if (kVectorRegisters == 32 && std::is_same_v<T, BFloat16>) return false;
  return prefetch_waits_for_page();
#endif
}

// Fetches rows of weights that are multiplied later into L2, line by line, in runs: a row, or all of them where they
// have no gaps. A line that goes to L2 had better find its page known (prefetch_later), so pages are touched one at a
// time, kAhead pages or rows before their lines: then finding them costs nothing.
struct LineFetcher {
  static constexpr bool kAtEveryStep = false;
  static constexpr int64_t kPage = 4096, kAhead = 4;
  const char* line;
  int64_t run_lines, left;  // of every run, and of the current one
  int64_t row_bytes, stride;
  int64_t runs;         // left
  const char* touched;  // what lies before it is known
  const char* end;      // of all that may be touched

  // The first `count` of `all` rows; is_touched: the fetcher of the rows before has touched the first pages of these.
  template <class T>
  LineFetcher(const T* first, int64_t count, int64_t all, int64_t w_stride, int64_t k, bool is_touched)
      : line(reinterpret_cast<const char*>(first)), row_bytes(k * static_cast<int64_t>(sizeof(T))),
        stride(w_stride * static_cast<int64_t>(sizeof(T))), runs(count), touched(line), end(line + all * stride) {
    run_lines = ((is_whole() ? row_bytes * count : row_bytes) + 63) / 64;
    left = run_lines;
    if (is_whole() && count > 0) runs = 1;
    if (is_touched) touched += kAhead * (is_whole() ? kPage : stride);
  }
  bool is_whole() const { return row_bytes == stride; }
  int64_t num_lines() const { return runs * run_lines; }

  inline __attribute__((always_inline)) void touch() {
    if (is_whole()) {
      for (; touched < line + kAhead * kPage && touched < end; touched += kPage) prefetch_soon(touched);
    } else {
      for (; touched < line + kAhead * stride && touched < end; touched += stride) {
        for (int64_t at = 0; at < row_bytes; at += kPage) prefetch_soon(touched + at);
        prefetch_soon(touched + row_bytes - 1);
      }
    }
  }
  // Few branches: this runs between the products, hundreds of times a panel.
  inline __attribute__((always_inline)) void fetch(int64_t lines) {
    if (runs == 0) return;
    touch();
    while (lines > 0) {
      const int64_t count = lines < left ? lines : left;
      for (const char* const stop = line + count * 64; line < stop; line += 64) prefetch_later(line);
      lines -= count;
      left -= count;
      if (left > 0) return;
      if (--runs == 0) return;
      line += stride - run_lines * 64;
      left = run_lines;
    }
  }
};

// The same where a prefetch does not stand still for its page (Intel): kRuns parts of the rows in turn, a line at each
// step of a product. Slow enough for the processor to follow every part ahead of the lines asked for, and to find its
// next page; it has more requests to memory under way than the level-1 cache's misses (16), which prefetches share with
// the product's own loads. Measured with 30 rows: 82% of the arithmetic peak, one part at every step 66%, in bursts
// 60%. Asks for up to kRuns - 1 rows past the last one.
struct TurnFetcher {
  static constexpr bool kAtEveryStep = true;
  static constexpr int64_t kRuns = 4;
  const char* row;   // of the first part, that is being fetched
  const char* line;  // next
  const char* wrap;  // end of the last part
  int64_t apart;     // bytes from part to part
  int64_t stride;
  int64_t run_lines, left;  // of a row in every part (of all rows if they have no gaps), and of the current one
  int64_t runs;             // left

  template <class T>
  TurnFetcher(const T* first, int64_t count, int64_t, int64_t w_stride, int64_t k, bool)
      : row(reinterpret_cast<const char*>(first)), line(row), stride(w_stride * static_cast<int64_t>(sizeof(T))) {
    const int64_t row_bytes = k * static_cast<int64_t>(sizeof(T)), rows = (count + kRuns - 1) / kRuns;
    const bool is_whole = row_bytes == stride;
    apart = rows * stride;
    wrap = row + kRuns * apart;
    run_lines = kRuns * (((is_whole ? apart : row_bytes) + 63) / 64);
    left = run_lines;
    runs = is_whole && rows > 0 ? 1 : rows;
  }
  int64_t num_lines() const { return runs * run_lines; }

  // How many of the next `steps` steps call next() `at_once` times each, for about `lines` lines in all.
  int64_t begin(int64_t steps, int64_t lines, int64_t at_once) {
    if (left <= 0 && runs > 0) {
      --runs;
      row += stride;
      line = row;
      left = run_lines;
    }
    if (runs == 0) return 0;
    int64_t most = lines < left ? lines : left;
    if (at_once > 1) most = (most + at_once - 1) / at_once;
    const int64_t count = steps < most ? steps : most;
    left -= count * at_once;
    return count;
  }
  inline __attribute__((always_inline)) void next() {
    prefetch_later(line);
    line += apart;
    line = line >= wrap ? line - (kRuns * apart - 64) : line;
  }
};

// Element q of a row as it enters the product: times the row's scale, rounded to the element type, widened.
template <class T>
struct RowReader {
  using A = accumulate_t<T>;
  const T* row;
  A scale;
  bool scaled;

  RowReader(const void* const* rows, const void* scales, int64_t i)
      : row(static_cast<const T*>(rows[i])), scale(scales != nullptr ? static_cast<const A*>(scales)[i] : A(1)),
        scaled(scales != nullptr) {}

  // count lanes from q, the rest zero.
  Vec load(int64_t q, int count) const {
    Vec value = count == Vec::kLanes ? Vec::load(row + q) : Vec::load(row + q, count);
    if (!scaled) return value;
    value = value * Vec::all(static_cast<float>(scale));
    T rounded[Vec::kLanes];
    value.store(rounded);
    return Vec::load(rounded);
  }
  A element(int64_t q) const {
    const A value = to_float(row[q]);
    return scaled ? A(to_float(from_float<T>(A(value * scale)))) : value;
  }
};

FASTMOE_ROUTE_ISA_END
