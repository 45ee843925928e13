#include "engine/decoder.h"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <unordered_set>

#include "engine/layout.h"

namespace ptxvm {
namespace {

constexpr uint32_t kRedZone = 16;  // bytes no variable owns, between the variables of shared memory

struct SpecialName {
  const char* name;
  Special what;
  int bytes;
};
constexpr SpecialName kSpecials[] = {
    {"%tid.x", Special::kTidX, 4},
    {"%tid.y", Special::kTidY, 4},
    {"%tid.z", Special::kTidZ, 4},
    {"%ntid.x", Special::kNtidX, 4},
    {"%ntid.y", Special::kNtidY, 4},
    {"%ntid.z", Special::kNtidZ, 4},
    {"%ctaid.x", Special::kCtaX, 4},
    {"%ctaid.y", Special::kCtaY, 4},
    {"%ctaid.z", Special::kCtaZ, 4},
    {"%nctaid.x", Special::kNctaX, 4},
    {"%nctaid.y", Special::kNctaY, 4},
    {"%nctaid.z", Special::kNctaZ, 4},
    {"%laneid", Special::kLaneId, 4},
    {"%warpid", Special::kWarpId, 4},
    {"%nwarpid", Special::kNwarpId, 4},
    {"%lanemask_eq", Special::kLaneEq, 4},
    {"%lanemask_lt", Special::kLaneLt, 4},
    {"%lanemask_le", Special::kLaneLe, 4},
    {"%lanemask_gt", Special::kLaneGt, 4},
    {"%lanemask_ge", Special::kLaneGe, 4},
    {"%smid", Special::kSmId, 4},
    {"%nsmid", Special::kNsmId, 4},
    {"%gridid", Special::kGridId, 8},
    {"%dynamic_smem_size", Special::kDynamicShared, 4},
    {"%total_smem_size", Special::kTotalShared, 4},
    {"dynamic shared memory", Special::kDynamicStart, 8},
    {"dynamic shared memory, 32 bits", Special::kDynamicStart, 4},
    {"%clock", Special::kClock, 4},
    {"%clock64", Special::kClock64, 8},
    {"%globaltimer", Special::kGlobalTimer, 8},
};

// What may stand between the dots beside types, by opcode: what its class looks at, and what changes nothing here
// (hints to caches, .aligned, .uni). An opcode that is not listed takes types only.
struct Modifiers {
  const char* opcodes;
  const char* allowed;
};
constexpr Modifiers kModifiers[] = {
    {"add sub", "rn rz rm rp ftz sat cc"},
    {"addc subc", "cc"},
    {"mul", "rn rz rm rp ftz sat lo hi wide"},
    {"mad", "rn rz rm rp ftz sat lo hi wide cc"},
    {"madc", "lo hi cc"},
    {"fma", "rn rz rm rp ftz sat relu"},
    {"div", "rn rz rm rp ftz approx full"},
    {"min max", "ftz NaN"},
    {"abs neg", "ftz"},
    {"rcp sqrt rsqrt ex2 lg2 sin cos tanh", "rn rz rm rp ftz approx"},
    {"testp", "finite infinite number notanumber normal subnormal"},
    {"cvt", "rn rz rm rp rni rzi rmi rpi rna ftz sat relu"},
    {"set setp", "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor"},
    {"shf", "l r wrap clamp"},
    {"bmsk", "wrap clamp"},
    {"bfind", "shiftamt"},
    {"cvta isspacep", "to global shared shared::cta local param const"},
    {"ld ldu st",
     "global shared shared::cta local param param::entry const weak relaxed acquire release volatile mmio gpu sys nc "
     "v2 v4 ca cg cs lu cv wb wt L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate "
     "L2::64B L2::128B L2::256B L2::cache_hint"},
    {"atom red",
     "global shared shared::cta relaxed acquire release acq_rel gpu sys add min max inc dec and or xor exch cas"},
    {"membar fence", "cta gl gpu sys sc acq_rel"},
    {"prefetch prefetchu discard applypriority", "global local L1 L2 L2::evict_last L2::evict_normal"},
    {"createpolicy", "fractional L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged"},
    {"cp",
     "async ca cg shared shared::cta global commit_group wait_all wait_group L2::64B L2::128B L2::256B L2::cache_hint"},
    {"shfl", "sync up down bfly idx"},
    {"vote", "sync all any uni ballot"},
    {"match", "sync all any"},
    {"redux", "sync add min max and or xor"},
    {"mma", "sync aligned row col m16n8k16 m16n8k8 m16n8k4 m8n8k4"},
    {"ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"},
    {"bar barrier", "cta sync arrive red warp aligned popc and or"},
    {"bra call ret", "uni"},
    {"brx", "idx uni"},
    {"griddepcontrol", "wait launch_dependents"},
};

bool is_listed(const char* words, std::string_view word) {
  for (std::string_view one : split(words, ' ')) {
    if (one == word) return true;
  }
  return false;
}

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

}  // namespace

bool parse_type(std::string_view text, Type& type) {
  if (text == "pred") return type = {'p', 0, false}, true;
  if (text == "f16") return type = {'h', 2, false}, true;
  if (text == "bf16") return type = {'g', 2, false}, true;
  if (text == "f16x2") return type = {'h', 4, true}, true;
  if (text == "bf16x2") return type = {'g', 4, true}, true;
  if (text == "tf32") return type = {'t', 4, false}, true;
  if (text.size() < 2 || std::strchr("usbf", text[0]) == nullptr) return false;
  for (const char* bits : {"8", "16", "32", "64", "128"}) {
    if (text.substr(1) == bits) return type = {text[0], std::atoi(bits) / 8, false}, true;
  }
  return false;
}

void Decoder::fail(const std::string& what) const {
  std::string message = "ptxvm cannot decode";
  if (statement != nullptr) message += " `" + std::string(statement->text) + "`";
  message += ": " + what;
  const Loc& loc = program_.locs[loc_];
  if (loc.line != 0) message += " (" + module_.file(loc.file) + ":" + std::to_string(loc.line) + ")";
  throw DecodeError{message};
}

bool Decoder::has(std::string_view part) const {
  for (std::string_view mine : parts) {
    if (mine == part) return true;
  }
  return false;
}

Type Decoder::type(int from_end) const {
  Type found;
  for (size_t i = parts.size(); i-- > 1;) {
    if (parse_type(parts[i], found) && from_end-- == 0) return found;
  }
  fail("no type");
}

std::string_view Decoder::text(size_t index) const {
  if (index >= statement->operands.size()) fail("too few operands");
  return statement->operands[index];
}

std::vector<std::string_view> Decoder::members(size_t index) const {
  std::string_view all = text(index);
  if (all.empty() || all[0] != '{') return {all};
  return split(all.substr(1, all.rfind('}') - 1), ',');
}

Operand Decoder::new_register(int bytes) {
  Operand made;
  made.bytes = static_cast<uint8_t>(bytes);
  made.slot = program_.num_slots++;
  if (bytes == 0) {
    made.offset = program_.num_predicates++;
  } else {
    made.offset = program_.file_bytes;
    program_.file_bytes += static_cast<uint32_t>(bytes) * kLanes;
  }
  return made;
}

bool Decoder::find_register(std::string_view name, Operand& found) const {
  size_t digits = name.size();
  while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
  for (size_t s = scopes_.size(); s-- > 0;) {
    const auto exact = scopes_[s].find(std::string(name));
    if (exact != scopes_[s].end() && exact->second.count == 0) {
      found = {exact->second.offset, exact->second.slot, exact->second.bytes, false};
      return true;
    }
    if (digits == name.size() || digits == 0) continue;
    const auto range = scopes_[s].find(std::string(name.substr(0, digits)));
    if (range == scopes_[s].end() || range->second.count == 0) continue;
    const uint32_t index = static_cast<uint32_t>(std::atoi(std::string(name.substr(digits)).c_str()));
    if (index >= range->second.count) continue;
    const uint32_t step = range->second.bytes == 0 ? 1 : range->second.bytes * kLanes;
    found = {range->second.offset + index * step, range->second.slot + index, range->second.bytes, false};
    return true;
  }
  return false;
}

bool Decoder::special(std::string_view name, Operand& found) {
  const auto known = specials_.find(std::string(name));
  if (known != specials_.end()) return found = known->second, true;
  for (const SpecialName& entry : kSpecials) {
    if (name != entry.name) continue;
    found = new_register(entry.bytes);
    specials_[entry.name] = found;
    program_.specials.push_back({entry.what, found});
    return true;
  }
  return false;
}

Operand Decoder::constant(uint64_t value, int bytes) {
  if (bytes < 8) value &= (uint64_t{1} << (bytes * 8)) - 1;
  auto& known = constants_[bytes];
  auto found = known.find(value);
  if (found == known.end()) {
    const uint32_t offset = static_cast<uint32_t>(program_.constants.size());
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int b = 0; b < bytes; ++b) program_.constants.push_back(static_cast<uint8_t>(value >> (8 * b)));
    }
    found = known.emplace(value, offset).first;
  }
  return {found->second | kConstant, 0, static_cast<uint8_t>(bytes), false};
}

Operand Decoder::source(std::string_view name, Type type) {
  Operand found;
  bool is_negated = false;
  if (!name.empty() && name[0] == '!') {
    is_negated = true;
    name.remove_prefix(1);
  }
  if (find_register(name, found) || special(name, found)) {
    found.is_negated = is_negated;
    return found;
  }
  const int bytes = type.bytes == 1 ? 2 : type.bytes;
  if (name.size() > 2 && name[0] == '0' && (name[1] == 'f' || name[1] == 'F') && bytes <= 4) {
    return constant(std::strtoull(std::string(name.substr(2)).c_str(), nullptr, 16), bytes);
  }
  if (name.size() > 2 && name[0] == '0' && (name[1] == 'd' || name[1] == 'D')) {
    const uint64_t bits = std::strtoull(std::string(name.substr(2)).c_str(), nullptr, 16);
    if (type.bytes == 8) return constant(bits, 8);
    double wide;
    std::memcpy(&wide, &bits, 8);
    const float narrow = static_cast<float>(wide);
    uint32_t narrow_bits;
    std::memcpy(&narrow_bits, &narrow, 4);
    return constant(narrow_bits, 4);
  }
  int64_t value = 0;
  if (parse_integer(name, value)) return constant(static_cast<uint64_t>(value), bytes == 0 ? 4 : bytes);
  const size_t plus = name.find('+');
  const std::string symbol(trim(name.substr(0, plus)));
  if (module_.dynamic_shared_.count(symbol) != 0 && plus == std::string_view::npos) {
    program_.uses_dynamic_shared = true;
    special(bytes == 4 ? "dynamic shared memory, 32 bits" : "dynamic shared memory", found);
    return found;
  }
  const auto known = symbols_.find(symbol);
  if (known != symbols_.end()) {
    if (plus != std::string_view::npos) parse_integer(trim(name.substr(plus + 1)), value);
    return constant(known->second + static_cast<uint64_t>(value), bytes == 0 ? 8 : bytes);
  }
  if (const Variable* variable = module_.variable(symbol)) {
    if (plus != std::string_view::npos) parse_integer(trim(name.substr(plus + 1)), value);
    return constant(reinterpret_cast<uintptr_t>(variable->address) + static_cast<uint64_t>(value), 8);
  }
  fail("unknown operand " + std::string(name));
}

Operand Decoder::destination(std::string_view name) {
  Operand found;
  if (name == "_") return new_register(8);
  if (!find_register(name, found)) fail("unknown register " + std::string(name));
  return found;
}

Operand Decoder::predicate(std::string_view name) {
  if (name == "_") return new_register(0);
  const bool is_negated = !name.empty() && name[0] == '!';
  if (is_negated) name.remove_prefix(1);
  Operand found;
  if (!find_register(name, found) || found.bytes != 0) fail("no predicate: " + std::string(name));
  found.is_negated = is_negated;
  return found;
}

void Decoder::address(std::string_view text, Instr& instr) {
  if (text.size() < 2 || text[0] != '[') fail("no address: " + std::string(text));
  std::string_view inside = trim(text.substr(1, text.rfind(']') - 1));
  const size_t plus = inside.find('+', 1);
  instr.imm = 0;
  if (plus != std::string_view::npos) {
    if (!parse_integer(trim(inside.substr(plus + 1)), instr.imm)) fail("cannot read the offset");
    inside = trim(inside.substr(0, plus));
  }
  instr.a = source(inside, {'u', 8, false});
}

uint32_t Decoder::branch_target(std::string_view label) {
  branches_.emplace_back(static_cast<uint32_t>(program_.code.size()), std::string(label));
  return 0;
}

void Decoder::declare_registers(std::string_view text) {
  const size_t space = text.find_first_of(" \t", 5);
  const int bytes = type_bytes(trim(text.substr(5, space - 5)).substr(1));
  if (bytes < 0 || bytes == 16) fail("registers of this type");
  for (std::string_view name : split(text.substr(space), ',')) {
    const size_t open = name.find('<');
    const uint32_t count = open == std::string_view::npos
                               ? 0
                               : static_cast<uint32_t>(std::atoi(std::string(name.substr(open + 1)).c_str()));
    const uint32_t number = count == 0 ? 1 : count;
    // Bytes are held in registers of 16 bits.
    const uint8_t width = static_cast<uint8_t>(bytes == 1 ? 2 : bytes);
    Range range{width == 0 ? program_.num_predicates : program_.file_bytes, program_.num_slots, count, width};
    scopes_.back()[std::string(trim(name.substr(0, open)))] = range;
    program_.num_slots += number;
    if (width == 0) {
      program_.num_predicates += number;
    } else {
      program_.file_bytes += number * width * kLanes;
    }
  }
}

void Decoder::location(std::string_view text) {
  // .loc FILE LINE COLUMN[, function_name LABEL[+N], inlined_at FILE LINE COLUMN]
  Loc loc;
  std::sscanf(std::string(text).c_str(), ".loc %u %u %u", &loc.file, &loc.line, &loc.column);
  const auto key = [](uint32_t file, uint32_t line, uint32_t column) {
    return (uint64_t{file} << 48) ^ (uint64_t{line} << 20) ^ column;
  };
  const size_t at = text.find("inlined_at");
  if (at != std::string_view::npos) {
    uint32_t file = 0, line = 0, column = 0;
    std::sscanf(std::string(text.substr(at)).c_str(), "inlined_at %u %u %u", &file, &line, &column);
    const auto outer = loc_at_.find(key(file, line, column));
    if (outer != loc_at_.end()) loc.inlined_at = outer->second;
  }
  program_.locs.push_back(loc);
  loc_ = static_cast<uint32_t>(program_.locs.size() - 1);
  loc_at_[key(loc.file, loc.line, loc.column)] = loc_;
}

void Decoder::directive(std::string_view text) {
  const auto starts = [&](std::string_view word) { return text.substr(0, word.size()) == word; };
  if (starts(".reg")) {
    declare_registers(text);
  } else if (starts(".shared")) {
    const Declaration declared = parse_declaration(std::string(text));
    const uint32_t at = round_up(program_.static_shared, static_cast<uint32_t>(declared.align));
    symbols_[declared.name] = kSharedStart + at;
    program_.shared.push_back({declared.name, Space::kShared, kSharedStart + at, declared.size});
    program_.static_shared = at + static_cast<uint32_t>(declared.size) + kRedZone;
  } else if (starts(".local")) {
    const Declaration declared = parse_declaration(std::string(text));
    const uint32_t at = round_up(program_.local_bytes, static_cast<uint32_t>(declared.align));
    symbols_[declared.name] = at;
    program_.local_bytes = at + static_cast<uint32_t>(declared.size);
  } else if (starts(".branchtargets")) {
    const uint32_t table = static_cast<uint32_t>(tables_.size());
    std::vector<std::string> names;
    for (std::string_view name : split(text.substr(14), ',')) names.emplace_back(name);
    table_of_[label_before_] = table;
    tables_.emplace_back(table, names);
  } else if (starts(".param")) {
    const Declaration declared = parse_declaration(std::string(text));
    symbols_[declared.name] = 0;  // of a call, and calls other than __assertfail are refused
  } else if (!starts(".pragma")) {
    throw DecodeError{"ptxvm does not know the directive " + std::string(text)};
  }
}

void Decoder::read_header(std::string_view head) {
  const size_t open = head.find('(');
  const size_t close = head.rfind(')');
  uint32_t at = 0;
  if (open != std::string_view::npos && close > open + 1) {
    for (std::string_view one : split(head.substr(open + 1, close - open - 1), ',')) {
      if (one.empty()) continue;
      std::string declaration(one);
      for (size_t ptr = declaration.find(".ptr"); ptr != std::string::npos; ptr = declaration.find(".ptr")) {
        const size_t end = declaration.find_last_of(" \t");
        declaration.erase(ptr, end - ptr);  // .ptr .global .align 16: about what it points to
      }
      const Declaration param = parse_declaration(declaration);
      at = round_up(at, static_cast<uint32_t>(param.align));
      program_.params.push_back({param.name, at, static_cast<uint32_t>(param.size)});
      symbols_[param.name] = at;
      at += static_cast<uint32_t>(param.size);
    }
  }
  program_.param_bytes = at;
  const size_t limit = head.find(".maxntid");
  if (limit != std::string_view::npos) {
    unsigned x = 1, y = 1, z = 1;
    std::sscanf(std::string(head.substr(limit)).c_str(), ".maxntid %u, %u, %u", &x, &y, &z);
    program_.max_threads = x * (y == 0 ? 1 : y) * (z == 0 ? 1 : z);
  }
}

void Decoder::check_modifiers() const {
  static std::unordered_set<std::string> checked;  // a few hundred spellings, of many thousand instructions
  if (!checked.insert(std::string(statement->opcode)).second) return;
  const char* allowed = "";
  for (const Modifiers& entry : kModifiers) {
    if (is_listed(entry.opcodes, parts[0])) allowed = entry.allowed;
  }
  Type type;
  for (size_t i = 1; i < parts.size(); ++i) {
    if (parse_type(parts[i], type) || is_listed(allowed, parts[i])) continue;
    checked.erase(std::string(statement->opcode));
    fail("unknown modifier ." + std::string(parts[i]));
  }
}

void Decoder::instruction(const Statement& now) {
  statement = &now;
  parts = split(now.opcode, '.');
  Instr instr;
  instr.loc = loc_;
  if (!now.guard.empty()) {
    const Operand guard = predicate(now.guard);
    instr.guard = guard.offset;
    instr.guard_slot = guard.slot;
    instr.guard_negated = guard.is_negated;
  }
  const bool is_known = decode_integer(*this, instr) || decode_bits(*this, instr) || decode_half(*this, instr) ||
                        decode_float(*this, instr) || decode_move(*this, instr) || decode_compare(*this, instr) ||
                        decode_convert(*this, instr) || decode_memory(*this, instr) || decode_atomic(*this, instr) ||
                        decode_async(*this, instr) || decode_collective(*this, instr) || decode_matrix(*this, instr) ||
                        decode_control(*this, instr);
  if (!is_known) fail("unknown opcode " + std::string(now.opcode));
  check_modifiers();
  program_.texts.emplace_back(now.opcode);
  if (instr.kind == Kind::kBranchTable) instr.target = table_of_.at(std::string(now.operands[1]));
  program_.code.push_back(std::move(instr));
}

void Decoder::link() {
  const auto at = [&](const std::string& label) {
    const auto found = labels_.find(label);
    if (found == labels_.end()) throw DecodeError{"ptxvm: no label " + label};
    return found->second;
  };
  for (const auto& branch : branches_) program_.code[branch.first].target = at(branch.second);
  for (const auto& table : tables_) {
    std::vector<uint32_t> targets;
    for (const std::string& name : table.second) targets.push_back(at(name));
    program_.tables.push_back(targets);
  }
}

void Decoder::decode(std::string_view text) {
  const size_t open = text.find('{');
  read_header(text.substr(0, open));
  scopes_.emplace_back();
  Reader reader(text.substr(open + 1, text.rfind('}') - open - 1));
  Statement now;
  while (reader.next(now)) {
    switch (now.kind) {
      case Statement::kOpen: scopes_.emplace_back(); break;
      case Statement::kClose: scopes_.pop_back(); break;
      case Statement::kLocation: location(now.text); break;
      case Statement::kDirective: directive(now.text); break;
      case Statement::kLabel:
        labels_[std::string(now.text)] = static_cast<uint32_t>(program_.code.size());
        label_before_ = now.text;
        break;
      case Statement::kInstruction: instruction(now); break;
    }
  }
  statement = nullptr;
  Instr end;  // falling off the end
  end.kind = Kind::kExit;
  end.cls = Class::kControl;
  end.loc = loc_;
  program_.code.push_back(end);
  program_.texts.emplace_back("exit");
  link();
  program_.static_shared = round_up(program_.static_shared, 128);  // where dynamic shared memory starts
}

std::unique_ptr<Program> decode_kernel(Module& module, const std::string& name, std::string_view text) {
  auto program = std::make_unique<Program>();
  program->name = name;
  Decoder(module, *program).decode(text);
  return program;
}

}  // namespace ptxvm
