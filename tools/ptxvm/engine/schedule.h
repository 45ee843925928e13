// Who runs next: blocks, warps, and groups of lanes of a warp, in an order drawn from the seed.
#pragma once

#include <memory>
#include <vector>

#include "engine/machine.h"

namespace ptxvm {

class Scheduler {
 public:
  explicit Scheduler(Launch& launch);
  ~Scheduler();
  void run();

 private:
  bool admit();
  std::unique_ptr<Block> new_block(uint32_t index);
  void start_block(Block& block, uint32_t index);
  void start_warp(Block& block, int index);
  void run_warp(Block& block, Warp& warp, int budget);
  // Each returns the fragment to go on with, or -1 when the warp cannot go on now.
  int choose(Context& c, Warp& warp);
  int settle(Context& c, Warp& warp, int current);
  void branch(Warp& warp, int current, uint32_t taken, uint32_t target);
  void branch_table(Context& c, Warp& warp, int current, const Instr& instr);
  void exit_lanes(Context& c, Warp& warp, uint32_t mask);
  bool collective(Context& c, Warp& warp, int current, const Instr& instr, uint32_t mask);
  bool barrier(Context& c, Warp& warp, int current, const Instr& instr, uint32_t mask);
  void complete(Context& c, uint32_t id);
  void split_off(Warp& warp, int current, uint32_t mask, uint32_t pc);
  [[noreturn]] void report_stuck_warp(Context& c, Warp& warp);
  [[noreturn]] void report_deadlock();
  void watch_progress();

  Launch& launch_;
  const Program& program_;
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<std::unique_ptr<Block>> spare_;
  std::vector<uint32_t> order_;  // the next blocks, shuffled in a small window
  uint64_t next_block_ = 0;
  int most_resident_ = 1;
  int extra_resident_ = 0;
  bool mixes_fragments_ = false;
  uint64_t calm_ = 0;  // instructions since anything got anywhere
};

}  // namespace ptxvm
