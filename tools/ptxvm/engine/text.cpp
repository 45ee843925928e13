#include "engine/text.h"

#include <cctype>
#include <cstdint>
#include <cstdlib>

namespace ptxvm {

std::string_view trim(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.remove_suffix(1);
  return text;
}

std::vector<std::string_view> split(std::string_view text, char mark) {
  std::vector<std::string_view> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    const char c = i < text.size() ? text[i] : mark;
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c != mark || (depth > 0 && i < text.size())) continue;
    parts.push_back(trim(text.substr(begin, i - begin)));
    begin = i + 1;
  }
  return parts;
}

void blank_comments(std::string& text) {
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] == '"') {
      i = text.find('"', i + 1);
      if (i == std::string::npos) return;
    } else if (text[i] == '/' && text[i + 1] == '/') {
      for (; i < text.size() && text[i] != '\n'; ++i) text[i] = ' ';
    } else if (text[i] == '/' && text[i + 1] == '*') {
      size_t end = text.find("*/", i + 2);
      end = end == std::string::npos ? text.size() : end + 2;
      for (; i < end; ++i) {
        if (text[i] != '\n') text[i] = ' ';
      }
      --i;
    }
  }
}

bool parse_integer(std::string_view text, int64_t& value) {
  std::string number(text);
  bool is_negative = false;
  if (!number.empty() && number[0] == '-') {
    is_negative = true;
    number.erase(0, 1);
  }
  if (!number.empty() && (number.back() == 'U' || number.back() == 'u') && number.rfind("0f", 0) != 0)
    number.pop_back();
  if (number.empty() || !std::isdigit(static_cast<unsigned char>(number[0]))) return false;
  int base = 10;
  const char* digits = number.c_str();
  if (number.size() > 2 && number[0] == '0' && (number[1] == 'x' || number[1] == 'X')) {
    base = 16;
    digits += 2;
  } else if (number.size() > 2 && number[0] == '0' && (number[1] == 'b' || number[1] == 'B')) {
    base = 2;
    digits += 2;
  } else if (number.size() > 1 && number[0] == '0') {
    base = 8;
  }
  char* end = nullptr;
  const uint64_t magnitude = std::strtoull(digits, &end, base);
  if (*end != '\0') return false;
  value = static_cast<int64_t>(is_negative ? 0 - magnitude : magnitude);
  return true;
}

bool Reader::next(Statement& statement) {
  statement = {};
  while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  if (at_ >= text_.size()) return false;
  const char first = text_[at_];
  if (first == '{' || first == '}') {
    statement.kind = first == '{' ? Statement::kOpen : Statement::kClose;
    ++at_;
    return true;
  }
  if (first == ';') {
    ++at_;
    return next(statement);
  }
  if (text_.compare(at_, 4, ".loc") == 0 && at_ + 4 < text_.size() && std::isspace(text_[at_ + 4])) {
    const size_t end = text_.find('\n', at_);
    statement.kind = Statement::kLocation;
    statement.text = trim(text_.substr(at_, end - at_));
    at_ = end == std::string_view::npos ? text_.size() : end;
    return true;
  }
  size_t end = at_;
  int depth = 0;
  for (; end < text_.size(); ++end) {
    const char c = text_[end];
    if (c == '"') end = text_.find('"', end + 1);
    if (c == '{' || c == '(' || c == '[') ++depth;
    if (c == '}' || c == ')' || c == ']') --depth;
    if (c == ';') break;
    // A label ends at a single colon; L2::128B and the like have two.
    if (c == ':' && depth == 0) {
      if (end + 1 < text_.size() && text_[end + 1] == ':') {
        ++end;
        continue;
      }
      statement.kind = Statement::kLabel;
      statement.text = trim(text_.substr(at_, end - at_));
      at_ = end + 1;
      return true;
    }
  }
  const std::string_view all = trim(text_.substr(at_, end - at_));
  at_ = end < text_.size() ? end + 1 : end;
  statement.text = all;
  if (all[0] == '.') {
    statement.kind = Statement::kDirective;
    return true;
  }
  std::string_view rest = all;
  if (rest[0] == '@') {
    size_t space = 1;
    while (space < rest.size() && !std::isspace(static_cast<unsigned char>(rest[space]))) ++space;
    statement.guard = rest.substr(1, space - 1);
    rest = trim(rest.substr(space));
  }
  size_t space = 0;
  while (space < rest.size() && !std::isspace(static_cast<unsigned char>(rest[space]))) ++space;
  statement.opcode = rest.substr(0, space);
  rest = trim(rest.substr(space));
  if (!rest.empty()) statement.operands = split(rest, ',');
  return true;
}

}  // namespace ptxvm
