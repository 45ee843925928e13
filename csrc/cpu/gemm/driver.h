// Who multiplies what: blocks of rows of one expert times chunks of columns of its weights, shared among threads.
//
// A block is a run of at most 512 rows of one expert; a task is one block and one chunk of columns, as wide as suits
// the rows of the block. Tasks are numbered block by block, and every worker starts with its own run of numbers, so it
// packs a block's rows once and streams the weights of its own experts in order; a worker that has finished takes
// single tasks from the next one that has not. One token's few experts are spread over all threads by columns; many
// rows cost one packing per block.
// No result depends on who computed it: the micro-kernels sum in an order of k alone.
#pragma once

#include "common/cache.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN

// [E, k, n] weights as a micro-kernel takes them: one of the last two strides is 1.
struct ExpertWeights {
  MicroKernel kernel;
  const char* first;
  int64_t expert_bytes;
  int64_t column_bytes;
  int64_t stride;  // w_stride of MicroKernel::multiply

  ExpertWeights(DType dtype, const ExpertMatrix& w) {
    const bool outer = w.stride_col == 1;
    const MicroKernels& micro = fastmoe_route::kernels().micro;
    kernel = (outer ? micro.outer : micro.dot)[static_cast<int>(dtype)];
    first = static_cast<const char*>(w.data);
    expert_bytes = w.stride_expert * element_size(dtype);
    column_bytes = w.stride_col * element_size(dtype);
    stride = outer ? w.stride_row : w.stride_col;
  }
  const void* at(int64_t expert, int64_t column) const { return first + expert * expert_bytes + column * column_bytes; }
};

// One grouped product: rows [offsets[e], offsets[e + 1]) times the k x n weights of expert e.
struct GroupedProduct {
  int64_t num_experts;
  const int32_t* offsets;
  ExpertWeights weights;
  int64_t k;
  int64_t n;
  // Distance of a partner column: with p > 0 (gated activations) n counts pairs, a chunk of w columns is computed with
  // its partners p columns to the right, and the tile holds the columns in [0, w), the partners in [w, 2 w).
  int64_t partner = 0;
  // One past the last row of each expert that is wanted, [num_experts]; null for offsets[e + 1].
  const int32_t* ends = nullptr;
  // Where results go if they need no conversion: [rows, n] of the accumulation type; null for a scratch tile.
  void* direct = nullptr;
  int64_t direct_stride = 0;

  int64_t end(int64_t expert) const { return ends != nullptr ? ends[expert] : offsets[expert + 1]; }
};

// A finished tile: rows [row_begin, row_end) and columns [col_begin, col_end) of `expert`.
template <class A>
struct FinishedTile {
  int64_t expert;
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  A* tile;         // element (row_begin, col_begin)
  int64_t stride;  // between rows
};

namespace driver {

constexpr int64_t kMaxBlockRows = 512;              // more gains nothing, and unbalances threads
constexpr int64_t kPackedBytes = int64_t{4} << 20;  // of a worker's packed rows, at most (but see kMinBlockRows)
constexpr int64_t kMinBlockRows = 48;
constexpr int64_t kColumnUnit = 64;  // chunks start at multiples of it: whole tiles of every micro-kernel
constexpr int64_t kMaxChunk = 384;
constexpr int64_t kTasksPerWorker = 12;
constexpr int64_t kFewRows = 8;  // in every block
constexpr int64_t kMaxFewRowChunk = 2048;
constexpr int64_t kMinFewRowChunk = 128;
// What a thread waits for at the end is half a task. A task's start costs little where fetches go on into it (Intel).
inline int64_t few_row_tasks_per_worker() { return prefetch_waits_for_page() ? 16 : 32; }

// Columns [column, column + width) of rows [begin, end), which are one block.
struct Task {
  int64_t expert, begin, end, column, width;
};

// Next task of a worker's own run; alone on its cache line.
struct alignas(64) Run {
  int64_t next, end;
};

inline int64_t align(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// body(expert, begin, end) for every block.
template <class Body>
inline void for_blocks(const GroupedProduct& product, int64_t max_rows, const Body& body) {
  for (int64_t e = 0; e < product.num_experts; ++e) {
    const int64_t begin = product.offsets[e], rows = product.end(e) - begin;
    const int64_t pieces = (rows + max_rows - 1) / max_rows;
    for (int64_t p = 0; p < pieces; ++p) body(e, begin + rows * p / pieces, begin + rows * (p + 1) / pieces);
  }
}

inline int64_t block_rows(const GroupedProduct& product) {
  const int64_t row_bytes = product.weights.kernel.packed_bytes(kMinBlockRows, product.k) / kMinBlockRows;
  const int64_t fit = kPackedBytes / (row_bytes > 0 ? row_bytes : 1);
  return fit < kMinBlockRows ? kMinBlockRows : fit > kMaxBlockRows ? kMaxBlockRows : fit;
}

// Few rows stream weights at the speed of memory, and row-major weights in runs as long as a chunk is wide: wide
// chunks, but enough of them for threads to end together. Many rows want small chunks, so that tiles stay in the
// caches, and no smaller ones than the kernel fetches together for the `rows` of the block. Chunks are as even as their
// unit allows.
inline int64_t chunk_columns(int64_t n, int64_t num_blocks, int64_t rows, bool is_few_rows, int64_t workers,
                             const MicroKernel& kernel) {
  const int64_t span = kernel.span != nullptr ? kernel.span(rows) : 0;
  const int64_t tasks = (is_few_rows ? few_row_tasks_per_worker() : kTasksPerWorker) * workers;
  const int64_t many = span > kMaxChunk ? span : kMaxChunk;
  const int64_t most = is_few_rows ? kMaxFewRowChunk : many, least = is_few_rows ? kMinFewRowChunk : kColumnUnit;
  int64_t pieces = (tasks + num_blocks - 1) / num_blocks;
  if (pieces > (n + least - 1) / least) pieces = (n + least - 1) / least;
  if (pieces < (n + most - 1) / most) pieces = (n + most - 1) / most;
  return round_up((n + pieces - 1) / pieces, kColumnUnit);
}

}  // namespace driver

// rows(begin, end, pointers, scales): sets pointers[i] to row begin + i of the left factor (k elements) and, if
//   `scaled`, scales[i] (type A) to the number it is multiplied by.
// finish(FinishedTile<A>): takes the results of one task; called from many threads, once per element.
// The caller's Scratch::kPackedRows is in use until this returns.
template <class A, class Rows, class Finish>
void grouped_product(const GroupedProduct& product, bool scaled, const Rows& rows, const Finish& finish) {
  using namespace driver;
  const int64_t total_rows = product.num_experts > 0 ? product.offsets[product.num_experts] : 0;
  if (total_rows == 0 || product.n == 0) return;
  const int64_t limit = block_rows(product);
  int64_t num_blocks = 0, most = 0;
  for_blocks(product, limit, [&](int64_t, int64_t begin, int64_t end) {
    ++num_blocks;
    most = end - begin > most ? end - begin : most;
  });
  if (num_blocks == 0) return;
  const int64_t widths = product.partner > 0 ? 2 : 1;
  // A few microseconds of work are not worth waking threads.
  const double cost = static_cast<double>(total_rows + 16 * num_blocks) * static_cast<double>(product.k + 1) *
                      static_cast<double>(product.n * widths);
  const int64_t threads = cost < 5e5 ? 1 : num_threads();
  const auto chunk_of = [&](int64_t rows) {
    return chunk_columns(product.n, num_blocks, rows, most <= kFewRows, threads, product.weights.kernel);
  };
  int64_t num_tasks = 0, largest_tile = 0;
  for_blocks(product, limit, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t chunk = chunk_of(end - begin), size = (end - begin) * chunk * widths;
    num_tasks += (product.n + chunk - 1) / chunk;
    largest_tile = size > largest_tile ? size : largest_tile;
  });
  const int64_t workers = num_tasks < threads ? num_tasks : threads;

  const int64_t packed_bytes = align(product.k > 0 ? product.weights.kernel.packed_bytes(most, product.k) : 0);
  const int64_t tile_bytes = product.direct != nullptr ? 0 : align(largest_tile * static_cast<int64_t>(sizeof(A)));
  const int64_t list_bytes = align(most * 8);
  const int64_t worker_bytes = packed_bytes + tile_bytes + 2 * list_bytes;
  const int64_t run_bytes = workers * static_cast<int64_t>(sizeof(Run));
  const int64_t task_bytes = align(num_tasks * static_cast<int64_t>(sizeof(Task)));
  char* memory = static_cast<char*>(
      scratch(Scratch::kPackedRows, static_cast<size_t>(run_bytes + task_bytes + workers * worker_bytes)));
  Run* runs = reinterpret_cast<Run*>(memory);
  Task* tasks = reinterpret_cast<Task*>(memory + run_bytes);
  char* worker_memory = memory + run_bytes + task_bytes;
  Task* next = tasks;
  for_blocks(product, limit, [&](int64_t expert, int64_t begin, int64_t end) {
    const int64_t chunk = chunk_of(end - begin);
    for (int64_t column = 0; column < product.n; column += chunk)
      *next++ = {expert, begin, end, column, product.n - column < chunk ? product.n - column : chunk};
  });
  for (int64_t w = 0; w < workers; ++w) runs[w] = {num_tasks * w / workers, num_tasks * (w + 1) / workers};

  parallel_workers(workers, [&](int worker) {
    char* packed = worker_memory + worker * worker_bytes;
    A* scratch_tile = reinterpret_cast<A*>(packed + packed_bytes);
    const void** pointers = reinterpret_cast<const void**>(packed + packed_bytes + tile_bytes);
    A* scales = reinterpret_cast<A*>(packed + packed_bytes + tile_bytes + list_bytes);
    int64_t held = -1;
    for (int64_t victim = worker, tried = 0; tried < workers; ++tried, victim = victim + 1 < workers ? victim + 1 : 0) {
      while (true) {
        const int64_t number = __atomic_fetch_add(&runs[victim].next, 1, __ATOMIC_RELAXED);
        if (number >= runs[victim].end) break;
        const Task& task = tasks[number];
        const int64_t m = task.end - task.begin, width = task.width;
        if (held != task.begin && product.k > 0) {
          held = task.begin;
          rows(task.begin, task.end, pointers, scales);
          product.weights.kernel.pack(pointers, scaled ? scales : nullptr, m, product.k, packed);
        }
        FinishedTile<A> done{task.expert,         task.begin,   task.end,      task.column,
                             task.column + width, scratch_tile, width * widths};
        if (product.direct != nullptr) {
          done.stride = product.direct_stride;
          done.tile = static_cast<A*>(product.direct) + task.begin * done.stride + task.column;
        }
        for (int64_t side = 0; side < widths; ++side) {
          A* to = done.tile + side * width;
          if (product.k > 0) {
            const void* w = product.weights.at(task.expert, task.column + side * product.partner);
            const void* after = nullptr;
            if (side + 1 < widths) after = product.weights.at(task.expert, task.column + product.partner);
            else if (number + 1 < runs[victim].end)
              after = product.weights.at(tasks[number + 1].expert, tasks[number + 1].column);
            product.weights.kernel.multiply(packed, m, w, product.weights.stride, width, product.k, to, done.stride,
                                            after);
          } else {
            for (int64_t i = 0; i < m; ++i)
              for (int64_t j = 0; j < width; ++j) to[i * done.stride + j] = A(0);
          }
        }
        finish(done);
      }
    }
  });
}

FASTMOE_ROUTE_ISA_END
