// subspace_project on the CPU: arguments, grouping of rows, results, threads. The arithmetic:
// kernels/subspace_project.cpp.

#include "subspace_project.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cache.h"
#include "tensors.h"

namespace shifcon {
namespace {

// Rows that share one packing of V. More bring little, and their coefficients would leave the cache.
constexpr int64_t kMostRows = 384;
constexpr int64_t kFewestRows = 16;
// Sums over rows run through partial sums of so many at most.
constexpr int64_t kRowsPerSegment = 512;
constexpr int64_t kSegmentsAtATime = 64;
constexpr int64_t kCoefficientsAtATime = 1 << 18;

int64_t ceil_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Call work(number of the thread, unit) for every unit; a thread takes the next unit when it is done with one, because
// units differ and so do threads.
template <class Function>
void for_each_unit(int64_t units, int64_t threads, Function&& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t unit = next++; unit < units; unit = next++) work(thread, unit);
  });
}

Basis basis_of(const Tensor& basis, const Tensor& mean, int64_t width) {
  STD_TORCH_CHECK(basis.dim() == 3 && basis.size(0) == mean.size(0) && basis.size(1) == width,
                  "basis: wanted (languages, ", width, ", k), a basis per row of mean");
  Basis result;
  result.data = basis.data_ptr();
  result.dtype = dtype_of(basis, "basis");
  result.rank = basis.size(2);
  result.language_stride = basis.stride(0);
  result.row_stride = basis.stride(1);
  result.column_stride = basis.size(2) > 1 ? basis.stride(2) : 1;
  return result;
}

// The rows of a call by language: pass[0 ...) are those that stay, then each language's by source.
struct Groups {
  std::vector<int64_t> order;     // row numbers
  std::vector<int64_t> starts;    // of each target language in order, and its end
  int64_t staying = 0;
};

int64_t group_of(const Ids& source, const Ids& target, int64_t id) {
  const int64_t to = id_at(target, id);
  return id_at(source, id) < 0 || to < 0 ? -1 : to;
}

Groups group(const Ids& source, const Ids& target, int64_t rows, int64_t languages) {
  // A counting sort of the ids by source, then of those by target, then their rows.
  std::vector<int64_t> by_source(static_cast<size_t>(source.count)), by_target(by_source.size());
  std::vector<int64_t> next(static_cast<size_t>(languages) + 2, 0);
  const auto sort = [&](auto&& key, auto&& item, std::vector<int64_t>& sorted) {
    std::fill(next.begin(), next.end(), 0);
    for (int64_t id = 0; id < source.count; ++id) ++next[static_cast<size_t>(key(id) + 2)];
    for (size_t language = 1; language < next.size(); ++language) next[language] += next[language - 1];
    for (int64_t i = 0; i < source.count; ++i) {
      int64_t& place = next[static_cast<size_t>(key(item(i)) + 1)];
      sorted[static_cast<size_t>(place++)] = item(i);
    }
  };
  sort([&](int64_t id) { return id_at(source, id); }, [](int64_t i) { return i; }, by_source);
  sort([&](int64_t id) { return group_of(source, target, id); },
       [&](int64_t i) { return by_source[static_cast<size_t>(i)]; }, by_target);
  Groups groups;
  groups.order.resize(static_cast<size_t>(rows));
  size_t at = 0;
  for (const int64_t id : by_target)
    for (int64_t row = id * source.rows_per_id; row < (id + 1) * source.rows_per_id; ++row) groups.order[at++] = row;
  // next[l + 1] is now where language l ends.
  for (int64_t& end : next) groups.starts.push_back(end * source.rows_per_id);
  groups.starts.pop_back();
  groups.staying = groups.starts[0];
  return groups;
}

// Each language's rows, split evenly into panels of at most `most`.
std::vector<Panel> panels_of(const Groups& groups, int64_t most) {
  std::vector<Panel> panels;
  for (size_t language = 0; language + 1 < groups.starts.size(); ++language) {
    const int64_t begin = groups.starts[language], rows = groups.starts[language + 1] - begin;
    const int64_t count = ceil_of(rows, most);
    for (int64_t i = 0; i < count; ++i)
      panels.push_back({static_cast<int64_t>(language), begin + rows * i / count, begin + rows * (i + 1) / count});
  }
  return panels;
}

int64_t most_rows(const std::vector<Panel>& panels) {
  int64_t most = 0;
  for (const Panel& panel : panels) most = std::max(most, panel.end - panel.begin);
  return most;
}

// Scratch for as many threads as have something to do.
struct Threads {
  int64_t count;
  int64_t stride;
  Tensor memory;
  float* of(int64_t thread) const { return static_cast<float*>(memory.data_ptr()) + thread * stride; }
};

Threads threads_for(int64_t units, int64_t cost, int64_t floats) {
  // Below this many numbers, waking a second thread costs more than it brings.
  constexpr int64_t kNumbersPerThread = 16384;
  const int64_t useful = std::max<int64_t>(1, cost / kNumbersPerThread);
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>({units, useful, torch::stable::get_num_threads()}));
  return {count, floats, empty({count * floats}, ScalarType::Float)};
}

void project(Projection p, std::vector<Panel> panels, int64_t rows) {
  if (panels.empty() || p.x.width == 0) return;
  p.panels = panels.data();
  const Threads threads = threads_for(static_cast<int64_t>(panels.size()), rows * p.x.width,
                                      projection_scratch(most_rows(panels), p.basis.rank));
  auto* kernel = SHIFCON_PICK(project_panels);
  for_each_unit(static_cast<int64_t>(panels.size()), threads.count, [&](int64_t thread, int64_t unit) {
    Projection mine = p;
    mine.scratch = threads.of(thread);
    kernel(mine, unit, unit + 1);
  });
}

// Rows per panel: enough panels for every thread, few enough that packing V does not count.
int64_t panel_rows(int64_t rows) {
  return std::clamp(ceil_of(rows, torch::stable::get_num_threads()), kFewestRows, kMostRows);
}

void project_all(const Projection& p, const Groups& groups) {
  const int64_t rows = p.x.count;
  std::vector<Panel> panels = panels_of(groups, panel_rows(rows - groups.staying));
  for (int64_t at = 0; at < groups.staying; at += kMostRows)
    panels.push_back({-1, at, std::min(at + kMostRows, groups.staying)});
  project(p, std::move(panels), rows);
}

void set_out(Projection& p, const Tensor& result) {
  p.out = result.data_ptr();
  p.past_cache = past_cache(result);
}

bool in_pairs(const Rows& x) { return x.dtype == Dtype::bfloat16 && level() == Level::avx512_bf16; }

struct Arguments {
  OptionalTensor kept[5];
  Rows mean;
  Basis basis;
  Ids source, target;
  Arguments(const Tensor& x, const Tensor& like_mean, const Tensor& like_basis, const Tensor& from, const Tensor& to) {
    STD_TORCH_CHECK(x.dim() >= 1, "x: wanted at least one dimension");
    const int64_t width = x.size(x.dim() - 1);
    STD_TORCH_CHECK(like_mean.dim() == 2 && like_mean.size(1) == width, "mean: wanted (languages, ", width, ")");
    mean = rows_of(like_mean, "mean", kept[0]);
    basis = basis_of(like_basis, like_mean, width);
    source = ids_of(from, x, mean.count, "source", kept[1]);
    target = ids_of(to, x, mean.count, "target", kept[2]);
    STD_TORCH_CHECK(source.count == target.count && source.rows_per_id == target.rows_per_id,
                    "target: wanted source's shape");
  }
};

Tensor forward(const Tensor& x, const Tensor& mean, const Tensor& basis, const Tensor& source,
               const Tensor& target) {
  Arguments arguments(x, mean, basis, source, target);
  Projection p = {};
  p.x = rows_of(x, "x", arguments.kept[3]);
  STD_TORCH_CHECK(p.x.dtype != Dtype::float64, "x: float64 is for the reference backend");
  p.pairs = in_pairs(p.x);
  p.mean = arguments.mean;
  p.basis = arguments.basis;
  p.source = arguments.source;
  const Tensor result = empty(x.sizes(), x.scalar_type());
  set_out(p, result);
  const Groups groups = group(arguments.source, arguments.target, p.x.count, p.mean.count);
  p.order = groups.order.data();
  project_all(p, groups);
  return result;
}

// Σ g of every pair of languages, projected, some pairs at a time.
void mean_gradient(const Projection& grad, const Ids& source, const Groups& groups, float* grad_mean) {
  std::vector<MeanSegment> segments;
  const int64_t rows = grad.x.count, width = grad.x.width, rank = grad.basis.rank;
  for (const Panel& language : panels_of(groups, std::max<int64_t>(rows, 1))) {
    for (int64_t at = language.begin; at < language.end;) {
      const int64_t from = id_of_row(source, groups.order[static_cast<size_t>(at)]);
      int64_t end = at + 1;
      while (end < language.end && end - at < kRowsPerSegment &&
             id_of_row(source, groups.order[static_cast<size_t>(end)]) == from)
        ++end;
      segments.push_back({from, language.language, at, end});
      at = end;
    }
  }
  const int64_t count = static_cast<int64_t>(segments.size());
  const int64_t most = std::min(count, kSegmentsAtATime);
  const Tensor sums = empty({most, width}, ScalarType::Float), projected = empty({most, width}, ScalarType::Float);
  ProjectionMean p = {};
  p.grad = grad.x;
  p.order = grad.order;
  p.sums = static_cast<float*>(sums.data_ptr());
  p.projected = static_cast<const float*>(projected.data_ptr());
  p.grad_mean = grad_mean;
  OptionalTensor keep;
  Projection of_sums = {};
  of_sums.x = rows_of(sums, "sums", keep);
  of_sums.basis = grad.basis;
  of_sums.out = projected.data_ptr();
  std::vector<int64_t> order(static_cast<size_t>(most));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  of_sums.order = order.data();
  auto* sum = SHIFCON_PICK(project_sums);
  auto* add = SHIFCON_PICK(project_mean);
  for (int64_t first = 0; first < count; first += kSegmentsAtATime) {
    p.segments = segments.data() + first;
    p.count = std::min(kSegmentsAtATime, count - first);
    int64_t numbers = 0;
    for (int64_t i = 0; i < p.count; ++i) numbers += (p.segments[i].end - p.segments[i].begin) * width;
    const int64_t threads = threads_for(p.count, numbers, 0).count;
    for_each_unit(p.count, threads, [&](int64_t, int64_t unit) { sum(p, unit, unit + 1); });
    std::vector<Panel> panels;
    for (int64_t i = 0; i < p.count; ++i) {
      if (panels.empty() || panels.back().language != p.segments[i].target)
        panels.push_back({p.segments[i].target, i, i});
      panels.back().end = i + 1;
    }
    project(of_sums, std::move(panels), p.count * std::max<int64_t>(rank, 1));
    torch::stable::parallel_for(0, width, std::max<int64_t>(64, grain(p.count)),
                                [&](int64_t begin, int64_t end) { add(p, begin, end); });
  }
}

void basis_gradient(const Projection& x, const Projection& grad, const Groups& groups, float* grad_basis) {
  const int64_t width = x.x.width, rank = x.basis.rank, stride = line_stride(rank);
  const int64_t at_a_time = std::max(kCoefficientsAtATime / stride, kMostRows / 4);
  const std::vector<Panel> panels = panels_of(groups, std::min(at_a_time, kMostRows));
  if (panels.empty() || rank == 0 || width == 0) return;
  const int64_t held = std::min(at_a_time, x.x.count) * stride;
  const Tensor coefficients = empty({2 * held}, ScalarType::Float);
  ProjectionBasis p = {};
  p.x = x;
  p.grad = grad;
  p.x_coefficients = static_cast<float*>(coefficients.data_ptr());
  p.grad_coefficients = p.x_coefficients + held;
  p.grad_basis = grad_basis;
  const Threads threads =
      threads_for(static_cast<int64_t>(panels.size()), x.x.count * width, projection_scratch(most_rows(panels), rank));
  auto* multiply = SHIFCON_PICK(project_coefficients);
  auto* add = SHIFCON_PICK(project_basis);
  for (size_t first = 0; first < panels.size();) {
    size_t last = first + 1;
    while (last < panels.size() && panels[last].end - panels[first].begin <= at_a_time) ++last;
    p.count = static_cast<int64_t>(last - first);
    p.x.panels = p.grad.panels = panels.data() + first;
    for_each_unit(p.count, threads.count, [&](int64_t thread, int64_t unit) {
      ProjectionBasis mine = p;
      mine.x.scratch = mine.grad.scratch = threads.of(thread);
      multiply(mine, unit, unit + 1);
    });
    for_each_unit(ceil_of(width, kColumns), threads.count, [&](int64_t, int64_t unit) { add(p, unit, unit + 1); });
    first = last;
  }
}

std::vector<Tensor> backward(const Tensor& grad, OptionalTensor x, const Tensor& mean, const Tensor& basis,
                             const Tensor& source, const Tensor& target, bool need_x, bool need_mean,
                             bool need_basis) {
  Arguments arguments(grad, mean, basis, source, target);
  Projection p = {};
  p.x = rows_of(grad, "grad", arguments.kept[3]);
  STD_TORCH_CHECK(p.x.dtype != Dtype::float64, "grad: float64 is for the reference backend");
  p.pairs = in_pairs(p.x);
  p.basis = arguments.basis;
  p.source = arguments.source;
  Projection of_x = p;
  if (need_basis) {
    STD_TORCH_CHECK(x.has_value(), "x: wanted for the gradient of basis");
    of_x.x = rows_of(*x, "x", arguments.kept[4]);
    STD_TORCH_CHECK(of_x.x.width == p.x.width && of_x.x.count == p.x.count && of_x.x.dtype == p.x.dtype,
                    "x: wanted shape and dtype of grad");
    of_x.mean = arguments.mean;
  }
  const Groups groups = group(arguments.source, arguments.target, p.x.count, arguments.mean.count);
  p.order = of_x.order = groups.order.data();
  std::vector<Tensor> results;
  if (need_x) {
    results.push_back(empty(grad.sizes(), grad.scalar_type()));
    set_out(p, results.back());
    project_all(p, groups);
  }
  if (need_mean) {
    results.push_back(zeros(mean.sizes(), ScalarType::Float));
    mean_gradient(p, arguments.source, groups, static_cast<float*>(results.back().data_ptr()));
  }
  if (need_basis) {
    results.push_back(zeros(basis.sizes(), ScalarType::Float));
    basis_gradient(of_x, p, groups, static_cast<float*>(results.back().data_ptr()));
  }
  return results;
}

}  // namespace
}  // namespace shifcon

STABLE_TORCH_LIBRARY_FRAGMENT(shifcon_fast_cpu, m) {
  m.def("subspace_project(Tensor x, Tensor mean, Tensor basis, Tensor source, Tensor target) -> Tensor");
  m.def(
      "subspace_project_backward(Tensor grad, Tensor? x, Tensor mean, Tensor basis, Tensor source, Tensor target, "
      "bool need_x, bool need_mean, bool need_basis) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cpu, CPU, m) {
  m.impl("subspace_project", TORCH_BOX(&shifcon::forward));
  m.impl("subspace_project_backward", TORCH_BOX(&shifcon::backward));
}
