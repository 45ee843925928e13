// Host side of machine_peak, machine_read and machine_info.
#include "ops/machine.h"

#include "common/kept_memory.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "common/workspace.h"
#include "cpu/isa/table.h"

namespace fastmoe_route {
namespace {

void machine_peak(int64_t dtype_code, double flops) {
  check(dtype_code == 0 || dtype_code == 1, "machine_peak: dtype_code must be 0 (float32) or 1 (bfloat16), got ",
        dtype_code);
  check(flops > 0.0 && flops <= 1e15, "machine_peak: flops must be in (0, 1e15], got ", flops);
  const PeakArgs args{flops};
  if (dtype_code == 0) {
    cpu::peak_float32(args);
  } else {
    cpu::peak_bfloat16(args);
  }
}

double machine_read(const Tensor& buffer, int64_t passes) {
  check_dtype("machine_read", "buffer", buffer, ScalarType::Float);
  check(buffer.is_contiguous(), "machine_read: buffer must be contiguous, got shape ", shape_of(buffer));
  check(passes >= 1, "machine_read: passes must be at least 1, got ", passes);
  if (buffer.numel() == 0) return 0.0;
  float sum = 0.0f;
  cpu::read_all({static_cast<const float*>(buffer.const_data_ptr()), buffer.numel(), passes, &sum});
  return sum;
}

std::string machine_info() {
  std::ostringstream text;
  text << "level=" << kernels().level << ";best_level=" << best_level_name() << ";threads=" << num_threads()
       << ";scratch_bytes=" << scratch_bytes() << ";kept_bytes=" << kept_bytes();
  return text.str();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, CompositeExplicitAutograd, m) {
  m.impl("machine_peak", &boxed<&machine_peak>);
  m.impl("machine_info", &boxed<&machine_info>);
}

STABLE_TORCH_LIBRARY_IMPL(fastmoe_route, CPU, m) { m.impl("machine_read", &boxed<&machine_read>); }

}  // namespace fastmoe_route
