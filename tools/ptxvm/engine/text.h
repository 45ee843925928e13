// The text of PTX as statements: what is between semicolons, split into guard, opcode and operands.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ptxvm {

struct Statement {
  enum Kind { kInstruction, kDirective, kLabel, kOpen, kClose, kLocation } kind = kInstruction;
  std::string_view text;   // of a directive or location: all of it; of a label: its name
  std::string_view guard;  // "%p1" or "!%p1", without the @
  std::string_view opcode;
  std::vector<std::string_view> operands;
};

// Reads statements one by one from a kernel's body; comments must have been blanked.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}
  bool next(Statement& statement);

 private:
  std::string_view text_;
  size_t at_ = 0;
};

std::string_view trim(std::string_view text);
// Splits at `mark` outside of brackets of every kind; parts are trimmed.
std::vector<std::string_view> split(std::string_view text, char mark);
// Replaces comments by spaces, newlines kept.
void blank_comments(std::string& text);
// Numbers as PTX writes them: 12, -3, 0x1F, 0b101, 017, 12U, 0f3F800000, 0d3FF0000000000000.
bool parse_integer(std::string_view text, int64_t& value);

}  // namespace ptxvm
