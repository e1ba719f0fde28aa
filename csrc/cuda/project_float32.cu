// Both halves of the projection in float32, without tensor cores: float32 results are float32's.
#include "project.cuh"

namespace shifcon {

namespace {

constexpr int kFmaThreads = 256;
constexpr int kFmaTile = 64;   // rows and columns of a block; 4 x 4 a thread
constexpr int kFmaInner = 32;  // of the inner index at a time
constexpr int kFmaPitch = 68;  // floats from one inner index to the next: a multiple of 4 that spreads the banks
constexpr int kFmaTiles = 2 * kFmaInner * kFmaPitch * static_cast<int>(sizeof(float));
constexpr int kFmaShared = kFmaTiles + kFmaTile * (8 + 4);  // and offset and source language of every row

// sums += aᵀ b over the inner index, from shared memory. A slice is summed on its own first: the rounding of a long
// sum grows with the number of terms.
SHIFCON_DEVICE void multiply_slice(const float* a, const float* b, float (&sums)[4][4]) {
    const int row = thread_index() / 16 * 4, column = thread_index() % 16 * 4;
    float slice[4][4] = {};
#pragma unroll 8
    for (int inner = 0; inner < kFmaInner; ++inner) {
        const Floats left = *reinterpret_cast<const Floats*>(a + inner * kFmaPitch + row);
        const Floats right = *reinterpret_cast<const Floats*>(b + inner * kFmaPitch + column);
#pragma unroll
        for (int index = 0; index < 16; ++index) {
            slice[index / 4][index % 4] += left.value[index / 4] * right.value[index % 4];
        }
    }
#pragma unroll
    for (int index = 0; index < 16; ++index) {
        sums[index / 4][index % 4] += slice[index / 4][index % 4];
    }
}

// sums += a b for a row of a, column of V: shared by contract_fma and expand_fma, whose inner index is contiguous.
template <typename Left, typename Right>
SHIFCON_DEVICE void multiply_tiles(int begin, int end, float* a, float* b, float (&sums)[4][4], Left left,
                                   Right right) {
    for (int inner = begin; inner < end; inner += kFmaInner) {
        for (int index = thread_index(); index < kFmaTile * kFmaInner; index += kFmaThreads) {
            const int at = index % kFmaInner, row = index / kFmaInner;
            a[at * kFmaPitch + row] = inner + at < end ? left(row, inner + at) : 0.0f;
        }
        for (int index = thread_index(); index < kFmaTile * kFmaInner; index += kFmaThreads) {
            right(b, index, inner);
        }
        block_barrier();
        multiply_slice(a, b, sums);
        block_barrier();
    }
}

SHIFCON_KERNEL(kFmaThreads) contract_fma(ContractArguments p) {
    const int splits = p.coefficients.splits, padded = p.coefficients.padded;
    const unsigned task = block_index() / p.rank_tiles;
    const Tile tile = find_tile(p.groups, static_cast<int>(task / splits));
    if (tile.count == 0 || tile.group == p.groups.languages) {
        return;
    }
    const int first_column = static_cast<int>(block_index() % p.rank_tiles) * kFmaTile;
    const int split = static_cast<int>(task % splits), begin = split * p.hidden_per_split;
    const int end = begin + p.hidden_per_split < p.hidden ? begin + p.hidden_per_split : p.hidden;
    float* const a = reinterpret_cast<float*>(shared_memory());
    float* const b = a + kFmaInner * kFmaPitch;
    const float* const x = static_cast<const float*>(p.rows.data);
    const float* const basis =
        static_cast<const float*>(p.basis) + static_cast<std::int64_t>(tile.group) * p.hidden * padded;
    auto* const row_offset = reinterpret_cast<std::int64_t*>(shared_memory() + kFmaTiles);
    int* const row_source = reinterpret_cast<int*>(row_offset + kFmaTile);
    for (int row = thread_index(); row < tile.count; row += kFmaThreads) {
        const int number = p.groups.order[tile.begin + row];
        row_offset[row] = number * p.rows.stride;
        row_source[row] = p.mean != nullptr ? p.ids.source_of(number) : 0;
    }
    block_barrier();
    float sums[4][4] = {};
    multiply_tiles(
        begin, end, a, b, sums,
        [&](int row, int column) {
            if (row >= tile.count) {
                return 0.0f;
            }
            const float value = x[row_offset[row] + column];
            return p.mean == nullptr
                       ? value
                       : value - p.mean[static_cast<std::int64_t>(row_source[row]) * p.hidden + column];
        },
        [&](float* to, int index, int inner) {  // V has the columns side by side
            const int column = index % kFmaTile, at = index / kFmaTile;
            const bool present = inner + at < end && first_column + column < padded;
            to[at * kFmaPitch + column] =
                present ? basis[static_cast<std::int64_t>(inner + at) * padded + first_column + column] : 0.0f;
        });
    const int row = thread_index() / 16 * 4, column = first_column + thread_index() % 16 * 4;
#pragma unroll
    for (int index = 0; index < 16; ++index) {
        if (row + index / 4 < tile.count && column + index % 4 < padded) {
            p.coefficients.at(split, tile.begin + row + index / 4)[column + index % 4] =
                column + index % 4 < p.rank ? sums[index / 4][index % 4] : 0.0f;
        }
    }
}

SHIFCON_KERNEL(kFmaThreads) expand_fma(ExpandArguments p) {
    const int padded = p.coefficients.padded;
    const Tile tile = find_tile(p.groups, static_cast<int>(block_index() / p.column_blocks));
    if (tile.count == 0) {
        return;
    }
    const int first = static_cast<int>(block_index() % p.column_blocks) * kFmaTile;
    const int last = first + kFmaTile < p.hidden ? first + kFmaTile : p.hidden;
    if (tile.group == p.groups.languages) {
        copy_rows<float>(p, tile, first, last);
        return;
    }
    float* const a = reinterpret_cast<float*>(shared_memory());
    float* const b = a + kFmaInner * kFmaPitch;
    const float* const basis =
        static_cast<const float*>(p.basis) + static_cast<std::int64_t>(tile.group) * p.hidden * padded;
    float sums[4][4] = {};
    multiply_tiles(
        0, padded, a, b, sums,
        [&](int row, int column) {
            return row < tile.count ? p.coefficients.sum(tile.begin + row, column) : 0.0f;
        },
        [&](float* to, int index, int inner) {  // V has the inner index side by side
            const int at = index % kFmaInner, column = first + index / kFmaInner;
            const bool present = inner + at < padded && column < last;
            to[at * kFmaPitch + column - first] =
                present ? basis[static_cast<std::int64_t>(column) * padded + inner + at] : 0.0f;
        });
    const int row = thread_index() / 16 * 4, column = first + thread_index() % 16 * 4;
#pragma unroll
    for (int index = 0; index < 16; ++index) {
        const int at = column + index % 4;
        if (row + index / 4 < tile.count && at < last) {
            const std::int64_t number = p.groups.order[tile.begin + row + index / 4];
            const float mean = p.mean == nullptr ? 0.0f : p.mean[static_cast<std::int64_t>(tile.group) * p.hidden + at];
            static_cast<float*>(p.result)[number * p.hidden + at] = sums[index / 4][index % 4] + mean;
        }
    }
}

}  // namespace

void contract_float32(ContractArguments p, std::int64_t tiles, void* stream) {
    p.rank_tiles = (p.coefficients.padded + kFmaTile - 1) / kFmaTile;
    launch(contract_fma, tiles * p.coefficients.splits * p.rank_tiles, kFmaThreads, kFmaShared, stream, p);
}

void expand_float32(ExpandArguments p, std::int64_t tiles, void* stream) {
    p.block_columns = kFmaTile;
    p.column_blocks = (p.hidden + p.block_columns - 1) / p.block_columns;
    launch(expand_fma, tiles * p.column_blocks, kFmaThreads, kFmaTiles, stream, p);
}

}  // namespace shifcon
