// The CPU library, to which every operator's file adds its own. Python calls them as torch.ops.shifcon_fast_cpu.*, below
// autograd; arguments and results are those of shifcon_fast/ops/reference, except that an optional result comes back
// empty.

#include "cache.h"
#include "levels.h"
#include "tensors.h"

namespace shifcon {

int64_t cpu_level() { return static_cast<int64_t>(level()); }

}  // namespace shifcon

STABLE_TORCH_LIBRARY(shifcon_fast_cpu, m) {
  m.def("level() -> int");
  m.def("cache_bytes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("level", TORCH_BOX(&shifcon::cpu_level));
  m.impl("cache_bytes", TORCH_BOX(&shifcon::cache_bytes));
}
