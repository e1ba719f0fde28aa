#include "grouping.cuh"

namespace shifcon {

namespace {

constexpr int kScanThreads = 512;
constexpr int kAhead = 4;  // times 32 rows whose ids are under way at once

// One warp's rows, 32 at a time, in order: visit(row, group, lanes of the same group). Lanes without a row take part
// with a group of their own, -1.
template <typename Visit>
SHIFCON_DEVICE void for_rows_of_chunk(const GroupingArguments& p, int chunk, Visit visit) {
    const std::int64_t begin = static_cast<std::int64_t>(chunk) * p.chunk_rows;
    const std::int64_t end = begin + p.chunk_rows < p.rows ? begin + p.chunk_rows : p.rows;
    for (std::int64_t first = begin; first < end; first += 32 * kAhead) {
        int rows[kAhead], groups[kAhead];
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {  // lanes without a row read the last one: no branch, so no waiting
            const std::int64_t wanted = first + 32 * step + lane_index();
            const std::int64_t position = wanted < end ? wanted : end - 1;
            rows[step] = p.before == nullptr ? static_cast<int>(position) : p.before[position];
        }
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {
            groups[step] = p.ids.group_of(rows[step], p.by_source);
        }
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {
            if (first + 32 * step < end) {
                const int group = first + 32 * step + lane_index() < end ? groups[step] : -1;
                visit(rows[step], group, lanes_with(group));
            }
        }
    }
}

SHIFCON_DEVICE void count_chunk(const GroupingArguments& p, int chunk) {
    int* const counts = p.counts + chunk;
    for (int group = lane_index(); group <= p.ids.languages; group += 32) {
        counts[static_cast<std::int64_t>(group) * p.chunks] = 0;
    }
    warp_barrier();
    for_rows_of_chunk(p, chunk, [&](int, int group, unsigned same) {
        const bool first = (same & ((1u << lane_index()) - 1)) == 0;
        if (group >= 0 && first) {
            counts[static_cast<std::int64_t>(group) * p.chunks] += count_bits(same);
        }
        warp_barrier();
    });
}

// The sum of the values of the threads before this one, and of all.
SHIFCON_DEVICE int exclusive_sum(int value, int* of_warps, int& total) {
    int sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int below = shuffle_up(sum, distance);
        sum += lane_index() >= distance ? below : 0;
    }
    if (lane_index() == 31) {
        of_warps[warp_index()] = sum;
    }
    block_barrier();
    int before = 0;
    total = 0;
    for (int warp = 0; warp < block_threads() / 32; ++warp) {
        before += warp < warp_index() ? of_warps[warp] : 0;
        total += of_warps[warp];
    }
    block_barrier();  // of_warps is written again by the next call
    return before + sum - value;
}

SHIFCON_DEVICE void scan_counts(const GroupingArguments& p, int* of_warps) {
    const int groups = p.ids.languages + 1;
    const int entries = groups * p.chunks;  // at most 2^18, or the number of groups
    int running = 0, total = 0;
    for (int base = 0; base < entries; base += block_threads()) {
        const int entry = base + thread_index();
        const int before = running + exclusive_sum(entry < entries ? p.counts[entry] : 0, of_warps, total);
        if (entry < entries) {
            p.counts[entry] = before;
            if (entry % p.chunks == 0) {
                p.starts[entry / p.chunks] = before;
            }
        }
        running += total;
    }
    if (thread_index() == 0) {
        p.starts[groups] = p.rows;
    }
    block_barrier();
    running = 0;
    for (int base = 0; base < groups; base += block_threads()) {
        const int group = base + thread_index();
        const int rows = group < groups ? p.starts[group + 1] - p.starts[group] : 0;
        const int before = running + exclusive_sum((rows + p.tile_rows - 1) / p.tile_rows, of_warps, total);
        if (group < groups) {
            p.tile_starts[group] = before;
        }
        running += total;
    }
    if (thread_index() == 0) {
        p.tile_starts[groups] = running;
    }
}

SHIFCON_DEVICE void scatter_chunk(const GroupingArguments& p, int chunk) {
    int* const places = p.counts + chunk;
    for_rows_of_chunk(p, chunk, [&](int row, int group, unsigned same) {
        const int rank = count_bits(same & ((1u << lane_index()) - 1));
        int* const place = places + static_cast<std::int64_t>(group < 0 ? 0 : group) * p.chunks;
        if (group >= 0) {
            p.order[*place + rank] = row;
        }
        warp_barrier();  // everyone has read the place before it moves on
        if (group >= 0 && rank == 0) {
            *place += count_bits(same);
        }
        warp_barrier();
    });
}

SHIFCON_DEVICE int chunk_of_warp() { return static_cast<int>(block_index()) * kGroupingWarps + warp_index(); }

SHIFCON_KERNEL(32 * kGroupingWarps) count_rows(GroupingArguments p) {
    if (chunk_of_warp() < p.chunks) {
        count_chunk(p, chunk_of_warp());
    }
}

SHIFCON_KERNEL(kScanThreads) scan_groups(GroupingArguments p) {
    scan_counts(p, reinterpret_cast<int*>(shared_memory()));
}

SHIFCON_KERNEL(32 * kGroupingWarps) scatter_rows(GroupingArguments p) {
    if (chunk_of_warp() < p.chunks) {
        scatter_chunk(p, chunk_of_warp());
    }
}

// All three, with the counts in shared memory.
SHIFCON_KERNEL(32 * kOneBlockWarps) group_in_one_block(GroupingArguments p) {
    int* const of_warps = reinterpret_cast<int*>(shared_memory());
    p.counts = of_warps + kOneBlockWarps;
    count_chunk(p, warp_index());
    block_barrier();
    scan_counts(p, of_warps);
    block_barrier();
    scatter_chunk(p, warp_index());
}

}  // namespace

void group_rows(const GroupingArguments& p, void* stream) {
    constexpr int kInt = static_cast<int>(sizeof(int));
    if (one_block_groups(p.rows, p.ids.languages)) {
        const int counts = (p.ids.languages + 1) * p.chunks;
        launch(group_in_one_block, 1, 32 * kOneBlockWarps, (kOneBlockWarps + counts) * kInt, stream, p);
        return;
    }
    const int blocks = (p.chunks + kGroupingWarps - 1) / kGroupingWarps;
    launch(count_rows, blocks, 32 * kGroupingWarps, 0, stream, p);
    launch(scan_groups, 1, kScanThreads, kScanThreads / 32 * kInt, stream, p);
    launch(scatter_rows, blocks, 32 * kGroupingWarps, 0, stream, p);
}

}  // namespace shifcon
