#include "ops/softmax.h"

#include "common/launch.h"

namespace fastmoe_route {
namespace {

DType check_input(const Tensor& x, int64_t method) {
  check(method >= 0 && method <= static_cast<int64_t>(SoftmaxMethod::kTwoPass),
        "softmax: method must be in [0, 3], got ", method);
  return float_dtype("softmax", "x", x);
}

// The rows of x [..., C] without a copy: `stride` from each to the next, -1 if there is no such distance or columns are
// apart.
struct Rows {
  int64_t count = 1, columns = 1, stride = 1;

  explicit Rows(const Tensor& x) {
    const int64_t last = x.dim() - 1;
    if (last < 0) return;
    columns = stride = x.size(last);
    const bool is_dense = columns <= 1 || x.stride(last) == 1;
    bool is_even = true;
    for (int64_t d = last; d-- > 0;) {
      if (x.size(d) == 1) continue;
      if (count == 1) stride = x.stride(d);
      else is_even = is_even && x.stride(d) == count * stride;
      count *= x.size(d);
    }
    if (!is_dense || !is_even) stride = -1;
  }
};

// All but y.
SoftmaxArgs args_of(const Tensor& x, const Rows& rows, DType dtype, int64_t method) {
  const auto kind = static_cast<SoftmaxMethod>(method);
  return {rows.count, rows.columns, dtype, kind, x.const_data_ptr(), rows.stride, nullptr};
}

// x [R, C] -> [R, C]
Tensor softmax(const Tensor& x, int64_t method) {
  check_dim("softmax", "x", x, 2);
  const DType dtype = check_input(x, method);
  Tensor y = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  if (x.size(0) == 0 || x.size(1) == 0) return y;
  const auto run = [&](const Tensor& from) {
    SoftmaxArgs args = args_of(from, Rows(from), dtype, method);
    args.y = y.mutable_data_ptr();
    launch("softmax", &kernels::softmax, args, from);
  };
  has_dense_columns(x) ? run(x) : run(as_contiguous(x));
  return y;
}

Tensor softmax_plain(const Tensor& x) { return softmax(x, 0); }

// A row is read while it is written, so `out` is x itself or apart from every element of it.
void check_apart(const SoftmaxArgs& args) {
  const int64_t itemsize = element_size(args.dtype);
  const auto from = reinterpret_cast<uintptr_t>(args.x);
  const auto to = reinterpret_cast<uintptr_t>(args.y);
  const int64_t end = (args.num_rows - 1) * args.x_stride + args.num_cols;
  const bool is_apart = to + args.num_rows * args.num_cols * itemsize <= from || from + end * itemsize <= to;
  const bool is_contiguous = args.num_rows == 1 || args.x_stride == args.num_cols;
  check(is_apart || (from == to && is_contiguous), "softmax: out must be x itself or share no memory with it, got ",
        static_cast<int64_t>(to - from), " bytes between them");
}

// x [..., C], out the same, contiguous
void softmax_out(const Tensor& x, const Tensor& out, int64_t method) {
  const DType dtype = check_input(x, method);
  check_dim("softmax", "out", out, x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) check_size("softmax", "out", out, d, x.size(d));
  check_same_dtype("softmax", "out", out, "x", x);
  check(out.is_contiguous(), "softmax: out must be contiguous, got shape ", shape_of(out));
  check_devices("softmax", x, out);
  const auto run = [&](const Tensor& from, const Rows& rows) {
    if (rows.count == 0 || rows.columns == 0) return;
    SoftmaxArgs args = args_of(from, rows, dtype, method);
    args.y = out.mutable_data_ptr();
    check_apart(args);
    launch("softmax", &kernels::softmax, args, from);
  };
  const Rows rows(x);
  if (rows.stride >= 0) return run(x, rows);
  const Tensor dense = as_contiguous(x);
  run(dense, Rows(dense));
}

void softmax_plain_out(const Tensor& x, const Tensor& out) { softmax_out(x, out, 0); }

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
  m.impl("softmax", &boxed<&softmax>);
  m.impl("softmax_forward", &boxed<&softmax>);
  m.impl("softmax_plain_forward", &boxed<&softmax_plain>);
  m.impl("softmax_out", &boxed<&softmax_out>);
  m.impl("softmax_plain_out", &boxed<&softmax_plain_out>);
  m.impl("softmax_backward", &boxed<&softmax_backward>);
}

}  // namespace fastmoe_route
