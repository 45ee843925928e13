// How a host file reaches its kernels. The file is written once and compiled twice: into the CPU library, and with
// FASTMOE_ROUTE_BACKEND_CUDA into the CUDA library. Between the two only these names differ:
//
//   FASTMOE_ROUTE_KEY  the dispatch key its ops are registered under
//   kernels::          the entry points: cpu:: or cuda::
//   kReadsOnHost       whether the host may look at the contents of tensors. Not on CUDA, where that would wait for the
//                      device: there kernels take every id that is out of range as "none".
//   check_devices      every tensor of a call lies on one device
//   launch             runs an entry point; on CUDA on torch's current stream of the tensor's device
//
// A third time, with FASTMOE_ROUTE_PTXVM as well, for the tests that run the CUDA path in the PTX virtual machine
// (tools/ptxvm): there CPU tensors are the memory of the device, and there is one stream.
#pragma once

#include "common/cuda_queue.h"
#include "common/tensor.h"

#ifdef FASTMOE_ROUTE_BACKEND_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>
#include <vector>
#endif
#if defined(FASTMOE_ROUTE_BACKEND_CUDA) && !defined(FASTMOE_ROUTE_PTXVM)
#define FASTMOE_ROUTE_KEY CUDA
#else
#define FASTMOE_ROUTE_KEY CPU
#endif

namespace fastmoe_route {

#ifndef FASTMOE_ROUTE_BACKEND_CUDA

namespace cpu {}
namespace kernels = cpu;
constexpr bool kReadsOnHost = true;

// The dispatcher takes the CPU's kernel only if every tensor is there.
template <class... Tensors>
inline void check_devices(const char*, const Tensor&, const Tensors&...) {}

template <class Args>
inline void launch(const char*, void (*kernel)(const Args&), const Args& args, const Tensor&) {
  kernel(args);
}

#else

namespace cuda {}
namespace kernels = cuda;
constexpr bool kReadsOnHost = false;

#ifdef FASTMOE_ROUTE_PTXVM
template <class... Tensors>
inline void check_devices(const char*, const Tensor&, const Tensors&...) {}
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline CUstream_st* current_stream(const char*, int32_t) { return nullptr; }
#else
using torch::stable::accelerator::DeviceGuard;

inline void check_device(const char* op, const Tensor& first, const Tensor& other) {
  check(other.is_cuda() && other.get_device_index() == first.get_device_index(), op,
        ": every tensor must be on the device of the first, CUDA device ", first.get_device_index(), ", got one on ",
        other.is_cuda() ? "CUDA device " : "a device that is not CUDA, of index ", other.get_device_index());
}
inline void check_device(const char* op, const Tensor& first, const OptionalTensor& other) {
  if (other.has_value()) check_device(op, first, *other);
}
template <class... Tensors>
inline void check_devices(const char* op, const Tensor& first, const Tensors&... others) {
  check_device(op, first, first);
  (check_device(op, first, others), ...);
}

// torch's current stream. libtorch_cuda is looked up among the libraries already loaded, so that this library neither
// links it nor loads it.
inline CUstream_st* current_stream(const char* op, int32_t device) {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const CurrentStream find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    void* symbol = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  check(find != nullptr, op, ": torch must be built with CUDA, got one without libtorch_cuda");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return static_cast<CUstream_st*>(stream);
}
#endif

// Whether torch's own float32 products may round to tf32 now. The stable ABI has no word for it: torch's functions are
// looked up by name, and where one is missing the answer is no. The older question allowTF32CuBLAS is not asked: it
// throws once a program has used torch's newer setting, fp32_precision.
inline bool torch_allows_tf32() {
  struct Context;
  constexpr int kCuda = 1, kMatmul = 3, kTf32 = 2;  // at::Float32Backend, Float32Op, Float32Precision
  struct Functions {
    Context& (*global)() = nullptr;
    int (*precision)(const Context*, int backend, int op) = nullptr;
    bool (*is_disabled_here)() = nullptr;
  };
  static const Functions torch = [] {
    Functions found;
    void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
    if (library == nullptr) return found;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    };
    find(found.global, "_ZN2at13globalContextEv");
    find(found.precision, "_ZNK2at7Context16float32PrecisionENS_14Float32BackendENS_9Float32OpE");
    find(found.is_disabled_here, "_ZN2at11NoTF32Guard19should_disable_tf32Ev");
    return found;
  }();
  return torch.global != nullptr && torch.precision != nullptr && torch.is_disabled_here != nullptr &&
         !torch.is_disabled_here() && torch.precision(&torch.global(), kCuda, kMatmul) == kTf32;
}

// Scratch is a tensor of torch's caching allocator: freed when the launch is queued, and handed out again by torch only
// to work that is queued behind it.
struct TorchScratch {
  const Tensor& like;
  std::vector<Tensor> blocks;

  static void* allocate(void* context, size_t bytes) {
    TorchScratch& self = *static_cast<TorchScratch*>(context);
    self.blocks.push_back(empty(self.like, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return self.blocks.back().mutable_data_ptr();
  }
};

template <class Args>
inline void launch(const char* op, CudaStatus (*kernel)(const Args&, const CudaQueue&), const Args& args,
                   const Tensor& on) {
  const int32_t device = on.get_device_index();
  [[maybe_unused]] const DeviceGuard guard(device);
  TorchScratch scratch{on, {}};
  const CudaStatus status =
      kernel(args, {current_stream(op, device), &TorchScratch::allocate, &scratch, &torch_allows_tf32});
  check(status.code == 0, op, ": ", status.text != nullptr ? status.text : "a CUDA call failed", " (CUDA error ",
        status.code, ")");
}

#endif

}  // namespace fastmoe_route
