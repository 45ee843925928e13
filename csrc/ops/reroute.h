// reroute: which of a token's candidate experts it gets when experts have room for `capacity` slots only.
//
//   experts [T, M], each token's candidates, best first -> choice [T, W] (columns of `experts`, rising, -1 past the
//   last), granted [T, W] (the experts there), demand [E]; W is M with a fill and top_k without; all int32.
// Experts are handed out in rounds; who got one keeps it. Within a round every (scope, expert) takes the best of its
// askers while it has room:
//   1. columns 0 .. top_k - 1 together, as plan_dispatch would: lower column then lower token, or larger weight then
//      lower slot, NaN last;
//   2. with an overflow rule, columns top_k .. M - 1 one after another: tokens with fewer experts than they have ids in
//      the first top_k columns ask for the one of this column, in the same order of preference;
//   3. with a fill, the other candidates of columns top_k .. M - 1 together, larger weight first, then lower slot.
// In rounds 2 and 3 no token asks for an expert that an earlier column of its names, and under kLocal round 2 keeps to
// experts of the token's own rank. Integers only: the same bits on every run.
#pragma once

#include <cstdint>

#include "common/cuda_queue.h"
#include "ops/plan_dispatch.h"

namespace fastmoe_route {

enum class Overflow : int32_t { kDrop, kNext, kLocal };
enum class Fill : int32_t { kNone, kTurnedAway, kAny };  // nobody, tokens still short of experts, all tokens

struct RerouteArgs {
  int64_t num_tokens;      // T
  int64_t num_candidates;  // M
  int64_t num_experts;     // E
  int64_t top_k;           // at most M
  int64_t width;           // W
  int64_t capacity;        // at least 1
  bool experts_are_int64;
  const void* experts;  // [T, M], contiguous
  Overflow overflow;
  Fill fill;
  DropPolicy drop_policy;
  DType weights_dtype;
  const void* weights;       // [T, M], contiguous, or null if neither kScore nor a fill asks for it
  const int32_t* scope_ids;  // [T], contiguous, or null
  int64_t num_scopes;
  const int32_t* rank_of_expert;  // [E], contiguous; kLocal only
  const int32_t* rank_of_token;   // [T], contiguous; kLocal only
  int32_t* choice;
  int32_t* granted;
  int32_t* demand;
  PlanStatus* status;  // CPU only; ids and scopes are judged before anything is written
};

namespace cpu { void reroute(const RerouteArgs& args); }  // namespace cpu

// Ids and scopes out of range are none.
namespace cuda { CudaStatus reroute(const RerouteArgs& args, const CudaQueue& queue); }  // namespace cuda

}  // namespace fastmoe_route
