// Rows sorted by language on the device: a counting sort that is stable, so that sums over a group's rows are formed
// in the same order every time, and that needs neither atomics nor the host.
//
// The rows are cut into chunks, one warp each. A warp counts its rows per group, one block scans the counts (group by
// group, within a group chunk by chunk), and the warps go over their rows again and put each where the scan says: three
// launches, or one where the chunks' warps are one block, whose counts stay in shared memory. Group
// numbers are language ids; the group after the last language is that of the rows that stay as they are: an id of -1,
// or one out of range, which on a device costs a synchronisation to report and so is treated as -1.
#pragma once

#include "target.cuh"

namespace shifcon {

constexpr int kGroupingWarps = 4;
constexpr int kOneBlockWarps = 32;

struct Ids {
    const void* source;
    const void* target;
    int inner;  // rows of x per id
    int languages;
    bool wide;  // int64, else int32

    SHIFCON_DEVICE static std::int64_t read(const void* ids, bool wide, std::int64_t index) {
        return wide ? static_cast<const std::int64_t*>(ids)[index] : static_cast<const std::int32_t*>(ids)[index];
    }
    SHIFCON_DEVICE int source_of(int row) const { return static_cast<int>(read(source, wide, row / inner)); }
    SHIFCON_DEVICE int group_of(int row, bool by_source) const {
        const std::int64_t from = read(source, wide, row / inner), to = read(target, wide, row / inner);
        const bool moved = from >= 0 && from < languages && to >= 0 && to < languages;
        return moved ? static_cast<int>(by_source ? from : to) : languages;
    }
};

// languages + 1 groups: group g holds order[starts[g] .. starts[g + 1]) and the tiles
// [tile_starts[g], tile_starts[g + 1]).
struct Groups {
    const int* starts;
    const int* tile_starts;
    const int* order;
    int languages;
    int tile_rows;
};

struct Tile {
    int group;
    int begin;  // first position in the order
    int count;  // rows; 0: there is no such tile
};

SHIFCON_DEVICE Tile find_tile(const Groups& groups, int number) {
    int low = 0, high = groups.languages + 1;  // the last group whose first tile is not after this one
    if (number >= groups.tile_starts[high]) {
        return {0, 0, 0};
    }
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (groups.tile_starts[middle] <= number) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const int begin = groups.starts[low] + (number - groups.tile_starts[low]) * groups.tile_rows;
    const int left = groups.starts[low + 1] - begin;
    return {low, begin, left < groups.tile_rows ? left : groups.tile_rows};
}

struct GroupingArguments {
    Ids ids;
    const int* before;  // rows in the order in which they are to be taken; nullptr: as they come
    int rows;
    int chunks, chunk_rows;
    int tile_rows;
    bool by_source;
    int* counts;       // (languages + 1, chunks); of no use where one block does it
    int* starts;       // (languages + 2,)
    int* tile_starts;  // (languages + 2,)
    int* order;        // (rows,)

    Groups groups() const { return {starts, tile_starts, order, ids.languages, tile_rows}; }
};

// Whether a block takes the rows: 512 a warp, 128 of them read at once, and counts that fit into 16 KiB.
inline bool one_block_groups(std::int64_t rows, int languages) { return rows <= 16384 && languages < 128; }

// How many chunks, so that the table of counts stays within what the rows themselves take, or 2^18.
inline int grouping_chunks(std::int64_t rows, int languages) {
    if (one_block_groups(rows, languages)) {
        return kOneBlockWarps;
    }
    const std::int64_t fitting = (std::int64_t{1} << 18) / (languages + 1);
    const std::int64_t wanted = (rows + 127) / 128;
    const std::int64_t chunks = wanted < fitting ? wanted : fitting;
    return static_cast<int>(chunks < 1 ? 1 : chunks);
}

// Tiles there can be at most: every group may end in one that is not full.
inline std::int64_t most_tiles(std::int64_t rows, int languages, int tile_rows) {
    const std::int64_t tiles = rows / tile_rows + languages + 1;
    return tiles < rows ? tiles : rows;
}

void group_rows(const GroupingArguments& arguments, void* stream);

}  // namespace shifcon
