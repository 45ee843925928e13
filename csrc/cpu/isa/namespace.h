// Every source of a per-instruction-set library lives in its own namespace, so that one library can hold the same
// kernel three times. Nothing with external linkage may be defined outside it in such a source: the linker would
// keep one copy, and a portable machine could run AVX-512 code.
#pragma once

#ifndef FASTMOE_ROUTE_ISA
#error "set FASTMOE_ROUTE_ISA: this file belongs to the per-instruction-set libraries of CMakeLists.txt"
#endif

#define FASTMOE_ROUTE_ISA_BEGIN \
  namespace fastmoe_route {     \
  namespace FASTMOE_ROUTE_ISA {
#define FASTMOE_ROUTE_ISA_END \
  }                           \
  }
