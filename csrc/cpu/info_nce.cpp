// info_nce on the CPU: arguments, results, threads. The arithmetic: kernels/info_nce.cpp.

#include "info_nce.h"

#include <algorithm>
#include <vector>

#include "unit_pair.h"

namespace shifcon {
namespace {

PreparedPair checked_square_pair(const Tensor& a, const Tensor& b, double scale) {
  PreparedPair prepared = checked_pair(a, b, scale);
  STD_TORCH_CHECK(prepared.pair.rows_a == prepared.pair.rows_b && prepared.pair.rows_a > 0,
                  "b: wanted the shape of a, with at least one row");
  return prepared;
}

// Rows of S that one task takes: a whole problem, unless problems are few and large.
int64_t stripe_of(const UnitPair& p) {
  constexpr int64_t kTasksPerThread = 4, kRowsWorthATask = 2 * kTile;
  const int64_t wanted = kTasksPerThread * torch::stable::get_num_threads() / std::max<int64_t>(p.problems, 1);
  const int64_t stripes = std::max<int64_t>(1, std::min(wanted, p.rows_a / kRowsWorthATask));
  return blocks(blocks(p.rows_a, stripes), kTile) * kTile;
}

std::tuple<Tensor, Tensor, Tensor> loss_of(const Tensor& a, const Tensor& b, double scale, bool normalize,
                                           bool recenter) {
  PreparedPair prepared = checked_square_pair(a, b, scale);
  const UnitPair& p = prepared.pair;
  const int64_t problems = p.problems, count = p.rows_a, all = problems * count;
  const Tensor loss = empty({problems}, ScalarType::Float);
  const Tensor row_parts = empty({2, problems, count}, ScalarType::Float);
  const Tensor column_parts = empty({2, problems, count}, ScalarType::Float);
  if (problems == 0) return {loss, row_parts, column_parts};
  NceForward f = {};
  f.scale = static_cast<float>(scale);
  f.stripe = stripe_of(p);
  f.stripes = blocks(count, f.stripe);
  prepare(prepared, normalize, recenter, f.stripes == 1 && problems >= torch::stable::get_num_threads());
  f.pair = p;
  const Tensor diagonal = empty({problems, count}, ScalarType::Float);
  const Tensor partial = f.stripes > 1 ? empty({f.stripes, 2, problems, count}, ScalarType::Float) : column_parts;
  f.row_parts = static_cast<float*>(row_parts.data_ptr());
  f.column_parts = static_cast<float*>(partial.data_ptr());
  f.diagonal = static_cast<float*>(diagonal.data_ptr());
  auto* kernel = SHIFCON_PICK(nce_forward);
  torch::stable::parallel_for(0, problems * f.stripes,
                              grain_of_products(std::min(f.stripe, count) * count * p.a.width),
                              [&](int64_t begin, int64_t end) { kernel(f, begin, end); });
  auto* merge = SHIFCON_PICK(nce_merge_columns);
  torch::stable::parallel_for(0, all, grain(64 * f.stripes),
                              [&](int64_t begin, int64_t end) { merge(f, begin, end); });
  float* columns = static_cast<float*>(column_parts.data_ptr());
  if (f.stripes > 1) std::copy(f.column_parts, f.column_parts + 2 * all, columns);
  for (int64_t problem = 0; problem < problems; ++problem) {
    double total = 0;
    for (int64_t row = problem * count; row < (problem + 1) * count; ++row) {
      total += (f.row_parts[row] - f.diagonal[row]) + f.row_parts[all + row];
      total += (columns[row] - f.diagonal[row]) + columns[all + row];
    }
    static_cast<float*>(loss.data_ptr())[problem] = static_cast<float>(total / (2.0 * static_cast<double>(count)));
  }
  return {loss, row_parts, column_parts};
}

const float* parts_of(const Tensor& parts, const UnitPair& p, const char* name, OptionalTensor& keep) {
  STD_TORCH_CHECK(parts.is_cpu() && parts.scalar_type() == ScalarType::Float && parts.dim() == 3 &&
                      parts.size(0) == 2 && parts.size(1) == p.problems && parts.size(2) == p.rows_a,
                  name, ": wanted (2, L, N), float32, on the CPU");
  if (!parts.is_contiguous()) keep = torch::stable::contiguous(parts);
  return static_cast<const float*>(keep ? keep->data_ptr() : parts.data_ptr());
}

std::vector<Tensor> loss_gradient(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& row_parts,
                                  const Tensor& column_parts, double scale, bool normalize, bool recenter, bool need_a,
                                  bool need_b) {
  PreparedPair prepared = checked_square_pair(a, b, scale);
  const UnitPair& p = prepared.pair;
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == ScalarType::Float && grad.dim() == 1 &&
                      grad.size(0) == p.problems,
                  "grad: wanted (L,), float32, on the CPU");
  OptionalTensor kept[4];
  NceBackward n = {};
  n.row_parts = parts_of(row_parts, p, "row_parts", kept[0]);
  n.column_parts = parts_of(column_parts, p, "column_parts", kept[1]);
  std::vector<Tensor> results;
  const int64_t count = p.rows_a;
  const bool whole_problems = count <= kTile && p.problems >= torch::stable::get_num_threads();
  if (p.problems > 0) prepare(prepared, normalize, recenter, whole_problems);
  OptionalTensor kept_gradient[2];
  n.gradient = gradient_of(prepared, need_a, need_b, a, b, results, kept_gradient);
  if (p.problems == 0 || results.empty()) return results;

  n.scale = static_cast<float>(scale);
  std::vector<float> weight(p.problems), share(p.problems);
  const double part = 1 / (2.0 * static_cast<double>(p.rows_a));
  for (int64_t problem = 0; problem < p.problems; ++problem) {
    const float above = static_cast<const float*>(grad.data_ptr())[problem * grad.stride(0)];
    weight[problem] = above * static_cast<float>(scale * part);
    share[problem] = above * static_cast<float>(part);
  }
  n.weight = weight.data();
  n.share = share.data();

  if (whole_problems) {
    auto* kernel = SHIFCON_PICK(nce_backward_whole);
    torch::stable::parallel_for(0, p.problems, grain_of_products(3 * count * count * p.a.width),
                                [&](int64_t begin, int64_t end) { kernel(n, begin, end); });
    return results;
  }
  if (n.gradient.total) {
    auto* kernel = SHIFCON_PICK(nce_row_weights);
    torch::stable::parallel_for(0, p.problems * blocks(count, kTile),
                                grain_of_products(std::min(count, kTile) * count * p.a.width),
                                [&](int64_t begin, int64_t end) { kernel(n, begin, end); });
    sum_weighted_rows(n.gradient);
  }
  auto* kernel = SHIFCON_PICK(nce_backward);
  torch::stable::parallel_for(0, gradient_tasks(n.gradient),
                              grain_of_products(2 * std::min(count, n.gradient.tile) * count * p.a.width),
                              [&](int64_t begin, int64_t end) { kernel(n, begin, end); });
  return results;
}

}  // namespace
}  // namespace shifcon

STABLE_TORCH_LIBRARY_FRAGMENT(shifcon_fast_cpu, m) {
  m.def(
      "info_nce(Tensor a, Tensor b, float scale, bool normalize, bool recenter) "
      "-> (Tensor loss, Tensor row_parts, Tensor column_parts)");
  m.def(
      "info_nce_backward(Tensor grad, Tensor a, Tensor b, Tensor row_parts, Tensor column_parts, float scale, "
      "bool normalize, bool recenter, bool need_a, bool need_b) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cpu, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&shifcon::loss_of));
  m.impl("info_nce_backward", TORCH_BOX(&shifcon::loss_gradient));
}
