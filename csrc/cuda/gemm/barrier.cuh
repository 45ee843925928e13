// Barriers in shared memory (mbarrier) and the asynchronous copies that complete them, as sm_90 and later have them.
// Unlike CUTLASS's, they keep the compiler from moving accesses of memory across.
#pragma once

#include <cstdint>

namespace fastmoe_route {
namespace cuda {

__device__ inline unsigned shared_address(const void* in_shared_memory) {
  return static_cast<unsigned>(__cvta_generic_to_shared(in_shared_memory));
}

__device__ inline void store_shared(unsigned address, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// Completes a phase when all arrivals of it, and all bytes it was told of, are there; phases alternate in parity. What
// a thread did before it arrived comes before what another does after it waited.
class Barrier {
 public:
  __device__ void init(unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  __device__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory"); }
  // Arrives, and tells of bytes that the copy engine will bring.
  __device__ void arrive_and_expect(unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  // Arrives when the copies that this thread has begun (copy_async_16) are there.
  __device__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address()) : "memory");
  }
  // Until the phase of that parity is complete.
  __device__ void wait(unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred is_complete;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 is_complete, [%0], %1;\n"
        "@!is_complete bra again;\n"
        "}" ::"r"(address()),
        "r"(parity)
        : "memory");
  }
  __device__ uint64_t* word() { return &word_; }

 private:
  __device__ unsigned address() { return shared_address(&word_); }

  uint64_t word_;
};

// 16 bytes to shared memory.
__device__ inline void copy_async_16(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// 16 bytes to shared memory, of which the first `bytes` are copied and the others are zeros.
__device__ inline void copy_async_16(unsigned to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

}  // namespace cuda
}  // namespace fastmoe_route
