// A kernel as the interpreter runs it: one Instr per PTX instruction, decoded once.
//
// Registers are stored lane by lane: a register of n bytes is an array of 32 values of n bytes in the register file of
// its warp. Immediates are such arrays as well, in a file of constants that all warps share. A predicate is one 32-bit
// word, a bit per lane. Beside its value every register has a word of 32 bits that says in which lanes it is undefined.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptxvm {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kConstant = 0x80000000u;  // in Operand::offset: the value lies in the file of constants
constexpr uint32_t kNoGuard = 0xffffffffu;

struct Context;
struct Instr;
using Exec = void (*)(Context&, const Instr&, uint32_t mask);

struct Operand {
  uint32_t offset = 0;  // bytes into the file; of a predicate, its index
  uint32_t slot = 0;    // of its undefined lanes; slot 0 belongs to constants and stays 0
  uint8_t bytes = 0;    // width of the register: 2, 4, 8; 0 for a predicate
  bool is_negated = false;
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kConst, kParam };

enum class Kind : uint8_t { kPlain, kBranch, kBranchTable, kExit, kBarrier, kCollective };

// What the counters tell apart.
enum class Class : uint8_t {
  kInteger,
  kFloat,
  kDouble,
  kHalf,
  kSpecial,
  kMove,
  kControl,
  kLoadGlobal,
  kStoreGlobal,
  kLoadShared,
  kStoreShared,
  kOtherMemory,
  kAtomic,
  kAsyncCopy,
  kBarrier,
  kCollective,
  kMatrix,
  kLoadMatrix,
  kCount
};

enum class Order : uint8_t { kWeak, kStrong, kAcquire, kRelease, kAcquireRelease };

struct Instr {
  Exec run = nullptr;
  Operand d, a, b, c;
  std::vector<Operand> list;  // members of vector operands, in order of the text
  int64_t imm = 0;            // offset of an address, or a field of the instruction
  int64_t offset = 0;         // of an address, where imm is taken
  uint32_t guard = kNoGuard;  // index of the predicate
  uint32_t guard_slot = 0;
  uint32_t target = 0;  // of a branch; also a table's index
  uint32_t loc = 0;     // into Program::locs
  Kind kind = Kind::kPlain;
  Class cls = Class::kInteger;
  Space space = Space::kGeneric;
  Order order = Order::kWeak;
  bool guard_negated = false;
  bool flag = false;
  bool has_wrong_mask = false;  // a mutant: see mutants.h
  uint8_t bytes = 0;            // of one element in memory
  uint8_t count = 1;            // elements
  uint8_t mode = 0;             // what an instruction class needs besides
  uint8_t mode2 = 0;
};

struct Loc {
  uint32_t file = 0, line = 0, column = 0;
  uint32_t inlined_at = 0;  // another Loc, or 0
};

enum class Special : uint8_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaX,
  kCtaY,
  kCtaZ,
  kNctaX,
  kNctaY,
  kNctaZ,
  kLaneId,
  kWarpId,
  kNwarpId,
  kLaneEq,
  kLaneLt,
  kLaneLe,
  kLaneGt,
  kLaneGe,
  kSmId,
  kNsmId,
  kGridId,
  kDynamicShared,
  kTotalShared,
  kClock,
  kClock64,
  kDynamicStart,
  kGlobalTimer
};
struct SpecialRegister {
  Special what;
  Operand at;
};

struct Symbol {
  std::string name;
  Space space;
  uint64_t address;  // offset in its space; a real address for global and const
  uint64_t size;
};

struct Program {
  std::string name;
  std::vector<Instr> code;
  std::vector<Loc> locs{1};
  std::vector<std::vector<uint32_t>> tables;  // of brx.idx
  std::vector<std::string> texts;             // opcode of each instruction, for reports
  mutable std::vector<uint8_t> executed;      // 1 if it was, while counters were on; empty unless asked for
  uint32_t file_bytes = 0;                    // register file of a warp
  uint32_t num_predicates = 0;
  uint32_t num_slots = 1;
  std::vector<uint8_t> constants;
  std::vector<SpecialRegister> specials;
  std::vector<Symbol> shared;  // static variables, ascending, with red zones between
  uint32_t static_shared = 0;  // bytes up to where dynamic shared memory starts
  bool uses_dynamic_shared = false;
  uint32_t local_bytes = 0;
  uint32_t param_bytes = 0;
  struct Param {
    std::string name;
    uint32_t offset, size;
  };
  std::vector<Param> params;
  uint32_t max_threads = 1024;
};

}  // namespace ptxvm
