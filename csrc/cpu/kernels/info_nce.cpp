// loss = 1 / (2N) Σ_i [lse_j S_ij + lse_j S_ji - 2 S_ii],   S = scale · u b′ᵀ
// W = ∂L/∂(u b′ᵀ) = scale · ∂L/∂loss / (2N) · (P_row + P_column - 2 I)
//
// S is formed tile by tile and never held. The log-sum-exps run online over the tiles (Milakov & Gimelshein 2018,
// arXiv 1805.02867), in two parts, the maximum m and l = log Σ exp(S - m), and P = exp((S - m) - l): their float32 sum
// would put an error of |m| ulps into P, and P - 1 of a well separated positive is a small number. The backward pass
// forms S again: once for a problem that is a single tile, else once for each side whose gradient is wanted.

#include "../info_nce.h"

#include <cmath>
#include <type_traits>

#include "exp.h"
#include "unit_rows.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

SHIFCON_INLINE Vector larger(Vector x, Vector y) { return x > y ? x : y; }
SHIFCON_INLINE float max_of(Vector v) {
  float lanes[kLanes];
  store(lanes, v);
  float most = lanes[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
  return most;
}

// m and Σ exp(S - m) so far, of some rows or columns.
struct Statistics {
  float* maximum;
  float* total;
};

// Raw products to S. Both passes take S from memory, rounded: were the product with the scale contracted into the
// subtraction of m in one of them, S - m would not be zero where S is m.
SHIFCON_NOINLINE void to_logits(float* product, int64_t rows, int64_t columns, const float* inverse_a,
                                const float* factors_b, float scale) {
  const Vector last = broadcast(scale);
  for (int64_t i = 0; i < rows; ++i) {
    const Vector length = broadcast(inverse_a ? inverse_a[i] : 1.0f);
    float* row = product + i * kTileStride;
    for_each_vector(columns, [&](int64_t at, int64_t count) {
      Vector cosine = load(row + at) * length;
      if (factors_b) cosine *= load_lanes(factors_b + at, count);
      store(row + at, cosine * last);
    });
  }
}

// The first `count` lanes of v, and -infinity.
SHIFCON_INLINE Vector or_nothing(Vector v, int64_t count) {
  if (count >= kLanes) return v;
  Vector lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
  return lane < broadcast(static_cast<float>(count)) ? v : broadcast(-__builtin_inff());
}

// A tile of S into the statistics of its rows and of its columns.
SHIFCON_NOINLINE void add_statistics(float* tile, int64_t rows, int64_t columns, Statistics of_rows,
                                     Statistics of_columns) {
  float maximum[kTile], total[kTile], row_maximum[kTile];
  for_each_vector(columns, [&](int64_t j, int64_t count) {
    store(maximum + j, or_nothing(load_lanes(of_columns.maximum + j, count), count));
    store(total + j, Vector{});
  });
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * kTileStride;
    Vector most = broadcast(-__builtin_inff());
    for_each_vector(columns, [&](int64_t j, int64_t count) {
      const Vector logits = or_nothing(load(row + j), count);
      store(row + j, logits);
      most = larger(logits, most);
      store(maximum + j, larger(logits, load(maximum + j)));
    });
    const float before = of_rows.maximum[i], so_far = max_of(most);
    row_maximum[i] = so_far > before ? so_far : before;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = tile + i * kTileStride;
    const Vector most = broadcast(row_maximum[i]);
    Vector exponentials = {};
    for_each_vector(columns, [&](int64_t j, int64_t) {
      const Vector logits = load(row + j);
      exponentials += exp_of_negative(logits - most);
      store(total + j, load(total + j) + exp_of_negative(logits - load(maximum + j)));
    });
    const float rescale = exp_of_negative(broadcast(of_rows.maximum[i]) - most)[0];
    of_rows.total[i] = of_rows.total[i] * rescale + sum(exponentials);
    of_rows.maximum[i] = row_maximum[i];
  }
  for_each_vector(columns, [&](int64_t j, int64_t count) {
    const Vector rescale = exp_of_negative(load_lanes(of_columns.maximum + j, count) - load(maximum + j));
    const Vector before = load_lanes(of_columns.total + j, count);
    store_lanes(of_columns.total + j, before * rescale + load(total + j), count);
    store_lanes(of_columns.maximum + j, load(maximum + j), count);
  });
}

SHIFCON_INLINE void start(Statistics statistics, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    statistics.maximum[i] = -__builtin_inff();
    statistics.total[i] = 0;
  }
}

struct Tile {
  int64_t problem, i, rows, j, columns;  // rows of a from i, of b from j, within the problem
};

// S of one tile into scratch.product.
template <class T>
SHIFCON_INLINE void logits_of_tile(const UnitPair& p, const Tile& t, float scale, const TileScratch& scratch) {
  const int64_t row = t.problem * p.rows_a + t.i, column = t.problem * p.rows_b + t.j;
  product_tile<T>(p, row, t.rows, column, t.columns, scratch);
  const float* factors = factors_of_b(p);
  to_logits(scratch.product.get(), t.rows, t.columns, p.inverse_a ? p.inverse_a + row : nullptr,
            factors ? factors + column : nullptr, scale);
}

template <class T>
void forward_stripes(const NceForward& f, int64_t begin, int64_t end) {
  const UnitPair& p = f.pair;
  const int64_t count = p.rows_a, all = p.problems * count;
  const TileScratch scratch;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t problem = task / f.stripes, stripe = task % f.stripes, first = problem * count;
    float* columns = f.column_parts + stripe * 2 * all + first;
    start({columns, columns + all}, count);
    measure(p, problem);
    const int64_t last = (stripe + 1) * f.stripe < count ? (stripe + 1) * f.stripe : count;
    for (int64_t i = stripe * f.stripe; i < last; i += kTile) {
      const int64_t rows = last - i < kTile ? last - i : kTile;
      const Statistics of_rows = {f.row_parts + first + i, f.row_parts + all + first + i};
      start(of_rows, rows);
      for (int64_t j = 0; j < count; j += kTile) {
        const Tile tile = {problem, i, rows, j, count - j < kTile ? count - j : kTile};
        logits_of_tile<T>(p, tile, f.scale, scratch);
        add_statistics(scratch.product.get(), rows, tile.columns, of_rows, {columns + j, columns + all + j});
        for (int64_t at = 0; at < rows && i == j; ++at)
          f.diagonal[first + i + at] = scratch.product.get()[at * kTileStride + at];
      }
      for (int64_t at = 0; at < rows; ++at) of_rows.total[at] = std::log(of_rows.total[at]);
    }
  }
}

// Σ_j W_ij cos_ij of the rows of a tile, and of its columns: u · ∂L/∂u where the tile is all of W.
struct Projections {
  float of_rows[kTile], of_columns[kTile];
};

// A tile of S becomes W. Projections: of a whole problem, or null.
template <bool kProject>
SHIFCON_NOINLINE void to_weights(const NceBackward& b, const Tile& t, float* tile, Projections* projections) {
  const UnitPair& p = b.gradient.pair;
  const int64_t first = t.problem * p.rows_a, all = p.problems * p.rows_a;
  const float* column_maximum = b.column_parts + first + t.j;
  const float* column_log = column_maximum + all;
  const Vector weight = broadcast(b.weight[t.problem]), zero = {};
  float one[2 * kLanes] = {};
  one[kLanes] = 1;
  if (kProject)
    for (float& total : projections->of_columns) total = 0;
  for (int64_t i = 0; i < t.rows; ++i) {
    Vector projection = {};
    float* row = tile + i * kTileStride;
    const Vector row_maximum = broadcast(b.row_parts[first + t.i + i]);
    const Vector row_log = broadcast(b.row_parts[all + first + t.i + i]);
    const int64_t diagonal = t.i + i - t.j;
    for_each_vector(t.columns, [&](int64_t j, int64_t count) {
      const Vector logits = kProject ? load_lanes(row + j, count) : load(row + j);
      // S is at most m, and stays so if a product should round otherwise than in the forward pass; NaN stays NaN.
      const Vector below_row = logits - row_maximum, below_column = logits - load_lanes(column_maximum + j, count);
      Vector of_row = exp_of_negative((below_row > zero ? zero : below_row) - row_log);
      Vector of_column =
          exp_of_negative((below_column > zero ? zero : below_column) - load_lanes(column_log + j, count));
      if (diagonal >= j && diagonal < j + kLanes) {  // each direction on its own, so that small differences survive
        const Vector identity = load(one + kLanes - (diagonal - j));
        of_row -= identity;
        of_column -= identity;
      }
      const Vector difference = of_row + of_column;
      if (kProject) {
        const Vector part = difference * logits;
        projection += part;
        store(projections->of_columns + j, load(projections->of_columns + j) + part);
      }
      store(row + j, difference * weight);
    });
    if (kProject) projections->of_rows[i] = sum(projection) * b.share[t.problem];
  }
  if (kProject)
    for (float& total : projections->of_columns) total *= b.share[t.problem];
}

SHIFCON_NOINLINE void sum_rows(const float* tile, int64_t rows, int64_t columns, float* to, bool accumulate) {
  for (int64_t i = 0; i < rows; ++i) {
    Vector total = {};
    for_each_vector(columns, [&](int64_t j, int64_t count) { total += load_lanes(tile + i * kTileStride + j, count); });
    to[i] = accumulate ? to[i] + sum(total) : sum(total);
  }
}

template <class T>
void row_weights(const NceBackward& b, int64_t begin, int64_t end) {
  const UnitPair& p = b.gradient.pair;
  const int64_t count = p.rows_a, tiles = blocks(count, kTile);
  const TileScratch scratch;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t problem = task / tiles, i = task % tiles * kTile, rows = count - i < kTile ? count - i : kTile;
    for (int64_t j = 0; j < count; j += kTile) {
      const Tile tile = {problem, i, rows, j, count - j < kTile ? count - j : kTile};
      logits_of_tile<T>(p, tile, b.scale, scratch);
      to_weights<false>(b, tile, scratch.product.get(), nullptr);
      sum_rows(scratch.product.get(), rows, tile.columns, b.gradient.row_weights + problem * count + i, j > 0);
    }
  }
}

template <class T>
void backward_rows(const NceBackward& b, int64_t begin, int64_t end) {
  const UnitPair& p = b.gradient.pair;
  const TileScratch scratch;
  const Scratch<float> total(b.gradient.tile * panel_stride(p.a.width));
  const Scratch<T> row(p.a.width);
  for (int64_t task = begin; task < end; ++task) {
    gradient_of_rows<T>(b.gradient, gradient_rows(b.gradient, task), scratch.product.get(), scratch.right.get(),
                        total.get(), row.get(),
                        [&](const GradientRows& own, int64_t other, int64_t others, float* weights) {
                          const Tile tile = own.of_a ? Tile{own.problem, own.begin, own.count, other, others}
                                                     : Tile{own.problem, other, others, own.begin, own.count};
                          logits_of_tile<T>(p, tile, b.scale, scratch);
                          to_weights<false>(b, tile, weights, nullptr);
                        });
  }
}

// W of a problem that is one tile serves both sides. In 16 bits, u · ∂L/∂u comes out of W as well; in float32 it has to
// be that of the very sums that it is taken from, as little may remain of them.
template <class T>
void backward_whole(const NceBackward& b, int64_t begin, int64_t end) {
  const UnitPair& p = b.gradient.pair;
  const int64_t count = p.rows_a;
  const bool at_once = sizeof(T) == 2 && b.gradient.total == nullptr;
  const TileScratch scratch;
  const Scratch<float> copy(kTile * kTileStride), total(at_once ? 0 : count * panel_stride(p.a.width));
  const Scratch<T> row(p.a.width);
  float* weights = scratch.product.get();
  Projections projections;
  for (int64_t problem = begin; problem < end; ++problem) {
    const Tile tile = {problem, 0, count, 0, count};
    measure(p, problem);
    logits_of_tile<T>(p, tile, b.scale, scratch);
    if (at_once) to_weights<true>(b, tile, weights, &projections);
    else to_weights<false>(b, tile, weights, nullptr);
    if (b.gradient.total) {
      sum_rows(weights, count, count, b.gradient.row_weights + problem * count, false);
      const int64_t tasks = blocks(p.a.width, kColumnsOfTask);
      pair_total(b.gradient, problem * tasks, (problem + 1) * tasks);
    }
    for (int side = 0; side < 2; ++side) {
      const bool of_a = side == 0;
      if ((of_a ? b.gradient.grad_a : b.gradient.grad_b) == nullptr) continue;
      if (at_once) {
        gradient_of_side<T>(b.gradient, of_a, problem, weights, of_a ? projections.of_rows : projections.of_columns,
                            copy.get(), scratch.right.get(), scratch.left.get(), row.get());
      } else {
        const size_t bytes = static_cast<size_t>(count * kTileStride) * sizeof(float);
        gradient_of_rows<T>(
            b.gradient, {of_a, problem, 0, count}, copy.get(), scratch.right.get(), total.get(), row.get(),
            [&](const GradientRows&, int64_t, int64_t, float* w) { __builtin_memcpy(w, weights, bytes); });
      }
    }
  }
}

}  // namespace

void nce_forward(const NceForward& f, int64_t begin, int64_t end) {
  with_dtype(f.pair.a.dtype,
             [&](auto* type) { forward_stripes<std::remove_pointer_t<decltype(type)>>(f, begin, end); });
}

void nce_merge_columns(const NceForward& f, int64_t begin, int64_t end) {
  const int64_t all = f.pair.problems * f.pair.rows_a;
  for (int64_t at = begin; at < end; ++at) {
    float maximum = f.column_parts[at], total = 0;
    for (int64_t stripe = 1; stripe < f.stripes; ++stripe) {
      const float other = f.column_parts[stripe * 2 * all + at];
      maximum = other > maximum ? other : maximum;
    }
    for (int64_t stripe = 0; stripe < f.stripes; ++stripe) {
      const float* part = f.column_parts + stripe * 2 * all + at;
      total += part[all] * exp_of_negative(broadcast(part[0] - maximum))[0];
    }
    f.column_parts[at] = maximum;
    f.column_parts[all + at] = std::log(total);
  }
}

void nce_row_weights(const NceBackward& b, int64_t begin, int64_t end) {
  with_dtype(b.gradient.pair.a.dtype,
             [&](auto* type) { row_weights<std::remove_pointer_t<decltype(type)>>(b, begin, end); });
}

void nce_backward(const NceBackward& b, int64_t begin, int64_t end) {
  with_dtype(b.gradient.pair.a.dtype,
             [&](auto* type) { backward_rows<std::remove_pointer_t<decltype(type)>>(b, begin, end); });
}

void nce_backward_whole(const NceBackward& b, int64_t begin, int64_t end) {
  with_dtype(b.gradient.pair.a.dtype,
             [&](auto* type) { backward_whole<std::remove_pointer_t<decltype(type)>>(b, begin, end); });
}

}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
