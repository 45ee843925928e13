#include <cstdlib>

#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

void permute(const PermuteArgs&) { std::abort(); }

void unpermute(const UnpermuteArgs&) { std::abort(); }
void unpermute_backward(const UnpermuteBackwardArgs&) { std::abort(); }

FASTMOE_ROUTE_ISA_END
