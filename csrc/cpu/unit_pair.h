// From the tensors a and b of a contrastive operator to UnitPair: checks, lengths and means.

#pragma once

#include <vector>

#include "tensors.h"
#include "unit_rows.h"

namespace shifcon {

// A pair together with the tensors that its pointers lead to.
struct PreparedPair {
  UnitPair pair;
  OptionalTensor kept[2], inverse, offset;
};

// Throws unless a is (L, N, d) and b (L, M, d), on the CPU, of one dtype that is not float64. Reads nothing.
PreparedPair checked_pair(const Tensor& a, const Tensor& b, double scale);

// Lengths (normalize) and means (recenter), by all threads. Where one task will take each whole problem, the lengths
// are left to it, unless the means need them.
void prepare(PreparedPair& prepared, bool normalize, bool recenter, bool whole_problems = false);

// Room for the gradients that are needed, appended to `results`, and for what re-centring sums up, in `kept`.
PairGradient gradient_of(const PreparedPair& prepared, bool need_a, bool need_b, const Tensor& a, const Tensor& b,
                         std::vector<Tensor>& results, OptionalTensor (&kept)[2]);

// Σ_i row_weights[i] u_i, by all threads.
void sum_weighted_rows(const PairGradient& gradient);

// Tasks per thread below which a second thread costs more than it brings, where a task forms so many products.
inline int64_t grain_of_products(int64_t products) {
  constexpr int64_t kProductsPerNumber = 16;  // a vector of them takes as long as a number from memory
  return grain(products / kProductsPerNumber);
}

}  // namespace shifcon
