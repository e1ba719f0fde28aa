// Fresh memory comes in pages of 4 KiB, and the first write to each of them is a trip into the kernel: over a large
// result that takes several times as long as writing it. Huge pages of 2 MiB take that many fewer trips.

#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace shifcon {

// Ask for huge pages under a large result. It is advice: where the system has none to give, nothing changes.
// PyTorch's own allocator asks the same where THP_MEM_ALLOC_ENABLE=1.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = int64_t{4} << 20, kPage = 4096;
  if (bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace shifcon
