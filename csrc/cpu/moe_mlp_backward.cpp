#include <cstdlib>

#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

void moe_mlp_backward(const MoeMlpBackwardArgs&) { std::abort(); }

FASTMOE_ROUTE_ISA_END
