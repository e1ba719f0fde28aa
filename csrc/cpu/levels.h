// Run-time choice between the kernels compiled for different vector instructions.
//
// A kernel `void name(const Arguments&, int64_t begin, int64_t end)` is compiled once per level, in the namespace
// shifcon::<level>. SHIFCON_KERNEL declares all of them; SHIFCON_PICK gives the one for this machine.
//
// avx512_bf16 runs the kernels of avx512. Those that multiply bfloat16 numbers are told, in their arguments, that they
// may use its instruction (kernels/pairs.h).

#pragma once

#include <cstdint>

namespace shifcon {

enum class Level : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

#ifdef SHIFCON_HAS_AVX512
#define SHIFCON_KERNEL(name, Arguments)                                                       \
  namespace baseline { void name(const Arguments&, int64_t begin, int64_t end); }             \
  namespace avx2 { void name(const Arguments&, int64_t begin, int64_t end); }                 \
  namespace avx512 { void name(const Arguments&, int64_t begin, int64_t end); }
#define SHIFCON_PICK(name) \
  ::shifcon::pick(&::shifcon::baseline::name, &::shifcon::avx2::name, &::shifcon::avx512::name)
#else
#define SHIFCON_KERNEL(name, Arguments) \
  namespace baseline { void name(const Arguments&, int64_t begin, int64_t end); }
#define SHIFCON_PICK(name) (&::shifcon::baseline::name)
#endif

// The fastest level of this machine, or what the environment variable SHIFCON_CPU_LEVEL names of those that it has
// ("baseline", "avx2", "avx512", "avx512_bf16"), read once.
Level level();

template <class Function>
Function* pick(Function* baseline, Function* avx2, Function* avx512) {
  switch (level()) {
    case Level::avx512_bf16:
    case Level::avx512: return avx512;
    case Level::avx2: return avx2;
    default: return baseline;
  }
}

}  // namespace shifcon
