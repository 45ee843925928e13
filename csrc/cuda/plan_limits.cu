// Launches before those of a plan that mark the slots turned away; `count` and `place` then pass them over.
//   capacity by position   a count, a scan and a walk (plan_walk.cuh) with the slots ordered by choice, then token: a
//                          rank in that order is an arrival, and the walk marks ranks from `capacity` on
//   by score, or by scope  cub::DeviceRadixSort (stable, least digit first) orders the slots by key, then by (expert,
//                          scope); slot i of a group is turned away if slot i - capacity is of the same group
//   max_rows               the slot at which the rows are used up; it and all later ones are turned away
// Nothing is sized by the number of scopes. Bytes of a sort: about 24 a slot and pass over 8 bits of key.
#include "cuda/plan_limits.cuh"

#include "cuda/plan_walk.cuh"
#include "cuda/surplus.cuh"

namespace fastmoe_route {
namespace cuda {
namespace {

// ---- Capacity by score or by scope: sorting.

__global__ void __launch_bounds__(kWalkThreads) fill_score_keys_kernel(PlanWork work, uint64_t* keys, int32_t* slots) {
  each_of_grid(work.num_slots, [&](int64_t i) {
    keys[i] = falling_key(work.a.weights, work.a.weights_dtype, i);
    slots[i] = static_cast<int32_t>(i);
  });
}

// keys[i] = (expert, scope) of the i-th slot as one number, larger than all of them for none. The order is that of
// `sorted`, or by choice, then token.
__global__ void __launch_bounds__(kWalkThreads)
    fill_group_keys_kernel(PlanWork work, const int32_t* sorted, uint64_t* keys, int32_t* slots) {
  const PlanArgs& a = work.a;
  each_of_grid(work.num_slots, [&](int64_t i) {
    const int slot = sorted != nullptr ? sorted[i] : work.slot_at(i);
    const int expert = work.expert_of(slot);
    const uint64_t scope = a.scope_ids != nullptr ? static_cast<uint32_t>(a.scope_ids[work.token_of(slot)]) : 0u;
    keys[i] = expert < 0 ? static_cast<uint64_t>(a.num_experts) * a.num_scopes
                         : static_cast<uint64_t>(expert) * a.num_scopes + scope;
    slots[i] = slot;
  });
}

CudaStatus drop_by_sorting(PlanWork work, uint8_t* is_dropped, const CudaQueue& queue) {
  const PlanArgs& a = work.a;
  const unsigned blocks = num_blocks(work.num_slots, kWalkThreads);
  KeyedSlots slots(work.num_slots, queue);
  work.is_by_choice = a.drop_policy == DropPolicy::kPosition;
  const bool by_score = a.drop_policy == DropPolicy::kScore;
  CudaStatus status;
  if (by_score) {
    fill_score_keys_kernel<<<blocks, kWalkThreads, 0, queue.stream>>>(work, slots.keys, slots.slots);
    if (status = launched(); status.code != 0) return status;
    if (status = slots.sort(falling_key_bits(a.weights_dtype), queue); status.code != 0) return status;
  }
  // In place: slot i is read before it is written, by the same thread.
  fill_group_keys_kernel<<<blocks, kWalkThreads, 0, queue.stream>>>(work, by_score ? slots.slots : nullptr, slots.keys,
                                                                    slots.slots);
  if (status = launched(); status.code != 0) return status;
  const KeyBits bits = bits_of(static_cast<uint64_t>(a.num_experts) * a.num_scopes);
  if (status = slots.sort(bits, queue); status.code != 0) return status;
  return slots.mark_surplus(a.capacity, is_dropped, queue);
}

// Counts the demand, and marks what capacity turns away.
CudaStatus drop(PlanWork& work, const CudaQueue& queue) {
  const PlanArgs& a = work.a;
  PlanWork first = work;
  const bool by_arrival = a.drop_policy == DropPolicy::kPosition && a.scope_ids == nullptr;
  first.is_by_choice = by_arrival;
  const CudaStatus status = count_demand(first, queue);
  if (status.code != 0 || a.capacity == 0) return status;
  uint8_t* const is_dropped = queue.scratch_of<uint8_t>(work.num_slots);
  work.is_dropped = is_dropped;
  if (!by_arrival) return drop_by_sorting(first, is_dropped, queue);
  first.marks = is_dropped;
  return mark_late(first, queue);
}

// ---- max_rows.

__global__ void __launch_bounds__(kWalkThreads, 1) count_used_kernel(PlanWork work) {
  for (int64_t tile = grid_warp(); tile < work.num_tiles; tile += grid_warps()) {
    const int64_t begin = tile * work.tile_slots;
    int32_t used = 0;
    for (int64_t first = begin; first < begin + work.tile_slots; first += kWarp) {
      const int64_t slot = first + lane_index();
      used += __popc(__ballot_sync(kAllLanes, slot < work.num_slots && work.expert_of(static_cast<int>(slot)) >= 0));
    }
    if (lane_index() == 0) work.tile_used[tile] = used;
  }
}

// The slot in use that max_slots others precede, or S. One warp.
__global__ void __launch_bounds__(kWarp) find_cut_kernel(PlanWork work, int32_t* first_cut) {
  int64_t room = work.a.max_slots;
  int64_t tile = 0;
  while (tile < work.num_tiles && work.tile_used[tile] <= room) room -= work.tile_used[tile++];
  int64_t cut = work.num_slots;
  for (int64_t first = tile * work.tile_slots; tile < work.num_tiles && cut == work.num_slots; first += kWarp) {
    const int64_t slot = first + lane_index();
    unsigned used = __ballot_sync(kAllLanes, slot < work.num_slots && work.expert_of(static_cast<int>(slot)) >= 0);
    const int count = __popc(used);
    if (room < count) {
      for (; room > 0; --room) used &= used - 1;
      cut = first + __ffs(used) - 1;
    } else {
      room -= count;
    }
  }
  if (lane_index() == 0) *first_cut = static_cast<int32_t>(cut);
}

CudaStatus cut_at_max_rows(PlanWork& work, const CudaQueue& queue) {
  work.tile_used = queue.scratch_of<int32_t>(work.num_tiles);
  int32_t* first_cut = queue.scratch_of<int32_t>(1);
  count_used_kernel<<<num_blocks(work.num_tiles, kWalkWarps), kWalkThreads, 0, queue.stream>>>(work);
  const CudaStatus status = launched();
  if (status.code != 0) return status;
  find_cut_kernel<<<1, kWarp, 0, queue.stream>>>(work, first_cut);
  work.first_cut = first_cut;
  return launched();
}

// Most slots that capacity can leave: min(S, E * capacity * scopes), without overflow.
int64_t most_kept(const PlanArgs& a, int64_t num_slots) {
  const int64_t groups = a.num_experts * a.num_scopes;
  return a.capacity == 0 || a.capacity > num_slots / groups ? num_slots : groups * a.capacity;
}

bool may_overflow(const PlanWork& work) { return work.a.max_slots < most_kept(work.a, work.num_slots); }

}  // namespace

bool has_limit(const PlanWork& work) {
  const bool may_drop = work.a.capacity > 0 && work.num_slots > work.a.capacity;
  return may_drop || may_overflow(work);
}

CudaStatus turn_away(PlanWork& work, const CudaQueue& queue) {
  const CudaStatus status = drop(work, queue);
  return status.code != 0 || !may_overflow(work) ? status : cut_at_max_rows(work, queue);
}

}  // namespace cuda
}  // namespace fastmoe_route
