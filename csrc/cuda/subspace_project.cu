// subspace_project and its gradients for CUDA, registered as shifcon_fast_cuda::* on PyTorch's stable ABI (2.10).
//
//     x' = mean_t + V_t V_tᵀ c,  c = x - mean_s          (docs/operators.md; gradients: tables.cuh)
//
// 1. grouping.cu sorts the rows by target language, on the device. Launches are sized by what there could be at most,
//    so nothing waits for the host and a CUDA graph can hold it all.
// 2. contract: coefficients = c V_t.
// 3. expand: x' = coefficients V_tᵀ + mean_t.
//
// Traffic (derived, not measured). The second half does not need x: its rows stream through once and the result
// streams out once, without either having to fit into shared memory, so 128 rows share a tile. With T rows of d
// numbers of b bytes and rank k, device memory moves 2 T d b bytes for x and x'. The coefficients add 4 T k bytes a
// split, which are written, and read again d / 512 times, from L2 where they fit. V_t, d k b bytes, lives in L2 and is
// read twice a tile of 128 rows: T/128 x 2 d k b, k/128 of what x and x' move. (Tiles of 16 rows, which is what shared
// memory holds at d = 4096 in 16 bits, would read k/16 of it: four times as much as x and x' at k = 64.) Tensor cores:
// 4 T d k operations, 2 k / b per byte of x and x', below what a GPU computes per byte it moves until k is several
// hundred.
//
// Rounding (16 bits). x is exact; c is formed in float32 from float32 means and rounded once; V is rounded to x's
// dtype; the coefficients are summed in float32 and rounded once; the result is rounded once, after the mean is added.
// Plain PyTorch in x's dtype rounds c, V, the coefficients and the result as well, and besides the means, and the
// projection before the mean is added: it rounds everything that is rounded here. So the error stays below its, with
// means much larger than the spread too, since c is small before it is rounded. float16: c is halved and each row's
// coefficients are scaled by a power of two, so that neither leaves the range; both exactly undone.
//
// What the kernels need is made here by PyTorch's own operators where it is not there: rows whose strides are not
// those of a matrix, and ids that are not contiguous, are copied; mean becomes float32; basis becomes x's dtype,
// contiguous, with a rank that is a multiple of 16 (zeros). A basis that is all that already is used as it is.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "tables.cuh"

namespace shifcon {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Element element_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Element::float32;
        case ScalarType::BFloat16: return Element::bfloat16;
        case ScalarType::Half: return Element::float16;
        default: throw std::runtime_error("subspace_project: wanted float32, bfloat16 or float16");
    }
}

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// A tensor that is kept alive, and its rows.
struct RowsOf {
    Tensor tensor;
    Rows rows;
};

RowsOf rows_of(const Tensor& x) {
    const std::int64_t last = x.dim() - 1;
    bool regular = x.stride(last) == 1 || x.size(last) == 1;
    // Dimensions of one row do not matter; the others must follow each other like those of a matrix.
    std::int64_t stride = 0, next = 0;
    bool any = false;
    for (std::int64_t dim = last - 1; dim >= 0; --dim) {
        if (x.size(dim) == 1) {
            continue;
        }
        if (!any) {
            stride = x.stride(dim);
            any = true;
        } else {
            regular = regular && x.stride(dim) == next;
        }
        next = x.stride(dim) * x.size(dim);
    }
    const Tensor tensor = regular ? x : torch::stable::contiguous(x);
    const std::int64_t row = regular ? stride : x.size(last);
    const auto size = static_cast<std::int64_t>(tensor.element_size());
    const void* const data = tensor.data_ptr();
    const bool vectors = aligned(data) && row * size % 16 == 0 && x.size(last) * size % 16 == 0;
    return {tensor, {data, row, vectors}};
}

Tensor empty(const Tensor& like, std::int64_t count, ScalarType type) {
    const std::int64_t sizes[] = {count};
    return torch::stable::new_empty(like, {sizes, 1}, type);
}

// Everything that the forward and the gradients share.
struct Problem {
    Element element;
    std::int64_t rows;
    int hidden, rank, padded, languages, processors;
    Tensor mean, basis, source, target;
    Ids ids;
    Tensor workspace;  // what the groups point into
    Groups groups;
    std::int64_t tiles;
};

Tensor matching_basis(const Tensor& basis, const Tensor& x, int padded) {
    Tensor result = basis.scalar_type() == x.scalar_type() ? basis : torch::stable::to(basis, x.scalar_type());
    const std::int64_t rank = basis.size(2);
    if (rank == 0) {
        const std::int64_t sizes[] = {basis.size(0), basis.size(1), padded};
        return torch::stable::new_zeros(result, {sizes, 3});
    }
    if (rank != padded) {
        const std::int64_t amount[] = {0, padded - rank};
        result = torch::stable::pad(result, {amount, 2});
    }
    result = torch::stable::contiguous(result);
    return aligned(result.data_ptr()) ? result : torch::stable::clone(result);
}

// x stands for grad in the gradients. Rows are sorted by target, and within a target by source if that is asked for.
Problem prepare(const Tensor& x, const Tensor& mean, const Tensor& basis, const Tensor& source, const Tensor& target,
                bool sources_sorted, void* stream) {
    const std::int64_t hidden = x.size(x.dim() - 1), rows = x.numel() / hidden, languages = mean.size(0);
    const std::int64_t padded = basis.size(2) == 0 ? 16 : (basis.size(2) + 15) / 16 * 16;
    constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 1;
    if (rows >= kMost || hidden >= kMost / 2 || languages >= kMost / 2 || padded >= kMost / 2) {
        throw std::runtime_error("subspace_project: rows, hidden size, languages and rank must be below 2^30");
    }
    Problem problem{element_of(x),
                    rows,
                    static_cast<int>(hidden),
                    static_cast<int>(basis.size(2)),
                    static_cast<int>(padded),
                    static_cast<int>(languages),
                    multiprocessors(x.get_device_index()),
                    torch::stable::contiguous(
                        mean.scalar_type() == ScalarType::Float ? mean : torch::stable::to(mean, ScalarType::Float)),
                    matching_basis(basis, x, static_cast<int>(padded)),
                    torch::stable::contiguous(source),
                    torch::stable::contiguous(target.scalar_type() == source.scalar_type()
                                                  ? target
                                                  : torch::stable::to(target, source.scalar_type())),
                    {},
                    source,
                    {},
                    0};
    if (!aligned(problem.mean.data_ptr())) {
        problem.mean = torch::stable::clone(problem.mean);
    }
    const std::int64_t ids = problem.source.numel();
    problem.ids = {problem.source.data_ptr(), problem.target.data_ptr(), static_cast<int>(rows / ids),
                   problem.languages, problem.source.scalar_type() == ScalarType::Long};

    const int chunks = grouping_chunks(rows, problem.languages);
    const int chunk_rows = static_cast<int>((rows + chunks - 1) / chunks);
    const bool in_shared = one_block_groups(rows, problem.languages);
    const std::int64_t counts = in_shared ? 0 : static_cast<std::int64_t>(chunks) * (languages + 1);
    const std::int64_t starts = languages + 2;
    problem.workspace = empty(x, counts + 2 * starts + (sources_sorted ? 2 : 1) * rows, ScalarType::Int);
    int* const memory = static_cast<int*>(problem.workspace.data_ptr());
    int* const order = memory + counts + 2 * starts;
    GroupingArguments grouping{problem.ids, nullptr, static_cast<int>(rows), chunks, chunk_rows,
                               tile_rows_of(problem.element), sources_sorted, memory, memory + counts,
                               memory + counts + starts, order};
    group_rows(grouping, stream);
    if (sources_sorted) {
        grouping.before = order;
        grouping.order = order + rows;
        grouping.by_source = false;
        group_rows(grouping, stream);
    }
    problem.groups = grouping.groups();
    problem.tiles = most_tiles(rows, problem.languages, grouping.tile_rows);
    return problem;
}

struct CoefficientsOf {
    Tensor tensor;
    Coefficients coefficients;
};

CoefficientsOf contract(const Problem& p, const Rows& rows, bool centred, void* stream) {
    const int splits = splits_for(p.tiles, p.hidden, p.padded, p.processors);
    const int per_split = (p.hidden + 64 * splits - 1) / (64 * splits) * 64;
    CoefficientsOf result{empty(p.mean, splits * p.rows * p.padded, ScalarType::Float), {}};
    result.coefficients = {static_cast<float*>(result.tensor.data_ptr()), p.rows, splits, p.padded};
    const float* const mean = centred ? static_cast<const float*>(p.mean.data_ptr()) : nullptr;
    contract(p.element,
             {p.groups, p.ids, rows, mean, p.basis.data_ptr(), p.hidden, p.rank, per_split, 0, result.coefficients},
             p.tiles, stream);
    return result;
}

void expand(const Problem& p, const Rows& rows, bool with_mean, const Coefficients& coefficients,
            const Tensor& result, void* stream) {
    const float* const mean = with_mean ? static_cast<const float*>(p.mean.data_ptr()) : nullptr;
    expand(p.element,
           {p.groups, rows, mean, p.basis.data_ptr(), p.hidden, 0, 0, coefficients, result.data_ptr()}, p.tiles,
           stream);
}

Tensor new_like(const Tensor& x, ScalarType type) { return torch::stable::new_empty(x, x.sizes(), type); }

Tensor subspace_project(const Tensor& x, const Tensor& mean, const Tensor& basis, const Tensor& source,
                        const Tensor& target) {
    const Device on(x);
    Tensor result = new_like(x, x.scalar_type());
    if (x.numel() == 0) {
        return result;
    }
    if (mean.size(0) == 0) {
        return torch::stable::copy_(result, x);
    }
    const Problem problem = prepare(x, mean, basis, source, target, false, on.stream);
    const RowsOf rows = rows_of(x);
    const CoefficientsOf coefficients = contract(problem, rows.rows, true, on.stream);
    expand(problem, rows.rows, true, coefficients.coefficients, result, on.stream);
    return result;
}

std::vector<Tensor> subspace_project_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& mean,
                                              const Tensor& basis, const Tensor& source, const Tensor& target,
                                              bool need_x, bool need_mean, bool need_basis) {
    const Device on(grad);
    if (need_basis && !x.has_value()) {
        throw std::runtime_error("subspace_project_backward: the gradient of the basis needs x");
    }
    const bool nothing = grad.numel() == 0 || mean.size(0) == 0;
    Tensor grad_x, grad_mean, grad_basis;
    std::vector<Tensor> result;
    if (need_x) {
        grad_x = new_like(grad, grad.scalar_type());
        result.push_back(grad_x);
    }
    if (need_mean) {
        grad_mean = torch::stable::new_zeros(mean, mean.sizes(), ScalarType::Float);
        result.push_back(grad_mean);
    }
    if (need_basis) {
        grad_basis = torch::stable::new_zeros(basis, basis.sizes(), ScalarType::Float);
        result.push_back(grad_basis);
    }
    if (nothing) {
        if (need_x && grad.numel() != 0) {
            torch::stable::copy_(grad_x, grad);
        }
        return result;
    }
    if (!need_x && !need_mean && !need_basis) {
        return result;
    }
    const Problem problem = prepare(grad, mean, basis, source, target, need_mean, on.stream);
    const RowsOf upper = rows_of(grad);
    const CoefficientsOf of_upper = contract(problem, upper.rows, false, on.stream);
    if (need_x) {
        expand(problem, upper.rows, false, of_upper.coefficients, grad_x, on.stream);
    }
    TableArguments tables{problem.groups,
                          problem.ids,
                          upper.rows,
                          upper.rows,
                          static_cast<const float*>(problem.mean.data_ptr()),
                          problem.basis.data_ptr(),
                          problem.hidden,
                          problem.rank,
                          of_upper.coefficients,
                          of_upper.coefficients,
                          nullptr,
                          nullptr,
                          nullptr};
    if (need_mean) {
        const std::int64_t pairs = static_cast<std::int64_t>(problem.languages) * problem.languages;
        const Tensor pair_sums = empty(problem.mean, pairs * problem.padded, ScalarType::Float);
        tables.pair_sums = static_cast<float*>(pair_sums.data_ptr());
        tables.grad_mean = static_cast<float*>(grad_mean.data_ptr());
        mean_gradient(problem.element, tables, on.stream);
    }
    if (need_basis && problem.rank != 0) {
        const RowsOf rows = rows_of(*x);
        const CoefficientsOf of_x = contract(problem, rows.rows, true, on.stream);
        tables.x = rows.rows;
        tables.of_x = of_x.coefficients;
        tables.grad_basis = static_cast<float*>(grad_basis.data_ptr());
        basis_gradient(problem.element, tables, on.stream);
    }
    return result;
}

STABLE_TORCH_LIBRARY(shifcon_fast_cuda, m) {
    m.def("subspace_project(Tensor x, Tensor mean, Tensor basis, Tensor source, Tensor target) -> Tensor");
    m.def(
        "subspace_project_backward(Tensor grad, Tensor? x, Tensor mean, Tensor basis, Tensor source, Tensor target, "
        "bool need_x, bool need_mean, bool need_basis) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cuda, SHIFCON_KEY, m) {
    m.impl("subspace_project", TORCH_BOX(&subspace_project));
    m.impl("subspace_project_backward", TORCH_BOX(&subspace_project_backward));
}

}  // namespace

}  // namespace shifcon
