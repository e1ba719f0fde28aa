// The instructions and launches that C++ has no words for. Everything else in this folder is ordinary C++, so that a
// test can put an emulator in the place of this file. Instructions as in the PTX ISA, 9.7.9 (cp.async, ldmatrix's
// shared addresses), 9.7.14.5 (mma, ldmatrix); all exist from sm_80 on.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "elements.cuh"

#define SHIFCON_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads, blocks a multiprocessor
#define SHIFCON_DEVICE __device__ __forceinline__
#define SHIFCON_KEY CUDA

namespace shifcon {

SHIFCON_DEVICE unsigned block_index() { return blockIdx.x; }
SHIFCON_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
SHIFCON_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SHIFCON_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
SHIFCON_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

SHIFCON_DEVICE void block_barrier() { __syncthreads(); }
SHIFCON_DEVICE void warp_barrier() { __syncwarp(); }

// The lanes of the warp that hold the same value, as bits.
SHIFCON_DEVICE unsigned lanes_with(int value) { return __match_any_sync(0xffffffffu, value); }
SHIFCON_DEVICE int count_bits(unsigned bits) { return __popc(bits); }
SHIFCON_DEVICE int shuffle_up(int value, int distance) { return __shfl_up_sync(0xffffffffu, value, distance); }
SHIFCON_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

SHIFCON_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char shared[];
    return shared;
}

SHIFCON_DEVICE unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, both aligned to 16; zeros, and no read, if they are not present.
SHIFCON_DEVICE void copy_async(void* shared, const void* global, bool present) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(present ? 16 : 0)
                 : "memory");
}
SHIFCON_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Wait until at most this many of the thread's latest groups are still under way.
template <int groups>
SHIFCON_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(groups) : "memory");
}

// Four 8 x 8 matrices of 16 bits: lane l gives the address of row l % 8 of matrix l / 8, and gets from matrix i the
// elements (lane / 4, 2 (lane % 4)) and the one after it; transposed, (2 (lane % 4), lane / 4) and the one below.
SHIFCON_DEVICE void load_matrices(std::uint32_t (&result)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
}
SHIFCON_DEVICE void load_matrices_transposed(std::uint32_t (&result)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sum += a b for a 16 x 16 a, 16 x 8 b in T and float32 sums. With g = lane / 4 and q = 2 (lane % 4) a lane holds
// a[g][q..], a[g + 8][q..], a[g][q + 8..], a[g + 8][q + 8..] (pairs), b[q..][g], b[q + 8..][g], sum[g][q..] and
// sum[g + 8][q..]  (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type").
template <typename T>
SHIFCON_DEVICE void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    if constexpr (is_float16<T>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

SHIFCON_DEVICE float widen(float value) { return value; }
SHIFCON_DEVICE float widen(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
SHIFCON_DEVICE float widen(Float16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Two numbers rounded to nearest, the first in the low half.
template <typename T>
SHIFCON_DEVICE std::uint32_t pack(float first, float second) {
    std::uint32_t result;
    if constexpr (is_float16<T>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    }
    return result;
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("subspace_project: ") + what + ": " + cudaGetErrorString(status));
    }
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), std::int64_t blocks, int threads, int shared_bytes, void* stream,
            const Arguments& arguments) {
    if (blocks == 0) {
        return;
    }
    if (shared_bytes > 48 * 1024) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    check(cudaGetLastError(), "launch");
}

inline int multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device attribute");
    return count;
}

// Makes a tensor's device the current one while it lives, and holds the current stream. The runtime that is linked
// into this library follows the context that PyTorch's guard has made current; saying it again costs nothing and does
// not lean on that.
struct Device {
    explicit Device(const torch::stable::Tensor& tensor) : guard(tensor.get_device_index()) {
        check(cudaSetDevice(tensor.get_device_index()), "set device");
        if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
            throw std::runtime_error("subspace_project: PyTorch has no current stream");
        }
    }
    torch::stable::accelerator::DeviceGuard guard;
    void* stream = nullptr;
};

}  // namespace shifcon
