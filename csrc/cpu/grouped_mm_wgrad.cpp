// Weight and bias gradients of expert products (gemm/gradients.h), and those of grouped_mm.
//
// Every block of a weight gradient is one task: an expert, a range of its rows and a range of its columns. Workers take
// tasks from a counter, so experts of any size balance. An element is summed by one worker over the expert's rows in
// ascending order, so bits depend neither on the number of threads nor on the blocks. Experts without rows are zeros.
// The transposed layout is the same product with the operands exchanged.
// Reads both factors once per block row and column, writes the gradients once.
#include <cstring>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/gemm/gradients.h"
#include "cpu/isa/activation.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr int64_t kBlockRows = 256;     // of a weight gradient; whole rows, so that a block is one piece of memory,
constexpr int64_t kMinBlockCols = 256;  // unless there are too few blocks for the threads
constexpr int64_t kBiasCols = 256;
// Partial sums of so many rows, then of so many of them, and so on, bound the error of long segments.
constexpr int64_t kBiasRows = 16;
constexpr int kBiasLevels = 4;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// sum[j] += column sums of `count` rows from column `first`, `width` columns.
template <class T>
void add_rows(const void* const* rows, const accumulate_t<T>* factors, int64_t count, int64_t first, int64_t width,
              accumulate_t<T>* sum) {
  using V = vector_t<accumulate_t<T>>;
  for (int64_t j = 0; j < width; j += V::kLanes) {
    const int lanes = width - j < V::kLanes ? static_cast<int>(width - j) : V::kLanes;
    V partial = V::zero();
    for (int64_t r = 0; r < count; ++r) {
      const T* row = static_cast<const T*>(rows[r]) + first + j;
      const V value = lanes == V::kLanes ? V::load(row) : V::load(row, lanes);
      partial = factors == nullptr ? partial + value : fma(V::all(factors[r]), value, partial);
    }
    (V::load(sum + j, lanes) + partial).store(sum + j, lanes);
  }
}

template <class T>
void bias_block(const BiasGradient& g, int64_t expert, int64_t first) {
  using A = accumulate_t<T>;
  const int64_t width = g.n - first < kBiasCols ? g.n - first : kBiasCols;
  alignas(64) A sums[kBiasLevels][kBiasCols] = {};
  const auto pass_on = [&](int level) {
    for (int64_t j = 0; j < kBiasCols; ++j) sums[level + 1][j] += sums[level][j], sums[level][j] = 0;
  };
  const int64_t end = g.starts[expert + 1];
  for (int64_t r = g.starts[expert], done = 1; r < end; r += kBiasRows, ++done) {
    add_rows<T>(g.rows + r, g.factors == nullptr ? nullptr : static_cast<const A*>(g.factors) + r,
                end - r < kBiasRows ? end - r : kBiasRows, first, width, sums[0]);
    int level = 0;
    for (int64_t n = done; n % kBiasRows == 0 && level + 1 < kBiasLevels; n /= kBiasRows) pass_on(level++);
  }
  for (int level = 0; level + 1 < kBiasLevels; ++level) pass_on(level);
  T* out = static_cast<T*>(g.result) + expert * g.n + first;
  for (int64_t j = 0; j < width; ++j) out[j] = from_float<T>(sums[kBiasLevels - 1][j]);
}

// Block (i0, j0) of one expert's gradient. `pointers` holds two row-pointer arrays of the expert's size.
void weight_block(const WeightGradient& g, const WgradKernel& kernel, int64_t expert, int64_t i0, int64_t j0,
                  int64_t block_cols, const void** pointers) {
  const int64_t element = element_size(g.dtype), begin = g.starts[expert], count = g.starts[expert + 1] - begin;
  const int64_t height = g.a - i0 < kBlockRows ? g.a - i0 : kBlockRows;
  const int64_t width = g.b - j0 < block_cols ? g.b - j0 : block_cols;
  char* out = static_cast<char*>(g.result) + ((expert * g.a + i0) * g.b + j0) * element;
  const bool had_pages = width == g.b && populate_pages(out, static_cast<size_t>(height * width * element));
  if (count == 0) {
    for (int64_t i = 0; i < height; ++i) std::memset(out + i * g.b * element, 0, static_cast<size_t>(width * element));
    return;
  }
  const void** x = pointers;
  const void** y = pointers + count;
  for (int64_t r = 0; r < count; ++r) {
    x[r] = static_cast<const char*>(g.left[begin + r]) + i0 * element;
    y[r] = static_cast<const char*>(g.right[begin + r]) + j0 * element;
  }
  kernel.multiply(x, y, count, height, width, out, g.b, had_pages);
}

}  // namespace

void weight_gradient(const WeightGradient& gradient) {
  WeightGradient g = gradient;
  if (g.transposed) {
    g.left = gradient.right;
    g.right = gradient.left;
    g.a = gradient.b;
    g.b = gradient.a;
  }
  if (g.num_experts == 0 || g.a == 0 || g.b == 0) return;
  const WgradKernel kernel = kernels().micro.wgrad[static_cast<int>(g.dtype)];
  const int64_t high = blocks(g.a, kBlockRows);
  int64_t block_cols = g.b;
  while (block_cols > kMinBlockCols && g.num_experts * high * blocks(g.b, block_cols) < 8 * num_threads())
    block_cols = blocks(block_cols / 2, 64) * 64;
  const int64_t wide = blocks(g.b, block_cols), per_expert = high * wide, num_tasks = g.num_experts * per_expert;
  int64_t most_rows = 0;
  for (int64_t e = 0; e < g.num_experts; ++e) {
    const int64_t count = g.starts[e + 1] - g.starts[e];
    most_rows = count > most_rows ? count : most_rows;
  }
  const int64_t workers = num_tasks < num_threads() ? num_tasks : num_threads();
  const void** pointers = static_cast<const void**>(
      scratch(Scratch::kPackedRows, static_cast<size_t>(workers * 2 * most_rows) * sizeof(void*)));
  int64_t next = 0;
  parallel_workers(workers, [&](int worker) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= num_tasks) return;
      const int64_t block = task % per_expert;
      weight_block(g, kernel, task / per_expert, block / wide * kBlockRows, block % wide * block_cols, block_cols,
                   pointers + worker * 2 * most_rows);
    }
  });
}

void bias_gradient(const BiasGradient& g) {
  const int64_t parts = blocks(g.n, kBiasCols);
  parallel_for(g.num_experts * parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      dispatch_element(g.dtype,
                       [&](auto type) { bias_block<decltype(type)>(g, task / parts, task % parts * kBiasCols); });
  });
}

void grouped_mm_wgrad(const GroupedMmWgradArgs& args) {
  const int64_t element = element_size(args.dtype);
  const int64_t rows = args.num_experts > 0 ? args.offsets[args.num_experts] : 0;
  const void** x =
      static_cast<const void**>(scratch(Scratch::kRowLists, static_cast<size_t>(2 * rows) * sizeof(void*)));
  const void** y = x + rows;
  for (int64_t r = 0; r < rows; ++r) {
    x[r] = static_cast<const char*>(args.x) + r * args.x_stride * element;
    y[r] = static_cast<const char*>(args.grad_y) + r * args.grad_y_stride * element;
  }
  if (args.grad_w != nullptr)
    weight_gradient(
        {args.dtype, args.num_experts, args.offsets, x, y, args.in, args.out, args.grad_w, args.transposed});
  if (args.grad_bias != nullptr)
    bias_gradient({args.dtype, args.num_experts, args.offsets, y, nullptr, args.out, args.grad_bias});
}

FASTMOE_ROUTE_ISA_END
