// What is known of every piece of memory beside its value: whether it was written, by whom and when, who read it last.
//
// A cell covers `1 << shift` bytes: 4 as long as nothing smaller is accessed, then 2 or 1. Times are ticks of the
// block's clock, which moves on at every barrier of a block or warp; 0 is "never in this launch".
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace ptxvm {

enum CellFlag : uint8_t {
  kDefined = 1,
  kWriteStrong = 2,  // the last write was atomic, volatile or ordered
  kReadStrong = 4,   // every read since was
  kManyLanes = 8,    // lanes besides the last one, of the same warp, read it
  kManyWarps = 16,   // warps besides the last one, of the same block, read it
  kManyBlocks = 32,
  kInFlight = 64,  // target of an asynchronous copy that its thread has not waited for
};

struct Cell {
  uint32_t write_time = 0, read_time = 0;
  uint32_t write_block = 0, read_block = 0;
  uint16_t write_thread = 0, read_thread = 0;
  uint32_t flags = 0;
};

class Shadow {
 public:
  void reset(uint64_t base, uint64_t bytes, bool is_defined) {
    base_ = base;
    bytes_ = bytes;
    shift_ = 2;
    fill(is_defined);
  }
  bool is_empty() const { return cells_.empty(); }

  // Cells of accesses of `bytes` at `address`; `count` is set to their number.
  Cell* at(uint64_t address, uint64_t bytes, int* count) {
    *count = bytes >> shift_ ? static_cast<int>(bytes >> shift_) : 1;
    return cells_.data() + ((address >> shift_) - (base_ >> shift_));
  }
  // Cells shrink to the smallest access. Call before `at`.
  void refine(uint64_t bytes) {
    while (shift_ > 0 && (uint64_t{1} << shift_) > bytes) split();
  }
  void forget_times() {
    for (Cell& cell : cells_) {
      const uint32_t defined = cell.flags & kDefined;
      cell = Cell{};
      cell.flags = defined;
    }
  }
  void define(uint64_t address, uint64_t bytes) {
    if (bytes == 0) return;
    if (address % 4 != 0 || bytes % 4 != 0) refine(address % 2 != 0 || bytes % 2 != 0 ? 1 : 2);
    int count = 0;
    Cell* cell = at(address, bytes, &count);
    for (int i = 0; i < count; ++i) cell[i].flags |= kDefined;
  }
  // The first undefined byte in a range, or its end.
  uint64_t first_undefined(uint64_t address, uint64_t bytes) {
    if (bytes == 0) return address;
    const uint64_t first = address >> shift_, last = (address + bytes - 1) >> shift_;
    for (uint64_t i = first; i <= last; ++i) {
      if ((cells_[i - (base_ >> shift_)].flags & kDefined) == 0) return i << shift_ > address ? i << shift_ : address;
    }
    return address + bytes;
  }

 private:
  void fill(bool is_defined) {
    const uint64_t count = bytes_ == 0 ? 0 : ((base_ + bytes_ - 1) >> shift_) - (base_ >> shift_) + 1;
    Cell blank;
    blank.flags = is_defined ? kDefined : 0;
    cells_.assign(count, blank);
  }
  void split() {
    std::vector<Cell> finer;
    const int next = shift_ - 1;
    const uint64_t first = base_ >> next, last = (base_ + bytes_ - 1) >> next;
    finer.reserve(last - first + 1);
    for (uint64_t i = first; i <= last; ++i) finer.push_back(cells_[(i >> 1) - (base_ >> shift_)]);
    cells_.swap(finer);
    shift_ = next;
  }

  uint64_t base_ = 0, bytes_ = 0;
  int shift_ = 2;
  std::vector<Cell> cells_;
};

}  // namespace ptxvm
