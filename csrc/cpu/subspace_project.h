// subspace_project: what its two halves say to each other. Formulas: kernels/subspace_project.cpp.

#pragma once

#include "levels.h"
#include "strided.h"

namespace shifcon {

// basis (K, d, k); strides in elements.
struct Basis {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rank = 0;  // k
  int64_t language_stride = 0, row_stride = 0, column_stride = 0;
};

// The rows order[begin ... end), all of one target language; language -1: rows that pass through.
struct Panel {
  int64_t language, begin, end;
};

// Rows that move, and where to.
struct Projection {
  Rows x;       // or g = ∂L/∂x′
  Rows mean;    // no data: V_t V_tᵀ x, nothing subtracted and nothing added
  Basis basis;
  Ids source;
  const int64_t* order;  // row numbers by target, then source language
  const Panel* panels;
  bool pairs;      // x is bfloat16, and so are its products: level avx512_bf16
  void* out;       // contiguous, dtype of x
  bool past_cache;  // out
  float* scratch;  // of this thread: projection_scratch()
};

// grad_mean[t] += G, grad_mean[s] -= V_t V_tᵀ G, with G = Σ g over some rows of one pair of languages.
struct MeanSegment {
  int64_t source, target, begin, end;
};
struct ProjectionMean {
  Rows grad;
  const int64_t* order;
  const MeanSegment* segments;
  int64_t count;           // of segments
  float* sums;             // G, (segments, d)
  const float* projected;  // V_t V_tᵀ G, (segments, d)
  float* grad_mean;        // (K, d), zeroed
};

// grad_basis[t] += Σ_rows g (V_tᵀ c)ᵀ + c (V_tᵀ g)ᵀ over a chunk of panels.
struct ProjectionBasis {
  Projection x, grad;        // without out
  int64_t count;             // of panels; their rows order[x.panels[0].begin ...) follow each other
  float* x_coefficients;     // V_tᵀ c, (rows of the chunk, line_stride(k))
  float* grad_coefficients;  // V_tᵀ g, likewise
  float* grad_basis;         // (K, d, k), zeroed
};

// Floats between the rows of a panel in scratch: whole cache lines, an odd number of them.
constexpr int64_t line_stride(int64_t width) { return ((width + 15) / 16 | 1) * 16; }

constexpr int64_t kPanelDepth = 256;  // columns of x that a panel holds at a time
constexpr int64_t kBasisDepth = 64;   // rows of V that are multiplied at a time
constexpr int64_t kColumns = 64;      // columns of the result that are computed at a time

// Float32 numbers that a thread needs for panels of up to `rows` rows.
inline int64_t projection_scratch(int64_t rows, int64_t rank) {
  return rows * (line_stride(rank) + line_stride(kPanelDepth)) + kBasisDepth * line_stride(rank) +
         rank * line_stride(kColumns);
}

SHIFCON_KERNEL(project_panels, Projection)              // over panels
SHIFCON_KERNEL(project_sums, ProjectionMean)            // over segments
SHIFCON_KERNEL(project_mean, ProjectionMean)            // over columns
SHIFCON_KERNEL(project_coefficients, ProjectionBasis)   // over panels of the chunk
SHIFCON_KERNEL(project_basis, ProjectionBasis)          // over blocks of kColumns columns

}  // namespace shifcon
