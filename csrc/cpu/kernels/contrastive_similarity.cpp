// S = scale · u b′ᵀ, tile by tile. With W = scale · ∂L/∂S, the gradients are those of unit_rows.h.

#include "../contrastive_similarity.h"

#include <type_traits>

#include "unit_rows.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

SHIFCON_NOINLINE void write_tile(const float* product, int64_t rows, int64_t columns, const float* inverse_a,
                                 const float* factors_b, float scale, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vector length = broadcast(inverse_a ? inverse_a[i] : 1.0f), last = broadcast(scale);
    const float* from = product + i * kTileStride;
    for_each_vector(columns, [&](int64_t at, int64_t count) {
      Vector cosine = load(from + at) * length;
      if (factors_b) cosine *= load_lanes(factors_b + at, count);
      store_lanes(out + i * out_stride + at, cosine * last, count);
    });
  }
}

template <class T>
void forward_tiles(const SimilarityForward& s, int64_t begin, int64_t end) {
  const UnitPair& p = s.pair;
  const int64_t tiles_a = blocks(p.rows_a, kTile), tiles_b = blocks(p.rows_b, kTile);
  const TileScratch scratch;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t problem = task / (tiles_a * tiles_b);
    const int64_t i = task / tiles_b % tiles_a * kTile, j = task % tiles_b * kTile;
    const int64_t rows = p.rows_a - i < kTile ? p.rows_a - i : kTile;
    const int64_t columns = p.rows_b - j < kTile ? p.rows_b - j : kTile;
    const int64_t row = problem * p.rows_a + i, column = problem * p.rows_b + j;
    product_tile<T>(p, row, rows, column, columns, scratch);
    const float* factors = factors_of_b(p);
    write_tile(scratch.product.get(), rows, columns, p.inverse_a ? p.inverse_a + row : nullptr,
               factors ? factors + column : nullptr, s.scale, s.out + row * p.rows_b + j, p.rows_b);
  }
}

template <class T>
void backward_rows(const SimilarityBackward& s, int64_t begin, int64_t end) {
  const UnitPair& p = s.gradient.pair;
  const int64_t width = p.a.width;
  const Scratch<float> weights(kTile * kTileStride), panel(kTile * panel_stride(kDepthBlock));
  const Scratch<float> total(s.gradient.tile * panel_stride(width));
  const Scratch<T> row(width);
  for (int64_t task = begin; task < end; ++task) {
    gradient_of_rows<T>(s.gradient, gradient_rows(s.gradient, task), weights.get(), panel.get(), total.get(), row.get(),
                        [&](const GradientRows& own, int64_t other, int64_t others, float* tile) {
                          const int64_t i = own.of_a ? own.begin : other, j = own.of_a ? other : own.begin;
                          const int64_t rows = own.of_a ? own.count : others, columns = own.of_a ? others : own.count;
                          const Vector scale = broadcast(s.scale);
                          widen_panel<float>(s.grad, own.problem * p.rows_a + i, rows, j, columns, tile, kTileStride,
                                             [&](Vector v, int64_t, int64_t) { return v * scale; });
                        });
  }
}

}  // namespace

void similarity_forward(const SimilarityForward& s, int64_t begin, int64_t end) {
  with_dtype(s.pair.a.dtype, [&](auto* type) { forward_tiles<std::remove_pointer_t<decltype(type)>>(s, begin, end); });
}

void similarity_row_weights(const SimilarityBackward& s, int64_t begin, int64_t end) {
  const Scratch<float> scratch(s.grad.width);
  for (int64_t row = begin; row < end; ++row) {
    const float* grad = contiguous_row(s.grad, row, scratch.get());
    Vector total = {};
    for_each_vector(s.grad.width, [&](int64_t at, int64_t count) { total += load_lanes(grad + at, count); });
    s.gradient.row_weights[row] = sum(total) * s.scale;
  }
}

void similarity_backward(const SimilarityBackward& s, int64_t begin, int64_t end) {
  with_dtype(s.gradient.pair.a.dtype,
             [&](auto* type) { backward_rows<std::remove_pointer_t<decltype(type)>>(s, begin, end); });
}

}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
