// x' = coefficients V_tᵀ + mean_t on tensor cores, for bfloat16 and float16, and the rows that stay as they are.
//
// A block has 128 rows, 32 a warp, and walks over its columns 32 at a time; V comes into shared memory four stages
// deep. The coefficients are rounded once, as the first of two matrix products in x's dtype would round them, and stay
// in registers up to a rank of 64, or 128 in the wider variant, and in shared memory up to 256. In the outer index of
// V, n of block b of a mma stands for the column n / 2 * 8 + 2 b + n % 2, so that four blocks give a lane eight columns
// side by side: 128-bit stores.
#pragma once

#include "project.cuh"

namespace shifcon {

constexpr int kExpandStages = 4;
constexpr int kExpandColumns = 32;

constexpr int kExpandSlots = 2;

// V of all stages, and of a slot: the rounded coefficients of 128 rows.
template <int Steps>
constexpr int kExpandBasisBytes = kExpandStages* kExpandColumns* Steps * 32;
template <int Steps>
constexpr int kExpandSlotBytes = 128 * Steps * 32;

template <int Steps>
int expand_shared_bytes(int padded) {
    const int slots = padded > 16 * Steps ? kExpandSlots : 1;
    return kExpandBasisBytes<Steps> + slots * kExpandSlotBytes<Steps>;
}

template <typename T, int Steps>  // Steps: sixteens of the rank that the registers hold
struct ExpandBlock {
    const ExpandArguments& p;
    Tile tile;
    unsigned char* shared;
    static constexpr int kPieces = Steps * 2;  // of 16 bytes, in a row of V
    static constexpr int kBasisBytesOfAll = kExpandBasisBytes<Steps>;
    static constexpr int kParts = 8 / Steps, kSplits = 2;  // of a lane's four rows: whose coefficients are read at once

    SHIFCON_DEVICE void load(int column, int first_rank, int stage) const {
        const int padded = p.coefficients.padded;
        const T* const basis =
            static_cast<const T*>(p.basis) + static_cast<std::int64_t>(tile.group) * p.hidden * padded;
        unsigned char* const to = shared + stage * (kBasisBytesOfAll / kExpandStages);
        for (int index = thread_index(); index < kExpandColumns * kPieces; index += block_threads()) {
            const int row = index / kPieces, piece = index % kPieces, rank = first_rank + piece * 8;
            const bool present = column + row < p.hidden && rank < padded;
            const T* const from = basis + static_cast<std::int64_t>(column + row) * padded + rank;
            copy_async(to + (row * kPieces + swizzled(row, piece)) * 16, present ? from : basis, present);
        }
    }

    SHIFCON_DEVICE static int row_of(int part) { return warp_index() * 32 + part * 8 + lane_index() / 4; }

    // The lane's share of the coefficients of rows first_part .. of its four: columns 4 (lane % 4) .. + 3 of sixteen.
    // They lie in L2, and what is read of two splits, sixteen pieces of 16 bytes, is under way at once.
    SHIFCON_DEVICE void load_coefficients(Floats (&quads)[kParts][Steps], int first_part, int first_rank) const {
        const int first = first_rank + lane_index() % 4 * 4, splits = p.coefficients.splits;
#pragma unroll
        for (int index = 0; index < kParts * Steps; ++index) {
            quads[index / Steps][index % Steps] = {};
        }
#pragma unroll 1
        for (int split = 0; split < splits; split += kSplits) {
            Floats pieces[kSplits][kParts][Steps]{};
#pragma unroll
            for (int index = 0; index < kSplits * kParts; ++index) {
                const int of = index / kParts, part = index % kParts, row = row_of(first_part + part);
                const float* const from = p.coefficients.at(split + of, tile.begin + row) + first;
                const bool present = split + of < splits && row < tile.count;
#pragma unroll
                for (int step = 0; step < Steps; ++step) {
                    if (present && first + 16 * step < p.coefficients.padded) {
                        pieces[of][part][step] = *reinterpret_cast<const Floats*>(from + 16 * step);
                    }
                }
            }
#pragma unroll
            for (int index = 0; index < 4 * kParts * Steps; ++index) {
                const int part = index / Steps / 4, step = index / 4 % Steps;
#pragma unroll
                for (int of = 0; of < kSplits; ++of) {
                    quads[part][step].value[index % 4] += pieces[of][part][step].value[index % 4];
                }
            }
        }
    }

    SHIFCON_DEVICE static float largest_of(const Floats (&quads)[Steps]) {
        float largest = 0.0f;
#pragma unroll
        for (int index = 0; index < 4 * Steps; ++index) {
            largest = fmaxf(largest, fabsf(quads[index / 4].value[index % 4]));
        }
        return largest;
    }

    // A power of two that brings a row's coefficients into float16's range, and its inverse, from the largest that each
    // of the row's four lanes has.
    SHIFCON_DEVICE static void scale_by(float largest, float& scale, float& inverse) {
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        if (largest > 1e-30f && largest < 1e30f) {  // neither nothing nor infinity
            int exponent;
            frexpf(largest, &exponent);  // largest < 2^exponent
            scale = ldexpf(1.0f, 14 - exponent);
            inverse = ldexpf(1.0f, exponent - 14);
        }
    }

    // For a rank that the registers do not hold at once; else round_coefficients finds the scales in what it reads.
    SHIFCON_DEVICE void find_scales(int rank_tiles, float (&scales)[4], float (&inverses)[4]) const {
#pragma unroll
        for (int first_part = 0; first_part < 4; first_part += kParts) {
            float largest[kParts] = {};
#pragma unroll 1
            for (int rank_tile = 0; rank_tile < rank_tiles; ++rank_tile) {
                Floats quads[kParts][Steps];
                load_coefficients(quads, first_part, rank_tile * 16 * Steps);
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    largest[part] = fmaxf(largest[part], largest_of(quads[part]));
                }
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                scale_by(largest[part], scales[first_part + part], inverses[first_part + part]);
            }
        }
    }

    SHIFCON_DEVICE unsigned char* rounded_of(int slot) const {
        return shared + kBasisBytesOfAll + slot * kExpandSlotBytes<Steps>;
    }

    // The coefficients of the warp's own rows: float32 sums from global memory, rounded into shared memory.
    SHIFCON_DEVICE void round_coefficients(int slot, int first_rank, bool whole_rank, float (&scales)[4],
                                           float (&inverses)[4]) const {
        unsigned char* const rounded = rounded_of(slot);
        const int column = lane_index() % 4 * 4;  // of every sixteen
#pragma unroll
        for (int first_part = 0; first_part < 4; first_part += kParts) {
            Floats quads[kParts][Steps];
            warp_barrier();  // old fragments have been read; and later rows are not loaded before: too many registers
            load_coefficients(quads, first_part, first_rank);
#pragma unroll
            for (int part = first_part; part < first_part + kParts; ++part) {
                const int row = row_of(part);
                if constexpr (is_float16<T>) {
                    if (whole_rank) {
                        scale_by(largest_of(quads[part - first_part]), scales[part], inverses[part]);
                    }
                }
#pragma unroll
                for (int step = 0; step < Steps; ++step) {
                    const float(&value)[4] = quads[part - first_part][step].value;
                    const int piece = 2 * step + column / 8;
                    auto* const to = reinterpret_cast<WordPair*>(rounded + (row * kPieces + (piece ^ (row % 8))) * 16 +
                                                                 column % 8 * 2);
                    *to = {{pack<T>(value[0] * scales[part], value[1] * scales[part]),
                            pack<T>(value[2] * scales[part], value[3] * scales[part])}};
                }
            }
        }
        warp_barrier();
    }

    SHIFCON_DEVICE void load_fragments(std::uint32_t (&a)[2][Steps][4], int slot) const {
        const unsigned char* const rounded = rounded_of(slot);
        const int lane = lane_index();
#pragma unroll
        for (int tall = 0; tall < 2; ++tall) {
#pragma unroll
            for (int step = 0; step < Steps; ++step) {
                const int row = warp_index() * 32 + tall * 16 + lane / 8 % 2 * 8 + lane % 8;
                const int piece = step * 2 + lane / 16;
                load_matrices(a[tall][step], rounded + row * kPieces * 16 + (piece ^ (row % 8)) * 16);
            }
        }
    }

    SHIFCON_DEVICE void multiply(int stage, int first_rank, const std::uint32_t (&a)[2][Steps][4],
                                 float (&sums)[2][4][4]) const {
        const unsigned char* const basis = shared + stage * (kBasisBytesOfAll / kExpandStages);
        const int lane = lane_index();
#pragma unroll
        for (int step = 0; step < Steps; ++step) {
            if (first_rank + step * 16 < p.coefficients.padded) {
#pragma unroll
                for (int block = 0; block < 4; block += 2) {
                    const int row = lane % 8 / 2 * 8 + (block + lane / 16) * 2 + lane % 2;
                    std::uint32_t b[4];
                    load_matrices(b, basis + (row * kPieces + swizzled(row, step * 2 + lane / 8 % 2)) * 16);
#pragma unroll
                    for (int tall = 0; tall < 2; ++tall) {
                        multiply_add<T>(sums[tall][block], a[tall][step], b[0], b[1]);
                        multiply_add<T>(sums[tall][block + 1], a[tall][step], b[2], b[3]);
                    }
                }
            }
        }
    }

    // The columns of a lane are eight side by side.
    SHIFCON_DEVICE static int column_from(int first_column) { return first_column + lane_index() % 4 * 8; }

    SHIFCON_DEVICE void load_mean(float (&mean)[8], int first_column) const {
        if (p.mean != nullptr) {
            load_eight(mean, p.mean + static_cast<std::int64_t>(tile.group) * p.hidden, column_from(first_column),
                       p.hidden);
        }
    }

    SHIFCON_DEVICE void store(int first_column, const float (&sums)[2][4][4], const int (&rows)[4],
                              const float (&inverses)[4], const float (&mean)[8]) const {
        const int column = column_from(first_column);
        const bool vectors = p.hidden % 8 == 0;
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            if (rows[part] >= 0) {
                Words words;
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) {
                    const float* const two = &sums[part / 2][pair][part % 2 * 2];
                    words.word[pair] = pack<T>(two[0] * inverses[part] + mean[2 * pair],
                                               two[1] * inverses[part] + mean[2 * pair + 1]);
                }
                T* const to = static_cast<T*>(p.result) + static_cast<std::int64_t>(rows[part]) * p.hidden + column;
                if (vectors) {
                    if (column < p.hidden) {
                        *reinterpret_cast<Words*>(to) = words;
                    }
                } else {
#pragma unroll
                    for (int element = 0; element < 8; ++element) {
                        if (column + element < p.hidden) {
                            to[element] = T{static_cast<std::uint16_t>(words.word[element / 2] >> (element % 2 * 16))};
                        }
                    }
                }
            }
        }
    }
};

template <typename T, int Steps>
SHIFCON_KERNEL(128, Steps == 4 ? 3 : 2) expand_mma(ExpandArguments p) {
    const Tile tile = find_tile(p.groups, static_cast<int>(block_index() / p.column_blocks));
    if (tile.count == 0) {
        return;
    }
    const int first = static_cast<int>(block_index() % p.column_blocks) * p.block_columns;
    const int last = first + p.block_columns < p.hidden ? first + p.block_columns : p.hidden;
    if (tile.group == p.groups.languages) {
        copy_rows<T>(p, tile, first, last);
        return;
    }
    using Block = ExpandBlock<T, Steps>;
    const Block block{p, tile, shared_memory()};
    const int rank_tiles = Steps == 4 ? 1 : (p.coefficients.padded + 16 * Steps - 1) / (16 * Steps);
    const int tasks = (last - first + kExpandColumns - 1) / kExpandColumns * rank_tiles;
    const auto column_of = [&](int task) { return first + task / rank_tiles * kExpandColumns; };
    const auto rank_of = [&](int task) { return task % rank_tiles * 16 * Steps; };
    for (int task = 0; task < kExpandStages - 1; ++task) {
        if (task < tasks) {
            block.load(column_of(task), rank_of(task), task);
        }
        copy_commit();
    }
    int rows[4];
    float scales[4], inverses[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        scales[part] = inverses[part] = 1.0f;
        rows[part] = Block::row_of(part) < tile.count ? p.groups.order[tile.begin + Block::row_of(part)] : -1;
    }
    if (is_float16<T> && rank_tiles > 1) {
        block.find_scales(rank_tiles, scales, inverses);
    }
    std::uint32_t a[2][Steps][4];
    const bool resident = rank_tiles <= kExpandSlots;  // else every task rounds its own again
    for (int slot = 0; resident && slot < rank_tiles; ++slot) {
        block.round_coefficients(slot, slot * 16 * Steps, rank_tiles == 1, scales, inverses);
    }
    if (rank_tiles == 1) {
        block.load_fragments(a, 0);
    }
    float sums[2][4][4] = {};
    for (int task = 0; task < tasks; ++task) {
        copy_wait<kExpandStages - 2>();
        block_barrier();
        const int next = task + kExpandStages - 1;
        if (next < tasks) {
            block.load(column_of(next), rank_of(next), next % kExpandStages);
        }
        copy_commit();
        if (rank_tiles > 1) {
            if (!resident) {
                block.round_coefficients(0, rank_of(task), false, scales, inverses);
            }
            block.load_fragments(a, resident ? task % rank_tiles : 0);
        }
        const bool last_of_rank = (task + 1) % rank_tiles == 0;
        float mean[8] = {};
        if (last_of_rank) {
            block.load_mean(mean, column_of(task));  // comes while the products are formed
        }
        block.multiply(task % kExpandStages, rank_of(task), a, sums);
        if (last_of_rank) {
            block.store(column_of(task), sums, rows, inverses, mean);
#pragma unroll
            for (int index = 0; index < 32; ++index) {
                sums[index / 16][index / 4 % 4][index % 4] = 0.0f;
            }
        }
    }
    copy_wait<0>();
}

}  // namespace shifcon
