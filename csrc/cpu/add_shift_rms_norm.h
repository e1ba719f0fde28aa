// add_shift_rms_norm: what its two halves say to each other. Formulas: kernels/add_shift_rms_norm.cpp.

#pragma once

#include "levels.h"
#include "strided.h"

namespace shifcon {

enum class Style : int { llama = 0, gemma = 1, olmo = 2 };

struct NormForward {
  Rows x, residual, shift, weight;  // residual and shift: no data where not given; weight: one row
  Ids index;
  float eps;
  Style style;
  void* y;      // contiguous, dtype of x
  void* h;      // likewise; null where h is x itself
  float* rstd;  // one per row
  bool past_cache;  // y and h
};

struct NormBackward {
  Rows grad_y, grad_h, h, weight;  // grad_y and grad_h: no data where not given; dtype of h
  const float* rstd;
  Ids index;
  Style style;
  void* grad_input;     // contiguous, dtype of h; null where not needed
  bool past_cache;      // grad_input
  float* along;         // mean(g · x̂) per row, for the pass over the columns; null where not needed
  float* grad_weight;   // (chunks, d) partial sums; null where not needed
  int64_t chunk;        // rows per chunk
  float* grad_shift;    // (K, d), zeroed; null where not needed
};

SHIFCON_KERNEL(norm_forward, NormForward)          // over rows
SHIFCON_KERNEL(norm_backward, NormBackward)        // over chunks of rows
SHIFCON_KERNEL(norm_backward_shift, NormBackward)  // over columns

}  // namespace shifcon
