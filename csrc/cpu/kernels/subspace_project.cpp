// x′ = mean_t + V_t V_tᵀ c  with  c = x - mean_s,  in float32, rounded once. With g = ∂L/∂x′ and p = V_t V_tᵀ g:
//
//   ∂L/∂x = p,   ∂L/∂mean_t += g,   ∂L/∂mean_s -= p,   ∂L/∂V_t = Σ_rows g (V_tᵀ c)ᵀ + c (V_tᵀ g)ᵀ.
//
// Rows come sorted by language, in panels: V is packed for a whole panel. The mean is subtracted before anything is
// multiplied, because means are often much larger than what is left. ∂L/∂mean needs p only in sums over rows of the
// same pair of languages, so the sums of g are projected instead of every row.
//
// Every number is a sum in one order, whatever the panels and threads: long ones through partial sums.

#include "subspace_project.h"

#include <type_traits>

#include "gemm.h"
#include "vector.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

constexpr int64_t kRowsPerPartialSum = 64;
constexpr int64_t kRowsAhead = 6;  // fetched while one is worked on

SHIFCON_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

SHIFCON_INLINE int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Some columns of every row.
SHIFCON_INLINE Rows columns_of(const Rows& rows, int64_t begin, int64_t count) {
  Rows part = rows;
  part.data = static_cast<const char*>(rows.data) + begin * rows.width_stride * size_of(rows.dtype);
  part.width = count;
  return part;
}

// Row i of V_t in float32.
SHIFCON_INLINE const float* basis_row(const Basis& basis, int64_t language, int64_t i, float* scratch) {
  const int64_t offset = language * basis.language_stride + i * basis.row_stride;
  switch (basis.dtype) {
    case Dtype::float32: {
      const float* from = static_cast<const float*>(basis.data) + offset;
      if (basis.column_stride == 1) return from;
      widen(from, basis.column_stride, basis.rank, scratch);
      break;
    }
    case Dtype::bfloat16:
      widen(static_cast<const BFloat16*>(basis.data) + offset, basis.column_stride, basis.rank, scratch);
      break;
    case Dtype::float16:
      widen(static_cast<const Float16*>(basis.data) + offset, basis.column_stride, basis.rank, scratch);
      break;
    case Dtype::float64: {
      const double* from = static_cast<const double*>(basis.data) + offset;
      for (int64_t at = 0; at < basis.rank; ++at) scratch[at] = static_cast<float>(from[at * basis.column_stride]);
      break;
    }
  }
  return scratch;
}

// Compiled once, not for every dtype of x: everything it touches is float32.
#define SHIFCON_ONCE static __attribute__((noinline)) SHIFCON_FLAT

SHIFCON_ONCE void multiply_panels(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                                  int64_t columns, int64_t depth, float* to, bool accumulate) {
  multiply_into(a, a_stride, 1, b, b_stride, rows, columns, depth, to, b_stride, accumulate);
}

// to (columns, width) += aᵀ b, with a (rows, columns) and b (rows, width) panels.
SHIFCON_ONCE void add_transposed_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                         int64_t rows, int64_t columns, int64_t width, float* to) {
  multiply(a, 1, a_stride, b, b_stride, columns, width, rows, [&](int64_t row, int64_t j, Vector v) {
    const int64_t lanes = smaller(kLanes, width - j);
    float* at = to + row * width + j;
    store_lanes(at, load_lanes(at, lanes) + v, lanes);
  });
}

// What a thread works on, laid out in its scratch.
struct Workspace {
  float* coefficients;  // (rows, line_stride(k))
  float* centred;       // (rows, line_stride(kPanelDepth)): some columns of c
  float* directions;    // (kBasisDepth, line_stride(k)): some rows of V
  float* transposed;    // (k, line_stride(kColumns)): some columns of Vᵀ
  float* row;           // (k): one row of V
};

SHIFCON_INLINE Workspace workspace(float* scratch, int64_t rows, int64_t rank) {
  Workspace w;
  w.coefficients = scratch;
  w.centred = w.coefficients + rows * line_stride(rank);
  w.directions = w.centred + rows * line_stride(kPanelDepth);
  w.transposed = w.directions + kBasisDepth * line_stride(rank);
  w.row = w.transposed + rank * line_stride(kColumns);
  return w;
}

// Columns [column, column + count <= kPanelDepth) of c, or of x where there is no mean, for the rows order[begin ...).
template <class T>
SHIFCON_INLINE void centre_panel(const Projection& p, int64_t begin, int64_t rows, int64_t column, int64_t count,
                                 float* to, int64_t stride) {
  const Rows x = columns_of(p.x, column, count);
  const Rows means = p.mean.data ? columns_of(p.mean, column, count) : Rows{};
  T x_scratch[kPanelDepth];
  float mean_scratch[kPanelDepth];
  const float* mean = nullptr;
  int64_t language = -1;
  for (int64_t i = 0; i < rows; ++i, to += stride) {
    const int64_t row = p.order[begin + i];
    // Rows of a language lie anywhere: the hardware does not see the next one coming.
    if (i + kRowsAhead < rows && x.width_stride == 1) {
      const char* ahead = static_cast<const char*>(x.data) + offset_of(x, p.order[begin + i + kRowsAhead]) * int64_t{sizeof(T)};
      for (int64_t byte = 0; byte < count * int64_t{sizeof(T)}; byte += 64) __builtin_prefetch(ahead + byte);
    }
    const T* from = contiguous_row(x, row, x_scratch);
    if (p.mean.data == nullptr) {
      for_each_vector(count, [&](int64_t at, int64_t lanes) {
        store_lanes(to + at, load_lanes(from + at, lanes), lanes);
      });
      continue;
    }
    const int64_t source = id_of_row(p.source, row);
    if (source != language) mean = float_row(means, source, mean_scratch);
    language = source;
    for_each_vector(count, [&](int64_t at, int64_t lanes) {
      store_lanes(to + at, load_lanes(from + at, lanes) - load_lanes(mean + at, lanes), lanes);
    });
  }
}

// c V_t of some rows, (rows, line_stride(k)).
template <class T>
SHIFCON_INLINE void multiply_by_basis(const Projection& p, const Panel& panel, const Workspace& w, float* coefficients) {
  const int64_t width = p.x.width, rank = p.basis.rank, stride = line_stride(rank), rows = panel.end - panel.begin;
  constexpr int64_t kStride = line_stride(kPanelDepth);
  for (int64_t column = 0; column < width; column += kPanelDepth) {
    const int64_t held = smaller(kPanelDepth, width - column);
    centre_panel<T>(p, panel.begin, rows, column, held, w.centred, kStride);
    for (int64_t at = 0; at < held; at += kBasisDepth) {
      const int64_t depth = smaller(kBasisDepth, held - at);
      for (int64_t i = 0; i < depth; ++i) {
        const float* from = basis_row(p.basis, panel.language, column + at + i, w.row);
        float* to = w.directions + i * stride;
        for_each_vector(rank, [&](int64_t j, int64_t lanes) { store(to + j, load_lanes(from + j, lanes)); });
      }
      multiply_panels(w.centred + at, kStride, w.directions, stride, rows, rank, depth, coefficients, column + at > 0);
    }
  }
}

// Columns [column, column + count <= kColumns) of V_tᵀ.
SHIFCON_INLINE void transpose_basis(const Basis& basis, int64_t language, int64_t column, int64_t count,
                                    const Workspace& w) {
  constexpr int64_t kStride = line_stride(kColumns);
  for (int64_t i = 0; i < padded(count); ++i) {
    float* to = w.transposed + i;
    if (i >= count) {
      for (int64_t j = 0; j < basis.rank; ++j) to[j * kStride] = 0;
      continue;
    }
    const float* from = basis_row(basis, language, column + i, w.row);
    for (int64_t j = 0; j < basis.rank; ++j) to[j * kStride] = from[j];
  }
}

template <class T>
SHIFCON_INLINE void project_panel(const Projection& p, const Panel& panel) {
  const int64_t width = p.x.width, rank = p.basis.rank, rows = panel.end - panel.begin;
  const int64_t* order = p.order + panel.begin;
  T* out = static_cast<T*>(p.out);
  const Workspace w = workspace(p.scratch, rows, rank);
  if (rank > 0) multiply_by_basis<T>(p, panel, w, w.coefficients);
  for (int64_t column = 0; column < width; column += kColumns) {
    const int64_t count = smaller(kColumns, width - column);
    float mean[kColumns] = {};
    if (p.mean.data) {
      float mean_scratch[kColumns];
      const float* from = float_row(columns_of(p.mean, column, count), panel.language, mean_scratch);
      for (int64_t i = 0; i < count; ++i) mean[i] = from[i];
    }
    transpose_basis(p.basis, panel.language, column, count, w);
    multiply(w.coefficients, line_stride(rank), 1, w.transposed, line_stride(kColumns), rows, count, rank,
             [&](int64_t row, int64_t at, Vector v) {
               store_lanes(out + order[row] * width + column + at, v + load(mean + at), smaller(kLanes, count - at));
             });
  }
}

template <class T>
SHIFCON_INLINE void copy_panel(const Projection& p, const Panel& panel) {
  const int64_t width = p.x.width;
  for (int64_t i = panel.begin; i < panel.end; ++i) {
    T* to = static_cast<T*>(p.out) + p.order[i] * width;
    const T* from = contiguous_row(p.x, p.order[i], to);
    if (from != to) __builtin_memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
  }
}

template <class T>
SHIFCON_FLAT void panels(const Projection& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.panels[i].language < 0) copy_panel<T>(p, p.panels[i]);
    else project_panel<T>(p, p.panels[i]);
  }
}

// G of each segment.
template <class T>
SHIFCON_FLAT void sums(const ProjectionMean& p, int64_t begin, int64_t end) {
  const int64_t width = p.grad.width;
  const Scratch<float> partial_scratch(width);
  const Scratch<T> grad_scratch(p.grad.width_stride == 1 ? 0 : width);
  float* partial = partial_scratch.get();
  for (int64_t i = begin; i < end; ++i) {
    const MeanSegment& segment = p.segments[i];
    float* total = p.sums + i * width;
    for (int64_t at = 0; at < width; ++at) total[at] = partial[at] = 0;
    for (int64_t at = segment.begin; at < segment.end; ++at) {
      const T* grad = contiguous_row(p.grad, p.order[at], grad_scratch.get());
      for_each_vector(width, [&](int64_t column, int64_t lanes) {
        const Vector sum = load_lanes(partial + column, lanes) + load_lanes(grad + column, lanes);
        store_lanes(partial + column, sum, lanes);
      });
      if ((at - segment.begin) % kRowsPerPartialSum == kRowsPerPartialSum - 1 || at == segment.end - 1) {
        for (int64_t column = 0; column < width; ++column) {
          total[column] += partial[column];
          partial[column] = 0;
        }
      }
    }
  }
}

// Block `block` of kColumns columns of ∂L/∂V for every panel of the chunk: one product over the rows each.
template <class T>
SHIFCON_FLAT void basis_columns(const ProjectionBasis& p, int64_t first_block, int64_t last_block) {
  constexpr int64_t kStride = line_stride(kColumns);
  const int64_t width = p.x.x.width, rank = p.x.basis.rank, stride = line_stride(rank);
  int64_t most = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t rows = p.x.panels[i].end - p.x.panels[i].begin;
    if (rows > most) most = rows;
  }
  const Scratch<float> scratch(most * kStride);
  float* rows_of_block = scratch.get();
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t column = block * kColumns, count = smaller(kColumns, width - column);
    for (int64_t i = 0; i < p.count; ++i) {
      const Panel& panel = p.x.panels[i];
      const int64_t rows = panel.end - panel.begin, at = panel.begin - p.x.panels[0].begin;
      float* total = p.grad_basis + (panel.language * width + column) * rank;
      centre_panel<T>(p.grad, panel.begin, rows, column, count, rows_of_block, kStride);
      add_transposed_product(rows_of_block, kStride, p.x_coefficients + at * stride, stride, rows, count, rank, total);
      centre_panel<T>(p.x, panel.begin, rows, column, count, rows_of_block, kStride);
      add_transposed_product(rows_of_block, kStride, p.grad_coefficients + at * stride, stride, rows, count, rank, total);
    }
  }
}

template <class T>
SHIFCON_FLAT void coefficients(const ProjectionBasis& p, int64_t begin, int64_t end) {
  const int64_t stride = line_stride(p.x.basis.rank);
  for (int64_t i = begin; i < end; ++i) {
    const Panel& panel = p.x.panels[i];
    const int64_t at = (panel.begin - p.x.panels[0].begin) * stride;
    const Workspace w = workspace(p.x.scratch, panel.end - panel.begin, p.x.basis.rank);
    multiply_by_basis<T>(p.x, panel, w, p.x_coefficients + at);
    multiply_by_basis<T>(p.grad, panel, w, p.grad_coefficients + at);
  }
}

}  // namespace

void project_panels(const Projection& p, int64_t begin, int64_t end) {
  with_dtype(p.x.dtype, [&](auto* type) { panels<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

void project_sums(const ProjectionMean& p, int64_t begin, int64_t end) {
  with_dtype(p.grad.dtype, [&](auto* type) { sums<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

// Some columns of every row of ∂L/∂mean: no two threads write the same number.
SHIFCON_FLAT void project_mean(const ProjectionMean& p, int64_t begin, int64_t end) {
  const int64_t width = p.grad.width;
  for (int64_t i = 0; i < p.count; ++i) {
    float* target = p.grad_mean + p.segments[i].target * width;
    float* source = p.grad_mean + p.segments[i].source * width;
    for (int64_t at = begin; at < end; ++at) target[at] += p.sums[i * width + at];
    for (int64_t at = begin; at < end; ++at) source[at] -= p.projected[i * width + at];
  }
}

void project_coefficients(const ProjectionBasis& p, int64_t begin, int64_t end) {
  with_dtype(p.x.x.dtype,
             [&](auto* type) { coefficients<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

void project_basis(const ProjectionBasis& p, int64_t begin, int64_t end) {
  with_dtype(p.x.x.dtype,
             [&](auto* type) { basis_columns<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
