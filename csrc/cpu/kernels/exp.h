// exp of a vector, for exponents that are not positive: softmax probabilities.
//
// exp(x) = 2^n · exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, with the polynomial of Cephes' expf (S. L. Moshier).
// Error <= 2 ulp, denormal results included; 0 below -110 and for -infinity; NaN stays NaN.

#pragma once

#include "vector.h"

namespace shifcon {
namespace SHIFCON_LEVEL {
namespace {

SHIFCON_INLINE Vector smaller_to(Vector v, float least) { return v < broadcast(least) ? broadcast(least) : v; }

// x <= 0.
SHIFCON_INLINE Vector exp_of_negative(Vector x) {
  x = smaller_to(x, -110.0f);
  constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
  const Vector shifted = x * 1.44269504f + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, as n goes down to -159: only the last product can be denormal, so it rounds once.
  const Words integer = as_words(shifted) - as_words(broadcast(kRound));  // two's complement
  const Words half = (integer + 512u) / 2u - 256u;
  const Words rest = integer - half;
  return p * as_vector((half + 127u) << 23) * as_vector((rest + 127u) << 23);
}

}  // namespace
}  // namespace SHIFCON_LEVEL
}  // namespace shifcon
