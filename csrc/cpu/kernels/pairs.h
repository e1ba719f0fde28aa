// Products of bfloat16 matrices with AVX512-BF16: one instruction multiplies two pairs and adds both products.
//
// Twice the products of float32 per instruction. Numbers are rounded to nearest even on the way into a panel; products
// are exact, sums are float32. The instructions take denormals for zero, in what they read and in what they add up to.
//
// A panel of pairs is laid out as a panel of gemm.h that has half the depth, and goes to the same functions: multiply
// (A in pairs along its rows, B in pairs of neighbouring rows), dot_product (both in pairs along their rows). The level
// avx512 is compiled without the instructions, so whoever calls them with pairs has asked level() first.

#pragma once

#include "gemm.h"
#include "vector.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

// Two bfloat16 numbers, the first in the lower half.
struct Pair {
  uint32_t bits;
};

constexpr int64_t pairs_of(int64_t count) { return (count + 1) / 2; }

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)  // their assemblers know the instruction
constexpr bool kHasPairs = true;

SHIFCON_INLINE Vector load(const Pair* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
SHIFCON_INLINE void store(Pair* to, Vector pairs) { __builtin_memcpy(to, &pairs, sizeof pairs); }
SHIFCON_INLINE Vector broadcast(Pair pair) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(pair.bits)));
}

// Instructions are written out: intrinsics for them are for functions compiled for AVX512-BF16, into which nothing of
// gemm.h could be inlined without being compiled for it as well.
SHIFCON_INLINE Vector add_product(Vector total, Vector left, Vector right, Pair) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(left), "v"(right));
  return total;
}

// 2 kLanes numbers that follow each other, as pairs of neighbours.
SHIFCON_INLINE Vector neighbours(Vector first, Vector second, Pair) {
  Vector pairs;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(first), "v"(second));
  return pairs;
}

// (first[lane], second[lane]) of every lane: two rows of B.
SHIFCON_INLINE Vector paired(Vector first, Vector second, Pair pair) {
  // Number i of the result, 16 bits wide, is number i / 2 of `first` or, for odd i, of `second`.
  constexpr int kNext = 0x00010001, kSecond = 16 << 16;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i numbers = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(kNext));
  const __m512i order = _mm512_add_epi32(numbers, _mm512_set1_epi32(kSecond));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(neighbours(first, second, pair))));
}

// `count` numbers as pairs of neighbours; an odd one out goes with zero. Both may be the same memory.
SHIFCON_INLINE void round_to_pairs(const float* from, int64_t count, Pair* to) {
  for (int64_t at = 0; at < count; at += 2 * kLanes) {
    const int64_t left = count - at;
    const Vector first = left >= kLanes ? load(from + at) : load_some(from + at, left);
    const int64_t rest = left - kLanes;
    const Vector second = rest >= kLanes ? load(from + at + kLanes) : load_some(from + at + kLanes, rest);
    const Vector pairs = neighbours(first, second, Pair{});
    if (rest >= kLanes) store(to + at / 2, pairs);
    else store_some(to + at / 2, pairs, pairs_of(left));
  }
}
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace
}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
