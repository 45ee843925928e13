#include "engine/mutants.h"

#include <algorithm>

#include "engine/machine.h"
#include "engine/module.h"

namespace ptxvm {
namespace {

constexpr uint32_t kFarthestJoin = 200;  // instructions that a guard may skip

bool starts_with_any(const std::string& text, std::initializer_list<const char*> starts) {
  return std::any_of(starts.begin(), starts.end(), [&](const char* start) { return text.rfind(start, 0) == 0; });
}

// What orders threads and gives no value: it can be left out.
bool is_order(const std::string& opcode) {
  return starts_with_any(opcode, {"bar.sync", "bar.arrive", "barrier.sync", "barrier.arrive", "bar.warp.sync", "membar",
                                  "fence", "cp.async.wait"});
}

bool is_access(const Instr& instr) {
  switch (instr.cls) {
    case Class::kLoadGlobal:
    case Class::kStoreGlobal:
    case Class::kLoadShared:
    case Class::kStoreShared:
    case Class::kAtomic:
    case Class::kAsyncCopy: return true;
    default: return false;
  }
}

// A predicate that keeps lanes from an access: of the access itself, or of a branch over it.
bool is_guard(const Program& program, uint32_t pc) {
  const Instr& instr = program.code[pc];
  if (instr.guard == kNoGuard) return false;
  if (is_access(instr)) return true;
  if (instr.kind != Kind::kBranch || instr.target <= pc + 1 || instr.target - pc > kFarthestJoin) return false;
  return std::any_of(program.code.begin() + pc + 1, program.code.begin() + instr.target, is_access);
}

bool is_of_kind(const std::string& kind, const Program& program, uint32_t pc) {
  if (kind == "order") return is_order(program.texts[pc]);
  if (kind == "mask") return starts_with_any(program.texts[pc], {"shfl", "vote", "match", "redux"});
  return is_guard(program, pc);
}

void change(const std::string& kind, Instr& instr) {
  if (kind == "order") {
    instr.kind = Kind::kPlain;
    instr.run = [](Context&, const Instr&, uint32_t) {};
  } else if (kind == "mask") {
    instr.has_wrong_mask = true;
  } else if (instr.kind == Kind::kBranch) {
    instr.kind = Kind::kPlain;
    instr.guard = kNoGuard;
    instr.run = [](Context&, const Instr&, uint32_t) {};
  } else {
    instr.guard = kNoGuard;
  }
}

}  // namespace

const Mutants::Places& Mutants::of(Engine& engine, const std::string& kind) {
  Places& places = known_[kind];
  if (!places.empty()) return places;
  for (Module* module : engine.modules) {
    for (const std::string& name : module->kernel_names()) {
      Program* program = module->kernel(name);
      program->executed.resize(program->code.size());
      for (uint32_t pc = 0; pc < program->code.size(); ++pc) {
        if (is_of_kind(kind, *program, pc)) places[source_line(*module, *program, pc)].push_back({program, pc});
      }
    }
  }
  return places;
}

std::vector<std::string> Mutants::places(Engine& engine, const std::string& kind) {
  std::vector<std::string> found;
  for (const auto& [place, spots] : of(engine, kind)) found.push_back(place);
  return found;
}

std::vector<std::string> Mutants::executed(Engine& engine, const std::string& kind) {
  std::vector<std::string> found;
  for (const auto& [place, spots] : of(engine, kind)) {
    if (std::any_of(spots.begin(), spots.end(), [](const Spot& s) { return s.program->executed[s.pc] != 0; }))
      found.push_back(place);
  }
  return found;
}

void Mutants::forget(Engine& engine) {
  for (Module* module : engine.modules) {
    for (const std::string& name : module->kernel_names()) {
      std::vector<uint8_t>& executed = module->kernel(name)->executed;
      std::fill(executed.begin(), executed.end(), uint8_t{0});
    }
  }
}

void Mutants::mutate(Engine& engine, const std::string& kind, const std::string& place) {
  for (const auto& [spot, instr] : changed_) spot.program->code[spot.pc] = instr;
  changed_.clear();
  if (place.empty()) return;
  for (const Spot& spot : of(engine, kind).at(place)) {
    Instr& instr = spot.program->code[spot.pc];
    changed_.emplace_back(spot, instr);
    change(kind, instr);
  }
}

}  // namespace ptxvm
