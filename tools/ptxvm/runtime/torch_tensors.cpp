// Makes the tensors of a call device memory with exact bounds: the test library is linked with `--wrap`, so that every
// call of these shims of torch comes here first, and csrc/common/box.h tells of results.
//
//   torch_get_const_data_ptr    the elements of the tensor, from its first to its last, may be read
//   torch_get_mutable_data_ptr  and written
//   aoti_torch_empty_strided    they are undefined until a kernel writes them
//   ptxvm_returns               the tensor is handed to the caller: every element must have been written, and
//   aoti_torch_delete_tensor_object  the pointers taken from this handle are invalid from now on
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "engine/machine.h"

using ptxvm::Engine;
using ptxvm::Region;

namespace {

struct Extent {
  char* base;
  uint64_t bytes;
};
struct Held {
  std::vector<Extent> extents;
  bool is_fresh = false;
};
std::unordered_map<AtenTensorHandle, Held>& held() {
  static auto* all = new std::unordered_map<AtenTensorHandle, Held>;
  return *all;
}

void require(AOTITorchError error) {
  if (error != 0) throw std::runtime_error("ptxvm: a shim of torch failed");
}

int64_t element_bytes(AtenTensorHandle tensor) {
  int32_t dtype = 0;
  require(aoti_torch_get_dtype(tensor, &dtype));
  if (dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_int64()) return 8;
  if (dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_int32()) return 4;
  if (dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16()) return 2;
  if (dtype == aoti_torch_dtype_uint8() || dtype == aoti_torch_dtype_bool() || dtype == aoti_torch_dtype_int8())
    return 1;
  throw std::runtime_error("ptxvm: a tensor of an unknown dtype");
}

// From the first element to the end of the last; strides are never negative.
Extent extent_of(AtenTensorHandle tensor, void* base) {
  int64_t dim = 0;
  require(aoti_torch_get_dim(tensor, &dim));
  int64_t last = 0;
  for (int64_t d = 0; d < dim; ++d) {
    int64_t size = 0, stride = 0;
    require(aoti_torch_get_size(tensor, d, &size));
    require(aoti_torch_get_stride(tensor, d, &stride));
    if (size == 0) return {static_cast<char*>(base), 0};
    last += (size - 1) * stride;
  }
  return {static_cast<char*>(base), static_cast<uint64_t>((last + 1) * element_bytes(tensor))};
}

std::string name_of(AtenTensorHandle tensor, bool is_fresh) {
  int64_t dim = 0;
  require(aoti_torch_get_dim(tensor, &dim));
  std::string text = is_fresh ? "a new tensor [" : "tensor [";
  for (int64_t d = 0; d < dim; ++d) {
    int64_t size = 0;
    require(aoti_torch_get_size(tensor, d, &size));
    text += (d > 0 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

void hold(AtenTensorHandle tensor, void* base, bool is_writable) {
  Held& mine = held()[tensor];
  const Extent extent = extent_of(tensor, base);
  if (extent.bytes == 0) return;
  for (const Extent& known : mine.extents) {
    if (known.base != extent.base || known.bytes != extent.bytes) continue;
    Region* region = Engine::get().memory.exact(extent.base, extent.bytes);
    if (region == nullptr || region->is_writable || !is_writable) return;
  }
  Engine::get().memory.add(extent.base, extent.bytes, is_writable, !mine.is_fresh, name_of(tensor, mine.is_fresh));
  mine.extents.push_back(extent);
}

void forget(AtenTensorHandle tensor) {
  const auto found = held().find(tensor);
  if (found == held().end()) return;
  for (const Extent& extent : found->second.extents) Engine::get().memory.remove(extent.base, extent.bytes);
  held().erase(found);
}

}  // namespace

extern "C" {

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError __real_aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError __real_aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                               int32_t device, int32_t index, AtenTensorHandle* made);

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (error == 0 && *data != nullptr) hold(tensor, const_cast<void*>(*data), false);
  return error;
}
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (error == 0 && *data != nullptr) hold(tensor, *data, true);
  return error;
}
AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                               int32_t device, int32_t index, AtenTensorHandle* made) {
  if (Engine::get().fails_now()) return 1;  // as torch's allocator does when there is no memory
  const AOTITorchError error = __real_aoti_torch_empty_strided(dim, sizes, strides, dtype, device, index, made);
  if (error == 0) held()[*made].is_fresh = true;
  return error;
}
void ptxvm_returns(AtenTensorHandle tensor) {
  const auto found = held().find(tensor);
  if (found != held().end() && found->second.is_fresh) {
    for (const Extent& extent : found->second.extents) {
      Region* region = Engine::get().memory.exact(extent.base, extent.bytes);
      if (region == nullptr || region->shadow.is_empty()) continue;
      const uint64_t begin = reinterpret_cast<uintptr_t>(extent.base);
      const uint64_t first = region->shadow.first_undefined(begin, extent.bytes);
      if (first == begin + extent.bytes) continue;
      const std::string report = "unwritten result: byte " + std::to_string(first - begin) + " of " + region->what +
                                 " of " + std::to_string(extent.bytes) + " bytes is returned and was never written";
      Engine::get().reports.push_back(report);
      throw std::runtime_error(report);
    }
  }
  forget(tensor);
}
AOTITorchError __wrap_aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  forget(tensor);
  return __real_aoti_torch_delete_tensor_object(tensor);
}

}  // extern "C"
