// The operators of the CPU library. Python calls them as torch.ops.shifcon_fast_cpu.*, below autograd; arguments and
// results are those of shifcon_fast/ops/reference, except that an optional result comes back empty.

#include "cache.h"
#include "levels.h"
#include "tensors.h"

namespace shifcon {

int64_t cpu_level() { return static_cast<int64_t>(level()); }

}  // namespace shifcon

STABLE_TORCH_LIBRARY(shifcon_fast_cpu, m) {
  m.def("level() -> int");
  m.def("cache_bytes() -> int");
  m.def(
      "add_shift_rms_norm(Tensor x, Tensor weight, Tensor? residual, Tensor? shift, Tensor? index, float eps, "
      "int style) -> (Tensor y, Tensor h, Tensor rstd)");
  m.def(
      "add_shift_rms_norm_backward(Tensor? grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor rstd, "
      "Tensor? index, int languages, int style, bool need_input, bool need_weight, bool need_shift) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("level", TORCH_BOX(&shifcon::cpu_level));
  m.impl("cache_bytes", TORCH_BOX(&shifcon::cache_bytes));
}
