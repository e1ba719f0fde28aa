#include "tables.cuh"

namespace shifcon {

namespace {

constexpr int kThreads = 256;
constexpr int kSumColumns = 32, kSumRows = kThreads / kSumColumns;  // of a block that sums over rows
constexpr int kTile = 64;                                           // of grad_basis, in both directions
constexpr int kInner = 16;                                          // rows at a time
constexpr int kPitch = 68;

// grad_mean[t] = sum of g. Eight threads share the rows of a column, and each sums 16 of its rows before it adds them.
template <typename T>
SHIFCON_KERNEL(kThreads) sum_upper(TableArguments p) {
    const int column_blocks = (p.hidden + kSumColumns - 1) / kSumColumns;
    const int group = static_cast<int>(block_index() / column_blocks);
    const int column = static_cast<int>(block_index() % column_blocks) * kSumColumns + thread_index() % kSumColumns;
    const int part = thread_index() / kSumColumns;
    const int end = p.groups.starts[group + 1];
    const T* const upper = static_cast<const T*>(p.upper.data);
    float sum = 0.0f;
    if (column < p.hidden) {
        for (int first = p.groups.starts[group] + part; first < end; first += 16 * kSumRows) {
            float few = 0.0f;
#pragma unroll 4
            for (int index = 0; index < 16; ++index) {
                const int position = first + index * kSumRows;
                if (position < end) {
                    const std::int64_t row = p.groups.order[position];
                    few += widen(upper[row * p.upper.stride + column]);
                }
            }
            sum += few;
        }
    }
    float* const parts = reinterpret_cast<float*>(shared_memory());
    parts[thread_index()] = sum;
    block_barrier();
    if (part == 0 && column < p.hidden) {
        for (int other = 1; other < kSumRows; ++other) {
            sum += parts[other * kSumColumns + thread_index()];
        }
        p.grad_mean[static_cast<std::int64_t>(group) * p.hidden + column] = sum;
    }
}

// The first position of [begin, end), sorted by source, whose source is not below this one.
SHIFCON_DEVICE int first_with_source(const TableArguments& p, int begin, int end, int source) {
    while (begin < end) {
        const int middle = begin + (end - begin) / 2;
        if (p.ids.source_of(p.groups.order[middle]) < source) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

// pair_sums[t][s] = sum of coefficients(g) over the rows from s to t.
SHIFCON_KERNEL(kThreads) sum_pairs(TableArguments p) {
    const int languages = p.groups.languages, padded = p.of_upper.padded;
    const int target = static_cast<int>(block_index() / languages);
    const int source = static_cast<int>(block_index() % languages);
    const int end_of_target = p.groups.starts[target + 1];
    const int begin = first_with_source(p, p.groups.starts[target], end_of_target, source);
    const int end = first_with_source(p, begin, end_of_target, source + 1);
    const int part = thread_index() / kSumColumns;
    float* const parts = reinterpret_cast<float*>(shared_memory());
    for (int first = 0; first < padded; first += kSumColumns) {
        const int column = first + thread_index() % kSumColumns;
        float sum = 0.0f;
        if (column < padded) {
            for (int position = begin + part; position < end; position += kSumRows) {
                sum += p.of_upper.sum(position, column);
            }
        }
        parts[thread_index()] = sum;
        block_barrier();
        if (part == 0 && column < padded) {
            for (int other = 1; other < kSumRows; ++other) {
                sum += parts[other * kSumColumns + thread_index()];
            }
            p.pair_sums[(static_cast<std::int64_t>(target) * languages + source) * padded + column] = sum;
        }
        block_barrier();
    }
}

// grad_mean[s] -= sum over t of V_t pair_sums[t][s]; after sum_upper.
template <typename T>
SHIFCON_KERNEL(kThreads) subtract_projected(TableArguments p) {
    const int languages = p.groups.languages, padded = p.of_upper.padded;
    const int column_blocks = (p.hidden + kThreads - 1) / kThreads;
    const int source = static_cast<int>(block_index() / column_blocks);
    const int column = static_cast<int>(block_index() % column_blocks) * kThreads + thread_index();
    if (column >= p.hidden) {
        return;
    }
    float total = 0.0f;
    for (int target = 0; target < languages; ++target) {
        if (p.groups.starts[target] == p.groups.starts[target + 1]) {
            continue;  // a language without rows may hold anything
        }
        const T* const basis =
            static_cast<const T*>(p.basis) + (static_cast<std::int64_t>(target) * p.hidden + column) * padded;
        const float* const sums = p.pair_sums + (static_cast<std::int64_t>(target) * languages + source) * padded;
        float of_target = 0.0f;
        for (int index = 0; index < p.rank; ++index) {
            of_target += widen(basis[index]) * sums[index];
        }
        total += of_target;
    }
    p.grad_mean[static_cast<std::int64_t>(source) * p.hidden + column] -= total;
}

// grad_basis[t]: 64 x 64 of it a block, 4 x 4 a thread, over all rows of the language.
template <typename T>
SHIFCON_KERNEL(kThreads) sum_outer(TableArguments p) {
    const int hidden_tiles = (p.hidden + kTile - 1) / kTile, rank_tiles = (p.rank + kTile - 1) / kTile;
    const int first_rank = static_cast<int>(block_index() % rank_tiles) * kTile;
    const unsigned rest = block_index() / rank_tiles;
    const int first = static_cast<int>(rest % hidden_tiles) * kTile, group = static_cast<int>(rest / hidden_tiles);
    const int begin = p.groups.starts[group], end = p.groups.starts[group + 1];
    float* const upper = reinterpret_cast<float*>(shared_memory());  // [row][column]
    float* const centred = upper + kInner * kPitch;
    float* const of_upper = centred + kInner * kPitch;  // [row][rank]
    float* const of_x = of_upper + kInner * kPitch;
    const int row = thread_index() / 16 * 4, column = thread_index() % 16 * 4;
    float sums[4][4] = {};
    for (int position = begin; position < end; position += kInner) {
        for (int index = thread_index(); index < kInner * kTile; index += kThreads) {
            const int at = index / kTile, offset = index % kTile;
            const bool present = position + at < end;
            float g = 0.0f, c = 0.0f;
            if (present && first + offset < p.hidden) {
                const int number = p.groups.order[position + at];
                const std::int64_t source = p.ids.source_of(number);
                g = widen(static_cast<const T*>(p.upper.data)[number * p.upper.stride + first + offset]);
                c = widen(static_cast<const T*>(p.x.data)[number * p.x.stride + first + offset]) -
                    p.mean[source * p.hidden + first + offset];
            }
            upper[at * kPitch + offset] = g;
            centred[at * kPitch + offset] = c;
            const bool of_rank = present && first_rank + offset < p.rank;
            of_upper[at * kPitch + offset] = of_rank ? p.of_upper.sum(position + at, first_rank + offset) : 0.0f;
            of_x[at * kPitch + offset] = of_rank ? p.of_x.sum(position + at, first_rank + offset) : 0.0f;
        }
        block_barrier();
        float few[4][4] = {};
#pragma unroll 4
        for (int at = 0; at < kInner; ++at) {
            const Floats g = *reinterpret_cast<const Floats*>(upper + at * kPitch + row);
            const Floats c = *reinterpret_cast<const Floats*>(centred + at * kPitch + row);
            const Floats of_g = *reinterpret_cast<const Floats*>(of_upper + at * kPitch + column);
            const Floats of_c = *reinterpret_cast<const Floats*>(of_x + at * kPitch + column);
#pragma unroll
            for (int index = 0; index < 16; ++index) {
                few[index / 4][index % 4] += g.value[index / 4] * of_c.value[index % 4];
                few[index / 4][index % 4] += c.value[index / 4] * of_g.value[index % 4];
            }
        }
#pragma unroll
        for (int index = 0; index < 16; ++index) {
            sums[index / 4][index % 4] += few[index / 4][index % 4];
        }
        block_barrier();
    }
#pragma unroll
    for (int index = 0; index < 16; ++index) {
        const int at = first + row + index / 4, rank = first_rank + column + index % 4;
        if (at < p.hidden && rank < p.rank) {
            p.grad_basis[(static_cast<std::int64_t>(group) * p.hidden + at) * p.rank + rank] =
                sums[index / 4][index % 4];
        }
    }
}

template <typename T>
void launch_mean(const TableArguments& p, void* stream) {
    const std::int64_t languages = p.groups.languages;
    constexpr int kBytes = kThreads * static_cast<int>(sizeof(float));
    launch(sum_upper<T>, languages * ((p.hidden + kSumColumns - 1) / kSumColumns), kThreads, kBytes, stream, p);
    launch(sum_pairs, languages * languages, kThreads, kBytes, stream, p);
    launch(subtract_projected<T>, languages * ((p.hidden + kThreads - 1) / kThreads), kThreads, 0, stream, p);
}

template <typename T>
void launch_basis(const TableArguments& p, void* stream) {
    const std::int64_t hidden_tiles = (p.hidden + kTile - 1) / kTile, rank_tiles = (p.rank + kTile - 1) / kTile;
    constexpr int kBytes = 4 * kInner * kPitch * static_cast<int>(sizeof(float));
    launch(sum_outer<T>, p.groups.languages * hidden_tiles * rank_tiles, kThreads, kBytes, stream, p);
}

}  // namespace

void mean_gradient(Element element, const TableArguments& p, void* stream) {
    switch (element) {
        case Element::bfloat16: return launch_mean<BFloat16>(p, stream);
        case Element::float16: return launch_mean<Float16>(p, stream);
        case Element::float32: return launch_mean<float>(p, stream);
    }
}

void basis_gradient(Element element, const TableArguments& p, void* stream) {
    switch (element) {
        case Element::bfloat16: return launch_basis<BFloat16>(p, stream);
        case Element::float16: return launch_basis<Float16>(p, stream);
        case Element::float32: return launch_basis<float>(p, stream);
    }
}

}  // namespace shifcon
