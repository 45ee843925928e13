// plan_dispatch: where every slot goes. A stable counting sort of slots by expert, with capacity and alignment.
//
//   experts [T, K] -> offsets [E + 1], row_to_slot [R], slot_to_row [T, K], kept [E], dropped [E], all int32.
// Rows of an expert are ordered by slot. With a capacity, at most that many slots are kept per (scope, expert): first
// choices before second choices and then lower tokens, or larger weights (NaN last) and then lower slots. Expert e
// starts at offsets[e], a multiple of align; rows between its last slot and offsets[e + 1], and rows past offsets[E],
// hold -1. Same bits for any number of threads.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "common/dtype.h"

namespace fastmoe_route {

constexpr int64_t kMaxPlanExperts = 65536;

enum class DropPolicy : int32_t { kPosition, kScore };

// What stopped a plan. Ids and scopes are judged before anything is written, the number of rows before any row is.
struct PlanStatus {
  enum Kind { kOk, kBadExpert, kBadScope, kTooManyRows } kind = kOk;
  int64_t value = 0;  // the id, or the rows needed
  int64_t where = 0;  // the slot, or the token
};

// kOk, or kBadScope with the first token whose scope is outside [0, num_scopes).
inline PlanStatus judge_scopes(const int32_t* scope_ids, int64_t num_tokens, int64_t num_scopes) {
  const auto is_bad = [=](int64_t token) { return scope_ids[token] < 0 || scope_ids[token] >= num_scopes; };
  bool is_any_bad = false;  // without a way out the loop goes by vectors
  for (int64_t token = 0; token < num_tokens; ++token) is_any_bad |= is_bad(token);
  for (int64_t token = 0; is_any_bad; ++token) {
    if (is_bad(token)) return {PlanStatus::kBadScope, scope_ids[token], token};
  }
  return {};
}

struct PlanArgs {
  int64_t num_tokens;   // T
  int64_t top_k;        // K
  int64_t num_experts;  // E
  int64_t num_rows;     // R
  int64_t max_slots;    // most slots that fit: R without the rows that alignment adds
  bool experts_are_int64;
  const void* experts;  // [T, K], int32 or int64
  int64_t experts_stride_token;
  int64_t experts_stride_slot;
  int64_t capacity;  // 0: no limit
  DropPolicy drop_policy;
  DType weights_dtype;
  const void* weights;       // [T, K], contiguous; kScore only
  const int32_t* scope_ids;  // [T], contiguous, or null
  int64_t num_scopes;
  int64_t align;
  bool allow_unrouted;  // E also means none
  int32_t* offsets;
  int32_t* row_to_slot;
  int32_t* slot_to_row;
  int32_t* kept;
  int32_t* dropped;
  PlanStatus* status;  // CPU only
};

namespace cpu { void plan_dispatch(const PlanArgs& args); }  // namespace cpu

// Takes ids and scopes that are out of range as none, and drops the highest slots where max_slots is exceeded.
namespace cuda { CudaStatus plan_dispatch(const PlanArgs& args, const CudaQueue& queue); }  // namespace cuda

}  // namespace fastmoe_route
