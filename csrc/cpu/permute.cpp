// permute, unpermute and their backward on the CPU. Work is split by token: a token's K rows are summed in registers,
// and its K weight gradients come from the same read that makes the row gradients. A token's arithmetic depends on
// nothing else, so neither the number of threads nor the rest of the batch can show in the result.
//
// A result larger than half a second-level cache is written around the caches (non-temporal): no line is fetched to be
// overwritten, and no core finds the rows that it reads next dirty in another's cache. In a layer the old contents of a
// result have left the caches long ago, and then this wins even with the next read of the result counted (Zen 4,
// H = 2048, K = 8, bfloat16, permute and that read: 14% less time at 64 tokens, 23% at 512; permute alone is 1.7 and
// 2.1 times as fast). Where the result of the call before is still in the third-level cache and is read from there at
// once, it is even at 64 tokens and takes 20% more time at 512. On an Emerald Rapids with 260 MB of it, cold, permute
// takes 0.45 of the time at 1.5 to 8 MB, and with that read 0.7 to 0.9 (1 MB: even). With all of it in second-level
// caches of 2 MB it takes 1.5 times as long at 1.5 and 2 MB, and with that read 3 times; permute therefore looks there
// first, by timing a read, and then writes into the caches. unpermute gains nothing by that, and its backward loses
// until the gradient is read: neither looks.
//
// Streaming, permute goes by token, whose row is read once and stays in the first-level cache while its K copies are
// written side by side: their page walks overlap, as those of the K gradients of a token do (one row after another has
// half the bandwidth). Into the caches it goes by row, whose lines arrive ahead of the stores, until a call moves more
// than they keep.
// Bytes: permute T H + R H, unpermute K T H + T H, backward T H + 2 R H, times the element size, and the maps.
#include <cstring>

#include "common/cache.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

FASTMOE_ROUTE_ISA_BEGIN
namespace {

constexpr int64_t kBytesPerTask = 1 << 18;  // below this a thread costs more than it saves
constexpr int kUnroll = 4;
constexpr int64_t kVecBytes = Vec::kLanes * sizeof(float);
constexpr int64_t kStackRoom = 128;  // terms of two tokens kept on the stack
constexpr int kRowsAtOnce = 8;       // copies of a token written side by side
constexpr int kSlotsAtOnce = 4;      // slots of a token whose gradients are made side by side

int64_t grain(int64_t bytes_per_item) {
  return bytes_per_item >= kBytesPerTask ? 1 : kBytesPerTask / (bytes_per_item > 0 ? bytes_per_item : 1);
}

// Whether a result of so many rows is written around the caches. Non-temporal stores want whole aligned vectors.
bool may_stream(const void* result, int64_t num_rows, int64_t row_bytes) {
  constexpr int64_t kLine = 64;
  return Vec::kStreams && num_rows * row_bytes > cached_result_bytes() && row_bytes % kLine == 0 &&
         reinterpret_cast<uintptr_t>(result) % kLine == 0;
}

void copy_row(char* to, const char* from, int64_t bytes) {
  int64_t done = 0;
  for (; done + kVecBytes <= bytes; done += kVecBytes) {
    Vec::load(reinterpret_cast<const float*>(from + done)).store(reinterpret_cast<float*>(to + done));
  }
  std::memcpy(to + done, from + done, bytes - done);
}

// Copies a row to `count` rows, a few vectors to each in turn: page walks of the rows overlap (up to 50% more bandwidth
// with pages of 4 KB than one row after another), and memcpy of rows of some KB may be microcode (half the bandwidth).
template <bool kStreams>
void copy_to_rows(char* const* to, int count, const char* from, int64_t bytes) {
  constexpr int64_t kStep = kUnroll * kVecBytes;
  int64_t done = 0;
  for (; done + kVecBytes <= bytes;) {
    const int vectors = done + kStep <= bytes ? kUnroll : 1;
    Vec piece[kUnroll];
    for (int u = 0; u < vectors; ++u) piece[u] = Vec::load(reinterpret_cast<const float*>(from + done + u * kVecBytes));
    for (int i = 0; i < count; ++i) {
      for (int u = 0; u < vectors; ++u) {
        float* result = reinterpret_cast<float*>(to[i] + done + u * kVecBytes);
        if (kStreams) {
          piece[u].stream(result);
        } else {
          piece[u].store(result);
        }
      }
    }
    done += vectors * kVecBytes;
  }
  if (done < bytes) {
    for (int i = 0; i < count; ++i) std::memcpy(to[i] + done, from + done, bytes - done);
  }
}

// Zeroes the padding rows among rows [begin, end).
void zero_padding(char* rows, int64_t row_bytes, const int32_t* row_to_slot, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (row_to_slot[row] < 0) std::memset(rows + row * row_bytes, 0, row_bytes);
  }
}

// body(first token, last token, first row, last row): tokens, and an equal share of the rows for their padding.
template <class F>
void over_tokens_and_rows(int64_t num_tokens, int64_t num_rows, int64_t bytes_per_token, const F& body) {
  const int64_t tokens = num_tokens > 0 ? num_tokens : 1;
  const int64_t rows_per_token = num_rows / tokens + 1;
  parallel_for(tokens, grain(bytes_per_token), [&](int64_t begin, int64_t end) {
    const int64_t first_row = begin * rows_per_token, last_row = end * rows_per_token;
    body(begin, end < num_tokens ? end : num_tokens, first_row < num_rows ? first_row : num_rows,
         last_row < num_rows ? last_row : num_rows);
  });
}

// One term of a token's sum.
template <class T>
struct Term {
  const T* row;
  accumulate_t<T> weight;
};

// Fetches a part of the row that comes next, as many columns as are worked on: rows are so short that the hardware
// prefetcher has hardly found its stride when they end (Zen 4, H = 2048: 32% more bandwidth in float32, 30% in
// bfloat16; a Sapphire Rapids 28% more in bfloat16, 6% less in float32).
template <class T>
void fetch_ahead(const T* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < count; c += kLine) __builtin_prefetch(row + c, 0, 2);
}

// The terms of one token.
template <class T>
struct Terms {
  Term<T>* terms;
  int64_t count;
};

// y[c] = sum over terms of weight * row[c], first term first.
template <class T>
void sum_rows(const Terms<T>& now, const Terms<T>& next, T* y, int64_t hidden, bool is_streaming) {
  constexpr int kLanes = Vec::kLanes;
  constexpr int64_t kStep = kUnroll * kLanes;
  int64_t c = 0;
  for (; c + kStep <= hidden; c += kStep) {
    Vec sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = Vec::zero();
    for (int64_t i = 0; i < now.count; ++i) {
      const Vec weight = Vec::all(now.terms[i].weight);
      for (int u = 0; u < kUnroll; ++u) sum[u] = fma(weight, Vec::load(now.terms[i].row + c + u * kLanes), sum[u]);
      if (i < next.count) fetch_ahead(next.terms[i].row + c, kStep);
    }
    for (int u = 0; u < kUnroll; ++u) {
      if (is_streaming) {
        sum[u].stream(y + c + u * kLanes);
      } else {
        sum[u].store(y + c + u * kLanes);
      }
    }
  }
  for (; c < hidden; c += kLanes) {
    const int n = static_cast<int>(hidden - c < kLanes ? hidden - c : kLanes);
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < now.count; ++i) {
      sum = fma(Vec::all(now.terms[i].weight), Vec::load(now.terms[i].row + c, n), sum);
    }
    sum.store(y + c, n);
  }
}

inline void sum_rows(const Terms<double>& now, const Terms<double>&, double* y, int64_t hidden, bool) {
  for (int64_t c = 0; c < hidden; ++c) {
    double sum = 0.0;
    for (int64_t i = 0; i < now.count; ++i) sum += now.terms[i].weight * now.terms[i].row[c];
    y[c] = sum;
  }
}

// Weights are few beside the rows: their dtype is asked for one by one, not made a kernel of its own.
template <class A>
A weight_of(DType dtype, const void* weights, int64_t slot) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<A>(static_cast<const float*>(weights)[slot]);
    case DType::kBFloat16: return static_cast<A>(to_float(static_cast<const BFloat16*>(weights)[slot]));
    case DType::kFloat16: return static_cast<A>(to_float(static_cast<const Float16*>(weights)[slot]));
    default: return static_cast<A>(static_cast<const double*>(weights)[slot]);
  }
}

template <class A>
void set_weight(DType dtype, void* weights, int64_t slot, A value) {
  dispatch_float(dtype, [&](auto sample) {
    using W = decltype(sample);
    static_cast<W*>(weights)[slot] = from_float<W>(value);
  });
}

// The kept slots of one token, in slot order.
template <class T>
Terms<T> terms_of(const UnpermuteArgs& a, int64_t token, Term<T>* terms) {
  using A = accumulate_t<T>;
  const T* rows = static_cast<const T*>(a.rows);
  int64_t count = 0;
  for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
    const int64_t row = a.slot_to_row[slot];
    if (row < 0) continue;
    const A weight = a.weights != nullptr ? weight_of<A>(a.weights_dtype, a.weights, slot) : A{1};
    terms[count++] = {rows + row * a.rows_stride, weight};
  }
  return {terms, count};
}

// Sums tokens [begin, end); `room` holds the terms of two tokens.
template <class T>
void sum_tokens(const UnpermuteArgs& a, int64_t begin, int64_t end, Term<T>* room, bool is_streaming) {
  if (begin >= end) return;
  T* y = static_cast<T*>(a.y);
  Term<T>* other = room + a.top_k;
  Terms<T> now = terms_of(a, begin, room);
  for (int64_t token = begin; token < end; ++token) {
    Terms<T> next{other, 0};
    if (token + 1 < end) next = terms_of(a, token + 1, other);
    sum_rows(now, next, y + token * a.hidden, a.hidden, is_streaming);
    other = now.terms;
    now = next;
  }
  Vec::stream_fence();
}

template <class T>
void unpermute_as(const UnpermuteArgs& a) {
  const bool is_streaming = may_stream(a.y, a.num_tokens, a.hidden * sizeof(T));
  if (2 * a.top_k <= kStackRoom) {
    parallel_for(a.num_tokens, grain(a.top_k * a.hidden * sizeof(T)), [&](int64_t begin, int64_t end) {
      Term<T> room[kStackRoom];
      sum_tokens(a, begin, end, room, is_streaming);
    });
    return;
  }
  const int64_t workers = num_threads();
  Term<T>* room = static_cast<Term<T>*>(scratch(Scratch::kReduction, 2 * workers * a.top_k * sizeof(Term<T>)));
  parallel_workers(workers, [&](int worker) {
    sum_tokens(a, a.num_tokens * worker / workers, a.num_tokens * (worker + 1) / workers, room + 2 * worker * a.top_k,
               is_streaming);
  });
}

// Kept slots of one token, as many as one pass over its gradient serves.
template <class T>
struct SlotGroup {
  int count = 0;
  const T* grad;                // [H], of the token
  const T* rows[kSlotsAtOnce];  // or null: the gradient of the weights is not wanted
  T* grad_rows[kSlotsAtOnce];   // or null: the gradient of the rows is not wanted
  accumulate_t<T> weights[kSlotsAtOnce];
  int64_t slots[kSlotsAtOnce];
};

// The next group among slots [slot, end); `slot` moves behind it. A slot without a row gets its weight gradient, zero.
template <class T>
SlotGroup<T> next_group(const UnpermuteBackwardArgs& a, int64_t& slot, int64_t end) {
  using A = accumulate_t<T>;
  SlotGroup<T> group;
  for (; slot < end && group.count < kSlotsAtOnce; ++slot) {
    if (group.count > 0 && slot % a.top_k == 0) break;
    const int64_t row = a.slot_to_row[slot];
    if (row < 0) {
      if (a.grad_weights != nullptr) set_weight(a.weights_dtype, a.grad_weights, slot, A{0});
      continue;
    }
    const int i = group.count++;
    group.grad = static_cast<const T*>(a.grad_y) + slot / a.top_k * a.grad_y_stride;
    group.rows[i] = a.grad_weights != nullptr ? static_cast<const T*>(a.rows) + row * a.rows_stride : nullptr;
    group.grad_rows[i] = a.grad_rows != nullptr ? static_cast<T*>(a.grad_rows) + row * a.hidden : nullptr;
    group.weights[i] = a.weights != nullptr ? weight_of<A>(a.weights_dtype, a.weights, slot) : A{1};
    group.slots[i] = slot;
  }
  return group;
}

// For slots first .. first + kCount - 1 of a group: grad_row[c] = weight * grad[c], product = <grad, row>. A product
// runs over kUnroll * lanes partial sums and one tree, whatever else is asked for. The rows of `next` are fetched.
template <int kCount, class T>
void backward_slots(const SlotGroup<T>& now, const SlotGroup<T>& next, int first, float* products, int64_t hidden,
                    bool is_streaming) {
  constexpr int kLanes = Vec::kLanes;
  const bool has_rows = now.rows[first] != nullptr, has_results = now.grad_rows[first] != nullptr;
  Vec sum[kCount][kUnroll];
  for (int i = 0; i < kCount; ++i) {
    for (int u = 0; u < kUnroll; ++u) sum[i][u] = Vec::zero();
  }
  int64_t c = 0;
  for (; c + kUnroll * kLanes <= hidden; c += kUnroll * kLanes) {
    Vec g[kUnroll];
    for (int u = 0; u < kUnroll; ++u) g[u] = Vec::load(now.grad + c + u * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      if (has_rows) {
        if (first + i < next.count) fetch_ahead(next.rows[first + i] + c, kUnroll * kLanes);
        const T* row = now.rows[first + i] + c;
        for (int u = 0; u < kUnroll; ++u) sum[i][u] = fma(g[u], Vec::load(row + u * kLanes), sum[i][u]);
      }
      if (!has_results) continue;
      const Vec scale = Vec::all(now.weights[first + i]);
      T* result = now.grad_rows[first + i] + c;
      for (int u = 0; u < kUnroll; ++u) {
        if (is_streaming) {
          (g[u] * scale).stream(result + u * kLanes);
        } else {
          (g[u] * scale).store(result + u * kLanes);
        }
      }
    }
  }
  for (; c < hidden; c += kLanes) {
    const int n = static_cast<int>(hidden - c < kLanes ? hidden - c : kLanes);
    const Vec g = Vec::load(now.grad + c, n);
    for (int i = 0; i < kCount; ++i) {
      if (has_rows) sum[i][0] = fma(g, Vec::load(now.rows[first + i] + c, n), sum[i][0]);
      if (has_results) (g * Vec::all(now.weights[first + i])).store(now.grad_rows[first + i] + c, n);
    }
  }
  for (int i = 0; i < kCount; ++i) products[i] = reduce_add((sum[i][0] + sum[i][2]) + (sum[i][1] + sum[i][3]));
}

template <class T>
void backward_group(const SlotGroup<T>& now, const SlotGroup<T>& next, float* products, int64_t hidden,
                    bool is_streaming) {
  if (now.count == kSlotsAtOnce) return backward_slots<kSlotsAtOnce>(now, next, 0, products, hidden, is_streaming);
  for (int i = 0; i < now.count; ++i) backward_slots<1>(now, next, i, products + i, hidden, is_streaming);
}

inline void backward_group(const SlotGroup<double>& now, const SlotGroup<double>&, double* products, int64_t hidden,
                           bool) {
  for (int i = 0; i < now.count; ++i) {
    products[i] = 0.0;
    for (int64_t c = 0; c < hidden; ++c) {
      if (now.rows[i] != nullptr) products[i] += now.grad[c] * now.rows[i][c];
      if (now.grad_rows[i] != nullptr) now.grad_rows[i][c] = now.weights[i] * now.grad[c];
    }
  }
}

template <class T>
void unpermute_backward_as(const UnpermuteBackwardArgs& a) {
  const int64_t row_bytes = a.hidden * sizeof(T);
  const bool is_streaming = a.grad_rows != nullptr && may_stream(a.grad_rows, a.num_rows, row_bytes);
  over_tokens_and_rows(a.num_tokens, a.num_rows, 2 * a.top_k * row_bytes,
                       [&](int64_t begin, int64_t end, int64_t first_row, int64_t last_row) {
                         int64_t slot = begin * a.top_k;
                         SlotGroup<T> now = next_group<T>(a, slot, end * a.top_k);
                         while (now.count > 0) {
                           const SlotGroup<T> next = next_group<T>(a, slot, end * a.top_k);
                           accumulate_t<T> products[kSlotsAtOnce];
                           backward_group(now, next, products, a.hidden, is_streaming);
                           for (int i = 0; i < now.count && a.grad_weights != nullptr; ++i) {
                             set_weight(a.weights_dtype, a.grad_weights, now.slots[i], products[i]);
                           }
                           now = next;
                         }
                         if (a.grad_rows != nullptr) {
                           zero_padding(static_cast<char*>(a.grad_rows), row_bytes, a.row_to_slot, first_row, last_row);
                         }
                         Vec::stream_fence();
                       });
}

void permute_by_row(const PermuteArgs& a, int64_t row_bytes) {
  const char* x = static_cast<const char*>(a.x);
  char* rows = static_cast<char*>(a.rows);
  const int64_t x_stride = a.x_stride * element_size(a.dtype);
  const uint32_t top_k = static_cast<uint32_t>(a.top_k);
  parallel_for(a.num_rows, grain(2 * row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      char* to = rows + row * row_bytes;
      const int32_t slot = a.row_to_slot[row];
      if (slot < 0) {
        std::memset(to, 0, row_bytes);
      } else {
        copy_row(to, x + static_cast<uint32_t>(slot) / top_k * x_stride, row_bytes);
      }
    }
  });
}

template <bool kStreams>
void permute_by_token(const PermuteArgs& a, int64_t row_bytes) {
  const char* x = static_cast<const char*>(a.x);
  char* rows = static_cast<char*>(a.rows);
  const int64_t x_stride = a.x_stride * element_size(a.dtype);
  over_tokens_and_rows(a.num_tokens, a.num_rows, (a.top_k + 1) * row_bytes,
                       [&](int64_t begin, int64_t end, int64_t first_row, int64_t last_row) {
                         for (int64_t token = begin; token < end; ++token) {
                           char* to[kRowsAtOnce];
                           int count = 0;
                           for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
                             const int64_t row = a.slot_to_row[slot];
                             if (row < 0) continue;
                             to[count++] = rows + row * row_bytes;
                             if (count < kRowsAtOnce) continue;
                             copy_to_rows<kStreams>(to, count, x + token * x_stride, row_bytes);
                             count = 0;
                           }
                           if (count > 0) copy_to_rows<kStreams>(to, count, x + token * x_stride, row_bytes);
                         }
                         zero_padding(rows, row_bytes, a.row_to_slot, first_row, last_row);
                         Vec::stream_fence();
                       });
}

}  // namespace

void permute(const PermuteArgs& a) {
  const int64_t row_bytes = a.hidden * element_size(a.dtype);
  const int64_t share = a.num_rows * row_bytes / num_threads();  // this thread writes the first, going by row
  if (may_stream(a.rows, a.num_rows, row_bytes) && !lie_in_level2(a.rows, share)) {
    permute_by_token<true>(a, row_bytes);
  } else if ((a.num_tokens + a.num_rows) * row_bytes <= cache_bytes_kept()) {
    permute_by_row(a, row_bytes);
  } else {
    permute_by_token<false>(a, row_bytes);
  }
}

void unpermute(const UnpermuteArgs& args) {
  dispatch_element(args.dtype, [&](auto element) { unpermute_as<decltype(element)>(args); });
}

void unpermute_backward(const UnpermuteBackwardArgs& args) {
  dispatch_element(args.dtype, [&](auto element) { unpermute_backward_as<decltype(element)>(args); });
}

FASTMOE_ROUTE_ISA_END
