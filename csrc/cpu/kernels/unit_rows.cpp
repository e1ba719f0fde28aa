// Lengths, means and weighted sums over rows. Formulas: ../unit_rows.h.

#include "unit_rows.h"

#include <cmath>
#include <type_traits>

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

// Sums over rows run through partial sums of so many rows: the error grows with the number of partial sums.
constexpr int64_t kRowsPerPartialSum = 64;

template <class T>
SHIFCON_FLAT float inverse_length(const T* x, int64_t width) {
  Vector squares[4] = {};
  int64_t at = 0;
  for (; at + 4 * kLanes <= width; at += 4 * kLanes) {
    for (int64_t i = 0; i < 4; ++i) {
      const Vector v = load(x + at + i * kLanes);
      squares[i] += v * v;
    }
  }
  for (; at < width; at += kLanes) {
    const Vector v = load_lanes(x + at, width - at < kLanes ? width - at : kLanes);
    squares[0] += v * v;
  }
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  if (total == 0) return 0;
  if (std::isinf(total)) {  // a square overflowed: the row counts as zero, unless a number in it is infinite
    Vector nothing = {};
    for_each_vector(width, [&](int64_t from, int64_t count) { nothing += load_lanes(x + from, count) * 0.0f; });
    return sum(nothing);
  }
  return 1.0f / std::sqrt(total);
}

template <class T>
SHIFCON_FLAT void lengths(const Rows& x, float* inverse, int64_t begin, int64_t end) {
  const Scratch<T> scratch(x.width_stride == 1 ? 0 : x.width);
  for (int64_t row = begin; row < end; ++row)
    inverse[row] = inverse_length(contiguous_row(x, row, scratch.get()), x.width);
}

// to[column] += Σ_i factor · weights[i] · x_i, over `rows` rows from `first`, for `columns` columns from `begin`.
template <class T>
SHIFCON_FLAT void add_rows(const Rows& x, int64_t first, int64_t rows, const float* inverse, const float* weights,
                           float factor, int64_t begin, int64_t columns, float* to) {
  float partial[kColumnsOfTask], panel[kColumnsOfTask];
  for (int64_t i = 0; i < rows; ++i) {
    if (i % kRowsPerPartialSum == 0)
      for (int64_t at = 0; at < columns; ++at) partial[at] = 0;
    widen_panel<T>(x, first + i, 1, begin, columns, panel, kColumnsOfTask);
    // u first, as it is in the products: a weight times 1 / ‖x‖ could overflow.
    const float unit = inverse ? inverse[first + i] : 1.0f, weight = weights ? weights[first + i] : 1.0f;
    for (int64_t at = 0; at < columns; ++at) partial[at] += panel[at] * unit * weight;
    if (i % kRowsPerPartialSum == kRowsPerPartialSum - 1 || i == rows - 1)
      for (int64_t at = 0; at < columns; ++at) to[at] += partial[at] * factor;
  }
}

struct Columns {
  int64_t problem, begin, count;
};

SHIFCON_INLINE Columns columns_of(int64_t task, int64_t width) {
  const int64_t per_problem = blocks(width, kColumnsOfTask), begin = task % per_problem * kColumnsOfTask;
  return {task / per_problem, begin, width - begin < kColumnsOfTask ? width - begin : kColumnsOfTask};
}

}  // namespace

void pair_lengths(const UnitPair& p, int64_t begin, int64_t end) {
  const int64_t of_a = p.problems * p.rows_a;
  with_dtype(p.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (begin < of_a) lengths<T>(p.a, p.inverse_a, begin, end < of_a ? end : of_a);
    if (end > of_a) lengths<T>(p.b, p.inverse_b, begin > of_a ? begin - of_a : 0, end - of_a);
  });
}

void pair_offset(const UnitPair& p, int64_t begin, int64_t end) {
  with_dtype(p.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = begin; task < end; ++task) {
      const Columns own = columns_of(task, p.a.width);
      float* to = p.offset + own.problem * p.a.width + own.begin;
      for (int64_t at = 0; at < own.count; ++at) to[at] = 0;
      add_rows<T>(p.a, own.problem * p.rows_a, p.rows_a, p.inverse_a, nullptr, 1.0f / static_cast<float>(p.rows_a),
                  own.begin, own.count, to);
      add_rows<T>(p.b, own.problem * p.rows_b, p.rows_b, p.inverse_b, nullptr, -1.0f / static_cast<float>(p.rows_b),
                  own.begin, own.count, to);
    }
  });
}

void pair_total(const PairGradient& g, int64_t begin, int64_t end) {
  const UnitPair& p = g.pair;
  with_dtype(p.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = begin; task < end; ++task) {
      const Columns own = columns_of(task, p.a.width);
      float* to = g.total + own.problem * p.a.width + own.begin;
      for (int64_t at = 0; at < own.count; ++at) to[at] = 0;
      add_rows<T>(p.a, own.problem * p.rows_a, p.rows_a, p.inverse_a, g.row_weights, 1.0f, own.begin, own.count, to);
    }
  });
}

}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
