#include "ops/expert_choice.h"

#include <tuple>

#include "common/launch.h"
#include "ops/plan_dispatch.h"

namespace fastmoe_route {
namespace {

void check_scopes(const Tensor& scope_ids, int64_t num_tokens, int64_t num_scopes) {
  const auto status = judge_scopes(static_cast<const int32_t*>(scope_ids.const_data_ptr()), num_tokens, num_scopes);
  check(status.kind == PlanStatus::kOk, "expert_choice: scope_ids must be in [0, ", num_scopes, "), got ", status.value,
        " at token ", status.where);
}

// (weights [T, E], experts [T, E], demand [E])
std::tuple<Tensor, Tensor, Tensor> expert_choice(const Tensor& scores, int64_t capacity,
                                                 const OptionalTensor& scope_ids, int64_t num_scopes) {
  check_dim("expert_choice", "scores", scores, 2);
  const DType dtype = float_dtype("expert_choice", "scores", scores);
  const int64_t tokens = scores.size(0), experts = scores.size(1);
  check(capacity >= 1, "expert_choice: capacity must be at least 1, got ", capacity);
  check(num_scopes >= 1 && num_scopes < kInt32Limit, "expert_choice: num_scopes must be in [1, 2147483647], got ",
        num_scopes);
  check(experts == 0 || tokens < kInt32Limit / experts + (kInt32Limit % experts != 0),
        "expert_choice: scores must have fewer than 2147483648 elements, got shape ", shape_of(scores));
  check_vector("expert_choice", "scope_ids", scope_ids, tokens);
  const OptionalTensor scopes = as_contiguous(scope_ids);
  if (kReadsOnHost && scopes.has_value()) check_scopes(*scopes, tokens, num_scopes);
  check_devices("expert_choice", scores, scope_ids);
  Tensor weights = empty(scores, {tokens, experts}, arithmetic_type(dtype));
  Tensor choice = empty(scores, {tokens, experts}, ScalarType::Int);
  Tensor demand = empty(scores, {experts}, ScalarType::Int);
  if (experts == 0) return {std::move(weights), std::move(choice), std::move(demand)};
  ExpertChoiceArgs args{};
  args.num_tokens = tokens;
  args.num_experts = experts;
  args.capacity = capacity;
  args.dtype = dtype;
  args.scores = {scores.const_data_ptr(), scores.stride(0), scores.stride(1)};
  args.scope_ids = data_or_null<int32_t>(scopes);
  args.num_scopes = num_scopes;
  args.weights = weights.mutable_data_ptr();
  args.experts = static_cast<int32_t*>(choice.mutable_data_ptr());
  args.demand = static_cast<int32_t*>(demand.mutable_data_ptr());
  launch("expert_choice", &kernels::expert_choice, args, scores);
  return {std::move(weights), std::move(choice), std::move(demand)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) {
  m.impl("expert_choice", &boxed<&expert_choice>);
  m.impl("expert_choice_forward", &boxed<&expert_choice>);
}

}  // namespace fastmoe_route
