// The dot form (dot.h) of few rows: one tile that goes through the weights once, in two to four long streams, at the
// speed of memory.
//
// The processor follows a stream by itself, but stops at the end of a 4 KB page and then waits for the next page's
// address. Where a prefetch would wait for it too, pages are touched ahead, and every line is fetched if rows take
// arithmetic as well. Elsewhere (Intel) every line is fetched twice, which finds the pages besides: into L2, where
// more of them can be under way than the 16 misses of L1, and a little later into L1, so that no product waits. Near
// the end of a row, or of a block of k, what is fetched lies where the stream goes on.
#pragma once

#include "common/cache.h"
#include "cpu/gemm/dot_tile.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr int kDotStreamRows = kVectorRegisters == 32 ? 12 : kDotRows;
constexpr int64_t kDotStreamBytes = 24 << 10;  // of packed rows, all of k, that stay in L1 while streams pass
constexpr int64_t kDotTouchBytes = 16384;      // of each stream, touched together
constexpr int64_t kDotTogether = 8;            // weights of a stream that a block of k of long rows stays in L1 for

// Whether m rows are one tile. Up to kDotRows always; more only if they stay in L1 while streams pass. In the larger L1
// of Intel up to eight do. Longer rows are faster as one tile there too, block by block of k; but of 2-byte elements,
// whose rows take twice the lines of the weights, panels are if they hold all of k. More rows take fewer streams, and
// panels are as fast.
template <class Math>
inline bool dot_is_stream(int64_t m, int64_t k) {
  if (m <= kDotRows) return true;
  if (m > kDotStreamRows) return false;
  const bool is_eight = m <= 8 && !waits_for_page<typename Math::Element>();
  if (is_eight && (sizeof(typename Math::Element) == sizeof(float) || k > 2 * Math::kMaxBlock)) return true;
  const int64_t row_bytes = round_up(k, Math::kStep) * static_cast<int64_t>(sizeof(typename Math::Packed));
  return m * row_bytes <= (is_eight ? level1_cache_bytes() / 4 * 3 : kDotStreamBytes);
}
// Its rows: m or one more, the last row twice, so that there are fewer kinds of tiles.
inline int64_t dot_stream_tile(int64_t m) { return m > 2 && kDotStreamRows > kDotRows ? round_up(m, 2) : m; }
template <class F>
inline void with_stream_tile(int64_t m, const F& f) {
  constexpr bool kLong = kDotStreamRows == 12;
  switch (dot_stream_tile(m)) {
    case 1: return f(RowCount<1>{});
    case 2: return f(RowCount<(kDotStreamRows > 1 ? 2 : 1)>{});
    case 3: return f(RowCount<(kDotStreamRows == 3 ? 3 : 1)>{});
    case 4: return f(RowCount<(kLong ? 4 : 1)>{});
    case 6: return f(RowCount<(kLong ? 6 : 1)>{});
    case 8: return f(RowCount<(kLong ? 8 : 1)>{});
    case 10: return f(RowCount<(kLong ? 10 : 1)>{});
    default: return f(RowCount<kDotStreamRows>{});
  }
}
// Weights of that tile: its sums fill the registers.
constexpr int dot_stream_cols(int rows) { return rows <= 6 ? 4 : rows <= 8 ? 3 : 2; }

// Touches every page of rows [from, to) of those that start at `first`, one line each, for streams of few rows. The
// address of a page that was not used lately takes longer to find than other work can hide, but several are found at
// the same time: pages are touched together, some rows ahead of their use. Rows without gaps are one run, however many
// of them share a page.
inline __attribute__((always_inline)) void touch_pages(const char* first, int64_t row_bytes, int64_t stride,
                                                       int64_t from, int64_t to) {
  constexpr int64_t kPage = 4096;
  const bool is_run = row_bytes == stride;
  const int64_t runs = from < to && is_run ? 1 : to - from, bytes = is_run ? (to - from) * stride : row_bytes;
  for (int64_t i = 0; i < runs; ++i) {
    const char* begin = first + (from + i) * stride;
    for (int64_t at = 0; at < bytes; at += kPage) prefetch_later(begin + at);
    prefetch_later(begin + bytes - 1);
  }
}

// Two to four weights at a time that lie far apart: long streams keep one core's memory reads busy. All of k goes by
// for one weight of a stream after the other, while the rows stay in L1; where they do not, block by block of k for
// kDotTogether weights. Where pages are touched, the first of the streams that come after are, kTouchAfter steps before
// the end.
template <int R, DotFetch kFetch, class Math>
void dot_few_rows(const DotProblem<Math>& p, int64_t m) {
  constexpr int C = dot_stream_cols(R);
  constexpr int64_t kTouchAfter = 4;
  constexpr bool kTouches = kFetch != DotFetch::kTwice;
  constexpr int64_t kSize = sizeof(typename Math::Element);
  const int64_t apart = (p.n + C - 1) / C;
  const int64_t row_bytes = p.k * kSize, stride = p.w_stride * kSize;
  const int64_t group = row_bytes < kDotTouchBytes ? kDotTouchBytes / row_bytes : 1;  // rows touched together
  const int64_t packed_bytes = R * round_up(p.k, Math::kStep) * static_cast<int64_t>(sizeof(typename Math::Packed));
  const int64_t together = kTouches || packed_bytes <= level1_cache_bytes() / 4 * 3 ? 1 : kDotTogether;
  TurnFetcher none(p.w, 0, 0, p.w_stride, p.k, false);
  const int64_t touch_after = p.after == nullptr ? -1 : apart > kTouchAfter ? apart - kTouchAfter : 0;
  const auto touch = [&](const typename Math::Element* weights, int64_t from, int64_t to)
                         __attribute__((always_inline)) {
                           for (int i = 0; i < C; ++i)
                             touch_pages(reinterpret_cast<const char*>(weights + i * apart * p.w_stride), row_bytes,
                                         stride, from, to < apart ? to : apart);
                         };
  for (int64_t first = 0; first < apart; first += together) {
    const int64_t end = first + together < apart ? first + together : apart;
    if (kTouches && first % group == 0) touch(p.w, first > 0 ? first + group : 0, first + 2 * group);
    if (kTouches && first == touch_after) touch(p.after, 0, group);
    for (int64_t q = 0; q < p.k; q += p.block) {
      const int64_t depth = p.k - q < p.block ? p.k - q : p.block;
      for (int64_t j = first; j < end; ++j) {
        const typename Math::Element* w[C];
        DotOutput out{{}, p.c_stride, 0, static_cast<int>(m), q > 0, nullptr, 0, nullptr};
        for (int i = 0; i < C; ++i) {
          const int64_t column = j + i * apart;
          const bool exists = column < p.n;
          w[i] = p.w + (exists ? column : j) * p.w_stride + q;
          out.c[i] = p.c + (exists ? column : j);
          out.count += exists;
        }
        const typename Math::Element* next = w[0] + p.w_stride;
        if (j + 1 == end) {
          if (q + depth < p.k) next = p.w + first * p.w_stride + q + depth;
          else if (end < apart || p.after == nullptr) next = p.w + end * p.w_stride;
          else next = p.after;
        }
        out.jump = (next - w[0] - depth) * kSize;
        dot_tile<R, C, kFetch, Math>(p.a + q * R, w, depth, none, DotLines{}, out);
      }
    }
  }
}

FASTMOE_ROUTE_ISA_END
