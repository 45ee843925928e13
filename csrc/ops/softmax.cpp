#include "ops/softmax.h"

#include "common/launch.h"

namespace fastmoe_route {
namespace {

DType check_input(const Tensor& x, int64_t method) {
  check_dim("softmax", "x", x, 2);
  check(method >= 0 && method <= static_cast<int64_t>(SoftmaxMethod::kTwoPass),
        "softmax: method must be in [0, 3], got ", method);
  return float_dtype("softmax", "x", x);
}

void run(const Tensor& x, DType dtype, int64_t method, void* y) {
  const Tensor rows = with_dense_columns(x);
  const SoftmaxArgs args{rows.size(0),          rows.size(1),   dtype, static_cast<SoftmaxMethod>(method),
                         rows.const_data_ptr(), rows.stride(0), y};
  launch("softmax", &kernels::softmax, args, x);
}

// x [R, C] -> [R, C]
Tensor softmax(const Tensor& x, int64_t method) {
  const DType dtype = check_input(x, method);
  Tensor y = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  if (x.numel() == 0) return y;
  run(x, dtype, method, y.mutable_data_ptr());
  return y;
}

// A row is read while it is written, so `out` is x itself or apart from every element of it.
void check_apart(const Tensor& x, const Tensor& out) {
  const int64_t itemsize = element_size(float_dtype("softmax", "x", x));
  const auto from = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const auto to = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  const int64_t last = (x.size(0) - 1) * x.stride(0) + x.size(1) - 1;
  const bool is_apart = to + out.numel() * itemsize <= from || from + (last + 1) * itemsize <= to;
  check(is_apart || (from == to && x.is_contiguous()), "softmax: out must be x itself or share no memory with it, ",
        "got ", static_cast<int64_t>(to - from), " bytes between them");
}

// out [R, C], contiguous
void softmax_out(const Tensor& x, Tensor out, int64_t method) {
  const DType dtype = check_input(x, method);
  check_dim("softmax", "out", out, 2);
  check_size("softmax", "out", out, 0, x.size(0));
  check_size("softmax", "out", out, 1, x.size(1));
  check_same_dtype("softmax", "out", out, "x", x);
  check(out.is_contiguous(), "softmax: out must be contiguous, got shape ", shape_of(out));
  check_devices("softmax", x, out);
  if (x.numel() == 0) return;
  const Tensor rows = with_dense_columns(x);
  check_apart(rows, out);
  run(rows, dtype, method, out.mutable_data_ptr());
}

// grad_y [R, C], y [R, C] -> grad_x [R, C]
Tensor softmax_backward(const Tensor& grad_y, const Tensor& y) {
  check_dim("softmax_backward", "y", y, 2);
  check_dim("softmax_backward", "grad_y", grad_y, 2);
  check_size("softmax_backward", "grad_y", grad_y, 0, y.size(0));
  check_size("softmax_backward", "grad_y", grad_y, 1, y.size(1));
  const DType dtype = float_dtype("softmax_backward", "y", y);
  check_same_dtype("softmax_backward", "grad_y", grad_y, "y", y);
  check_devices("softmax_backward", y, grad_y);
  Tensor grad_x = empty(y, {y.size(0), y.size(1)}, y.scalar_type());
  if (y.numel() == 0) return grad_x;
  const Tensor grad = as_contiguous(grad_y), result = as_contiguous(y);
  const SoftmaxBackwardArgs args{
      y.size(0), y.size(1), dtype, grad.const_data_ptr(), result.const_data_ptr(), grad_x.mutable_data_ptr()};
  launch("softmax_backward", &kernels::softmax_backward, args, y);
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_forward", TORCH_BOX(&softmax));
  m.impl("softmax_out", TORCH_BOX(&softmax_out));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace fastmoe_route
