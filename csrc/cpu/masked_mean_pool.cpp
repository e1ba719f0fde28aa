// masked_mean_pool on the CPU: arguments, results, threads. The arithmetic: kernels/masked_mean_pool.cpp.

#include "masked_mean_pool.h"

#include <algorithm>

#include "cache.h"
#include "tensors.h"

namespace shifcon {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Mask mask_of(const Tensor& mask) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.dim() == 2, "mask: wanted a CPU tensor of two dimensions");
  Mask found;
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: found.bytes = 1; break;
    case ScalarType::Short: found.bytes = 2; break;
    case ScalarType::Int: found.bytes = 4; break;
    case ScalarType::Long: found.bytes = 8; break;
    default: STD_TORCH_CHECK(false, "mask: wanted bool or integers");
  }
  found.data = mask.data_ptr();
  found.batch = mask.size(0);
  found.tokens = mask.size(1);
  found.stride[0] = mask.stride(0);
  found.stride[1] = mask.stride(1);
  return found;
}

// Of `size` numbers (columns or tokens) in each of `rows` rows, how many make a unit of work: all of them, unless
// there are fewer rows than threads; a multiple of `multiple`.
int64_t unit_of(int64_t size, int64_t rows, int64_t most, int64_t multiple) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(torch::stable::get_num_threads(), std::max<int64_t>(rows, 1)));
  const int64_t part = ceil_div(ceil_div(size, parts), multiple) * multiple;
  return std::max<int64_t>(std::min(part, most), 1);
}

std::tuple<Tensor, Tensor> pool(const Tensor& h, const Tensor& mask, bool normalize) {
  // A running sum and its total fill half of a first-level cache of 32 KiB.
  constexpr int64_t kMostColumns = 2048, kCacheLine = 64;
  STD_TORCH_CHECK(h.dim() == 3, "h: wanted (batch, tokens, hidden)");
  PoolForward p = {};
  p.h = h.data_ptr();
  p.dtype = dtype_of(h, "h");
  STD_TORCH_CHECK(p.dtype != Dtype::float64, "h: float64 is for the reference backend");
  p.width = h.size(2);
  for (int dim = 0; dim < 3; ++dim) p.stride[dim] = h.stride(dim);
  if (p.width <= 1) p.stride[2] = 1;
  p.mask = mask_of(mask);
  const int64_t batch = p.mask.batch;
  STD_TORCH_CHECK(h.size(0) == batch && h.size(1) == p.mask.tokens, "mask: wanted the first two sizes of h");
  const Tensor pooled = empty({batch, p.width}, ScalarType::Float);
  const Tensor factor = empty({batch}, ScalarType::Float);
  p.pooled = static_cast<float*>(pooled.data_ptr());
  p.factor = static_cast<float*>(factor.data_ptr());
  p.columns = unit_of(p.width, batch, kMostColumns, kCacheLine);
  const int64_t units = batch * std::max<int64_t>(ceil_div(p.width, p.columns), 1);  // without columns: its factor
  auto* sum = SHIFCON_PICK(pool_forward);
  torch::stable::parallel_for(0, units, grain(p.columns * p.mask.tokens),
                              [&](int64_t begin, int64_t end) { sum(p, begin, end); });
  if (normalize) {
    auto* divide = SHIFCON_PICK(pool_normalize);
    torch::stable::parallel_for(0, batch, grain(p.width), [&](int64_t begin, int64_t end) { divide(p, begin, end); });
  }
  return {pooled, factor};
}

Tensor pool_gradient(const Tensor& grad, const Tensor& pooled, const Tensor& factor, const Tensor& mask,
                     ScalarType dtype, bool normalize) {
  OptionalTensor kept[2];
  PoolBackward p = {};
  p.mask = mask_of(mask);
  const int64_t batch = p.mask.batch;
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == batch, "grad: wanted (batch, hidden)");
  STD_TORCH_CHECK(factor.is_cpu() && factor.scalar_type() == ScalarType::Float && factor.dim() == 1 &&
                      factor.size(0) == batch,
                  "factor: wanted one float32 per row");
  const int64_t width = grad.size(1);
  const Tensor result = empty({batch, p.mask.tokens, width}, dtype);
  p.dtype = dtype_of(result, "dtype");
  STD_TORCH_CHECK(p.dtype != Dtype::float64, "dtype: float64 is for the reference backend");
  if (result.numel() == 0) return result;
  p.grad = rows_of(grad, "grad", kept[0]);
  if (normalize) {
    STD_TORCH_CHECK(pooled.dim() == 2 && pooled.size(0) == batch && pooled.size(1) == width,
                    "pooled: wanted the shape of grad");
    p.pooled = rows_of(pooled, "pooled", kept[1]);
  }
  p.factor = static_cast<const float*>(factor.data_ptr());
  p.factor_stride = factor.stride(0);
  p.grad_h = result.data_ptr();
  p.past_cache = past_cache(result);
  p.tokens = unit_of(p.mask.tokens, batch, p.mask.tokens, 1);
  auto* kernel = SHIFCON_PICK(pool_backward);
  torch::stable::parallel_for(0, batch * ceil_div(p.mask.tokens, p.tokens), grain(p.tokens * width),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return result;
}

}  // namespace
}  // namespace shifcon

STABLE_TORCH_LIBRARY_FRAGMENT(shifcon_fast_cpu, m) {
  m.def("masked_mean_pool(Tensor h, Tensor mask, bool normalize) -> (Tensor pooled, Tensor factor)");
  m.def(
      "masked_mean_pool_backward(Tensor grad, Tensor pooled, Tensor factor, Tensor mask, ScalarType dtype, "
      "bool normalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cpu, CPU, m) {
  m.impl("masked_mean_pool", TORCH_BOX(&shifcon::pool));
  m.impl("masked_mean_pool_backward", TORCH_BOX(&shifcon::pool_gradient));
}
