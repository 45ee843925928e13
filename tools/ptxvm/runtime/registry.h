// What the CUDA runtime knows: modules found in fat binaries, the kernels and variables of host code, launches.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/machine.h"
#include "engine/module.h"

namespace ptxvm {

struct Kernel {
  Module* module = nullptr;
  std::string name;
  int max_dynamic_shared = 48 << 10;  // raised by cudaFuncSetAttribute
};

class Runtime {
 public:
  static Runtime& get();

  Module* load_fat_binary(const void* wrapper);
  void add_kernel(const void* host, Module* module, const char* name);
  void add_variable(const void* host, Module* module, const char* name);
  Kernel* kernel(const void* host);
  const Variable* variable(const void* host);
  // The decoded kernel; a report and null if the PTX cannot be decoded.
  const Program* program(Kernel& kernel);
  cudaError_t launch(Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t shared);

  // The error that a test has asked for, if this call is the one to fail: Options::failing_call.
  cudaError_t injected();
  // Errors: the first one since it was asked for, with its text.
  cudaError_t fail(cudaError_t error, const std::string& text);
  cudaError_t take_error();
  cudaError_t peek_error() const { return error_; }
  const char* text_of(cudaError_t error) const;

 private:
  std::vector<std::unique_ptr<Module>> modules_;
  std::unordered_map<const void*, std::unique_ptr<Kernel>> kernels_;
  std::unordered_map<const void*, const Variable*> variables_;
  cudaError_t error_ = cudaSuccess;
  std::string last_text_;
};

}  // namespace ptxvm
