#include <cstdlib>

#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

void moe_mlp(const MoeMlpArgs&) { std::abort(); }

FASTMOE_ROUTE_ISA_END
