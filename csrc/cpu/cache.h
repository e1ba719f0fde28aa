// Which results are written past the cache (kernels/wide.h: store_result).
//
// An ordinary store fetches the line that it is about to overwrite, which is a third of the traffic of a pass that
// reads as much as it writes. A result that is small against the last-level cache is better off in it, where the next
// operation finds it; a large one has left it by the time anybody reads its beginning.

#pragma once

#include <cstdint>

namespace shifcon {

// The last-level cache in bytes: what the environment variable SHIFCON_CACHE_BYTES says, else what the system says, else
// 32 MiB; read once.
int64_t cache_bytes();

// Whether results that begin at `data` in rows of `row_bytes`, `bytes` in all, go past the cache: from a quarter of the
// last-level cache on (about where glibc's memcpy changes over), if every row begins on a cache line.
bool past_cache(const void* data, int64_t row_bytes, int64_t bytes);

}  // namespace shifcon
