// Memory, streams and events of the stand-in runtime. Device memory is ordinary memory with exact bounds; everything
// happens in the order it is called.
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "runtime/registry.h"

using ptxvm::Engine;
using ptxvm::Region;
using ptxvm::Runtime;

namespace {

constexpr size_t kAlignment = 256;
constexpr int kPoison = 0x7f;  // what fresh memory holds

std::unordered_map<void*, size_t>& allocations() {
  static auto* all = new std::unordered_map<void*, size_t>;
  return *all;
}

// Whether a range that begins in device memory ends in it; memory of the host is not known here.
bool lies_whole(const void* memory, size_t bytes) {
  const uint64_t at = reinterpret_cast<uintptr_t>(memory);
  return Engine::get().memory.find(at, at + 1, false) == nullptr ||
         Engine::get().memory.find(at, at + bytes, false) != nullptr;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  if (const cudaError_t error = Runtime::get().injected(); error != cudaSuccess) return error;
  if (bytes == 0) return cudaSuccess;
  if (!lies_whole(to, bytes) || !lies_whole(from, bytes))
    return Runtime::get().fail(cudaErrorInvalidValue,
                               "a copy of " + std::to_string(bytes) + " bytes that leaves device memory it begins in");
  std::memmove(to, from, bytes);
  Engine::get().memory.define(to, bytes);
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (const cudaError_t error = Runtime::get().injected(); error != cudaSuccess) return error;
  *memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, kPoison, bytes);
  allocations()[*memory] = bytes;
  Engine::get().memory.add(*memory, bytes, true, false, "device memory");
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const auto found = allocations().find(memory);
  if (found == allocations().end())
    return Runtime::get().fail(cudaErrorInvalidValue, "cudaFree of what was not allocated");
  Engine::get().memory.remove(memory, found->second);
  allocations().erase(found);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }
cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return cudaMallocHost(memory, bytes); }
cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }

// Ordinary memory becomes device memory with exactly these bounds.
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned flags) {
  allocations()[memory] = bytes;
  Engine::get().memory.add(memory, bytes, (flags & cudaHostRegisterReadOnly) == 0, true, "registered memory");
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
  const auto found = allocations().find(memory);
  if (found == allocations().end())
    return Runtime::get().fail(cudaErrorHostMemoryNotRegistered, "memory that is not registered");
  Engine::get().memory.remove(memory, found->second);
  allocations().erase(found);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) { return *device = host, cudaSuccess; }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  if (const cudaError_t error = Runtime::get().injected(); error != cudaSuccess) return error;
  if (bytes == 0) return cudaSuccess;
  const uint64_t at = reinterpret_cast<uintptr_t>(memory);
  Region* region = Engine::get().memory.find(at, at + bytes, true);
  if (region == nullptr)
    return Runtime::get().fail(cudaErrorInvalidValue,
                               "cudaMemset outside of device memory: " + Engine::get().memory.describe(at));
  std::memset(memory, value, bytes);
  Engine::get().memory.define(memory, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, value, bytes);
}

cudaError_t cudaGetSymbolAddress(void** memory, const void* symbol) {
  const ptxvm::Variable* variable = Runtime::get().variable(symbol);
  if (variable == nullptr) return Runtime::get().fail(cudaErrorInvalidSymbol, "no such variable");
  *memory = variable->address;
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  void* to = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&to, symbol);
  return error != cudaSuccess ? error : copy(static_cast<char*>(to) + offset, from, bytes);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  void* from = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&from, symbol);
  return error != cudaSuccess ? error : copy(to, static_cast<char*>(from) + offset, bytes);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  *attributes = cudaPointerAttributes{};
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = const_cast<void*>(memory);
  return cudaSuccess;
}

// ---- Streams and events: nothing is ever under way.

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return Runtime::get().peek_error(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

using Clock = std::chrono::steady_clock;
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new Clock::time_point);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Clock::time_point*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *reinterpret_cast<Clock::time_point*>(event) = Clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(*reinterpret_cast<Clock::time_point*>(end) -
                                                           *reinterpret_cast<Clock::time_point*>(begin))
                      .count();
  return cudaSuccess;
}

}  // extern "C"
