// Vectors of float32 in the width of the level, and their way to and from memory in every dtype.
//
// GCC and Clang vector extensions: the same source serves SSE2, NEON, AVX2 and AVX-512. Everything here has internal
// linkage, because this header is compiled once per level into one library.

#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "strided.h"

#if defined(__AVX512F__)
#define SHIFCON_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SHIFCON_VECTOR_BYTES 32
#else
#define SHIFCON_VECTOR_BYTES 16
#endif

#define SHIFCON_INLINE static inline __attribute__((always_inline))
// A loop whose helpers and lambdas are all inlined into it, so that the length of a whole vector is a constant there.
#define SHIFCON_FLAT __attribute__((flatten))

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int64_t kLanes = SHIFCON_VECTOR_BYTES / 4;
typedef float Vector __attribute__((vector_size(SHIFCON_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(SHIFCON_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(SHIFCON_VECTOR_BYTES / 2)));

SHIFCON_INLINE Vector broadcast(float value) { return value - Vector{}; }
SHIFCON_INLINE Words as_words(Vector v) { return reinterpret_cast<Words>(v); }
SHIFCON_INLINE Vector as_vector(Words w) { return reinterpret_cast<Vector>(w); }

// --- float32

SHIFCON_INLINE Vector load(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
SHIFCON_INLINE void store(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof v); }

// --- bfloat16: the upper half of a float32, rounded to nearest even; NaN stays NaN
//
// Not the instruction of AVX512-BF16, which takes denormals for zero.

SHIFCON_INLINE Words widened(HalfWords half) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(half)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(half)));
#else
  return __builtin_convertvector(half, Words);
#endif
}
// Words below 2^16 as half words.
SHIFCON_INLINE HalfWords narrowed(Words words) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
  const __m256i wide = reinterpret_cast<__m256i>(words);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
  return reinterpret_cast<HalfWords>(_mm256_castsi256_si128(packed));
#else
  return __builtin_convertvector(words, HalfWords);
#endif
}
// Which NaNs there may be among numbers to be rounded. Tidy ones have a lower half of zeros, as all have that came from
// 16 bits or from arithmetic with such: rounding cannot carry them away, and need not look for them.
enum class NaNs { any, tidy };

// The number is in the upper half of its word; what is below means nothing. A NaN is cut off: what arithmetic makes is
// quiet and stays one, and so does what came from 16 bits.
SHIFCON_INLINE Words nearest_bfloat16(Vector v, NaNs nans = NaNs::any) {
  const Words bits = as_words(v);
  const Words bias = ((bits >> 16) & 1u) + 0x7fffu;
  if (nans == NaNs::tidy) return bits + bias;
#if defined(__AVX512F__)
  const __m512i from = reinterpret_cast<__m512i>(bits);
  const __mmask16 is_number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  return reinterpret_cast<Words>(_mm512_mask_add_epi32(from, is_number, from, reinterpret_cast<__m512i>(bias)));
#else
  return bits + (bias & reinterpret_cast<Words>(v == v));
#endif
}
// v with tidy NaNs.
SHIFCON_INLINE Vector tidy(Vector v) {
  const Words number = reinterpret_cast<Words>(v == v);
  return as_vector((as_words(v) & number) | (~number & 0x7fc00000u));
}
SHIFCON_INLINE Vector load(const BFloat16* from) {
  HalfWords half;
  __builtin_memcpy(&half, from, sizeof half);
  return as_vector(widened(half) << 16);
}
SHIFCON_INLINE void store(BFloat16* to, Vector v) {
  const HalfWords half = narrowed(nearest_bfloat16(v) >> 16);
  __builtin_memcpy(to, &half, sizeof half);
}

// --- float16

#if defined(__AVX512F__)
SHIFCON_INLINE Vector load(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
SHIFCON_INLINE void store(Float16* to, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
SHIFCON_INLINE Vector load(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
SHIFCON_INLINE void store(Float16* to, Vector v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
SHIFCON_INLINE float widened_float16(Float16 half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  const uint32_t magnitude = half.bits & 0x7fffu;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    bits = (magnitude << 13) | 0x7f800000u;
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + (112u << 23);
  } else {  // a denormal is its integer times 2^-24
    value = static_cast<float>(magnitude) * 0x1p-24f;
    __builtin_memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
SHIFCON_INLINE Float16 narrowed_float16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65,520 and more round to infinity
    half = 0x7c00u;
  } else if (bits >= 0x38800000u) {  // normal: nearest even on the 13 bits that go
    half = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  } else {  // adding 0.5 leaves the denormal's integer in the low bits, rounded by the addition itself
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    __builtin_memcpy(&half, &magnitude, sizeof half);
    half -= 0x3f000000u;
  }
  return Float16{static_cast<uint16_t>(sign | half)};
}
// Called, not inlined: dozens of loops hold them, and only machines without F16C run them.
static __attribute__((noinline)) void widen_float16(const Float16* from, float* to) {
  for (int64_t lane = 0; lane < kLanes; ++lane) to[lane] = widened_float16(from[lane]);
}
static __attribute__((noinline)) void narrow_float16(const float* from, Float16* to) {
  for (int64_t lane = 0; lane < kLanes; ++lane) to[lane] = narrowed_float16(from[lane]);
}
SHIFCON_INLINE Vector load(const Float16* from) {
  float lanes[kLanes];
  widen_float16(from, lanes);
  return load(lanes);
}
SHIFCON_INLINE void store(Float16* to, Vector v) {
  float lanes[kLanes];
  store(lanes, v);
  narrow_float16(lanes, to);
}
#endif

// --- fewer than a vector: the rest of the lanes is zero, and memory beyond `count` is neither read nor written

template <class T>
SHIFCON_INLINE Vector load_some(const T* from, int64_t count) {
  T lanes[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return load(lanes);
}
template <class T>
SHIFCON_INLINE void store_some(T* to, Vector v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
}

SHIFCON_INLINE float sum(Vector v) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// f(position, count) over a row in steps of kStep; count is kStep, or what is left in the last one.
template <int64_t kStep, class Function>
SHIFCON_INLINE void for_each_step(int64_t width, Function&& f) {
  int64_t at = 0;
  for (; at + kStep <= width; at += kStep) f(at, kStep);
  if (at < width) f(at, width - at);
}
template <class Function>
SHIFCON_INLINE void for_each_vector(int64_t width, Function&& f) {
  for_each_step<kLanes>(width, f);
}

template <class T>
SHIFCON_INLINE Vector load_lanes(const T* from, int64_t count) {
  return count == kLanes ? load(from) : load_some(from, count);
}
template <class T>
SHIFCON_INLINE void store_lanes(T* to, Vector v, int64_t count) {
  if (count == kLanes) store(to, v);
  else store_some(to, v, count);
}

// Uninitialised working memory of one thread; none for a count of 0.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count == 0 ? nullptr
                         : static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlignment))) {}
  ~Scratch() {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

// --- whole rows, where a kernel wants them side by side or in float32

// Where a row begins, whatever its stride.
template <class T>
SHIFCON_INLINE const T* row_start(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + offset_of(rows, row);
}

// A row of T with unit stride: the row itself, or its copy in `scratch` (width elements).
template <class T>
SHIFCON_INLINE const T* contiguous_row(const Rows& rows, int64_t row, T* scratch) {
  const T* from = row_start<T>(rows, row);
  if (rows.width_stride == 1) return from;
  for (int64_t at = 0; at < rows.width; ++at) scratch[at] = from[at * rows.width_stride];
  return scratch;
}

template <class T>
SHIFCON_INLINE void widen(const T* from, int64_t stride, int64_t width, float* to) {
  if (stride == 1) {
    for_each_vector(width, [&](int64_t at, int64_t count) { store_lanes(to + at, load_lanes(from + at, count), count); });
    return;
  }
  for (int64_t at = 0; at < width; ++at) to[at] = load_some(from + at * stride, 1)[0];
}

// A row of any floating dtype as float32: the row itself where it already is, else its copy in `scratch`.
SHIFCON_INLINE const float* float_row(const Rows& rows, int64_t row, float* scratch) {
  const int64_t offset = offset_of(rows, row);
  switch (rows.dtype) {
    case Dtype::float32: {
      const float* from = static_cast<const float*>(rows.data) + offset;
      if (rows.width_stride == 1) return from;
      widen(from, rows.width_stride, rows.width, scratch);
      break;
    }
    case Dtype::bfloat16:
      widen(static_cast<const BFloat16*>(rows.data) + offset, rows.width_stride, rows.width, scratch);
      break;
    case Dtype::float16:
      widen(static_cast<const Float16*>(rows.data) + offset, rows.width_stride, rows.width, scratch);
      break;
    case Dtype::float64: {
      const double* from = static_cast<const double*>(rows.data) + offset;
      for (int64_t at = 0; at < rows.width; ++at) scratch[at] = static_cast<float>(from[at * rows.width_stride]);
      break;
    }
  }
  return scratch;
}

// Call f(T*) with a null pointer of the dtype's type: a template instantiation chosen at run time.
template <class Function>
SHIFCON_INLINE void with_dtype(Dtype dtype, Function&& f) {
  switch (dtype) {
    case Dtype::bfloat16: return f(static_cast<BFloat16*>(nullptr));
    case Dtype::float16: return f(static_cast<Float16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

}  // namespace
}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
