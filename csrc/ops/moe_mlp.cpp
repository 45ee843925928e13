#include "ops/moe_mlp.h"

#include "common/expert_matrix.h"
#include "common/kept_tensor.h"
#include "common/launch.h"
#include "common/plan_tensors.h"
#include "ops/permute.h"

namespace fastmoe_route {
namespace {

// What every entry point is given, checked and in the order of the schema.
struct Arguments {
  const char* op;
  const Tensor& x;
  const Tensor& weights;
  const Tensor& w_up;
  const Tensor& w_down;
  const OptionalTensor& bias_up;
  const OptionalTensor& bias_down;
  const Tensor& offsets;
  const Tensor& row_to_slot;
  const Tensor& slot_to_row;
};

bool are_rows_in_place(const Tensor& x) { return has_dense_columns(x) && x.stride(0) <= kMostStride; }

bool is_column_major(const Tensor& w) { return w.stride(1) == 1 && w.stride(2) != 1; }

// The gradient [E, A, B] of `w`, uninitialised, in the memory layout of `w`.
Tensor empty_gradient(const Tensor& w) {
  if (!is_column_major(w)) return empty_kept(Kept::kGradient, w, {w.size(0), w.size(1), w.size(2)}, w.scalar_type());
  const Tensor rows = empty_kept(Kept::kGradient, w, {w.size(0), w.size(2), w.size(1)}, w.scalar_type());
  return Tensor(torch::stable::transpose(rows.stable(), 1, 2));
}

// The maps index memory: a plan that was not made for these sizes must not be believed.
void check_maps(const char* op, const Tensor& offsets, const Tensor& row_to_slot, const Tensor& slot_to_row) {
  const int32_t* bounds = static_cast<const int32_t*>(offsets.const_data_ptr());
  const int64_t num_experts = offsets.size(0) - 1, num_rows = row_to_slot.size(0);
  const int64_t num_slots = slot_to_row.size(0) * slot_to_row.size(1);
  bool good = bounds[0] == 0 && bounds[num_experts] <= num_rows;
  for (int64_t e = 0; e < num_experts; ++e) good &= bounds[e] <= bounds[e + 1];
  check(good, op, ": plan must have offsets that start at 0, never fall and end at most at ", num_rows, ", got others");
  const int32_t* slots = static_cast<const int32_t*>(row_to_slot.const_data_ptr());
  const int32_t* rows = static_cast<const int32_t*>(slot_to_row.const_data_ptr());
  check(rows_in_range(rows, num_slots, bounds[num_experts]), op, ": plan must have slot_to_row in [-1, ",
        bounds[num_experts], "), got a value outside");
  check(maps_agree(slots, num_rows, rows, num_slots), op,
        ": plan must have slot_to_row and row_to_slot that are inverse to each other, got others");
}

MoeMlpShape checked_shape(const Arguments& in, int64_t activation, bool interleaved, bool weights_on_input) {
  const char* op = in.op;
  check_dim(op, "x", in.x, 2);
  check_dim(op, "w_up", in.w_up, 3);
  check_dim(op, "w_down", in.w_down, 3);
  check_dim(op, "offsets", in.offsets, 1);
  check_dim(op, "row_to_slot", in.row_to_slot, 1);
  check_dim(op, "slot_to_row", in.slot_to_row, 2);
  check(activation >= 0 && activation <= static_cast<int64_t>(Activation::kRelu2), op,
        ": activation must be in [0, 7], got ", activation);
  MoeMlpShape shape{};
  shape.num_tokens = in.x.size(0);
  shape.top_k = in.slot_to_row.size(1);
  shape.num_rows = in.row_to_slot.size(0);
  shape.num_experts = in.w_up.size(0);
  shape.hidden = in.x.size(1);
  shape.intermediate = in.w_down.size(1);
  shape.activation = static_cast<Activation>(activation);
  shape.interleaved = interleaved;
  shape.weights_on_input = weights_on_input;
  shape.dtype = float_dtype(op, "x", in.x);
  const int64_t up = shape.intermediate * (is_gated(shape.activation) ? 2 : 1);
  check(shape.intermediate >= 1, op, ": w_down must have at least 1 in dimension 1, got shape ", shape_of(in.w_down));
  check_size(op, "w_up", in.w_up, 1, shape.hidden);
  check_size(op, "w_up", in.w_up, 2, up);
  check_size(op, "w_down", in.w_down, 0, shape.num_experts);
  check_size(op, "w_down", in.w_down, 2, shape.hidden);
  check_size(op, "offsets", in.offsets, 0, shape.num_experts + 1);
  check_size(op, "slot_to_row", in.slot_to_row, 0, shape.num_tokens);
  check_same_dtype(op, "w_up", in.w_up, "x", in.x);
  check_same_dtype(op, "w_down", in.w_down, "x", in.x);
  const auto check_bias = [&](const char* argument, const OptionalTensor& bias, int64_t size) {
    if (!bias.has_value()) return;
    check_dim(op, argument, *bias, 2);
    check_size(op, argument, *bias, 0, shape.num_experts);
    check_size(op, argument, *bias, 1, size);
    check_same_dtype(op, argument, *bias, "x", in.x);
  };
  check_bias("bias_up", in.bias_up, up);
  check_bias("bias_down", in.bias_down, shape.hidden);
  check_dim(op, "weights", in.weights, 2);
  check_size(op, "weights", in.weights, 0, shape.num_tokens);
  check_size(op, "weights", in.weights, 1, shape.top_k);
  check_dtype(op, "weights", in.weights, arithmetic_type(shape.dtype));
  check_dtype(op, "offsets", in.offsets, ScalarType::Int);
  check_dtype(op, "row_to_slot", in.row_to_slot, ScalarType::Int);
  check_dtype(op, "slot_to_row", in.slot_to_row, ScalarType::Int);
  check_devices(op, in.x, in.weights, in.w_up, in.w_down, in.bias_up, in.bias_down, in.offsets, in.row_to_slot,
                in.slot_to_row);
  return shape;
}

bool is_empty(const MoeMlpShape& shape) {
  return shape.num_rows == 0 || shape.num_experts == 0 || shape.hidden == 0 || shape.num_tokens == 0;
}

// The tensors in the layouts kernels take; copies are made only of what has no such layout.
struct Prepared {
  Tensor x, weights, w_up, w_down, offsets, row_to_slot, slot_to_row;
  OptionalTensor bias_up, bias_down;

  explicit Prepared(const Arguments& in)
      : x(are_rows_in_place(in.x) ? in.x : as_contiguous(in.x)), weights(as_contiguous(in.weights)),
        w_up(as_matrix_view(in.w_up)), w_down(as_matrix_view(in.w_down)), offsets(as_contiguous(in.offsets)),
        row_to_slot(as_contiguous(in.row_to_slot)), slot_to_row(as_contiguous(in.slot_to_row)),
        bias_up(as_contiguous(in.bias_up)), bias_down(as_contiguous(in.bias_down)) {
    if (kReadsOnHost) check_maps(in.op, offsets, row_to_slot, slot_to_row);
  }

  MoeMlpInputs inputs(const MoeMlpShape& shape) const {
    return {shape,
            x.const_data_ptr(),
            x.stride(0),
            static_cast<const int32_t*>(offsets.const_data_ptr()),
            static_cast<const int32_t*>(row_to_slot.const_data_ptr()),
            static_cast<const int32_t*>(slot_to_row.const_data_ptr()),
            static_cast<const float*>(weights.const_data_ptr()),
            expert_matrix(w_up),
            expert_matrix(w_down),
            data_or_null<void>(bias_down)};
  }
};

void run_forward(const Arguments& in, const MoeMlpShape& shape, Tensor& y, Tensor* preactivation) {
  if (is_empty(shape)) {
    set_zero(y);
    if (preactivation != nullptr) set_zero(*preactivation);
    return;
  }
  const Prepared p(in);
  void* const kept = preactivation != nullptr ? preactivation->mutable_data_ptr() : nullptr;
  const MoeMlpArgs args{p.inputs(shape), data_or_null<void>(p.bias_up), y.mutable_data_ptr(), kept};
  launch(in.op, &kernels::moe_mlp, args, in.x);
}

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& weights, const Tensor& w_up, const Tensor& w_down,
                                   const OptionalTensor& bias_up, const OptionalTensor& bias_down,
                                   const Tensor& offsets, const Tensor& row_to_slot, const Tensor& slot_to_row,
                                   int64_t activation, bool interleaved, bool weights_on_input) {
  const Arguments in{"moe_mlp", x, weights, w_up, w_down, bias_up, bias_down, offsets, row_to_slot, slot_to_row};
  const MoeMlpShape shape = checked_shape(in, activation, interleaved, weights_on_input);
  Tensor y = empty(x, {shape.num_tokens, shape.hidden}, x.scalar_type());
  Tensor preactivation = empty_kept(Kept::kForBackward, x, {shape.num_rows, w_up.size(2)}, x.scalar_type());
  run_forward(in, shape, y, &preactivation);
  return {std::move(y), std::move(preactivation)};
}

Tensor moe_mlp_forward(const Tensor& x, const Tensor& weights, const Tensor& w_up, const Tensor& w_down,
                       const OptionalTensor& bias_up, const OptionalTensor& bias_down, const Tensor& offsets,
                       const Tensor& row_to_slot, const Tensor& slot_to_row, int64_t activation, bool interleaved,
                       bool weights_on_input) {
  const Arguments in{"moe_mlp", x, weights, w_up, w_down, bias_up, bias_down, offsets, row_to_slot, slot_to_row};
  const MoeMlpShape shape = checked_shape(in, activation, interleaved, weights_on_input);
  Tensor y = empty(x, {shape.num_tokens, shape.hidden}, x.scalar_type());
  run_forward(in, shape, y, nullptr);
  return y;
}

// The routing in place of a plan: one call of an operator for a few tokens, whose weights leave nothing of the caller's
// code in the caches, so that every call costs as much as reading a megabyte.
Tensor moe_mlp_routed_forward(const Tensor& x, const Tensor& experts, const Tensor& weights, const Tensor& w_up,
                              const Tensor& w_down, const OptionalTensor& bias_up, const OptionalTensor& bias_down,
                              int64_t activation, bool interleaved, bool weights_on_input, bool allow_unrouted) {
  check_dim("moe_mlp", "w_up", w_up, 3);
  const PlanTensors plan = plan_every_slot(experts, w_up.size(0), allow_unrouted);
  return moe_mlp_forward(x, weights, w_up, w_down, bias_up, bias_down, plan.offsets, plan.row_to_slot, plan.slot_to_row,
                         activation, interleaved, weights_on_input);
}

// Bits of `wanted`, in the order of the results.
enum Wanted : int64_t { kX = 1, kWeights = 2, kUp = 4, kDown = 8, kBiasUp = 16, kBiasDown = 32 };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weights, const Tensor& w_up, const Tensor& w_down,
    const OptionalTensor& bias_down, const Tensor& offsets, const Tensor& row_to_slot, const Tensor& slot_to_row,
    const Tensor& preactivation, int64_t activation, bool interleaved, bool weights_on_input, int64_t wanted) {
  const char* op = "moe_mlp_backward";
  const OptionalTensor none;
  const Arguments in{op, x, weights, w_up, w_down, none, bias_down, offsets, row_to_slot, slot_to_row};
  const MoeMlpShape shape = checked_shape(in, activation, interleaved, weights_on_input);
  check_dim(op, "grad_y", grad_y, 2);
  check_size(op, "grad_y", grad_y, 0, shape.num_tokens);
  check_size(op, "grad_y", grad_y, 1, shape.hidden);
  check_same_dtype(op, "grad_y", grad_y, "x", x);
  check_dim(op, "preactivation", preactivation, 2);
  check_size(op, "preactivation", preactivation, 0, shape.num_rows);
  check_size(op, "preactivation", preactivation, 1, w_up.size(2));
  check_same_dtype(op, "preactivation", preactivation, "x", x);
  check_devices(op, x, grad_y, preactivation);

  const auto dtype = x.scalar_type();
  const auto wants = [&](Wanted bit) { return (wanted & bit) != 0; };
  const auto make = [&](Wanted bit, std::initializer_list<int64_t> sizes, ScalarType type) {
    return wants(bit) ? empty(x, sizes, type) : empty(x, {0}, type);
  };
  Tensor grad_x = make(kX, {shape.num_tokens, shape.hidden}, dtype);
  Tensor grad_weights = make(kWeights, {shape.num_tokens, shape.top_k}, weights.scalar_type());
  Tensor grad_w_up = wants(kUp) ? empty_gradient(w_up) : empty(x, {0}, dtype);
  Tensor grad_w_down = wants(kDown) ? empty_gradient(w_down) : empty(x, {0}, dtype);
  Tensor grad_bias_up = make(kBiasUp, {shape.num_experts, w_up.size(2)}, dtype);
  Tensor grad_bias_down = make(kBiasDown, {shape.num_experts, shape.hidden}, dtype);
  const auto results = [&] {
    return std::make_tuple(std::move(grad_x), std::move(grad_weights), std::move(grad_w_up), std::move(grad_w_down),
                           std::move(grad_bias_up), std::move(grad_bias_down));
  };
  if (is_empty(shape)) {
    for (Tensor* result : {&grad_x, &grad_weights, &grad_w_up, &grad_w_down, &grad_bias_up, &grad_bias_down})
      set_zero(*result);
    return results();
  }

  const Prepared p(in);
  const Tensor g = as_contiguous(grad_y), pre = as_contiguous(preactivation);
  MoeMlpBackwardArgs args{};
  static_cast<MoeMlpInputs&>(args) = p.inputs(shape);
  args.grad_y = g.const_data_ptr();
  args.preactivation = pre.const_data_ptr();
  args.grad_x = wants(kX) ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_weights = wants(kWeights) ? static_cast<float*>(grad_weights.mutable_data_ptr()) : nullptr;
  args.grad_w_up = wants(kUp) ? grad_w_up.mutable_data_ptr() : nullptr;
  args.grad_w_up_transposed = is_column_major(w_up);
  args.grad_w_down = wants(kDown) ? grad_w_down.mutable_data_ptr() : nullptr;
  args.grad_w_down_transposed = is_column_major(w_down);
  args.grad_bias_up = wants(kBiasUp) ? grad_bias_up.mutable_data_ptr() : nullptr;
  args.grad_bias_down = wants(kBiasDown) ? grad_bias_down.mutable_data_ptr() : nullptr;
  launch(op, &kernels::moe_mlp_backward, args, x);
  return results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) {
  m.impl("moe_mlp", &boxed<&moe_mlp>);
  m.impl("moe_mlp_forward", &boxed<&moe_mlp_forward>);
  m.impl("moe_mlp_routed_forward", &boxed<&moe_mlp_routed_forward>);
  m.impl("moe_mlp_backward", &boxed<&moe_mlp_backward>);
}

}  // namespace fastmoe_route
