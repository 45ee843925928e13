// assign_balanced on the CPU: the auction of Bertsekas, tokens bidding one after another, with T / E equal seats per
// expert (Bertsekas and Castanon 1989). One thread: a bid depends on the prices that the bid before it left.
//
// A seat's price starts at 0. A waiting token bids for the cheapest seat of the expert with the largest score - price,
// and raises it to where the second best seat, of any expert, would be as good, plus eps; whoever held the seat waits
// again. Every token then ends within eps of its best seat at the final prices, hence the total within T * eps of the
// optimum. Some seat stays free, at price 0, while a token waits, so no price passes the score range + 2 eps and
// there are at most T * (range / eps + 2) bids of O(E + log(T / E)). Scores are shifted to start at 0, in double, so
// that eps is never lost to rounding.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/workspace.h"
#include "ops/assign_balanced.h"

namespace fastmoe_route {
namespace {

struct Seat {
  double price;
  int32_t token;
};
bool is_dearer(const Seat& a, const Seat& b) { return a.price > b.price; }

// What a token would pay beside its score: the cheapest seat of every expert, and the second cheapest.
struct Auction {
  int64_t num_experts, seats_per_expert;
  double eps;
  std::vector<std::vector<Seat>> taken;  // a heap per expert, cheapest first
  std::vector<double> cheapest;          // 0 while a seat is free

  Auction(int64_t tokens, int64_t experts, double step)
      : num_experts(experts), seats_per_expert(tokens / experts), eps(step), taken(static_cast<size_t>(experts)),
        cheapest(static_cast<size_t>(experts), 0.0) {
    for (auto& heap : taken) heap.reserve(static_cast<size_t>(seats_per_expert) + 1);
  }

  double second_cheapest(int64_t expert) const {
    const auto& heap = taken[expert];
    const int64_t free = seats_per_expert - static_cast<int64_t>(heap.size());
    if (free >= 2) return 0.0;
    if (free == 1) return heap.empty() ? std::numeric_limits<double>::infinity() : heap.front().price;
    double second = std::numeric_limits<double>::infinity();
    for (size_t child = 1; child <= 2 && child < heap.size(); ++child) second = std::min(second, heap[child].price);
    return second;
  }

  // The token that lost its seat, or -1.
  int32_t bid(const double* score, int32_t token) {
    int64_t best = 0;
    double value = score[0] - cheapest[0], next = -std::numeric_limits<double>::infinity();
    for (int64_t e = 1; e < num_experts; ++e) {
      const double other = score[e] - cheapest[e];
      next = std::max(next, std::min(other, value));
      if (other > value) {
        value = other;
        best = e;
      }
    }
    next = std::max(next, score[best] - second_cheapest(best));
    const double raise = next == -std::numeric_limits<double>::infinity() ? 0.0 : value - next;
    auto& heap = taken[best];
    int32_t loser = -1;
    if (static_cast<int64_t>(heap.size()) == seats_per_expert) {
      loser = heap.front().token;
      std::pop_heap(heap.begin(), heap.end(), is_dearer);
      heap.pop_back();
    }
    heap.push_back({cheapest[best] + raise + eps, token});
    std::push_heap(heap.begin(), heap.end(), is_dearer);
    if (static_cast<int64_t>(heap.size()) == seats_per_expert) cheapest[best] = heap.front().price;
    return loser;
  }
};

// Scores as doubles that start at 0; returns their range, or infinity or NaN if one is not finite.
template <class T>
double shifted(const AssignBalancedArgs& args, double* shifted_scores) {
  const T* scores = static_cast<const T*>(args.scores.data);
  double low = std::numeric_limits<double>::infinity(), high = -low, probe = 0.0;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    for (int64_t e = 0; e < args.num_experts; ++e) {
      const double score = to_float(scores[t * args.scores.stride_row + e * args.scores.stride_col]);
      shifted_scores[t * args.num_experts + e] = score;
      probe += score * 0.0;  // NaN from then on if the score is not finite
      low = std::min(low, score);
      high = std::max(high, score);
    }
  }
  for (int64_t i = 0; i < args.num_tokens * args.num_experts; ++i) shifted_scores[i] -= low;
  return high - low + probe;
}

}  // namespace

namespace cpu {

bool assign_balanced(const AssignBalancedArgs& args) {
  const int64_t tokens = args.num_tokens, experts = args.num_experts;
  const size_t score_bytes = static_cast<size_t>(tokens * experts) * sizeof(double);
  char* memory = static_cast<char*>(scratch(Scratch::kReduction, score_bytes + tokens * sizeof(int32_t)));
  double* scores = reinterpret_cast<double*>(memory);
  int32_t* waiting = reinterpret_cast<int32_t*>(memory + score_bytes);  // a stack
  double range = 0.0;
  dispatch_float(args.dtype, [&](auto element) { range = shifted<decltype(element)>(args, scores); });
  if (!(range < std::numeric_limits<double>::infinity())) return false;

  Auction auction(tokens, experts, std::max(range / 50, 1e-4));
  for (int64_t t = 0; t < tokens; ++t) waiting[t] = static_cast<int32_t>(tokens - 1 - t);
  for (int64_t count = tokens; count > 0;) {
    const int32_t token = waiting[--count];
    const int32_t loser = auction.bid(scores + token * experts, token);
    if (loser >= 0) waiting[count++] = loser;
  }
  for (int64_t e = 0; e < experts; ++e)
    for (const Seat& seat : auction.taken[e]) args.experts[seat.token] = static_cast<int32_t>(e);
  return true;
}

}  // namespace cpu
}  // namespace fastmoe_route
