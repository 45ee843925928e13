#include "cpu/gemm/micro.h"
#include "cpu/isa/namespace.h"

FASTMOE_ROUTE_ISA_BEGIN

void use_amx(MicroKernels&) {}

FASTMOE_ROUTE_ISA_END
