// reroute on the CPU, scope by scope on the calling thread.
//
//   prepare   ids are checked, and every candidate is marked that may ask at all
//   rounds    the askers of a round are collected, grouped by expert and, where an expert has less room than askers,
//             cut by quickselect; experts that nobody asks for cost nothing
//   finish    every token's granted columns, in rising order
// The fallback columns are walked for the tokens that are still short only, and no further than until there are none.
// Bytes: the candidates once, results once, and 32 for each asker of the largest round.
#include <algorithm>
#include <cstring>
#include <limits>

#include "common/workspace.h"
#include "cpu/keep_order.h"
#include "ops/reroute.h"

namespace fastmoe_route {
namespace {

enum State : uint8_t { kNever, kMayAsk, kGranted };

struct Ask {
  uint64_t key;
  int32_t slot;  // token * M + column
  int32_t expert;
};

// Tokens, in rising order.
struct Tokens {
  const int32_t* begin;
  const int32_t* end;
};

template <class Id>
class Rerouter {
 public:
  explicit Rerouter(const RerouteArgs& args) : args_(args), ids_(static_cast<const Id*>(args.experts)) {
    const int64_t tokens = args.num_tokens, experts = args.num_experts, slots = tokens * args.num_candidates;
    const int64_t later = args.fill == Fill::kNone ? 1 : args.num_candidates - args.top_k;
    const int64_t most_asks = tokens * std::max({args.top_k, later, int64_t{1}});
    const int64_t bytes =
        2 * most_asks * sizeof(Ask) + (3 * tokens + 5 * experts) * sizeof(int32_t) + slots * sizeof(State);
    asks_ = static_cast<Ask*>(scratch(Scratch::kPlan, bytes));
    grouped_ = asks_ + most_asks;
    order_ = reinterpret_cast<int32_t*>(grouped_ + most_asks);
    short_tokens_ = order_ + tokens;
    missing_ = short_tokens_ + tokens;
    room_ = missing_ + tokens;
    count_ = room_ + experts;
    next_ = count_ + experts;
    asked_ = next_ + experts;
    last_ = asked_ + experts;
    state_ = reinterpret_cast<State*>(last_ + experts);
    std::fill_n(count_, experts, 0);
    std::fill_n(last_, experts, 0);
  }

  PlanStatus run() {
    const PlanStatus status = prepare();
    if (status.kind != PlanStatus::kOk) return status;
    for (int64_t token = 0; token < args_.num_tokens; ++token) order_[token] = static_cast<int32_t>(token);
    const int32_t* const end = order_ + args_.num_tokens;
    if (args_.scope_ids == nullptr) {
      one_scope({order_, end});
    } else {
      const int32_t* scopes = args_.scope_ids;
      std::stable_sort(order_, order_ + args_.num_tokens, [=](int32_t a, int32_t b) { return scopes[a] < scopes[b]; });
      for (const int32_t* begin = order_; begin < end;) {
        const int32_t* scope_end = begin;
        while (scope_end < end && scopes[*scope_end] == scopes[*begin]) ++scope_end;
        one_scope({begin, scope_end});
        begin = scope_end;
      }
    }
    finish();
    return {};
  }

 private:
  // A candidate that an earlier column names as well never asks: it would be refused, or be a second row.
  PlanStatus prepare() {
    for (int64_t token = 0; token < args_.num_tokens; ++token) {
      missing_[token] = 0;
      for (int64_t column = 0; column < args_.num_candidates; ++column) {
        const int64_t slot = token * args_.num_candidates + column;
        const Id id = ids_[slot];
        state_[slot] = kNever;
        if (id == -1) continue;
        if (id < 0 || id >= args_.num_experts) return {PlanStatus::kBadExpert, static_cast<int64_t>(id), slot};
        const bool is_choice = column < args_.top_k;
        const int32_t stamp = static_cast<int32_t>(token + 1);
        if (is_choice || last_[id] != stamp) state_[slot] = kMayAsk;
        last_[id] = stamp;
        missing_[token] += is_choice;
      }
    }
    return {};
  }

  void one_scope(Tokens tokens) {
    const int64_t top = std::numeric_limits<int32_t>::max();
    std::fill_n(room_, args_.num_experts, static_cast<int32_t>(std::min(args_.capacity, top)));
    const bool by_score = args_.drop_policy == DropPolicy::kScore;
    grant(collect(tokens, 0, args_.top_k, by_score, false));
    if (args_.overflow != Overflow::kDrop) {
      Tokens left = still_short(tokens);
      for (int64_t column = args_.top_k; column < args_.num_candidates && left.begin < left.end; ++column) {
        grant(collect(left, column, column + 1, by_score, args_.overflow == Overflow::kLocal));
        left = still_short(left);
      }
    }
    if (args_.fill != Fill::kNone) {
      const Tokens askers = args_.fill == Fill::kTurnedAway ? still_short(tokens) : tokens;
      grant(collect(askers, args_.top_k, args_.num_candidates, true, false));
    }
  }

  // Safe where `tokens` is the list written before: it only shrinks.
  Tokens still_short(Tokens tokens) {
    int32_t* end = short_tokens_;
    for (const int32_t* token = tokens.begin; token < tokens.end; ++token) {
      if (missing_[*token] > 0) *end++ = *token;
    }
    return {short_tokens_, end};
  }

  // The askers among candidates [first, last) of some tokens, in slot order; returns how many.
  int64_t collect(Tokens tokens, int64_t first, int64_t last, bool by_score, bool is_local) {
    if (!by_score) {
      return collect_by(tokens, first, last, is_local, [&](int64_t slot, int64_t token) {
        const int64_t column = slot - token * args_.num_candidates;
        return position_key(static_cast<uint32_t>(column), static_cast<uint32_t>(token));
      });
    }
    int64_t count = 0;
    dispatch_float(args_.weights_dtype, [&](auto sample) {
      const auto* weights = static_cast<const decltype(sample)*>(args_.weights);
      count =
          collect_by(tokens, first, last, is_local, [&](int64_t slot, int64_t) { return falling_key(weights[slot]); });
    });
    return count;
  }

  template <class KeyOf>
  int64_t collect_by(Tokens tokens, int64_t first, int64_t last, bool is_local, const KeyOf& key_of) {
    int64_t count = 0;
    for (const int32_t* it = tokens.begin; it < tokens.end; ++it) {
      const int64_t token = *it;
      for (int64_t column = first; column < last; ++column) {
        const int64_t slot = token * args_.num_candidates + column;
        if (state_[slot] != kMayAsk) continue;
        const int32_t expert = static_cast<int32_t>(ids_[slot]);
        if (room_[expert] == 0) continue;
        if (is_local && args_.rank_of_expert[expert] != args_.rank_of_token[token]) continue;
        asks_[count++] = {key_of(slot, token), static_cast<int32_t>(slot), expert};
      }
    }
    return count;
  }

  // Every expert takes the best of the first `num_asks` askers while it has room.
  void grant(int64_t num_asks) {
    int64_t num_asked = 0;
    for (int64_t i = 0; i < num_asks; ++i) {
      if (count_[asks_[i].expert]++ == 0) asked_[num_asked++] = asks_[i].expert;
    }
    int32_t start = 0;
    for (int64_t i = 0; i < num_asked; ++i) {
      next_[asked_[i]] = start;
      start += count_[asked_[i]];
    }
    for (int64_t i = 0; i < num_asks; ++i) grouped_[next_[asks_[i].expert]++] = asks_[i];
    for (int64_t i = 0; i < num_asked; ++i) {
      const int32_t expert = asked_[i];
      Ask* const end = grouped_ + next_[expert];
      Ask* const begin = end - count_[expert];
      Ask* refused = end;
      if (count_[expert] > room_[expert]) {
        refused = begin + room_[expert];
        std::nth_element(begin, refused, end,
                         [](const Ask& a, const Ask& b) { return a.key != b.key ? a.key < b.key : a.slot < b.slot; });
      }
      for (const Ask* ask = begin; ask < refused; ++ask) {
        state_[ask->slot] = kGranted;
        --missing_[ask->slot / static_cast<int32_t>(args_.num_candidates)];
      }
      room_[expert] -= static_cast<int32_t>(refused - begin);
      count_[expert] = 0;
    }
  }

  void finish() {
    std::fill_n(args_.demand, args_.num_experts, 0);
    for (int64_t token = 0; token < args_.num_tokens; ++token) {
      int64_t out = token * args_.width;
      const int64_t out_end = out + args_.width;
      for (int64_t column = 0; column < args_.num_candidates; ++column) {
        const int64_t slot = token * args_.num_candidates + column;
        if (state_[slot] != kGranted) continue;
        args_.choice[out] = static_cast<int32_t>(column);
        args_.granted[out++] = static_cast<int32_t>(ids_[slot]);
        ++args_.demand[ids_[slot]];
      }
      std::fill(args_.choice + out, args_.choice + out_end, -1);
      std::fill(args_.granted + out, args_.granted + out_end, -1);
    }
  }

  const RerouteArgs& args_;
  const Id* const ids_;
  Ask* asks_;              // of a round, in slot order
  Ask* grouped_;           // the same by expert
  int32_t* order_;         // [T] tokens by scope
  int32_t* short_tokens_;  // [T] those still short of experts
  int32_t* missing_;       // [T] how many experts a token is short of; negative after a fill
  int32_t* room_;          // [E] of the scope
  int32_t* count_;         // [E] askers in this round; 0 between rounds
  int32_t* next_;          // [E]
  int32_t* asked_;         // [E] the experts with askers
  int32_t* last_;          // [E] 1 + the last token that named the expert
  State* state_;           // [T, M]
};

}  // namespace

namespace cpu {

void reroute(const RerouteArgs& args) {
  if (args.scope_ids != nullptr) *args.status = judge_scopes(args.scope_ids, args.num_tokens, args.num_scopes);
  if (args.status->kind != PlanStatus::kOk) return;
  *args.status = args.experts_are_int64 ? Rerouter<int64_t>(args).run() : Rerouter<int32_t>(args).run();
}

}  // namespace cpu
}  // namespace fastmoe_route
