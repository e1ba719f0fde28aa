// contrastive_similarity: S = scale · u b′ᵀ; see unit_rows.h for u and b′.

#pragma once

#include "unit_rows.h"

namespace shifcon {

struct SimilarityForward {
  UnitPair pair;
  float scale;
  float* out;  // (L, N, M), contiguous
};

struct SimilarityBackward {
  PairGradient gradient;
  float scale;
  Rows grad;  // ∂L/∂S, (L · N) rows of M; float32
};

SHIFCON_KERNEL(similarity_forward, SimilarityForward)           // over problems × tiles of a × tiles of b
SHIFCON_KERNEL(similarity_row_weights, SimilarityBackward)      // over the rows of a
SHIFCON_KERNEL(similarity_backward, SimilarityBackward)         // over gradient_tasks

}  // namespace shifcon
