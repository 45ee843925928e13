// Declares, in this unit's instruction-set namespace, every kernel of the table; each has the signature of its cpu::
// entry point in ops/<op>.h.
#pragma once

#include "cpu/isa/namespace.h"
#include "cpu/isa/table.h"

FASTMOE_ROUTE_ISA_BEGIN

#define X(name, Args) void name(const Args& args);
FASTMOE_ROUTE_KERNELS(X)
#undef X

// The vector matrix micro-kernels of this level (gemm/vector.cpp).
MicroKernels micro_kernels();

FASTMOE_ROUTE_ISA_END
