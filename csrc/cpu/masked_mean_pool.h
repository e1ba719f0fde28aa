// masked_mean_pool: what its two halves say to each other. Formulas: kernels/masked_mean_pool.cpp.

#pragma once

#include "levels.h"
#include "strided.h"

namespace shifcon {

// (batch, tokens) integers or bools of 1, 2, 4 or 8 bytes; a token counts where its number is not zero.
struct Mask {
  const void* data = nullptr;
  int bytes = 1;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t stride[2] = {};
};

struct PoolForward {
  const void* h;  // (batch, tokens, width), batch and tokens those of the mask
  Dtype dtype;
  int64_t width;
  int64_t stride[3];
  Mask mask;
  int64_t columns;  // of one unit of work: a row of the batch is cut into ceil(width / columns) units
  float* pooled;    // (batch, width), contiguous
  float* factor;    // (batch)
};

struct PoolBackward {
  Rows grad, pooled;  // (batch, width); pooled: no data where the mean was not normalised
  const float* factor;
  int64_t factor_stride;
  Mask mask;
  Dtype dtype;      // of grad_h
  int64_t tokens;   // of one unit of work: a row of the batch is cut into ceil(mask.tokens / tokens) units
  bool past_cache;  // grad_h
  void* grad_h;     // (batch, tokens, width), contiguous
};

SHIFCON_KERNEL(pool_forward, PoolForward)      // over units of columns
SHIFCON_KERNEL(pool_normalize, PoolForward)    // over rows of the batch, after the above
SHIFCON_KERNEL(pool_backward, PoolBackward)    // over units of tokens

}  // namespace shifcon
