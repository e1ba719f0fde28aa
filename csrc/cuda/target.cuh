// Where the kernels run. nvcc compiles them for GPUs; a C++ compiler compiles the same sources against an emulator of
// the few things in gpu.cuh, for the tests of index arithmetic and synchronisation that need no GPU.
#pragma once

#if defined(__CUDACC__)
#include "gpu.cuh"
#else
#include "emulated_gpu.h"  // tests/native
#endif
