// Tensors as host files use them: the dtype and the layout that kernels take, fresh results, pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/box.h"
#include "common/huge_pages.h"

namespace fastmoe_route {

inline ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ScalarType::Float;
    case DType::kBFloat16: return ScalarType::BFloat16;
    case DType::kFloat16: return ScalarType::Half;
    default: return ScalarType::Double;
  }
}

// What scores and weights of this dtype are computed and returned in.
inline ScalarType arithmetic_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : Tensor(torch::stable::contiguous(tensor.stable()));
}

// The elements in order: the memory of the tensor, or of `copy`, which is made if it takes one.
inline const void* contiguous_data(const Tensor& tensor, OptionalTensor& copy) {
  if (tensor.is_contiguous()) return tensor.const_data_ptr();
  copy = as_contiguous(tensor);
  return copy->const_data_ptr();
}

inline OptionalTensor as_contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

inline bool has_dense_columns(const Tensor& matrix) { return matrix.size(1) <= 1 || matrix.stride(1) == 1; }

// A matrix whose columns are contiguous, rows at any distance: itself if it can, else a copy.
inline Tensor with_dense_columns(const Tensor& matrix) {
  return has_dense_columns(matrix) ? matrix : Tensor(torch::stable::contiguous(matrix.stable()));
}

inline void set_zero(const Tensor& tensor) {
  torch::stable::Tensor stable = tensor.stable();
  torch::stable::zero_(stable);
}

// Bytes of an element of a result: the float types, integers and bool.
inline size_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 1;
  }
}

// The sizes of a contiguous tensor, as torch's stable ABI takes them.
struct ContiguousShape {
  const int64_t* sizes;
  int64_t dim;
  int64_t num_elements = 1;
  int64_t strides[8];

  ContiguousShape(const int64_t* first, size_t count) : sizes(first), dim(static_cast<int64_t>(count)) {
    int64_t stride = 1;
    for (int64_t d = dim; d-- > 0;) {
      strides[d] = stride;
      num_elements *= sizes[d];
      stride *= sizes[d] > 0 ? sizes[d] : 1;
    }
  }
};

inline int32_t number_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// A fresh, uninitialised, contiguous tensor on the device of `like`, without a trip through the dispatcher. Large ones
// on the CPU ask for huge pages.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const ContiguousShape shape(sizes.begin(), sizes.size());
  const int32_t device_type = like.device_type();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dim, shape.sizes, shape.strides, number_of(dtype),
                                                         device_type, like.get_device_index(), &handle));
  Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    const size_t bytes = static_cast<size_t>(shape.num_elements) * element_bytes(dtype);
    if (bytes >= kHugePageBytes) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  }
  return tensor;
}

// The pointer of an optional tensor, or null.
template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace fastmoe_route
