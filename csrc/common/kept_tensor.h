// Tensors in kept memory (common/kept_memory.h): the weight gradients of both expert ops, and what moe_mlp leaves to
// its backward pass.
#pragma once

#include "common/kept_memory.h"
#include "common/tensor.h"

#ifndef FASTMOE_ROUTE_BACKEND_CUDA
#include <dlfcn.h>
#endif

namespace fastmoe_route {

#ifdef FASTMOE_ROUTE_BACKEND_CUDA

// torch's allocator on CUDA keeps memory itself.
inline Tensor empty_kept(Kept, const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return empty(like, shape, dtype);
}

#else

// torch_from_blob of the stable ABI of torch 2.11, looked up by name: this library asks for 2.10 only.
using FromBlob = AOTITorchError (*)(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
                                    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context),
                                    void* context);
inline FromBlob find_from_blob() {
  static const FromBlob found = [] {
    void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
    return reinterpret_cast<FromBlob>(library != nullptr ? dlsym(library, "torch_from_blob") : nullptr);
  }();
  return found;
}

// As `empty`; large tensors lie in kept memory, where torch can be told who takes it back. Their storage cannot be
// resized, which is why other results do not.
inline Tensor empty_kept(Kept kind, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const ContiguousShape shape(sizes.begin(), sizes.size());
  const size_t bytes = static_cast<size_t>(shape.num_elements) * element_bytes(dtype);
  if (bytes < kKeptBytes || find_from_blob() == nullptr) return empty(like, sizes, dtype);
  KeptBlock* block = take_kept(kind, bytes);
  if (block == nullptr) return empty(like, sizes, dtype);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = find_from_blob()(
      memory_of(block), shape.dim, shape.sizes, shape.strides, 0, number_of(dtype), aoti_torch_device_type_cpu(),
      like.get_device_index(), &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) { give_back(static_cast<KeptBlock*>(context)); }, block);
  if (error != AOTI_TORCH_SUCCESS) give_back(block);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

#endif

}  // namespace fastmoe_route
