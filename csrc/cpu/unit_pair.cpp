#include "unit_pair.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace shifcon {

PreparedPair checked_pair(const Tensor& a, const Tensor& b, double scale) {
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3, "a, b: wanted (L, N, d) and (L, M, d)");
  STD_TORCH_CHECK(a.size(0) == b.size(0) && a.size(2) == b.size(2) && a.scalar_type() == b.scalar_type(),
                  "b: wanted the dtype of a, as many problems and as many numbers a row");
  STD_TORCH_CHECK(std::isfinite(scale) && scale >= 0, "scale: got ", scale, "; wanted a finite number >= 0");
  PreparedPair prepared = {};
  UnitPair& p = prepared.pair;
  p.a = rows_of(a, "a", prepared.kept[0]);
  p.b = rows_of(b, "b", prepared.kept[1]);
  STD_TORCH_CHECK(p.a.dtype != Dtype::float64, "a: float64 is for the reference backend");
  p.problems = a.size(0);
  p.rows_a = a.size(1);
  p.rows_b = b.size(1);
  p.pairs = p.a.dtype == Dtype::bfloat16 && level() == Level::avx512_bf16;
  return prepared;
}

void prepare(PreparedPair& prepared, bool normalize, bool recenter, bool whole_problems) {
  UnitPair& p = prepared.pair;
  if (normalize) {
    prepared.inverse = empty({p.a.count + p.b.count}, ScalarType::Float);
    p.inverse_a = static_cast<float*>(prepared.inverse->data_ptr());
    p.inverse_b = p.inverse_a + p.a.count;
    p.lengths_by_problem = whole_problems && !recenter;
    auto* lengths = SHIFCON_PICK(pair_lengths);
    if (!p.lengths_by_problem) {
      torch::stable::parallel_for(0, p.a.count + p.b.count, grain(p.a.width),
                                  [&](int64_t begin, int64_t end) { lengths(p, begin, end); });
    }
  }
  if (recenter) {
    prepared.offset = empty({p.problems, p.a.width}, ScalarType::Float);
    p.offset = static_cast<float*>(prepared.offset->data_ptr());
    auto* offset = SHIFCON_PICK(pair_offset);
    torch::stable::parallel_for(0, p.problems * blocks(p.a.width, kColumnsOfTask),
                                grain((p.rows_a + p.rows_b) * std::min(p.a.width, kColumnsOfTask)),
                                [&](int64_t begin, int64_t end) { offset(p, begin, end); });
  }
}

PairGradient gradient_of(const PreparedPair& prepared, bool need_a, bool need_b, const Tensor& a, const Tensor& b,
                         std::vector<Tensor>& results, OptionalTensor (&kept)[2]) {
  PairGradient g = {};
  g.pair = prepared.pair;
  if (need_a) {
    results.push_back(empty(a.sizes(), a.scalar_type()));
    g.grad_a = results.back().data_ptr();
  }
  if (need_b) {
    results.push_back(empty(b.sizes(), b.scalar_type()));
    g.grad_b = results.back().data_ptr();
  }
  if (prepared.offset) {
    kept[0] = empty({g.pair.problems, g.pair.rows_a}, ScalarType::Float);
    kept[1] = empty({g.pair.problems, g.pair.a.width}, ScalarType::Float);
    g.row_weights = static_cast<float*>(kept[0]->data_ptr());
    g.total = static_cast<float*>(kept[1]->data_ptr());
  }
  // Smaller tiles where there would be fewer than threads.
  const int64_t threads = torch::stable::get_num_threads();
  for (g.tile = kTile; g.tile > kTile / 4 && gradient_tasks(g) < threads;) g.tile /= 2;
  return g;
}

void sum_weighted_rows(const PairGradient& g) {
  auto* total = SHIFCON_PICK(pair_total);
  torch::stable::parallel_for(0, g.pair.problems * blocks(g.pair.a.width, kColumnsOfTask),
                              grain(g.pair.rows_a * std::min(g.pair.a.width, kColumnsOfTask)),
                              [&](int64_t begin, int64_t end) { total(g, begin, end); });
}

}  // namespace shifcon
