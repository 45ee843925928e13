// The bfloat16 peaks of processors that multiply bfloat16 themselves: vdpbf16ps, and AMX tiles.
//
// vdpbf16ps starts every cycle on AMD and every other cycle on Intel, where float32 multiply-adds on widened values
// do twice as much.
#include <immintrin.h>

#include "cpu/gemm/peak_burn.h"

namespace fastmoe_route {
namespace avx512 { void peak_float32(const PeakArgs& args); }
}  // namespace fastmoe_route

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr uint16_t kHalf = 0x3f00;  // 0.5: sums of its squares saturate quietly, far from infinity and subnormals
constexpr int kChains = 12;

__attribute__((noinline)) float burn_avx512_bf16(int64_t iterations) {
  volatile uint16_t bits = kHalf;
  const __m512bh a = (__m512bh)_mm512_set1_epi16(static_cast<int16_t>(bits));
  __m512 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], a, a);
  }
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < kChains; ++i) total = _mm512_add_ps(total, chain[i]);
  return _mm512_cvtss_f32(total);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr double kTileFlops = 2.0 * 16 * 16 * 32;  // C[16, 16] += A[16, 32] B[32, 16]

// Six accumulator tiles: a tile product takes 16 cycles to start the next and about 52 to finish.
__attribute__((noinline)) void burn_amx(int64_t iterations) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  alignas(64) uint16_t halves[32];
  for (uint16_t& half : halves) half = kHalf;
  // GCC's tile intrinsics declare only the first bytes of what they read: keep all of it in memory.
  __asm__ volatile("" : : "r"(&config), "r"(halves) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_loadd(6, halves, 0);  // stride 0: every row is the same 32 values
  _tile_loadd(7, halves, 0);
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_release();
}

}  // namespace

void peak_avx512_bf16(const PeakArgs& args) {
  if (__builtin_cpu_is("intel")) return avx512::peak_float32(args);
  burn_on_all_threads(args, 2.0 * 2.0 * 16.0 * kChains, [](int64_t iterations) {
    volatile float sink = burn_avx512_bf16(iterations);
    (void)sink;
  });
}

void peak_amx(const PeakArgs& args) { burn_on_all_threads(args, 6.0 * kTileFlops, burn_amx); }

FASTMOE_ROUTE_ISA_END
