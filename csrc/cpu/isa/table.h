// The one dispatch table: every kernel that is compiled per instruction set, as a pointer. Its columns are the levels
// of CMakeLists.txt; select.cpp picks one when the library is loaded. To add a kernel: a line in FASTMOE_ROUTE_KERNELS,
// its source in ISA_SOURCES.
#pragma once

#include "cpu/count_bins.h"
#include "cpu/gemm/micro.h"
#include "ops/gate.h"
#include "ops/grouped_mm.h"
#include "ops/machine.h"
#include "ops/moe_mlp.h"
#include "ops/permute.h"
#include "ops/softmax.h"
#include "ops/softmax_topk.h"

// X(name, its arguments)
#define FASTMOE_ROUTE_KERNELS(X)                    \
  X(gate, GateArgs)                                 \
  X(gate_backward, GateBackwardArgs)                \
  X(softmax, SoftmaxArgs)                           \
  X(softmax_backward, SoftmaxBackwardArgs)          \
  X(softmax_topk, SoftmaxTopkArgs)                  \
  X(softmax_topk_backward, SoftmaxTopkBackwardArgs) \
  X(count_bins, CountBinsArgs)                      \
  X(permute, PermuteArgs)                           \
  X(unpermute, UnpermuteArgs)                       \
  X(unpermute_backward, UnpermuteBackwardArgs)      \
  X(grouped_mm, GroupedMmArgs)                      \
  X(grouped_mm_wgrad, GroupedMmWgradArgs)           \
  X(moe_mlp, MoeMlpArgs)                            \
  X(moe_mlp_backward, MoeMlpBackwardArgs)           \
  X(peak_float32, PeakArgs)                         \
  X(peak_bfloat16, PeakArgs)                        \
  X(read_all, ReadArgs)

namespace fastmoe_route {

struct KernelTable {
  const char* level;
#define X(name, Args) void (*name)(const Args&);
  FASTMOE_ROUTE_KERNELS(X)
#undef X
  // Matrix micro-kernels of this level; bfloat16 ones are replaced where the processor has products of its own.
  MicroKernels micro;
};

// The table of the level in use, the fastest of this processor. Levels, best first: amx, avx512_bf16, avx512, avx2,
// portable. The environment variable FASTMOE_ROUTE_ISA names another (tests); one the processor lacks is an error at
// load.
const KernelTable& kernels();

// The best level this processor offers, whatever FASTMOE_ROUTE_ISA asked for.
const char* best_level_name();

}  // namespace fastmoe_route
