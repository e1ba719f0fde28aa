// Products of bfloat16 matrices with AVX512-BF16: an instruction multiplies two pairs and adds both products in float32.
//
// Twice the products of float32 per instruction. Numbers are rounded to nearest even on the way into a panel; products
// are exact, sums are float32. The instruction takes denormals for zero, in what it reads and in what it adds up to.
//
// A panel of pairs is laid out as a panel of gemm.h that has half the depth, and goes to the same functions: multiply
// (A in pairs along its rows, B in pairs of neighbouring rows), dot_product (both in pairs along their rows). The level
// avx512 is compiled without the instruction, so whoever calls them with pairs has asked level() first.

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
SHIFCON_INLINE void store(Pair* to, Words pairs) { __builtin_memcpy(to, &pairs, sizeof pairs); }
SHIFCON_INLINE Vector broadcast(Pair pair) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(pair.bits)));
}

// Written out: the intrinsic is for functions compiled for AVX512-BF16, into which nothing of gemm.h could be inlined
// without being compiled for it as well.
SHIFCON_INLINE Vector add_product(Vector total, Vector left, Vector right, Pair) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(left), "v"(right));
  return total;
}

// (first[lane], second[lane]) of every lane: neighbouring rows of B.
SHIFCON_INLINE Words paired(Vector first, Vector second) {
  return rounded_to_bfloat16(first) | (rounded_to_bfloat16(second) << 16);
}

// `count` numbers as pairs of neighbours; an odd one out goes with zero. Both may be the same memory.
SHIFCON_INLINE void round_to_pairs(const float* from, int64_t count, Pair* to) {
  BFloat16* numbers = reinterpret_cast<BFloat16*>(to);
  for_each_vector(count, [&](int64_t at, int64_t lanes) {
    store_lanes(numbers + at, load_lanes(from + at, lanes), lanes);
  });
  const BFloat16 zero = {};
  if (count % 2 != 0) __builtin_memcpy(numbers + count, &zero, sizeof zero);
}
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace
}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
