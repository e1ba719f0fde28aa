// info_nce: the symmetric cross entropy of S = scale · u b′ᵀ; see unit_rows.h for u and b′.

#pragma once

#include "unit_rows.h"

namespace shifcon {

// Statistics are two-part: the maximum m and Σ exp(S - m), whose logarithm l makes log Σ exp S = m + l.
struct NceForward {
  UnitPair pair;
  float scale;
  int64_t stripes, stripe;  // stripes per problem, rows per stripe: one task
  float* row_parts;         // (2, L, N): m, l
  float* column_parts;      // (stripes, 2, L, N): m, Σ exp(S - m) over the rows of a stripe
  float* diagonal;          // (L, N)
};

struct NceBackward {
  PairGradient gradient;
  float scale;
  const float* weight;        // scale · ∂L/∂loss / (2 N), one per problem
  const float* share;         // ∂L/∂loss / (2 N)
  const float* row_parts;     // (2, L, N): m, l
  const float* column_parts;
};

SHIFCON_KERNEL(nce_forward, NceForward)           // over problems × stripes
SHIFCON_KERNEL(nce_merge_columns, NceForward)     // over L · N: stripes into the first, Σ into its logarithm
SHIFCON_KERNEL(nce_backward_whole, NceBackward)   // over problems of at most kTile rows
SHIFCON_KERNEL(nce_row_weights, NceBackward)      // over problems × tiles of a
SHIFCON_KERNEL(nce_backward, NceBackward)         // over gradient_tasks

}  // namespace shifcon
