#include "ops/reroute.h"

#include <algorithm>
#include <tuple>

#include "common/launch.h"

namespace fastmoe_route {
namespace {

constexpr const char* kOp = "reroute";

void check_arguments(const Tensor& experts, const RerouteArgs& args) {
  const bool is_integer = experts.scalar_type() == ScalarType::Int || experts.scalar_type() == ScalarType::Long;
  check(is_integer, "reroute: experts must be int32 or int64, got ", dtype_of(experts));
  check(args.num_experts >= 1 && args.num_experts <= kMaxPlanExperts, "reroute: num_experts must be in [1, ",
        kMaxPlanExperts, "], got ", args.num_experts);
  check(args.num_candidates == 0 || args.num_tokens <= (kInt32Limit - 1) / args.num_candidates,
        "reroute: experts must hold fewer than 2^31 slots, got shape ", shape_of(experts));
  check(args.top_k >= 0 && args.top_k <= args.num_candidates, "reroute: top_k must be in [0, ", args.num_candidates,
        "], got ", args.top_k);
  check(args.capacity >= 1, "reroute: capacity must be at least 1, got ", args.capacity);
  check(args.num_scopes >= 1 && args.num_scopes <= kInt32Limit, "reroute: num_scopes must be in [1, 2^31], got ",
        args.num_scopes);
  check(args.overflow >= Overflow::kDrop && args.overflow <= Overflow::kLocal,
        "reroute: overflow must be 0, 1 or 2, got ", static_cast<int>(args.overflow));
  check(args.fill >= Fill::kNone && args.fill <= Fill::kAny, "reroute: fill must be 0, 1 or 2, got ",
        static_cast<int>(args.fill));
  check(args.drop_policy == DropPolicy::kPosition || args.drop_policy == DropPolicy::kScore,
        "reroute: drop_policy must be 0 or 1, got ", static_cast<int>(args.drop_policy));
}

void check_status(const PlanStatus& status, const RerouteArgs& args) {
  if (status.kind == PlanStatus::kBadExpert) {
    fail("reroute: experts must be in [-1, ", args.num_experts, "), got ", status.value, " at token ",
         status.where / args.num_candidates, ", column ", status.where % args.num_candidates);
  }
  if (status.kind == PlanStatus::kBadScope) {
    fail("reroute: scope_ids must be in [0, ", args.num_scopes, "), got ", status.value, " at token ", status.where);
  }
}

// (choice [T, W], granted [T, W], demand [E])
std::tuple<Tensor, Tensor, Tensor> reroute(const Tensor& experts, const OptionalTensor& weights, int64_t num_experts,
                                           int64_t top_k, int64_t capacity, int64_t overflow, int64_t fill,
                                           int64_t drop_policy, const OptionalTensor& scope_ids, int64_t num_scopes,
                                           const OptionalTensor& rank_of_expert, const OptionalTensor& rank_of_token) {
  check_dim(kOp, "experts", experts, 2);
  RerouteArgs args{};
  args.num_tokens = experts.size(0);
  args.num_candidates = experts.size(1);
  args.num_experts = num_experts;
  args.top_k = top_k;
  args.capacity = capacity;
  args.overflow = static_cast<Overflow>(overflow);
  args.fill = static_cast<Fill>(fill);
  args.drop_policy = static_cast<DropPolicy>(drop_policy);
  args.num_scopes = num_scopes;
  args.width = args.fill == Fill::kNone ? top_k : args.num_candidates;
  check_arguments(experts, args);
  check_vector(kOp, "scope_ids", scope_ids, args.num_tokens);
  check_vector(kOp, "rank_of_expert", rank_of_expert, num_experts);
  check_vector(kOp, "rank_of_token", rank_of_token, args.num_tokens);
  check(args.overflow != Overflow::kLocal || (rank_of_expert.has_value() && rank_of_token.has_value()),
        "reroute: rank_of_expert and rank_of_token must be given with overflow local");
  const bool needs_weights = args.drop_policy == DropPolicy::kScore || args.fill != Fill::kNone;
  check(!needs_weights || weights.has_value(), "reroute: weights must be given with drop_policy score or a fill");
  OptionalTensor dense_weights;
  if (needs_weights) {
    check_dim(kOp, "weights", *weights, 2);
    check_size(kOp, "weights", *weights, 0, args.num_tokens);
    check_size(kOp, "weights", *weights, 1, args.num_candidates);
    args.weights_dtype = float_dtype(kOp, "weights", *weights);
    dense_weights = as_contiguous(*weights);
  }
  check_devices(kOp, experts, weights, scope_ids, rank_of_expert, rank_of_token);

  const Tensor dense_experts = as_contiguous(experts);
  const OptionalTensor dense_scopes = as_contiguous(scope_ids);
  const OptionalTensor dense_expert_ranks = as_contiguous(rank_of_expert);
  const OptionalTensor dense_token_ranks = as_contiguous(rank_of_token);
  args.experts_are_int64 = experts.scalar_type() == ScalarType::Long;
  args.experts = dense_experts.const_data_ptr();
  args.weights = data_or_null<void>(dense_weights);
  args.scope_ids = data_or_null<int32_t>(dense_scopes);
  args.rank_of_expert = data_or_null<int32_t>(dense_expert_ranks);
  args.rank_of_token = data_or_null<int32_t>(dense_token_ranks);
  Tensor choice = empty(experts, {args.num_tokens, args.width}, ScalarType::Int);
  Tensor granted = empty(experts, {args.num_tokens, args.width}, ScalarType::Int);
  Tensor demand = empty(experts, {num_experts}, ScalarType::Int);
  args.choice = static_cast<int32_t*>(choice.mutable_data_ptr());
  args.granted = static_cast<int32_t*>(granted.mutable_data_ptr());
  args.demand = static_cast<int32_t*>(demand.mutable_data_ptr());
  PlanStatus status;
  args.status = &status;
  launch(kOp, &kernels::reroute, args, experts);
  check_status(status, args);
  return {std::move(choice), std::move(granted), std::move(demand)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) { m.impl("reroute", &boxed<&reroute>); }

}  // namespace fastmoe_route
