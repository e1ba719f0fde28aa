#include "tensors.h"

#include <algorithm>
#include <vector>

#include "pages.h"

namespace shifcon {

Dtype dtype_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": wanted a CPU tensor");
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, name, ": wanted float32, bfloat16, float16 or float64");
  }
}

Rows rows_of(const Tensor& tensor, const char* name, OptionalTensor& keep) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dims >= 1 && sizes[dims - 1] >= 1, name, ": wanted (..., d) with d >= 1");
  Rows rows;
  rows.dtype = dtype_of(tensor, name);
  rows.data = tensor.data_ptr();
  rows.width = sizes[dims - 1];
  rows.width_stride = strides[dims - 1];
  if (rows.width <= 1) rows.width_stride = 1;
  rows.count = 1;
  for (int64_t dim = 0; dim < dims - 1; ++dim) {
    const int64_t size = sizes[dim], stride = strides[dim];
    rows.count *= size;
    if (size == 1) continue;
    const int last = rows.leading - 1;
    if (last >= 0 && rows.stride[last] == size * stride) {  // lies evenly after the one before it
      rows.size[last] *= size;
      rows.stride[last] = stride;
      continue;
    }
    if (rows.leading == kMaxLeading) {
      keep = torch::stable::contiguous(tensor);
      OptionalTensor unused;
      return rows_of(*keep, name, unused);
    }
    rows.size[rows.leading] = size;
    rows.stride[rows.leading++] = stride;
  }
  return rows;
}

Ids ids_of(const Tensor& index, const Tensor& x, int64_t languages, const char* name, OptionalTensor& keep) {
  STD_TORCH_CHECK(index.is_cpu(), name, ": wanted a CPU tensor");
  const ScalarType type = index.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, name, ": wanted int64 or int32");
  const auto sizes = index.sizes(), rows = x.sizes();
  STD_TORCH_CHECK(sizes.size() < rows.size(), name, ": wanted a prefix of x.shape[:-1]");
  Ids ids;
  for (size_t dim = 0; dim + 1 < rows.size(); ++dim) {
    if (dim >= sizes.size()) ids.rows_per_id *= rows[dim];
    else STD_TORCH_CHECK(sizes[dim] == rows[dim], name, ": wanted a prefix of x.shape[:-1]");
  }
  if (!index.is_contiguous()) keep = torch::stable::contiguous(index);
  ids.data = keep ? keep->data_ptr() : index.data_ptr();
  ids.is_int64 = type == ScalarType::Long;
  ids.count = index.numel();
  for (int64_t position = 0; position < ids.count; ++position) {
    const int64_t id = id_at(ids, position);
    STD_TORCH_CHECK(id >= -1 && id < languages, name, ": got language id ", id, "; wanted -1 to ", languages - 1);
  }
  return ids;
}

void check_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  const auto sizes = tensor.sizes(), wanted = other.sizes();
  const bool same = tensor.scalar_type() == other.scalar_type() && sizes.size() == wanted.size() &&
                    std::equal(sizes.begin(), sizes.end(), wanted.begin());
  STD_TORCH_CHECK(same, name, ": wanted the shape and dtype of ", other_name);
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  // Not torch::stable::empty, which goes through the boxed dispatcher and costs several times this.
  const size_t dims = shape.size();
  int64_t few[8];
  std::vector<int64_t> many(dims > 8 ? dims : 0);
  int64_t* strides = dims > 8 ? many.data() : few;
  int64_t stride = 1;
  for (size_t dim = dims; dim-- > 0;) {
    strides[dim] = stride;
    stride *= shape[dim] > 1 ? shape[dim] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(dims), shape.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0,
      &handle));
  Tensor tensor(handle);
  prefer_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

Tensor zeros(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  Tensor tensor = empty(shape, type);
  return torch::stable::zero_(tensor);
}

}  // namespace shifcon
