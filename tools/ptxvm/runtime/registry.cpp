#include "runtime/registry.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace ptxvm {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1, kFatMagic = 0xba55ed50;
constexpr uint16_t kPtxEntry = 1;
constexpr uint64_t kCompressed = 0x2000 | 0x8000;
constexpr size_t kMostShared = 163 << 10;  // of a block, on sm_80

struct Wrapper {
  uint32_t magic, version;
  const uint8_t* data;
  const void* more;
};
struct FatHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct FatEntry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes, unused;
  uint16_t minor, major;
  uint32_t architecture, name_offset, name_bytes;
  uint64_t flags;
};

}  // namespace

Runtime& Runtime::get() {
  static Runtime* runtime = new Runtime;
  return *runtime;
}

Module* Runtime::load_fat_binary(const void* wrapper) {
  const Wrapper& w = *static_cast<const Wrapper*>(wrapper);
  if (w.magic != kWrapperMagic) return nullptr;
  const FatHeader& header = *reinterpret_cast<const FatHeader*>(w.data);
  if (header.magic != kFatMagic) return nullptr;
  const uint8_t* at = w.data + header.header_bytes;
  const uint8_t* const end = at + header.bytes;
  while (at < end) {
    const FatEntry& entry = *reinterpret_cast<const FatEntry*>(at);
    if (entry.kind == kPtxEntry) {
      if ((entry.flags & kCompressed) != 0) {
        fail(cudaErrorInvalidKernelImage, "the PTX is compressed: build with --no-compress");
        return nullptr;
      }
      const char* text = reinterpret_cast<const char*>(at + entry.header_bytes);
      try {
        modules_.push_back(std::make_unique<Module>(std::string(text, strnlen(text, entry.bytes))));
      } catch (const DecodeError& error) {
        fail(cudaErrorInvalidPtx, error.text);
        Engine::get().reports.push_back(error.text);
        return nullptr;
      }
      Engine::get().modules.push_back(modules_.back().get());
      return modules_.back().get();
    }
    at += entry.header_bytes + entry.bytes;
  }
  fail(cudaErrorInvalidKernelImage, "no PTX in the fat binary: build with code=compute_80");
  return nullptr;
}

void Runtime::add_kernel(const void* host, Module* module, const char* name) {
  auto kernel = std::make_unique<Kernel>();
  kernel->module = module;
  kernel->name = name;
  kernels_[host] = std::move(kernel);
  Engine::get().known_kernels.push_back(name);
}

void Runtime::add_variable(const void* host, Module* module, const char* name) {
  const Variable* variable = module->variable(name);
  if (variable == nullptr) return;
  variables_[host] = variable;
}

Kernel* Runtime::kernel(const void* host) {
  const auto found = kernels_.find(host);
  return found == kernels_.end() ? nullptr : found->second.get();
}

const Variable* Runtime::variable(const void* host) {
  const auto found = variables_.find(host);
  return found == variables_.end() ? nullptr : found->second;
}

const Program* Runtime::program(Kernel& kernel) {
  try {
    const Program* program = kernel.module == nullptr ? nullptr : kernel.module->kernel(kernel.name);
    if (program == nullptr) fail(cudaErrorInvalidDeviceFunction, "no kernel " + kernel.name + " in the PTX");
    return program;
  } catch (const DecodeError& error) {
    fail(cudaErrorInvalidPtx, error.text);
    Engine::get().reports.push_back(error.text);
    return nullptr;
  }
}

cudaError_t Runtime::launch(Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t shared) {
  if (const cudaError_t error = injected(); error != cudaSuccess) return error;
  const Program* program = this->program(kernel);
  if (program == nullptr) return error_;
  const std::string name = readable(kernel.name);
  const Options& options = Engine::get().options;
  const uint32_t most_blocks = name.find(options.few) != std::string::npos ? options.most_blocks : UINT32_MAX;
  const Dim3 g{std::min(grid.x, most_blocks), grid.y, grid.z}, b{block.x, block.y, block.z};
  if (g.count() == 0 || b.count() == 0 || g.count() >= uint64_t{1} << 31 || g.y > 65535 || g.z > 65535)
    return fail(cudaErrorInvalidConfiguration, "a grid or block of this size: " + name);
  if (b.count() > 1024 || b.count() > program->max_threads || b.z > 64)
    return fail(cudaErrorInvalidConfiguration, "a block of " + std::to_string(b.count()) + " threads, of at most " +
                                                   std::to_string(program->max_threads) + ": " + name);
  if (shared > static_cast<size_t>(kernel.max_dynamic_shared) || shared + program->static_shared > kMostShared)
    return fail(cudaErrorInvalidValue, std::to_string(shared) + " bytes of dynamic shared memory, of at most " +
                                           std::to_string(kernel.max_dynamic_shared) + ": " + name);
  std::vector<uint8_t> params(program->param_bytes);
  for (size_t i = 0; i < program->params.size(); ++i) {
    std::memcpy(params.data() + program->params[i].offset, arguments[i], program->params[i].size);
  }
  const std::string report =
      run_launch(Engine::get(), *kernel.module, *program, g, b, std::move(params), static_cast<uint32_t>(shared));
  return report.empty() ? cudaSuccess : fail(cudaErrorLaunchFailure, report);
}

cudaError_t Runtime::injected() {
  if (!Engine::get().fails_now()) return cudaSuccess;
  const cudaError_t code = static_cast<cudaError_t>(Engine::get().options.failing_code);
  switch (code) {
    case cudaErrorMemoryAllocation: return fail(code, "out of memory");
    case cudaErrorNoDevice: return fail(code, "no CUDA-capable device is detected");
    case cudaErrorNoKernelImageForDevice: return fail(code, "no kernel image is available for execution on the device");
    case cudaErrorLaunchFailure: return fail(code, "unspecified launch failure");
    default: return fail(code, "an injected error");
  }
}

cudaError_t Runtime::fail(cudaError_t error, const std::string& text) {
  if (error_ == cudaSuccess) {
    error_ = error;
    last_text_ = text;
  }
  return error;
}

cudaError_t Runtime::take_error() {
  const cudaError_t error = error_;
  error_ = cudaSuccess;
  return error;
}

const char* Runtime::text_of(cudaError_t error) const {
  return error == cudaSuccess ? "no error"
         : last_text_.empty() ? "an error of the PTX virtual machine"
                              : last_text_.c_str();
}

}  // namespace ptxvm
