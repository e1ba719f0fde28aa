#include "cache.h"

#include <cstdlib>
#include <fstream>
#include <string>

namespace shifcon {
namespace {

// The last-level cache that the first processor sees, in bytes; 0 where the system does not tell. Not sysconf(): that
// of glibc 2.36 gave 320 MiB on an AMD machine whose cores share 32.
int64_t system_cache_bytes() {
  int64_t found = 0;
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    int64_t size = 0;
    char unit = 0;
    std::ifstream file(folder + "size");
    if (!(file >> size >> unit)) break;
    const int64_t bytes = unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
    if (bytes > found) found = bytes;
  }
  return found;
}

int64_t found_cache_bytes() {
  if (const char* asked = std::getenv("SHIFCON_CACHE_BYTES")) {
    const int64_t bytes = std::strtoll(asked, nullptr, 10);
    if (bytes > 0) return bytes;
  }
  const int64_t bytes = system_cache_bytes();
  return bytes > 0 ? bytes : int64_t{32} << 20;
}

}  // namespace

int64_t cache_bytes() {
  static const int64_t bytes = found_cache_bytes();
  return bytes;
}

bool past_cache(const Tensor& result, int64_t results) {
  constexpr int64_t kLine = 64;
  const int64_t element = result.element_size(), row_bytes = result.size(result.dim() - 1) * element;
  return results * result.numel() * element >= cache_bytes() / 4 && row_bytes % kLine == 0 &&
         reinterpret_cast<uintptr_t>(result.data_ptr()) % kLine == 0;
}

}  // namespace shifcon
