#include "ops/permute.h"

#include <tuple>

#include "common/launch.h"

namespace fastmoe_route {
namespace {

struct PlanMaps {
  const int32_t* slots;  // [R], row_to_slot
  const int32_t* rows;   // [T, K], slot_to_row
  int64_t num_tokens;
  int64_t top_k;
  int64_t num_rows;
  OptionalTensor row_to_slot, slot_to_row;  // copies of those that were not contiguous

  PermuteShape shape(int64_t hidden, DType dtype) const { return {num_tokens, top_k, num_rows, hidden, dtype}; }
};

PlanMaps plan_maps(const char* op, const Tensor& row_to_slot, const Tensor& slot_to_row) {
  check_dim(op, "plan.row_to_slot", row_to_slot, 1);
  check_dim(op, "plan.slot_to_row", slot_to_row, 2);
  check_dtype(op, "plan.row_to_slot", row_to_slot, ScalarType::Int);
  check_dtype(op, "plan.slot_to_row", slot_to_row, ScalarType::Int);
  PlanMaps maps{nullptr, nullptr, slot_to_row.size(0), slot_to_row.size(1), row_to_slot.size(0), {}, {}};
  maps.slots = static_cast<const int32_t*>(contiguous_data(row_to_slot, maps.row_to_slot));
  maps.rows = static_cast<const int32_t*>(contiguous_data(slot_to_row, maps.slot_to_row));
  return maps;
}

// Every row is written through its slot, so the two maps of a plan made by hand must agree.
void check_maps_agree(const char* op, const PlanMaps& maps) {
  if (!kReadsOnHost) return;
  check(maps_agree(maps.slots, maps.num_rows, maps.rows, maps.num_tokens * maps.top_k), op,
        ": plan must come from plan_dispatch, got a row_to_slot and a slot_to_row that disagree");
}

void check_rows_in_range(const char* op, const PlanMaps& maps) {
  if (!kReadsOnHost) return;
  check(rows_in_range(maps.rows, maps.num_tokens * maps.top_k, maps.num_rows), op,
        ": plan.slot_to_row must be in [-1, ", maps.num_rows, "), got a row outside it");
}

// The weights [T, K], contiguous, if given.
OptionalTensor plan_weights(const char* op, const OptionalTensor& weights, const PlanMaps& maps, DType& dtype) {
  if (!weights.has_value()) return std::nullopt;
  check_dim(op, "weights", *weights, 2);
  check_size(op, "weights", *weights, 0, maps.num_tokens);
  check_size(op, "weights", *weights, 1, maps.top_k);
  dtype = float_dtype(op, "weights", *weights);
  return as_contiguous(*weights);
}

Tensor permute(const Tensor& x, const Tensor& row_to_slot, const Tensor& slot_to_row) {
  check_dim("permute", "x", x, 2);
  const DType dtype = float_dtype("permute", "x", x);
  const PlanMaps maps = plan_maps("permute", row_to_slot, slot_to_row);
  check_size("permute", "x", x, 0, maps.num_tokens);
  check_devices("permute", x, row_to_slot, slot_to_row);
  check_maps_agree("permute", maps);
  const PermuteShape shape = maps.shape(x.size(1), dtype);
  Tensor rows = empty(x, {shape.num_rows, shape.hidden}, x.scalar_type());
  if (shape.num_rows == 0 || shape.hidden == 0) return rows;
  const Tensor source = with_dense_columns(x);
  const PermuteArgs args{shape,     source.const_data_ptr(), source.stride(0), maps.slots,
                         maps.rows, rows.mutable_data_ptr()};
  launch("permute", &kernels::permute, args, x);
  return rows;
}

Tensor unpermute(const Tensor& rows, const OptionalTensor& weights, const Tensor& row_to_slot,
                 const Tensor& slot_to_row) {
  check_dim("unpermute", "rows", rows, 2);
  const DType dtype = float_dtype("unpermute", "rows", rows);
  const PlanMaps maps = plan_maps("unpermute", row_to_slot, slot_to_row);
  check_size("unpermute", "rows", rows, 0, maps.num_rows);
  UnpermuteArgs args{};
  static_cast<PermuteShape&>(args) = maps.shape(rows.size(1), dtype);
  const OptionalTensor dense_weights = plan_weights("unpermute", weights, maps, args.weights_dtype);
  check_devices("unpermute", rows, weights, row_to_slot, slot_to_row);
  check_rows_in_range("unpermute", maps);
  Tensor y = empty(rows, {args.num_tokens, args.hidden}, rows.scalar_type());
  if (args.num_tokens == 0 || args.hidden == 0) return y;
  const Tensor source = with_dense_columns(rows);
  args.rows = source.const_data_ptr();
  args.rows_stride = source.stride(0);
  args.slot_to_row = maps.rows;
  args.weights = data_or_null<void>(dense_weights);
  args.y = y.mutable_data_ptr();
  launch("unpermute", &kernels::unpermute, args, rows);
  return y;
}

// (grad_rows, grad_weights), each empty when not needed.
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_y, const OptionalTensor& rows,
                                              const OptionalTensor& weights, const Tensor& row_to_slot,
                                              const Tensor& slot_to_row, bool needs_rows, bool needs_weights) {
  constexpr const char* kOp = "unpermute_backward";
  check_dim(kOp, "grad_y", grad_y, 2);
  const DType dtype = float_dtype(kOp, "grad_y", grad_y);
  const PlanMaps maps = plan_maps(kOp, row_to_slot, slot_to_row);
  check_size(kOp, "grad_y", grad_y, 0, maps.num_tokens);
  UnpermuteBackwardArgs args{};
  static_cast<PermuteShape&>(args) = maps.shape(grad_y.size(1), dtype);
  const OptionalTensor dense_weights = plan_weights(kOp, weights, maps, args.weights_dtype);
  check_devices(kOp, grad_y, rows, weights, row_to_slot, slot_to_row);
  check_maps_agree(kOp, maps);
  const Tensor grad = with_dense_columns(grad_y);
  OptionalTensor source;
  if (needs_weights) {
    check(weights.has_value() && rows.has_value(), kOp, ": rows and weights must be given for their gradient");
    check_dim(kOp, "rows", *rows, 2);
    check_size(kOp, "rows", *rows, 0, maps.num_rows);
    check_size(kOp, "rows", *rows, 1, grad_y.size(1));
    check_same_dtype(kOp, "rows", *rows, "grad_y", grad_y);
    source = with_dense_columns(*rows);
    args.rows = source->const_data_ptr();
    args.rows_stride = source->stride(0);
  }
  args.grad_y = grad.const_data_ptr();
  args.grad_y_stride = grad.stride(0);
  args.row_to_slot = maps.slots;
  args.slot_to_row = maps.rows;
  args.weights = data_or_null<void>(dense_weights);
  Tensor grad_rows = empty(grad_y, {needs_rows ? args.num_rows : 0, args.hidden}, grad_y.scalar_type());
  Tensor grad_weights =
      empty(grad_y, {needs_weights ? args.num_tokens : 0, args.top_k}, scalar_type(args.weights_dtype));
  args.grad_rows = needs_rows ? grad_rows.mutable_data_ptr() : nullptr;
  args.grad_weights = needs_weights ? grad_weights.mutable_data_ptr() : nullptr;
  launch(kOp, &kernels::unpermute_backward, args, grad_y);
  return {std::move(grad_rows), std::move(grad_weights)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) {
  m.impl("permute", &boxed<&permute>);
  m.impl("permute_forward", &boxed<&permute>);
  m.impl("unpermute", &boxed<&unpermute>);
  m.impl("unpermute_forward", &boxed<&unpermute>);
  m.impl("unpermute_backward", &boxed<&unpermute_backward>);
}

}  // namespace fastmoe_route
