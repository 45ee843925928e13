// Mutants, for the test of the tests: one protection of the kernels taken away at a time, in the decoded code.
//
//   order  a barrier, a fence or a wait for copies is left out
//   mask   the member mask of a shuffle, vote, match or reduction names other lanes: the lower half of the warp instead
//          of all of it, all of it instead of some
//   guard  a branch around an access to memory, or the predicate of one, is ignored
//
// A place is a source line with the lines it was inlined at, and stands for all kernels that hold it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine/program.h"

namespace ptxvm {

struct Engine;

class Mutants {
 public:
  // Decodes every kernel of every module, once. The places of a kind: "order", "mask" or "guard".
  std::vector<std::string> places(Engine& engine, const std::string& kind);
  // Those among them that were executed since `forget`, while counters were on.
  std::vector<std::string> executed(Engine& engine, const std::string& kind);
  void forget(Engine& engine);
  // One place at a time: the one before is restored first; an empty place changes nothing further.
  void mutate(Engine& engine, const std::string& kind, const std::string& place);

 private:
  struct Spot {
    Program* program;
    uint32_t pc;
  };
  using Places = std::map<std::string, std::vector<Spot>>;
  const Places& of(Engine& engine, const std::string& kind);

  std::map<std::string, Places> known_;
  std::vector<std::pair<Spot, Instr>> changed_;
};

}  // namespace ptxvm
