// Stands in for PyTorch's thread pool in a build for the thread sanitizer (scripts/sanitize.py).
//
// That pool is libgomp's, which is not compiled with the sanitizer: it does not see the pool's barriers, and would
// call every hand-over between threads a race. std::thread it understands. The ranges go to more threads than PyTorch
// would use for little work, so that small shapes show the races of large ones.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

// The signatures are those of torch/csrc/stable/c/shim.h; hidden, so that the library's own calls end here.
extern "C" {

__attribute__((visibility("hidden"))) int32_t torch_get_num_threads(uint32_t* threads) {
  *threads = kThreads;
  return 0;
}

__attribute__((visibility("hidden"))) int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t /* grain */,
                                                                 void (*work)(int64_t, int64_t, void*),
                                                                 void* context) {
  const int64_t part = std::max<int64_t>((end - begin + kThreads - 1) / kThreads, 1);
  std::vector<std::thread> threads;
  for (; begin < end; begin += part)
    threads.emplace_back(work, begin, std::min(begin + part, end), context);  // an exception ends the process
  for (std::thread& thread : threads) thread.join();
  return 0;
}
}
