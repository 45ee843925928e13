// expert_choice on CUDA: every (token, expert) pair is a slot, and an expert keeps the `capacity` best of a scope.
//
//   keys    the slots by falling score, NaN last; a stable sort, so that equal scores stay by token
//   groups  the slots in that order by (expert, scope); sorted again, the first `capacity` of a group are taken
//   write   results token by token; the number taken is counted per expert
// Nothing is sized by the number of scopes. A token whose scope is out of range is in no group.
//
// Why sorts. A radix select per (expert, scope) would read the scores six times and need the tokens of every scope side
// by side; two stable sorts handle any scopes, and are those of plan_dispatch. Bytes: 24 a slot and pass over 8 bits of
// key (two to four for the scores, one or two for the groups), the scores twice, the results once.
#include "cuda/debug.cuh"
#include "cuda/surplus.cuh"
#include "ops/expert_choice.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// The group of a token and expert, or num_experts * num_scopes for none.
__device__ inline uint64_t group_of(const ExpertChoiceArgs& a, uint32_t token, uint32_t expert) {
  const uint64_t num_scopes = static_cast<uint64_t>(a.num_scopes);
  if (a.scope_ids == nullptr) return expert * num_scopes;
  const int32_t scope = a.scope_ids[token];
  debug_assert(scope >= 0 && scope < a.num_scopes);
  if (scope < 0 || scope >= a.num_scopes) return static_cast<uint64_t>(a.num_experts) * num_scopes;
  return expert * num_scopes + static_cast<uint32_t>(scope);
}

__global__ void __launch_bounds__(kThreads)
    score_keys_kernel(ExpertChoiceArgs a, int64_t count, uint64_t* keys, int32_t* slots) {
  each_of_grid(count, [&](int64_t i) {
    const int64_t token = i / a.num_experts, expert = i % a.num_experts;
    keys[i] = falling_key(a.scores.data, a.dtype, token * a.scores.stride_row + expert * a.scores.stride_col);
    slots[i] = static_cast<int32_t>(i);
  });
}

__global__ void __launch_bounds__(kThreads)
    group_keys_kernel(ExpertChoiceArgs a, int64_t count, uint64_t* keys, const int32_t* slots) {
  const uint32_t num_experts = static_cast<uint32_t>(a.num_experts);
  each_of_grid(count, [&](int64_t i) {
    const uint32_t slot = static_cast<uint32_t>(slots[i]);
    keys[i] = group_of(a, slot / num_experts, slot % num_experts);
  });
}

// A warp owns 32 experts, one a lane, of every so many tokens; so a count is published once per lane, not per token.
__global__ void __launch_bounds__(kThreads)
    write_choice_kernel(ExpertChoiceArgs a, const uint8_t* is_surplus, int64_t num_parts) {
  const int64_t expert = grid_warp() % num_parts * kWarp + lane_index();
  if (expert >= a.num_experts) return;  // no lane waits for another here
  const uint64_t nobody = static_cast<uint64_t>(a.num_experts) * static_cast<uint64_t>(a.num_scopes);
  int32_t taken = 0;
  for (int64_t token = grid_warp() / num_parts; token < a.num_tokens; token += grid_warps() / num_parts) {
    const int64_t slot = token * a.num_experts + expert;
    const bool is_taken =
        is_surplus[slot] == 0 && group_of(a, static_cast<uint32_t>(token), static_cast<uint32_t>(expert)) != nobody;
    const int64_t at = token * a.scores.stride_row + expert * a.scores.stride_col;
    if (a.dtype == DType::kFloat64) {
      static_cast<double*>(a.weights)[slot] = is_taken ? static_cast<const double*>(a.scores.data)[at] : 0.0;
    } else {
      static_cast<float*>(a.weights)[slot] = is_taken ? load_as<float>(a.scores.data, a.dtype, at) : 0.0f;
    }
    a.experts[slot] = is_taken ? static_cast<int32_t>(expert) : -1;
    taken += is_taken;
  }
  if (taken != 0) atomicAdd(a.demand + expert, taken);
}

}  // namespace

CudaStatus expert_choice(const ExpertChoiceArgs& a, const CudaQueue& queue) {
  CudaStatus status = status_of(cudaMemsetAsync(a.demand, 0, a.num_experts * sizeof(int32_t), queue.stream));
  const int64_t count = a.num_tokens * a.num_experts;
  if (status.code != 0 || count == 0) return status;
  KeyedSlots slots(count, queue);
  const unsigned blocks = num_blocks(count, kThreads);
  score_keys_kernel<<<blocks, kThreads, 0, queue.stream>>>(a, count, slots.keys, slots.slots);
  if (status = launched(); status.code != 0) return status;
  if (status = slots.sort(falling_key_bits(a.dtype), queue); status.code != 0) return status;
  group_keys_kernel<<<blocks, kThreads, 0, queue.stream>>>(a, count, slots.keys, slots.slots);
  if (status = launched(); status.code != 0) return status;
  const KeyBits bits = bits_of(static_cast<uint64_t>(a.num_experts) * static_cast<uint64_t>(a.num_scopes));
  if (status = slots.sort(bits, queue); status.code != 0) return status;
  uint8_t* const is_surplus = queue.scratch_of<uint8_t>(count);
  if (status = slots.mark_surplus(a.capacity, is_surplus, queue); status.code != 0) return status;

  const int64_t num_parts = ceil_div(a.num_experts, kWarp);
  constexpr int64_t kTokensPerWarp = 64;  // a few, so that counts are added up before they are published
  const int64_t warps = num_parts * ceil_div(a.num_tokens, kTokensPerWarp);
  const unsigned write_blocks = num_blocks(ceil_div(warps, num_parts * (kThreads / kWarp)) * num_parts, 1);
  write_choice_kernel<<<write_blocks, kThreads, 0, queue.stream>>>(a, is_surplus, num_parts);
  return launched();
}

}  // namespace cuda
}  // namespace fastmoe_route
