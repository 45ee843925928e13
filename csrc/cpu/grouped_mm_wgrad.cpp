// Weight and bias gradients of grouped_mm.
//
// Every block of a weight gradient is one task: an expert, a range of its rows and a range of its columns. Workers take
// tasks from a counter, so experts of any size balance. An element is summed by one worker over the expert's rows in
// ascending order, so bits depend neither on the number of threads nor on the blocks. Experts without rows are zeros.
// The transposed layout is the same product with the operands exchanged.
// Reads x and grad_y once per block row and column, writes the gradients once.
#include <cstring>

#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr int64_t kBlockRows = 256;  // of a weight gradient
constexpr int64_t kBlockCols = 1024;
constexpr int64_t kMinBlockCols = 256;
constexpr int64_t kBiasCols = 256;
constexpr int64_t kBiasRows = 64;  // partial sums of this many rows bound the error of long segments

struct Operand {
  const char* data;
  int64_t row_bytes;
  int64_t cols;
};

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// sum[j] += column sums of `count` rows of `width` columns.
template <class T>
void add_rows(const char* rows, int64_t row_bytes, int64_t count, int64_t width, float* sum) {
  for (int64_t j = 0; j < width; j += Vec::kLanes) {
    const int lanes = width - j < Vec::kLanes ? static_cast<int>(width - j) : Vec::kLanes;
    Vec partial = Vec::zero();
    for (int64_t r = 0; r < count; ++r) {
      const T* row = reinterpret_cast<const T*>(rows + r * row_bytes) + j;
      partial = partial + (lanes == Vec::kLanes ? Vec::load(row) : Vec::load(row, lanes));
    }
    (Vec::load(sum + j) + partial).store(sum + j);
  }
}

void add_rows_double(const char* rows, int64_t row_bytes, int64_t count, int64_t width, double* sum) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t j = 0; j < width; ++j) sum[j] += reinterpret_cast<const double*>(rows + r * row_bytes)[j];
}

template <class T>
void bias_block(const char* rows, int64_t row_bytes, int64_t count, int64_t width, T* out) {
  alignas(64) accumulate_t<T> sum[kBiasCols] = {};
  for (int64_t r = 0; r < count; r += kBiasRows) {
    const int64_t block = count - r < kBiasRows ? count - r : kBiasRows;
    if constexpr (sizeof(T) == 8) add_rows_double(rows + r * row_bytes, row_bytes, block, width, sum);
    else add_rows<T>(rows + r * row_bytes, row_bytes, block, width, sum);
  }
  for (int64_t j = 0; j < width; ++j) out[j] = from_float<T>(sum[j]);
}

// One block of grad_w. `pointers` holds two row-pointer arrays of the expert's size.
void weight_block(const WgradKernel& kernel, const Operand& left, const Operand& right, int64_t element, int64_t begin,
                  int64_t count, int64_t i0, int64_t j0, int64_t block_cols, char* grad, const void** pointers) {
  const int64_t height = left.cols - i0 < kBlockRows ? left.cols - i0 : kBlockRows;
  const int64_t width = right.cols - j0 < block_cols ? right.cols - j0 : block_cols;
  char* out = grad + (i0 * right.cols + j0) * element;
  if (count == 0) {
    for (int64_t i = 0; i < height; ++i) std::memset(out + i * right.cols * element, 0, width * element);
    return;
  }
  const void** x = pointers;
  const void** y = pointers + count;
  for (int64_t r = 0; r < count; ++r) {
    x[r] = left.data + (begin + r) * left.row_bytes + i0 * element;
    y[r] = right.data + (begin + r) * right.row_bytes + j0 * element;
  }
  kernel.multiply(x, y, count, height, width, out, right.cols);
}

}  // namespace

void grouped_mm_wgrad(const GroupedMmWgradArgs& args) {
  const int64_t element = element_size(args.dtype);
  const Operand x{static_cast<const char*>(args.x), args.x_stride * element, args.in};
  const Operand y{static_cast<const char*>(args.grad_y), args.grad_y_stride * element, args.out};
  const Operand& left = args.transposed ? y : x;
  const Operand& right = args.transposed ? x : y;
  const WgradKernel kernel = kernels().micro.wgrad[static_cast<int>(args.dtype)];

  const bool wants_weight = args.grad_w != nullptr && args.in > 0 && args.out > 0;
  const int64_t block_rows = wants_weight ? blocks(left.cols, kBlockRows) : 0;
  int64_t block_width = kBlockCols;
  const int64_t enough = 8 * num_threads();
  while (block_width > kMinBlockCols && args.num_experts * block_rows * blocks(right.cols, block_width) < enough)
    block_width /= 2;
  const int64_t block_cols = blocks(right.cols, block_width);
  const int64_t per_expert = block_rows * block_cols;
  const int64_t weight_tasks = args.num_experts * per_expert;
  const int64_t bias_blocks = args.grad_bias != nullptr ? blocks(args.out, kBiasCols) : 0;
  const int64_t tasks = weight_tasks + args.num_experts * bias_blocks;
  if (tasks == 0) return;

  int64_t most_rows = 0;
  for (int64_t e = 0; e < args.num_experts; ++e) {
    const int64_t count = args.offsets[e + 1] - args.offsets[e];
    most_rows = count > most_rows ? count : most_rows;
  }
  const int64_t workers = tasks < num_threads() ? tasks : num_threads();
  const void** pointers =
      static_cast<const void**>(scratch(Scratch::kReduction, workers * 2 * most_rows * sizeof(void*)));

  int64_t next = 0;
  parallel_workers(workers, [&](int worker) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      if (task < weight_tasks) {
        const int64_t e = task / per_expert, block = task % per_expert;
        const int64_t begin = args.offsets[e], count = args.offsets[e + 1] - begin;
        weight_block(kernel, left, right, element, begin, count, block / block_cols * kBlockRows,
                     block % block_cols * block_width, block_width,
                     static_cast<char*>(args.grad_w) + e * args.in * args.out * element,
                     pointers + worker * 2 * most_rows);
      } else {
        const int64_t e = (task - weight_tasks) / bias_blocks;
        const int64_t j0 = (task - weight_tasks) % bias_blocks * kBiasCols;
        const int64_t begin = args.offsets[e], count = args.offsets[e + 1] - begin;
        const int64_t width = args.out - j0 < kBiasCols ? args.out - j0 : kBiasCols;
        dispatch_float(args.dtype, [&](auto type) {
          using T = decltype(type);
          bias_block<T>(y.data + begin * y.row_bytes + j0 * element, y.row_bytes, count, width,
                        static_cast<T*>(args.grad_bias) + e * args.out + j0);
        });
      }
    }
  });
}

FASTMOE_ROUTE_ISA_END
