#include "common/kept_memory.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "common/cache.h"
#include "common/huge_pages.h"

namespace fastmoe_route {

struct KeptBlock {
  Kept kind;
  void* mapping;
  size_t mapped;  // with what aligns `memory`
  char* memory;
  size_t bytes;
  uint64_t freed_at;  // number of requests at that time
  int uses;
  bool asked_for_huge_pages;
};

#if defined(__linux__)
namespace {

constexpr size_t kUnit = size_t{2} << 20;  // a huge page
constexpr uint64_t kMostIdle = 64;         // requests, at least; and four times as many as there are blocks

class Pool {
 public:
  explicit Pool(Kept kind) : kind_(kind) {}

  KeptBlock* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t wanted = (bytes + kUnit - 1) / kUnit * kUnit;
    ++requests_;
    drop_idle();
    KeptBlock* block = take_free(wanted);
    if (block == nullptr) {
      most_in_use_ = std::max(most_in_use_, in_use_ + wanted);
      while (!free_.empty() && mapped_ + wanted > most_in_use_) drop(oldest());
      block = map(wanted);
      if (block == nullptr) return nullptr;
    }
    in_use_ += block->bytes;
    most_in_use_ = std::max(most_in_use_, in_use_);
    if (kind_ == Kept::kGradient) ask_for_huge_pages(block);
    return block;
  }

  // Small pages of gradients are not marked: setting the dirty bit of each again takes 0.1 s a GB, a third of a weight
  // gradient's time (measured).
  void give_back(KeptBlock* block) {
    if (kind_ != Kept::kGradient || block->asked_for_huge_pages) madvise(block->memory, block->bytes, MADV_FREE);
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block->bytes;
    block->freed_at = requests_;
    free_.push_back(block);
  }

  size_t mapped() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return mapped_;
  }

 private:
  using Place = std::vector<KeptBlock*>::iterator;

  // The smallest that is not an eighth too large; of equal ones the last freed, whose pages are the likeliest to be
  // there.
  KeptBlock* take_free(size_t wanted) {
    Place best = free_.end();
    for (Place at = free_.begin(); at != free_.end(); ++at) {
      const size_t bytes = (*at)->bytes;
      if (bytes >= wanted && bytes <= wanted + wanted / 8 && (best == free_.end() || bytes <= (*best)->bytes))
        best = at;
    }
    if (best == free_.end()) return nullptr;
    KeptBlock* block = *best;
    free_.erase(best);
    return block;
  }

  Place oldest() {
    return std::min_element(free_.begin(), free_.end(),
                            [](const KeptBlock* a, const KeptBlock* b) { return a->freed_at < b->freed_at; });
  }

  void drop_idle() {
    const uint64_t most = std::max(kMostIdle, 4 * num_blocks_);
    while (!free_.empty() && requests_ - (*oldest())->freed_at > most) drop(oldest());
  }

  void drop(Place at) {
    KeptBlock* block = *at;
    free_.erase(at);
    munmap(block->mapping, block->mapped);
    mapped_ -= block->bytes;
    --num_blocks_;
    delete block;
  }

  KeptBlock* map(size_t bytes) {
    void* mapping = mmap(nullptr, bytes + kUnit, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return nullptr;
    char* memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mapping) + kUnit - 1) / kUnit * kUnit);
    KeptBlock* block = new (std::nothrow) KeptBlock{kind_, mapping, bytes + kUnit, memory, bytes, 0, 0, false};
    if (block == nullptr) {
      munmap(mapping, bytes + kUnit);
      return nullptr;
    }
    mapped_ += bytes;
    ++num_blocks_;
    return block;
  }

  // At once where they are cheap. Those that the host has to find first cost 1.5 to 3 s a GB: they are for a block that
  // has shown to be used again and again, whose small pages go. Intel gains 3 to 7 ms a GB in every use (measured).
  static void ask_for_huge_pages(KeptBlock* block) {
    if (block->asked_for_huge_pages || !gives_huge_pages()) return;
    const bool are_dear = reports_free_pages();
    const int uses_that_pay = prefetch_waits_for_page() ? 4 : 256;
    if (are_dear && ++block->uses < uses_that_pay) return;
    if (are_dear) madvise(block->memory, block->bytes, MADV_DONTNEED);
    madvise(block->memory, block->bytes, MADV_HUGEPAGE);
    block->asked_for_huge_pages = true;
  }

  const Kept kind_;
  std::mutex mutex_;
  std::vector<KeptBlock*> free_;
  size_t in_use_ = 0;
  size_t most_in_use_ = 0;
  size_t mapped_ = 0;
  uint64_t num_blocks_ = 0;
  uint64_t requests_ = 0;
};

// Never destroyed: tensors may be freed after static objects are.
Pool& pool(Kept kind) {
  static Pool* const gradients = new Pool(Kept::kGradient);
  static Pool* const for_backward = new Pool(Kept::kForBackward);
  return kind == Kept::kGradient ? *gradients : *for_backward;
}

}  // namespace

KeptBlock* take_kept(Kept kind, size_t bytes) { return pool(kind).take(bytes); }
void give_back(KeptBlock* block) { pool(block->kind).give_back(block); }
size_t kept_bytes() { return pool(Kept::kGradient).mapped() + pool(Kept::kForBackward).mapped(); }

#else

KeptBlock* take_kept(Kept, size_t) { return nullptr; }
void give_back(KeptBlock*) {}
size_t kept_bytes() { return 0; }

#endif

void* memory_of(const KeptBlock* block) { return block->memory; }

}  // namespace fastmoe_route
