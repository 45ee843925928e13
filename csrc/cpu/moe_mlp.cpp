// The expert layer, forward, in three passes over threads (gemm/driver.h shares each product among them):
//   1. up: token rows are gathered by pointer and multiplied with the gate and up columns of their expert into a small
//      tile; bias, preactivation (training) and activation are applied to the tile; activated rows [R, I] are stored.
//   2. down: activated rows times down columns into rows [R, H] of float32.
//   3. combine: every token sums its rows, weighted, j ascending, and rounds once.
// Every weight is read once per block of rows, so a few tokens run at the speed of memory. Scratch holds the activated
// rows and the down rows; both are reused by later calls.
#include "cpu/expert_rows.h"

FASTMOE_ROUTE_ISA_BEGIN

namespace {

template <class T>
struct Forward {
  using A = accumulate_t<T>;
  const MoeMlpArgs& args;
  const MoeMlpShape& shape;
  const ExpertRows plan;
  const int64_t inter;
  const int64_t width;    // up columns per activation column
  const int64_t up_size;  // U
  const bool pairs;       // gate and up columns alternate
  const A* weights;
  T* activated;  // [R, I]
  A* rows;       // [R, H]

  explicit Forward(const MoeMlpArgs& a)
      : args(a), shape(a.shape), plan(a.shape, a.offsets, a.row_to_slot), inter(a.shape.intermediate),
        width(is_gated(a.shape.activation) ? 2 : 1), up_size(width * inter), pairs(width == 2 && a.shape.interleaved),
        weights(reinterpret_cast<const A*>(a.weights)) {
    const size_t count = static_cast<size_t>(shape.num_rows);
    activated = static_cast<T*>(scratch(Scratch::kIntermediateRows, count * inter * sizeof(T)));
    rows = static_cast<A*>(scratch(Scratch::kHiddenRows, count * shape.hidden * sizeof(A)));
  }

  void clear_unused_preactivation() const {
    for (int64_t r = 0; r < shape.num_rows; ++r)
      if (r >= args.offsets[shape.num_experts] || !plan.is_used(r))
        std::memset(static_cast<T*>(args.preactivation) + r * up_size, 0, static_cast<size_t>(up_size) * sizeof(T));
  }

  // `count` products that belong to columns [column, column + count) of the up projection.
  void keep(A* products, int64_t expert, int64_t row, int64_t column, int64_t count) const {
    if (args.bias_up != nullptr)
      add_bias(products, static_cast<const T*>(args.bias_up) + expert * up_size + column, count);
    if (args.preactivation != nullptr)
      convert(products, static_cast<T*>(args.preactivation) + row * up_size + column, count);
  }

  void up() const {
    // Pairs are one product of U columns; halves are I columns with partners; the tile is [gate | up] of each row.
    GroupedProduct product = plan.product(args.w_up, shape.hidden, pairs ? up_size : inter);
    if (width == 2 && !pairs) product.partner = inter;
    const auto gather = [&](int64_t begin, int64_t end, const void** pointers, A* scales) {
      for (int64_t r = begin; r < end; ++r) {
        pointers[r - begin] = plan.template gathered<T>(args.x, args.x_stride, r);
        if (shape.weights_on_input) scales[r - begin] = plan.is_used(r) ? weights[args.row_to_slot[r]] : A(0);
      }
    };
    grouped_product<A>(product, shape.weights_on_input, gather, [&](const FinishedTile<A>& done) {
      const int64_t columns = done.col_end - done.col_begin;
      for (int64_t r = done.row_begin; r < done.row_end; ++r) {
        if (!plan.is_used(r)) continue;
        A* gate = done.tile + (r - done.row_begin) * done.stride;
        keep(gate, done.expert, r, done.col_begin, columns);
        if (pairs) {
          activate_pairs(gate, columns / 2, activated + r * inter + done.col_begin / 2);
        } else {
          if (width == 2) keep(gate + columns, done.expert, r, inter + done.col_begin, columns);
          activate(shape.activation, gate, gate + columns, columns, activated + r * inter + done.col_begin);
        }
      }
    });
  }

  void activate_pairs(const A* products, int64_t n, T* result) const {
    constexpr int64_t kPart = 256;
    A gate[kPart], up[kPart];
    for (int64_t i = 0; i < n; i += kPart) {
      const int64_t part = n - i < kPart ? n - i : kPart;
      split_pairs(products + 2 * i, gate, up, part);
      activate(shape.activation, gate, up, part, result + i);
    }
  }

  void down() const {
    GroupedProduct product = plan.product(args.w_down, inter, shape.hidden);
    product.direct = rows;
    product.direct_stride = shape.hidden;
    const auto contiguous_rows = [&](int64_t begin, int64_t end, const void** pointers, A*) {
      for (int64_t r = begin; r < end; ++r) pointers[r - begin] = activated + r * inter;
    };
    grouped_product<A>(product, false, contiguous_rows, [&](const FinishedTile<A>& done) {
      if (args.bias_down == nullptr) return;
      const T* bias = static_cast<const T*>(args.bias_down) + done.expert * shape.hidden + done.col_begin;
      for (int64_t r = 0; r < done.row_end - done.row_begin; ++r)
        add_bias(done.tile + r * done.stride, bias, done.col_end - done.col_begin);
    });
  }

  void run() const {
    if (args.preactivation != nullptr) clear_unused_preactivation();
    up();
    down();
    combine_rows<T>(shape, rows, args.slot_to_row, shape.weights_on_input ? nullptr : weights, static_cast<T*>(args.y));
  }
};

}  // namespace

void moe_mlp(const MoeMlpArgs& args) {
  dispatch_element(args.shape.dtype, [&](auto type) { Forward<decltype(type)>(args).run(); });
}

FASTMOE_ROUTE_ISA_END
