#include "cpu/gemm/micro.h"
#include "cpu/isa/namespace.h"

FASTMOE_ROUTE_ISA_BEGIN

void use_avx512_bf16(MicroKernels&) {}

FASTMOE_ROUTE_ISA_END
