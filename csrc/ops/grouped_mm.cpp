#include "ops/grouped_mm.h"

#include <tuple>

#include "common/expert_matrix.h"
#include "common/kept_tensor.h"
#include "common/launch.h"

namespace fastmoe_route {
namespace {

// A kernel of the CPU believes its offsets, so they are read before anything is written.
Tensor checked_offsets(const char* op, const Tensor& offsets, int64_t num_rows) {
  const Tensor dense = as_contiguous(offsets);
  if (!kReadsOnHost) return dense;
  const int32_t* bounds = static_cast<const int32_t*>(dense.const_data_ptr());
  const int64_t num_experts = offsets.size(0) - 1;
  check(bounds[0] == 0, op, ": offsets must start at 0, got ", bounds[0]);
  for (int64_t e = 0; e < num_experts; ++e)
    check(bounds[e] <= bounds[e + 1], op, ": offsets must never fall, got ", bounds[e], " then ", bounds[e + 1],
          " at expert ", e);
  check(bounds[num_experts] <= num_rows, op, ": offsets must end at most at ", num_rows, ", got ", bounds[num_experts]);
  return dense;
}

Tensor grouped_mm(const Tensor& x, const Tensor& w, const Tensor& offsets, const OptionalTensor& bias) {
  constexpr const char* kOp = "grouped_mm";
  check_dim(kOp, "x", x, 2);
  check_dim(kOp, "w", w, 3);
  check_dim(kOp, "offsets", offsets, 1);
  GroupedMmArgs args{};
  args.num_rows = x.size(0);
  args.num_experts = w.size(0);
  args.in = w.size(1);
  args.out = w.size(2);
  args.dtype = float_dtype(kOp, "x", x);
  check_same_dtype(kOp, "w", w, "x", x);
  check_size(kOp, "x", x, 1, args.in);
  check_dtype(kOp, "offsets", offsets, ScalarType::Int);
  check_size(kOp, "offsets", offsets, 0, args.num_experts + 1);
  if (bias.has_value()) {
    check_dim(kOp, "bias", *bias, 2);
    check_size(kOp, "bias", *bias, 0, args.num_experts);
    check_size(kOp, "bias", *bias, 1, args.out);
    check_same_dtype(kOp, "bias", *bias, "x", x);
  }
  check_devices(kOp, x, w, offsets, bias);
  const Tensor bounds = checked_offsets(kOp, offsets, args.num_rows);
  Tensor y = empty(x, {args.num_rows, args.out}, x.scalar_type());
  if (args.num_rows == 0 || args.out == 0) return y;
  const Tensor rows = with_dense_columns(x), weights = as_matrix_view(w);
  const OptionalTensor dense_bias = as_contiguous(bias);
  args.x = rows.const_data_ptr();
  args.x_stride = rows.stride(0);
  args.w = expert_matrix(weights);
  args.offsets = static_cast<const int32_t*>(bounds.const_data_ptr());
  args.bias = data_or_null<void>(dense_bias);
  args.y = y.mutable_data_ptr();
  launch(kOp, &kernels::grouped_mm, args, x);
  return y;
}

// (grad_w [E, A, B], or [E, B, A] when transposed; grad_bias [E, B]), each with no experts when not needed.
std::tuple<Tensor, Tensor> grouped_mm_wgrad(const Tensor& x, const Tensor& grad_y, const Tensor& offsets,
                                            bool transposed, bool needs_w, bool needs_bias) {
  constexpr const char* kOp = "grouped_mm_wgrad";
  check_dim(kOp, "x", x, 2);
  check_dim(kOp, "grad_y", grad_y, 2);
  check_dim(kOp, "offsets", offsets, 1);
  GroupedMmWgradArgs args{};
  args.num_rows = x.size(0);
  args.num_experts = offsets.size(0) - 1;
  args.in = x.size(1);
  args.out = grad_y.size(1);
  args.dtype = float_dtype(kOp, "x", x);
  check_same_dtype(kOp, "grad_y", grad_y, "x", x);
  check_size(kOp, "grad_y", grad_y, 0, args.num_rows);
  check_dtype(kOp, "offsets", offsets, ScalarType::Int);
  check(args.num_experts >= 0, kOp, ": offsets must have at least one element, got shape ", shape_of(offsets));
  check_devices(kOp, x, grad_y, offsets);
  const Tensor bounds = checked_offsets(kOp, offsets, args.num_rows);
  const int64_t w_experts = needs_w ? args.num_experts : 0, bias_experts = needs_bias ? args.num_experts : 0;
  Tensor grad_w = transposed ? empty_kept(Kept::kGradient, x, {w_experts, args.out, args.in}, x.scalar_type())
                             : empty_kept(Kept::kGradient, x, {w_experts, args.in, args.out}, x.scalar_type());
  Tensor grad_bias = empty(x, {bias_experts, args.out}, x.scalar_type());
  const bool has_w = w_experts * args.in * args.out > 0, has_bias = bias_experts * args.out > 0;
  if (!has_w && !has_bias) return {std::move(grad_w), std::move(grad_bias)};
  const Tensor rows = with_dense_columns(x), grads = with_dense_columns(grad_y);
  args.x = rows.const_data_ptr();
  args.x_stride = rows.stride(0);
  args.grad_y = grads.const_data_ptr();
  args.grad_y_stride = grads.stride(0);
  args.offsets = static_cast<const int32_t*>(bounds.const_data_ptr());
  args.grad_w = has_w ? grad_w.mutable_data_ptr() : nullptr;
  args.transposed = transposed;
  args.grad_bias = has_bias ? grad_bias.mutable_data_ptr() : nullptr;
  launch(kOp, &kernels::grouped_mm_wgrad, args, x);
  return {std::move(grad_w), std::move(grad_bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) {
  m.impl("grouped_mm", &boxed<&grouped_mm>);
  m.impl("grouped_mm_forward", &boxed<&grouped_mm>);
  m.impl("grouped_mm_wgrad", &boxed<&grouped_mm_wgrad>);
}

}  // namespace fastmoe_route
