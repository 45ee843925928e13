// The kernels of plan_dispatch as a build without NDEBUG has them: prints what ids and scopes in and out of range give.
#include "cuda/plan_dispatch.cu"
#include "cuda/plan_limits.cu"
#include "cuda/plan_walk.cu"

#include <cstdio>
#include <vector>

namespace fastmoe_route {
namespace cuda {
// Of surplus.cu, which these plans do without.
KeyedSlots::KeyedSlots(int64_t, const CudaQueue&) {}
CudaStatus KeyedSlots::sort(KeyBits, const CudaQueue&) { return not_supported("a sort"); }
CudaStatus KeyedSlots::mark_surplus(int64_t, uint8_t*, const CudaQueue&) const { return not_supported("marks"); }
}  // namespace cuda
}  // namespace fastmoe_route

namespace fr = fastmoe_route;

template <class T>
T* on_device(const std::vector<T>& values) {
  void* memory = nullptr;
  cudaMalloc(&memory, values.size() * sizeof(T));
  cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  return static_cast<T*>(memory);
}

static void plan(const char* name, const std::vector<int32_t>& experts, const std::vector<int32_t>& scopes,
                 bool allow_unrouted) {
  const int64_t num_tokens = static_cast<int64_t>(scopes.size()), num_slots = static_cast<int64_t>(experts.size());
  fr::PlanArgs a{};
  a.num_tokens = num_tokens;
  a.top_k = num_slots / num_tokens;
  a.num_experts = 4;
  a.num_rows = a.max_slots = num_slots;
  a.experts = on_device(experts);
  a.experts_stride_token = a.top_k;
  a.experts_stride_slot = 1;
  a.scope_ids = on_device(scopes);
  a.num_scopes = 2;
  a.align = 1;
  a.allow_unrouted = allow_unrouted;
  a.offsets = on_device(std::vector<int32_t>(5));
  a.row_to_slot = on_device(std::vector<int32_t>(num_slots));
  a.slot_to_row = on_device(std::vector<int32_t>(num_slots));
  a.kept = on_device(std::vector<int32_t>(4));
  a.dropped = on_device(std::vector<int32_t>(4));
  fr::CudaQueue queue;
  queue.allocate = [](void*, size_t bytes) {
    void* memory = nullptr;
    cudaMalloc(&memory, bytes);
    return memory;
  };
  const fr::CudaStatus status = fr::cuda::plan_dispatch(a, queue);
  std::printf("%s: %s\n", name, status.code == 0 ? "ok" : status.text);
}

int main() {
  plan("in range", {0, 3, -1, 2}, {0, 1}, false);
  plan("unrouted", {0, 4, -1, 2}, {0, 1}, true);
  plan("past the last", {0, 4, -1, 2}, {0, 1}, false);
  plan("below none", {0, -2, -1, 2}, {0, 1}, false);
  plan("scope", {0, 3, -1, 2}, {0, 2}, false);
  return 0;
}
