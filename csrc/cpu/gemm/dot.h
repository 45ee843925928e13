// Products with reduction-contiguous weights (nn.Linear's layout): vectors run along k, one accumulator per output, so
// weights are read in place, in order, and never packed.
//
// Order of summation: k is cut into equal blocks of at most 4 KB of packed row. In a block, lane l of an accumulator
// sums lanes l of the block's vectors, ascending, from +0; the lanes are added by one fixed tree; block sums are added
// in order. Every tile shape follows it, so a row's result depends on nothing but its own elements. It also errs 3 to
// 10 times less than one running sum.
//
// `Math` is what a vector holds: floats, or 2-byte elements widened to them as they are loaded (below); or pairs of
// bfloat16 (avx512_bf16.cpp).
//
// Tiles of up to kDotRows rows by 4 weights. Rows are packed as [tile][vector of k][row][lane]: a tile's k block is
// 24 KB that passes through L1 again and again while a panel of weights passes from L2. Few rows are one tile and go
// through the weights once, in two to four long streams, at the speed of memory.
#pragma once

#include "common/cache.h"
#include "common/workspace.h"
#include "cpu/gemm/lane_sums.h"
#include "cpu/gemm/tile.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr int kDotRows = kVectorRegisters == 32 ? 6 : kVectorRegisters == 16 ? 3 : 1;
constexpr int kDotCols = 4;
constexpr int kDotStreamRows = kVectorRegisters == 32 ? 12 : kDotRows;
constexpr int64_t kDotStreamBytes = 24 << 10;  // of packed rows, all of k, that stay in L1 while streams pass
// Weights whose block of k stays in L2 while all rows pass; half of it, two blocks. With the panel fetched meanwhile
// that is a quarter of an L2 of 1 MB: pages of 4 KB lie in it by chance, and fuller it loses lines before their use.
// An L2 of 2 MB holds twice as many.
constexpr int64_t kDotPanel = 32, kDotMaxPanel = 64;
constexpr int64_t kDotSegment = 16;  // steps of k between two fetches of what is multiplied later
// Rows from which tiles read a widened copy of the weights, which the first tile stores. With fewer the stores, past
// L1, take longer than widening again.
constexpr int64_t kDotWidenRows = 32;
constexpr int64_t kDotRowBlock = 192;  // rows, at most, whose k block stays in L2 beside them
// Few rows: the processor follows a stream by itself, but stops at the end of a 4 KB page and then waits for the next
// page's address. Where a prefetch would wait for it too, pages are touched ahead, and every line is fetched if rows
// take arithmetic as well. Elsewhere (Intel) every line is fetched twice, which finds the pages besides: into L2, where
// more of them can be under way than the 16 misses of L1, and a little later into L1, so that no product waits. Near
// the end of a row, or of a block of k, what is fetched lies where the stream goes on.
constexpr int64_t kDotTouchBytes = 16384;           // of each stream, touched together
constexpr int64_t kDotFar = 1536, kDotNear = 1024;  // bytes from what is multiplied to what is fetched into L2, L1
constexpr int64_t kDotTogether = 8;  // weights of a stream that a block of k of long rows stays in L1 for

// Floats, and 2-byte elements widened to floats as they are loaded. A step of k is kVectors vectors, which a lane adds
// one after the other; packed rows are [step][vector][row][lane].
template <class T>
struct WidenedMath {
  using Element = T;
  using Packed = float;
  using Value = Vec;
  static constexpr int64_t kStep = Vec::kLanes;  // elements of k in a step
  static constexpr int kVectors = 1;
  static constexpr int64_t kSpread = 1;          // steps of weights lie kSpread kStep elements apart
  static constexpr bool kWidens = false;         // whether the first tile of many rows stores floats
  static constexpr int64_t kStreamAhead = 2048;  // bytes from what few rows multiply to what they fetch
  static constexpr int64_t kMaxBlock = 1024;

  static Vec load(const T* p, int) { return Vec::load(p); }
  static Vec load(const T* p, int, int count) { return Vec::load(p, count); }
  static Vec load_packed(const float* p) { return Vec::load(p); }
  static Vec add_products(Vec row, Vec weight, Vec sum) { return fma(row, weight, sum); }
  static void keep(Vec& value) { keep_in_register(value); }
  // The count elements of row i from q on, the rest zero; the vectors of a step `apart` elements from each other.
  static void pack(const void* const* rows, const void* scales, int64_t i, int64_t q, int count, float* to, int64_t) {
    RowReader<T>(rows, scales, i).load(q, count).store(to);
  }
};

// Widened weights of a panel: [kDotCols columns][step][column][lane], one run for a tile.
struct PanelMath : WidenedMath<float> {
  static constexpr int64_t kSpread = kDotCols;
};

// A vector of bfloat16 pairs is two of floats, first the odd elements, then the even ones: one instruction each, where
// neighbours would take two. Many rows would repeat it for every tile, so the first one stores what it widened.
template <>
struct WidenedMath<BFloat16> {
  using Element = BFloat16;
  using Packed = float;
  using Value = Vec;
  static constexpr int64_t kStep = 2 * Vec::kLanes;
  static constexpr int kVectors = 2;
  static constexpr int64_t kSpread = 1;
  static constexpr bool kWidens = kVectorRegisters > 8;
  static constexpr int64_t kStreamAhead = 1024;
  static constexpr int64_t kMaxBlock = 1024;

  static Vec load(const BFloat16* p, int vector, int count = kStep) {
    return Vec::load_alternate(p, 1 - vector, count);
  }
  static Vec load_packed(const float* p) { return Vec::load(p); }
  static Vec add_products(Vec row, Vec weight, Vec sum) { return fma(row, weight, sum); }
  static void keep(Vec& value) { keep_in_register(value); }
  static void pack(const void* const* rows, const void* scales, int64_t i, int64_t q, int count, float* to,
                   int64_t apart) {
    const RowReader<BFloat16> row(rows, scales, i);
    const BFloat16* elements = row.row + q;
    BFloat16 scaled[kStep];
    if (row.scaled) {
      constexpr int L = Vec::kLanes;
      row.load(q, count < L ? count : L).store(scaled);
      if (count > L) row.load(q + L, count - L).store(scaled + L);
      elements = scaled;
    }
    for (int v = 0; v < kVectors; ++v) load(elements, v, count).store(to + v * apart);
  }
};

// C weights against the R rows of a tile over one block of k; the first `rows` rows and count <= C of the outputs exist
// (the pointers of the others repeat a valid one). soon: the next of the rows that the tile after this one multiplies,
// or null.
struct DotOutput {
  float* c[kDotCols];  // row 0
  int64_t stride;
  int count;
  int rows;
  bool add;
  const char* soon;
  int64_t jump;    // bytes from the end of these weights to those that kTwice fetches next
  float* widened;  // where a tile of DotFetch::kWiden stores the weights: [step][vector][column][lane]
};

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

// Lines of the next panel that a tile fetches: `at_once` at every segment of k; or `all` of them, at every step
// `at_once` or, once that is enough for the rest, one less: between steps without any, memory would wait.
struct DotLines {
  int64_t at_once, all;
};

// What a tile asks for before it is needed.
enum class DotFetch {
  kPanel,   // `lines` of `later`, not in one burst, which would fill the queue to memory; and the results' lines. The
            // processor brings the tile's weights from L2 to L1 in time by itself.
  kWiden,   // the same, and the weights are stored, widened, for the tiles that follow
  kNone,    // no lines; pages are touched, as for kStream
  kStream,  // every line, Math::kStreamAhead bytes on
  kTwice    // every line, kDotFar bytes on and kDotNear bytes on
};

template <int R, int C, DotFetch kFetch, class Math, class Later>
inline __attribute__((always_inline)) void dot_tile(const typename Math::Packed* a,
                                                    const typename Math::Element* const* w, int64_t k, Later& later,
                                                    DotLines lines, const DotOutput& out) {
  constexpr int64_t L = Math::kStep, kLane = L / Math::kVectors;
  const auto bytes = [&](int j, int64_t q) { return reinterpret_cast<const char*>(w[j] + q * Math::kSpread); };
  constexpr bool kIsPanel = kFetch == DotFetch::kPanel || kFetch == DotFetch::kWiden;
  if (kIsPanel)
    for (int i = 0; i < R; ++i) __builtin_prefetch(out.c[0] + i * out.stride, 1, 3);
  Vec sums[R][C];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sums[i][j] = Vec::zero();
  const auto step = [&](const typename Math::Value* weights, const typename Math::Packed* rows)
                        __attribute__((always_inline)) {
#pragma GCC unroll 12
                          for (int i = 0; i < R; ++i) {
                            typename Math::Value row = Math::load_packed(rows + i * kLane);
                            Math::keep(row);
#pragma GCC unroll 4
                            for (int j = 0; j < C; ++j) sums[i][j] = Math::add_products(row, weights[j], sums[i][j]);
                          }
                        };
  constexpr int64_t kSize = sizeof(typename Math::Element);
  const int64_t whole = k / L * L, far_end = k - kDotFar / kSize, near_end = k - kDotNear / kSize;
  int64_t q = 0;
  const auto steps_to = [&](int64_t end, const auto& fetch) __attribute__((always_inline)) {
    for (; q < end; q += L) {
      fetch();
      const int64_t far = kDotFar + (q < far_end ? 0 : out.jump), near = kDotNear + (q < near_end ? 0 : out.jump);
      typename Math::Value weights[C];
#pragma GCC unroll 2
      for (int v = 0; v < Math::kVectors; ++v) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) {
          weights[j] = Math::load(w[j] + q * Math::kSpread, v);
          Math::keep(weights[j]);
          if constexpr (kFetch == DotFetch::kWiden) weights[j].store(out.widened + (q + v * kLane) * C + j * kLane);
          if (kFetch == DotFetch::kStream && v == 0) prefetch_later(bytes(j, q) + Math::kStreamAhead);
          if (kFetch == DotFetch::kTwice && v == 0) {
            prefetch_later(bytes(j, q) + far);
            prefetch_soon(bytes(j, q) + near);
          }
        }
        step(weights, a + (q + v * kLane) * R);
      }
    }
  };
  const auto nothing = []() __attribute__((always_inline)) {};
  if constexpr (kIsPanel && !Later::kAtEveryStep) {
    while (q < whole) {
      later.fetch(lines.at_once);
      steps_to(whole - q < kDotSegment * L ? whole : q + kDotSegment * L, nothing);
    }
  } else {
    int64_t at_once = lines.at_once;
    for (int64_t left = kIsPanel ? lines.all : 0; left > 0 && q < whole;) {
      const int64_t steps_left = (whole - q) / L, more = left - (at_once - 1) * steps_left;
      if (more <= 0) {
        --at_once;
        continue;
      }
      const int64_t steps = later.begin(more < steps_left ? more : steps_left, left, at_once);
      if (steps == 0) break;
      left -= steps * at_once;
      steps_to(q + steps * L, [&]() __attribute__((always_inline)) {
        for (int64_t i = 0; i < at_once; ++i) later.next();
      });
    }
    if (kIsPanel && out.soon != nullptr) {
      const char* soon = out.soon;
      steps_to(whole, [&]() __attribute__((always_inline)) {
        for (int v = 0; v < Math::kVectors; ++v, soon += sizeof(Vec)) prefetch_soon(soon);
      });
    } else {
      steps_to(whole, nothing);
    }
  }
  if (q < k) {
    typename Math::Value weights[C];
#pragma GCC unroll 2
    for (int v = 0; v < Math::kVectors; ++v) {
      for (int j = 0; j < C; ++j) {
        weights[j] = Math::load(w[j] + q * Math::kSpread, v, static_cast<int>(k - q));
        if constexpr (kFetch == DotFetch::kWiden) weights[j].store(out.widened + (q + v * kLane) * C + j * kLane);
      }
      step(weights, a + (q + v * kLane) * R);
    }
  }
  if constexpr (kIsPanel && C == kDotCols)
    if (out.count == C) return finish_tile<R>(sums, out.c[0], out.stride, out.add);
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
    if (i >= out.rows) break;
    float* c[kDotCols];
    for (int j = 0; j < C; ++j) c[j] = out.c[j] + i * out.stride;
    finish_dots<C>(sums[i], c, out.count, out.add);
  }
}

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

// Of the tiles of more rows than that. They are even (dot_tiles), so none has less than half of kDotRows.
template <class F>
inline __attribute__((always_inline)) void with_panel_tile(int64_t rows, const F& f) {
  constexpr int kFewest = (kDotRows + 1) / 2;
  switch (rows) {
    case kFewest: return f(RowCount<kFewest>{});
    case 4: return f(RowCount<(kDotRows == 6 ? 4 : kFewest)>{});
    case 5: return f(RowCount<(kDotRows == 6 ? 5 : kFewest)>{});
    default: return f(RowCount<kDotRows>{});
  }
}

template <class Math>
struct DotProblem {
  const typename Math::Packed* a;
  const typename Math::Element* w;
  int64_t w_stride, n, k;
  float* c;
  int64_t c_stride;
  int64_t block;                        // elements of k in a block: whole vectors, a function of k alone
  int64_t panel;                        // weights of a panel of one block
  int64_t panel_blocks;                 // blocks of k that a panel holds, at most
  const typename Math::Element* after;  // weights that come after these, or null
};

// Row tiles of many rows: tile t of n holds rows [m t / n, m (t + 1) / n). Even tiles, because a tile of
// one or two rows would wait for its weights.
inline int64_t dot_tiles(int64_t m) { return (m + kDotRows - 1) / kDotRows; }
inline int64_t dot_row_blocks(int64_t m) { return (m + kDotRowBlock - 1) / kDotRowBlock; }

template <class Math>
inline int64_t dot_block(int64_t k) {
  const int64_t blocks = (k + Math::kMaxBlock - 1) / Math::kMaxBlock;
  return round_up((k + blocks - 1) / blocks, Math::kStep);
}

// Two to four weights at a time that lie far apart: long streams keep one core's memory reads busy. All of k goes by
// for one weight of a stream after the other, while the rows stay in L1; where they do not, block by block of k for
// kDotTogether weights. The first pages of the streams that come after are touched kTouchAfter steps before the end.
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

// One panel of weights over one block of k against all rows: a tile's rows stay in L1 while the panel passes from L2.
// `next_lines` lines of what comes next are fetched into L2 meanwhile. Weights that are widened are stored so by the
// first tile, and the others read them: [kDotCols columns][step][column][lane].
template <class Math, class Later>
void dot_panel(const DotProblem<Math>& p, int64_t m, int64_t q, int64_t depth, int64_t panel, int64_t columns,
               Later& fetcher, int64_t next_lines) {
  const typename Math::Element* const w = p.w + panel * p.w_stride + q;
  const int64_t padded = round_up(p.k, Math::kStep), deep = round_up(depth, Math::kStep), tiles = dot_tiles(m);
  const bool widens = Math::kWidens && m >= kDotWidenRows;
  float* const widened =
      widens ? static_cast<float*>(scratch(Scratch::kMicroKernel, kDotMaxPanel * Math::kMaxBlock * sizeof(float)))
             : nullptr;
  const int64_t across = (columns + kDotCols - 1) / kDotCols;
  const int64_t tile_lines = (next_lines + tiles * across - 1) / (tiles * across);
  // Rows of all k that take more than a quarter of a large L2 come from L3 again for every block of k. Their lines are
  // asked for one at every step of the columns before that fetches no panel, for many at once would wait for L3.
  const bool fetches_rows = Later::kAtEveryStep && has_large_level2() &&
                            m * padded * static_cast<int64_t>(sizeof(typename Math::Packed)) > level2_cache_bytes() / 4;
  Later later = fetcher;  // a copy stays in registers
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = m * tile / tiles, rows = m * (tile + 1) / tiles - first;
    const bool is_widened = widens && tile > 0;
    const int64_t steps = deep / (is_widened ? PanelMath::kStep : Math::kStep);
    const int64_t row_segments = m * across * ((steps + kDotSegment - 1) / kDotSegment);
    const DotLines lines{
        Later::kAtEveryStep ? (tile_lines + steps - 1) / steps : (next_lines * rows + row_segments - 1) / row_segments,
        tile_lines};
    const typename Math::Packed* a = p.a + first * padded + q * rows;
    const int64_t after = first + rows, after_rows = m * (tile + 2) / tiles - after;
    const bool has_soon = fetches_rows && tile + 1 < tiles;
    const char* soon = has_soon ? reinterpret_cast<const char*>(p.a + after * padded + q * after_rows) : nullptr;
    with_panel_tile(rows, [&](auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      for (int64_t j = 0; j < columns; j += kDotCols) {
        const int exist = static_cast<int>(columns - j < kDotCols ? columns - j : kDotCols);
        DotOutput out{{}, p.c_stride, exist, R, q > 0, nullptr, 0, widens ? widened + j * deep : nullptr};
        if (has_soon && columns - j <= kDotRows * kDotCols) {
          out.soon = soon;
          soon += deep / Math::kStep * Math::kVectors * static_cast<int64_t>(sizeof(Vec));
        }
        for (int i = 0; i < kDotCols; ++i) out.c[i] = p.c + first * p.c_stride + panel + j + (i < exist ? i : 0);
        if constexpr (Math::kWidens) {
          if (is_widened) {
            const float* from[kDotCols];
            for (int i = 0; i < kDotCols; ++i) from[i] = out.widened + i * PanelMath::kStep;
            dot_tile<R, kDotCols, DotFetch::kPanel, PanelMath>(a, from, deep, later, lines, out);
            continue;
          }
        }
        const typename Math::Element* from[kDotCols];
        for (int i = 0; i < kDotCols; ++i) from[i] = w + (j + (i < exist ? i : 0)) * p.w_stride;
        if constexpr (Math::kWidens) {
          if (widens) {
            dot_tile<R, kDotCols, DotFetch::kWiden, Math>(a, from, depth, later, lines, out);
            continue;
          }
        }
        dot_tile<R, kDotCols, DotFetch::kPanel, Math>(a, from, depth, later, lines, out);
      }
    });
  }
  fetcher = later;
}

// Weights of a panel that is `depth` elements of k deep.
template <class Math>
inline int64_t dot_panel_columns(const DotProblem<Math>& p, int64_t depth) {
  return depth > p.block ? p.panel / 2 : p.panel;
}
// Blocks of k in a panel of m rows: two, because rows of 4 KB that lie 8 KB apart would share half of the sets of L2;
// but every panel reads all rows again, and from an L2 of 2 MB one block of many rows comes faster than two from L3.
template <class Math>
inline int64_t dot_panel_blocks(int64_t m, int64_t block) {
  const int64_t rows_bytes = 2 * m * block * static_cast<int64_t>(sizeof(typename Math::Packed));
  return has_large_level2() && rows_bytes > level2_cache_bytes() / 4 ? 1 : 2;
}
// Elements of k, from q on, that a panel holds.
template <class Math>
inline int64_t dot_panel_depth(const DotProblem<Math>& p, int64_t q) {
  return p.k - q < p.panel_blocks * p.block ? p.k - q : p.panel_blocks * p.block;
}

// Panels of weights, elements [begin, begin + depth) of k, against all rows.
template <class Later, class Math>
void dot_panels(const DotProblem<Math>& p, int64_t m, int64_t begin, int64_t depth) {
  const int64_t most = dot_panel_columns(p, depth), end = begin + depth;
  for (int64_t panel = 0; panel < p.n; panel += most) {
    const int64_t columns = p.n - panel < most ? p.n - panel : most;
    const typename Math::Element* next = p.w + (panel + most) * p.w_stride + begin;
    int64_t left = p.n - panel - most, next_begin = begin;
    if (left <= 0) {  // deeper in k, or what comes after
      next_begin = end < p.k ? end : 0;
      next = end < p.k ? p.w + end : p.after;
      left = next != nullptr ? p.n : 0;
    }
    const int64_t next_depth = dot_panel_depth(p, next_begin), next_most = dot_panel_columns(p, next_depth);
    const bool is_touched = panel > 0 && panel + most < p.n;  // by the fetcher of the panel before
    Later later(next, left < next_most ? left : next_most, left, p.w_stride, next_depth, is_touched);
    const int64_t next_lines = later.num_lines();
    for (int64_t q = begin; q < end; q += p.block) {
      const int64_t block = end - q < p.block ? end - q : p.block;
      const int64_t lines = (next_lines * block + depth - 1) / depth;
      dot_panel(p, m, q, block, panel, columns, later, lines);
    }
  }
}

// Blocks of k, then panels of weights: the rows' blocks and the panel share L2.
template <class Math>
void dot_many_rows(const DotProblem<Math>& p, int64_t m) {
  for (int64_t q = 0; q < p.k; q += p.panel_blocks * p.block)
    if (waits_for_page<typename Math::Element>()) dot_panels<LineFetcher>(p, m, q, dot_panel_depth(p, q));
    else dot_panels<TurnFetcher>(p, m, q, dot_panel_depth(p, q));
}

template <class Math>
void dot_multiply(const void* packed, int64_t m, const void* w, int64_t w_stride, int64_t n, int64_t k, void* c,
                  int64_t c_stride, const void* after) {
  using Element = typename Math::Element;
  const DotProblem<Math> problem{static_cast<const typename Math::Packed*>(packed),
                                 static_cast<const Element*>(w),
                                 w_stride,
                                 n,
                                 k,
                                 static_cast<float*>(c),
                                 c_stride,
                                 dot_block<Math>(k),
                                 has_large_level2() ? kDotMaxPanel : kDotPanel,
                                 2,
                                 static_cast<const Element*>(after)};
  if (dot_is_stream<Math>(m, k))
    return with_stream_tile(m, [&](auto count) {
      constexpr int R = decltype(count)::value;
      constexpr DotFetch kWaits = R <= 2 ? DotFetch::kNone : DotFetch::kStream;
      if (waits_for_page<Element>()) dot_few_rows<R, kWaits>(problem, m);
      else dot_few_rows<R, DotFetch::kTwice>(problem, m);
    });
  const int64_t padded = round_up(k, Math::kStep), blocks = dot_row_blocks(m);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = m * b / blocks;
    DotProblem<Math> part = problem;
    part.a += first * padded;
    part.c += first * c_stride;
    if (b + 1 < blocks) part.after = part.w;
    const int64_t rows = m * (b + 1) / blocks - first;
    part.panel_blocks = dot_panel_blocks<Math>(rows, part.block);
    dot_many_rows(part, rows);
  }
}

template <class Math>
int64_t dot_packed_bytes(int64_t m, int64_t k) {
  const int64_t rows = dot_is_stream<Math>(m, k) ? dot_stream_tile(m) : m;
  return rows * round_up(k, Math::kStep) * static_cast<int64_t>(sizeof(typename Math::Packed));
}

// Rows [first, end) as one tile of `rows`; the last one again where there are fewer.
template <class Math>
void dot_pack_tile(const void* const* rows_of, const void* scale, int64_t first, int64_t end, int64_t rows, int64_t k,
                   typename Math::Packed* to) {
  constexpr int64_t L = Math::kStep;
  constexpr int64_t kLane = L / Math::kVectors;
  for (int64_t i = 0; i < rows; ++i, to += kLane)
    for (int64_t q = 0; q < k; q += L)
      Math::pack(rows_of, scale, first + i < end ? first + i : end - 1, q, static_cast<int>(k - q < L ? k - q : L),
                 to + q * rows, rows * kLane);
}

template <class Math>
void dot_pack(const void* const* rows, const void* scale, int64_t m, int64_t k, void* packed) {
  typename Math::Packed* to = static_cast<typename Math::Packed*>(packed);
  if (dot_is_stream<Math>(m, k)) return dot_pack_tile<Math>(rows, scale, 0, m, dot_stream_tile(m), k, to);
  const int64_t padded = round_up(k, Math::kStep), blocks = dot_row_blocks(m);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t block = m * b / blocks, block_rows = m * (b + 1) / blocks - block, tiles = dot_tiles(block_rows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = block + block_rows * tile / tiles, end = block + block_rows * (tile + 1) / tiles;
      dot_pack_tile<Math>(rows, scale, first, end, end - first, k, to + first * padded);
    }
  }
}

template <class Math>
MicroKernel dot_kernel() {
  return {dot_packed_bytes<Math>, dot_pack<Math>, dot_multiply<Math>};
}

FASTMOE_ROUTE_ISA_END
