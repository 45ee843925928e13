// Products with reduction-contiguous weights (nn.Linear's layout): vectors run along k, one accumulator per output, so
// weights are read in place, in order, and never packed.
//
// Order of summation: k is cut into equal blocks of at most 4 KB of packed row. In a block, lane l of an accumulator
// sums lanes l of the block's vectors, ascending, from +0; the lanes are added by one fixed tree; block sums are added
// in order. Every tile shape follows it, so a row's result depends on nothing but its own elements. It also errs 3 to
// 10 times less than one running sum.
//
// Tiles of up to kDotRows rows by 4 weights. Rows are packed as [tile][vector of k][row][lane]: a tile's k block is
// 24 KB that passes through L1 again and again while a panel of weights passes from L2. Few rows are one tile that goes
// through the weights once (dot_streams.h).
#pragma once

#include "common/cache.h"
#include "common/workspace.h"
#include "cpu/gemm/dot_streams.h"

FASTMOE_ROUTE_ISA_BEGIN

// Weights whose block of k stays in L2 while all rows pass; half of it, two blocks. With the panel fetched meanwhile
// that is a quarter of an L2 of 1 MB: pages of 4 KB lie in it by chance, and fuller it loses lines before their use.
// An L2 of 2 MB holds twice as many.
constexpr int64_t kDotPanel = 32, kDotMaxPanel = 64;
// Rows from which tiles read a widened copy of the weights, which the first tile stores. With fewer the stores, past
// L1, take longer than widening again.
constexpr int64_t kDotWidenRows = 32;
constexpr int64_t kDotRowBlock = 192;  // rows, at most, whose k block stays in L2 beside them

// f(RowCount<rows>) for a tile of many rows. Tiles are even (dot_tiles), so none has less than half of kDotRows.
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

// Row tiles of many rows: tile t of n holds rows [m t / n, m (t + 1) / n). Even tiles, because a tile of
// one or two rows would wait for its weights.
inline int64_t dot_tiles(int64_t m) { return (m + kDotRows - 1) / kDotRows; }
inline int64_t dot_row_blocks(int64_t m) { return (m + kDotRowBlock - 1) / kDotRowBlock; }

template <class Math>
inline int64_t dot_block(int64_t k) {
  const int64_t blocks = (k + Math::kMaxBlock - 1) / Math::kMaxBlock;
  return round_up((k + blocks - 1) / blocks, Math::kStep);
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
