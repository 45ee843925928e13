// Threads for the CPU kernels, without naming torch: library.cpp installs torch's own pool at load, so that
// torch.set_num_threads() rules here too; a program without torch runs serially.
#pragma once

#include <cstdint>

namespace fastmoe_route {

struct ThreadPool {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  // Splits [0, count) into at most num_threads() contiguous ranges of at least `grain` and runs them all.
  void (*run)(int64_t count, int64_t grain, Body body, void* context);
  int (*num_threads)();
};

extern ThreadPool thread_pool;

inline int num_threads() { return thread_pool.num_threads(); }

// body(begin, end) over disjoint ranges that cover [0, count). The ranges depend on the number of threads: a
// kernel whose bits must not has to do its arithmetic per item, or per tile of a fixed size.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t{0}, count);
  thread_pool.run(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// body(worker) once per worker, at most `limit` of them at the same time; for kernels that hand out their own work
// from an atomic counter. Workers may run one after another: they must not wait for each other.
template <class F>
void parallel_workers(int64_t limit, const F& body) {
  const int64_t workers = limit < num_threads() ? limit : num_threads();
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker));
  });
}

}  // namespace fastmoe_route
