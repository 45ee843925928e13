#include <cstdlib>

#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

void grouped_mm_wgrad(const GroupedMmWgradArgs&) { std::abort(); }

FASTMOE_ROUTE_ISA_END
