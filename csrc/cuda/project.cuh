// The two halves of the projection, and what they hand to each other: coefficients = (x - mean_s) V_t, then
// coefficients V_tᵀ + mean_t. Between them lies a float32 table of rows x rank in the order of the groups, split over
// the hidden size so that there is work for every multiprocessor; the halves are added where they are read, in order.
#pragma once

#include "grouping.cuh"

namespace shifcon {

// Rows of any strides that one row stride can express; `vectors`: 128-bit accesses are aligned.
struct Rows {
    const void* data;
    std::int64_t stride;  // elements
    bool vectors;
};

struct Coefficients {
    float* data;             // (splits, positions, padded)
    std::int64_t positions;  // rows
    int splits;
    int padded;  // rank, rounded up to a multiple of 16; what is beyond the rank is 0

    SHIFCON_DEVICE float* at(int split, std::int64_t position) const {
        return data + (split * positions + position) * padded;
    }
    SHIFCON_DEVICE float sum(std::int64_t position, int column) const {
        float result = at(0, position)[column];
        for (int split = 1; split < splits; ++split) {
            result += at(split, position)[column];
        }
        return result;
    }
};

struct ContractArguments {
    Groups groups;
    Ids ids;
    Rows rows;
    const float* mean;  // (languages, hidden), or nullptr: nothing is subtracted
    const void* basis;  // (languages, hidden, padded) in the dtype of the rows
    int hidden, rank;
    int hidden_per_split;  // a multiple of 64
    int rank_tiles;        // set by the launcher
    Coefficients coefficients;
};

struct ExpandArguments {
    Groups groups;
    Rows rows;  // what stays as it is comes from here
    const float* mean;
    const void* basis;
    int hidden;
    int block_columns, column_blocks;  // columns of one block; set by the launcher
    Coefficients coefficients;
    void* result;  // (rows, hidden)
};

// 128 rows for the tensor cores, 64 in float32.
inline int tile_rows_of(Element element) { return element == Element::float32 ? 64 : 128; }

// How often the hidden size is split: as few parts as give every multiprocessor two blocks, which can be there at once
// (two thirds of what fits at a rank of 64 or less). What is resident shares the bandwidth, so that blocks need not
// come out even; but every part is a table of coefficients that is written, and read again d / 512 times.
inline int splits_for(std::int64_t tiles, int hidden, int padded, int processors) {
    const std::int64_t blocks = tiles * ((padded + 127) / 128);
    int splits = 1;
    while (splits < 8 && blocks * splits < 2 * static_cast<std::int64_t>(processors) && hidden >= 256 * (splits + 1)) {
        ++splits;
    }
    return splits;
}

void contract(Element element, ContractArguments arguments, std::int64_t tiles, void* stream);
void expand(Element element, ExpandArguments arguments, std::int64_t tiles, void* stream);
void contract_float32(ContractArguments arguments, std::int64_t tiles, void* stream);
void expand_float32(ExpandArguments arguments, std::int64_t tiles, void* stream);

// 16-byte pieces of a row of shared memory change places with the row, so that the eight rows that one phase of
// ldmatrix reads below (0, 1, 8, 9, 16, 17, 24, 25 from any multiple of 2 on) lie in eight different groups of banks.
SHIFCON_DEVICE int swizzled(int row, int piece) { return piece ^ ((((row >> 3) & 3) << 1) | (row & 1)); }

// values = row[column .. column + 8), 0 from `size` on. Rows are aligned to 16 bytes if their size is a multiple of 8.
SHIFCON_DEVICE void load_eight(float (&values)[8], const float* row, int column, int size) {
    if (size % 8 == 0) {
        Floats halves[2]{};
        if (column < size) {
            halves[0] = *reinterpret_cast<const Floats*>(row + column);
            halves[1] = *reinterpret_cast<const Floats*>(row + column + 4);
        }
#pragma unroll
        for (int element = 0; element < 8; ++element) {
            values[element] = halves[element / 4].value[element % 4];
        }
    } else {
#pragma unroll
        for (int element = 0; element < 8; ++element) {
            values[element] = column + element < size ? row[column + element] : 0.0f;
        }
    }
}

// Copies the rows of a tile that no language moves, bit for bit.
template <typename T>
SHIFCON_DEVICE void copy_rows(const ExpandArguments& p, const Tile& tile, int first, int last) {
    const T* const rows = static_cast<const T*>(p.rows.data);
    T* const result = static_cast<T*>(p.result);
    constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
    const int piece = p.rows.vectors ? kPiece : 1;
    const int pieces = (last - first) / piece;
    for (int index = thread_index(); index < tile.count * pieces; index += block_threads()) {
        const std::int64_t row = p.groups.order[tile.begin + index / pieces];
        const int column = first + index % pieces * piece;
        const T* const from = rows + row * p.rows.stride + column;
        T* const to = result + row * p.hidden + column;
        if (piece == kPiece) {
            *reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(from);
        } else {
            *to = *from;
        }
    }
}

}  // namespace shifcon
