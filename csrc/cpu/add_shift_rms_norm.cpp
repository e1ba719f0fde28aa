// add_shift_rms_norm on the CPU: arguments, results, threads. The arithmetic: kernels/add_shift_rms_norm.cpp.

#include "add_shift_rms_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cache.h"
#include "tensors.h"

namespace shifcon {
namespace {

Style style_of(int64_t style) {
  STD_TORCH_CHECK(style >= 0 && style <= 2, "style: got ", style, "; wanted 0 (llama), 1 (gemma) or 2 (olmo)");
  return static_cast<Style>(style);
}

// A table whose rows have the width of x: `dims` is 1 for a single row.
Rows table_of(const Tensor& table, const char* name, int64_t dims, const Rows& x, OptionalTensor& keep) {
  STD_TORCH_CHECK(table.dim() == dims && table.size(dims - 1) == x.width, name, ": wanted ", dims,
                  " dimensions, the last of ", x.width);
  return rows_of(table, name, keep);
}

Rows hidden_states(const Tensor& x, const char* name, OptionalTensor& keep) {
  const Rows rows = rows_of(x, name, keep);
  STD_TORCH_CHECK(rows.dtype != Dtype::float64, name, ": float64 is for the reference backend");
  return rows;
}

Rows like(const Tensor& tensor, const char* name, const Tensor& x, OptionalTensor& keep) {
  check_like(tensor, name, x, "x");
  return rows_of(tensor, name, keep);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, OptionalTensor residual,
                                           OptionalTensor shift, OptionalTensor index, double eps,
                                           int64_t style) {
  OptionalTensor kept[5];
  NormForward p;
  STD_TORCH_CHECK(eps > 0 && std::isfinite(eps), "eps: wanted a finite number > 0");
  STD_TORCH_CHECK(shift.has_value() == index.has_value(), "shift, index: wanted both or neither");
  p.x = hidden_states(x, "x", kept[0]);
  p.weight = table_of(weight, "weight", 1, p.x, kept[1]);
  if (residual) p.residual = like(*residual, "residual", x, kept[2]);
  if (shift) {
    p.shift = table_of(*shift, "shift", 2, p.x, kept[3]);
    p.index = ids_of(*index, x, shift->size(0), "index", kept[4]);
  }
  p.eps = static_cast<float>(eps);
  p.style = style_of(style);
  const auto shape = x.sizes();
  const Tensor y = empty(shape, x.scalar_type());
  const Tensor h = residual || shift ? empty(shape, x.scalar_type()) : empty({0}, x.scalar_type());
  const Tensor rstd = empty({shape.data(), shape.size() - 1}, ScalarType::Float);
  p.y = y.data_ptr();
  p.h = residual || shift ? h.data_ptr() : nullptr;
  p.rstd = static_cast<float*>(rstd.data_ptr());
  p.past_cache = p.h ? past_cache(y, 2) && past_cache(h, 2) : past_cache(y);
  auto* kernel = SHIFCON_PICK(norm_forward);
  torch::stable::parallel_for(0, p.x.count, grain(p.x.width),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {y, h, rstd};
}

std::vector<Tensor> backward(OptionalTensor grad_y, OptionalTensor grad_h, const Tensor& h, const Tensor& weight,
                             const Tensor& rstd, OptionalTensor index, int64_t languages, int64_t style,
                             bool need_input, bool need_weight, bool need_shift) {
  OptionalTensor kept[5];
  NormBackward p = {};
  p.h = hidden_states(h, "h", kept[0]);
  p.weight = table_of(weight, "weight", 1, p.h, kept[1]);
  if (grad_y) p.grad_y = like(*grad_y, "grad_y", h, kept[2]);
  if (grad_h) p.grad_h = like(*grad_h, "grad_h", h, kept[3]);
  STD_TORCH_CHECK(grad_y || grad_h, "grad_y, grad_h: got neither; wanted at least one");
  STD_TORCH_CHECK(rstd.is_cpu() && rstd.scalar_type() == ScalarType::Float && rstd.numel() == p.h.count &&
                      rstd.is_contiguous(),
                  "rstd: wanted one float32 per row of h");
  p.rstd = static_cast<const float*>(rstd.data_ptr());
  p.style = style_of(style);
  need_weight = need_weight && grad_y.has_value();
  if (need_shift) {
    STD_TORCH_CHECK(index.has_value(), "index: wanted for the gradient of shift");
    p.index = ids_of(*index, h, languages, "index", kept[4]);
  }

  const int64_t width = p.h.width, threads = torch::stable::get_num_threads();
  // A chunk of rows is what one partial sum of ∂L/∂w covers, so there are as many as threads.
  const int64_t smallest = grain(width);
  p.chunk = need_weight ? std::max((p.h.count + threads - 1) / threads, smallest) : 1;
  const int64_t chunks = (p.h.count + p.chunk - 1) / p.chunk;
  std::vector<Tensor> results;
  Tensor along = h, partial = h;
  if (need_input) {
    results.push_back(empty(h.sizes(), h.scalar_type()));
    p.grad_input = results.back().data_ptr();
    p.past_cache = past_cache(results.back());
  }
  if (need_weight) {
    results.push_back(empty({width}, ScalarType::Float));
    partial = empty({std::max<int64_t>(chunks, 1), width}, ScalarType::Float);
    p.grad_weight = static_cast<float*>(partial.data_ptr());
  }
  const Tensor* grad_weight = need_weight ? &results.back() : nullptr;
  if (need_shift && grad_y) {
    along = empty({p.h.count}, ScalarType::Float);
    p.along = static_cast<float*>(along.data_ptr());
  }
  if (p.grad_input || p.grad_weight || p.along) {
    auto* kernel = SHIFCON_PICK(norm_backward);
    torch::stable::parallel_for(0, chunks, need_weight ? 1 : smallest,
                                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }
  if (grad_weight) {
    float* total = static_cast<float*>(grad_weight->data_ptr());
    for (int64_t at = 0; at < width; ++at) total[at] = chunks > 0 ? p.grad_weight[at] : 0;
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t at = 0; at < width; ++at) total[at] += p.grad_weight[chunk * width + at];
  }
  if (need_shift) {
    results.push_back(zeros({languages, width}, ScalarType::Float));
    p.grad_shift = static_cast<float*>(results.back().data_ptr());
    auto* kernel = SHIFCON_PICK(norm_backward_shift);
    // Whole groups of columns, so that the number of threads does not decide which of them a kernel takes in vectors.
    constexpr int64_t kGroup = 64;
    torch::stable::parallel_for(0, (width + kGroup - 1) / kGroup, grain(p.h.count * kGroup),
                                [&](int64_t begin, int64_t end) {
                                  kernel(p, begin * kGroup, std::min(end * kGroup, width));
                                });
  }
  return results;
}

}  // namespace
}  // namespace shifcon

STABLE_TORCH_LIBRARY_FRAGMENT(shifcon_fast_cpu, m) {
  m.def(
      "add_shift_rms_norm(Tensor x, Tensor weight, Tensor? residual, Tensor? shift, Tensor? index, float eps, "
      "int style) -> (Tensor y, Tensor h, Tensor rstd)");
  m.def(
      "add_shift_rms_norm_backward(Tensor? grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor rstd, "
      "Tensor? index, int languages, int style, bool need_input, bool need_weight, bool need_shift) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cpu, CPU, m) {
  m.impl("add_shift_rms_norm", TORCH_BOX(&shifcon::forward));
  m.impl("add_shift_rms_norm_backward", TORCH_BOX(&shifcon::backward));
}
