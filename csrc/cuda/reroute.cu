// reroute on CUDA: every candidate is a slot, and who wants the same (scope, expert) lies together, best first.
//
//   prepare   a warp per token marks the candidates that may ask, and counts the experts the token is short of
//   sort      the slots by preference, by (scope, expert) and by round: stable sorts, so that the askers of an expert
//             stand side by side in every round, and the places of a round are known from the shapes
//   grant     a launch per round: a warp owns an (scope, expert), walks its askers in order and serves as many as it
//             has room for; room is counted at the first place of the group, so nothing is sized by scopes or experts
//   fill      the later candidates once more, by weight and by (scope, expert), and one more grant
//   finish    a warp per token writes its columns in rising order
// In a round after the first a token asks once, so who is short is read and written by one thread; a fill asks for many
// at once and writes it no more. The only atomics count, and nothing reads what they count in the same launch: the same
// bits on every run. The host waits for nothing, so a round is launched whether or not a token is still short.
//
// Ids out of range, and slots of a token whose scope is out of range, are none. Bytes: 24 a slot and pass over 8 bits
// of key, three sorts (two by position, two more for a fill), and 21 a slot in its round. A sort per round instead
// would have to read the same keys again: they do not change, only who still asks does.
#include "cuda/debug.cuh"
#include "cuda/surplus.cuh"
#include "ops/reroute.h"

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 256;

enum State : uint8_t { kNever, kMayAsk, kGranted };

// What every kernel of a call knows.
struct Work {
  RerouteArgs a;
  uint8_t* state;    // [T, M]
  int32_t* missing;  // [T] experts a token is short of
  int32_t* group;    // [T, M] where the (scope, expert) of a slot keeps its room; -1 for none
  int32_t* room;     // [T M] at the first place of every group

  __device__ int64_t token_of(int64_t slot) const {
    return static_cast<uint32_t>(slot) / static_cast<uint32_t>(a.num_candidates);
  }
  // The expert of a slot, or -1.
  __device__ int32_t expert_of(int64_t slot) const {
    const int64_t id = a.experts_are_int64 ? static_cast<const int64_t*>(a.experts)[slot]
                                           : static_cast<const int32_t*>(a.experts)[slot];
    debug_assert(id >= -1 && id < a.num_experts);
    if (id < 0 || id >= a.num_experts) return -1;
    if (a.scope_ids != nullptr) {
      const int32_t scope = a.scope_ids[token_of(slot)];
      debug_assert(scope >= 0 && scope < a.num_scopes);
      if (scope < 0 || scope >= a.num_scopes) return -1;
    }
    return static_cast<int32_t>(id);
  }
};

// A later candidate that an earlier column names as well never asks.
__global__ void __launch_bounds__(kThreads) prepare_kernel(Work work) {
  const RerouteArgs& a = work.a;
  for (int64_t token = grid_warp(); token < a.num_tokens; token += grid_warps()) {
    const int64_t row = token * a.num_candidates;
    int32_t missing = 0;
    for (int64_t first = 0; first < a.num_candidates; first += kWarp) {
      const int64_t column = first + lane_index();
      const bool is_inside = column < a.num_candidates;
      const int32_t expert = is_inside ? work.expert_of(row + column) : -1;
      bool may_ask = expert >= 0;
      if (column >= a.top_k) {
        for (int64_t other = 0; may_ask && other < column; ++other) may_ask = work.expert_of(row + other) != expert;
      }
      if (is_inside) work.state[row + column] = may_ask ? kMayAsk : kNever;
      missing += __popc(__ballot_sync(kAllLanes, may_ask && column < a.top_k));
    }
    if (lane_index() == 0) work.missing[token] = missing;
  }
}

// The slots of columns from first_column on: by slot and with their weights as keys, or by column, then token.
__global__ void __launch_bounds__(kThreads)
    list_kernel(Work work, int64_t first_column, bool by_score, int64_t count, uint64_t* keys, int32_t* slots) {
  const RerouteArgs& a = work.a;
  const int64_t num_columns = a.num_candidates - first_column;
  each_of_grid(count, [&](int64_t i) {
    const int64_t token = by_score ? i / num_columns : i % a.num_tokens;
    const int64_t column = first_column + (by_score ? i % num_columns : i / a.num_tokens);
    const int64_t slot = token * a.num_candidates + column;
    if (by_score) keys[i] = falling_key(a.weights, a.weights_dtype, slot);
    slots[i] = static_cast<int32_t>(slot);
  });
}

// kAim: (expert, scope) as one number, larger than all of them for none; kGroup: the same as a place, none last;
// kRound: 0 for a choice, 1 and so on for the columns behind.
enum class Key { kAim, kGroup, kRound };

template <Key kKey>
__global__ void __launch_bounds__(kThreads) key_kernel(Work work, int64_t count, uint64_t* keys, const int32_t* slots) {
  const RerouteArgs& a = work.a;
  each_of_grid(count, [&](int64_t i) {
    const int64_t slot = slots[i], token = work.token_of(slot);
    if (kKey == Key::kGroup) {
      keys[i] = static_cast<uint32_t>(work.group[slot]);
    } else if (kKey == Key::kRound) {
      const int64_t column = slot - token * a.num_candidates;
      keys[i] = column < a.top_k ? 0 : column - a.top_k + 1;
    } else {
      const int32_t expert = work.expert_of(slot);
      const uint64_t scope = a.scope_ids != nullptr && expert >= 0 ? static_cast<uint32_t>(a.scope_ids[token]) : 0u;
      keys[i] = static_cast<uint64_t>(expert >= 0 ? expert : a.num_experts) * a.num_scopes + scope;
    }
  });
}

// Of slots sorted by kAim: a group is known by the place of its first slot.
__global__ void __launch_bounds__(kThreads)
    group_kernel(Work work, int64_t count, const uint64_t* keys, const int32_t* slots) {
  const RerouteArgs& a = work.a;
  const uint64_t nobody = static_cast<uint64_t>(a.num_experts) * a.num_scopes;
  each_of_grid(count, [&](int64_t i) {
    const uint64_t key = keys[i];
    int64_t low = 0, high = i;  // the first place with this key is in [low, high]
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    work.group[slots[i]] = key < nobody ? static_cast<int32_t>(low) : -1;
    if (low == i) work.room[i] = static_cast<int32_t>(a.capacity < INT_MAX ? a.capacity : INT_MAX);
  });
}

enum class Round { kChoices, kNext, kFill };

template <Round kRound>
__device__ inline bool asks(const Work& work, int64_t slot) {
  const RerouteArgs& a = work.a;
  if (work.state[slot] != kMayAsk) return false;
  if (kRound == Round::kChoices) return true;
  const int64_t token = work.token_of(slot);
  if (kRound == Round::kFill) return a.fill == Fill::kAny || work.missing[token] > 0;
  if (work.missing[token] <= 0) return false;
  return a.overflow != Overflow::kLocal || a.rank_of_expert[work.expert_of(slot)] == a.rank_of_token[token];
}

// One group, whose slots of this round begin at `begin`; `end` is that of the round. All lanes.
template <Round kRound>
__device__ inline void serve(const Work& work, const int32_t* slots, int64_t begin, int64_t end, int32_t group) {
  int32_t room = lane_index() == 0 ? work.room[group] : 0;
  room = __shfl_sync(kAllLanes, room, 0);
  int32_t granted = 0;
  bool is_inside = true;
  for (int64_t first = begin; granted < room && __all_sync(kAllLanes, is_inside); first += kWarp) {
    const int64_t i = first + lane_index();
    const int64_t slot = i < end ? slots[i] : -1;
    is_inside = slot >= 0 && work.group[slot] == group;
    const bool is_asking = is_inside && asks<kRound>(work, slot);
    const unsigned askers = __ballot_sync(kAllLanes, is_asking);
    const int before = __popc(askers & lanes_before());
    if (is_asking && before < room - granted) {
      work.state[slot] = kGranted;
      if (kRound != Round::kFill) atomicSub(work.missing + work.token_of(slot), 1);
    }
    const int32_t asked = __popc(askers);
    granted += asked < room - granted ? asked : room - granted;
  }
  if (lane_index() == 0) work.room[group] = room - granted;
}

// A warp looks at 32 places and serves the groups that begin there.
template <Round kRound>
__global__ void __launch_bounds__(kThreads) grant_kernel(Work work, const int32_t* slots, int64_t begin, int64_t end) {
  for (int64_t first = begin + grid_warp() * kWarp; first < end; first += grid_threads()) {
    const int64_t i = first + lane_index();
    const int32_t group = i < end ? work.group[slots[i]] : -1;
    const bool is_first = group >= 0 && (i == begin || work.group[slots[i - 1]] != group);
    for (unsigned firsts = __ballot_sync(kAllLanes, is_first); firsts != 0; firsts &= firsts - 1) {
      const int lane = __ffs(firsts) - 1;
      serve<kRound>(work, slots, first + lane, end, __shfl_sync(kAllLanes, group, lane));
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(Work work) {
  const RerouteArgs& a = work.a;
  for (int64_t token = grid_warp(); token < a.num_tokens; token += grid_warps()) {
    const int64_t row = token * a.num_candidates, result = token * a.width;
    int64_t count = 0;
    for (int64_t first = 0; first < a.num_candidates; first += kWarp) {
      const int64_t column = first + lane_index();
      const bool is_granted = column < a.num_candidates && work.state[row + column] == kGranted;
      const unsigned granted = __ballot_sync(kAllLanes, is_granted);
      if (is_granted) {
        const int64_t at = result + count + __popc(granted & lanes_before());
        const int32_t expert = work.expert_of(row + column);
        a.choice[at] = static_cast<int32_t>(column);
        a.granted[at] = expert;
        atomicAdd(a.demand + expert, 1);
      }
      count += __popc(granted);
    }
    for (int64_t at = count + lane_index(); at < a.width; at += kWarp)
      a.choice[result + at] = a.granted[result + at] = -1;
  }
}

// ---- Host.

template <Key kKey>
CudaStatus sort_by(const Work& work, KeyedSlots& slots, uint64_t largest, const CudaQueue& queue) {
  key_kernel<kKey>
      <<<num_blocks(slots.count, kThreads), kThreads, 0, queue.stream>>>(work, slots.count, slots.keys, slots.slots);
  const CudaStatus status = launched();
  return status.code != 0 ? status : slots.sort(bits_of(largest), queue);
}

// The slots of columns from first_column on, by score or by column, then token.
CudaStatus list(const Work& work, KeyedSlots& slots, int64_t first_column, bool by_score, const CudaQueue& queue) {
  slots.count = work.a.num_tokens * (work.a.num_candidates - first_column);
  list_kernel<<<num_blocks(slots.count, kThreads), kThreads, 0, queue.stream>>>(work, first_column, by_score,
                                                                                slots.count, slots.keys, slots.slots);
  const CudaStatus status = launched();
  return status.code != 0 || !by_score ? status : slots.sort(falling_key_bits(work.a.weights_dtype), queue);
}

template <Round kRound>
CudaStatus grant(const Work& work, const KeyedSlots& slots, int64_t begin, int64_t end, const CudaQueue& queue) {
  if (begin == end) return {};
  grant_kernel<kRound><<<num_blocks(end - begin, kThreads), kThreads, 0, queue.stream>>>(work, slots.slots, begin, end);
  return launched();
}

CudaStatus rounds(const Work& work, KeyedSlots& slots, const CudaQueue& queue) {
  const RerouteArgs& a = work.a;
  CudaStatus status = list(work, slots, 0, a.drop_policy == DropPolicy::kScore, queue);
  if (status.code != 0) return status;
  status = sort_by<Key::kAim>(work, slots, static_cast<uint64_t>(a.num_experts + 1) * a.num_scopes, queue);
  if (status.code != 0) return status;
  group_kernel<<<num_blocks(slots.count, kThreads), kThreads, 0, queue.stream>>>(work, slots.count, slots.keys,
                                                                                 slots.slots);
  if (status = launched(); status.code != 0) return status;
  if (status = sort_by<Key::kRound>(work, slots, a.num_candidates - a.top_k, queue); status.code != 0) return status;
  status = grant<Round::kChoices>(work, slots, 0, a.num_tokens * a.top_k, queue);
  if (a.overflow == Overflow::kDrop) return status;
  for (int64_t column = a.top_k; status.code == 0 && column < a.num_candidates; ++column) {
    status = grant<Round::kNext>(work, slots, a.num_tokens * column, a.num_tokens * (column + 1), queue);
  }
  return status;
}

CudaStatus fill(const Work& work, KeyedSlots& slots, const CudaQueue& queue) {
  CudaStatus status = list(work, slots, work.a.top_k, true, queue);
  if (status.code != 0) return status;
  if (status = sort_by<Key::kGroup>(work, slots, UINT32_MAX, queue); status.code != 0) return status;
  return grant<Round::kFill>(work, slots, 0, slots.count, queue);
}

}  // namespace

CudaStatus reroute(const RerouteArgs& a, const CudaQueue& queue) {
  CudaStatus status = status_of(cudaMemsetAsync(a.demand, 0, a.num_experts * sizeof(int32_t), queue.stream));
  const int64_t num_slots = a.num_tokens * a.num_candidates;
  if (status.code != 0 || num_slots == 0) return status;
  Work work{};
  work.a = a;
  work.state = queue.scratch_of<uint8_t>(num_slots);
  work.missing = queue.scratch_of<int32_t>(a.num_tokens);
  work.group = queue.scratch_of<int32_t>(num_slots);
  work.room = queue.scratch_of<int32_t>(num_slots);
  const unsigned token_blocks = num_blocks(a.num_tokens, kThreads / kWarp);
  prepare_kernel<<<token_blocks, kThreads, 0, queue.stream>>>(work);
  if (status = launched(); status.code != 0) return status;
  KeyedSlots slots(num_slots, queue);
  if (status = rounds(work, slots, queue); status.code != 0) return status;
  if (a.fill != Fill::kNone && a.top_k < a.num_candidates) {
    if (status = fill(work, slots, queue); status.code != 0) return status;
  }
  finish_kernel<<<token_blocks, kThreads, 0, queue.stream>>>(work);
  return launched();
}

}  // namespace cuda
}  // namespace fastmoe_route
