// What every host file says to torch: argument checks with one message form, dtypes, output allocation, launch.
// Message form: "op: argument must <rule>, got <value>". Everything is checked before anything is allocated.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/huge_pages.h"

namespace fastmoe_route {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (__builtin_expect(!holds, 0)) fail(parts...);
}

// The shape of a tensor as a part of a message. Text only when it is printed: a check that holds costs a comparison.
struct ShapeText {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& text, ShapeText shape) {
    text << '[';
    for (int64_t d = 0; d < shape.tensor.dim(); ++d) text << (d ? ", " : "") << shape.tensor.size(d);
    return text << ']';
  }
};
inline ShapeText shape_of(const Tensor& tensor) { return {tensor}; }

// The dtype of a tensor as a part of a message, by the name that Python has for it.
struct DTypeText {
  ScalarType type;
  friend std::ostream& operator<<(std::ostream& text, DTypeText dtype) {
    switch (dtype.type) {
      case ScalarType::Byte: return text << "uint8";
      case ScalarType::Char: return text << "int8";
      case ScalarType::Short: return text << "int16";
      case ScalarType::Int: return text << "int32";
      case ScalarType::Long: return text << "int64";
      case ScalarType::Half: return text << "float16";
      case ScalarType::Float: return text << "float32";
      case ScalarType::Double: return text << "float64";
      case ScalarType::Bool: return text << "bool";
      case ScalarType::BFloat16: return text << "bfloat16";
      default: return text << "dtype " << torch::headeronly::toString(dtype.type);
    }
  }
};
inline DTypeText dtype_of(const Tensor& tensor) { return {tensor.scalar_type()}; }

// float32, bfloat16, float16 or float64; anything else is an error that names `argument`.
inline DType float_dtype(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: fail(op, ": ", argument, " must be float32, bfloat16, float16 or float64, got ", dtype_of(tensor));
  }
}

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

inline void check_dim(const char* op, const char* argument, const Tensor& tensor, int64_t dim) {
  check(tensor.dim() == dim, op, ": ", argument, " must have ", dim, " dimensions, got shape ", shape_of(tensor));
}

inline void check_size(const char* op, const char* argument, const Tensor& tensor, int64_t d, int64_t size) {
  check(tensor.size(d) == size, op, ": ", argument, " must have size ", size, " in dimension ", d, ", got shape ",
        shape_of(tensor));
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType wanted,
                        const char* wanted_name) {
  check(tensor.scalar_type() == wanted, op, ": ", argument, " must be ", wanted_name, ", got ", dtype_of(tensor));
}

inline void check_same_dtype(const char* op, const char* argument, const Tensor& tensor, const char* like_name,
                             const Tensor& like) {
  check(tensor.scalar_type() == like.scalar_type(), op, ": ", argument, " must have the dtype of ", like_name, ", got ",
        dtype_of(tensor));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor as_contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

// A matrix whose columns are contiguous, rows at any distance: itself if it can, else a copy.
inline Tensor with_dense_columns(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
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

// A fresh, uninitialised, contiguous tensor on the device of `like`, without a trip through the dispatcher. Large ones
// on the CPU ask for huge pages.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t strides[8];
  int64_t stride = 1;
  int64_t num_elements = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    num_elements *= shape.begin()[d];
    stride *= shape.begin()[d] > 0 ? shape.begin()[d] : 1;
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &handle));
  Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    const size_t bytes = static_cast<size_t>(num_elements) * element_bytes(dtype);
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
