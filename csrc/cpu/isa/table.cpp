// This level's column of the table.
#include "cpu/isa/table.h"

#include "cpu/isa/kernels.h"

FASTMOE_ROUTE_ISA_BEGIN

#define FASTMOE_ROUTE_QUOTE(x) #x
#define FASTMOE_ROUTE_NAME(x) FASTMOE_ROUTE_QUOTE(x)

KernelTable table() {
  return KernelTable{
      FASTMOE_ROUTE_NAME(FASTMOE_ROUTE_ISA),
#define X(name, Args) &name,
      FASTMOE_ROUTE_KERNELS(X)
#undef X
          micro_kernels(),
  };
}

FASTMOE_ROUTE_ISA_END
