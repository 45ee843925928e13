#include "ops/softmax_topk.h"

#include <tuple>

#include "common/launch.h"

namespace fastmoe_route {
namespace {

DType check_input(const Tensor& x, int64_t k) {
  check_dim("softmax_topk", "x", x, 2);
  const DType dtype = float_dtype("softmax_topk", "x", x);
  const int64_t columns = x.size(1);
  check(columns < kInt32Limit, "softmax_topk: x must have fewer than 2147483648 columns, got shape ", shape_of(x));
  const int64_t most = columns < kSoftmaxTopkLimit ? columns : kSoftmaxTopkLimit;
  check(k >= 1 && k <= most, "softmax_topk: k must be in [1, ", most, "], got ", k);
  return dtype;
}

void run(const Tensor& x, int64_t k, DType dtype, Tensor& values, Tensor& indices, double* statistics) {
  if (x.size(0) == 0) return;
  const Tensor rows = with_dense_columns(x);
  const SoftmaxTopkArgs args{rows.size(0),
                             rows.size(1),
                             k,
                             dtype,
                             rows.const_data_ptr(),
                             rows.stride(0),
                             values.mutable_data_ptr(),
                             static_cast<int64_t*>(indices.mutable_data_ptr()),
                             statistics};
  launch("softmax_topk", &kernels::softmax_topk, args, x);
}

// x [R, C] -> (values [R, k], statistics [R, 2], indices [R, k])
std::tuple<Tensor, Tensor, Tensor> softmax_topk(const Tensor& x, int64_t k) {
  const DType dtype = check_input(x, k);
  Tensor values = empty(x, {x.size(0), k}, x.scalar_type());
  Tensor statistics = empty(x, {x.size(0), 2}, ScalarType::Double);
  Tensor indices = empty(x, {x.size(0), k}, ScalarType::Long);
  run(x, k, dtype, values, indices, static_cast<double*>(statistics.mutable_data_ptr()));
  return {std::move(values), std::move(statistics), std::move(indices)};
}

// x [R, C] -> (values [R, k], indices [R, k])
std::tuple<Tensor, Tensor> softmax_topk_forward(const Tensor& x, int64_t k) {
  const DType dtype = check_input(x, k);
  Tensor values = empty(x, {x.size(0), k}, x.scalar_type());
  Tensor indices = empty(x, {x.size(0), k}, ScalarType::Long);
  run(x, k, dtype, values, indices, nullptr);
  return {std::move(values), std::move(indices)};
}

void check_saved(const char* argument, const Tensor& tensor, const Tensor& x, int64_t size) {
  check_dim("softmax_topk_backward", argument, tensor, 2);
  check_size("softmax_topk_backward", argument, tensor, 0, x.size(0));
  check_size("softmax_topk_backward", argument, tensor, 1, size);
}

// -> grad_x [R, C]
Tensor softmax_topk_backward(const Tensor& grad_values, const Tensor& x, const Tensor& statistics,
                             const Tensor& indices) {
  check_dim("softmax_topk_backward", "indices", indices, 2);
  const int64_t k = indices.size(1);
  const DType dtype = check_input(x, k);
  check_saved("grad_values", grad_values, x, k);
  check_saved("statistics", statistics, x, 2);
  check_saved("indices", indices, x, k);
  check_same_dtype("softmax_topk_backward", "grad_values", grad_values, "x", x);
  check_dtype("softmax_topk_backward", "statistics", statistics, ScalarType::Double);
  check_dtype("softmax_topk_backward", "indices", indices, ScalarType::Long);
  check_devices("softmax_topk_backward", x, grad_values, statistics, indices);
  Tensor grad_x = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  if (x.size(0) == 0) return grad_x;
  const Tensor grad = as_contiguous(grad_values), rows = with_dense_columns(x), saved = as_contiguous(statistics),
               columns = as_contiguous(indices);
  const int64_t* column = static_cast<const int64_t*>(columns.const_data_ptr());
  for (int64_t i = 0; kReadsOnHost && i < x.size(0) * k; ++i)
    check(column[i] >= 0 && column[i] < x.size(1), "softmax_topk_backward: indices must be in [0, ", x.size(1) - 1,
          "], got ", column[i]);
  const SoftmaxTopkBackwardArgs args{x.size(0),
                                     x.size(1),
                                     k,
                                     dtype,
                                     grad.const_data_ptr(),
                                     rows.const_data_ptr(),
                                     rows.stride(0),
                                     static_cast<const double*>(saved.const_data_ptr()),
                                     column,
                                     grad_x.mutable_data_ptr()};
  launch("softmax_topk_backward", &kernels::softmax_topk_backward, args, x);
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) {
  m.impl("softmax_topk", &boxed<&softmax_topk>);
  m.impl("softmax_topk_forward", &boxed<&softmax_topk_forward>);
  m.impl("softmax_topk_backward", &boxed<&softmax_topk_backward>);
}

}  // namespace fastmoe_route
