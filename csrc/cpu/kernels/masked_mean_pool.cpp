// m = Σ_t h_t / count over the tokens t that the mask selects, in float32;  e = m, or m / ‖m‖ when normalised;
// factor = 1 / count, or 1 / (count · ‖m‖), and 0 for an empty row or a zero mean. With g = ∂L/∂e,
//
//   ∂L/∂h_t = factor · g,  or  factor · (g - e · (e · g)) when normalised;  0 where the mask selects nothing.
//
// h is read once, and only where it is selected; ∂L/∂h is written once. Both are limited by memory.

#include "masked_mean_pool.h"

#include <cmath>
#include <type_traits>

#include "wide.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

// So many tokens are added to the running sum at once: it is read and written once for all of them, and their
// additions do not wait for each other.
constexpr int64_t kTogether = 8;
// A running sum covers so many groups before it is added to the total: over T tokens the error grows with
// T / (kTogether · kGroupsPerPartialSum), not with T.
constexpr int64_t kGroupsPerPartialSum = 16;

SHIFCON_INLINE bool selects(const Mask& mask, int64_t row, int64_t token) {
  const int64_t at = row * mask.stride[0] + token * mask.stride[1];
  switch (mask.bytes) {
    case 1: return static_cast<const uint8_t*>(mask.data)[at] != 0;
    case 2: return static_cast<const uint16_t*>(mask.data)[at] != 0;
    case 4: return static_cast<const uint32_t*>(mask.data)[at] != 0;
    default: return static_cast<const uint64_t*>(mask.data)[at] != 0;
  }
}

// Σ a · b.
SHIFCON_INLINE float dot(const float* a, const float* b, int64_t width) {
  return sum_over<float>(
      width, [&](int64_t at, int64_t count) { return load_wide(a + at, count) * load_wide(b + at, count); });
}

SHIFCON_INLINE void scale(float* row, float factor, int64_t width) {
  for_each_vector(width, [&](int64_t at, int64_t count) {
    store_lanes(row + at, load_lanes(row + at, count) * broadcast(factor), count);
  });
}

// Σ from[0 ... kCount - 1], pairwise.
template <int64_t kCount, class T>
SHIFCON_INLINE Vector sum_of(const T* const* from, int64_t at, int64_t count) {
  if constexpr (kCount == 1) {
    return load_lanes(from[0] + at, count);
  } else {
    return sum_of<kCount / 2>(from, at, count) + sum_of<kCount / 2>(from + kCount / 2, at, count);
  }
}

template <int64_t kCount, class T>
SHIFCON_INLINE void add_tokens(const T* const* from, float* to, int64_t columns) {
  const T* rows[kCount];
  for (int64_t i = 0; i < kCount; ++i) rows[i] = from[i];
  for_each_vector(columns, [&](int64_t at, int64_t count) {
    store_lanes(to + at, load_lanes(to + at, count) + sum_of<kCount>(rows, at, count), count);
  });
}

// total += partial; partial = 0.
SHIFCON_INLINE void flush(float* partial, float* total, int64_t columns) {
  for (int64_t at = 0; at < columns; ++at) {
    total[at] += partial[at];
    partial[at] = 0;
  }
}

template <class T>
SHIFCON_FLAT void forward_units(const PoolForward& p, int64_t begin, int64_t end) {
  const bool together = p.stride[2] == 1;
  const Scratch<float> partial_scratch(p.columns);
  const Scratch<T> copies(together ? 0 : kTogether * p.columns);
  float* partial = partial_scratch.get();
  const int64_t units = p.width > 0 ? (p.width + p.columns - 1) / p.columns : 1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / units, first = unit % units * p.columns;
    const int64_t columns = first + p.columns < p.width ? p.columns : p.width - first;
    const T* h = static_cast<const T*>(p.h) + row * p.stride[0] + first * p.stride[2];
    float* total = p.pooled + row * p.width + first;
    for (int64_t at = 0; at < columns; ++at) total[at] = partial[at] = 0;
    const T* group[kTogether];
    int64_t filled = 0, groups = 0, count = 0;
    for (int64_t token = 0; token < p.mask.tokens; ++token) {
      if (!selects(p.mask, row, token)) continue;
      ++count;
      const T* from = h + token * p.stride[1];
      if (!together) {
        T* copy = copies.get() + filled * p.columns;
        for (int64_t at = 0; at < columns; ++at) copy[at] = from[at * p.stride[2]];
        from = copy;
      }
      group[filled++] = from;
      if (filled < kTogether) continue;
      add_tokens<kTogether>(group, partial, columns);
      filled = 0;
      if (++groups % kGroupsPerPartialSum == 0) flush(partial, total, columns);
    }
    for (int64_t i = 0; i < filled; ++i) add_tokens<1>(group + i, partial, columns);
    flush(partial, total, columns);
    const float factor = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
    scale(total, factor, columns);
    if (first == 0) p.factor[row] = factor;
  }
}

template <class T>
SHIFCON_FLAT void backward_units(const PoolBackward& p, int64_t begin, int64_t end) {
  const int64_t width = p.grad.width, units = (p.mask.tokens + p.tokens - 1) / p.tokens;
  const Scratch<float> grad_scratch(width), pooled_scratch(p.pooled.data ? width : 0);
  const Scratch<T> result_scratch(width);
  const Scratch<T> nothing_scratch(width);
  T *result = result_scratch.get(), *nothing = nothing_scratch.get();
  __builtin_memset(nothing, 0, static_cast<size_t>(width) * sizeof(T));
  int64_t last = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / units, first = unit % units * p.tokens;
    const int64_t tokens = first + p.tokens < p.mask.tokens ? p.tokens : p.mask.tokens - first;
    if (row != last) {  // every selected token of the row gets the same
      const Vector factor = broadcast(p.factor[row * p.factor_stride]);
      const float* grad = float_row(p.grad, row, grad_scratch.get());
      if (p.pooled.data) {
        const float* pooled = float_row(p.pooled, row, pooled_scratch.get());
        const Vector along = broadcast(dot(grad, pooled, width));
        for_each_vector(width, [&](int64_t at, int64_t count) {
          const Vector across = load_lanes(grad + at, count) - load_lanes(pooled + at, count) * along;
          store_lanes(result + at, across * factor, count);
        });
      } else {
        for_each_vector(width, [&](int64_t at, int64_t count) {
          store_lanes(result + at, load_lanes(grad + at, count) * factor, count);
        });
      }
      last = row;
    }
    T* out = static_cast<T*>(p.grad_h) + (row * p.mask.tokens + first) * width;
    for (int64_t token = 0; token < tokens; ++token, out += width) {
      const T* from = selects(p.mask, row, first + token) ? result : nothing;
      if (p.past_cache) copy_row_past_cache(out, from, width);
      else __builtin_memcpy(out, from, static_cast<size_t>(width) * sizeof(T));
    }
  }
  if (p.past_cache) drain_stores();
}

}  // namespace

void pool_forward(const PoolForward& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* type) { forward_units<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

SHIFCON_FLAT void pool_normalize(const PoolForward& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* pooled = p.pooled + row * p.width;
    const float length = std::sqrt(dot(pooled, pooled, p.width));
    const float inverse = length == 0 ? 0 : 1 / length;
    scale(pooled, inverse, p.width);
    p.factor[row] *= inverse;
  }
}

void pool_backward(const PoolBackward& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto* type) { backward_units<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
