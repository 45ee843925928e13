// Picks the level once, and defines the cpu:: entry points as calls through the table.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa/table.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastmoe_route {

namespace portable { KernelTable table(); }
#if defined(__x86_64__)
namespace avx2 { KernelTable table(); }
namespace avx512 { KernelTable table(); }
namespace bf16 {
void use_avx512_bf16(MicroKernels& micro);
void use_amx(MicroKernels& micro);
void peak_avx512_bf16(const PeakArgs& args);
void peak_amx(const PeakArgs& args);
}  // namespace bf16
#endif

namespace {

enum Level { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr const char* kLevelNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Tiles are 8 KB of state that Linux gives a process only when asked.
bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Level best_level() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")))
    return kPortable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  const bool has_amx = (d & kAmxBf16) != 0 && (d & kAmxTile) != 0;
  return has_amx && amx_permitted() ? kAmx : kAvx512Bf16;
}
#else
Level best_level() { return kPortable; }
#endif

// The fastest of the levels up to `best`. vdpbf16ps keeps both multiply-add ports of an Intel core busy for two cycles
// (measured on Emerald Rapids): half the speed of float32 on widened elements.
Level default_level(Level best) {
#if defined(__x86_64__)
  if (best == kAvx512Bf16 && __builtin_cpu_is("intel")) return kAvx512;
#endif
  return best;
}

Level chosen_level() {
  const Level best = best_level();
  const char* wanted = std::getenv("FASTMOE_ROUTE_ISA");
  if (wanted == nullptr || *wanted == '\0') return default_level(best);
  for (int level = kPortable; level <= kAmx; ++level) {
    if (std::string(wanted) != kLevelNames[level]) continue;
    if (level <= best) return static_cast<Level>(level);
    throw std::runtime_error("fastmoe_route: FASTMOE_ROUTE_ISA must be at most " + std::string(kLevelNames[best]) +
                             " on this processor, got " + wanted);
  }
  throw std::runtime_error(
      "fastmoe_route: FASTMOE_ROUTE_ISA must be one of portable, avx2, avx512, avx512_bf16, amx, got " +
      std::string(wanted));
}

KernelTable chosen_table() {
  const Level level = chosen_level();
#if defined(__x86_64__)
  KernelTable table = level >= kAvx512 ? avx512::table() : level == kAvx2 ? avx2::table() : portable::table();
  if (level >= kAvx512Bf16) bf16::use_avx512_bf16(table.micro);
  if (level >= kAmx) bf16::use_amx(table.micro);
  if (level >= kAvx512Bf16) table.peak_bfloat16 = level >= kAmx ? bf16::peak_amx : bf16::peak_avx512_bf16;
#else
  KernelTable table = portable::table();
#endif
  table.level = kLevelNames[level];
  return table;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable table = chosen_table();
  return table;
}

const char* best_level_name() { return kLevelNames[best_level()]; }

namespace {

// The table for elements of a dtype: float64 is the portable level's alone (dispatch_element in isa/vec.h). It takes
// the matrix products of the level in use, as others do.
const KernelTable& kernels_of(DType dtype) {
  if (dtype != DType::kFloat64) return kernels();
  static const KernelTable table = portable::table();
  return table;
}

// Of arguments: their own dtype, that of their shape, or none that matters.
template <class Args>
auto table_of(const Args& args, int) -> decltype(args.dtype, kernels()) {
  return kernels_of(args.dtype);
}
template <class Args>
auto table_of(const Args& args, int) -> decltype(args.shape.dtype, kernels()) {
  return kernels_of(args.shape.dtype);
}
template <class Args>
const KernelTable& table_of(const Args&, long) {
  return kernels();
}
const KernelTable& table_of(const PermuteArgs&, int) { return kernels(); }  // moves bytes

}  // namespace

namespace cpu {
#define X(name, Args) \
  void name(const Args& args) { table_of(args, 0).name(args); }
FASTMOE_ROUTE_KERNELS(X)
#undef X
}  // namespace cpu

}  // namespace fastmoe_route
