// A tensor of a call: the owner of a handle of torch's stable ABI, which remembers what it was asked.
//
// torch::stable::Tensor counts references in memory of its own, asks torch for every size again and finds a dtype by
// seven to thirteen calls: a tenth of a microsecond for every tensor of a call, where calls take one or two.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <utility>

namespace fastmoe_route {

using torch::headeronly::ScalarType;

// torch's numbers of the dtypes that are common here.
struct DTypeNumbers {
  const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64();
  const int32_t bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16();
  const int32_t int32 = aoti_torch_dtype_int32(), int64 = aoti_torch_dtype_int64();
};
inline const DTypeNumbers dtype_numbers;

class Tensor {
 public:
  // Takes the handle.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  explicit Tensor(const torch::stable::Tensor& tensor) : handle_(another(tensor.get())) {}
  Tensor(const Tensor& other) : handle_(another(other.handle_)) {}
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor other) noexcept {
    swap(other);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  // The handle, for who owns it from here on.
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  // The same tensor for functions of torch.
  torch::stable::Tensor stable() const { return torch::stable::Tensor(another(handle_)); }

  int64_t dim() const {
    if (dim_ < 0) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim_));
    return dim_;
  }
  int64_t size(int64_t d) const {
    if (sizes_ == nullptr) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes_));
    return sizes_[checked(d)];
  }
  int64_t stride(int64_t d) const {
    if (strides_ == nullptr) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides_));
    return strides_[checked(d)];
  }
  int64_t numel() const {
    int64_t numel;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle_, &numel));
    return numel;
  }
  bool is_contiguous() const {
    bool is_contiguous;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &is_contiguous));
    return is_contiguous;
  }
  ScalarType scalar_type() const {
    const int32_t number = dtype_number();
    if (number == dtype_numbers.float32) return ScalarType::Float;
    if (number == dtype_numbers.bfloat16) return ScalarType::BFloat16;
    if (number == dtype_numbers.float16) return ScalarType::Half;
    if (number == dtype_numbers.float64) return ScalarType::Double;
    if (number == dtype_numbers.int32) return ScalarType::Int;
    if (number == dtype_numbers.int64) return ScalarType::Long;
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(number));
  }
  // torch's number of the dtype.
  int32_t dtype_number() const {
    if (dtype_ < 0) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype_));
    return dtype_;
  }
  int32_t device_type() const {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &type));
    return type;
  }
  bool is_cuda() const { return device_type() == aoti_torch_device_type_cuda(); }
  int32_t get_device_index() const {
    int32_t index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &index));
    return index;
  }

  const void* const_data_ptr() const {
    const void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }
  void* mutable_data_ptr() const {
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }

 private:
  static AtenTensorHandle another(AtenTensorHandle handle) {
    AtenTensorHandle copy;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
    return copy;
  }
  int64_t checked(int64_t d) const {
    if (d < 0 || d >= dim()) throw std::runtime_error("fastmoe_route: a dimension must be one of the tensor");
    return d;
  }
  void swap(Tensor& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    std::swap(dim_, other.dim_);
    std::swap(dtype_, other.dtype_);
  }

  AtenTensorHandle handle_ = nullptr;
  // What was asked already; torch owns the arrays.
  mutable int64_t* sizes_ = nullptr;
  mutable int64_t* strides_ = nullptr;
  mutable int64_t dim_ = -1;
  mutable int32_t dtype_ = -1;
};

}  // namespace fastmoe_route
