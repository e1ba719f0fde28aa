// From PyTorch's stable tensors to the plain descriptions that kernels take, and back.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "strided.h"

namespace shifcon {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws unless the tensor lies on the CPU and has float32, bfloat16, float16 or (tables only) float64 elements.
Dtype dtype_of(const Tensor& tensor, const char* name);

// The rows of a (..., d) tensor; `keep` holds the copy of a tensor with more strides than Rows has room for.
Rows rows_of(const Tensor& tensor, const char* name, OptionalTensor& keep);

// The ids of x's rows: a prefix of x.shape[:-1], made contiguous in `keep`. Throws where an id is outside
// -1 ... languages - 1, before anything is read or written through one.
Ids ids_of(const Tensor& index, const Tensor& x, int64_t languages, const char* name, OptionalTensor& keep);

// Throws unless both tensors have the same shape and dtype.
void check_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name);

// A new contiguous CPU tensor, uninitialised.
Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type);
Tensor zeros(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type);

// Rows (or other units of `cost` numbers each) per thread below which a second thread costs more than it brings.
inline int64_t grain(int64_t cost) {
  constexpr int64_t kNumbersPerThread = 16384;
  return cost >= kNumbersPerThread ? 1 : (kNumbersPerThread + cost - 1) / (cost > 0 ? cost : 1);
}

}  // namespace shifcon
