// A PTX module: its variables and files, and its kernels, each decoded when it is first launched.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/program.h"

namespace ptxvm {

class GlobalMemory;

struct Variable {
  std::string name;
  Space space;
  uint64_t size = 0;
  std::unique_ptr<uint8_t[]> storage;
  uint8_t* address = nullptr;
};

class Module {
 public:
  explicit Module(std::string text);
  Module(const Module&) = delete;

  // The kernel, or null if there is none of this name. Throws DecodeError.
  Program* kernel(const std::string& name);
  const Variable* variable(const std::string& name) const;
  std::vector<std::string> kernel_names() const;
  const std::string& file(uint32_t index) const;

  // Makes the module's variables memory of the device, once; the destructor takes them away.
  void add_memory(GlobalMemory& memory);
  ~Module();

 private:
  friend class Decoder;
  void add_variable(const std::string& statement, Space space, bool is_extern);

  std::string text_;
  std::unordered_map<std::string, std::pair<size_t, size_t>> spans_;  // of each kernel's text
  std::unordered_map<std::string, std::unique_ptr<Program>> programs_;
  std::unordered_map<std::string, std::unique_ptr<Variable>> variables_;
  std::unordered_map<std::string, bool> dynamic_shared_;  // extern .shared arrays of the module
  std::unordered_map<uint32_t, std::string> files_;
  GlobalMemory* memory_ = nullptr;
};

struct DecodeError {
  std::string text;
};

// "kernel<int>(Args)" of a mangled name, shortened.
std::string readable(const std::string& mangled);

}  // namespace ptxvm
