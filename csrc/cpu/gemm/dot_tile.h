// One tile of the dot form (dot.h): up to 12 rows against up to 4 weights over one block of k, and what it fetches
// meanwhile.
//
// `Math` is what a vector holds: floats, or 2-byte elements widened to them as they are loaded (below); or pairs of
// bfloat16 (avx512_bf16.cpp).
#pragma once

#include "cpu/gemm/lane_sums.h"
#include "cpu/gemm/tile.h"

FASTMOE_ROUTE_ISA_BEGIN

constexpr int kDotRows = kVectorRegisters == 32 ? 6 : kVectorRegisters == 16 ? 3 : 1;
constexpr int kDotCols = 4;
constexpr int64_t kDotSegment = 16;                 // steps of k between two fetches of what is multiplied later
constexpr int64_t kDotFar = 1536, kDotNear = 1024;  // bytes from what is multiplied to what is fetched into L2, L1

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

FASTMOE_ROUTE_ISA_END
