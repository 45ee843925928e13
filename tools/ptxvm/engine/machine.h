// The state of a launch while it runs: blocks, warps, lanes, and what a kernel's instruction sees of them.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/counters.h"
#include "engine/layout.h"
#include "engine/memory.h"
#include "engine/module.h"
#include "engine/mutants.h"
#include "engine/order.h"
#include "engine/program.h"

namespace ptxvm {

struct Launch;
struct Block;

// Lanes of a warp that are at the same instruction.
struct Fragment {
  uint32_t pc = 0;
  uint32_t mask = 0;
  bool is_parked = false;  // waits for other lanes of the warp at a collective or a barrier
};

struct AsyncCopy {
  uint64_t to;  // offset in shared memory
  uint64_t from;
  uint32_t bytes, source_bytes;
  uint32_t group;
  uint32_t pc;
  bool is_done;        // the bytes have been moved already; whether they may be read is another matter
  uint32_t undefined;  // words of the source that were never written, a bit each
};
struct AsyncState {
  std::array<std::vector<AsyncCopy>, kLanes> copies;
  std::array<uint32_t, kLanes> committed{};  // groups
};

// Memory that outlives blocks and launches: fresh memory costs page faults.
struct Buffer {
  std::unique_ptr<uint8_t[]> memory;
  size_t bytes = 0;
};
class BufferPool {
 public:
  Buffer take(size_t bytes) {
    for (size_t i = free_.size(); i-- > 0;) {
      if (free_[i].bytes < bytes) continue;
      Buffer found = std::move(free_[i]);
      free_.erase(free_.begin() + static_cast<long>(i));
      return found;
    }
    if (!free_.empty()) free_.erase(free_.begin());  // all are too small: let the oldest go
    return {std::unique_ptr<uint8_t[]>(new uint8_t[bytes]), bytes};
  }
  void give(Buffer buffer) {
    if (buffer.memory != nullptr) free_.push_back(std::move(buffer));
  }

 private:
  std::vector<Buffer> free_;
};

struct Warp {
  enum State : uint8_t { kReady, kAtBarrier, kDone };
  int index = 0;
  State state = kReady;
  uint32_t all = 0;   // lanes that exist
  uint32_t live = 0;  // those that have not exited
  std::vector<Fragment> fragments;
  uint8_t* registers = nullptr;
  Buffer storage;
  std::vector<uint32_t> undefined;
  std::vector<uint32_t> predicates;
  std::vector<uint8_t> local;          // local_bytes a lane
  std::vector<uint8_t> local_defined;  // a byte each
  uint32_t carry = 0;                  // condition code of add.cc and its like
  WarpOrder order;
  std::unique_ptr<AsyncState> async;
  // While waiting at a barrier of the block:
  uint32_t barrier_id = 0;
  uint32_t barrier_pc = 0;
  uint32_t barrier_value = 0;  // of bar.red: lanes whose predicate holds
};

struct Barrier {
  uint32_t arrived = 0;  // threads, in whole warps
  uint32_t expected = 0;
  uint32_t pc = 0;
  std::vector<int> waiting;  // warps
  std::vector<int> passed;   // warps that arrived without waiting
};

struct Block {
  Launch* launch = nullptr;
  uint32_t index = 0;  // linear
  uint32_t x = 0, y = 0, z = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  int num_live = 0;  // warps not done
  int num_exited_threads = 0;
  uint32_t num_threads = 0;
  Buffer shared_storage;
  uint8_t* shared = nullptr;  // address of offset 0
  Shadow shared_shadow;
  std::array<Barrier, 16> barriers;
  BlockOrder order;
  uint64_t spun = 0;  // instructions since it last got anywhere
};

struct Range {
  uint64_t low, high;
};

struct Options {
  uint64_t seed = 0;
  bool counts = false;
  int num_sms = 4;
  int capability = 80;  // 10 * major + minor, as the runtime says it; the instructions stay those of sm_80
  uint32_t most_blocks = UINT32_MAX;  // in x, of kernels whose names hold `few`: those that walk on then do
  std::string few;
  uint64_t failing_call = 0;  // of the runtime, from 1 on, counted anew when this is set; 0 for none
  uint64_t num_failing_calls = 1;
  int failing_code = 0;                            // a cudaError_t
  uint64_t most_instructions = uint64_t{4} << 30;  // warp instructions a launch may take
};

// Everything that is left of launches once they are over.
struct Engine {
  GlobalMemory memory;
  BufferPool buffers;
  Options options;
  Counters counters;
  std::vector<std::string> reports;
  uint64_t num_launches = 0;                              // since the seed was set
  uint64_t last_launch = 0;                               // of all there ever were: never used twice
  uint64_t instructions = 0;                              // of warps, in all launches
  uint64_t runtime_calls = 0;                             // that may fail, since options.failing_call was set
  std::unordered_map<std::string, uint64_t> launches_of;  // by kernel
  std::vector<std::string> known_kernels;                 // of fat binaries
  std::vector<Module*> modules;                           // of fat binaries
  Mutants mutants;
  static Engine& get();
  // Counts a call of the runtime; true if it is to fail.
  bool fails_now() {
    ++runtime_calls;
    return options.failing_call != 0 && runtime_calls >= options.failing_call &&
           runtime_calls - options.failing_call < options.num_failing_calls;
  }
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Launch {
  Engine* engine = nullptr;
  Module* module = nullptr;
  const Program* program = nullptr;
  Dim3 grid, block;
  std::vector<uint8_t> params;
  uint32_t dynamic_shared = 0;
  std::vector<Range> shared_ranges;  // what kernels may touch, as offsets
  uint64_t id = 0;
  std::mt19937_64 random;
  bool copies_early = false;  // asynchronous copies move their bytes at once, or when waited for
  StrongLocations strong;
  std::vector<Region*> site;  // the region each instruction touched last
  uint64_t instructions = 0;
  Counters counters;
};

// What an instruction sees.
struct Context {
  uint8_t* registers;
  const uint8_t* constants;
  uint32_t* undefined;
  uint32_t* predicates;
  Warp* warp;
  Block* block;
  Launch* launch;
  const Program* program;
  uint32_t pc;
};

struct Fault {
  std::string text;
};
// Ends the launch with a report that names kernel, block, thread and source line. lane -1: the whole warp.
[[noreturn]] void fault(const Context& c, const char* kind, const std::string& what, int lane = -1);
std::string source_line(const Module& module, const Program& program, uint32_t pc);
inline std::string source_line(const Launch& launch, uint32_t pc) {
  return source_line(*launch.module, *launch.program, pc);
}
std::string describe_thread(const Context& c, int thread);

// Runs a launch to its end; returns an empty text, or the report of what went wrong.
std::string run_launch(Engine& engine, Module& module, const Program& program, Dim3 grid, Dim3 block,
                       std::vector<uint8_t> params, uint32_t dynamic_shared);

// ---- Operands.

template <class T>
inline const T* source(const Context& c, Operand o) {
  return reinterpret_cast<const T*>(
      (o.offset & kConstant ? c.constants + (o.offset & ~kConstant) : c.registers + o.offset));
}
template <class T>
inline T* destination(const Context& c, Operand o) {
  return reinterpret_cast<T*>(c.registers + o.offset);
}
inline uint32_t undefined_lanes(const Context& c, Operand o) { return c.undefined[o.slot]; }
inline void set_undefined(const Context& c, Operand o, uint32_t lanes, uint32_t mask) {
  c.undefined[o.slot] = (c.undefined[o.slot] & ~mask) | (lanes & mask);
}
// The value of a register or constant of any width, zero-extended.
inline uint64_t lane_value(const Context& c, Operand o, int lane) {
  switch (o.bytes) {
    case 2: return source<uint16_t>(c, o)[lane];
    case 4: return source<uint32_t>(c, o)[lane];
    default: return source<uint64_t>(c, o)[lane];
  }
}
inline void set_lane(const Context& c, Operand o, int lane, uint64_t value) {
  switch (o.bytes) {
    case 2: destination<uint16_t>(c, o)[lane] = static_cast<uint16_t>(value); break;
    case 4: destination<uint32_t>(c, o)[lane] = static_cast<uint32_t>(value); break;
    default: destination<uint64_t>(c, o)[lane] = value;
  }
}
inline uint32_t predicate_lanes(const Context& c, Operand o) {
  return o.is_negated ? ~c.predicates[o.offset] : c.predicates[o.offset];
}
inline void set_predicate(const Context& c, Operand o, uint32_t lanes, uint32_t mask) {
  c.predicates[o.offset] = (c.predicates[o.offset] & ~mask) | (lanes & mask);
}

// d[lane] = f(lane) for the lanes of the mask.
template <class T, class F>
inline void for_lanes(T* d, uint32_t mask, const F& f) {
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = f(l);
  } else {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      const T value = f(l);
      d[l] = (mask >> l) & 1u ? value : d[l];
    }
  }
}
// Calls f(lane) for the lanes of the mask, lowest first.
template <class F>
inline void each_lane(uint32_t mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

}  // namespace ptxvm
