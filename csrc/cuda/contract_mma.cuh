// coefficients = (x - mean_s) V_t on tensor cores, for bfloat16 and float16.
//
// A block has 128 rows and 64 or 128 columns of V; four warps share the rows, 32 each, and each further four take 64
// more columns. 64 of the hidden size at a time come into shared memory, three stages deep. The order in which the
// inner index of a matrix product is summed is free, so the fragments take it in the order in which one 16-byte piece
// of x serves two mma: in a slice of 32, the lanes with lane % 4 = q hold 8 q .. 8 q + 7, of which step s (0, 1) uses
// 4 s, 4 s + 1 where the layout says 2 q, 2 q + 1, and 4 s + 2, 4 s + 3 where it says 2 q + 8, 2 q + 9. The rows of V
// that ldmatrix is given follow the same order. So x - mean_s is formed in registers, in float32, from whole pieces.
#pragma once

#include "project.cuh"

namespace shifcon {

constexpr int kContractStages = 3;
constexpr int kSlice = 64;
constexpr int kRowsBytes = 128 * kSlice * 2;        // x of a stage
constexpr int kBasisBytes = kSlice * 64 * 2;        // V of a stage, for each four warps
constexpr int kContractExtra = 128 * (8 + 4);       // offset and source language of every row

inline int contract_shared_bytes(int threads) {
    return kContractStages * (kRowsBytes + threads / 128 * kBasisBytes) + kContractExtra;
}

// A float16 difference of two numbers in its range may leave it; half of it does not.
template <typename T>
constexpr float kDifferenceScale = is_float16<T> ? 0.5f : 1.0f;

template <typename T>
SHIFCON_DEVICE std::uint32_t centred(std::uint32_t pair, float first_mean, float second_mean) {
    const float first = widen(T{static_cast<std::uint16_t>(pair & 0xffffu)});
    const float second = widen(T{static_cast<std::uint16_t>(pair >> 16)});
    return pack<T>((first - first_mean) * kDifferenceScale<T>, (second - second_mean) * kDifferenceScale<T>);
}

template <typename T>
struct ContractBlock {
    const ContractArguments& p;
    Tile tile;
    int first_column;  // of V
    int warps_along_rank;
    unsigned char* shared;
    std::int64_t* row_offset;  // elements; -1: no such row
    int* row_source;

    SHIFCON_DEVICE unsigned char* rows_of(int stage) const {
        return shared + stage * (kRowsBytes + warps_along_rank * kBasisBytes);
    }
    SHIFCON_DEVICE unsigned char* basis_of(int stage) const { return rows_of(stage) + kRowsBytes; }
    // Two rows of x are read at once: their halves must not share banks.
    SHIFCON_DEVICE static int row_piece(int row, int piece) { return row * 128 + ((piece ^ ((row & 1) << 2)) << 4); }

    SHIFCON_DEVICE void load(int slice, int stage) const {
        const T* const x = static_cast<const T*>(p.rows.data);
        unsigned char* const rows = rows_of(stage);
        for (int index = thread_index(); index < 128 * 8; index += block_threads()) {
            const int row = index / 8, piece = index % 8, column = slice + piece * 8;
            unsigned char* const to = rows + row_piece(row, piece);
            const std::int64_t offset = row_offset[row];
            if (p.rows.vectors) {
                const bool present = offset >= 0 && column < p.hidden;
                copy_async(to, present ? x + offset + column : x, present);
            } else {
                Words words{};
                for (int element = 0; element < 8; ++element) {
                    const bool present = offset >= 0 && column + element < p.hidden;
                    const std::uint32_t bits = present ? x[offset + column + element].bits : 0;
                    words.word[element / 2] |= bits << (element % 2 * 16);
                }
                *reinterpret_cast<Words*>(to) = words;
            }
        }
        const int pieces = 8 * warps_along_rank;
        const int padded = p.coefficients.padded;
        const T* const basis =
            static_cast<const T*>(p.basis) + static_cast<std::int64_t>(tile.group) * p.hidden * padded;
        unsigned char* const to = basis_of(stage);
        for (int index = thread_index(); index < kSlice * pieces; index += block_threads()) {
            const int row = index / pieces, piece = index % pieces;
            const int column = first_column + piece * 8;
            const bool present = slice + row < p.hidden && column < padded;
            const T* const from = basis + static_cast<std::int64_t>(slice + row) * padded + column;
            copy_async(to + (row * pieces + swizzled(row, piece)) * 16, present ? from : basis, present);
        }
    }

    SHIFCON_DEVICE void multiply(int slice, int stage, float (&sums)[2][8][4]) const {
        const int lane = lane_index(), quad = lane % 4;
        const int first_row = warp_index() % 4 * 32, rank_warp = warp_index() / 4;
        const unsigned char* const rows = rows_of(stage);
        const unsigned char* const basis = basis_of(stage);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            std::uint32_t a[2][2][4];  // [rows][step]
#pragma unroll
            for (int part = 0; part < 4; ++part) {  // rows g, g + 8 of the first 16, then of the others
                const int row = first_row + part * 8 + lane / 4;
                Words words = *reinterpret_cast<const Words*>(rows + row_piece(row, half * 4 + quad));
                if (p.mean != nullptr) {
                    float mean[8];
                    load_eight(mean, p.mean + static_cast<std::int64_t>(row_source[row]) * p.hidden,
                               slice + half * 32 + quad * 8, p.hidden);
#pragma unroll
                    for (int pair = 0; pair < 4; ++pair) {
                        words.word[pair] = centred<T>(words.word[pair], mean[2 * pair], mean[2 * pair + 1]);
                    }
                }
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) {
                    a[part / 2][pair / 2][part % 2 + pair % 2 * 2] = words.word[pair];
                }
            }
            // Row r of an 8 x 8 matrix of V is r / 2 * 8 + r % 2 (+ 2 for the second half of the inner index).
            const int inner = half * 32 + lane % 8 / 2 * 8 + lane / 8 % 2 * 2 + lane % 2;
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const int row = inner + step * 4;
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) {
                    if (first_column + rank_warp * 64 + pair * 16 < p.coefficients.padded) {
                        const int piece = swizzled(row, rank_warp * 8 + pair * 2 + lane / 16);
                        std::uint32_t b[4];
                        load_matrices_transposed(b, basis + (row * 8 * warps_along_rank + piece) * 16);
#pragma unroll
                        for (int tall = 0; tall < 2; ++tall) {
                            multiply_add<T>(sums[tall][2 * pair], a[tall][step], b[0], b[1]);
                            multiply_add<T>(sums[tall][2 * pair + 1], a[tall][step], b[2], b[3]);
                        }
                    }
                }
            }
        }
    }

    SHIFCON_DEVICE void store(int split, const float (&sums)[2][8][4]) const {
        const float scale = p.mean != nullptr ? 1.0f / kDifferenceScale<T> : 1.0f;
        const int lane = lane_index();
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int row = warp_index() % 4 * 32 + part * 8 + lane / 4;
#pragma unroll
            for (int block = 0; block < 8; ++block) {
                const int column = first_column + warp_index() / 4 * 64 + block * 8 + lane % 4 * 2;
                if (row < tile.count && column < p.coefficients.padded) {
                    const float first = sums[part / 2][block][part % 2 * 2] * scale;
                    const float second = sums[part / 2][block][part % 2 * 2 + 1] * scale;
                    FloatPair* const to =
                        reinterpret_cast<FloatPair*>(p.coefficients.at(split, tile.begin + row) + column);
                    *to = {column < p.rank ? first : 0.0f, column + 1 < p.rank ? second : 0.0f};
                }
            }
        }
    }
};

template <typename T>
SHIFCON_KERNEL(256) contract_mma(ContractArguments p) {
    const int splits = p.coefficients.splits;
    const unsigned task = block_index() / p.rank_tiles;
    const Tile tile = find_tile(p.groups, static_cast<int>(task / splits));
    if (tile.count == 0 || tile.group == p.groups.languages) {
        return;
    }
    const int warps_along_rank = block_threads() / 128;
    const int rank_tile = static_cast<int>(block_index() % p.rank_tiles), split = static_cast<int>(task % splits);
    unsigned char* const shared = shared_memory();
    unsigned char* const extra = shared + kContractStages * (kRowsBytes + warps_along_rank * kBasisBytes);
    const ContractBlock<T> block{p,
                                 tile,
                                 rank_tile * 64 * warps_along_rank,
                                 warps_along_rank,
                                 shared,
                                 reinterpret_cast<std::int64_t*>(extra),
                                 reinterpret_cast<int*>(extra + 128 * 8)};
    for (int row = thread_index(); row < 128; row += block_threads()) {
        const bool present = row < tile.count;
        const int number = present ? p.groups.order[tile.begin + row] : 0;
        block.row_offset[row] = present ? number * p.rows.stride : -1;
        block.row_source[row] = present && p.mean != nullptr ? p.ids.source_of(number) : 0;
    }
    block_barrier();

    const int begin = split * p.hidden_per_split;
    const int end = begin + p.hidden_per_split < p.hidden ? begin + p.hidden_per_split : p.hidden;
    const int slices = end > begin ? (end - begin + kSlice - 1) / kSlice : 0;
    for (int slice = 0; slice < kContractStages - 1; ++slice) {
        if (slice < slices) {
            block.load(begin + slice * kSlice, slice);
        }
        copy_commit();
    }
    float sums[2][8][4] = {};
    for (int slice = 0; slice < slices; ++slice) {
        copy_wait<kContractStages - 2>();
        block_barrier();  // this slice is there for everyone, and the one before it is done with
        const int next = slice + kContractStages - 1;
        if (next < slices) {
            block.load(begin + next * kSlice, next % kContractStages);
        }
        copy_commit();
        block.multiply(begin + slice * kSlice, slice % kContractStages, sums);
    }
    copy_wait<0>();
    block.store(split, sums);
}

}  // namespace shifcon
