// The argument checks of host files. Message form: "op: argument must <rule>, got <value>".
// Everything is checked before anything is allocated.
#pragma once

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/torch_tensor.h"

namespace fastmoe_route {

using OptionalTensor = std::optional<Tensor>;

// A part of a message, and how it is printed.
struct MessagePart {
  const void* value;
  void (*print)(std::ostream& text, const void* value);

  template <class T>
  explicit MessagePart(const T& part)
      : value(&part), print([](std::ostream& text, const void* what) { text << *static_cast<const T*>(what); }) {}
};

// The one place that makes a text: compiled anew for every message, streams were half of the code of a host file.
[[noreturn]] inline __attribute__((noinline)) void throw_message(std::initializer_list<MessagePart> parts) {
  std::ostringstream message;
  for (const MessagePart& part : parts) part.print(message, part.value);
  throw std::runtime_error(message.str());
}

// Parts by value: literals of every length are one type then.
template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(Parts... parts) {
  throw_message({MessagePart(parts)...});
}

template <class... Parts>
inline __attribute__((always_inline)) void check(bool holds, Parts... parts) {
  if (__builtin_expect(!holds, 0)) fail(parts...);
}

constexpr int64_t kInt32Limit = int64_t{1} << 31;  // ids and rows are int32

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

inline void check_dim(const char* op, const char* argument, const Tensor& tensor, int64_t dim) {
  check(tensor.dim() == dim, op, ": ", argument, " must have ", dim, " dimensions, got shape ", shape_of(tensor));
}

inline void check_size(const char* op, const char* argument, const Tensor& tensor, int64_t d, int64_t size) {
  check(tensor.size(d) == size, op, ": ", argument, " must have size ", size, " in dimension ", d, ", got shape ",
        shape_of(tensor));
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType wanted) {
  check(tensor.scalar_type() == wanted, op, ": ", argument, " must be ", DTypeText{wanted}, ", got ", dtype_of(tensor));
}

inline void check_same_dtype(const char* op, const char* argument, const Tensor& tensor, const char* like_name,
                             const Tensor& like) {
  check(tensor.dtype_number() == like.dtype_number(), op, ": ", argument, " must have the dtype of ", like_name,
        ", got ", dtype_of(tensor));
}

// int32 [size], if given.
inline void check_vector(const char* op, const char* argument, const OptionalTensor& vector, int64_t size) {
  if (!vector.has_value()) return;
  check_dim(op, argument, *vector, 1);
  check_size(op, argument, *vector, 0, size);
  check_dtype(op, argument, *vector, ScalarType::Int);
}

}  // namespace fastmoe_route
