// h = round(x + residual + shift[index]),  rstd = 1 / √(mean(h²) + eps),  x̂ = h · rstd,  in float32, and
//
//   llama: y = round(round(x̂) · w)      gemma: y = round(x̂ · (1 + w))      olmo: y = round(x̂ · w)
//
// With g = ∂L/∂y · w (or 1 + w):  ∂L/∂h = rstd · (g - x̂ · mean(g · x̂)) + (∂L/∂h from above),
// ∂L/∂w = Σ_rows ∂L/∂y · x̂ (llama: round(x̂)),  ∂L/∂shift[l] = Σ_{rows of language l} ∂L/∂h.
//
// A row is read from memory once: its second pass finds it in the first-level cache. With AVX2 the forward pass is bound
// by instructions, not by memory, and rounding to bfloat16 is most of them: so NaNs of tables are made tidy beforehand.

#include "add_shift_rms_norm.h"

#include <cmath>
#include <type_traits>

#include "wide.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

// Sums over rows run through a partial sum of so many rows: the error grows with the number of partial sums.
constexpr int64_t kRowsPerPartialSum = 64;

// h of one row into `h`, and Σ h².
template <bool kResidual, bool kShift, class T>
SHIFCON_INLINE float add_row(const T* x, const T* residual, const Wide<T>* shift, T* h, int64_t width) {
  return sum_over<T>(width, [&](int64_t at, int64_t count) {
    Wide<T> total = load_wide(x + at, count);
    if (kResidual) total = total + load_wide(residual + at, count);
    if (kShift) total = total + arranged(shift, at);
    total = store_rounded(h + at, total, count, NaNs::tidy);
    return total * total;
  });
}

template <class T>
SHIFCON_INLINE float square_sum(const T* h, int64_t width) {
  return sum_over<T>(width, [&](int64_t at, int64_t count) {
    const Wide<T> value = load_wide(h + at, count);
    return value * value;
  });
}

// A row to which nothing is added stays what it was bit for bit: -0.0 + 0.0 would be 0.0, and NaN has many faces.
template <class T>
SHIFCON_INLINE float copy_row(const T* x, T* h, int64_t width) {
  __builtin_memcpy(h, x, static_cast<size_t>(width) * sizeof(T));
  return square_sum(x, width);
}

// The hardware's prefetchers stop at the end of a page, and a row of 2,048 16-bit numbers is one: the next row of every
// tensor that comes from memory is asked for while the second pass works in the cache.
template <class T, class... Others>
SHIFCON_INLINE void prefetch(int64_t at, const T* row, Others... rows) {
  constexpr int64_t kLine = 64, kStep = kWide * static_cast<int64_t>(sizeof(T));
  for (int64_t byte = 0; byte < kStep; byte += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(row + at) + byte);
  if constexpr (sizeof...(rows) > 0) prefetch(at, rows...);
}

// y of one row; where h is to go past the cache, from there to `out` as well.
template <bool kLlama, bool kPastCache, class T, class Factor>
SHIFCON_INLINE void normalise_row(const T* h, T* out, const Factor& factor, float rstd, T* y, int64_t width,
                                  const T* next_x, const T* next_residual) {
  const Vector scale = broadcast(rstd);
  for_each_wide(width, [&](int64_t at, int64_t count) {
    prefetch(at, next_x, next_residual);
    Wide<T> normalised = load_wide(h + at, count) * scale;
    if (kLlama) normalised = rounded(normalised, NaNs::tidy);
    store_result<kPastCache>(y + at, normalised * factor(at, count), count, NaNs::tidy);
    if (kPastCache && out) copy_past_cache(out + at, h + at, count);
  });
}

SHIFCON_INLINE int64_t room_for_copy(const Rows& rows) { return rows.width_stride == 1 ? 0 : rows.width; }

// w, or 1 + w, in float32.
template <class T>
class FactorRow {
 public:
  FactorRow(const Rows& weight, Style style) : row_(wides_of(weight.width)) {
    const Scratch<float> scratch(weight.width);
    const float* from = float_row(weight, 0, scratch.get());
    if (style == Style::gemma) {
      for (int64_t at = 0; at < weight.width; ++at) scratch.get()[at] = 1.0f + from[at];
      from = scratch.get();
    }
    arrange(from, weight.width, row_.get());
  }
  Wide<T> operator()(int64_t at, int64_t) const { return arranged(row_.get(), at); }

 private:
  const Scratch<Wide<T>> row_;
};

// f(factor), where factor(position, count) is w or 1 + w: from the weight itself, where it has the type of the rows, as
// a row of float32 takes twice the room in the first-level cache.
template <class T, class Function>
SHIFCON_INLINE void with_factor(const Rows& weight, Dtype dtype, Style style, Function&& f) {
  if (weight.dtype == dtype && weight.width_stride == 1 && style != Style::gemma) {
    const T* from = static_cast<const T*>(weight.data);
    return f([=](int64_t at, int64_t count) { return load_wide(from + at, count); });
  }
  f(FactorRow<T>(weight, style));
}

// The shift of one language; rows of a language follow each other.
template <class T>
class ShiftRow {
 public:
  explicit ShiftRow(const Rows& shift) : shift_(shift), row_(shift.data ? wides_of(shift.width) : 0), scratch_(shift.width) {}
  const Wide<T>* operator()(int64_t language) {
    if (language != language_) arrange(float_row(shift_, language, scratch_.get()), shift_.width, row_.get());
    language_ = language;
    return row_.get();
  }

 private:
  const Rows& shift_;
  const Scratch<Wide<T>> row_;
  const Scratch<float> scratch_;
  int64_t language_ = -1;
};

template <bool kPastCache, class T, class Factor>
SHIFCON_FLAT void forward_rows(const NormForward& p, const Factor& factor, int64_t begin, int64_t end) {
  const int64_t width = p.x.width;
  ShiftRow<T> shift_row(p.shift);
  const Scratch<T> x_scratch(room_for_copy(p.x)), residual_scratch(room_for_copy(p.residual));
  const Scratch<T> h_scratch(kPastCache && p.h ? width : 0);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = contiguous_row(p.x, row, x_scratch.get());
    const T* h = x;
    T* out = p.h ? static_cast<T*>(p.h) + row * width : nullptr;
    float squares;
    if (p.h == nullptr) {
      squares = square_sum(x, width);
    } else {
      T* row_h = kPastCache ? h_scratch.get() : out;
      const T* residual = p.residual.data ? contiguous_row(p.residual, row, residual_scratch.get()) : nullptr;
      const int64_t id = p.shift.data ? id_of_row(p.index, row) : -1;
      const Wide<T>* shift = id >= 0 ? shift_row(id) : nullptr;
      if (residual && shift) squares = add_row<true, true>(x, residual, shift, row_h, width);
      else if (residual) squares = add_row<true, false>(x, residual, shift, row_h, width);
      else if (shift) squares = add_row<false, true>(x, residual, shift, row_h, width);
      else squares = copy_row(x, row_h, width);
      h = row_h;
    }
    const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(width) + p.eps);
    p.rstd[row] = rstd;
    T* y = static_cast<T*>(p.y) + row * width;
    const T* next_x = row + 1 < end ? row_start<T>(p.x, row + 1) : h;
    const T* next_residual = row + 1 < end && p.residual.data ? row_start<T>(p.residual, row + 1) : h;
    if (p.style == Style::llama)
      normalise_row<true, kPastCache>(h, out, factor, rstd, y, width, next_x, next_residual);
    else
      normalise_row<false, kPastCache>(h, out, factor, rstd, y, width, next_x, next_residual);
  }
  if (kPastCache) drain_stores();
}

// ∂L/∂h of kWide numbers, from their row's mean(g · x̂).
template <bool kAbove, class T>
SHIFCON_INLINE Wide<T> grad_of(const T* grad_y, const T* grad_h, const T* h, Wide<T> factor, Vector rstd,
                               Vector along, int64_t at, int64_t count) {
  const Wide<T> normalised = load_wide(h + at, count) * rstd;
  const Wide<T> g = load_wide(grad_y + at, count) * factor;
  const Wide<T> through = (g - normalised * along) * rstd;
  return kAbove ? through + load_wide(grad_h + at, count) : through;
}

template <class T>
struct BackwardRow {
  const T* grad_y;
  const T* grad_h;
  const T* h;
};

// The rows of a backward pass, with a copy of those that do not lie side by side.
template <class T>
class BackwardRows {
 public:
  explicit BackwardRows(const NormBackward& p)
      : p_(p), grad_y_(room_for_copy(p.grad_y)), grad_h_(room_for_copy(p.grad_h)), h_(room_for_copy(p.h)) {}
  BackwardRow<T> operator[](int64_t row) const {
    return {p_.grad_y.data ? contiguous_row(p_.grad_y, row, grad_y_.get()) : nullptr,
            p_.grad_h.data ? contiguous_row(p_.grad_h, row, grad_h_.get()) : nullptr,
            contiguous_row(p_.h, row, h_.get())};
  }
  // Where the row lies in memory, to be fetched and not read.
  BackwardRow<T> start_of(int64_t row) const {
    return {row_start<T>(p_.grad_y, row), p_.grad_h.data ? row_start<T>(p_.grad_h, row) : nullptr,
            row_start<T>(p_.h, row)};
  }

 private:
  const NormBackward& p_;
  const Scratch<T> grad_y_, grad_h_, h_;
};

template <class T, class Factor>
SHIFCON_INLINE float mean_along(const BackwardRow<T>& row, const Factor& factor, float rstd, int64_t width) {
  const float total = sum_over<T>(width, [&](int64_t at, int64_t count) {
    return load_wide(row.grad_y + at, count) * factor(at, count) * load_wide(row.h + at, count);
  });
  return total * rstd / static_cast<float>(width);
}

template <bool kPastCache, class T, class Factor>
SHIFCON_FLAT void backward_rows(const NormBackward& p, const Factor& factor, int64_t first_chunk, int64_t last_chunk) {
  const int64_t width = p.h.width;
  const Scratch<float> partial_scratch(p.grad_weight ? width : 0);
  const BackwardRows<T> rows(p);
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t begin = chunk * p.chunk;
    const int64_t end = begin + p.chunk < p.h.count ? begin + p.chunk : p.h.count;
    float* total = p.grad_weight ? p.grad_weight + chunk * width : nullptr;
    float* partial = partial_scratch.get();
    if (total) {
      for (int64_t at = 0; at < width; ++at) total[at] = partial[at] = 0;
    }
    for (int64_t row = begin; row < end; ++row) {
      const BackwardRow<T> here = rows[row];
      T* out = p.grad_input ? static_cast<T*>(p.grad_input) + row * width : nullptr;
      if (here.grad_y == nullptr) {
        if (p.along) p.along[row] = 0;
        if (out) {
          for_each_wide(width, [&](int64_t at, int64_t count) {
            store_result<kPastCache>(out + at, load_wide(here.grad_h + at, count), count);
          });
        }
        continue;
      }
      const Vector rstd = broadcast(p.rstd[row]);
      if (out || p.along) {
        const float mean = mean_along(here, factor, p.rstd[row], width);
        if (p.along) p.along[row] = mean;
        const Vector along = broadcast(mean);
        const BackwardRow<T> next = row + 1 < end ? rows.start_of(row + 1) : here;
        if (out && here.grad_h) {
          for_each_wide(width, [&](int64_t at, int64_t count) {
            prefetch(at, next.grad_y, next.grad_h, next.h);
            const Wide<T> weight = factor(at, count);
            const Wide<T> grad = grad_of<true>(here.grad_y, here.grad_h, here.h, weight, rstd, along, at, count);
            store_result<kPastCache>(out + at, grad, count);
          });
        } else if (out) {
          for_each_wide(width, [&](int64_t at, int64_t count) {
            prefetch(at, next.grad_y, next.h);
            const Wide<T> weight = factor(at, count);
            const Wide<T> grad = grad_of<false>(here.grad_y, here.grad_h, here.h, weight, rstd, along, at, count);
            store_result<kPastCache>(out + at, grad, count);
          });
        }
      }
      if (total) {
        const bool llama = p.style == Style::llama;
        for_each_wide(width, [&](int64_t at, int64_t count) {
          Wide<T> normalised = load_wide(here.h + at, count) * rstd;
          if (llama) normalised = rounded(normalised);
          add_to(partial + at, load_wide(here.grad_y + at, count) * normalised, count);
        });
        if ((row - begin) % kRowsPerPartialSum == kRowsPerPartialSum - 1 || row == end - 1) {
          for (int64_t at = 0; at < width; ++at) {
            total[at] += partial[at];
            partial[at] = 0;
          }
        }
      }
    }
  }
  if (kPastCache) drain_stores();
}

// ∂L/∂shift, some columns of every row: no two threads write the same number, and every sum has one order.
template <class T>
SHIFCON_FLAT void backward_shift_columns(const NormBackward& p, int64_t begin, int64_t end) {
  const int64_t width = p.h.width, columns = end - begin;
  const Scratch<float> partial_scratch(columns);
  const FactorRow<T> factor(columns_of(p.weight, begin, columns), p.style);
  float* partial = partial_scratch.get();
  const BackwardRows<T> rows(p);
  int64_t language = -1, summed = 0;
  for (int64_t at = 0; at < columns; ++at) partial[at] = 0;
  auto flush = [&] {
    if (summed == 0) return;
    float* total = p.grad_shift + language * width + begin;
    for (int64_t at = 0; at < columns; ++at) {
      total[at] += partial[at];
      partial[at] = 0;
    }
    summed = 0;
  };
  for (int64_t row = 0; row < p.h.count; ++row) {
    const int64_t id = id_of_row(p.index, row);
    if (id < 0) continue;
    if (id != language || summed == kRowsPerPartialSum) flush();
    language = id;
    ++summed;
    const BackwardRow<T> here = rows[row];
    const T* grad_h = here.grad_h ? here.grad_h + begin : nullptr;
    if (here.grad_y == nullptr) {
      for_each_wide(columns, [&](int64_t at, int64_t count) {
        add_to(partial + at, load_wide(grad_h + at, count), count);
      });
      continue;
    }
    const Vector rstd = broadcast(p.rstd[row]), along = broadcast(p.along[row]);
    for_each_wide(columns, [&](int64_t at, int64_t count) {
      const T* grad_y = here.grad_y + begin;
      const T* h = here.h + begin;
      add_to(partial + at,
             grad_h ? grad_of<true>(grad_y, grad_h, h, factor(at, count), rstd, along, at, count)
                    : grad_of<false>(grad_y, grad_h, h, factor(at, count), rstd, along, at, count),
             count);
    });
  }
  flush();
}

}  // namespace

void norm_forward(const NormForward& p, int64_t begin, int64_t end) {
  with_dtype(p.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_factor<T>(p.weight, p.x.dtype, p.style, [&](const auto& factor) {
      if (p.past_cache) forward_rows<true, T>(p, factor, begin, end);
      else forward_rows<false, T>(p, factor, begin, end);
    });
  });
}

void norm_backward(const NormBackward& p, int64_t begin, int64_t end) {
  with_dtype(p.h.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_factor<T>(p.weight, p.h.dtype, p.style, [&](const auto& factor) {
      if (p.past_cache) backward_rows<true, T>(p, factor, begin, end);
      else backward_rows<false, T>(p, factor, begin, end);
    });
  });
}

void norm_backward_shift(const NormBackward& p, int64_t begin, int64_t end) {
  with_dtype(p.h.dtype,
             [&](auto* type) { backward_shift_columns<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
