// A matrix seen through strides, in elements; stride_row == 0 broadcasts one row to all tokens.
#pragma once

#include <cstdint>

namespace fastmoe_route {

template <class T>
struct Strided {
  const T* data = nullptr;
  int64_t stride_row = 0;
  int64_t stride_col = 1;
};

}  // namespace fastmoe_route
