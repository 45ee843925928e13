// Decoding of one kernel: registers, labels, operands. Each instruction class decodes its own opcodes with the
// functions here and picks the function that runs them.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "engine/module.h"
#include "engine/program.h"
#include "engine/text.h"

namespace ptxvm {

struct Declaration {
  std::string name, init;
  int align = 0, element = 0;
  uint64_t size = 0;
};
Declaration parse_declaration(const std::string& statement);
// Bytes of a type such as "u32"; 0 for pred, -1 if it is none.
int type_bytes(std::string_view type);

// A type: kind u, s, b, f, h (f16), g (bf16), t (tf32), p (pred), and its bytes; packed for f16x2 and bf16x2.
struct Type {
  char kind = 0;
  int bytes = 0;
  bool is_packed = false;
};
bool parse_type(std::string_view text, Type& type);

class Decoder {
 public:
  Decoder(Module& module, Program& program) : module_(module), program_(program) {}
  void decode(std::string_view text);

  // ---- For the instruction classes.
  [[noreturn]] void fail(const std::string& what) const;
  // The parts of the opcode between dots.
  std::vector<std::string_view> parts;
  const Statement* statement = nullptr;
  bool has(std::string_view part) const;
  // The last part that is a type.
  Type type(int from_end = 0) const;
  size_t num_operands() const { return statement->operands.size(); }
  std::string_view text(size_t index) const;
  // A register, or an immediate as a constant of `bytes`.
  Operand source(std::string_view text, Type type);
  Operand source(size_t index, Type type) { return source(text(index), type); }
  Operand destination(std::string_view text);
  Operand destination(size_t index) { return destination(text(index)); }
  Operand predicate(std::string_view text);
  Operand constant(uint64_t value, int bytes);
  // Members of {a, b, ...}, or the one operand.
  std::vector<std::string_view> members(size_t index) const;
  // [base + offset] into instr.a and instr.imm.
  void address(std::string_view text, Instr& instr);
  uint32_t branch_target(std::string_view label);
  Program& program() { return program_; }

 private:
  struct Range {
    uint32_t offset, slot, count;
    uint8_t bytes;
  };
  void read_header(std::string_view head);
  void directive(std::string_view text);
  void declare_registers(std::string_view text);
  void location(std::string_view text);
  void instruction(const Statement& statement);
  void check_modifiers() const;
  bool find_register(std::string_view name, Operand& found) const;
  bool special(std::string_view name, Operand& found);
  Operand new_register(int bytes);
  void link();

  Module& module_;
  Program& program_;
  std::vector<std::unordered_map<std::string, Range>> scopes_;
  std::unordered_map<std::string, uint32_t> labels_;
  std::string label_before_;
  std::vector<std::pair<uint32_t, std::string>> branches_;
  std::vector<std::pair<uint32_t, std::vector<std::string>>> tables_;
  std::unordered_map<std::string, uint32_t> table_of_;
  std::unordered_map<std::string, Operand> specials_;
  std::unordered_map<std::string, uint64_t> symbols_;  // address in its window, as the PTX operand means it
  std::unordered_map<uint64_t, uint32_t> constants_[9];
  std::unordered_map<uint64_t, uint32_t> loc_at_;  // newest location of a file, line and column
  uint32_t loc_ = 0;
};

std::unique_ptr<Program> decode_kernel(Module& module, const std::string& name, std::string_view text);

// Each returns false if the opcode is not of its class.
bool decode_integer(Decoder& decoder, Instr& instr);
bool decode_bits(Decoder& decoder, Instr& instr);
bool decode_float(Decoder& decoder, Instr& instr);
bool decode_half(Decoder& decoder, Instr& instr);
bool decode_move(Decoder& decoder, Instr& instr);
bool decode_compare(Decoder& decoder, Instr& instr);
bool decode_convert(Decoder& decoder, Instr& instr);
bool decode_memory(Decoder& decoder, Instr& instr);
bool decode_atomic(Decoder& decoder, Instr& instr);
bool decode_async(Decoder& decoder, Instr& instr);
bool decode_collective(Decoder& decoder, Instr& instr);
bool decode_matrix(Decoder& decoder, Instr& instr);
bool decode_control(Decoder& decoder, Instr& instr);

}  // namespace ptxvm
