// expert_choice on the CPU. Threads own blocks of neighbouring experts, so that the row-major scores are read and the
// row-major results written by pieces of a cache line.
//
// For every block: the scores become integer keys in the order of the ranking, one list per expert, tokens grouped by
// scope in token order. For every (scope, expert): the capacity-th largest key by quickselect on a copy; keys above it
// are taken, keys equal to it in token order while there is room. Bytes: scores read twice, results written once.
#include <algorithm>
#include <functional>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ops/expert_choice.h"

namespace fastmoe_route {
namespace {

constexpr int64_t kMaxBlock = 16;

// Larger is better; 0 is NaN, below the key of -inf. -0 and +0 share a key.
uint32_t key_of(float value) {
  if (value != value) return 0;
  const uint32_t bits = float_to_bits(value + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
uint64_t key_of(double value) {
  if (value != value) return 0;
  const double zero_is_positive = value + 0.0;
  uint64_t bits;
  std::memcpy(&bits, &zero_is_positive, sizeof bits);
  return (bits >> 63) != 0 ? ~bits : bits | (uint64_t{1} << 63);
}

// Tokens by scope, in token order: scope s owns order[offsets[s] : offsets[s + 1]]. Null order: one scope, all tokens.
struct Scopes {
  int64_t count = 1;
  const int32_t* order = nullptr;
  const int64_t* offsets = nullptr;
};

// By counting, in memory that grows with the number of scopes.
Scopes group_few_scopes(const ExpertChoiceArgs& args) {
  const int64_t tokens = args.num_tokens, scopes = args.num_scopes;
  char* memory = static_cast<char*>(scratch(Scratch::kPlan, (scopes + 2) * sizeof(int64_t) + tokens * sizeof(int32_t)));
  int64_t* offsets = reinterpret_cast<int64_t*>(memory);
  int32_t* order = reinterpret_cast<int32_t*>(memory + (scopes + 2) * sizeof(int64_t));
  std::fill(offsets, offsets + scopes + 2, int64_t{0});
  for (int64_t t = 0; t < tokens; ++t) ++offsets[args.scope_ids[t] + 2];
  for (int64_t s = 2; s < scopes + 2; ++s) offsets[s] += offsets[s - 1];
  for (int64_t t = 0; t < tokens; ++t) order[offsets[args.scope_ids[t] + 1]++] = static_cast<int32_t>(t);
  return {scopes, order, offsets};
}

// By sorting, in memory that grows with the number of tokens; scopes without a token are left out.
Scopes group_many_scopes(const ExpertChoiceArgs& args) {
  const int64_t tokens = args.num_tokens;
  char* memory = static_cast<char*>(
      scratch(Scratch::kPlan, tokens * sizeof(uint64_t) + (tokens + 1) * sizeof(int64_t) + tokens * sizeof(int32_t)));
  uint64_t* keys = reinterpret_cast<uint64_t*>(memory);  // scope above, token below
  int64_t* offsets = reinterpret_cast<int64_t*>(keys + tokens);
  int32_t* order = reinterpret_cast<int32_t*>(offsets + tokens + 1);
  for (int64_t t = 0; t < tokens; ++t) {
    keys[t] = static_cast<uint64_t>(args.scope_ids[t]) << 32 | static_cast<uint64_t>(t);
  }
  std::sort(keys, keys + tokens);
  int64_t count = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    order[i] = static_cast<int32_t>(keys[i] & 0xffffffffu);
    if (i == 0 || keys[i] >> 32 != keys[i - 1] >> 32) offsets[count++] = i;
  }
  offsets[count] = tokens;
  return {count, order, offsets};
}

Scopes group_by_scope(const ExpertChoiceArgs& args) {
  if (args.scope_ids == nullptr) return {};
  return args.num_scopes <= args.num_tokens ? group_few_scopes(args) : group_many_scopes(args);
}

// What one expert takes of a scope: keys above `threshold`, and the first `ties` equal to it.
template <class Key>
struct Cut {
  Key threshold;
  int64_t ties;
};

template <class Key>
Cut<Key> cut_of(const Key* keys, int64_t count, int64_t capacity, Key* copy) {
  if (count <= capacity) return {0, count};
  std::copy(keys, keys + count, copy);
  std::nth_element(copy, copy + (capacity - 1), copy + count, std::greater<Key>());
  const Key threshold = copy[capacity - 1];
  const int64_t above = std::count_if(copy, copy + (capacity - 1), [&](Key key) { return key > threshold; });
  return {threshold, capacity - above};
}

template <class T>
struct Chooser {
  using V = accumulate_t<T>;
  using Key = decltype(key_of(V{}));

  const ExpertChoiceArgs& args;
  const Scopes& scopes;
  const T* scores;
  V* weights;

  // Experts [first, first + width); `memory` holds width + 1 lists of num_tokens keys.
  void block(int64_t first, int64_t width, Key* memory) const {
    const int64_t tokens = args.num_tokens;
    Key* copy = memory + width * tokens;
    for (int64_t i = 0; i < tokens; ++i) {
      const T* row = row_of(i) + first * args.scores.stride_col;
      for (int64_t b = 0; b < width; ++b) memory[b * tokens + i] = key_of(to_float(row[b * args.scores.stride_col]));
    }
    int32_t demand[kMaxBlock] = {};
    for (int64_t s = 0; s < scopes.count; ++s) {
      const int64_t begin = scopes.order == nullptr ? 0 : scopes.offsets[s];
      const int64_t end = scopes.order == nullptr ? tokens : scopes.offsets[s + 1];
      Cut<Key> cuts[kMaxBlock];
      for (int64_t b = 0; b < width; ++b) {
        cuts[b] = cut_of(memory + b * tokens + begin, end - begin, args.capacity, copy);
        demand[b] += static_cast<int32_t>(std::min(end - begin, args.capacity));
      }
      for (int64_t i = begin; i < end; ++i) write_token(i, first, width, memory, cuts);
    }
    std::copy(demand, demand + width, args.demand + first);
  }

  void write_token(int64_t i, int64_t first, int64_t width, const Key* keys, Cut<Key>* cuts) const {
    const T* row = row_of(i) + first * args.scores.stride_col;
    const int64_t at = token_of(i) * args.num_experts + first;
    for (int64_t b = 0; b < width; ++b) {
      const Key key = keys[b * args.num_tokens + i];
      bool taken = key > cuts[b].threshold;
      if (key == cuts[b].threshold && cuts[b].ties > 0) {
        taken = true;
        --cuts[b].ties;
      }
      weights[at + b] = taken ? to_float(row[b * args.scores.stride_col]) : V{0};
      args.experts[at + b] = taken ? static_cast<int32_t>(first + b) : -1;
    }
  }

  int64_t token_of(int64_t i) const { return scopes.order == nullptr ? i : scopes.order[i]; }
  const T* row_of(int64_t i) const { return scores + token_of(i) * args.scores.stride_row; }
};

}  // namespace

namespace cpu {

void expert_choice(const ExpertChoiceArgs& args) {
  const int64_t experts = args.num_experts, tokens = args.num_tokens, threads = num_threads();
  const Scopes scopes = group_by_scope(args);
  // Small work stays on one thread; otherwise every thread gets a block.
  const bool small = experts * tokens < 8192;
  const int64_t width = std::min(kMaxBlock, small ? experts : (experts + threads - 1) / threads);
  const int64_t blocks = (experts + width - 1) / width;
  const int64_t workers = small ? 1 : std::min(threads, blocks);
  dispatch_float(args.dtype, [&](auto element) {
    using T = decltype(element);
    using Key = typename Chooser<T>::Key;
    const Chooser<T> chooser{args, scopes, static_cast<const T*>(args.scores.data),
                             static_cast<accumulate_t<T>*>(args.weights)};
    const int64_t keys = (width + 1) * tokens;
    Key* memory = static_cast<Key*>(scratch(Scratch::kReduction, workers * keys * sizeof(Key)));
    parallel_workers(workers, [&](int worker) {
      for (int64_t b = blocks * worker / workers; b < blocks * (worker + 1) / workers; ++b)
        chooser.block(b * width, std::min(width, experts - b * width), memory + worker * keys);
    });
  });
}

}  // namespace cpu
}  // namespace fastmoe_route
