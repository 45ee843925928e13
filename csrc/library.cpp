// Every operator of the package, one schema per line: the table of contents. Float results come first (opcheck adds to
// them in place); the Python functions give results their names and order. Enums travel as their numbers.
#include <torch/csrc/stable/library.h>

#include "common/parallel.h"

namespace {

void use_torch_threads() {
  fastmoe_route::thread_pool.run = [](int64_t count, int64_t grain, fastmoe_route::ThreadPool::Body body,
                                      void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
  };
  fastmoe_route::thread_pool.num_threads = [] {
    uint32_t count = 1;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
    return static_cast<int>(count);
  };
}

}  // namespace

STABLE_TORCH_LIBRARY(fastmoe_route, m) {
  use_torch_threads();

  // clang-format off: a schema is one line
  // scores, top-k choice, combine weights and statistics: (weights, score_sum, logsumexp, scores, experts, demand). What
  // is rare comes last: a default costs a call a tenth of an argument. topk_groups and max_per_group 0: no limit.
  // `_forward` twins carry no autograd; gate_forward has no statistics and gives (weights, experts, demand). The plain
  // ones have no options: with statistics, (weights, score_sum, logsumexp, experts, demand)
  m.def("gate(Tensor logits, int top_k, int score=0, bool normalize=False, float scale=1.0, bool stats=False, bool keep_scores=False, Tensor? bias=None, int num_groups=1, int topk_groups=0, int group_score=0, Tensor? mask=None, Tensor? noise=None, bool softmax_over_group=False, int max_per_group=0, float? top_p=None, Tensor? top_p_per_token=None, float? threshold=None, Tensor? threshold_per_token=None, int min_k=1, Tensor? k_per_token=None, int num_null=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gate_stats_forward(Tensor logits, int top_k, int score=0, bool normalize=False, float scale=1.0, bool stats=False, bool keep_scores=False, Tensor? bias=None, int num_groups=1, int topk_groups=0, int group_score=0, Tensor? mask=None, Tensor? noise=None, bool softmax_over_group=False, int max_per_group=0, float? top_p=None, Tensor? top_p_per_token=None, float? threshold=None, Tensor? threshold_per_token=None, int min_k=1, Tensor? k_per_token=None, int num_null=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gate_forward(Tensor logits, int top_k, int score=0, bool normalize=False, float scale=1.0, Tensor? bias=None, int num_groups=1, int topk_groups=0, int group_score=0, Tensor? mask=None, Tensor? noise=None, bool softmax_over_group=False, int max_per_group=0, float? top_p=None, Tensor? top_p_per_token=None, float? threshold=None, Tensor? threshold_per_token=None, int min_k=1, Tensor? k_per_token=None, int num_null=0) -> (Tensor, Tensor, Tensor)");
  m.def("gate_plain_forward(Tensor logits, int top_k, int score=0, bool normalize=False, float scale=1.0) -> (Tensor, Tensor, Tensor)");
  m.def("gate_plain_stats_forward(Tensor logits, int top_k, int score=0, bool normalize=False, float scale=1.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gate_backward(Tensor? grad_weights, Tensor? grad_score_sum, Tensor? grad_logsumexp, Tensor? grad_scores, Tensor logits, Tensor experts, Tensor? logsumexp, int score, bool softmax_over_group, int num_groups, int num_null, bool normalize, float scale) -> Tensor");

  // where every slot goes: (offsets, row_to_slot, slot_to_row, kept, dropped); capacity 0, max_rows -1: no limit
  m.def("plan_dispatch(Tensor experts, int num_experts, SymInt capacity=0, int drop_policy=0, Tensor? weights=None, Tensor? scope_ids=None, SymInt num_scopes=1, SymInt align=1, SymInt max_rows=-1, bool allow_unrouted=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("plan_dispatch_plain_forward(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // which of its candidate experts each token gets under a capacity: (choice, granted, demand)
  m.def("reroute(Tensor experts, Tensor? weights, int num_experts, int top_k, SymInt capacity, int overflow, int fill, int drop_policy, Tensor? scope_ids, SymInt num_scopes, Tensor? rank_of_expert, Tensor? rank_of_token) -> (Tensor, Tensor, Tensor)");

  // rows of tokens to rows of experts, and back as a weighted sum; `_forward` twins carry no autograd
  m.def("permute(Tensor x, Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
  m.def("permute_forward(Tensor x, Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
  m.def("unpermute(Tensor rows, Tensor? weights, Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
  m.def("unpermute_forward(Tensor rows, Tensor? weights, Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
  m.def("unpermute_backward(Tensor grad_y, Tensor? rows, Tensor? weights, Tensor row_to_slot, Tensor slot_to_row, bool needs_rows, bool needs_weights) -> (Tensor, Tensor)");

  // one product per expert over its own rows; the gradient of x is grouped_mm itself with w transposed
  m.def("grouped_mm(Tensor x, Tensor w, Tensor offsets, Tensor? bias) -> Tensor");
  m.def("grouped_mm_forward(Tensor x, Tensor w, Tensor offsets, Tensor? bias) -> Tensor");
  m.def("grouped_mm_wgrad(Tensor x, Tensor grad_y, Tensor offsets, bool transposed, bool needs_w, bool needs_bias) -> (Tensor, Tensor)");

  // the expert layer in one op: (y, preactivation); `_forward` carries no autograd and keeps no preactivation,
  // `_routed_forward` makes the plan as well
  m.def("moe_mlp(Tensor x, Tensor weights, Tensor w_up, Tensor w_down, Tensor? bias_up, Tensor? bias_down, Tensor offsets, Tensor row_to_slot, Tensor slot_to_row, int activation, bool interleaved, bool weights_on_input) -> (Tensor, Tensor)");
  m.def("moe_mlp_forward(Tensor x, Tensor weights, Tensor w_up, Tensor w_down, Tensor? bias_up, Tensor? bias_down, Tensor offsets, Tensor row_to_slot, Tensor slot_to_row, int activation, bool interleaved, bool weights_on_input) -> Tensor");
  m.def("moe_mlp_routed_forward(Tensor x, Tensor experts, Tensor weights, Tensor w_up, Tensor w_down, Tensor? bias_up, Tensor? bias_down, int activation, bool interleaved, bool weights_on_input, bool allow_unrouted=False) -> Tensor");
  m.def("moe_mlp_backward(Tensor grad_y, Tensor x, Tensor weights, Tensor w_up, Tensor w_down, Tensor? bias_down, Tensor offsets, Tensor row_to_slot, Tensor slot_to_row, Tensor preactivation, int activation, bool interleaved, bool weights_on_input, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // limits of this machine: so many operations on registers, one read of a buffer; what the library chose
  m.def("machine_peak(int dtype_code, float flops) -> ()");
  m.def("machine_read(Tensor buffer, int passes) -> float");
  m.def("machine_info() -> str");

  // softmax over the last dimension; method: auto, three_pass, online, two_pass; the plain ones are auto
  m.def("softmax(Tensor x, int method=0) -> Tensor");
  m.def("softmax_forward(Tensor x, int method=0) -> Tensor");
  m.def("softmax_plain_forward(Tensor x) -> Tensor");
  m.def("softmax_out(Tensor x, Tensor(a!) out, int method=0) -> ()");
  m.def("softmax_plain_out(Tensor x, Tensor(a!) out) -> ()");
  m.def("softmax_backward(Tensor grad_y, Tensor y) -> Tensor");

  // the k best softmax probabilities of wide rows: (values, statistics, indices), bare (values, indices)
  m.def("softmax_topk(Tensor x, int k) -> (Tensor, Tensor, Tensor)");
  m.def("softmax_topk_forward(Tensor x, int k) -> (Tensor, Tensor)");
  m.def("softmax_topk_backward(Tensor grad_values, Tensor x, Tensor statistics, Tensor indices) -> Tensor");

  // every expert takes its best tokens: (weights, experts, demand)
  m.def("expert_choice(Tensor scores, SymInt capacity, Tensor? scope_ids, SymInt num_scopes) -> (Tensor, Tensor, Tensor)");
  m.def("expert_choice_forward(Tensor scores, SymInt capacity, Tensor? scope_ids, SymInt num_scopes) -> (Tensor, Tensor, Tensor)");

  // every expert receives T / E tokens, close to the best total; transport, in plain torch, is in transport.py
  m.def("assign_balanced(Tensor scores) -> Tensor");
  // clang-format on
}
