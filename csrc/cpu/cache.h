// Which results are written past the cache (kernels/wide.h: store_result).
//
// An ordinary store fetches the line that it is about to overwrite, which is a third of the traffic of a pass that
// reads as much as it writes. A result that is small against the last-level cache is better off in it, where the next
// operation finds it; a large one has left it by the time anybody reads its beginning.

#pragma once

#include <cstdint>

#include "tensors.h"

namespace shifcon {

// The last-level cache in bytes: what the environment variable SHIFCON_CACHE_BYTES says, else what the system says, else
// 32 MiB; read once.
int64_t cache_bytes();

// Whether a contiguous result, one of `results` as large that are written together, goes past the cache: from a quarter
// of the last-level cache on for all of them (about where glibc's memcpy changes over), if its rows begin on cache lines.
bool past_cache(const Tensor& result, int64_t results = 1);

}  // namespace shifcon
