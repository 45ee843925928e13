#include "ops/gate.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "common/launch.h"

namespace fastmoe_route {
namespace {

constexpr int64_t kMaxExperts = 8192;

// A [C] or [T, C] argument as a strided matrix over all tokens.
template <class T>
Strided<T> per_column(const char* name, const OptionalTensor& tensor, int64_t num_tokens, int64_t num_columns) {
  if (!tensor.has_value()) return {};
  const bool is_row = tensor->dim() == 1;
  check(is_row || tensor->dim() == 2, "gate: ", name, " must have shape [", num_columns, "] or [", num_tokens, ", ",
        num_columns, "], got ", shape_of(*tensor));
  check(tensor->size(is_row ? 0 : 1) == num_columns && (is_row || tensor->size(0) == num_tokens), "gate: ", name,
        " must have shape [", num_columns, "] or [", num_tokens, ", ", num_columns, "], got ", shape_of(*tensor));
  return {static_cast<const T*>(tensor->const_data_ptr()), is_row ? 0 : tensor->stride(0),
          tensor->stride(is_row ? 0 : 1)};
}

template <class T>
Strided<T> per_token(const char* name, const OptionalTensor& tensor, int64_t num_tokens, ScalarType dtype) {
  if (!tensor.has_value()) return {};
  check_dtype("gate", name, *tensor, dtype);
  check(tensor->dim() == 1 && tensor->size(0) == num_tokens, "gate: ", name, " must have shape [", num_tokens,
        "], got ", shape_of(*tensor));
  return {static_cast<const T*>(tensor->const_data_ptr()), tensor->stride(0), 1};
}

template <class Int>
void check_range(const char* name, Int value, Int low, Int high) {
  check(value >= low && value <= high, "gate: ", name, " must be in [", low, ", ", high, "], got ", value);
}

GateShape checked_shape(const Tensor& logits, int64_t top_k, int64_t score, bool softmax_over_group, int64_t num_groups,
                        int64_t num_null, bool normalize, double scale) {
  check_dim("gate", "logits", logits, 2);
  check_range<int64_t>("num_null", num_null, 0, std::min(logits.size(1) - 1, kMaxExperts));
  const int64_t num_experts = logits.size(1) - num_null;
  check(num_experts <= kMaxExperts, "gate: logits must have at most ", kMaxExperts, " experts, got shape ",
        shape_of(logits));
  check_range<int64_t>("top_k", top_k, 1, num_experts);
  check_range<int64_t>("score", score, 0, 4);
  check(num_groups >= 1 && num_experts % num_groups == 0, "gate: num_groups must divide the number of experts ",
        num_experts, ", got ", num_groups);
  check(num_groups == 1 || num_null == 0, "gate: num_groups must be 1 with null columns, got ", num_groups);
  check(logits.size(0) * top_k < kInt32Limit, "gate: logits must have fewer than 2^31 / top_k rows, got ",
        shape_of(logits));
  // One group is all columns, whose logits are compared.
  const bool has_parts = softmax_over_group && num_groups > 1;
  return {logits.size(0), num_experts, num_null,  top_k, static_cast<Score>(score),
          has_parts,      num_groups,  normalize, scale};
}

Strided<void> strided(const Tensor& matrix) { return {matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1)}; }

// The options of gate as they travel through the dispatcher.
struct Options {
  int64_t score;
  bool normalize;
  double scale;
  const OptionalTensor& bias;
  int64_t num_groups, topk_groups, group_score;
  const OptionalTensor &mask, &noise;
  bool softmax_over_group;
  int64_t max_per_group;
  std::optional<double> top_p;
  const OptionalTensor& top_p_per_token;
  std::optional<double> threshold;
  const OptionalTensor& threshold_per_token;
  int64_t min_k;
  const OptionalTensor& k_per_token;
  int64_t num_null;
};

void check_options(const Options& options, int64_t top_k, ScalarType arithmetic) {
  check_range<int64_t>("topk_groups", options.topk_groups, 0, options.num_groups);
  check_range<int64_t>("group_score", options.group_score, 0, 1);
  check(options.max_per_group >= 0, "gate: max_per_group must be at least 0, got ", options.max_per_group);
  check(options.max_per_group == 0 || options.num_null == 0, "gate: max_per_group must be 0 with null columns, got ",
        options.max_per_group);
  check_range<int64_t>("min_k", options.min_k, 0, top_k);
  if (options.bias) check_dtype("gate", "bias", *options.bias, arithmetic);
  if (options.mask) check_dtype("gate", "mask", *options.mask, ScalarType::Bool);
  if (options.noise) check_dtype("gate", "noise", *options.noise, arithmetic);
}

// Everything but the outputs, checked.
GateArgs checked_args(const Tensor& logits, int64_t top_k, const Options& options) {
  constexpr double kOff = std::numeric_limits<double>::infinity();
  GateArgs args{};
  args.shape = checked_shape(logits, top_k, options.score, options.softmax_over_group, options.num_groups,
                             options.num_null, options.normalize, options.scale);
  args.dtype = float_dtype("gate", "logits", logits);
  check_options(options, top_k, arithmetic_type(args.dtype));
  const int64_t num_tokens = args.shape.num_tokens;
  const int64_t num_columns = args.shape.num_experts + options.num_null;
  args.logits = strided(logits);
  args.bias = per_column<void>("bias", options.bias, num_tokens, num_columns);
  args.mask = per_column<bool>("mask", options.mask, num_tokens, num_columns);
  args.noise = per_column<void>("noise", options.noise, num_tokens, num_columns);
  args.topk_groups = options.topk_groups > 0 ? options.topk_groups : options.num_groups;
  args.group_score = static_cast<GroupScore>(options.group_score);
  args.max_per_group = options.max_per_group > 0 ? options.max_per_group : top_k;
  args.top_p = options.top_p.value_or(kOff);
  args.top_p_per_token = per_token<float>("top_p", options.top_p_per_token, num_tokens, ScalarType::Float);
  args.threshold = options.threshold.value_or(-kOff);
  args.threshold_per_token = per_token<float>("threshold", options.threshold_per_token, num_tokens, ScalarType::Float);
  args.min_k = options.min_k;
  args.k_per_token = per_token<int32_t>("k_per_token", options.k_per_token, num_tokens, ScalarType::Int);
  check_devices("gate", logits, options.bias, options.mask, options.noise, options.top_p_per_token,
                options.threshold_per_token, options.k_per_token);
  return args;
}

using Choice = std::tuple<Tensor, Tensor, Tensor>;

// Allocates weights, experts and demand, and runs the kernel.
Choice choose(const Tensor& logits, GateArgs& args) {
  const ScalarType arithmetic = arithmetic_type(args.dtype);
  const int64_t num_tokens = args.shape.num_tokens, top_k = args.shape.top_k;
  Tensor weights = empty(logits, {num_tokens, top_k}, arithmetic);
  Tensor experts = empty(logits, {num_tokens, top_k}, ScalarType::Int);
  Tensor demand = empty(logits, {args.shape.num_experts}, ScalarType::Int);
  args.weights = weights.mutable_data_ptr();
  args.experts = static_cast<int32_t*>(experts.mutable_data_ptr());
  args.demand = static_cast<int32_t*>(demand.mutable_data_ptr());
  launch("gate", &kernels::gate, args, logits);
  return {std::move(weights), std::move(experts), std::move(demand)};
}

using GateResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operators. `gate` has two flags of its own after `scale`; the arguments behind it are the fields of Options in
// their order.
template <class... Fields>
struct Operators {
  static GateArgs read(const Tensor& logits, int64_t top_k, int64_t score, bool normalize, double scale,
                       Fields... fields) {
    return checked_args(logits, top_k, Options{score, normalize, scale, fields...});
  }

  static Choice gate_forward(const Tensor& logits, int64_t top_k, int64_t score, bool normalize, double scale,
                             Fields... fields) {
    GateArgs args = read(logits, top_k, score, normalize, scale, fields...);
    return choose(logits, args);
  }

  static GateResults gate(const Tensor& logits, int64_t top_k, int64_t score, bool normalize, double scale, bool stats,
                          bool keep_scores, Fields... fields) {
    GateArgs args = read(logits, top_k, score, normalize, scale, fields...);
    const ScalarType arithmetic = arithmetic_type(args.dtype);
    const int64_t num_tokens = args.shape.num_tokens, num_experts = args.shape.num_experts;
    Tensor score_sum = empty(logits, {stats ? num_experts : 0}, arithmetic);
    Tensor logsumexp = empty(logits, {stats ? num_tokens : 0}, arithmetic);
    Tensor scores = empty(logits, {keep_scores ? num_tokens : 0, num_experts}, arithmetic);
    args.score_sum = stats ? score_sum.mutable_data_ptr() : nullptr;
    args.logsumexp = stats ? logsumexp.mutable_data_ptr() : nullptr;
    args.scores = keep_scores ? scores.mutable_data_ptr() : nullptr;
    auto [weights, experts, demand] = choose(logits, args);
    return {std::move(weights), std::move(score_sum), std::move(logsumexp),
            std::move(scores),  std::move(experts),   std::move(demand)};
  }
};
using Gate = Operators<const OptionalTensor&, int64_t, int64_t, int64_t, const OptionalTensor&, const OptionalTensor&,
                       bool, int64_t, std::optional<double>, const OptionalTensor&, std::optional<double>,
                       const OptionalTensor&, int64_t, const OptionalTensor&, int64_t>;

// Calls without an option: a default costs 60 ns, and there are 15; so does a result that nobody asked for.
GateArgs plain_args(const Tensor& logits, int64_t top_k, int64_t score, bool normalize, double scale) {
  const OptionalTensor none;
  return Gate::read(logits, top_k, score, normalize, scale, none, 1, 0, 0, none, none, false, 0, std::nullopt, none,
                    std::nullopt, none, 1, none, 0);
}

Choice gate_plain_forward(const Tensor& logits, int64_t top_k, int64_t score, bool normalize, double scale) {
  GateArgs args = plain_args(logits, top_k, score, normalize, scale);
  return choose(logits, args);
}

// Weights, score_sum, logsumexp, experts and demand.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_plain_stats_forward(const Tensor& logits, int64_t top_k,
                                                                            int64_t score, bool normalize,
                                                                            double scale) {
  GateArgs args = plain_args(logits, top_k, score, normalize, scale);
  const ScalarType arithmetic = arithmetic_type(args.dtype);
  Tensor score_sum = empty(logits, {args.shape.num_experts}, arithmetic);
  Tensor logsumexp = empty(logits, {args.shape.num_tokens}, arithmetic);
  args.score_sum = score_sum.mutable_data_ptr();
  args.logsumexp = logsumexp.mutable_data_ptr();
  auto [weights, experts, demand] = choose(logits, args);
  return {std::move(weights), std::move(score_sum), std::move(logsumexp), std::move(experts), std::move(demand)};
}

// A contiguous gradient of the arithmetic type, checked against the shape of its output.
const void* checked_grad(const char* name, OptionalTensor& grad, std::initializer_list<int64_t> shape,
                         ScalarType arithmetic) {
  if (!grad.has_value()) return nullptr;
  check_dtype("gate_backward", name, *grad, arithmetic);
  check_dim("gate_backward", name, *grad, static_cast<int64_t>(shape.size()));
  for (size_t d = 0; d < shape.size(); ++d)
    check_size("gate_backward", name, *grad, static_cast<int64_t>(d), shape.begin()[d]);
  grad = as_contiguous(*grad);
  return grad->const_data_ptr();
}

Tensor gate_backward(OptionalTensor grad_weights, OptionalTensor grad_score_sum, OptionalTensor grad_logsumexp,
                     OptionalTensor grad_scores, const Tensor& logits, Tensor experts, OptionalTensor logsumexp,
                     int64_t score, bool softmax_over_group, int64_t num_groups, int64_t num_null, bool normalize,
                     double scale) {
  check_dim("gate_backward", "experts", experts, 2);
  check_dtype("gate_backward", "experts", experts, ScalarType::Int);
  GateBackwardArgs args{};
  args.shape =
      checked_shape(logits, experts.size(1), score, softmax_over_group, num_groups, num_null, normalize, scale);
  args.dtype = float_dtype("gate_backward", "logits", logits);
  const int64_t num_tokens = args.shape.num_tokens;
  const int64_t num_experts = args.shape.num_experts;
  const ScalarType arithmetic = arithmetic_type(args.dtype);
  check_size("gate_backward", "experts", experts, 0, num_tokens);
  experts = as_contiguous(experts);
  args.logits = strided(logits);
  args.experts = static_cast<const int32_t*>(experts.const_data_ptr());
  args.grad_weights = checked_grad("grad_weights", grad_weights, {num_tokens, experts.size(1)}, arithmetic);
  args.grad_score_sum = checked_grad("grad_score_sum", grad_score_sum, {num_experts}, arithmetic);
  args.grad_logsumexp = checked_grad("grad_logsumexp", grad_logsumexp, {num_tokens}, arithmetic);
  args.grad_scores = checked_grad("grad_scores", grad_scores, {num_tokens, num_experts}, arithmetic);
  args.logsumexp = checked_grad("logsumexp", logsumexp, {num_tokens}, arithmetic);
  check_devices("gate_backward", logits, grad_weights, grad_score_sum, grad_logsumexp, grad_scores, experts, logsumexp);
  Tensor grad_logits = empty(logits, {num_tokens, num_experts + num_null}, logits.scalar_type());
  args.grad_logits = grad_logits.mutable_data_ptr();
  launch("gate_backward", &kernels::gate_backward, args, logits);
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, FASTMOE_ROUTE_KEY, m) {
  m.impl("gate", &boxed<&Gate::gate>);
  m.impl("gate_forward", &boxed<&Gate::gate_forward>);
  m.impl("gate_plain_forward", &boxed<&gate_plain_forward>);
  m.impl("gate_plain_stats_forward", &boxed<&gate_plain_stats_forward>);
  m.impl("gate_stats_forward", &boxed<&Gate::gate>);
  m.impl("gate_backward", &boxed<&gate_backward>);
}

}  // namespace fastmoe_route
