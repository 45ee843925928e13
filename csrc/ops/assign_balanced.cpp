#include "ops/assign_balanced.h"

#include "common/tensor.h"

namespace fastmoe_route {
namespace {

Tensor assign_balanced(const Tensor& scores) {
  check_dim("assign_balanced", "scores", scores, 2);
  const DType dtype = float_dtype("assign_balanced", "scores", scores);
  const int64_t tokens = scores.size(0), experts = scores.size(1);
  check(experts >= 1, "assign_balanced: scores must have at least 1 expert, got shape ", shape_of(scores));
  check(tokens < kInt32Limit, "assign_balanced: scores must have fewer than 2147483648 tokens, got ", tokens);
  check(tokens % experts == 0, "assign_balanced: scores must have a multiple of ", experts, " tokens, got ", tokens);
  Tensor choice = empty(scores, {tokens}, ScalarType::Int);
  if (tokens == 0) return choice;
  const bool is_finite = cpu::assign_balanced({tokens,
                                               experts,
                                               dtype,
                                               {scores.const_data_ptr(), scores.stride(0), scores.stride(1)},
                                               static_cast<int32_t*>(choice.mutable_data_ptr())});
  check(is_finite, "assign_balanced: scores must be finite, got inf or NaN");
  return choice;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, CPU, m) { m.impl("assign_balanced", &boxed<&assign_balanced>); }

}  // namespace fastmoe_route
