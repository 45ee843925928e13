// Memory for large results that come and go, kept from one to the next. A training step frees its weight gradients, and
// what its backward pass needed, and makes the same ones again; memory that the allocator takes from the system anew
// each time comes as empty pages, and clearing those costs as much as computing small experts.
//
// Bound, for each kind of result: what is mapped is never more than what was in use at the same time before (in blocks
// of whole 2 MB); a free block that many requests passed by is unmapped. Free blocks may be marked so (MADV_FREE): they
// are used again as they are, unless the system takes them back first because it is short of memory.
#pragma once

#include <cstddef>

namespace fastmoe_route {

// From here on glibc takes memory from the system for every request.
constexpr size_t kKeptBytes = size_t{32} << 20;

// Two kinds of result share no memory: they are large at different times, gradients when the others are gone, and would
// take it from each other in every step.
enum class Kept {
  kGradient,     // gets huge pages in time, and is marked free once it has them
  kForBackward,  // is always marked free: it is not needed while gradients are the most
};

struct KeptBlock;  // one piece of memory, in use until it is given back

// At least `bytes`, uninitialised, aligned to 2 MB; null where there is none.
KeptBlock* take_kept(Kept kind, size_t bytes);
void* memory_of(const KeptBlock* block);
void give_back(KeptBlock* block);  // from any thread, until the process ends

// Bytes mapped now, in use or not.
size_t kept_bytes();

}  // namespace fastmoe_route
