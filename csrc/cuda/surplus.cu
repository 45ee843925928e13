// cub::DeviceRadixSort orders the slots; a slot is surplus if the one `capacity` places before it has its key.
// Bytes: 24 a slot and pass over 8 bits of key, 13 a slot to mark.
#include "cuda/surplus.cuh"

#include <cub/device/device_radix_sort.cuh>

namespace fastmoe_route {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) mark_surplus_kernel(int64_t count, int64_t capacity, const uint64_t* keys,
                                                                const int32_t* slots, uint8_t* is_surplus) {
  each_of_grid(count, [&](int64_t i) { is_surplus[slots[i]] = i >= capacity && keys[i - capacity] == keys[i]; });
}

}  // namespace

KeyedSlots::KeyedSlots(int64_t num_slots, const CudaQueue& queue) : count(num_slots) {
  keys = queue.scratch_of<uint64_t>(count);
  slots = queue.scratch_of<int32_t>(count);
  other_keys = queue.scratch_of<uint64_t>(count);
  other_slots = queue.scratch_of<int32_t>(count);
}

CudaStatus KeyedSlots::sort(KeyBits bits, const CudaQueue& queue) {
  cub::DoubleBuffer<uint64_t> key_buffers(keys, other_keys);
  cub::DoubleBuffer<int32_t> slot_buffers(slots, other_slots);
  const int num_items = static_cast<int>(count);
  size_t bytes = 0;
  const CudaStatus status = status_of(cub::DeviceRadixSort::SortPairs(nullptr, bytes, key_buffers, slot_buffers,
                                                                      num_items, bits.begin, bits.end, queue.stream));
  if (status.code != 0) return status;
  void* const room = queue.scratch_of<char>(static_cast<int64_t>(bytes));
  const cudaError_t error = cub::DeviceRadixSort::SortPairs(room, bytes, key_buffers, slot_buffers, num_items,
                                                            bits.begin, bits.end, queue.stream);
  keys = key_buffers.Current();
  slots = slot_buffers.Current();
  other_keys = key_buffers.Alternate();
  other_slots = slot_buffers.Alternate();
  return status_of(error);
}

CudaStatus KeyedSlots::mark_surplus(int64_t capacity, uint8_t* is_surplus, const CudaQueue& queue) const {
  mark_surplus_kernel<<<num_blocks(count, kThreads), kThreads, 0, queue.stream>>>(count, capacity, keys, slots,
                                                                                  is_surplus);
  return launched();
}

}  // namespace cuda
}  // namespace fastmoe_route
