// contrastive_similarity on the CPU: arguments, results, threads. The arithmetic: kernels/contrastive_similarity.cpp.

#include "contrastive_similarity.h"

#include <algorithm>
#include <vector>

#include "unit_pair.h"

namespace shifcon {
namespace {

Tensor similarity(const Tensor& a, const Tensor& b, double scale, bool normalize, bool recenter) {
  PreparedPair prepared = checked_pair(a, b, scale);
  const UnitPair& p = prepared.pair;
  const Tensor out = empty({p.problems, p.rows_a, p.rows_b}, ScalarType::Float);
  const int64_t tasks = p.problems * blocks(p.rows_a, kTile) * blocks(p.rows_b, kTile);
  if (tasks == 0) return out;
  prepare(prepared, normalize, recenter);
  const SimilarityForward s = {p, static_cast<float>(scale), static_cast<float*>(out.data_ptr())};
  auto* kernel = SHIFCON_PICK(similarity_forward);
  torch::stable::parallel_for(
      0, tasks, grain_of_products(std::min(p.rows_a, kTile) * std::min(p.rows_b, kTile) * p.a.width),
      [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
  return out;
}

std::vector<Tensor> similarity_gradient(const Tensor& grad, const Tensor& a, const Tensor& b, double scale,
                                        bool normalize, bool recenter, bool need_a, bool need_b) {
  PreparedPair prepared = checked_pair(a, b, scale);
  const UnitPair& p = prepared.pair;
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == p.problems && grad.size(1) == p.rows_a &&
                      grad.size(2) == p.rows_b && grad.scalar_type() == ScalarType::Float && grad.is_cpu(),
                  "grad: wanted (L, N, M), float32, on the CPU");
  std::vector<Tensor> results;
  if (p.problems * p.rows_a * p.rows_b == 0) {
    if (need_a) results.push_back(zeros(a.sizes(), a.scalar_type()));
    if (need_b) results.push_back(zeros(b.sizes(), b.scalar_type()));
    return results;
  }
  prepare(prepared, normalize, recenter);
  OptionalTensor kept[2], kept_grad;
  SimilarityBackward s = {};
  s.gradient = gradient_of(prepared, need_a, need_b, a, b, results, kept);
  s.scale = static_cast<float>(scale);
  s.grad = rows_of(grad, "grad", kept_grad);
  if (s.gradient.total) {
    auto* weights = SHIFCON_PICK(similarity_row_weights);
    torch::stable::parallel_for(0, s.grad.count, grain(s.grad.width),
                                [&](int64_t begin, int64_t end) { weights(s, begin, end); });
    sum_weighted_rows(s.gradient);
  }
  auto* kernel = SHIFCON_PICK(similarity_backward);
  torch::stable::parallel_for(0, gradient_tasks(s.gradient),
                              grain_of_products(std::min(p.rows_a, s.gradient.tile) * p.rows_b * p.a.width),
                              [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
  return results;
}

}  // namespace
}  // namespace shifcon

STABLE_TORCH_LIBRARY_FRAGMENT(shifcon_fast_cpu, m) {
  m.def("contrastive_similarity(Tensor a, Tensor b, float scale, bool normalize, bool recenter) -> Tensor");
  m.def(
      "contrastive_similarity_backward(Tensor grad, Tensor a, Tensor b, float scale, bool normalize, bool recenter, "
      "bool need_a, bool need_b) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cpu, CPU, m) {
  m.impl("contrastive_similarity", TORCH_BOX(&shifcon::similarity));
  m.impl("contrastive_similarity_backward", TORCH_BOX(&shifcon::similarity_gradient));
}
