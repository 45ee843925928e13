#include "engine/module.h"

#include <cxxabi.h>

#include <cctype>
#include <cstdlib>
#include <cstring>

#include "engine/decoder.h"
#include "engine/machine.h"
#include "engine/text.h"

namespace ptxvm {
namespace {

bool has_word(std::string_view text, std::string_view word) {
  for (size_t at = text.find(word); at != std::string_view::npos; at = text.find(word, at + 1)) {
    const size_t end = at + word.size();
    if (end >= text.size() || !(std::isalnum(static_cast<unsigned char>(text[end])) || text[end] == '_')) return true;
  }
  return false;
}

size_t closing_brace(const std::string& text, size_t open) {
  int depth = 0;
  for (size_t i = open; i < text.size(); ++i) {
    if (text[i] == '"') i = text.find('"', i + 1);
    if (text[i] == '{') ++depth;
    if (text[i] == '}' && --depth == 0) return i;
  }
  throw DecodeError{"a brace of the PTX module is never closed"};
}

std::vector<std::string> words_of(const std::string& text) {
  std::vector<std::string> words;
  for (size_t i = 0; i < text.size();) {
    while (i < text.size() && std::isspace(static_cast<unsigned char>(text[i]))) ++i;
    size_t end = i;
    while (end < text.size() && !std::isspace(static_cast<unsigned char>(text[end]))) ++end;
    if (end > i) words.push_back(text.substr(i, end - i));
    i = end;
  }
  return words;
}

}  // namespace

int type_bytes(std::string_view type) {
  if (type == "pred") return 0;
  if (type == "f16x2" || type == "bf16x2" || type == "tf32") return 4;
  if (type == "bf16") return 2;
  if (type.size() < 2) return -1;
  const int bits = std::atoi(std::string(type.substr(1)).c_str());
  return bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128 ? bits / 8 : -1;
}

Declaration parse_declaration(const std::string& statement) {
  Declaration found;
  std::string text = statement;
  const size_t equals = text.find('=');
  if (equals != std::string::npos) {
    found.init = std::string(trim(std::string_view(text).substr(equals + 1)));
    text.resize(equals);
  }
  uint64_t elements = 1;
  size_t bracket = text.find('[');
  if (bracket != std::string::npos) {
    const std::string name_part(trim(std::string_view(text).substr(0, bracket)));
    for (size_t at = bracket; at != std::string::npos; at = text.find('[', at + 1)) {
      const size_t end = text.find(']', at);
      const std::string_view inside = trim(std::string_view(text).substr(at + 1, end - at - 1));
      int64_t extent = 0;
      if (!inside.empty() && !parse_integer(inside, extent)) throw DecodeError{"cannot read " + statement};
      elements *= static_cast<uint64_t>(extent);
    }
    text = name_part;
  }
  const std::vector<std::string> words = words_of(text);
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == ".align") {
      found.align = std::atoi(words[++i].c_str());
    } else if (words[i] == ".v2" || words[i] == ".v4") {
      elements *= words[i] == ".v2" ? 2 : 4;
    } else if (words[i][0] == '.') {
      const int bytes = type_bytes(std::string_view(words[i]).substr(1));
      if (bytes > 0) found.element = bytes;
    } else {
      found.name = words[i];
    }
  }
  if (found.element <= 0 || found.name.empty()) throw DecodeError{"cannot read " + statement};
  found.size = elements * found.element;
  if (found.align == 0) found.align = found.element;
  return found;
}

Module::Module(std::string text) : text_(std::move(text)) {
  blank_comments(text_);
  std::vector<std::pair<std::string, Space>> variables;
  size_t at = 0;
  while (at < text_.size()) {
    if (std::isspace(static_cast<unsigned char>(text_[at])) || text_[at] == ';' || text_[at] == '\0') {
      ++at;
      continue;
    }
    const auto starts = [&](const char* word) { return text_.compare(at, std::strlen(word), word) == 0; };
    if (starts(".version") || starts(".target") || starts(".address_size") || starts(".file")) {
      size_t end = text_.find('\n', at);
      if (end == std::string::npos) end = text_.size();
      if (starts(".file")) {
        const std::string line = text_.substr(at, end - at);
        const size_t quote = line.find('"');
        const size_t close = line.find('"', quote + 1);
        files_[static_cast<uint32_t>(std::atoi(line.c_str() + 5))] = line.substr(quote + 1, close - quote - 1);
      }
      at = end;
      continue;
    }
    if (starts(".section")) {
      at = closing_brace(text_, text_.find('{', at)) + 1;
      continue;
    }
    size_t end = at;
    int depth = 0;
    for (; end < text_.size(); ++end) {
      if (text_[end] == '(') ++depth;
      if (text_[end] == ')') --depth;
      if (depth == 0 && (text_[end] == ';' || text_[end] == '{')) break;
    }
    const std::string_view head = std::string_view(text_).substr(at, end - at);
    const bool is_entry = has_word(head, ".entry");
    if (is_entry || has_word(head, ".func")) {
      if (end < text_.size() && text_[end] == '{') {
        const size_t close = closing_brace(text_, end);
        if (is_entry) {
          size_t name = head.find(".entry") + 6;
          while (std::isspace(static_cast<unsigned char>(head[name]))) ++name;
          size_t stop = name;
          while (stop < head.size() && head[stop] != '(' && !std::isspace(static_cast<unsigned char>(head[stop])))
            ++stop;
          spans_[std::string(head.substr(name, stop - name))] = {at, close + 1};
        }
        end = close + 1;
      }
      at = end;
      continue;
    }
    end = text_.find(';', at);
    if (end == std::string::npos) end = text_.size();
    const std::string statement = text_.substr(at, end - at);
    const bool is_extern = has_word(statement, ".extern");
    if (has_word(statement, ".shared")) {
      add_variable(statement, Space::kShared, is_extern);
    } else if (has_word(statement, ".global")) {
      add_variable(statement, Space::kGlobal, is_extern);
    } else if (has_word(statement, ".const")) {
      add_variable(statement, Space::kConst, is_extern);
    }
    at = end;
  }
}

void Module::add_variable(const std::string& statement, Space space, bool is_extern) {
  const Declaration declared = parse_declaration(statement);
  if (space == Space::kShared) {
    dynamic_shared_[declared.name] = is_extern;
    if (!is_extern) throw DecodeError{"module-level shared memory that is not extern: " + declared.name};
    return;
  }
  if (is_extern) return;
  auto variable = std::make_unique<Variable>();
  variable->name = declared.name;
  variable->space = space;
  variable->size = declared.size;
  variable->storage = std::make_unique<uint8_t[]>(declared.size + 256);
  const uintptr_t raw = reinterpret_cast<uintptr_t>(variable->storage.get());
  variable->address = reinterpret_cast<uint8_t*>((raw + 255) / 256 * 256);
  std::memset(variable->address, 0, declared.size);
  std::string_view init = declared.init;
  if (!init.empty()) {
    if (init[0] == '{') init = init.substr(1, init.rfind('}') - 1);
    size_t offset = 0;
    for (std::string_view part : split(init, ',')) {
      while (!part.empty() && (part[0] == '{' || part[0] == ' ')) part.remove_prefix(1);
      while (!part.empty() && (part.back() == '}' || part.back() == ' ')) part.remove_suffix(1);
      int64_t value = 0;
      if (part.empty()) continue;
      if (part.size() == 10 && part.substr(0, 2) == "0f") {
        value = static_cast<int64_t>(std::strtoull(std::string(part.substr(2)).c_str(), nullptr, 16));
      } else if (part.size() == 18 && part.substr(0, 2) == "0d") {
        value = static_cast<int64_t>(std::strtoull(std::string(part.substr(2)).c_str(), nullptr, 16));
      } else if (!parse_integer(part, value)) {
        if (part.substr(0, 8) == "generic(") part = part.substr(8, part.size() - 9);
        const Variable* other = this->variable(std::string(part));
        if (other == nullptr) throw DecodeError{"the initial value of " + declared.name + " is not understood"};
        value = static_cast<int64_t>(reinterpret_cast<uintptr_t>(other->address));
      }
      if (offset + declared.element > declared.size) break;
      std::memcpy(variable->address + offset, &value, static_cast<size_t>(declared.element));
      offset += static_cast<size_t>(declared.element);
    }
  }
  variables_[declared.name] = std::move(variable);
}

const Variable* Module::variable(const std::string& name) const {
  const auto found = variables_.find(name);
  return found == variables_.end() ? nullptr : found->second.get();
}

std::vector<std::string> Module::kernel_names() const {
  std::vector<std::string> names;
  for (const auto& entry : spans_) names.push_back(entry.first);
  return names;
}

const std::string& Module::file(uint32_t index) const {
  static const std::string kUnknown = "?";
  const auto found = files_.find(index);
  return found == files_.end() ? kUnknown : found->second;
}

void Module::add_memory(GlobalMemory& memory) {
  if (memory_ != nullptr) return;
  memory_ = &memory;
  for (const auto& entry : variables_) {
    const Variable& variable = *entry.second;
    memory.add(variable.address, variable.size, variable.space == Space::kGlobal, true, "variable " + variable.name);
  }
}

Module::~Module() {
  if (memory_ == nullptr) return;
  for (const auto& entry : variables_) memory_->remove(entry.second->address, entry.second->size);
}

Program* Module::kernel(const std::string& name) {
  auto& program = programs_[name];
  if (program == nullptr) {
    const auto span = spans_.find(name);
    if (span == spans_.end()) return nullptr;
    program = decode_kernel(
        *this, name, std::string_view(text_).substr(span->second.first, span->second.second - span->second.first));
  }
  return program.get();
}

std::string readable(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  for (const char* noise : {"(anonymous namespace)::", "fastmoe_route::cuda::", "fastmoe_route::"}) {
    for (size_t at = name.find(noise); at != std::string::npos; at = name.find(noise))
      name.erase(at, std::strlen(noise));
  }
  // Without the parameters, which start at the last top-level parenthesis.
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0 && i > 0) {
      name.resize(i);
      break;
    }
  }
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  return name;
}

}  // namespace ptxvm
