// Rows of numbers two vectors at a time, so that 16-bit numbers fill a whole vector of memory.
//
// A vector of bfloat16 numbers in memory is one of words, each with an even number in its lower half and an odd one in
// its upper half. One shift and one mask make two vectors of float32 of it, the even numbers and the odd ones, where
// widening them in order takes twice the instructions, and the way back likewise. So a Wide<T> holds its numbers in the
// order that is cheap for T, and what it is computed with is loaded as a Wide<T> too, whatever its dtype in memory.

#pragma once

#include <type_traits>

#include "vector.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

constexpr int64_t kWide = 2 * kLanes;

// kWide numbers in float32. Of bfloat16: those at even places, then those at odd ones; else in order.
template <class T>
struct Wide {
  Vector v[2];
};
template <class T>
constexpr bool kEvenOdd = std::is_same_v<T, BFloat16>;

template <class T>
SHIFCON_INLINE Wide<T> operator+(Wide<T> a, Wide<T> b) { return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}}; }
template <class T>
SHIFCON_INLINE Wide<T> operator-(Wide<T> a, Wide<T> b) { return {{a.v[0] - b.v[0], a.v[1] - b.v[1]}}; }
template <class T>
SHIFCON_INLINE Wide<T> operator*(Wide<T> a, Wide<T> b) { return {{a.v[0] * b.v[0], a.v[1] * b.v[1]}}; }
template <class T>
SHIFCON_INLINE Wide<T> operator*(Wide<T> a, Vector b) { return {{a.v[0] * b, a.v[1] * b}}; }

constexpr uint32_t kUpperHalf = 0xffff0000u;

// --- from memory

// The two numbers of every word.
SHIFCON_INLINE Wide<BFloat16> widened_words(Words words) {
  return {{as_vector(words << 16), as_vector(words & kUpperHalf)}};
}
SHIFCON_INLINE Wide<float> load_wide(const float* from) { return {{load(from), load(from + kLanes)}}; }
SHIFCON_INLINE Wide<Float16> load_wide(const Float16* from) { return {{load(from), load(from + kLanes)}}; }
SHIFCON_INLINE Wide<BFloat16> load_wide(const BFloat16* from) {
  Words words;
  __builtin_memcpy(&words, from, sizeof words);
  return widened_words(words);
}

// Lanes of a, then of b, counted through: every second one from kFirst on.
template <int kFirst>
SHIFCON_INLINE Vector every_second(Vector a, Vector b) {
#if defined(__clang__)  // has no __builtin_shuffle
  Vector result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int from = 2 * lane + kFirst;
    result[lane] = from < kLanes ? a[from] : b[from - kLanes];
  }
  return result;
#else
  typedef int32_t Lanes __attribute__((vector_size(SHIFCON_VECTOR_BYTES)));
  Lanes from;
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = 2 * lane + kFirst;
  return __builtin_shuffle(a, b, from);
#endif
}
// The inverse: half kHalf of a[0], b[0], a[1], b[1], …
template <int kHalf>
SHIFCON_INLINE Vector alternating(Vector a, Vector b) {
#if defined(__clang__)
  Vector result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int from = (kHalf * static_cast<int>(kLanes) + lane) / 2;
    result[lane] = lane & 1 ? b[from] : a[from];
  }
  return result;
#else
  typedef int32_t Lanes __attribute__((vector_size(SHIFCON_VECTOR_BYTES)));
  Lanes from;
  for (int lane = 0; lane < kLanes; ++lane)
    from[lane] = (kHalf * static_cast<int>(kLanes) + lane) / 2 + (lane & 1 ? static_cast<int>(kLanes) : 0);
  return __builtin_shuffle(a, b, from);
#endif
}

// float32 numbers in the order of T.
template <class T>
SHIFCON_INLINE Wide<T> in_order_of(Vector first, Vector second) {
  if constexpr (kEvenOdd<T>) return {{every_second<0>(first, second), every_second<1>(first, second)}};
  else return {{first, second}};
}
template <class T>
SHIFCON_INLINE Wide<T> load_wide_as(const float* from) { return in_order_of<T>(load(from), load(from + kLanes)); }
template <class T>
SHIFCON_INLINE Wide<T> load_wide_as(const T* from) { return load_wide(from); }

// `count` of them, up to kWide; the rest is zero, and memory beyond is not read.
template <class T, class From>
SHIFCON_INLINE Wide<T> load_wide_as(const From* from, int64_t count) {
  if (count == kWide) return load_wide_as<T>(from);
  From numbers[kWide] = {};
  for (int64_t i = 0; i < count; ++i) numbers[i] = from[i];
  return load_wide_as<T>(numbers);
}
template <class T>
SHIFCON_INLINE Wide<T> load_wide(const T* from, int64_t count) { return load_wide_as<T>(from, count); }

// A row of float32 numbers as Wides of T, for a row that meets many others: its NaNs tidy, the last Wide filled up with
// zeros. `to` has room for wides_of(width).
constexpr int64_t wides_of(int64_t width) { return (width + kWide - 1) / kWide; }
template <class T>
SHIFCON_INLINE void arrange(const float* row, int64_t width, Wide<T>* to) {
  for (int64_t at = 0; at < width; at += kWide) {
    const Wide<T> w = load_wide_as<T>(row + at, width - at < kWide ? width - at : kWide);
    *to++ = {{tidy(w.v[0]), tidy(w.v[1])}};
  }
}
// The Wide of such a row at a position. Vector by vector: GCC copies a struct of two in quarters, through the stack, and
// reading them back together waits for all four.
template <class T>
SHIFCON_INLINE Wide<T> arranged(const Wide<T>* row, int64_t at) {
  const float* from = reinterpret_cast<const float*>(row) + at;
  return {{load(from), load(from + kLanes)}};
}

// --- to memory

SHIFCON_INLINE void store_wide(float* to, Wide<float> w, NaNs = NaNs::any) {
  store(to, w.v[0]);
  store(to + kLanes, w.v[1]);
}
SHIFCON_INLINE void store_wide(Float16* to, Wide<Float16> w, NaNs = NaNs::any) {
  store(to, w.v[0]);
  store(to + kLanes, w.v[1]);
}
// Both halves of every word, from words whose upper halves hold a number.
SHIFCON_INLINE Words joined(Words even, Words odd) { return (even >> 16) | (odd & kUpperHalf); }
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kRoundsTogether = true;
// Both numbers of every word rounded to nearest even at once, in 16-bit lanes; NaNs are tidy. A number goes up where what
// is cut off is more than half, or half and the number odd: where that, less one if it is even, has the highest bit.
SHIFCON_INLINE Words rounded_together(Wide<BFloat16> w) {
  constexpr int kUpper = 0xaa;  // lanes of upper halves
  const __m256i even = reinterpret_cast<__m256i>(w.v[0]), odd = reinterpret_cast<__m256i>(w.v[1]);
  const __m256i kept = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, kUpper);
  const __m256i cut = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), kUpper);
  const __m256i one_if_even = _mm256_andnot_si256(kept, _mm256_set1_epi16(1));
  const __m256i up = _mm256_srli_epi16(_mm256_subs_epu16(cut, one_if_even), 15);
  return reinterpret_cast<Words>(_mm256_add_epi16(kept, up));
}
#else  // the others round one vector in fewer instructions, or have no such lanes
constexpr bool kRoundsTogether = false;
SHIFCON_INLINE Words rounded_together(Wide<BFloat16> w) {
  return joined(nearest_bfloat16(w.v[0], NaNs::tidy), nearest_bfloat16(w.v[1], NaNs::tidy));
}
#endif
SHIFCON_INLINE Words rounded_words(Wide<BFloat16> w, NaNs nans) {
  if (kRoundsTogether && nans == NaNs::tidy) return rounded_together(w);
  return joined(nearest_bfloat16(w.v[0], nans), nearest_bfloat16(w.v[1], nans));
}
SHIFCON_INLINE void store_wide(BFloat16* to, Wide<BFloat16> w, NaNs nans = NaNs::any) {
  const Words words = rounded_words(w, nans);
  __builtin_memcpy(to, &words, sizeof words);
}

// Stores w and returns what reads back.
SHIFCON_INLINE Wide<float> store_rounded(float* to, Wide<float> w, NaNs = NaNs::any) {
  store_wide(to, w);
  return w;
}
SHIFCON_INLINE Wide<Float16> store_rounded(Float16* to, Wide<Float16> w, NaNs = NaNs::any) {
  store_wide(to, w);
  return load_wide(to);
}
SHIFCON_INLINE Wide<BFloat16> store_rounded(BFloat16* to, Wide<BFloat16> w, NaNs nans = NaNs::any) {
  if (kRoundsTogether && nans == NaNs::tidy) {
    const Words words = rounded_together(w);
    __builtin_memcpy(to, &words, sizeof words);
    return widened_words(words);
  }
  const Words even = nearest_bfloat16(w.v[0], nans), odd = nearest_bfloat16(w.v[1], nans);
  const Words words = joined(even, odd);
  __builtin_memcpy(to, &words, sizeof words);
  return {{as_vector(even & kUpperHalf), as_vector(odd & kUpperHalf)}};
}

// w as it reads back after a store in T.
template <class T>
SHIFCON_INLINE Wide<T> rounded(Wide<T> w, NaNs nans = NaNs::any) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (kRoundsTogether && nans == NaNs::tidy) return widened_words(rounded_together(w));
    return {{as_vector(nearest_bfloat16(w.v[0], nans) & kUpperHalf),
             as_vector(nearest_bfloat16(w.v[1], nans) & kUpperHalf)}};
  } else {
    T numbers[kWide];
    return store_rounded(numbers, w);
  }
}

template <class T>
SHIFCON_INLINE void store_wide(T* to, Wide<T> w, int64_t count, NaNs nans = NaNs::any) {
  if (count == kWide) return store_wide(to, w, nans);
  T numbers[kWide];
  store_wide(numbers, w, nans);
  for (int64_t i = 0; i < count; ++i) to[i] = numbers[i];
}
template <class T>
SHIFCON_INLINE Wide<T> store_rounded(T* to, Wide<T> w, int64_t count, NaNs nans = NaNs::any) {
  if (count == kWide) return store_rounded(to, w, nans);
  T numbers[kWide];
  const Wide<T> result = store_rounded(numbers, w, nans);
  for (int64_t i = 0; i < count; ++i) to[i] = numbers[i];
  return result;
}

// to[i] += w[i], in order.
template <class T>
SHIFCON_INLINE void add_to(float* to, Wide<T> w, int64_t count) {
  Vector first = w.v[0], second = w.v[1];
  if constexpr (kEvenOdd<T>) {
    first = alternating<0>(w.v[0], w.v[1]);
    second = alternating<1>(w.v[0], w.v[1]);
  }
  const int64_t rest = count - kLanes;
  if (rest <= 0) return store_lanes(to, load_lanes(to, count) + first, count);
  store(to, load(to) + first);
  store_lanes(to + kLanes, load_lanes(to + kLanes, rest) + second, rest);
}

// --- past the cache: a line is written without being fetched first, and drives no other out
//
// For results too large to stay in the cache (cache.h), at places that lie on whole vectors. Such stores are not
// ordered with others: a thread that made some calls drain_stores() before it says that it is done.

#if defined(__SSE2__)
SHIFCON_INLINE void stream(void* to, Words words) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(words));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(words));
#else
  _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(words));
#endif
}
SHIFCON_INLINE void drain_stores() { _mm_sfence(); }
#else
SHIFCON_INLINE void stream(void* to, Words words) { __builtin_memcpy(to, &words, sizeof words); }
SHIFCON_INLINE void drain_stores() {}
#endif

template <class T>
SHIFCON_INLINE void stream_wide(T* to, const T* from) {
  constexpr int64_t kStep = SHIFCON_VECTOR_BYTES / sizeof(T);
  for (int64_t at = 0; at < kWide; at += kStep) {
    Words words;
    __builtin_memcpy(&words, from + at, sizeof words);
    stream(to + at, words);
  }
}

// `count` numbers of a result, into the cache or past it.
template <bool kPastCache, class T>
SHIFCON_INLINE void store_result(T* to, Wide<T> w, int64_t count, NaNs nans = NaNs::any) {
  if (!kPastCache || count < kWide) return store_wide(to, w, count, nans);
  T numbers[kWide];
  store_wide(numbers, w, nans);
  stream_wide(to, numbers);
}
// `count` numbers as they are.
template <class T>
SHIFCON_INLINE void copy_past_cache(T* to, const T* from, int64_t count) {
  if (count == kWide) return stream_wide(to, from);
  __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

// --- rows

template <class Function>
SHIFCON_INLINE void for_each_wide(int64_t width, Function&& f) {
  for_each_step<kWide>(width, f);
}

template <class T>
SHIFCON_INLINE void copy_row_past_cache(T* to, const T* from, int64_t width) {
  for_each_wide(width, [&](int64_t at, int64_t count) { copy_past_cache(to + at, from + at, count); });
}

// Σ f(position, count) over a row, in independent chains of additions.
template <class T, class Function>
SHIFCON_INLINE float sum_over(int64_t width, Function&& f) {
  Wide<T> total[2] = {};
  int64_t at = 0;
  for (; at + 2 * kWide <= width; at += 2 * kWide) {
    total[0] = total[0] + f(at, kWide);
    total[1] = total[1] + f(at + kWide, kWide);
  }
  for (; at + kWide <= width; at += kWide) total[0] = total[0] + f(at, kWide);
  if (at < width) total[1] = total[1] + f(at, width - at);
  return sum((total[0].v[0] + total[1].v[0]) + (total[0].v[1] + total[1].v[1]));
}

}  // namespace
}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
