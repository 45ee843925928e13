#include <cstdio>
#include <cstdlib>

#include "engine/machine.h"
#include "engine/schedule.h"

namespace ptxvm {

Engine& Engine::get() {
  static Engine* engine = new Engine;  // never destroyed: memory is handed back while the process ends
  return *engine;
}

std::string source_line(const Module& module, const Program& program, uint32_t pc) {
  if (pc >= program.code.size()) return "?";
  std::string text;
  uint32_t at = program.code[pc].loc;
  for (int depth = 0; depth < 6; ++depth) {
    const Loc& loc = program.locs[at];
    if (loc.line == 0) break;
    std::string file = module.file(loc.file);
    const size_t root = file.find("csrc/");
    if (root != std::string::npos) {
      file.erase(0, root);
    } else if (file.rfind('/') != std::string::npos) {
      file.erase(0, file.rfind('/') + 1);
    }
    text += (text.empty() ? "" : ", inlined at ") + file + ":" + std::to_string(loc.line);
    if (loc.inlined_at == 0 || loc.inlined_at == at) break;
    at = loc.inlined_at;
  }
  return text.empty() ? "instruction " + std::to_string(pc) + " " + program.texts[pc] : text;
}

std::string describe_thread(const Context& c, int thread) {
  const Dim3& block = c.launch->block;
  const uint32_t t = static_cast<uint32_t>(thread);
  if (block.y == 1 && block.z == 1) return "thread " + std::to_string(t);
  return "thread (" + std::to_string(t % block.x) + ", " + std::to_string(t / block.x % block.y) + ", " +
         std::to_string(t / block.x / block.y) + ")";
}

void fault(const Context& c, const char* kind, const std::string& what, int lane) {
  std::string text =
      std::string(kind) + ": " + what + "; " + readable(c.program->name) + ", block " + std::to_string(c.block->index);
  if (lane >= 0) {
    text += ", " + describe_thread(c, c.warp->index * kLanes + lane);
  } else {
    text += ", warp " + std::to_string(c.warp->index);
  }
  text += ", " + source_line(*c.launch, c.pc);
  throw Fault{text};
}

std::string run_launch(Engine& engine, Module& module, const Program& program, Dim3 grid, Dim3 block,
                       std::vector<uint8_t> params, uint32_t dynamic_shared) {
  module.add_memory(engine.memory);
  Launch launch;
  launch.engine = &engine;
  launch.module = &module;
  launch.program = &program;
  launch.grid = grid;
  launch.block = block;
  launch.params = std::move(params);
  launch.params.resize(program.param_bytes);
  launch.dynamic_shared = dynamic_shared;
  launch.id = ++engine.last_launch;
  launch.random.seed(engine.options.seed * 0x9e3779b97f4a7c15ull + ++engine.num_launches);
  launch.site.assign(program.code.size(), nullptr);
  for (const Symbol& symbol : program.shared) {
    launch.shared_ranges.push_back({symbol.address, symbol.address + symbol.size});
  }
  if (dynamic_shared > 0) {
    const uint64_t start = kSharedStart + program.static_shared;
    launch.shared_ranges.push_back({start, start + dynamic_shared});
  }
  std::string report;
  try {
    Scheduler(launch).run();
  } catch (const Fault& fault) {
    report = fault.text;
    engine.reports.push_back(report);
  }
  engine.counters.add(launch.counters);
  engine.instructions += launch.instructions;
  ++engine.launches_of[program.name];
  return report;
}

}  // namespace ptxvm
