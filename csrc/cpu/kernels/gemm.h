// Products of small float32 matrices, from panels that a thread keeps in its cache.
//
// A panel is a row-major block in float32, widened from rows of any dtype and stride by widen_panel; its rows are
// zero-padded to whole vectors and lie panel_stride apart. Panels of pairs of bfloat16 numbers: pairs.h. Two products:
//
//   dot_product   C = A Bᵀ (or +=)     vectors run along the depth: neither side is transposed. For rows times rows.
//   multiply      A B                  vectors run along the columns of B, numbers of A are broadcast; every vector of
//                                      the result goes to a function, so that what follows needs no second pass.
//
// A tile of the result stays in registers over the whole depth. Callers cut the depth so that what a tile reads again
// stays in the cache: about kDepthBlock columns of a panel for dot_product, as many rows of B for multiply.

#pragma once

#include <type_traits>

#include "vector.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

// Tiles as large as the registers allow: AVX-512 has 32, the others 16. Those of A B are as wide as whole cache lines of
// 16-bit numbers where that is possible; rows_of_tile(v): the rows of one that is v vectors wide.
#if defined(__AVX512F__)
constexpr int kTileVectors = 4, kDotRows = 4, kDotColumns = 4;
constexpr int rows_of_tile(int vectors) { return vectors == 4 ? 6 : 8; }
#elif defined(__AVX2__)
constexpr int kTileVectors = 4, kDotRows = 4, kDotColumns = 3;
constexpr int rows_of_tile(int vectors) { return vectors == 4 ? 3 : vectors == 2 ? 6 : 8; }
#else
constexpr int kTileVectors = 2, kDotRows = 4, kDotColumns = 2;
constexpr int rows_of_tile(int) { return 4; }
#endif
constexpr int64_t kDepthBlock = 1024;

constexpr int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Floats between the rows of a panel: an odd number of whole cache lines, so that rows do not meet in one cache set.
constexpr int64_t panel_stride(int64_t width) {
  constexpr int64_t kLine = 16;
  return ((width + kLine - 1) / kLine | 1) * kLine;
}

// --- panels

template <class T>
SHIFCON_INLINE Vector load_strided(const T* from, int64_t stride, int64_t count) {
  if (stride == 1) return load_lanes(from, count);
  T lanes[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane * stride];
  return load(lanes);
}

// Rows [row, row + count), columns [column, column + width) of x into a panel, through map(vector, row, column); rows
// and columns are counted from the panel's corner.
template <class T, class Map>
SHIFCON_INLINE void widen_panel(const Rows& x, int64_t row, int64_t count, int64_t column, int64_t width, float* panel,
                                int64_t panel_rows_apart, Map&& map) {
  const int64_t stride = x.width_stride;
  for (int64_t i = 0; i < count; ++i) {
    const T* from = static_cast<const T*>(x.data) + offset_of(x, row + i) + column * stride;
    float* to = panel + i * panel_rows_apart;
    int64_t at = 0;
    if (stride == 1) {
      for (; at + kLanes <= width; at += kLanes) store(to + at, map(load(from + at), i, at));
    } else {
      for (; at + kLanes <= width; at += kLanes)
        store(to + at, map(load_strided(from + at * stride, stride, kLanes), i, at));
    }
    if (at < width) {
      store(to + at, Vector{});
      store_some(to + at, map(load_strided(from + at * stride, stride, width - at), i, at), width - at);
    }
  }
}

template <class T>
SHIFCON_INLINE void widen_panel(const Rows& x, int64_t row, int64_t count, int64_t column, int64_t width, float* panel,
                                int64_t panel_rows_apart) {
  widen_panel<T>(x, row, count, column, width, panel, panel_rows_apart, [](Vector v, int64_t, int64_t) { return v; });
}

// total + left right, for numbers of a panel.
SHIFCON_INLINE Vector add_product(Vector total, Vector left, Vector right, float) { return total + left * right; }

// --- C = A Bᵀ

// The lanes of x where the bit kHalf of the lane's number is clear, of y elsewhere, each plus its partner kHalf away.
template <int kHalf>
SHIFCON_INLINE Vector merged(Vector x, Vector y) {
#if defined(__clang__)  // has no __builtin_shuffle
  Vector total;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Vector from = lane & kHalf ? y : x;
    total[lane] = from[lane] + from[lane ^ kHalf];
  }
  return total;
#else
  typedef int32_t Lanes __attribute__((vector_size(SHIFCON_VECTOR_BYTES)));
  Lanes own, partner;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int from = lane & kHalf ? static_cast<int>(kLanes) : 0;
    own[lane] = from + lane;
    partner[lane] = from + (lane ^ kHalf);
  }
  return __builtin_shuffle(x, y, own) + __builtin_shuffle(x, y, partner);
#endif
}

// Lane i of the result is the sum over the lanes of v[i].
template <int kCount>
SHIFCON_INLINE Vector lane_sums(Vector* v) {
  if constexpr (kCount > 1) {
    for (int i = 0; i < kCount / 2; ++i) v[i] = merged<kCount / 2>(v[i], v[i + kCount / 2]);
    return lane_sums<kCount / 2>(v);
  } else {
    return v[0];
  }
}

template <int kRows, int kColumns, class Number>
SHIFCON_INLINE void dot_tile(const Number* a, int64_t a_stride, const Number* b, int64_t b_stride, int64_t depth,
                             float* c, int64_t c_stride, bool accumulate) {
  constexpr int kCount = kRows * kColumns, kRounded = (kCount + kLanes - 1) / kLanes * kLanes;
  Vector total[kRounded] = {};
  for (int64_t at = 0; at < depth; at += kLanes) {
    Vector right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = load(b + j * b_stride + at);
    for (int i = 0; i < kRows; ++i) {
      const Vector left = load(a + i * a_stride + at);
      for (int j = 0; j < kColumns; ++j) {
        Vector& sum = total[i * kColumns + j];
        sum = add_product(sum, left, right[j], Number{});
      }
    }
  }
  float sums[kRounded];
  for (int at = 0; at < kRounded; at += kLanes) store(sums + at, lane_sums<kLanes>(total + at));
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      float& to = c[i * c_stride + j];
      to = accumulate ? to + sums[i * kColumns + j] : sums[i * kColumns + j];
    }
  }
}

template <int kRows, class Number>
SHIFCON_INLINE void dot_rows(const Number* a, int64_t a_stride, const Number* b, int64_t b_stride, int64_t columns,
                             int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  int64_t j = 0;
  for (; j + kDotColumns <= columns; j += kDotColumns)
    dot_tile<kRows, kDotColumns>(a, a_stride, b + j * b_stride, b_stride, depth, c + j, c_stride, accumulate);
  for (; j < columns; ++j)
    dot_tile<kRows, 1>(a, a_stride, b + j * b_stride, b_stride, depth, c + j, c_stride, accumulate);
}

// C (rows × columns) = A Bᵀ, or C += A Bᵀ; A (rows × depth) and B (columns × depth) are panels.
template <class Number>
SHIFCON_INLINE void dot_product(const Number* a, int64_t a_stride, const Number* b, int64_t b_stride, int64_t rows,
                                int64_t columns, int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  int64_t i = 0;
  for (; i + kDotRows <= rows; i += kDotRows)
    dot_rows<kDotRows>(a + i * a_stride, a_stride, b, b_stride, columns, depth, c + i * c_stride, c_stride, accumulate);
  for (; i < rows; ++i)
    dot_rows<1>(a + i * a_stride, a_stride, b, b_stride, columns, depth, c + i * c_stride, c_stride, accumulate);
}

// --- A B

// Elements of an array.
template <class Array>
constexpr int kCountOf = static_cast<int>(std::extent_v<std::remove_reference_t<Array>>);

template <int kRows, int kVectors, class Number, class Finish, class Start>
SHIFCON_INLINE void multiply_tile(const Number* a, int64_t a_row, int64_t a_depth, const Number* b, int64_t b_stride,
                                  int64_t depth, int64_t row, int64_t column, Finish&& finish, Start&& start) {
  for (int i = 0; i < kRows; ++i) start(row + i, column);
  Vector total[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Vector left = broadcast(a[i * a_row]);
      for (int j = 0; j < kVectors; ++j) total[i][j] = add_product(total[i][j], left, right[j], Number{});
    }
    a += a_depth;
    b += b_stride;
  }
  // Left to itself, GCC keeps this a loop at times, and the whole tile in memory for it.
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) finish(row + i, column, total[i]);
}

template <int kVectors, class Number, class Finish, class Start>
SHIFCON_INLINE void multiply_strip(const Number* a, int64_t a_row, int64_t a_depth, const Number* b, int64_t b_stride,
                                   int64_t rows, int64_t depth, int64_t column, Finish&& finish, Start&& start) {
  constexpr int kTileRows = rows_of_tile(kVectors);
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    multiply_tile<kTileRows, kVectors>(a + i * a_row, a_row, a_depth, b, b_stride, depth, i, column, finish, start);
  for (; i + 2 <= rows; i += 2)
    multiply_tile<2, kVectors>(a + i * a_row, a_row, a_depth, b, b_stride, depth, i, column, finish, start);
  if (i < rows)
    multiply_tile<1, kVectors>(a + i * a_row, a_row, a_depth, b, b_stride, depth, i, column, finish, start);
}

struct Nothing {
  void operator()(int64_t, int64_t) const {}
};

// finish(row, column, vectors) for all of A B: as many vectors of a row, from `column` on, as a tile has (an array of
// kTileVectors, and at the end of a row of two and of one); start(row, column) before their sums are formed.
// A(i, k) = a[i · a_row + k · a_depth]: a panel, or a transposed one; B (depth × columns) is a panel.
template <class Number, class Finish, class Start = Nothing>
SHIFCON_INLINE void multiply(const Number* a, int64_t a_row, int64_t a_depth, const Number* b, int64_t b_stride,
                             int64_t rows, int64_t columns, int64_t depth, Finish&& finish, Start&& start = {}) {
  constexpr int64_t kStrip = kTileVectors * kLanes;
  int64_t column = 0;
  for (; column + kStrip <= columns; column += kStrip)
    multiply_strip<kTileVectors>(a, a_row, a_depth, b + column, b_stride, rows, depth, column, finish, start);
  if constexpr (kTileVectors > 2) {
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes)
      multiply_strip<2>(a, a_row, a_depth, b + column, b_stride, rows, depth, column, finish, start);
  }
  for (; column < columns; column += kLanes)
    multiply_strip<1>(a, a_row, a_depth, b + column, b_stride, rows, depth, column, finish, start);
}

// A B into a panel, or added to it.
template <class Number, class Start = Nothing>
SHIFCON_INLINE void multiply_into(const Number* a, int64_t a_row, int64_t a_depth, const Number* b, int64_t b_stride,
                                  int64_t rows, int64_t columns, int64_t depth, float* c, int64_t c_stride,
                                  bool accumulate, Start&& start = {}) {
  const auto finish = [&](int64_t row, int64_t column, const auto& v) {
    float* to = c + row * c_stride + column;
#pragma GCC unroll 8
    for (int j = 0; j < kCountOf<decltype(v)>; ++j)
      store(to + j * kLanes, accumulate ? load(to + j * kLanes) + v[j] : v[j]);
  };
  multiply(a, a_row, a_depth, b, b_stride, rows, columns, depth, finish, start);
}

}  // namespace
}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
