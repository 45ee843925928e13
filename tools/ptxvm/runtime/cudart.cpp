// The entry points of libcudart.so.13 that host code compiled by nvcc calls: registration, launches, errors, device.
// There is one device, of compute capability 8.0 unless a test says other; a launch runs to its end before it returns.
#include "runtime/registry.h"

using ptxvm::Engine;
using ptxvm::Kernel;
using ptxvm::Runtime;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t unknown(const char* what) {
  return Runtime::get().fail(cudaErrorNotSupported, std::string("the stand-in runtime has no ") + what);
}

}  // namespace

extern "C" {

// ---- What the compiler's host code calls before main, and around a launch.

void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(Runtime::get().load_fat_binary(wrapper));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Runtime::get().add_kernel(host, reinterpret_cast<ptxvm::Module*>(module), name);
}
void __cudaRegisterVar(void** module, char* host, char*, const char* name, int, size_t, int, int) {
  if (module != nullptr) Runtime::get().add_variable(host, reinterpret_cast<ptxvm::Module*>(module), name);
}
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {
  unknown("managed variables");
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return cudaErrorMissingConfiguration;
  *grid = configurations.back().grid;
  *block = configurations.back().block;
  *shared = configurations.back().shared;
  *static_cast<cudaStream_t*>(stream) = configurations.back().stream;
  configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(Runtime::get().kernel(host));
  return *kernel == nullptr ? Runtime::get().fail(cudaErrorInvalidDeviceFunction, "no such kernel") : cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return Runtime::get().launch(*reinterpret_cast<Kernel*>(kernel), grid, block, arguments, shared);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                    cudaStream_t stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* host) { return __cudaGetKernel(kernel, host); }

// ---- Launches.

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  Kernel* kernel = Runtime::get().kernel(host);
  if (kernel == nullptr) return Runtime::get().fail(cudaErrorInvalidDeviceFunction, "no such kernel");
  return Runtime::get().launch(*kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension ||
        config->attrs[i].id == cudaLaunchAttributeCooperative)
      return unknown("clusters or cooperative launches");
  }
  return cudaLaunchKernel(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return unknown("cooperative launches");
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (const cudaError_t error = Runtime::get().injected(); error != cudaSuccess) return error;
  Kernel* kernel = Runtime::get().kernel(host);
  if (kernel == nullptr) kernel = reinterpret_cast<Kernel*>(const_cast<void*>(host));
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > 163 << 10)
      return Runtime::get().fail(cudaErrorInvalidValue, "more shared memory than a block can have");
    kernel->max_dynamic_shared = value > 48 << 10 ? value : 48 << 10;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  if (const cudaError_t error = Runtime::get().injected(); error != cudaSuccess) return error;
  Kernel* kernel = Runtime::get().kernel(host);
  if (kernel == nullptr) return Runtime::get().fail(cudaErrorInvalidDeviceFunction, "no such kernel");
  const ptxvm::Program* program = Runtime::get().program(*kernel);
  if (program == nullptr) return Runtime::get().peek_error();
  *attributes = cudaFuncAttributes{};
  attributes->sharedSizeBytes = program->static_shared;
  attributes->localSizeBytes = program->local_bytes;
  attributes->maxThreadsPerBlock = static_cast<int>(program->max_threads);
  attributes->numRegs = 64;
  attributes->ptxVersion = 80;
  attributes->binaryVersion = 80;
  attributes->maxDynamicSharedSizeBytes = kernel->max_dynamic_shared;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads,
                                                                   size_t shared, unsigned) {
  if (const cudaError_t error = Runtime::get().injected(); error != cudaSuccess) return error;
  Kernel* kernel = Runtime::get().kernel(host);
  const ptxvm::Program* program = kernel == nullptr ? nullptr : Runtime::get().program(*kernel);
  if (program == nullptr) return Runtime::get().fail(cudaErrorInvalidDeviceFunction, "no such kernel");
  const size_t bytes = shared + program->static_shared + 1024;
  const size_t by_threads = 2048 / static_cast<size_t>(threads < 32 ? 32 : threads),
               by_shared = (size_t{164} << 10) / bytes;
  *blocks = static_cast<int>(by_threads < by_shared ? by_threads : by_shared);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}

// ---- Errors.

cudaError_t cudaGetLastError() { return Runtime::get().take_error(); }
cudaError_t cudaPeekAtLastError() { return Runtime::get().peek_error(); }
const char* cudaGetErrorString(cudaError_t error) { return Runtime::get().text_of(error); }
const char* cudaGetErrorName(cudaError_t error) { return Runtime::get().text_of(error); }

// ---- The device.

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, Runtime::get().injected(); }
cudaError_t cudaGetDevice(int* device) { return *device = 0, Runtime::get().injected(); }
cudaError_t cudaSetDevice(int device) { return device <= 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return Runtime::get().peek_error(); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (const cudaError_t error = Runtime::get().injected(); error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = Engine::get().options.num_sms; break;
    case cudaDevAttrComputeCapabilityMajor: *value = Engine::get().options.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = Engine::get().options.capability % 10; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 163 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 164 << 10; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrL2CacheSize: *value = 40 << 20; break;
    case cudaDevAttrClockRate: *value = 1410000; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrIntegrated: *value = 0; break;
    default: return unknown(("device attribute " + std::to_string(attribute)).c_str());
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = cudaDeviceProp{};
  std::snprintf(properties->name, sizeof properties->name, "PTX virtual machine");
  properties->major = 8;
  properties->multiProcessorCount = Engine::get().options.num_sms;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 163 << 10;
  properties->sharedMemPerMultiprocessor = 164 << 10;
  properties->regsPerBlock = 65536;
  properties->l2CacheSize = 40 << 20;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** entry, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
  *entry = nullptr;
  if (result != nullptr) *result = cudaDriverEntryPointSymbolNotFound;
  return unknown(name);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPoint(name, entry, flags, result);
}

}  // extern "C"
