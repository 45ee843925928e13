// softmax: three ways to exp(x - max) / sum along a row, and the backward pass y * (g - sum(g * y) / sum(y)).
//
// three_pass  max, sum, write. A row whose exponentials fit kKeepColumns keeps them, so that exp is taken once;
//             a longer row reads x three times and takes exp twice.
// online      one pass for the running max and sum (Milakov and Gimelshein, arXiv:1805.02867), block by block: a block
//             lies in L1 while its max is found and then summed against the running max. A second pass writes.
// two_pass    one pass without any max: e^x = p 2^n is summed as a mantissa and an exponent (Dukhan and Ablavatski,
//             arXiv:2001.04438). A second pass writes. Rows whose largest |x| is beyond 4096, where n loses its
//             precision, and rows with a NaN fall back to online.
// Bytes of a row beyond the caches: three_pass reads 3 and writes 1, the others read 2 and write 1.
// The order of summation is that of softmax_sum.h.
#include "common/workspace.h"
#include "cpu/isa/kernels.h"
#include "cpu/softmax_sum.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

// Exponentials of a row kept between passes: half a megabyte of the second-level cache.
constexpr int64_t kKeepColumns = 131072;
// Rows of at most this many vectors live in registers: half of them, the others hold constants.
constexpr int kRegisterVecs = Vec::kRegisters / 2;
// Outputs from this size on are written past the caches.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// y[i] = f(i, count) over n elements; with `stream` past the caches, where y allows aligned stores.
template <class T, class F>
FASTMOE_ROUTE_INLINE inline void write(T* y, int64_t n, bool stream, const F& f) {
  if (!stream)
    return each_vec(n, [&](int, int64_t i, auto count) FASTMOE_ROUTE_INLINE { put(f(i, count), y + i, count); });
  constexpr uintptr_t kBytes = kLanes * sizeof(T);
  int64_t i = static_cast<int64_t>((kBytes - reinterpret_cast<uintptr_t>(y) % kBytes) % kBytes / sizeof(T));
  if (i > n) i = n;
  if (i > 0) put(f(int64_t{0}, static_cast<int>(i)), y, static_cast<int>(i));
  for (; i + kLanes <= n; i += kLanes) f(i, Full{}).stream(y + i);
  if (i < n) put(f(i, static_cast<int>(n - i)), y + i, static_cast<int>(n - i));
}

// Sum of p 2^n as mantissa * 2^exponent, exponent the largest n.
struct ExtendedSum {
  float exponent = -8192.0f;
  double mantissa = 0.0;

  void add(const ExtendedSum& other) {
    const float top = exponent > other.exponent ? exponent : other.exponent;
    mantissa =
        std::ldexp(mantissa, clamped(exponent - top)) + std::ldexp(other.mantissa, clamped(other.exponent - top));
    exponent = top;
  }
  static int clamped(float n) { return n < -2000.0f ? -2000 : static_cast<int>(n); }
};

// Smallest x that exp_parts is given; the exponents for which neither it nor the precision of n matter.
constexpr float kLowestInput = -4096.0f;
inline bool in_range(float exponent) { return exponent <= 5909.0f && exponent >= -5500.0f; }

template <class T>
ExtendedSum block_extended_sum(const T* x, int64_t n) {
  const Vec lowest = Vec::all(kLowestInput), least = Vec::all(-125.0f);
  Vec top = Vec::all(-8192.0f);
  Vec sum = Vec::zero();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    Vec exponent[4], p[4];
    for (int j = 0; j < 4; ++j) p[j] = exp_parts(max(lowest, Vec::load(x + i + j * kLanes)), exponent[j]);
    const Vec before = top;
    // NaN exponents are ignored (first operands); their NaN is in p.
    top = max(max(exponent[0], max(exponent[1], max(exponent[2], max(exponent[3], before)))), before);
    // Beside the largest, 2^-125 stands for what is less: no subnormals.
    for (int j = 0; j < 4; ++j) p[j] = ldexp(p[j], max(least, exponent[j] - top));
    sum = ldexp(sum, max(least, before - top)) + ((p[0] + p[1]) + (p[2] + p[3]));
  }
  for (; i < n; i += kLanes) {
    const int count = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    Vec exponent;
    const Vec p = exp_parts(max(lowest, Vec::load(x + i, count, -kInfinity)), exponent);
    const Vec before = top;
    top = max(exponent, before);
    sum = ldexp(sum, max(least, before - top)) + ldexp(p, max(least, exponent - top));
  }
  ExtendedSum result;
  result.exponent = reduce_max(top);
  result.mantissa = reduce_add(ldexp(sum, top - Vec::all(result.exponent)));
  return result;
}

// ---- One row.

struct RowScratch {
  void* partials = nullptr;  // of over_tiles()
  float* keep = nullptr;     // room for the exponentials of a row of up to kKeepColumns, or null
  bool stream = false;       // write past the caches
  template <class S>
  S* as() const {
    return static_cast<S*>(partials);
  }
};

// y = exp(x - offset) / sum.
template <class T>
void write_row(const T* x, T* y, int64_t n, const Sum& sum, const RowScratch& scratch) {
  const Vec offset = Vec::all(offset_of(sum.max));
  const Vec factor = Vec::all(static_cast<float>(1.0 / sum.total()));
  by_nearness(sum.is_near(), [&](auto is_near) {
    each_tile(n, scratch.partials != nullptr, [&](int64_t begin, int64_t count) {
      const T* from = x + begin;
      write(y + begin, count, scratch.stream, [&](int64_t i, auto lanes) FASTMOE_ROUTE_INLINE {
        return scaled<is_near>(exp_in<is_near>(get(from + i, lanes, 0.0f) - offset, lanes), factor);
      });
    });
  });
}

template <class T>
void three_pass_row(const T* x, T* y, int64_t n, const RowScratch& scratch) {
  const Range range = over_tiles<Range>(
      n, scratch.as<Range>(), [&](int64_t begin, int64_t count) { return block_range<true>(x + begin, count); });
  const float offset = offset_of(range.max);
  const bool keeps = scratch.partials == nullptr && n <= kKeepColumns;
  float* keep = scratch.keep;
  if constexpr (sizeof(T) == sizeof(float))
    if (!scratch.stream) keep = y;
  by_nearness(range.is_near(), [&](auto is_near) {
    const Sum sum = over_tiles<Sum>(n, scratch.as<Sum>(), [&](int64_t begin, int64_t count) {
      Sum tile{range.max, range.min};
      each_block(count, [&](int64_t i, int64_t size) {
        const int64_t at = begin + i;
        tile.sum += keeps ? kept_block_sum<is_near>(x + at, size, offset, keep + at) : block_sum(x + at, size, offset);
      });
      return tile;
    });
    if (!keeps) return write_row(x, y, n, sum, scratch);
    const Vec factor = Vec::all(static_cast<float>(1.0 / sum.total()));
    write(y, n, scratch.stream, [&](int64_t i, auto lanes) FASTMOE_ROUTE_INLINE {
      return scaled<is_near>(get(keep + i, lanes, 0.0f), factor);
    });
  });
}

template <class T>
void online_row(const T* x, T* y, int64_t n, const RowScratch& scratch) {
  const Sum sum = over_tiles<Sum>(n, scratch.as<Sum>(), [&](int64_t begin, int64_t count) {
    Sum tile;
    each_block(count, [&](int64_t i, int64_t size) {
      const Range range = block_range<true>(x + begin + i, size);
      tile.raise(range.max);
      tile.min = range.min < tile.min ? range.min : tile.min;
      tile.sum += block_sum(x + begin + i, size, offset_of(tile.max));
    });
    return tile;
  });
  write_row(x, y, n, sum, scratch);
}

template <class T>
void two_pass_row(const T* x, T* y, int64_t n, const RowScratch& scratch) {
  const ExtendedSum sum = over_tiles<ExtendedSum>(n, scratch.as<ExtendedSum>(), [&](int64_t begin, int64_t count) {
    ExtendedSum tile;
    each_block(count, [&](int64_t i, int64_t size) { tile.add(block_extended_sum(x + begin + i, size)); });
    return tile;
  });
  if (!in_range(sum.exponent) || std::isnan(sum.mantissa)) return online_row(x, y, n, scratch);
  const Vec lowest = Vec::all(kLowestInput);
  const Vec exponent = Vec::all(sum.exponent);
  const Vec factor = Vec::all(static_cast<float>(1.0 / sum.mantissa));
  each_tile(n, scratch.partials != nullptr, [&](int64_t begin, int64_t count) {
    const T* from = x + begin;
    write(y + begin, count, scratch.stream, [&](int64_t i, auto lanes) FASTMOE_ROUTE_INLINE {
      Vec power;
      const Vec p = exp_parts(max(lowest, get(from + i, lanes, 0.0f)), power);
      return ldexp_gradual(p * factor, power - exponent);
    });
  });
}

// A row that register_rows() leaves out.
template <class T>
void far_row(const T* x, T* y, int64_t n, float offset) {
  float keep[kRegisterVecs * kLanes];
  const float sum = kept_block_sum<false>(x, n, offset, keep);
  const Vec factor = Vec::all(1.0f / sum);
  write(y, n, false, [&](int64_t i, auto lanes) FASTMOE_ROUTE_INLINE {
    return product_gradual(get(keep + i, lanes, 0.0f), factor);
  });
}

// Rows of N vectors, the last with `tail` elements: one read, one write, nothing in between leaves the registers.
template <int N, class T>
void register_rows(const T* x, int64_t x_stride, T* y, int64_t n, int64_t rows) {
  const int tail = static_cast<int>(n - (N - 1) * kLanes);
  for (int64_t row = 0; row < rows; ++row, x += x_stride, y += n) {
    Vec e[N];
    for (int i = 0; i < N - 1; ++i) e[i] = Vec::load(x + i * kLanes);
    const T* last = x + (N - 1) * kLanes;
    e[N - 1] = tail == kLanes ? Vec::load(last) : Vec::load(last, tail, -kInfinity);
    Vec top[2] = {Vec::all(-kInfinity), Vec::all(-kInfinity)};
    for (int i = 0; i < N; ++i) top[i % 2] = max(e[i], top[i % 2]);
    // A NaN may hide what is less: the row is NaN either way.
    Vec least[2] = {tail == kLanes ? e[N - 1] : Vec::load(last, tail, kInfinity), e[0]};
    for (int i = 1; i < N - 1; ++i) least[i % 2] = min(e[i], least[i % 2]);
    if (N > 1) least[0] = min(least[0], least[1]);
    const float shift = offset_of(reduce_max(max(top[0], top[1])));
    const Vec offset = Vec::all(shift);
    if ((least[0] < offset - Vec::all(kNear)).lanes() != 0) {
      far_row(x, y, n, shift);
      continue;
    }
    Vec sum[2] = {Vec::zero(), Vec::zero()};
    for (int i = 0; i < N; ++i) {
      e[i] = i < N - 1 ? exp_nonpositive<Below::kNear>(e[i] - offset) : exp_nonpositive(e[i] - offset);
      sum[i % 2] = sum[i % 2] + e[i];
    }
    const Vec factor = Vec::all(1.0f / reduce_add(sum[0] + sum[1]));
    for (int i = 0; i < N - 1; ++i) (e[i] * factor).store(y + i * kLanes);
    const Vec rest = e[N - 1] * factor;
    tail == kLanes ? rest.store(y + (N - 1) * kLanes) : rest.store(y + (N - 1) * kLanes, tail);
  }
}

// One(N) for the N <= kRegisterVecs that holds n elements.
template <int N = kRegisterVecs, class F>
auto with_vecs(int64_t n, const F& one) {
  if constexpr (N > 1)
    if (n <= (N - 1) * kLanes) return with_vecs<N - 1>(n, one);
  return one(std::integral_constant<int, N>{});
}

// ---- float64: three passes of scalars for every method.

inline void double_row(const double* x, double* y, int64_t n) {
  double max = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += y[i] = std::exp(x[i] - max);
  for (int64_t i = 0; i < n; ++i) y[i] /= sum;
}

// ---- All rows.

// three_pass while its exponentials can be kept, then online, for every dtype; docs/numerics.md has the measurements.
SoftmaxMethod resolve(const SoftmaxArgs& args) {
  if (args.method != SoftmaxMethod::kAuto) return args.method;
  return args.num_cols <= kKeepColumns ? SoftmaxMethod::kThreePass : SoftmaxMethod::kOnline;
}

template <class T>
void softmax_rows(const SoftmaxArgs& args, T) {
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const int64_t n = args.num_cols;
  const SoftmaxMethod method = resolve(args);
  const bool stream = args.num_rows * n * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  if (method == SoftmaxMethod::kThreePass && n <= kRegisterVecs * kLanes) {
    const auto rows = with_vecs(n, [](auto vecs) { return register_rows<vecs.value, T>; });
    return split_rows(args.num_rows, n, [&](int64_t first, int64_t last, int) {
      rows(x + first * args.x_stride, args.x_stride, y + first * n, n, last - first);
    });
  }
  const auto one_row = [&](int64_t row, const RowScratch& scratch) {
    const T* from = x + row * args.x_stride;
    T* to = y + row * n;
    if (method == SoftmaxMethod::kThreePass) return three_pass_row(from, to, n, scratch);
    if (method == SoftmaxMethod::kOnline) return online_row(from, to, n, scratch);
    two_pass_row(from, to, n, scratch);
  };
  if (splits_rows(args.num_rows, n)) {
    RowScratch row_scratch;
    row_scratch.stream = stream;
    row_scratch.partials = scratch(Scratch::kReduction, (n / kTile + 1) * sizeof(Sum));
    for (int64_t row = 0; row < args.num_rows; ++row) one_row(row, row_scratch);
    return;
  }
  const int64_t kept = method == SoftmaxMethod::kThreePass && n <= kKeepColumns ? (n + 15) / 16 * 16 : 0;
  float* keep = static_cast<float*>(scratch(Scratch::kReduction, num_threads() * kept * sizeof(float)));
  split_rows(args.num_rows, n, [&](int64_t first, int64_t last, int worker) {
    RowScratch row_scratch;
    row_scratch.stream = stream;
    row_scratch.keep = keep + worker * kept;
    for (int64_t row = first; row < last; ++row) one_row(row, row_scratch);
    Vec::stream_fence();
  });
}

inline void softmax_rows(const SoftmaxArgs& args, double) {
  const double* x = static_cast<const double*>(args.x);
  double* y = static_cast<double*>(args.y);
  split_rows(args.num_rows, args.num_cols, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row)
      double_row(x + row * args.x_stride, y + row * args.num_cols, args.num_cols);
  });
}

// ---- Backward: grad_x = y * (g - mean), mean = sum(g * y) / sum(y). The sum of the rounded y differs from 1, and
// ---- where one y is close to 1 that difference would be all that is left of its g - sum(g * y).

struct Moments {
  double weighted = 0.0, total = 0.0;
  void add(const Moments& other) {
    weighted += other.weighted;
    total += other.total;
  }
};

template <class T>
void backward_row(const T* g, const T* y, T* grad_x, int64_t n, Moments* partials) {
  const Moments row = over_tiles<Moments>(n, partials, [&](int64_t begin, int64_t count) {
    Moments tile;
    each_block(count, [&](int64_t at, int64_t size) {
      Vec weighted[4], total[4];
      for (int j = 0; j < 4; ++j) weighted[j] = total[j] = Vec::zero();
      const T* gs = g + begin + at;
      const T* ys = y + begin + at;
      each_vec(size, [&](int j, int64_t i, auto lanes) FASTMOE_ROUTE_INLINE {
        const Vec p = get(ys + i, lanes, 0.0f);
        weighted[j] = fma(get(gs + i, lanes, 0.0f), p, weighted[j]);
        total[j] = total[j] + p;
      });
      tile.weighted += reduce_add((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
      tile.total += reduce_add((total[0] + total[1]) + (total[2] + total[3]));
    });
    return tile;
  });
  const Vec mean = Vec::all(static_cast<float>(row.weighted / row.total));
  each_tile(n, partials != nullptr, [&](int64_t begin, int64_t count) {
    write(grad_x + begin, count, false, [&](int64_t i, auto lanes) FASTMOE_ROUTE_INLINE {
      return get(y + begin + i, lanes, 0.0f) * (get(g + begin + i, lanes, 0.0f) - mean);
    });
  });
}

// Rows of N vectors, the last with `tail` elements.
template <int N, class T>
void register_backward_rows(const T* g, const T* y, T* grad_x, int64_t n, int64_t rows) {
  constexpr int kLast = N - 1;
  const int tail = static_cast<int>(n - kLast * kLanes);
  for (int64_t row = 0; row < rows; ++row, g += n, y += n, grad_x += n) {
    Vec p[N], weighted[2] = {Vec::zero(), Vec::zero()}, total[2] = {Vec::zero(), Vec::zero()};
    const auto grad = [&](int i) FASTMOE_ROUTE_INLINE {
      return i < kLast || tail == kLanes ? Vec::load(g + i * kLanes) : Vec::load(g + i * kLanes, tail, 0.0f);
    };
    for (int i = 0; i < N; ++i) {
      p[i] = i < kLast || tail == kLanes ? Vec::load(y + i * kLanes) : Vec::load(y + i * kLanes, tail, 0.0f);
      weighted[i % 2] = fma(grad(i), p[i], weighted[i % 2]);
      total[i % 2] = total[i % 2] + p[i];
    }
    const Vec mean = Vec::all(reduce_add(weighted[0] + weighted[1]) / reduce_add(total[0] + total[1]));
    for (int i = 0; i < kLast; ++i) (p[i] * (grad(i) - mean)).store(grad_x + i * kLanes);
    const Vec rest = p[kLast] * (grad(kLast) - mean);
    tail == kLanes ? rest.store(grad_x + kLast * kLanes) : rest.store(grad_x + kLast * kLanes, tail);
  }
}

inline void backward_row(const double* g, const double* y, double* grad_x, int64_t n, Moments*) {
  Moments row;
  for (int64_t i = 0; i < n; ++i) row.add({g[i] * y[i], y[i]});
  const double mean = row.weighted / row.total;
  for (int64_t i = 0; i < n; ++i) grad_x[i] = y[i] * (g[i] - mean);
}

}  // namespace

void softmax(const SoftmaxArgs& args) {
  dispatch_element(args.dtype, [&](auto element) { softmax_rows(args, element); });
}

void softmax_backward(const SoftmaxBackwardArgs& args) {
  const int64_t n = args.num_cols;
  dispatch_element(args.dtype, [&](auto element) {
    using T = decltype(element);
    const T* g = static_cast<const T*>(args.grad_y);
    const T* y = static_cast<const T*>(args.y);
    T* grad_x = static_cast<T*>(args.grad_x);
    if constexpr (!std::is_same_v<T, double>) {
      if (n <= kRegisterVecs * kLanes) {
        const auto rows = with_vecs(n, [](auto vecs) { return register_backward_rows<vecs.value, T>; });
        return split_rows(args.num_rows, n, [&](int64_t first, int64_t last, int) {
          rows(g + first * n, y + first * n, grad_x + first * n, n, last - first);
        });
      }
    }
    if (splits_rows(args.num_rows, n)) {
      Moments* partials = static_cast<Moments*>(scratch(Scratch::kReduction, (n / kTile + 1) * sizeof(Moments)));
      for (int64_t row = 0; row < args.num_rows; ++row)
        backward_row(g + row * n, y + row * n, grad_x + row * n, n, partials);
      return;
    }
    split_rows(args.num_rows, n, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row) backward_row(g + row * n, y + row * n, grad_x + row * n, n, nullptr);
    });
  });
}

FASTMOE_ROUTE_ISA_END
