// What an entry point of the CUDA library is given and what it returns, without naming a CUDA or torch header: host
// files and the contract headers in ops/ are compiled where there is no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fastmoe_route {

// Where kernels are queued. Scratch comes from the caller, in stream order, and is valid for every kernel queued before
// the entry point returns; aligned to 256 bytes. It throws if there is none.
struct CudaQueue {
  CUstream_st* stream = nullptr;
  void* (*allocate)(void* context, size_t bytes) = nullptr;
  void* context = nullptr;
  bool (*allows_tf32)() = nullptr;  // whether torch lets float32 products round their operands to tf32 now

  void* scratch(size_t bytes) const { return allocate(context, bytes); }
  // For `count` elements, and for one if that is 0.
  template <class T>
  T* scratch_of(int64_t count) const {
    return static_cast<T*>(scratch(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)));
  }
};

// code is a cudaError_t, 0 for success; text says what went wrong and is null on success.
struct CudaStatus {
  int code = 0;
  const char* text = nullptr;
};

}  // namespace fastmoe_route
