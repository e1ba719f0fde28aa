// Rows made unit length and re-centred; what contrastive_similarity and info_nce share.
//
//   u = a / ‖a‖,   v = b / ‖b‖,   b′ = v - mean(v) + mean(u)      (without normalize: u = a, v = b)

#pragma once

#include "levels.h"
#include "strided.h"

namespace shifcon {

// L problems: N rows of a and M rows of b each, in the order of their tensors.
struct UnitPair {
  Rows a, b;  // of one dtype
  int64_t problems, rows_a, rows_b;
  float* inverse_a;  // 1 / ‖a‖ of every row, 0 for a zero row; null where not normalised
  float* inverse_b;
  // The lengths are yet to be computed: by the task that takes a problem, whose rows are in the cache then.
  bool lengths_by_problem;
  float* offset;  // mean(u) - mean(v), (L, d); null where not re-centred
  bool pairs;     // rows of bfloat16 are multiplied as they are, by AVX512-BF16, where they are not re-centred
};

// Gradients from W = ∂L/∂(u b′ᵀ):   ∂L/∂b′ = Wᵀ u,   total = Σ_i (Σ_j W_ij) u_i,
//                                   ∂L/∂v = ∂L/∂b′ - total / M,   ∂L/∂u = W b′ + total / N.
struct PairGradient {
  UnitPair pair;
  float* row_weights;  // Σ_j W_ij, (L, N); null where not re-centred
  float* total;        // (L, d); null where not re-centred
  void* grad_a;        // contiguous, dtype of a; null where not needed
  void* grad_b;
  int64_t tile;  // rows that one task owns
};

constexpr int64_t kTile = 128;            // rows of a, and of b, whose products are formed together
constexpr int64_t kColumnsOfTask = 256;   // of the sums over rows

namespace {

inline int64_t blocks(int64_t size, int64_t length) { return (size + length - 1) / length; }

// The number of tasks of a pass over tiles of the rows whose gradient is wanted: those of a, then those of b.
inline int64_t gradient_tasks(const PairGradient& p) {
  return p.pair.problems * ((p.grad_a ? blocks(p.pair.rows_a, p.tile) : 0) +
                            (p.grad_b ? blocks(p.pair.rows_b, p.tile) : 0));
}

}  // namespace

SHIFCON_KERNEL(pair_lengths, UnitPair)    // over the rows of a, then those of b
SHIFCON_KERNEL(pair_offset, UnitPair)     // over problems × blocks of columns
SHIFCON_KERNEL(pair_total, PairGradient)  // likewise

}  // namespace shifcon
