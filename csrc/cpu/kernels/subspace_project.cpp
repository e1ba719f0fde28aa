// x′ = mean_t + V_t V_tᵀ c  with  c = x - mean_s,  in float32, rounded once. With g = ∂L/∂x′ and p = V_t V_tᵀ g:
//
//   ∂L/∂x = p,   ∂L/∂mean_t += g,   ∂L/∂mean_s -= p,   ∂L/∂V_t = Σ_rows g (V_tᵀ c)ᵀ + c (V_tᵀ g)ᵀ.
//
// Rows come sorted by language, in panels: V is packed for a whole panel. The mean is subtracted before anything is
// multiplied, because means are often much larger than what is left. ∂L/∂mean needs p only in sums over rows of the
// same pair of languages, so the sums of g are projected instead of every row.
//
// Where the processor multiplies pairs of bfloat16 numbers (pairs.h), x′ and ∂L/∂x of bfloat16 rows are made of such
// products: c (or g), V_t and the coefficients V_tᵀ c are rounded to bfloat16, once each. Panels hold either kind of
// number, `Number` below.
//
// Every number is a sum in one order, whatever the panels and threads: long ones through partial sums.

#include "subspace_project.h"

#include <type_traits>

#include "gemm.h"
#include "pairs.h"
#include "wide.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

constexpr int64_t kRowsPerPartialSum = 64;
constexpr int64_t kRowsAhead = 6;  // fetched while one is worked on

SHIFCON_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Compiled once, not for every dtype of x: what it touches is in panels, or in a table.
#define SHIFCON_ONCE static __attribute__((noinline)) SHIFCON_FLAT

// Numbers of every row that will be read next, fetched while a product keeps the processor busy: rows of a language lie
// anywhere, and the hardware does not see the next one coming.
struct Ahead {
  const char* data = nullptr;
  const int64_t* order = nullptr;  // row i is the order[i]-th one
  int64_t row_bytes = 0, bytes = 0;
};

// Inlined, for GCC takes a function that does nothing but prefetch for one that does nothing, and drops the call.
SHIFCON_INLINE void fetch(const Ahead& ahead, int64_t row) {
  constexpr int64_t kLine = 64;
  if (ahead.bytes == 0) return;
  const char* from = ahead.data + ahead.order[row] * ahead.row_bytes;
  for (int64_t at = 0; at < ahead.bytes; at += kLine) __builtin_prefetch(from + at, 0, 2);
}

template <class Number>
SHIFCON_ONCE void multiply_panels(const Number* a, int64_t a_stride, const Number* b, int64_t b_stride, int64_t rows,
                                  int64_t columns, int64_t depth, float* to, bool accumulate, const Ahead& ahead) {
  multiply_into(a, a_stride, 1, b, b_stride, rows, columns, depth, to, b_stride, accumulate,
                [&](int64_t row, int64_t column) __attribute__((always_inline)) {
                  if (column == 0) fetch(ahead, row);
                });
}

// to (columns, width) += aᵀ b, with a (rows, columns) and b (rows, width) panels.
SHIFCON_ONCE void add_transposed_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                         int64_t rows, int64_t columns, int64_t width, float* to) {
  multiply(a, 1, a_stride, b, b_stride, columns, width, rows, [&](int64_t row, int64_t column, const auto& v) {
    for (int j = 0; j < kCountOf<decltype(v)>; ++j) {
      const int64_t first = column + j * kLanes, lanes = smaller(kLanes, width - first);
      float* at = to + row * width + first;
      store_lanes(at, load_lanes(at, lanes) + v[j], lanes);
    }
  });
}

// --- panels of V

template <class Number>
constexpr bool kInPairs = std::is_same_v<Number, Pair>;
// Numbers of a matrix, along the depth of a product, in one of a panel.
template <class Number>
constexpr int64_t kTerms = kInPairs<Number> ? 2 : 1;

// A matrix in memory, any strides.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t depth, columns, depth_stride, column_stride;  // in elements
};

// Rows [row, row + count) of V_t, and their transpose.
SHIFCON_INLINE Matrix rows_of(const Basis& basis, int64_t language, int64_t row, int64_t count) {
  const int64_t offset = language * basis.language_stride + row * basis.row_stride;
  const void* data = static_cast<const char*>(basis.data) + offset * size_of(basis.dtype);
  return {data, basis.dtype, count, basis.rank, basis.row_stride, basis.column_stride};
}
SHIFCON_INLINE Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.columns, m.depth, m.column_stride, m.depth_stride};
}

template <class T>
SHIFCON_INLINE Vector load_numbers(const T* from, int64_t stride, int64_t count) {
  if constexpr (std::is_same_v<T, double>) {
    float lanes[kLanes] = {};
    for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = static_cast<float>(from[lane * stride]);
    return load(lanes);
  } else {
    return load_strided(from, stride, count);
  }
}

// kTerms · kLanes numbers that follow each other (or the `count` of them that there are), for consecutive rows.
template <class Number, class T>
SHIFCON_INLINE Vector load_terms(const T* from, int64_t count) {
  if constexpr (kInPairs<Number>) {
    const Vector first = load_numbers(from, 1, smaller(count, kLanes));
    const Vector second = count > kLanes ? load_numbers(from + kLanes, 1, count - kLanes) : Vector{};
    return neighbours(first, second, Number{});
  } else {
    return load_numbers(from, 1, count);
  }
}

// One step of a transpose: lanes of x whose number has the bit kHalf change places with those of y that have it not.
template <int kHalf>
SHIFCON_INLINE void exchange(Vector& x, Vector& y) {
#if defined(__clang__)  // has no __builtin_shuffle
  const Vector a = x, b = y;
  for (int lane = 0; lane < kLanes; ++lane) {
    x[lane] = lane & kHalf ? b[lane ^ kHalf] : a[lane];
    y[lane] = lane & kHalf ? b[lane] : a[lane ^ kHalf];
  }
#else
  typedef int32_t Lanes __attribute__((vector_size(SHIFCON_VECTOR_BYTES)));
  Lanes low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int of_y = lane & kHalf ? static_cast<int>(kLanes) : 0;
    low[lane] = of_y + (lane & ~kHalf);
    high[lane] = of_y + (lane | kHalf);
  }
  const Vector a = x;
  x = __builtin_shuffle(a, y, low);
  y = __builtin_shuffle(a, y, high);
#endif
}

// Lane j of v[i] becomes lane i of v[j].
template <int kHalf = static_cast<int>(kLanes) / 2>
SHIFCON_INLINE void transpose(Vector* v) {
  if constexpr (kHalf > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & kHalf) == 0) exchange<kHalf>(v[i], v[i + kHalf]);
    transpose<kHalf / 2>(v);
  }
}

// A panel whose columns lie in memory one after the other: read along them, turned in registers.
template <class Number, class T>
SHIFCON_INLINE void pack_columns(const Matrix& m, const T* from, Number* to, int64_t stride) {
  constexpr int64_t kDepth = kLanes * kTerms<Number>;
  for (int64_t column = 0; column < m.columns; column += kLanes) {
    const int64_t columns = smaller(kLanes, m.columns - column);
    const T* first = from + column * m.column_stride;
    Vector tile[kLanes];
    int64_t at = 0;
    for (; columns == kLanes && at + kDepth <= m.depth; at += kDepth) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) tile[i] = load_terms<Number>(first + i * m.column_stride + at, kDepth);
      transpose(tile);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) store(to + (at / kTerms<Number> + i) * stride + column, tile[i]);
    }
    for (; at < m.depth; at += kDepth) {
      const int64_t depth = smaller(kDepth, m.depth - at);
      for (int64_t i = 0; i < kLanes; ++i)
        tile[i] = i < columns ? load_terms<Number>(first + i * m.column_stride + at, depth) : Vector{};
      transpose(tile);
      for (int64_t i = 0; i * kTerms<Number> < depth; ++i)
        store(to + (at / kTerms<Number> + i) * stride + column, tile[i]);
    }
  }
}

// A panel whose rows do, or neither.
template <class Number, class T>
SHIFCON_INLINE void pack_rows(const Matrix& m, const T* from, Number* to, int64_t stride) {
  for (int64_t row = 0; row < m.depth; row += kTerms<Number>, to += stride) {
    const T* first = from + row * m.depth_stride;
    for_each_vector(m.columns, [&](int64_t at, int64_t lanes) {
      Vector v = load_numbers(first + at * m.column_stride, m.column_stride, lanes);
      if constexpr (kInPairs<Number>) {
        const T* second = first + m.depth_stride + at * m.column_stride;
        v = paired(v, row + 1 < m.depth ? load_numbers(second, m.column_stride, lanes) : Vector{}, Number{});
      }
      store(to + at, v);
    });
  }
}

// m as a panel: what neither layout of V makes slow, and no layout changes.
template <class Number>
SHIFCON_ONCE void pack(const Matrix& m, Number* to, int64_t stride) {
  const auto of = [&](const auto* from) {
    if (m.depth_stride == 1 && m.column_stride != 1) pack_columns(m, from, to, stride);
    else pack_rows(m, from, to, stride);
  };
  switch (m.dtype) {
    case Dtype::float32: return of(static_cast<const float*>(m.data));
    case Dtype::bfloat16: return of(static_cast<const BFloat16*>(m.data));
    case Dtype::float16: return of(static_cast<const Float16*>(m.data));
    case Dtype::float64: return of(static_cast<const double*>(m.data));
  }
}

// --- panels of x

// What a thread works on, laid out in its scratch.
template <class Number>
struct Workspace {
  float* coefficients;  // (rows, line_stride(k))
  Number* centred;      // (rows, line_stride(kPanelDepth)): some columns of c
  Number* directions;   // (kBasisDepth, line_stride(k)): some rows of V
  Number* transposed;   // (k, line_stride(kColumns)): some columns of Vᵀ
};

template <class Number>
SHIFCON_INLINE Workspace<Number> workspace(float* scratch, int64_t rows, int64_t rank) {
  static_assert(sizeof(Number) == sizeof(float), "projection_scratch() counts float32 numbers");
  Workspace<Number> w;
  w.coefficients = scratch;
  w.centred = reinterpret_cast<Number*>(w.coefficients + rows * line_stride(rank));
  w.directions = w.centred + rows * line_stride(kPanelDepth);
  w.transposed = w.directions + kBasisDepth * line_stride(rank);
  return w;
}

// A row of a panel, `count` numbers at(position, lanes); the last vector is filled up with zeros.
template <class Number, class At>
SHIFCON_INLINE void store_row(Number* to, int64_t count, At&& at) {
  if constexpr (kInPairs<Number>) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
      store(to + i / 2, neighbours(at(i, kLanes), at(i + kLanes, kLanes), Number{}));
    if (i >= count) return;
    const Vector second = count - i > kLanes ? at(i + kLanes, count - i - kLanes) : Vector{};
    store(to + i / 2, neighbours(at(i, smaller(kLanes, count - i)), second, Number{}));
  } else {
    for_each_vector(count, [&](int64_t i, int64_t lanes) { store(to + i, at(i, lanes)); });
  }
}

// Columns [column, column + count <= kPanelDepth) of c, or of x where there is no mean, for the rows order[begin ...).
template <class T, class Number>
SHIFCON_INLINE void centre_panel(const Projection& p, int64_t begin, int64_t rows, int64_t column, int64_t count,
                                 Number* to, int64_t stride) {
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
      const int64_t offset = offset_of(x, p.order[begin + i + kRowsAhead]);
      const char* ahead = static_cast<const char*>(x.data) + offset * int64_t{sizeof(T)};
      for (int64_t byte = 0; byte < count * int64_t{sizeof(T)}; byte += 64) __builtin_prefetch(ahead + byte);
    }
    const T* from = contiguous_row(x, row, x_scratch);
    if (p.mean.data == nullptr) {
      store_row(to, count, [&](int64_t at, int64_t lanes) { return load_lanes(from + at, lanes); });
      continue;
    }
    const int64_t source = id_of_row(p.source, row);
    if (source != language) mean = float_row(means, source, mean_scratch);
    language = source;
    store_row(to, count, [&](int64_t at, int64_t lanes) {
      return load_lanes(from + at, lanes) - load_lanes(mean + at, lanes);
    });
  }
}

// Of the kPanelDepth columns from `column` on, the share that is fetched while columns [at, at + count) of `held` are
// multiplied.
SHIFCON_INLINE Ahead next_columns(const Projection& p, int64_t begin, int64_t column, int64_t at, int64_t count,
                                  int64_t held) {
  const int64_t columns = smaller(kPanelDepth, p.x.width - column), element = size_of(p.x.dtype);
  if (columns <= 0 || p.x.leading > 1 || p.x.width_stride != 1) return {};
  const int64_t first = columns * at / held, last = columns * (at + count) / held;
  return {static_cast<const char*>(p.x.data) + (column + first) * element, p.order + begin,
          (p.x.leading > 0 ? p.x.stride[0] : 0) * element, (last - first) * element};
}

// c V_t of some rows, (rows, line_stride(k)).
template <class Number, class T>
SHIFCON_INLINE void multiply_by_basis(const Projection& p, const Panel& panel, const Workspace<Number>& w,
                                      float* coefficients) {
  constexpr int64_t kStride = line_stride(kPanelDepth);
  const int64_t width = p.x.width, rank = p.basis.rank, stride = line_stride(rank), rows = panel.end - panel.begin;
  for (int64_t column = 0; column < width; column += kPanelDepth) {
    const int64_t held = smaller(kPanelDepth, width - column);
    centre_panel<T>(p, panel.begin, rows, column, held, w.centred, kStride);
    for (int64_t at = 0; at < held; at += kBasisDepth * kTerms<Number>) {
      const int64_t count = smaller(kBasisDepth * kTerms<Number>, held - at);
      pack(rows_of(p.basis, panel.language, column + at, count), w.directions, stride);
      const Ahead ahead = next_columns(p, panel.begin, column + held, at, count, held);
      multiply_panels(w.centred + at / kTerms<Number>, kStride, w.directions, stride, rows, rank,
                      (count + kTerms<Number> - 1) / kTerms<Number>, coefficients, column + at > 0, ahead);
    }
  }
}

// The transpose of rows [row, row + count) of V_t, so that the two vectors of numbers which a product has for kWide
// columns are a Wide<T>. A last vector of columns, which has no second, stays in order.
template <class Number, class T>
SHIFCON_INLINE void pack_as_wides(const Basis& basis, int64_t language, int64_t row, int64_t count, Number* to,
                                  int64_t stride) {
  int64_t at = 0;
  if constexpr (kEvenOdd<T>) {
    for (; at < count / kWide * kWide; at += kLanes) {
      const int64_t first = at / kWide * kWide + (at / kLanes) % 2;
      const Matrix m = transposed(rows_of(basis, language, row + first, 1));
      pack(Matrix{m.data, m.dtype, m.depth, kLanes, m.depth_stride, 2 * m.column_stride}, to + at, stride);
    }
  }
  if (at == count) return;
  pack(transposed(rows_of(basis, language, row + at, count - at)), to + at, stride);
}

template <class Number, class T>
SHIFCON_INLINE void project_panel(const Projection& p, const Panel& panel) {
  constexpr int64_t kStride = line_stride(kColumns);
  const int64_t width = p.x.width, rank = p.basis.rank, rows = panel.end - panel.begin, stride = line_stride(rank);
  const int64_t* order = p.order + panel.begin;
  T* out = static_cast<T*>(p.out);
  const Workspace<Number> w = workspace<Number>(p.scratch, rows, rank);
  if (rank > 0) multiply_by_basis<Number, T>(p, panel, w, w.coefficients);
  Number* coefficients = reinterpret_cast<Number*>(w.coefficients);
  if constexpr (kInPairs<Number>) {
    for (int64_t i = 0; i < rows; ++i) round_to_pairs(w.coefficients + i * stride, rank, coefficients + i * stride);
  }
  for (int64_t column = 0; column < width; column += kColumns) {
    const int64_t count = smaller(kColumns, width - column);
    float mean[kColumns] = {};
    if (p.mean.data) {
      float mean_scratch[kColumns];
      const float* from = float_row(columns_of(p.mean, column, count), panel.language, mean_scratch);
      for (int64_t i = 0; i < count; ++i) mean[i] = from[i];
    }
    Wide<T> wide_mean[kColumns / kWide];
    arrange(mean, kColumns, wide_mean);
    pack_as_wides<Number, T>(p.basis, panel.language, column, count, w.transposed, kStride);
    multiply(coefficients, stride, 1, w.transposed, kStride, rows, count, (rank + kTerms<Number> - 1) / kTerms<Number>,
             [&](int64_t row, int64_t at, const auto& v) {
               constexpr int kVectors = kCountOf<decltype(v)>;
               T* to = out + order[row] * width + column + at;
               if constexpr (kVectors % 2 == 0) {
                 // Past the cache only whole lines: the rest of one would follow after all other rows.
                 constexpr bool kLines = kVectors * kLanes * sizeof(T) % 64 == 0;
#pragma GCC unroll 4
                 for (int j = 0; j < kVectors; j += 2) {
                   const Wide<T> result = Wide<T>{{v[j], v[j + 1]}} + arranged(wide_mean, at + j * kLanes);
                   if (kLines && p.past_cache) store_result<true>(to + j * kLanes, result, kWide);
                   else store_wide(to + j * kLanes, result);
                 }
               } else {
                 store_lanes(to, v[0] + load(mean + at), smaller(kLanes, count - at));
               }
             });
  }
}

template <class T>
SHIFCON_INLINE void copy_panel(const Projection& p, const Panel& panel) {
  const int64_t width = p.x.width;
  const Scratch<T> scratch(p.x.width_stride == 1 ? 0 : width);
  for (int64_t i = panel.begin; i < panel.end; ++i) {
    T* to = static_cast<T*>(p.out) + p.order[i] * width;
    const T* from = contiguous_row(p.x, p.order[i], scratch.get());
    if (!p.past_cache) __builtin_memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
    else copy_row_past_cache(to, from, width);
  }
}

template <class Number, class T>
SHIFCON_FLAT void panels(const Projection& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.panels[i].language < 0) copy_panel<T>(p, p.panels[i]);
    else project_panel<Number, T>(p, p.panels[i]);
  }
  if (p.past_cache) drain_stores();
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
      add_transposed_product(rows_of_block, kStride, p.x_coefficients + at * stride, stride, rows, count, rank,
                             total);
      centre_panel<T>(p.x, panel.begin, rows, column, count, rows_of_block, kStride);
      add_transposed_product(rows_of_block, kStride, p.grad_coefficients + at * stride, stride, rows, count, rank,
                             total);
    }
  }
}

template <class T>
SHIFCON_FLAT void coefficients(const ProjectionBasis& p, int64_t begin, int64_t end) {
  const int64_t stride = line_stride(p.x.basis.rank);
  for (int64_t i = begin; i < end; ++i) {
    const Panel& panel = p.x.panels[i];
    const int64_t at = (panel.begin - p.x.panels[0].begin) * stride;
    const Workspace<float> w = workspace<float>(p.x.scratch, panel.end - panel.begin, p.x.basis.rank);
    multiply_by_basis<float, T>(p.x, panel, w, p.x_coefficients + at);
    multiply_by_basis<float, T>(p.grad, panel, w, p.grad_coefficients + at);
  }
}

}  // namespace

void project_panels(const Projection& p, int64_t begin, int64_t end) {
  if (kHasPairs && p.pairs) return panels<std::conditional_t<kHasPairs, Pair, float>, BFloat16>(p, begin, end);
  with_dtype(p.x.dtype, [&](auto* type) { panels<float, std::remove_pointer_t<decltype(type)>>(p, begin, end); });
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
