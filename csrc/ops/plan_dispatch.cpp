#include "ops/plan_dispatch.h"

#include <algorithm>
#include <tuple>

#include "common/launch.h"
#include "common/plan_tensors.h"

namespace fastmoe_route {
namespace {

// a * b for non-negative numbers, at most 2^31.
int64_t capped_product(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kInt32Limit : std::min(product, kInt32Limit);
}

void check_arguments(const Tensor& experts, const OptionalTensor& weights, const OptionalTensor& scope_ids,
                     const PlanArgs& args, int64_t max_rows) {
  const bool is_integer = experts.scalar_type() == ScalarType::Int || experts.scalar_type() == ScalarType::Long;
  check(is_integer, "plan_dispatch: experts must be int32 or int64, got ", dtype_of(experts));
  check(args.num_experts >= 1 && args.num_experts <= kMaxPlanExperts, "plan_dispatch: num_experts must be in [1, ",
        kMaxPlanExperts, "], got ", args.num_experts);
  check(capped_product(args.num_tokens, args.top_k) < kInt32Limit,
        "plan_dispatch: experts must hold fewer than 2^31 slots, got shape ", shape_of(experts));
  check(args.capacity >= 0, "plan_dispatch: capacity must be at least 1, got ", args.capacity);
  check(args.num_scopes >= 1 && args.num_scopes <= kInt32Limit, "plan_dispatch: num_scopes must be in [1, 2^31], got ",
        args.num_scopes);
  check(args.align >= 1 && args.align < kInt32Limit, "plan_dispatch: align must be in [1, 2^31), got ", args.align);
  check(max_rows >= -1, "plan_dispatch: max_rows must be at least 0, got ", max_rows);
  check_vector("plan_dispatch", "scope_ids", scope_ids, args.num_tokens);
  if (args.drop_policy == DropPolicy::kPosition) return;
  check(args.drop_policy == DropPolicy::kScore, "plan_dispatch: drop_policy must be 0 or 1, got ",
        static_cast<int>(args.drop_policy));
  check(weights.has_value() || args.capacity == 0, "plan_dispatch: weights must be given with drop_policy score");
  if (weights.has_value()) {
    check_dim("plan_dispatch", "weights", *weights, 2);
    check_size("plan_dispatch", "weights", *weights, 0, args.num_tokens);
    check_size("plan_dispatch", "weights", *weights, 1, args.top_k);
  }
}

void check_status(const PlanStatus& status, const PlanArgs& args, int64_t max_rows) {
  switch (status.kind) {
    case PlanStatus::kOk: return;
    case PlanStatus::kBadExpert:
      fail("plan_dispatch: experts must be in [-1, ", args.num_experts, args.allow_unrouted ? "], got " : "), got ",
           status.value, " at token ", status.where / args.top_k, ", slot ", status.where % args.top_k);
    case PlanStatus::kBadScope:
      fail("plan_dispatch: scope_ids must be in [0, ", args.num_scopes, "), got ", status.value, " at token ",
           status.where);
    case PlanStatus::kTooManyRows:
      fail("plan_dispatch: max_rows must be at least the ", status.value, " slots in use, got ", max_rows);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan_dispatch(const Tensor& experts, int64_t num_experts,
                                                                 int64_t capacity, int64_t drop_policy,
                                                                 const OptionalTensor& weights,
                                                                 const OptionalTensor& scope_ids, int64_t num_scopes,
                                                                 int64_t align, int64_t max_rows, bool allow_unrouted) {
  check_dim("plan_dispatch", "experts", experts, 2);
  PlanArgs args{};
  args.num_tokens = experts.size(0);
  args.top_k = experts.size(1);
  args.num_experts = num_experts;
  args.capacity = capacity;
  args.drop_policy = static_cast<DropPolicy>(drop_policy);
  args.num_scopes = num_scopes;
  args.align = align;
  args.allow_unrouted = allow_unrouted;
  check_arguments(experts, weights, scope_ids, args, max_rows);

  args.max_slots = args.num_tokens * args.top_k;
  if (capacity > 0) {
    args.max_slots = std::min(args.max_slots, capped_product(num_experts, capped_product(capacity, num_scopes)));
  }
  if (max_rows >= 0) args.max_slots = std::min(args.max_slots, max_rows);
  args.num_rows = args.max_slots + num_experts * (align - 1);
  check(args.num_rows < kInt32Limit, "plan_dispatch: align must keep the plan below 2^31 rows, got ", args.num_rows,
        " rows with align ", align);

  args.experts_are_int64 = experts.scalar_type() == ScalarType::Long;
  args.experts = experts.const_data_ptr();
  args.experts_stride_token = experts.stride(0);
  args.experts_stride_slot = experts.stride(1);
  OptionalTensor dense_weights;
  if (args.drop_policy == DropPolicy::kScore && capacity > 0) {
    args.weights_dtype = float_dtype("plan_dispatch", "weights", *weights);
    dense_weights = as_contiguous(*weights);
    args.weights = dense_weights->const_data_ptr();
  }
  const OptionalTensor dense_scopes = as_contiguous(scope_ids);
  args.scope_ids = data_or_null<int32_t>(dense_scopes);

  check_devices("plan_dispatch", experts, weights, scope_ids);
  Tensor offsets = empty(experts, {num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = empty(experts, {args.num_rows}, ScalarType::Int);
  Tensor slot_to_row = empty(experts, {args.num_tokens, args.top_k}, ScalarType::Int);
  Tensor kept = empty(experts, {num_experts}, ScalarType::Int);
  Tensor dropped = empty(experts, {num_experts}, ScalarType::Int);
  args.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  args.row_to_slot = static_cast<int32_t*>(row_to_slot.mutable_data_ptr());
  args.slot_to_row = static_cast<int32_t*>(slot_to_row.mutable_data_ptr());
  args.kept = static_cast<int32_t*>(kept.mutable_data_ptr());
  args.dropped = static_cast<int32_t*>(dropped.mutable_data_ptr());
  PlanStatus status;
  args.status = &status;
  launch("plan_dispatch", &kernels::plan_dispatch, args, experts);
  check_status(status, args, max_rows);
  return {std::move(offsets), std::move(row_to_slot), std::move(slot_to_row), std::move(kept), std::move(dropped)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan_all(const Tensor& experts, int64_t num_experts,
                                                            bool allow_unrouted) {
  return plan_dispatch(experts, num_experts, 0, 0, std::nullopt, std::nullopt, 1, 1, -1, allow_unrouted);
}

// Calls without an option: a default costs 60 ns, and there are 8.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan_dispatch_plain(const Tensor& experts, int64_t num_experts) {
  return plan_all(experts, num_experts, false);
}

}  // namespace

PlanTensors plan_every_slot(const Tensor& experts, int64_t num_experts, bool allow_unrouted) {
  auto [offsets, row_to_slot, slot_to_row, kept, dropped] = plan_all(experts, num_experts, allow_unrouted);
  return {std::move(offsets), std::move(row_to_slot), std::move(slot_to_row)};
}

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) {
  m.impl("plan_dispatch", &boxed<&plan_dispatch>);
  m.impl("plan_dispatch_plain_forward", &boxed<&plan_dispatch_plain>);
}

}  // namespace fastmoe_route
