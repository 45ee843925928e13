// Branches, barriers of a block, the end of a thread, and what a kernel may call.
#include "engine/decoder.h"
#include "engine/machine.h"

namespace ptxvm {
namespace {

void nothing(Context&, const Instr&, uint32_t) {}
void trap(Context& c, const Instr&, uint32_t mask) {
  fault(c, "trap", "the kernel stopped itself", __builtin_ctz(mask));
}
void failed_assert(Context& c, const Instr&, uint32_t mask) {
  fault(c, "assert", "a device-side assert failed", __builtin_ctz(mask));
}
void fill_zero(Context& c, const Instr& in, uint32_t mask) {
  each_lane(mask, [&](int l) { set_lane(c, in.d, l, 0); });
  set_undefined(c, in.d, 0, mask);
}

bool decode_barrier(Decoder& d, Instr& in) {
  in.kind = Kind::kBarrier;
  in.cls = Class::kBarrier;
  const Type word{'u', 4, false};
  const bool reduces = d.has("red");
  in.mode = d.has("arrive") ? 1 : !reduces ? 0 : d.has("popc") ? 2 : d.has("and") ? 3 : 4;
  size_t next = 0;
  if (reduces) in.d = in.mode == 2 ? d.destination(next++) : d.predicate(d.text(next++));
  in.a = d.source(next++, word);
  const size_t last = d.num_operands() - (reduces ? 1 : 0);
  in.mode2 = 0;
  if (next < last) {
    in.mode2 = 1;
    in.b = d.source(next++, word);
  }
  if (reduces) in.list.push_back(d.predicate(d.text(last)));
  return true;
}

}  // namespace

bool decode_control(Decoder& d, Instr& in) {
  const std::string_view op = d.parts[0];
  in.cls = Class::kControl;
  if (op == "bra") {
    in.kind = Kind::kBranch;
    in.target = d.branch_target(d.text(0));
    return true;
  }
  if (op == "brx") {
    in.kind = Kind::kBranchTable;
    in.a = d.source(0, {'u', 4, false});
    return true;
  }
  if (op == "ret" || op == "exit") {
    in.kind = Kind::kExit;
    return true;
  }
  if (op == "bar" || op == "barrier") {
    if (d.has("cluster")) return false;
    return decode_barrier(d, in);
  }
  if (op == "trap") {
    in.run = trap;
    return true;
  }
  if (op == "nanosleep" || op == "pmevent" || op == "griddepcontrol") {
    in.run = nothing;
    return true;
  }
  if (op == "createpolicy") {
    in.d = d.destination(0);
    in.run = fill_zero;
    return true;
  }
  if (op == "call") {
    for (size_t i = 0; i < d.num_operands(); ++i) {
      if (d.text(i) == "__assertfail") return in.run = failed_assert, true;
      if (d.text(i) == "vprintf") return in.run = nothing, true;
    }
    d.fail("calls are not implemented");
  }
  return false;
}

}  // namespace ptxvm
