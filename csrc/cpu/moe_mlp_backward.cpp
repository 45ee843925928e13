// The expert layer, backward, from x, the up-projection's output and the integer maps; no expert output was kept.
//
// With g = grad_y of a row's token, w its weight, u = g w_down^T and a = act(pre), recomputed:
//   1. per tile of u: dS = <u, a> (+ <g, bias_down>), d_pre = w u act'(pre), a' = w a; d_pre [R, U] and a' [R, I] kept;
//   2. grad_x = sum over j of d_pre w_up^T, rows [R, H] in float32, combined like the forward;
//   3. grad_w_down = a'^T g, grad_w_up = x^T d_pre, over the rows of each expert, and column sums for the biases.
// weights_on input: w scales x instead, so a' = a, d_pre = u act'(pre), x' = round(w x) stands for x in grad_w_up, and
// with dx' = d_pre w_up^T: grad_x = sum of w dx', dS = <dx', x>.
// dS is summed per kUnit columns and then over those, so it depends on no task or thread.
#include "cpu/expert_rows.h"
#include "cpu/gemm/gradients.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

constexpr int64_t kUnit = 64;  // columns of one partial sum of dS; tiles start at multiples of it

template <class T>
struct Backward {
  using A = accumulate_t<T>;
  const MoeMlpBackwardArgs& args;
  const MoeMlpShape& shape;
  const ExpertRows plan;
  const int64_t inter;
  const int64_t width;    // up columns per activation column
  const int64_t up_size;  // U
  const int64_t units;    // partial sums of dS per row
  const bool pairs;       // gate and up columns alternate
  const A* weights;
  T* grad_pre;  // [R, U]
  T* scaled;    // [R, I]: w a; with weights_on input, followed by [R, H]: round(w x)
  A* rows;      // [R, H]
  A* partial;   // [R, units]

  explicit Backward(const MoeMlpBackwardArgs& a)
      : args(a), shape(a.shape), plan(a.shape, a.offsets, a.row_to_slot), inter(a.shape.intermediate),
        width(is_gated(a.shape.activation) ? 2 : 1), up_size(width * inter), units((inter + kUnit - 1) / kUnit),
        pairs(width == 2 && a.shape.interleaved), weights(reinterpret_cast<const A*>(a.weights)) {
    const size_t count = static_cast<size_t>(shape.num_rows);
    const int64_t scaled_size = inter + (shape.weights_on_input ? shape.hidden : 0);
    grad_pre = static_cast<T*>(scratch(Scratch::kIntermediateRows, count * up_size * sizeof(T)));
    scaled = static_cast<T*>(scratch(Scratch::kScaledRows, count * scaled_size * sizeof(T)));
    partial = static_cast<A*>(scratch(Scratch::kReduction, count * units * sizeof(A)));
    rows = wants_rows() ? static_cast<A*>(scratch(Scratch::kHiddenRows, count * shape.hidden * sizeof(A))) : nullptr;
  }

  bool wants_rows() const { return args.grad_x != nullptr || (shape.weights_on_input && args.grad_weights != nullptr); }
  const T* grad_row(int64_t row) const { return plan.template gathered<T>(args.grad_y, shape.hidden, row); }
  const T* x_row(int64_t row) const { return plan.template gathered<T>(args.x, args.x_stride, row); }
  T* scaled_x_row(int64_t row) const { return scaled + shape.num_rows * inter + row * shape.hidden; }

  // n <= kUnit columns of one row of u, from `column` on.
  void finish_unit(const A* u, int64_t row, int64_t column, int64_t n) const {
    const T* pre = static_cast<const T*>(args.preactivation) + row * up_size;
    T* grad = grad_pre + row * up_size;
    const A weight = shape.weights_on_input ? A(1) : weights[args.row_to_slot[row]];
    A gate[kUnit], up[kUnit], d_gate[kUnit], d_up[kUnit], kept[kUnit], pair[2 * kUnit];
    if (pairs) {
      widen(pre + 2 * column, pair, 2 * n);
      split_pairs(pair, gate, up, n);
    } else {
      widen(pre + column, gate, n);
      if (width == 2) widen(pre + inter + column, up, n);
    }
    partial[row * units + column / kUnit] =
        activate_backward(shape.activation, gate, up, u, weight, n, d_gate, d_up, kept);
    convert(kept, scaled + row * inter + column, n);
    if (pairs) {
      join_pairs(d_gate, d_up, pair, n);
      convert(pair, grad + 2 * column, 2 * n);
    } else {
      convert(d_gate, grad + column, n);
      if (width == 2) convert(d_up, grad + inter + column, n);
    }
  }

  static void widen(const T* from, A* to, int64_t n) {
    using V = vector_t<A>;
    for_lanes<V>(n, [&](int64_t i, int lanes) { V::load(from + i, lanes).store(to + i, lanes); });
  }

  void activation_gradients() const {
    const GroupedProduct product = plan.product(transposed(args.w_down), shape.hidden, inter);
    const auto gather = [&](int64_t begin, int64_t end, const void** pointers, A*) {
      for (int64_t r = begin; r < end; ++r) pointers[r - begin] = grad_row(r);
    };
    grouped_product<A>(product, false, gather, [&](const FinishedTile<A>& done) {
      for (int64_t r = done.row_begin; r < done.row_end; ++r) {
        if (!plan.is_used(r)) continue;
        const A* u = done.tile + (r - done.row_begin) * done.stride;
        for (int64_t c = done.col_begin; c < done.col_end; c += kUnit)
          finish_unit(u + c - done.col_begin, r, c, done.col_end - c < kUnit ? done.col_end - c : kUnit);
      }
    });
  }

  void input_gradient_rows() const {
    GroupedProduct product = plan.product(transposed(args.w_up), up_size, shape.hidden);
    product.direct = rows;
    product.direct_stride = shape.hidden;
    const auto contiguous_rows = [&](int64_t begin, int64_t end, const void** pointers, A*) {
      for (int64_t r = begin; r < end; ++r) pointers[r - begin] = grad_pre + r * up_size;
    };
    grouped_product<A>(product, false, contiguous_rows, [](const FinishedTile<A>&) {});
  }

  void weight_gradients_of_routing() const {
    A* result = reinterpret_cast<A*>(args.grad_weights);
    const T* bias = static_cast<const T*>(args.bias_down);
    parallel_for(shape.num_tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin * shape.top_k; slot < end * shape.top_k; ++slot) {
        const int64_t row = args.slot_to_row[slot];
        if (row < 0) {
          result[slot] = 0;
        } else if (shape.weights_on_input) {
          result[slot] = dot<A>(rows + row * shape.hidden, x_row(row), shape.hidden);
        } else {
          A sum = 0;
          for (int64_t i = 0; i < units; ++i) sum += partial[row * units + i];
          if (bias != nullptr) sum += dot<A>(grad_row(row), bias + expert_of(row) * shape.hidden, shape.hidden);
          result[slot] = sum;
        }
      }
    });
  }

  int64_t expert_of(int64_t row) const {
    int64_t low = 0, high = shape.num_experts;  // the last expert that starts at or before row
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (args.offsets[middle] <= row ? low : high) = middle;
    }
    return low;
  }

  void scale_x() const {
    using V = vector_t<A>;
    parallel_for(args.offsets[shape.num_experts], 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (!plan.is_used(r)) continue;
        const V weight = V::all(weights[args.row_to_slot[r]]);
        const T* from = x_row(r);
        T* to = scaled_x_row(r);
        for_lanes<V>(shape.hidden,
                     [&](int64_t i, int lanes) { (weight * V::load(from + i, lanes)).store(to + i, lanes); });
      }
    });
  }

  // Pointers to the used rows, expert by expert, in the order of the sums over rows.
  struct Lists {
    int32_t* starts;  // [E + 1]
    const void** grads;
    const void** inputs;  // x, or round(w x)
    const void** activated;
    const void** grads_pre;
    A* factors;  // what the bias of the down projection was weighted with
  };

  Lists lists() const {
    const size_t count = static_cast<size_t>(shape.num_rows), line = (count * sizeof(void*) + 63) / 64 * 64;
    const size_t starts_bytes = (static_cast<size_t>(shape.num_experts + 1) * sizeof(int32_t) + 63) / 64 * 64;
    char* memory = static_cast<char*>(scratch(Scratch::kRowLists, starts_bytes + 5 * line));
    const auto pointers = [&](int i) { return reinterpret_cast<const void**>(memory + starts_bytes + i * line); };
    Lists result{reinterpret_cast<int32_t*>(memory),
                 pointers(0),
                 pointers(1),
                 pointers(2),
                 pointers(3),
                 reinterpret_cast<A*>(memory + starts_bytes + 4 * line)};
    int32_t used = 0;
    for (int64_t e = 0; e < shape.num_experts; ++e) {
      result.starts[e] = used;
      for (int64_t r = args.offsets[e]; r < plan.ends[e]; ++r) {
        if (!plan.is_used(r)) continue;
        result.grads[used] = grad_row(r);
        result.inputs[used] = shape.weights_on_input ? scaled_x_row(r) : x_row(r);
        result.activated[used] = scaled + r * inter;
        result.grads_pre[used] = grad_pre + r * up_size;
        result.factors[used++] = shape.weights_on_input ? A(1) : weights[args.row_to_slot[r]];
      }
    }
    result.starts[shape.num_experts] = used;
    return result;
  }

  void parameter_gradients() const {
    const int64_t hidden = shape.hidden, experts = shape.num_experts;
    const DType dtype = shape.dtype;
    const Lists rows_of = lists();
    const int32_t* starts = rows_of.starts;
    if (args.grad_w_down != nullptr)
      weight_gradient({dtype, experts, starts, rows_of.activated, rows_of.grads, inter, hidden, args.grad_w_down,
                       args.grad_w_down_transposed});
    if (args.grad_w_up != nullptr) {
      if (shape.weights_on_input) scale_x();
      weight_gradient({dtype, experts, starts, rows_of.inputs, rows_of.grads_pre, hidden, up_size, args.grad_w_up,
                       args.grad_w_up_transposed});
    }
    if (args.grad_bias_up != nullptr)
      bias_gradient({dtype, experts, starts, rows_of.grads_pre, nullptr, up_size, args.grad_bias_up});
    if (args.grad_bias_down != nullptr)
      bias_gradient({dtype, experts, starts, rows_of.grads, rows_of.factors, hidden, args.grad_bias_down});
  }

  void run() const {
    activation_gradients();
    if (wants_rows()) input_gradient_rows();
    if (args.grad_x != nullptr)
      combine_rows<T>(shape, rows, args.slot_to_row, shape.weights_on_input ? weights : nullptr,
                      static_cast<T*>(args.grad_x));
    if (args.grad_weights != nullptr) weight_gradients_of_routing();
    parameter_gradients();
  }
};

}  // namespace

void moe_mlp_backward(const MoeMlpBackwardArgs& args) {
  dispatch_element(args.shape.dtype, [&](auto type) { Backward<decltype(type)>(args).run(); });
}

FASTMOE_ROUTE_ISA_END
