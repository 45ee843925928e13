// Every operator of the package, one schema per line: the table of contents. Float results come first (opcheck adds to
// them in place); the Python functions give results their names and order. Enums travel as their numbers.
#include "common/check.h"
#include "common/parallel.h"

namespace {

void use_torch_threads() {
  fastmoe_route::thread_pool.run = [](int64_t count, int64_t grain, fastmoe_route::ThreadPool::Body body, void* context) {
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

  // scores, top-k choice, combine weights and statistics: (weights, score_sum, logsumexp, scores, experts, demand)
  m.def("gate(Tensor logits, int top_k, int score, bool softmax_over_group, Tensor? bias, Tensor? mask, Tensor? noise, int num_groups, int topk_groups, int group_score, int max_per_group, float top_p, Tensor? top_p_per_token, float threshold, Tensor? threshold_per_token, int min_k, Tensor? k_per_token, int num_null, bool normalize, float scale, bool stats, bool keep_scores) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gate_backward(Tensor? grad_weights, Tensor? grad_score_sum, Tensor? grad_logsumexp, Tensor? grad_scores, Tensor logits, Tensor experts, Tensor? logsumexp, int score, bool softmax_over_group, int num_groups, int num_null, bool normalize, float scale) -> Tensor");
}
