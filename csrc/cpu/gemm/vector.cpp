#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

MicroKernels micro_kernels() { return {}; }

FASTMOE_ROUTE_ISA_END
