// Tensors as kernels see them: a pointer, a dtype, and strides. Plain data, so that kernel files need no PyTorch.

#pragma once

#include <cstdint>

namespace shifcon {

enum class Dtype : int { float32, bfloat16, float16, float64 };

// After merging neighbours that lie evenly; a tensor that needs more is copied first.
constexpr int kMaxLeading = 8;

// The rows of a (..., d) tensor, in order. Strides are in elements; 0 repeats.
struct Rows {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t count = 0;
  int64_t width = 0;
  int64_t width_stride = 1;
  int leading = 0;
  int64_t size[kMaxLeading] = {};
  int64_t stride[kMaxLeading] = {};
};

// Language ids, one per row or per group of `rows_per_id` consecutive rows; contiguous, int64 or int32.
struct Ids {
  const void* data = nullptr;
  bool is_int64 = true;
  int64_t count = 0;
  int64_t rows_per_id = 1;
};

namespace {

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Some columns of every row.
inline Rows columns_of(const Rows& rows, int64_t begin, int64_t count) {
  Rows part = rows;
  part.data = static_cast<const char*>(rows.data) + begin * rows.width_stride * size_of(rows.dtype);
  part.width = count;
  return part;
}

inline int64_t offset_of(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int dim = rows.leading - 1; dim > 0; --dim) {
    offset += (row % rows.size[dim]) * rows.stride[dim];
    row /= rows.size[dim];
  }
  return rows.leading > 0 ? offset + row * rows.stride[0] : 0;
}

inline int64_t id_at(const Ids& ids, int64_t position) {
  return ids.is_int64 ? static_cast<const int64_t*>(ids.data)[position]
                      : static_cast<const int32_t*>(ids.data)[position];
}

inline int64_t id_of_row(const Ids& ids, int64_t row) { return id_at(ids, row / ids.rows_per_id); }

}  // namespace
}  // namespace shifcon
