#include "levels.h"

#include <cstdlib>
#include <cstring>

namespace shifcon {
namespace {

Level best_of_this_machine() {
#ifdef SHIFCON_HAS_AVX512
  __builtin_cpu_init();  // also asks the operating system whether it keeps the wide registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Level::avx512_bf16;
  if (avx2 && avx512) return Level::avx512;
  if (avx2) return Level::avx2;  // every processor with AVX2 converts float16 as well (F16C)
#endif
  return Level::baseline;
}

// Not always the best: Intel's processors begin a product of pairs every other cycle and two of float32 every cycle
// (Sapphire Rapids, measured), so pairs take longer there. AMD's are the faster for them.
Level fastest(Level best) {
#ifdef SHIFCON_HAS_AVX512
  if (best == Level::avx512_bf16 && __builtin_cpu_is("intel")) return Level::avx512;
#endif
  return best;
}

Level chosen() {
  const Level best = best_of_this_machine();
  const char* asked = std::getenv("SHIFCON_CPU_LEVEL");
  if (asked == nullptr) return fastest(best);
  Level level = fastest(best);
  if (std::strcmp(asked, "baseline") == 0) level = Level::baseline;
  if (std::strcmp(asked, "avx2") == 0) level = Level::avx2;
  if (std::strcmp(asked, "avx512") == 0) level = Level::avx512;
  if (std::strcmp(asked, "avx512_bf16") == 0) level = Level::avx512_bf16;
  return level < best ? level : best;
}

}  // namespace

Level level() {
  static const Level level = chosen();
  return level;
}

}  // namespace shifcon
