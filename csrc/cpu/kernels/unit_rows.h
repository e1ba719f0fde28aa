// Tiles of products between the rows of a pair, and their gradients. Formulas: ../unit_rows.h.
//
// A product of raw rows is scaled by their inverse lengths afterwards: no partial sum exceeds ‖a‖ ‖b‖, which is finite
// where both lengths are. Re-centred rows are formed before the product, where their offset may cancel.
//
// Products of bfloat16 numbers are exact in float32, so raw rows of them go into u b′ᵀ unwidened where the processor
// multiplies pairs: the same float32 sums, but for denormals.

#pragma once

#include <type_traits>

#include "../unit_rows.h"
#include "gemm.h"
#include "pairs.h"

#define SHIFCON_NOINLINE static __attribute__((noinline)) SHIFCON_FLAT

namespace shifcon {
namespace SHIFCON_LEVEL {

// Of this level.
void pair_lengths(const UnitPair&, int64_t begin, int64_t end);
void pair_total(const PairGradient&, int64_t begin, int64_t end);

namespace {

// The lengths of a problem's rows, where they were left to the task that takes it.
SHIFCON_INLINE void measure(const UnitPair& p, int64_t problem) {
  if (!p.lengths_by_problem) return;
  pair_lengths(p, problem * p.rows_a, (problem + 1) * p.rows_a);
  pair_lengths(p, p.a.count + problem * p.rows_b, p.a.count + (problem + 1) * p.rows_b);
}

constexpr int64_t kTileStride = panel_stride(kTile);
constexpr int64_t kGradientColumns = 256;  // of a panel that is read once, right after it was widened

// What one thread needs for tiles of at most kTile × kTile products.
struct TileScratch {
  Scratch<float> left{kTile * panel_stride(kDepthBlock)}, right{kTile * panel_stride(kDepthBlock)};
  Scratch<float> product{kTile * kTileStride};
};

// --- rows as panels

// x, or x / ‖x‖ + offset where there is an offset. A row whose length is zero, or overflows, is zero.
template <class T>
SHIFCON_NOINLINE void widen_rows(const Rows& x, const float* inverse, const float* offset, int64_t row, int64_t count,
                                 int64_t column, int64_t width, float* panel, int64_t stride) {
  if (inverse == nullptr && offset == nullptr) return widen_panel<T>(x, row, count, column, width, panel, stride);
  for (int64_t i = 0; i < count; ++i) {
    float* to = panel + i * stride;
    const float factor = inverse ? inverse[row + i] : 1.0f;
    if (offset) {
      const Vector scale = broadcast(factor);
      widen_panel<T>(x, row + i, 1, column, width, to, stride, [&](Vector v, int64_t, int64_t at) {
        return v * scale + load_lanes(offset + column + at, width - at < kLanes ? width - at : kLanes);
      });
    } else if (factor == 0) {
      for (int64_t at = 0; at < padded(width); at += kLanes) store(to + at, Vector{});
    } else {
      widen_panel<T>(x, row + i, 1, column, width, to, stride);
    }
  }
}

template <class T>
SHIFCON_INLINE void widen_a(const UnitPair& p, int64_t row, int64_t count, int64_t column, int64_t width, float* panel,
                            int64_t stride) {
  widen_rows<T>(p.a, p.inverse_a, nullptr, row, count, column, width, panel, stride);
}

// b′ where it is re-centred, else b.
template <class T>
SHIFCON_INLINE void widen_b(const UnitPair& p, int64_t row, int64_t count, int64_t column, int64_t width, float* panel,
                            int64_t stride) {
  const float* offset = p.offset ? p.offset + row / p.rows_b * p.b.width : nullptr;
  widen_rows<T>(p.b, p.inverse_b, offset, row, count, column, width, panel, stride);
}

// What the panel of b still lacks, or null.
SHIFCON_INLINE const float* factors_of_b(const UnitPair& p) { return p.offset ? nullptr : p.inverse_b; }

// --- u b′ᵀ

SHIFCON_NOINLINE void add_products(const float* left, const float* right, int64_t stride, int64_t rows, int64_t columns,
                                   int64_t depth, float* to, bool accumulate) {
  dot_product(left, stride, right, stride, rows, columns, depth, to, kTileStride, accumulate);
}

// Rows as panels of pairs. A row whose length is zero, or overflows, is zero.
SHIFCON_NOINLINE void pack_rows(const Rows& x, const float* inverse, int64_t row, int64_t count, int64_t column,
                                int64_t width, float* panel, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    BFloat16* to = reinterpret_cast<BFloat16*>(panel + i * stride);
    const BFloat16* from = static_cast<const BFloat16*>(x.data) + offset_of(x, row + i) + column * x.width_stride;
    const int64_t filled = inverse && inverse[row + i] == 0 ? 0 : width;
    if (x.width_stride == 1) {
      __builtin_memcpy(to, from, static_cast<size_t>(filled) * sizeof *to);
    } else {
      for (int64_t at = 0; at < filled; ++at) to[at] = from[at * x.width_stride];
    }
    for (int64_t at = filled; at < 2 * padded(pairs_of(width)); ++at) to[at] = BFloat16{};
  }
}

template <class Number>
SHIFCON_NOINLINE void add_products_of_pairs(const float* left, const float* right, int64_t stride, int64_t rows,
                                            int64_t columns, int64_t depth, float* to, bool accumulate) {
  dot_product(reinterpret_cast<const Number*>(left), stride, reinterpret_cast<const Number*>(right), stride, rows,
              columns, depth, to, kTileStride, accumulate);
}

// product_tile, of rows of bfloat16 that are not re-centred. Number: Pair.
template <class Number>
SHIFCON_INLINE void product_tile_of_pairs(const UnitPair& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                          const TileScratch& scratch) {
  const int64_t width = p.a.width;
  int64_t at = 0;
  do {
    const int64_t held = width - at < 2 * kDepthBlock ? width - at : 2 * kDepthBlock, depth = pairs_of(held);
    const int64_t stride = panel_stride(depth);
    pack_rows(p.a, p.inverse_a, row, rows, at, held, scratch.left.get(), stride);
    pack_rows(p.b, p.inverse_b, column, columns, at, held, scratch.right.get(), stride);
    add_products_of_pairs<Number>(scratch.left.get(), scratch.right.get(), stride, rows, columns, depth,
                                  scratch.product.get(), at > 0);
    at += held;
  } while (at < width);
}

// One tile of u b′ᵀ into scratch.product, for `rows` rows of a from `row` and `columns` rows of b from `column`, both
// counted over all problems. What lies beside the tile is undefined.
template <class T>
SHIFCON_INLINE void product_tile(const UnitPair& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                 const TileScratch& scratch) {
  if constexpr (kHasPairs && std::is_same_v<T, BFloat16>) {
    if (p.pairs && p.offset == nullptr) return product_tile_of_pairs<Pair>(p, row, rows, column, columns, scratch);
  }
  const int64_t width = p.a.width;
  float* product = scratch.product.get();
  int64_t at = 0;
  do {
    const int64_t depth = width - at < kDepthBlock ? width - at : kDepthBlock;
    const int64_t stride = panel_stride(depth);
    widen_a<T>(p, row, rows, at, depth, scratch.left.get(), stride);
    widen_b<T>(p, column, columns, at, depth, scratch.right.get(), stride);
    add_products(scratch.left.get(), scratch.right.get(), stride, rows, columns, depth, product, at > 0);
    at += depth;
  } while (at < width);
}

// --- gradients

// What one task owns: some rows of a or of b, of one problem, and W between them and the rows of the other side.
struct GradientRows {
  bool of_a;
  int64_t problem, begin, count;  // rows within the problem
};

SHIFCON_INLINE GradientRows gradient_rows(const PairGradient& p, int64_t task) {
  const int64_t blocks_a = p.grad_a ? blocks(p.pair.rows_a, p.tile) : 0, of_a = p.pair.problems * blocks_a;
  const bool is_a = task < of_a;
  const int64_t rows = is_a ? p.pair.rows_a : p.pair.rows_b;
  const int64_t per_problem = is_a ? blocks_a : blocks(rows, p.tile), local = is_a ? task : task - of_a;
  const int64_t begin = local % per_problem * p.tile;
  return {is_a, local / per_problem, begin, rows - begin < p.tile ? rows - begin : p.tile};
}

SHIFCON_NOINLINE void add_weighted_rows(const float* weights, int64_t row_stride, int64_t depth_stride,
                                        const float* panel, int64_t stride, int64_t rows, int64_t columns, int64_t depth,
                                        float* to, int64_t to_stride, bool accumulate) {
  multiply_into(weights, row_stride, depth_stride, panel, stride, rows, columns, depth, to, to_stride, accumulate);
}

// total (owned rows × d) += W · (rows of the other side). weights: the tile of W as it stands (a × b), here multiplied
// in place by what the other side's panel lacks.
template <class T>
SHIFCON_INLINE void add_gradient(const PairGradient& g, const GradientRows& own, int64_t other, int64_t others,
                                 float* weights, float* panel, float* total, int64_t total_stride) {
  const UnitPair& p = g.pair;
  const int64_t width = p.a.width;
  const int64_t first = own.problem * (own.of_a ? p.rows_b : p.rows_a) + other;
  if (own.of_a) {
    if (const float* factors = factors_of_b(p)) {
      for (int64_t i = 0; i < own.count; ++i)
        for (int64_t j = 0; j < others; ++j) weights[i * kTileStride + j] *= factors[first + j];
    }
  } else if (p.inverse_a) {
    for (int64_t i = 0; i < others; ++i)
      for (int64_t j = 0; j < own.count; ++j) weights[i * kTileStride + j] *= p.inverse_a[first + i];
  }
  for (int64_t at = 0; at < width; at += kDepthBlock) {
    const int64_t columns = width - at < kDepthBlock ? width - at : kDepthBlock, stride = panel_stride(columns);
    if (own.of_a) widen_b<T>(p, first, others, at, columns, panel, stride);
    else widen_a<T>(p, first, others, at, columns, panel, stride);
    add_weighted_rows(weights, own.of_a ? kTileStride : 1, own.of_a ? 1 : kTileStride, panel, stride, own.count,
                      columns, others, total + at, total_stride, other > 0);
  }
}

// ∂L/∂u or ∂L/∂v of one row, through the mean and the length, into the gradient of a or b.
template <class T>
SHIFCON_NOINLINE void finish_row(const T* x, float inverse, bool normalised, const float* mean, float mean_factor,
                                 float* grad, T* to, int64_t width) {
  if (mean) {
    const Vector factor = broadcast(mean_factor);
    for_each_vector(width, [&](int64_t at, int64_t count) {
      store_lanes(grad + at, load_lanes(grad + at, count) + load_lanes(mean + at, count) * factor, count);
    });
  }
  if (!normalised) {
    for_each_vector(width,
                    [&](int64_t at, int64_t count) { store_lanes(to + at, load_lanes(grad + at, count), count); });
    return;
  }
  const Vector scale = broadcast(inverse);
  Vector along[2] = {};
  for_each_vector(width, [&](int64_t at, int64_t count) {
    along[at / kLanes % 2] += load_lanes(x + at, count) * scale * load_lanes(grad + at, count);
  });
  const Vector projection = broadcast(sum(along[0] + along[1]));
  for_each_vector(width, [&](int64_t at, int64_t count) {
    const Vector unit = load_lanes(x + at, count) * scale;
    store_lanes(to + at, (load_lanes(grad + at, count) - unit * projection) * scale, count);
  });
}

template <class T>
SHIFCON_INLINE void finish_rows(const PairGradient& g, const GradientRows& own, float* total, int64_t stride,
                                T* scratch) {
  const UnitPair& p = g.pair;
  const Rows& x = own.of_a ? p.a : p.b;
  const float* inverse = own.of_a ? p.inverse_a : p.inverse_b;
  const int64_t rows = own.of_a ? p.rows_a : p.rows_b;
  const float* mean = g.total ? g.total + own.problem * x.width : nullptr;
  const float factor = (own.of_a ? 1.0f : -1.0f) / static_cast<float>(rows);
  T* out = static_cast<T*>(own.of_a ? g.grad_a : g.grad_b);
  for (int64_t i = 0; i < own.count; ++i) {
    const int64_t row = own.problem * rows + own.begin + i;
    finish_row<T>(contiguous_row(x, row, scratch), inverse ? inverse[row] : 1.0f, inverse != nullptr, mean, factor,
                  total + i * stride, out + row * x.width, x.width);
  }
}

// The gradient of the rows that one task owns; fill(own, other, others, weights) writes a tile of W (a × b).
template <class T, class Fill>
SHIFCON_INLINE void gradient_of_rows(const PairGradient& g, const GradientRows& own, float* weights, float* panel,
                                     float* total, T* row_scratch, Fill&& fill) {
  const int64_t width = g.pair.a.width, stride = panel_stride(width);
  const int64_t others = own.of_a ? g.pair.rows_b : g.pair.rows_a;
  if (others == 0)
    for (int64_t at = 0; at < own.count * stride; ++at) total[at] = 0;
  for (int64_t other = 0; other < others; other += kTile) {
    const int64_t count = others - other < kTile ? others - other : kTile;
    fill(own, other, count, weights);
    add_gradient<T>(g, own, other, count, weights, panel, total, stride);
  }
  finish_rows<T>(g, own, total, stride, row_scratch);
}

// --- gradients where one tile is all of W

// to = W · factors of its rows · factors of its columns, where there are such.
SHIFCON_NOINLINE void scale_weights(const float* weights, int64_t rows, int64_t columns, const float* of_rows,
                                    const float* of_columns, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vector factor = broadcast(of_rows ? of_rows[i] : 1.0f);
    for_each_vector(columns, [&](int64_t at, int64_t count) {
      Vector v = load(weights + i * kTileStride + at);
      if (of_rows) v *= factor;
      if (of_columns) v *= load_lanes(of_columns + at, count);
      store(to + i * kTileStride + at, v);
    });
  }
}

// Some columns of the rows of a gradient: (g - u (u · g)) / ‖x‖, with u · g known.
template <class T>
SHIFCON_NOINLINE void finish_columns(const Rows& x, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                     const float* inverse, const float* projections, const float* g, int64_t stride,
                                     T* scratch, T* to) {
  const Rows some = columns_of(x, column, columns);
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = contiguous_row(some, row + i, scratch);
    const Vector unit = broadcast(inverse ? inverse[row + i] : 1.0f);
    const Vector along = broadcast(inverse ? projections[i] : 0.0f);
    for_each_vector(columns, [&](int64_t at, int64_t count) {
      Vector v = load(g + i * stride + at);
      if (inverse) v = (v - load_lanes(from + at, count) * unit * along) * unit;
      store_lanes(to + (row + i) * x.width + column + at, v, count);
    });
  }
}

// The gradient of one side of one problem of at most kTile × kTile rows that is not re-centred. weights: W (a × b);
// projections: u · g of every row, Σ_j W_ij cos_ij; scaled, panel, product: room for a tile and for two of kTile ×
// kGradientColumns.
template <class T>
SHIFCON_INLINE void gradient_of_side(const PairGradient& g, bool of_a, int64_t problem, const float* weights,
                                     const float* projections, float* scaled, float* panel, float* product,
                                     T* row_scratch) {
  constexpr int64_t kStride = panel_stride(kGradientColumns);
  const UnitPair& p = g.pair;
  const Rows& x = of_a ? p.a : p.b;
  const int64_t row_a = problem * p.rows_a, row_b = problem * p.rows_b, width = x.width;
  const int64_t rows = of_a ? p.rows_a : p.rows_b, others = of_a ? p.rows_b : p.rows_a;
  scale_weights(weights, p.rows_a, p.rows_b, of_a || !p.inverse_a ? nullptr : p.inverse_a + row_a,
                of_a && p.inverse_b ? p.inverse_b + row_b : nullptr, scaled);
  for (int64_t at = 0; at < width; at += kGradientColumns) {
    const int64_t columns = width - at < kGradientColumns ? width - at : kGradientColumns;
    if (of_a) widen_b<T>(p, row_b, others, at, columns, panel, kStride);
    else widen_a<T>(p, row_a, others, at, columns, panel, kStride);
    add_weighted_rows(scaled, of_a ? kTileStride : 1, of_a ? 1 : kTileStride, panel, kStride, rows, columns, others,
                      product, kStride, false);
    finish_columns(x, of_a ? row_a : row_b, rows, at, columns, of_a ? p.inverse_a : p.inverse_b, projections, product,
                   kStride, row_scratch, static_cast<T*>(of_a ? g.grad_a : g.grad_b));
  }
}

}  // namespace
}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
